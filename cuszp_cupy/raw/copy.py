"""Copies between host and device in few calls, and the kernels of ``kv_rest.cu``. Pointers in, nothing waits."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from . import kernel

KERNELS = {"kv_rest": ("kv_fetch", "kv_publish", "kv_collect")}
THREADS = 256
_MOST_BLOCKS = 512  # of kv_publish
_FETCH_BLOCKS = 16
_PARTS = 32  # blocks for the rest of a region, where there are few regions
_FEW_RUNS = 4  # 2-D copies up to this many; one batched call beyond


def fetch(from_ptr: int, to_ptr: int, nbytes: int) -> None:
    """Copy ``nbytes``, rounded up to 16, from mapped pinned host memory to the device, on CuPy's current stream."""
    assert nbytes > 0 and from_ptr % 16 == 0 and to_ptr % 16 == 0
    num_words = -(-nbytes // 16)
    _kernel("kv_fetch", _device())(
        (min(_FETCH_BLOCKS, -(-num_words // THREADS)),), (THREADS,),
        (np.uint64(from_ptr), np.uint64(to_ptr), np.uint32(num_words)),
    )  # fmt: skip


def publish(
    rows_ptr: int,
    slots_ptr: int,
    table_ptr: int,
    num_pages: int,
    hosts_ptr: int = 0,
    works_ptr: int = 0,
    copied_ptr: int = 0,
    cursors_ptr: int = 0,
    num_regions: int = 0,
) -> None:
    """Put rows into the page table and move what lies beyond ``copied`` in each region; see ``kv_rest.cu``.

    All device or mapped addresses; runs on CuPy's current stream.
    """
    assert num_pages > 0 and rows_ptr % 16 == 0 and table_ptr % 16 == 0
    parts = max(1, _PARTS // max(num_regions, 1))
    blocks = min(_MOST_BLOCKS, max(-(-num_pages // THREADS), num_regions * parts))
    _kernel("kv_publish", _device())(
        (blocks,), (THREADS,),
        (
            np.uint64(rows_ptr), np.uint64(slots_ptr), np.uint64(table_ptr), np.uint32(num_pages),
            np.uint64(hosts_ptr), np.uint64(works_ptr), np.uint64(copied_ptr), np.uint64(cursors_ptr),
            np.uint32(num_regions), np.uint32(parts),
        ),
    )  # fmt: skip


def collect(table_ptr: int, slots_ptr: int, rows_ptr: int, num_pages: int) -> None:
    """Gather the rows of ``slots`` from the page table, on CuPy's current stream."""
    assert num_pages > 0 and rows_ptr % 16 == 0 and table_ptr % 16 == 0
    _kernel("kv_collect", _device())(
        (-(-num_pages // THREADS),), (THREADS,),
        (np.uint64(table_ptr), np.uint64(slots_ptr), np.uint64(rows_ptr), np.uint32(num_pages)),
    )  # fmt: skip


def copies(dst, src, width, first, kind: int, stream_ptr: int) -> int:
    """Enqueue copies of ``width`` bytes from ``src`` to ``dst`` (int64 arrays); return the number of calls.

    Args:
        first: first index of each run of one width and equal distances (``arena.runs``).
        kind: ``cudaMemcpyHostToDevice`` or ``cudaMemcpyDeviceToHost``.
        stream_ptr: not the legacy default stream.

    Few runs go as 2-D copies, many as one batched call where the driver has it, else one by one.
    """
    from cupy.cuda import runtime

    if len(first) > _FEW_RUNS and has_batch():
        _copy_batch(dst, src, width, stream_ptr)
        return 1
    ends = [*first[1:].tolist(), len(dst)]
    for begin, end in zip(first.tolist(), ends, strict=True):
        to, by, size, height = int(dst[begin]), int(src[begin]), int(width[begin]), end - begin
        pitches = (int(dst[begin + 1]) - to, int(src[begin + 1]) - by) if height > 1 else (size, size)
        if pitches == (size, size):
            runtime.memcpyAsync(to, by, size * height, kind, stream_ptr)
        else:
            runtime.memcpy2DAsync(to, pitches[0], by, pitches[1], size, height, kind, stream_ptr)
    return len(first)


def has_batch() -> bool:
    """Whether the driver has cuMemcpyBatchAsync (CUDA 12.8)."""
    return _batch_function() is not None


def _copy_batch(dst, src, width, stream_ptr: int) -> None:
    dst, src, width = (np.ascontiguousarray(array, np.uint64) for array in (dst, src, width))
    # source read in stream order (1); no hints, which concern managed memory; flags 0
    attributes, index, failed = (ctypes.c_int * 6)(1), ctypes.c_size_t(0), ctypes.c_size_t(0)
    result = _batch_function()(
        dst.ctypes.data, src.ctypes.data, width.ctypes.data, len(dst), ctypes.byref(attributes),
        ctypes.byref(index), 1, ctypes.byref(failed), stream_ptr,
    )  # fmt: skip
    if result:
        raise RuntimeError(f"cuMemcpyBatchAsync: error {result} at copy {failed.value} of {len(dst)}")


@functools.cache
def _batch_function():
    """cuMemcpyBatchAsync as CUDA 12.8 declared it, or None. CuPy 14 does not bind it."""
    try:
        find = ctypes.CDLL("libcuda.so.1").cuGetProcAddress_v2
    except (OSError, AttributeError):
        return None
    pointer, status = ctypes.c_void_p(), ctypes.c_int()
    failed = find(b"cuMemcpyBatchAsync", ctypes.byref(pointer), 12080, ctypes.c_uint64(0), ctypes.byref(status))
    if failed or not pointer.value:
        return None
    size, address = ctypes.c_size_t, ctypes.c_void_p
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, address, address, address, size, address, address, size, address, address
    )
    return prototype(pointer.value)


@functools.cache
def _kernel(expression: str, device: int):
    return kernel("kv_rest", expression)


def _device() -> int:
    import cupy

    return cupy.cuda.runtime.getDevice()
