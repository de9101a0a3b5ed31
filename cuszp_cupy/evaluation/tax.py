"""The tax: how much slower other work on the GPU gets while pages are swapped beside it without a pause."""

from __future__ import annotations

import math
import statistics

import numpy as np

from ..codec import mapped_pointer
from . import swap, timing
from .speed import copy_bytes

WORK_MS = 40  # of work in a sample, about
GEMM = 8192
SKINNY = (16, 16384)  # batch, and the weights' two extents: several times the L2 cache
COPY_BYTES = 512 << 20
TOP_UP_EVERY = 32  # launches of work between two looks at the swap: far ahead of the GPU on a slow host, too
EQUAL = "staged, same priority"
#: Moves words between device and mapped host memory: a swap without copy engines. Only for comparison.
COPY_KERNEL = r"""
extern "C" __global__ void copy_words(const uint4* from, uint4* to, unsigned long long num) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < num; i += stride)
        to[i] = from[i];
}
"""
COPY_KERNEL_GRID = 32, 1024


def tax_rows(case: swap.Case, seconds: float, notes: list[str], step=lambda text: None) -> list[dict]:
    """Time work on a high-priority stream, alone and beside each kind of swap, in turns.

    Beside ``staged`` also on a stream of the swap's own priority, which then gets its share of the GPU.

    Args:
        case: in the arena.
        seconds: of timing, each kind of work.
        notes: gets a line on what multiplies the matrices.

    Returns:
        dicts of ``work``, ``swap`` (None: alone), ``direction``, ``work_ms``, ``spread_percent``, ``slowdown``,
        and ``gbps``, the raw bytes a second that the swap moved meanwhile.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True, priority=-5)  # the driver takes its highest
    equal = cupy.cuda.Stream(non_blocking=True)
    flows = {(None, None): None}
    for direction, ways in list(swap.DIRECTIONS.items())[:2]:
        flows["raw DMA", direction] = case.copies(ways[0], swap.LARGE)
        flows["raw copy kernel", direction] = kernel_copies(case, ways[0])
        for transport in ("staged", EQUAL, "fused"):
            flows[transport, direction] = case.transfers(ways[0], "staged" if transport == EQUAL else transport)
    rows = []
    for name, work in works(notes).items():
        step(f"the tax: {name}")
        for each in (stream, equal):
            work(each)
            each.synchronize()
        count = max(2, math.ceil(WORK_MS / sample(case, work, 8, stream, None)[0]))
        logs = {key: [] for key in flows}

        def sampler(key, work=work, count=count, logs=logs):
            def once() -> float:
                on = equal if key[0] == EQUAL else stream
                logs[key].append(sample(case, work, count, on, flows[key]))
                return logs[key][-1][0]

            return once

        times = timing.interleaved({key: sampler(key) for key in flows}, seconds)
        for key, timed in times.items():
            speeds = [gbps for _, gbps in logs[key][-timed.num_samples :] if gbps is not None]
            rows.append(
                {"work": name, "swap": key[0], "direction": key[1], "work_ms": timed.ms,
                 "spread_percent": timed.spread_percent, "slowdown": timed.ms / times[None, None].ms,
                 "gbps": statistics.median(speeds) if speeds else None}
            )  # fmt: skip
    return rows


def sample(case: swap.Case, work, count: int, stream, start) -> tuple[float, float | None]:
    """Run ``work`` ``count`` times on ``stream`` beside a flow (``start`` None: alone); return (its ms, GB/s)."""
    import cupy

    case.swap.synchronize()
    case.swap.drop(case.slots[0].ravel())
    origin, begin, end = (cupy.cuda.Event() for _ in range(3))
    feeder = swap.Feeder(start) if start else None
    origin.record(stream)
    if feeder:
        feeder.top_up()
        feeder.events[0].synchronize()  # it is under way
        feeder.top_up()
    begin.record(stream)
    for i in range(1, count + 1):
        work(stream)
        if feeder and i % TOP_UP_EVERY == 0:
            feeder.top_up()
    end.record(stream)
    while feeder and not timing.reached(end):
        feeder.top_up()
    end.synchronize()
    elapsed = cupy.cuda.get_elapsed_time
    window = elapsed(origin, begin), elapsed(origin, end)
    gbps = swap.rate_gbps(feeder.times(origin), *window, swap.BATCH_BYTES) if feeder else None
    return (window[1] - window[0]) / count, gbps


def kernel_copies(case: swap.Case, direction: str):
    """Return a function that starts the copy of batch i by COPY_KERNEL and returns its ``Copy``."""
    import cupy

    kernel, stream = cupy.RawKernel(COPY_KERNEL, "copy_words"), cupy.cuda.Stream(non_blocking=True)
    mapped = mapped_pointer(case._host.ctypes.data, "host memory")
    num = np.uint64(swap.BATCH_BYTES // 16)

    def start(i: int) -> swap.Copy:
        host = np.uint64(mapped + i % swap.NUM_BATCHES * swap.BATCH_BYTES)
        pair = (case.x.data.ptr, host) if direction == "store" else (host, case.y.data.ptr)
        with stream:
            kernel((COPY_KERNEL_GRID[0],), (COPY_KERNEL_GRID[1],), (*map(np.uint64, pair), num))
        done = cupy.cuda.Event()
        done.record(stream)
        return swap.Copy(done)

    return start


def works(notes: list[str]) -> dict:
    """Return name -> function that enqueues the work once on the stream it is given."""
    import cupy

    try:
        import torch
    except ImportError as error:
        notes.append(f"the tax multiplies float16 matrices by CuPy, not bfloat16 ones by torch ({error})")
        torch = None

    def product(rows: int, inner: int, columns: int):
        if torch:
            device = torch.device("cuda", cupy.cuda.Device().id)
            a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((rows, inner), (columns, inner)))
            out, b, multiply = torch.empty(rows, columns, device=device, dtype=a.dtype), b.t(), torch.matmul

            def current(stream):
                return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=device))
        else:
            a, b = (
                cupy.random.standard_normal(shape, dtype=cupy.float32).astype(cupy.float16)
                for shape in ((rows, inner), (inner, columns))
            )
            out, multiply = cupy.empty((rows, columns), cupy.float16), cupy.matmul

            def current(stream):
                return stream

        def work(stream):
            with current(stream):
                multiply(a, b, out=out)

        return work

    if torch:
        notes.append(f"the tax multiplies bfloat16 matrices by torch {torch.__version__}")
    kind = "bf16" if torch else "fp16"
    x = cupy.zeros(COPY_BYTES, cupy.uint8)
    y = cupy.zeros(COPY_BYTES, cupy.uint8)

    def copy(stream):
        with stream:
            copy_bytes(y.data.ptr, x.data.ptr, COPY_BYTES)

    made = {
        f"{kind} GEMM {GEMM}": product(GEMM, GEMM, GEMM),
        f"skinny {kind} GEMM, batch {SKINNY[0]}": product(SKINNY[0], SKINNY[1], SKINNY[1]),
        f"copy of {COPY_BYTES >> 20} MiB": copy,
    }
    cupy.cuda.Device().synchronize()
    return made
