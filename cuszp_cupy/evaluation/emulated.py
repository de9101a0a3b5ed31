"""The 8- and 4-bit formats that KV caches are stored in elsewhere, emulated: values as they come back, and bits.

Each takes float32 values (batch, heads, tokens, channels), finite, NumPy or CuPy, and returns what comes back
(the same shape, float32) and the bits that it takes, scales counted.
"""

from __future__ import annotations

import numpy as np

E4M3_MAX, E2M1_MAX = 448.0, 6.0
NVFP4_BLOCK = 16  # channels that share an e4m3 scale
INT4_CHANNELS, INT4_TOKENS = 32, 16  # values that share a scale and a zero
_INT4_GROUP_BITS = 32  # scale and zero, float16 each


def fp8(x, xp=np):
    """FP8 e4m3 without a scale: 8 bits a value."""
    return e4m3(x, xp), 8 * x.size


def nvfp4(x, xp=np):
    """NVFP4: e2m1 values, an e4m3 scale for 16 channels, a float32 scale for the tensor (each of the batch)."""
    blocks = _by_token(x, NVFP4_BLOCK)
    block_max = abs(blocks).max(axis=3, keepdims=True)
    tensor_scale = block_max.max(axis=(1, 2, 3), keepdims=True) / np.float32(E4M3_MAX * E2M1_MAX)
    scale = e4m3(_divide(block_max / np.float32(E2M1_MAX), tensor_scale, xp), xp) * tensor_scale
    y = e2m1(_divide(blocks, scale, xp), xp) * scale
    return _from_token(y, x.shape), 4 * x.size + 8 * scale.size + 32 * len(x)


def int4_by_token(x, xp=np):
    """int4, 32 neighbouring channels of a token sharing a float16 scale and zero: 5 bits a value."""
    groups = _by_token(x, INT4_CHANNELS)
    y, bits = _int4(groups, 3, xp)
    return _from_token(y, x.shape), bits


def int4_by_channel(x, xp=np):
    """int4, 16 tokens of a channel sharing a float16 scale and zero: 6 bits a value."""
    batch, heads, tokens, channels = x.shape
    if tokens % INT4_TOKENS:
        raise ValueError(f"expected a multiple of {INT4_TOKENS} tokens, got {tokens}")
    y, bits = _int4(x.reshape(batch, heads, -1, INT4_TOKENS, channels), 3, xp)
    return y.reshape(x.shape), bits


#: name -> the formats of K and of V
FORMATS = {
    "FP8 e4m3": (fp8, fp8),
    "NVFP4": (nvfp4, nvfp4),
    "int4": (int4_by_token, int4_by_token),
    "int4, K by channel": (int4_by_channel, int4_by_token),
}


def e4m3(x, xp=np):
    """Return float32 ``x`` rounded to the nearest e4m3 value (ties to even), saturating at 448.

    >>> e4m3(np.float32([17, 19, -1000, 2**-10])).tolist()
    [16.0, 20.0, -448.0, 0.0]
    """
    return _round(x, 3, -6, E4M3_MAX, xp)


def e2m1(x, xp=np):
    """Return float32 ``x`` rounded to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

    >>> e2m1(np.float32([0.25, 0.75, 2.5, 3.5, 5, -9])).tolist()
    [0.0, 1.0, 2.0, 4.0, 4.0, -6.0]
    """
    return _round(x, 1, 0, E2M1_MAX, xp)


def _round(x, mantissa_bits, lowest_exponent, largest, xp):
    x = xp.clip(x, -np.float32(largest), np.float32(largest))
    _, exponent = xp.frexp(x)  # |x| in 2^(exponent - 1) .. 2^exponent
    last_bit = xp.maximum(exponent - 1, lowest_exponent) - mantissa_bits
    quantum = xp.ldexp(xp.ones_like(x), last_bit)
    return xp.rint(x / quantum) * quantum


def _int4(groups, axis, xp):
    low, high = groups.min(axis=axis, keepdims=True), groups.max(axis=axis, keepdims=True)
    scale = ((high - low) / np.float32(15)).astype(np.float16).astype(np.float32)
    zero = low.astype(np.float16).astype(np.float32)
    q = xp.clip(xp.rint(_divide(groups - zero, scale, xp)), 0, 15)
    return q * scale + zero, 4 * groups.size + _INT4_GROUP_BITS * scale.size


def _divide(x, scale, xp):
    """x / scale; 0 where the scale is."""
    return xp.where(scale > 0, x / xp.where(scale > 0, scale, np.float32(1)), np.float32(0))


def _by_token(x, size):
    """(batch, tokens, groups, size): the channels of a token, head by head, in groups."""
    batch, heads, tokens, channels = x.shape
    if heads * channels % size:
        raise ValueError(f"expected heads of together a multiple of {size} channels, got {heads} x {channels}")
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, -1, size)


def _from_token(groups, shape):
    batch, heads, tokens, channels = shape
    return groups.reshape(batch, tokens, heads, channels).transpose(0, 2, 1, 3)
