"""Encoder and decoder of both stream formats in NumPy, in the order of the spec (format.py).

This is the oracle: plain, slow, the same bytes as the kernels. Numbers in comments are sections of
format.py.
"""

from __future__ import annotations

import numbers

import numpy as np

from .format import (
    BLOCK,
    MAX_VALUES,
    FormatError,
    check_mode,
    rate_bytes,
)

# --- Stream cuszp ----------------------------------------------------------------------------------


def compress(x: np.ndarray, eb: float, mode: str = "fixed") -> bytes:
    """Return the ``cuszp`` stream of ``x``, from which every value comes back within ``eb`` (1.6c).

    Args:
        x: float32 or float64, C-contiguous, any shape; coded as one array in memory order.
        eb: absolute bound, in the unit of ``x``; > 0. Used in the dtype of ``x``.
        mode: ``fixed``, ``plain`` or ``outlier``.

    Raises:
        TypeError, ValueError: another dtype, an array that is not contiguous or too large, or a bad
            ``eb`` or mode.

    >>> len(compress(np.zeros(5, np.float32), 0.1)), len(compress(np.ones(5, np.float32), 0.1))
    (1024, 1040)
    """
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x: expected a NumPy array, got {type(x).__name__}; pass numpy.asarray(x)")
    dtype = _check_dtype(x.dtype)
    if not x.flags.c_contiguous:
        raise ValueError(
            f"x: expected a C-contiguous array, got strides {x.strides}; pass numpy.ascontiguousarray(x)"
        )
    n, eb = _check_n(x.size), _check_eb(eb, dtype)
    check_mode(mode)
    v = _codes(_quantise(x.reshape(-1), eb), mode)
    magnitude = np.abs(v)  # INT_MIN stays: negative, so no maximum sees it; all 31 plane bits are 0

    k = _bits(magnitude.max(axis=1, initial=0))  # 1.3
    outlier_bytes = np.zeros_like(k)
    if mode == "outlier":  # 1.4
        first = magnitude[:, 0].copy()
        k2 = _bits(magnitude[:, 1:].max(axis=1, initial=0))
        ob = (_bits(first) + 7) // 8
        apart = np.where(k, 4 + 4 * k, 0) > 4 + 4 * k2 + ob
        k = np.where(apart, k2, k)
        outlier_bytes = np.where(apart, ob, 0)
        magnitude[apart, 0] = 0
    rates = np.where(outlier_bytes, 0x80 | (outlier_bytes - 1) << 5, 0) | k

    rows = np.zeros((len(v), 8 + 4 * int(k.max(initial=0))), np.uint8)  # a[0], signs, planes
    if mode == "outlier":
        rows[:, :4] = first.astype("<i4").view(np.uint8).reshape(-1, 4)
    rows[:, 4:8] = np.packbits(v < 0, axis=1)
    for p in range(rows.shape[1] // 4 - 2):
        rows[:, 8 + 4 * p : 12 + 4 * p] = np.packbits(magnitude >> p & 1, axis=1)
    area = np.zeros(rate_bytes(n), np.uint8)
    area[: len(rates)] = rates
    return area.tobytes() + rows[_stored(k, outlier_bytes)].tobytes()


def decompress(stream, n: int, dtype, eb: float, mode: str = "fixed") -> np.ndarray:
    """Return the (n,) array that a ``cuszp`` stream holds.

    Args:
        stream: the whole stream, bytes or any contiguous buffer.
        n, dtype, eb, mode: as it was compressed; the stream holds none of them.

    Raises:
        TypeError, ValueError: a bad ``n``, dtype, ``eb`` or mode.
        FormatError: a rate byte no encoder writes, or a stream whose length is not what its rate
            bytes say.
    """
    dtype = _check_dtype(dtype)
    n, eb = _check_n(n), _check_eb(eb, dtype)
    check_mode(mode)
    data = np.frombuffer(stream, np.uint8) if memoryview(stream).nbytes else np.zeros(0, np.uint8)
    if data.size < rate_bytes(n):
        raise FormatError(f"stream: the rate area of {n} values has {rate_bytes(n)} bytes, got {data.size}")
    area, payload = data[: rate_bytes(n)], data[rate_bytes(n) :]
    num_blocks = -(-n // BLOCK)
    rates = area[:num_blocks].astype(np.int32)
    k, outlier_bytes = rates & 31, np.zeros_like(rates)
    illegal = rates > 31
    if mode == "outlier":
        outlier_bytes = np.where(rates & 0x80, (rates >> 5 & 3) + 1, 0)
        illegal &= (outlier_bytes == 0) | (k == 31)  # no form with 31 planes is smaller than 1.3
    for bad in (np.flatnonzero(illegal), num_blocks + np.flatnonzero(area[num_blocks:])):
        if bad.size:
            raise FormatError(f"rate byte {bad[0]}: {area[bad[0]]:#04x} is not valid in mode {mode!r}")
    stored = _stored(k, outlier_bytes)
    if payload.size != stored.sum():
        raise FormatError(f"payloads: the rate bytes say {stored.sum()} bytes, {payload.size} are there")

    rows = np.zeros(stored.shape, np.uint8)
    rows[stored] = payload
    first = np.ascontiguousarray(rows[:, :4]).view("<u4")[:, 0]
    negative = np.unpackbits(rows[:, 4:8], axis=1).astype(bool)
    magnitude = np.zeros((num_blocks, BLOCK), np.uint32)
    for p in range(rows.shape[1] // 4 - 2):
        bits = np.unpackbits(rows[:, 8 + 4 * p : 12 + 4 * p], axis=1)
        magnitude |= bits.astype(np.uint32) << np.uint32(p)
    magnitude[:, 0] = np.where(outlier_bytes, first, magnitude[:, 0])
    v = np.where(negative, -magnitude, magnitude).view(np.int32)
    q = v if mode == "fixed" else np.cumsum(v, axis=1, dtype=np.int32)
    with np.errstate(over="ignore"):
        return (q.reshape(-1)[:n].astype(dtype) * eb) * dtype.type(2)  # 1.5


def _quantise(x: np.ndarray, eb) -> np.ndarray:
    """Return the int32 bin numbers of 1.1. All overflow is specified, so no warning is due."""
    T = x.dtype.type
    limits = np.iinfo(np.int32)
    with np.errstate(all="ignore"):
        s = x * (T(0.5) / eb)
        t = (s + T(0.5)).astype(np.float64)  # exact, and holds both int32 limits
    t[np.isnan(t)] = 0 if T is np.float32 else limits.min
    q = np.clip(t, limits.min, limits.max).astype(np.int32)  # astype truncates
    return q - (~(s >= T(-0.5))).astype(np.int32)


def _codes(q: np.ndarray, mode: str) -> np.ndarray:
    """Return the int32 codes v of 1.2, one row of 32 a block."""
    v = np.zeros((-(-q.size // BLOCK), BLOCK), np.int32)
    v.reshape(-1)[: q.size] = q
    if mode != "fixed":
        v[:, 1:] -= v[:, :-1].copy()
        v.reshape(-1)[q.size :] = 0
    return v


def _bits(a: np.ndarray) -> np.ndarray:
    """Return the bit length of each int32 (0 for what is not positive)."""
    return np.frexp(np.maximum(a, 0).astype(np.float64))[1]


def _stored(k: np.ndarray, outlier_bytes: np.ndarray) -> np.ndarray:
    """Return which bytes of the rows (a[0], signs, planes) are stored: (blocks, 8 + 4 max k) bool."""
    column = np.arange(8 + 4 * int(k.max(initial=0)))
    words = np.where((k > 0) | (outlier_bytes > 0), k + 1, 0)[:, None]
    return np.where(column < 4, column < outlier_bytes[:, None], column - 4 < 4 * words)


def _check_dtype(dtype) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype: stream cuszp holds float32 or float64, got {dtype}")
    return dtype


def _check_n(n: int) -> int:
    if not isinstance(n, numbers.Integral):
        raise TypeError(f"n: expected an integer, got {n!r}")
    if not 0 <= n <= MAX_VALUES:
        raise ValueError(f"n: expected 0 to {MAX_VALUES} values, got {n}; split the array")
    return int(n)


def _check_eb(eb: float, dtype: np.dtype):
    """Return ``eb`` in ``dtype``, in which it must be positive and finite."""
    if not isinstance(eb, numbers.Real):
        raise TypeError(f"eb: expected a number, got {eb!r}")
    with np.errstate(over="ignore", under="ignore"):
        value = dtype.type(eb)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"eb: expected a bound that is positive and finite in {dtype}, got {eb!r}")
    return value
