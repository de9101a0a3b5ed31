"""Ratio, error and speed of the codec on real KV pages: on the GPU, and without one through the reference.

Every measurement is a *row*: a dict of plain values with the keys of ``ROW``, None where one does not apply.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .. import reference
from ..bound import Bound
from ..format import HEADER_BYTES, MODES, ROW_WORDS, Geometry
from . import data

ROW = (
    "data", "mbytes", "codec", "bound", "ratio", "bits_per_value",
    "compress_gbps", "compress_spread_percent", "compress_of_copy",
    "decompress_gbps", "decompress_spread_percent", "decompress_of_copy", "max_error_over_eb",
)  # fmt: skip
KV_BOUNDS = ("rms:0.02", "rms:0.05", "rms:0.2")
KV_CODINGS = ("fixed", "entropy")
ARRAY_BOUND = "rel:0.001"
LAYER_BOUNDS = ("rms:0.02", "rms:0.05", "rms:0.1", "rms:0.2", "rms:0.4")
METADATA_BYTES = 4 * ROW_WORDS  # of a page in a table; a blob, which stands alone, has HEADER_BYTES
#: A page's mean square is summed in float32 (format.py, 2.7), so its eb is that of float64 to this much only.
RMS_TOLERANCE = 2.0**-16


@dataclass(frozen=True)
class PageSet:
    """Pages of one shape and dtype to measure with: ``pages`` is (n, tokens, channels)."""

    name: str
    pages: np.ndarray
    geometry: Geometry


def page_sets(quick: bool = False) -> list[PageSet]:
    """Return the sample as pages of 64 and 32 KiB, bfloat16 and float16, K and V side by side by head.

    64 KiB is 16 tokens of 8 KV heads of 128 channels (Llama 3 8B, one layer), 32 KiB of 8 heads of 64.
    Last, for comparison, the first one's pages in groups of 32 channels of a token, where the others have groups
    of 16 tokens x 2 channels. ``quick``: the first of them only.
    """
    sets = []
    for heads, head_size in ((8, 128), (8, 64)):
        for dtype, short in (("bfloat16", "bf16"), ("float16", "fp16")):
            pages = data.packed_pages(heads, head_size, dtype=dtype)
            geometry = Geometry(*pages.shape[1:], parts=(head_size, head_size))
            sets.append(PageSet(f"KV {short} {pages[0].nbytes >> 10} KiB", pages, geometry))
    pages, tokens = sets[0].pages, sets[0].geometry
    flat = Geometry(1, tokens.channels, outer=tokens.tokens, parts=tokens.parts)  # same parts, steps and errors
    sets.append(PageSet(f"KV {pages[0].nbytes >> 10} KiB, by channel", pages, flat))
    return sets[:1] if quick else sets


def array_sample() -> np.ndarray:
    """Return the sample's K as float32, (tokens of all layers, 192): what ``compress`` is measured with."""
    return data.kv_pages()["K"].astype(np.float32).reshape(-1, 192)


def row(**values) -> dict:
    """Return a row with ``values``, None for every other key of ROW."""
    unknown = values.keys() - set(ROW)
    assert not unknown, unknown
    return dict.fromkeys(ROW) | values


# --- error ------------------------------------------------------------------------------------------------
def as_float32(x, xp=np):
    """Return float16, bfloat16 or float32 values as float32, exactly, in the array module ``xp``."""
    if x.dtype == data.DTYPES["bfloat16"]:
        return (x.view(xp.uint16).astype(xp.uint32) << 16).view(xp.float32)
    return x.astype(xp.float32)


def split_parts(pages, parts) -> list:
    """Return pages (n, tokens, channels) as one array a part, (n, tokens, turns, width): [all] or [K, V]."""
    if parts is None:
        return [pages[:, :, None, :]]
    turns = pages.reshape(*pages.shape[:2], -1, sum(parts))
    return [turns[..., : parts[0]], turns[..., parts[0] :]]


def page_error_over_eb(pages, decoded, bound, parts=None, xp=np) -> float:
    """Return the largest |x - y| / eb of pages (n, tokens, channels), eb being each page's and part's own.

    Infinity if a value came back as NaN. The values of ``pages`` must be finite.
    """
    bound, worst = Bound.parse(bound), 0.0
    for x, y in zip(split_parts(pages, parts), split_parts(decoded, parts), strict=True):
        x, y = as_float32(x, xp), as_float32(y, xp)
        if bound.kind == "abs":
            eb = xp.full(len(x), bound.value)
        elif bound.kind == "rel":
            eb = bound.value * (x.max(axis=(1, 2, 3)) - x.min(axis=(1, 2, 3))).astype(xp.float64)
        else:
            eb = bound.value * xp.sqrt(xp.mean(xp.square(x, dtype=xp.float64), axis=(1, 2, 3)))
        error = xp.abs(x - y).max(axis=(1, 2, 3)).astype(xp.float64)
        ratio = float((error / eb).max())
        worst = max(worst, ratio if math.isfinite(ratio) else math.inf)  # max(0, nan) is 0
    return worst


def check_within(error_over_eb: float, what: str, tolerance: float = RMS_TOLERANCE) -> float:
    """Return ``error_over_eb``; raise AssertionError if it is beyond 1 (+ tolerance): nothing wrong is timed."""
    if not error_over_eb <= 1 + tolerance:
        raise AssertionError(f"{what}: the bound is broken, max error / eb = {error_over_eb:.6g}")
    return error_over_eb


def value_range_eb(x, bound) -> float:
    """Return the eb of a ``rel`` bound on the finite array ``x``."""
    return Bound.parse(bound).value * float(x.max() - x.min())


# --- through the reference --------------------------------------------------------------------------------
def reference_rows(bounds=KV_BOUNDS, quick: bool = False, step=lambda text: None) -> list[dict]:
    """Return rows (no speeds) of the packaged sample through ``reference``, the bounds checked.

    Args:
        quick: fewer pages and page shapes.
        step: called with a line on what comes next.
    """
    rows = []
    for pages in page_sets(quick):
        for coding, bound in itertools.product(KV_CODINGS, bounds):
            taken = pages.pages[:: (6 if quick else 1) * (1 if coding == "fixed" else 4)]
            step(f"{pages.name}, {coding}, {bound}: {len(taken)} pages through the reference")
            rows.append(_reference_pages(pages.name, taken, pages.geometry, coding, bound))
    x = array_sample()[:1024] if quick else array_sample()
    eb = value_range_eb(x, ARRAY_BOUND)
    for mode in MODES:
        step(f"K f32, {mode}: through the reference")
        stream = reference.compress(x, eb, mode)
        y = reference.decompress(stream, x.size, x.dtype, eb, mode).reshape(x.shape)
        error = float(np.abs(x - y).max()) / eb
        rows.append(
            row(
                data="K f32", mbytes=x.nbytes / 1e6, codec=f"cuszp {mode}", bound=ARRAY_BOUND,
                ratio=x.nbytes / len(stream), bits_per_value=8 * len(stream) / x.size, max_error_over_eb=error,
            )
        )  # fmt: skip
    return rows


def page_bytes(blobs: list[bytes]) -> int:
    """Return what the pages of ``blobs`` take in a table: METADATA_BYTES instead of a header each."""
    return sum(len(blob) - HEADER_BYTES + METADATA_BYTES for blob in blobs)


def _reference_pages(name: str, pages: np.ndarray, geometry: Geometry, coding: str, bound: str) -> dict:
    blobs = [reference.encode_page(page, bound, coding, geometry=geometry) for page in pages]
    decoded = np.stack([reference.decode_page(blob) for blob in blobs]).reshape(pages.shape)
    nbytes = page_bytes(blobs)
    error = page_error_over_eb(pages, decoded, bound, geometry.parts)
    return row(
        data=name, mbytes=pages.nbytes / 1e6, codec=f"kv {coding}", bound=bound, ratio=pages.nbytes / nbytes,
        bits_per_value=8 * nbytes / pages.size, max_error_over_eb=check_within(error, f"{name}, {bound}"),
    )  # fmt: skip


def rate_error(quick: bool = False, step=lambda text: None) -> list[dict]:
    """Return the points of the rate-error curve of K and of V: pages of 16 tokens x 192 channels, bfloat16.

    Returns:
        dicts of ``part`` (K or V), ``bound``, ``bits_per_value`` (metadata counted), ``rmse`` and ``max_error``;
        the errors are relative to the root mean square of their page, and means over the pages.
    """
    points = []
    for part, pages in data.kv_pages().items():
        pages = pages[:: 16 if quick else 4]
        x = as_float32(pages).astype(np.float64)
        rms = np.sqrt(np.mean(x**2, axis=(1, 2)))
        for exponent in np.arange(-7, -0.5, 1 if quick else 0.5):
            bound = str(Bound("rms", round(float(2**exponent), 6)))
            step(f"rate against error: {part}, {bound}")
            blobs = [reference.encode_page(page, bound) for page in pages]
            error = x - as_float32(np.stack([reference.decode_page(blob) for blob in blobs]))
            nbytes = page_bytes(blobs)
            points.append(
                {
                    "part": part,
                    "bound": bound,
                    "bits_per_value": 8 * nbytes / pages.size,
                    "rmse": float(np.mean(np.sqrt(np.mean(error**2, axis=(1, 2))) / rms)),
                    "max_error": float(np.mean(np.abs(error).max(axis=(1, 2)) / rms)),
                }
            )
    return points


def layer_bits(step=lambda text: None) -> list[dict]:
    """Return what K and V of each layer of the sample take: pages of 16 tokens x 192 channels, bfloat16.

    Returns:
        dicts of ``coding``, ``bound``, ``layer`` (its number in the model), ``part`` (K or V) and
        ``bits_per_value`` (metadata counted).
    """
    rows = []
    for coding, bound in itertools.product(KV_CODINGS, LAYER_BOUNDS):
        step(f"bits of each layer: {coding}, {bound}")
        for part, pages in data.kv_pages().items():
            for layer, own in zip(data.layers(), np.split(pages, len(data.layers())), strict=True):
                nbytes = page_bytes([reference.encode_page(page, bound, coding) for page in own])
                what = {"coding": coding, "bound": bound, "layer": layer, "part": part}
                rows.append(what | {"bits_per_value": 8 * nbytes / own.size})
    return rows
