"""What a compressed cache costs a language model: KL divergence, top-1 agreement and NLL beside an untouched one.

Windows of a text go through a causal LM in bfloat16: once as it is, which is the reference, and once a *variant*,
each layer's K (after RoPE) and V replaced, at all positions, by what a codec brings back, before attention sees
them. Codings bring back the same values at one bound, which is checked, so they share a run. The arithmetic is on
arrays, NumPy's on the CPU and CuPy's on a GPU; torch runs the model and no more.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import reference
from ..bound import parse_parts
from ..codec import encode_pages
from ..format import TILE_TOKENS, Geometry
from ..tables import BUILT_IN, Tables
from . import emulated
from .codec import as_float32, check_within, page_bytes, page_error_over_eb
from .data import DTYPES
from .machine import gpu_missing

ROW = (
    "variant", "bound", "bits_per_value", "k_bits_per_value", "v_bits_per_value", "ratio", "max_error_over_eb",
    "kl", "kl_error", "top1", "top1_error", "ppl", "nll_difference", "nll_difference_error",
)  # fmt: skip
ALPHAS = (0.02, 0.035, 0.05, 0.06, 0.1, 0.17, 0.2, 0.3)
QUICK_ALPHAS = (0.05, 0.1, 0.2)
#: V bears about 1.5 times the error of K: pairs near FP8's KL, then near NVFP4's
PAIRS = (
    (0.045, 0.07), (0.045, 0.08), (0.05, 0.07), (0.05, 0.075), (0.055, 0.07), (0.055, 0.075),
    (0.14, 0.24), (0.14, 0.28), (0.14, 0.3), (0.16, 0.24), (0.16, 0.28), (0.16, 0.3),
)  # fmt: skip
CONTEXT, TOKENS, QUICK_WINDOWS = 2048, 100_352, 4
BATCH = 4  # windows in a forward pass; their logits are kept in bfloat16, twice
SLICE_VALUES = 1 << 24  # logits that are compared at once, in float32
CALIBRATION_PAGES = 16  # of a layer; 24 instead of 12 save 0.003 bits a value, and take twice the time
UNTOUCHED = "bf16"
CALIBRATED = "entropy, calibrated"
OURS = ("fixed", "entropy", CALIBRATED)  # at one bound they bring back the same values
PEERS = ("FP8 e4m3", "NVFP4")  # whose KL our codings are read off at
_BFLOAT16 = DTYPES["bfloat16"]


@dataclass(frozen=True)
class Variant:
    """What the cache goes through.

    Args:
        codec: a name in ``emulated.FORMATS``; or, of stream kv, a coding or CALIBRATED.
        bound: of a coding: text like ``rms:0.05``, or ``rms:0.05/rms:0.1`` for K and V.
    """

    codec: str
    bound: str | None = None

    @property
    def name(self) -> str:
        """As it is called in tables."""
        return f"kv {self.codec}" if self.bound else self.codec


def default_bounds(quick: bool = False) -> list[str]:
    """Return the bounds that are measured: for both parts, then (not if ``quick``) for K and V apart."""
    if quick:
        return [f"rms:{alpha}" for alpha in QUICK_ALPHAS]
    return [f"rms:{alpha}" for alpha in ALPHAS] + [f"rms:{k}/rms:{v}" for k, v in PAIRS]


def variants(bounds: list[str]) -> list[Variant]:
    """Return the emulated formats, then each of ours at each bound."""
    return [*map(Variant, emulated.FORMATS), *(Variant(codec, bound) for codec in OURS for bound in bounds)]


# --- pages ------------------------------------------------------------------------------------------------
def to_pages(k, v, xp=np):
    """Return K and V (batch, heads, tokens, channels) as pages of 16 tokens, in one of vLLM's layouts.

    Returns:
        (batch * tokens / 16, 16, heads * (K's + V's channels)): ``[tokens][heads][K|V]``. Bits, not values.
    """
    kv = xp.concatenate([k.view(np.uint16), v.view(np.uint16)], axis=3).transpose(0, 2, 1, 3)
    return kv.reshape(-1, TILE_TOKENS, kv.shape[2] * kv.shape[3]).view(_BFLOAT16)


def from_pages(pages, k_shape, v_shape, xp=np):
    """Return the K and V, of the shapes given, that ``to_pages`` made ``pages`` of."""
    batch, heads, tokens, k_width = k_shape
    kv = pages.view(np.uint16).reshape(batch, tokens, heads, k_width + v_shape[3]).transpose(0, 2, 1, 3)
    parts = kv[..., :k_width], kv[..., k_width:]
    return tuple(xp.ascontiguousarray(part).view(_BFLOAT16) for part in parts)


def one_part(x, xp=np):
    """Return K or V alone as pages: (batch * tokens / 16, 16, heads * channels)."""
    x = xp.ascontiguousarray(x.view(np.uint16).transpose(0, 2, 1, 3))
    return x.reshape(-1, TILE_TOKENS, x.shape[2] * x.shape[3]).view(_BFLOAT16)


def encoded(pages, bound, geometry: Geometry | None, coding: str, tables: Tables = BUILT_IN):
    """Encode ``pages`` (n, tokens, channels); return (bits, 16 bytes of metadata a page included, how to decode).

    On a GPU through the kernels, in NumPy through the reference.
    """
    if isinstance(pages, np.ndarray):
        options = {"geometry": geometry, "tables": tables}
        blobs = [reference.encode_page(page, bound, coding, **options) for page in pages]
        return 8 * page_bytes(blobs), lambda: np.stack(
            [reference.decode_page(blob, tables=tables) for blob in blobs]
        )
    result = encode_pages(pages, bound, coding, geometry=geometry, tables=tables)
    return 8 * result.nbytes, result.decode


# --- variants ---------------------------------------------------------------------------------------------
def replaced(variants: list[Variant], k, v, xp=np, tables: tuple | None = None):
    """Return what ``variants``, which bring back the same values, bring back of one layer's K and V.

    Args:
        variants: an emulated format, or some of ours at one bound.
        k, v: (batch, heads, tokens, channels) bfloat16, tokens a multiple of 16.
        tables: of CALIBRATED: for both, for K, for V; see ``calibrate``.

    Returns:
        (K, V, (bits of both, of K, of V) of each variant, largest |x - y| / eb or None). Of ours, the bits
        of K and of V are those of pages that hold one of them alone, so they count the metadata of two pages.

    Raises:
        AssertionError: values that are not the same, or that break the bound.
    """
    if variants[0].codec in emulated.FORMATS:
        results = []
        for x, code in zip((k, v), emulated.FORMATS[variants[0].codec], strict=True):
            y, bits = code(as_float32(x, xp), xp)
            results.append((to_bfloat16(y, xp), bits))
        (k, k_bits), (v, v_bits) = results
        return k, v, [(k_bits + v_bits, k_bits, v_bits)], None
    bounds = parse_parts(variants[0].bound, 2)
    pages, alone = to_pages(k, v, xp), [one_part(k, xp), one_part(v, xp)]
    geometry = Geometry(*pages.shape[1:], parts=(k.shape[3], v.shape[3]))
    jobs = [(pages, bounds, geometry), (alone[0], bounds[0], None), (alone[1], bounds[1], None)]
    decoded, bits = None, []
    for variant in variants:
        coding, own = ("entropy", tables) if variant.codec == CALIBRATED else (variant.codec, (BUILT_IN,) * 3)
        results = [encoded(*job, coding, of_job) for job, of_job in zip(jobs, own, strict=True)]
        bits.append(tuple(n for n, _ in results))
        back = results[0][1]()
        decoded = back if decoded is None else decoded
        if not same_numbers(back, decoded):
            raise AssertionError(f"{variant.name}, {variant.bound}: other values than {variants[0].name}")
    result = from_pages(decoded, k.shape, v.shape, xp)
    errors = [
        page_error_over_eb(part, one_part(back, xp), bound, None, xp)
        for part, back, bound in zip(alone, result, bounds, strict=True)
    ]
    return *result, bits, check_within(max(errors), f"{variants[0].name}, {variants[0].bound}")


def same_numbers(x, y) -> bool:
    """Return whether 16-bit floats are equal, bit for bit but for the sign of zeros.

    >>> x = np.float16([0.0, np.nan, 1.0])
    >>> same_numbers(x, np.float16([-0.0, np.nan, 1.0])), same_numbers(x, -x)
    (True, False)
    """
    x, y = x.view(np.uint16), y.view(np.uint16)
    return bool(((x == y) | ((x | y) & 0x7FFF == 0)).all())


def to_bfloat16(x, xp=np):
    """Return finite float32 ``x`` rounded to bfloat16, ties to even, C-contiguous."""
    bits = xp.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(_BFLOAT16)


# --- comparing --------------------------------------------------------------------------------------------
def compare(expected, logits, tokens, xp=np):
    """Return how the next-token distributions of one window differ, as means over its positions.

    Args:
        expected, logits: (positions, vocabulary) bfloat16 or float32: the reference's and the variant's.
        tokens: (positions,) integers: the window itself; position i predicts token i + 1.

    Returns:
        (KL(expected || logits) in nats, share of positions with the same most likely token (the first of equals),
        NLL of the next token under ``expected``, and under ``logits``). NLL has one position less.
    """
    positions, vocabulary = logits.shape
    totals = np.zeros(4)
    size = max(1, SLICE_VALUES // vocabulary)
    for begin in range(0, positions, size):
        part = slice(begin, begin + size)
        x, y = as_float32(expected[part], xp), as_float32(logits[part], xp)
        weights, x_total = _exponentials(x, xp)
        y_total = _exponentials(y, xp)[1]
        difference = (weights * (x - y)).sum(axis=1, dtype=np.float64) / weights.sum(axis=1, dtype=np.float64)
        kl = difference - (x_total - y_total)
        same = x.argmax(axis=1) == y.argmax(axis=1)
        following = tokens[begin + 1 : begin + 1 + size]
        rows = xp.arange(len(following))
        nll = [
            (total[: len(rows)] - values[rows, following]).sum() for values, total in ((x, x_total), (y, y_total))
        ]
        totals += [float(total) for total in (kl.sum(), same.sum(), *nll)]
    return totals / [positions, positions, positions - 1, positions - 1]


def _exponentials(x, xp):
    """(exp(x - its maximum), log of the sum of exp(x)) of each row, the latter in float64."""
    top = x.max(axis=1, keepdims=True)
    weights = xp.exp(x - top)
    return weights, xp.log(weights.sum(axis=1, dtype=np.float64)) + top[:, 0]


def mean_and_error(window_means) -> tuple[float, float]:
    """Return the mean over windows of equal length, and its standard error.

    Windows, not tokens, are taken as independent of one another: tokens of a window are not.

    >>> mean_and_error([1.0, 2.0, 3.0, 2.0])
    (2.0, 0.408248290463863)
    """
    x = np.asarray(window_means, np.float64)
    if len(x) < 2:
        raise ValueError(f"a standard error needs at least 2 windows, got {len(x)}")
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def row(variant: Variant | None, windows, bits=None, values=None, error=None) -> dict:
    """Return a row of the result.

    Args:
        variant: None for the reference.
        windows: (windows, 4): what ``compare`` returned for each.
        bits: (of both, of K, of V) in all.    values: (of both, of K, of V).    error: largest |x - y| / eb.
    """
    kl, top1, expected, nll = np.asarray(windows, np.float64).T
    result = dict.fromkeys(ROW) | {"ppl": math.exp(nll.mean())}
    if variant is None:
        return result | {"variant": UNTOUCHED, "bits_per_value": 16.0, "ratio": 1.0}
    rates = [float(b / n) for b, n in zip(bits, values, strict=True)]
    result |= {"variant": variant.name, "bound": variant.bound, "max_error_over_eb": error}
    result |= dict(zip(("bits_per_value", "k_bits_per_value", "v_bits_per_value"), rates, strict=True))
    result["ratio"] = 16 / rates[0]
    for name, of_windows in (("kl", kl), ("top1", top1), ("nll_difference", nll - expected)):
        result[name], result[f"{name}_error"] = mean_and_error(of_windows)
    return result


def bits_at(rows: list[dict], kl: float) -> float | None:
    """Return the bits/value at which ``rows`` reach ``kl``, log-linear between neighbours; None if beyond them.

    Rows that take more bits than another and are no better are left out.

    >>> rows = [{"bits_per_value": b, "kl": kl} for b, kl in ((6, 0.01), (4, 0.04), (5, 0.5), (3, 0.16))]
    >>> bits_at(rows, 0.02), bits_at(rows, 0.001)
    (5.0, None)
    """
    front, best = [], math.inf
    for bits, value in sorted((r["bits_per_value"], r["kl"]) for r in rows if r["kl"] > 0):
        if value < best:
            front.append((bits, best := value))
    for (bits, value), (more, less) in zip(front, front[1:], strict=False):
        if less <= kl <= value:
            return bits + (more - bits) * math.log(value / kl) / math.log(value / less)
    return None


def at_equal_kl(rows: list[dict]) -> list[dict]:
    """Return what each coding takes at the KL of FP8 and of NVFP4.

    Returns:
        dicts of ``peer``, ``kl``, ``peer_bits``, ``variant``, ``bits`` (one bound for K and V) and ``bits_apart``
        (all bounds, never more than that); None where the bounds do not reach the KL.
    """
    result = []
    ours = dict.fromkeys(r["variant"] for r in rows if r["bound"])
    for peer in (r for r in rows if r["variant"] in PEERS):
        for name in ours:
            own = [r for r in rows if r["variant"] == name]
            same = bits_at([r for r in own if "/" not in r["bound"]], peer["kl"])
            apart = bits_at(own, peer["kl"])
            if same is not None and same < apart:  # a pair above the line between its neighbours
                apart = same
            result.append(
                {"peer": peer["variant"], "kl": peer["kl"], "peer_bits": peer["bits_per_value"], "variant": name,
                 "bits": same, "bits_apart": apart}
            )  # fmt: skip
    return result


# --- the model --------------------------------------------------------------------------------------------
def array_module(model):
    """Return the module of the arrays that the codec takes where ``model`` is: NumPy or CuPy."""
    if model.device.type != "cuda":
        return np
    import cupy

    return cupy


def calibrate(model, held_out: np.ndarray, bounds: list[str], notes: list[str], step=lambda text: None) -> dict:
    """Return (layer, bound) -> tables of coding entropy: for pages of K and V, for K's alone, for V's alone.

    Args:
        held_out: (windows, tokens) int64 token ids, not among those that are measured.
        notes: takes a line on what the tables were made from.
    """
    import torch

    xp, layers = array_module(model), {}

    def collect(k, v, layer):
        pages = to_pages(k, v, xp).view(np.uint16)
        pages = pages[:: max(1, len(pages) // CALIBRATION_PAGES)][:CALIBRATION_PAGES]
        pages = (pages if xp is np else pages.get()).view(_BFLOAT16)
        layers[layer] = pages, Geometry(*pages.shape[1:], parts=(k.shape[3], v.shape[3]))
        return k, v

    forward(model, torch.from_numpy(held_out).to(model.device), collect)
    result = {}
    for layer, (pages, geometry) in layers.items():
        step(f"tables for layer {layer}, through the reference")
        result |= {(layer, bound): layer_tables(pages, geometry, bound) for bound in bounds}
    notes.append(
        f"kv {CALIBRATED}: tables for each layer and bound, from {len(pages)} of its pages of the text's last "
        f"{held_out.size} tokens, which are not among those measured."
    )
    return result


def layer_tables(pages: np.ndarray, geometry: Geometry, bound: str) -> tuple[Tables, Tables, Tables]:
    """Return the tables that are made from ``pages``: for pages like them, for K's alone, for V's alone."""
    both = reference.calibrate(pages, parse_parts(bound, 2), geometry=geometry)
    in_v = np.arange(0, geometry.channels, 2) % sum(geometry.parts) >= geometry.parts[0]
    alone = [Tables(both.classes[[i, i]], both.symbols[[i, i]], both.hints[in_v == i]) for i in (0, 1)]
    return both, *alone


def measure(model, windows: np.ndarray, measured: list[Variant], tables=None, step=lambda text: None):
    """Return a row for the reference, then one for each of ``measured``. The model runs once a bound.

    Args:
        model: a causal LM of transformers in bfloat16, on the CPU or a GPU.
        windows: (n, tokens) int64 token ids, n >= 2, tokens a multiple of 16.
        measured: variants, no two the same.
        tables: from ``calibrate``, where CALIBRATED is among them.
        step: called with a line on what comes next.

    Raises:
        ValueError: too few windows; a model that keeps no K and V in its cache, or whose logits are not finite.
        AssertionError: a codec that breaks its bound, or brings back other values than another at the same.
    """
    import torch

    xp = array_module(model)
    n, context = windows.shape
    if n < 2 or context % TILE_TOKENS:
        raise ValueError(
            f"windows: expected 2 or more of a multiple of {TILE_TOKENS} tokens, got {windows.shape}"
        )
    runs = {}
    for variant in measured:
        runs.setdefault(variant.bound or variant.codec, []).append(variant)
    found = {run: [] for run in runs}
    totals = {variant: np.zeros((2, 3), np.int64) for variant in measured}  # bits, values; of both, K, V
    errors = dict.fromkeys(runs)
    for begin in range(0, n, BATCH):
        batch = windows[begin : begin + BATCH]
        ids, tokens = torch.from_numpy(batch).to(model.device), xp.asarray(batch)
        where = f"windows {begin + 1} to {begin + len(batch)} of {n}"
        step(f"{where}: the reference")
        expected = forward(model, ids, lambda k, v, layer: (k, v))
        for i, (run, variants) in enumerate(runs.items()):
            step(f"{where}: {run} ({i + 1} of {len(runs)})")

            def through(k, v, layer, run=run, variants=variants):
                *result, bits, error = replaced(variants, k, v, xp, (tables or {}).get((layer, run)))
                for variant, own in zip(variants, bits, strict=True):
                    totals[variant] += [own, (k.size + v.size, k.size, v.size)]
                if error is not None:
                    errors[run] = max(error, errors[run] or 0.0)
                return result

            logits = forward(model, ids, through)
            found[run] += [compare(*window, xp) for window in zip(expected, logits, tokens, strict=True)]
            if not np.isfinite(found[run]).all():
                raise ValueError(f"{run}: a logit of the model is not finite; it cannot be compared")
    untouched = np.array(next(iter(found.values())))
    untouched[:, 3] = untouched[:, 2]
    rows = [row(v, found[run], *totals[v], errors[run]) for v in measured for run in [v.bound or v.codec]]
    return [row(None, untouched), *rows]


def forward(model, ids, replace):
    """Return the logits (batch, tokens, vocabulary) of ``ids``, as a NumPy or CuPy array.

    Args:
        replace: takes K and V of one layer, arrays (batch, heads, tokens, channels), as they enter the cache, and
            the layer's number; returns what attention is to see instead.
    """
    import torch
    from transformers import DynamicCache

    calls = 0

    class Cache(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            nonlocal calls
            calls += 1
            k, v = replace(_as_array(key_states), _as_array(value_states), layer_idx)
            return super().update(_as_tensor(k), _as_tensor(v), layer_idx, *args, **kwargs)

    with torch.inference_mode():
        logits = model(input_ids=ids, past_key_values=Cache(config=model.config), use_cache=True).logits
    if not calls:
        raise ValueError(f"{type(model).__name__}: it stores no K and V in the cache that it is given")
    return _as_array(logits)


def _as_array(x):
    """A tensor as a C-contiguous NumPy or CuPy array, over the same memory if it was contiguous."""
    import torch

    bits = x.contiguous().view(torch.int16) if x.dtype == torch.bfloat16 else x.contiguous()
    if x.device.type == "cuda":
        import cupy

        array = cupy.asarray(bits)
    else:
        array = bits.numpy()
    return array.view(_BFLOAT16) if x.dtype == torch.bfloat16 else array


def _as_tensor(x):
    """A C-contiguous bfloat16 array as a tensor over the same memory."""
    import torch

    return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)


def missing() -> str | None:
    """Return what has to be installed, in one sentence; None if nothing has."""
    for name in ("torch", "transformers"):
        try:
            __import__(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error}): install the extra, cuszp_cupy[accuracy]"
    return None


def load(folder: Path, text: Path, *, context: int = CONTEXT, tokens: int = TOKENS, notes: list[str]):
    """Return the model in ``folder``, on the GPU if there is one, and the first and the last windows of ``text``.

    Args:
        folder: as transformers' ``save_pretrained`` writes it; nothing is fetched.
        context, tokens: of a window; in all, rounded up to whole windows, at least 2.
        notes: takes a line where the CPU has to do.

    Returns:
        (model in bfloat16, (windows, context) int64 token ids to measure with, (1, context) to calibrate with).

    Raises:
        ValueError: a context that is none or longer than the model's, or a text that is too short.
    """
    import torch
    import transformers

    if context < TILE_TOKENS or context % TILE_TOKENS:
        raise ValueError(f"context: expected a multiple of {TILE_TOKENS} tokens, a page's, got {context}")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and context > longest:
        raise ValueError(f"context: the model has {longest} positions at most, got {context}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = np.array(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"], np.int64)
    count = max(2, -(-tokens // context))
    if ids.size < (count + 1) * context:
        raise ValueError(
            f"{text.name}: {count} windows of {context} tokens, and one to calibrate with, take "
            f"{(count + 1) * context}, the text has {ids.size}; pass a longer one, or ask for fewer"
        )
    why = gpu_missing()
    if why is None and not torch.cuda.is_available():
        why = f"torch {torch.__version__} finds no CUDA device"
    if why:
        device = "cpu"
        notes.append(f"On the CPU, through the reference, which is slow. {why}")
    else:
        import cupy

        device = f"cuda:{cupy.cuda.runtime.getDevice()}"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.to(device).eval(), ids[: count * context].reshape(count, context), ids[None, -context:]


def describe(folder: Path, text: Path, model, windows: np.ndarray) -> dict:
    """Return what was measured with, as plain values; names and digests, no paths."""
    return {
        "model": folder.resolve().name, "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "text": text.name, "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "context": windows.shape[1], "windows": windows.shape[0], "tokens": windows.size,
        "page_tokens": TILE_TOKENS, "device": model.device.type,
    }  # fmt: skip
