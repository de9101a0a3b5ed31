"""Real KV pages for the measurements: the packaged sample, cut into pages, and repeated beyond the L2 cache."""

from __future__ import annotations

import functools
from importlib import resources

import ml_dtypes
import numpy as np

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PARTS = ("K", "V")


@functools.cache
def kv_sample() -> np.ndarray:
    """Return the packaged sample: (layers, 2, heads, tokens, head_size) = (4, 2, 3, 512, 64) bfloat16, read-only.

    ``cuszp_cupy/data/README.md`` says what it is and where it comes from.
    """
    sample = _sample("kv_bf16_bits").view(DTYPES["bfloat16"])
    sample.flags.writeable = False
    return sample


def layers() -> list[int]:
    """Return which of the model's layers the sample holds, in their order.

    >>> layers()
    [0, 7, 15, 29]
    """
    return _sample("layers").tolist()


def _sample(name: str) -> np.ndarray:
    with resources.files("cuszp_cupy").joinpath("data/kv_sample.npz").open("rb") as file:
        return np.load(file)[name]


def kv_pages(tokens: int = 16, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """Return the sample's K and V as pages of one layer and ``tokens`` neighbouring tokens each.

    Returns:
        ``{"K": pages, "V": pages}``, each (512 / tokens * 4, tokens, 192): a token's three heads side by side,
        windows of tokens fastest, then layers.

    >>> kv_pages()["K"].shape
    (128, 16, 192)
    """
    layers, _, heads, total, size = kv_sample().shape
    if total % tokens:
        raise ValueError(f"tokens: expected a divisor of {total}, got {tokens}")
    pages = kv_sample().transpose(1, 0, 3, 2, 4).reshape(2, layers * total // tokens, tokens, heads * size)
    return dict(zip(PARTS, _convert(pages, dtype), strict=True))


def packed_pages(heads: int, head_size: int, tokens: int = 16, dtype: str = "bfloat16") -> np.ndarray:
    """Return pages ``[tokens][heads][K|V]``, one of vLLM 0.33's layouts: (n, tokens, 2 * heads * head_size).

    The model has three heads of 64; a page of more or wider ones takes neighbouring windows of the same
    layer (never another layer, whose V has another scale) in place of the heads that are missing.
    What is left over at the end of a layer is dropped. Its geometry has ``parts=(head_size, head_size)``.

    >>> packed_pages(heads=8, head_size=128).shape
    (24, 16, 2048)
    """
    layers, _, sample_heads, total, size = kv_sample().shape
    if total % tokens or head_size % size:
        raise ValueError(
            f"expected tokens that divide {total} and a head_size that is a multiple of {size}, "
            f"got {tokens} and {head_size}"
        )
    pieces = sample_heads * (total // tokens)  # of (tokens, size), in one layer
    num_pages = pieces // (heads * head_size // size)
    if not num_pages:
        raise ValueError(
            f"{heads} heads of {head_size}: a layer of the sample fills only {pieces} x {size} channels"
        )
    # (layer, window, head, K/V, token, channel), windows and heads then counted as one
    cut = kv_sample().reshape(layers, 2, sample_heads, -1, tokens, size).transpose(0, 3, 2, 1, 4, 5)
    cut = cut.reshape(layers, pieces, 2, tokens, size)[:, : num_pages * heads * head_size // size]
    cut = cut.reshape(layers, num_pages, heads, head_size // size, 2, tokens, size)
    pages = cut.transpose(0, 1, 5, 2, 4, 3, 6).reshape(layers * num_pages, tokens, 2 * heads * head_size)
    return _convert(pages, dtype)


def _convert(pages: np.ndarray, dtype: str) -> np.ndarray:
    """Return C-contiguous ``pages`` in ``dtype``.

    float16 by rounding; as bfloat16 has 8 significant bits, the low mantissa bits are then mostly zeros.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    return np.ascontiguousarray(pages.astype(np.float32).astype(DTYPES[dtype]))


def tiled(pages: np.ndarray, nbytes: int, seed: int = 0, xp=np):
    """Return ``nbytes`` of pages like ``pages``, no two alike, in the array module ``xp`` (NumPy or CuPy).

    Args:
        pages: (n, tokens, channels), a 16-bit float type.
        nbytes: size of the result; a multiple of a page's bytes.
        seed: of the permutations and signs, which are the same for NumPy and CuPy.

    Each copy of the sample has its pages in another order and every channel's sign drawn anew. Signs are
    what can be changed without changing what a codec sees: magnitudes stay as they are, value by value, so
    quantiser bins, group widths, ratio and error are those of the real pages, while no cache line repeats.
    Scaling by anything but a power of two would round once more and fill mantissa bits that real
    bfloat16 values do not have; scaling by powers of two would spread exponents further than the cache does;
    mixing tokens or neighbouring channels would destroy the correlation that group coding lives on.
    Zeros keep their sign: -0.0 is rare in a KV cache and costs extra bits.
    """
    page_bytes = pages[0].nbytes
    if nbytes < page_bytes or nbytes % page_bytes:
        raise ValueError(f"nbytes: expected a positive multiple of a page's {page_bytes} bytes, got {nbytes}")
    rng = np.random.default_rng(seed)
    n, num_pages = len(pages), nbytes // page_bytes
    copies = -(-num_pages // n)
    order = np.concatenate([rng.permutation(n) for _ in range(copies)])[:num_pages]
    signs = rng.integers(0, 2, (copies, 1, pages.shape[2]), np.uint16) << np.uint16(15)
    bits, signs = xp.asarray(pages.view(np.uint16)), xp.asarray(signs)
    result = bits[xp.asarray(order)]
    for copy in range(copies):
        part = result[copy * n : (copy + 1) * n]
        part ^= xp.where(part & 0x7FFF, signs[copy], 0).astype(np.uint16)
    return result.view(pages.dtype)
