"""Assertions shared by the tests. Each has a test that it fails."""

from __future__ import annotations

import numpy as np


def assert_within(x: np.ndarray, y: np.ndarray, eb) -> None:
    """Assert |x - y| <= eb, in float64, where x is finite, and equal bits elsewhere; say where it first fails.

    Args:
        x, y: arrays of one shape and dtype (float16, bfloat16, float32 or float64).
        eb: a number, or an array that broadcasts against x.
    """
    assert x.shape == y.shape and x.dtype == y.dtype, (x.shape, x.dtype, y.shape, y.dtype)
    bits = np.dtype(f"u{x.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs are data here, and Inf - Inf
        x64, y64 = x.astype(np.float64), y.astype(np.float64)
        error = np.abs(x64 - y64)
        bad = np.where(np.isfinite(x64), ~(error <= eb), x.view(bits) != y.view(bits))  # NaN is bad
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise AssertionError(
            f"bound broken at {bad.sum()} of {x.size} values, first at [{i}]: {x64.flat[i]!r} -> "
            f"{y64.flat[i]!r}, error {error.flat[i]:g}, eb {np.broadcast_to(eb, x.shape).flat[i]:g}"
        )


def assert_same_bits(x: np.ndarray, y: np.ndarray) -> None:
    """Assert that two arrays of 16-bit floats have the same shape, dtype and bits (-0.0 is not 0.0)."""
    assert x.shape == y.shape and x.dtype == y.dtype, (x.shape, x.dtype, y.shape, y.dtype)
    np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16))
