"""Copies between host and device in few calls, and the kernels of ``kv_rest.cu``. Pointers in, nothing waits."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from . import launch

KERNELS = {"kv_rest": ("kv_fetch", "kv_publish", "kv_collect", "kv_gather")}
THREADS = 256
_MOST_BLOCKS = 512  # of kv_publish
_FETCH_BLOCKS = 16
_PARTS = 32  # blocks for the rest of a region, where there are few regions
_FEW_RUNS = 4  # 2-D copies up to this many; one batched call beyond


def fetch(from_ptr: int, to_ptr: int, nbytes: int) -> None:
    """Copy ``nbytes``, rounded up to 16, from mapped pinned memory to the device, on CuPy's current stream."""
    assert nbytes > 0 and from_ptr % 16 == 0 and to_ptr % 16 == 0
    num_words = -(-nbytes // 16)
    blocks = min(_FETCH_BLOCKS, -(-num_words // THREADS))
    launch("kv_rest", "kv_fetch", blocks, THREADS, "QQQ", (from_ptr, to_ptr, num_words))


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
    launch(
        "kv_rest", "kv_publish", blocks, THREADS, "Q" * 10,
        (
            rows_ptr, slots_ptr, table_ptr, num_pages, hosts_ptr, works_ptr, copied_ptr, cursors_ptr, num_regions,
            parts,
        ),
    )  # fmt: skip


def collect(table_ptr: int, slots_ptr: int, rows_ptr: int, num_pages: int) -> None:
    """Gather the rows of ``slots`` from the page table, on CuPy's current stream."""
    assert num_pages > 0 and rows_ptr % 16 == 0 and table_ptr % 16 == 0
    blocks = -(-num_pages // THREADS)
    launch("kv_rest", "kv_collect", blocks, THREADS, "QQQQ", (table_ptr, slots_ptr, rows_ptr, num_pages))


def gather(
    payloads_ptr: int,
    rows_ptr: int,
    slots_ptr: int,
    there_ptr: int,
    num_pages: int,
    most: int,
    blocks: int | None = None,
) -> None:
    """Copy payloads of up to ``most`` bytes to slots on the device, and their rows; see ``kv_rest.cu``.

    ``blocks``: thread blocks at most; one a page when None. Runs on CuPy's current stream.
    """
    assert num_pages > 0 and rows_ptr % 16 == 0 and there_ptr % 16 == 0
    arguments = payloads_ptr, rows_ptr, slots_ptr, there_ptr, num_pages, most
    launch("kv_rest", "kv_gather", min(num_pages, blocks or num_pages), THREADS, "Q" * 6, arguments)


def copies(dst, src, width, edges, kind: int, stream_ptr: int) -> int:
    """Enqueue copies of ``width`` bytes from ``src`` to ``dst`` (int64 arrays); return the number of calls.

    Args:
        edges: where runs of one width and equal distances begin, and the end (``arena.runs``); what lies before
            the first or after the last edge is left alone.
        kind: ``cudaMemcpyHostToDevice`` or ``cudaMemcpyDeviceToHost``.
        stream_ptr: not the legacy default stream.

    Few runs go as 2-D copies, many as one batched call where the driver has it, else one by one.
    """
    from cupy.cuda import runtime

    edges = edges.tolist()
    if len(edges) - 1 > _FEW_RUNS and has_batch():
        some = slice(edges[0], edges[-1])
        _copy_batch(dst[some], src[some], width[some], stream_ptr)
        return 1
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        to, by, size, height = int(dst[begin]), int(src[begin]), int(width[begin]), end - begin
        pitches = (int(dst[begin + 1]) - to, int(src[begin + 1]) - by) if height > 1 else (size, size)
        if pitches == (size, size):
            runtime.memcpyAsync(to, by, size * height, kind, stream_ptr)
        else:
            runtime.memcpy2DAsync(to, pitches[0], by, pitches[1], size, height, kind, stream_ptr)
    return len(edges) - 1


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
