"""Launches of the ``kv`` kernels: device pointers in, one launch a batch, on CuPy's current stream.

No allocation, no host synchronisation, no policy. Arguments are asserted, not diagnosed: callers check.
"""

from __future__ import annotations

import functools
import math

from ..bound import Bound
from ..format import CODINGS, DTYPES, LOWEST_STEP, STEP_LIMIT, TILE_TOKENS, Geometry, step_number
from . import MOST_SHARED, launch

MAX_THREADS = 512  # as in kv_common.cuh; each thread takes two groups
KERNELS = {
    name: tuple(f"{name}<{dtype}, {fast}>" for dtype in DTYPES for fast in ("true", "false"))
    for name in ("kv_encode", "kv_decode")
}
_KINDS = {"abs": 0, "rel": 1, "rms": 2}


def encode(
    pages_ptr: int,
    payloads_ptr: int,
    rows_ptr: int,
    num_pages: int,
    dtype: str,
    geometry: Geometry,
    bounds: tuple[Bound, ...],
    coding: str = "fixed",
    *,
    aligned: bool,
    blocks: int | None = None,
    regions_ptr: int = 0,
    cursors_ptr: int = 0,
) -> None:
    """Encode ``num_pages`` pages, each into a slot of its own, or packed into regions they share.

    Args:
        pages_ptr: device or mapped address of uint64[num_pages], the addresses of the pages.
        payloads_ptr: likewise of the slots, each 16-byte aligned with room for a raw page, in device or mapped
            pinned memory; or, with ``cursors_ptr``, of the region each page goes to.
        rows_ptr: 16-byte aligned address of uint32[num_pages, 4], the table rows to write.
        dtype: ``float16`` or ``bfloat16``.
        bounds: one a part.
        aligned: whether every page address is a multiple of 8.
        blocks: thread blocks to use at most; one a page when None.
        regions_ptr: address of uint32[num_pages], each page's index into the cursors; 0: all have index 0.
        cursors_ptr: device address of uint32 cursors, room taken in each region in units of 16 bytes; zero them
            before the first launch. A payload then lies 16 x its row's place (word 3) after its region's address.
            A region needs room for its pages raw, each rounded up to 16 bytes.
    """
    assert num_pages > 0 and rows_ptr % 16 == 0
    fast, code, bound_arguments = _encoding(dtype, geometry, bounds, coding, aligned)
    _launch(
        "kv_encode", dtype, fast, geometry, num_pages, blocks, "Q" * 18 + "qqdqqd",
        (
            pages_ptr, payloads_ptr, rows_ptr, regions_ptr, cursors_ptr, num_pages, code,
            *_geometry_arguments(geometry), *bound_arguments,
        ),
    )  # fmt: skip


@functools.lru_cache(1024)
def _encoding(dtype, geometry, bounds, coding, aligned) -> tuple[bool, int, tuple]:
    """(whether the fast kernel will do, number of the coding, (kind, step, factor) of two parts)."""
    assert len(bounds) == len(geometry.part_values)
    fast = aligned and _threads(geometry)[1] and not any(w % 4 for w in _widths(geometry))
    parts = [_part(bound, n) for bound, n in zip(bounds, geometry.part_values, strict=True)]
    raw = coding == "raw" or any(k == 0 and s < LOWEST_STEP[dtype] for k, s, _ in parts)
    first, second = (parts * 2)[:2]
    return fast, CODINGS.index("raw" if raw else coding), (*first, *second)


def decode(
    payloads_ptr: int,
    rows_ptr: int,
    pages_ptr: int,
    status_ptr: int,
    num_pages: int,
    dtype: str,
    geometry: Geometry,
    *,
    aligned: bool,
    blocks: int | None = None,
) -> None:
    """Decode ``num_pages`` pages; ``status`` (uint32[num_pages], device) becomes 0 where a page is good.

    Args:
        payloads_ptr: as in ``encode``; the row's place counts from there.
        rows_ptr, pages_ptr, num_pages, dtype, geometry, blocks: as in ``encode``.
        aligned: whether every page address is a multiple of 4.
    """
    assert num_pages > 0 and rows_ptr % 16 == 0
    fast = aligned and _threads(geometry)[1] and not geometry.flat
    _launch(
        "kv_decode", dtype, fast, geometry, num_pages, blocks, "Q" * 16,
        (payloads_ptr, rows_ptr, pages_ptr, status_ptr, num_pages, *_geometry_arguments(geometry)),
    )  # fmt: skip


def _launch(name, dtype, fast, geometry, num_pages, blocks, types, arguments) -> None:
    threads = _threads(geometry)[0]
    shared = 64 * 2 * threads + 16
    assert shared <= MOST_SHARED
    grid = min(num_pages, blocks or num_pages)
    expression = f"{name}<{dtype}, {'true' if fast else 'false'}>"
    launch(name, expression, grid, threads, types, arguments, shared)


def block_threads(geometry: Geometry) -> int:
    """Return the threads of a block for such pages."""
    return _threads(geometry)[0]


@functools.lru_cache(1024)
def _threads(geometry: Geometry) -> tuple[int, bool]:
    """Threads of a block, and whether they cover a page."""
    needed = -(-geometry.groups // 64) * 32
    return min(needed, MAX_THREADS), needed <= MAX_THREADS


def _widths(geometry: Geometry) -> tuple[int, ...]:
    """Extents along which the two groups of a thread must not part (1: never, for flat pages)."""
    return (1,) if geometry.flat else (geometry.channels, *(geometry.parts or ()))


@functools.lru_cache(1024)
def _geometry_arguments(geometry: Geometry) -> tuple[int, ...]:
    channels, parts = geometry.channels, geometry.parts
    kw, vw = parts or (0, 0)
    flat = geometry.flat
    numbers = (
        geometry.groups,
        1 if flat else channels // 2,
        32 if flat else TILE_TOKENS * channels,
        2 if flat else channels,
        geometry.values,
        sum(parts) if parts else channels,
        parts[0] if parts else channels,
        geometry.tokens,
        channels,
        kw | vw << 16,
        geometry.outer,
    )
    return tuple(int(number) for number in numbers)


def _part(bound: Bound, n: int) -> tuple[int, int, float]:
    """(kind, step number, factor) of 2.7 for the kernel."""
    kind = _KINDS[bound.kind]
    if bound.kind == "abs":
        return kind, min(step_number(2 * bound.value), STEP_LIMIT), 0.0
    factor = 2 * bound.value if bound.kind == "rel" else 4 * bound.value * bound.value / n
    return kind, 0, min(factor, 2.0**1023) if math.isfinite(factor) else 2.0**1023
