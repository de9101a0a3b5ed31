"""Launch the kernels of stream ``cuszp``. Pointers and sizes in, nothing decided here.

Each function enqueues one kernel on the current CuPy stream: no allocation, no wait. The kernels compile
at first use. Pointers are addresses of device memory; 0 is allowed where nothing lies (n = 0).
"""

from __future__ import annotations

import numpy as np

from ..format import CHUNK, MAX_VALUES, MODES, rate_bytes
from . import CTYPES, launch

#: Warps in a CTA. Large tiles need fewer look-backs, small ones occupy more of the GPU.
SMALL_TILE, LARGE_TILE = 4, 8
#: Most values for which small tiles are used: 32 chunks give 256 of them, 2 for each SM of an H100.
MAX_SMALL = 32 * CHUNK
#: source -> the kernels in it that are launched: T, mode, warps.
KERNELS = {
    f"cuszp_{name}": tuple(
        f"cuszp_{name}<{CTYPES[dtype]}, {mode}, {warps}>"
        for dtype in ("float32", "float64")
        for mode in range(len(MODES))
        for warps in (SMALL_TILE, LARGE_TILE)
    )
    for name in ("compress", "decompress")
}


def workspace_bytes(n: int) -> int:
    """Return the bytes of workspace that ``compress`` and ``decompress`` of up to ``n`` values need.

    The workspace must be zero before its first use. Each kernel leaves it zero again, so one workspace a
    stream is enough, for any n up to the one it was made for.
    """
    return 8 * (1 + rate_bytes(n) // (32 * SMALL_TILE))


def compress(
    x_ptr: int,
    n: int,
    dtype: str,
    eb: float,
    mode: str,
    out_ptr: int,
    size_ptr: int,
    workspace_ptr: int,
) -> None:
    """Write the ``cuszp`` stream of x[n] to out, and its size in bytes to ``*size`` (uint64).

    ``out`` has format.max_stream_bytes(n) bytes and is 4-byte aligned.
    """
    T = _check(n, dtype, eb, out_ptr, workspace_ptr)
    assert x_ptr % T().itemsize == 0 and size_ptr and size_ptr % 8 == 0
    if n == 0:
        import cupy

        cupy.cuda.runtime.memsetAsync(size_ptr, 0, 8, cupy.cuda.get_current_stream().ptr)
        return
    with np.errstate(over="ignore"):  # a subnormal eb; the format says what comes of it
        r = T(0.5) / T(eb)
    types = "QqdQQQ" if dtype == "float64" else "QqfQQQ"
    _launch("compress", n, dtype, mode, types, (x_ptr, n, float(r), out_ptr, size_ptr, workspace_ptr))


def decompress(
    stream_ptr: int,
    stream_bytes: int,
    n: int,
    dtype: str,
    eb: float,
    mode: str,
    out_ptr: int,
    workspace_ptr: int,
    status_ptr: int,
) -> None:
    """Write the n values of a ``cuszp`` stream to out; ``*status`` (uint32) |= 1 if it is damaged.

    Damaged: a rate byte is illegal, or the rate bytes promise more than ``stream_bytes``. Nothing is read
    past ``stream_bytes``, so it may also be the capacity of a buffer whose stream is shorter. The stream
    is 4-byte aligned.
    """
    T = _check(n, dtype, eb, stream_ptr, workspace_ptr)
    assert out_ptr % T().itemsize == 0 and status_ptr and status_ptr % 4 == 0
    assert stream_bytes >= 0
    if n == 0:
        return
    types = "QqqdQQQ" if dtype == "float64" else "QqqfQQQ"
    arguments = stream_ptr, stream_bytes, n, float(T(eb)), out_ptr, status_ptr, workspace_ptr
    _launch("decompress", n, dtype, mode, types, arguments)


def _check(n: int, dtype: str, eb: float, stream_ptr: int, workspace_ptr: int) -> type:
    """Assert what the kernels rely on; return the scalar type T."""
    assert dtype in ("float32", "float64"), dtype
    assert 0 <= n <= MAX_VALUES, n
    T = np.dtype(dtype).type
    assert T(eb) > 0 and np.isfinite(T(eb)), eb
    assert stream_ptr % 4 == 0 and workspace_ptr % 8 == 0
    return T


def _launch(name: str, n: int, dtype: str, mode: str, types: str, arguments: tuple) -> None:
    warps = SMALL_TILE if n <= MAX_SMALL else LARGE_TILE
    expression = f"cuszp_{name}<{CTYPES[dtype]}, {MODES.index(mode)}, {warps}>"
    launch(f"cuszp_{name}", expression, rate_bytes(n) // (32 * warps), 32 * warps, types, arguments)
