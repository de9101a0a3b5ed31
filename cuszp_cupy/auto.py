"""Transport ``auto``: measure this machine, expect each transport's time, pick the shortest, say why."""

from __future__ import annotations

import time

import numpy as np

from .arena import runs
from .codec import mapped_pointer, pinned
from .format import ROW_WORDS
from .raw import copy as raw_copy

SAMPLE_PAGES = 8  # different ones, repeated
SAMPLE_BYTES = 32 << 20  # a tile, but no more
REPEATS = 3
LIGHT = 1.1  # staged may take so much longer than fused: it leaves the SMs to others


def measure(pipeline) -> dict[str, float]:
    """Return GB/s of link and codec, launch cost in us, and the ratio, on pages of noise. Waits, allocates.

    The pipeline must be idle: its ring is the working memory. Compiles the kernels.
    """
    cuda, runtime = pipeline._cupy.cuda, pipeline._runtime
    store, load = pipeline._lanes["store"], pipeline._lanes["load"]
    slot_bytes = pipeline._slot_bytes
    num = min(pipeline._tile_pages, pipeline.num_slots, max(1, SAMPLE_BYTES // slot_bytes))
    nbytes = num * slot_bytes
    host = pinned(nbytes)
    mapped = mapped_pointer(host.ctypes.data, "calibration memory")
    noise = np.random.default_rng(0).standard_normal(min(num, SAMPLE_PAGES) * slot_bytes // 2)
    host[...] = np.resize(noise.astype(np.float32).astype(pipeline.dtype).view(np.uint8), nbytes)
    raw, packed = load.buffers[0].address, store.buffers[0].address
    block, places = pipeline._take_block(num), np.arange(num) * slot_bytes
    block.pages[:] = raw + places
    at = block.device_pointers

    def gbps(stream, work) -> float:
        times = []
        for _ in range(1 + REPEATS):  # the first one warms up
            begin, end = cuda.Event(), cuda.Event()
            with stream:
                begin.record(stream)
                work()
                end.record(stream)
            end.synchronize()
            times.append(cuda.get_elapsed_time(begin, end))
        return nbytes / max(min(times[1:]), 1e-3) / 1e6

    def copy(stream, dst, src, kind):
        return gbps(stream, lambda: runtime.memcpyAsync(dst, src, nbytes, kind, stream.ptr))

    def aim(target):
        block.payloads[:] = target + places
        block.upload("slots", "payloads", store.codec)

    def encode(target, count=num):
        aim(target)
        call = pipeline._kv_encode
        return gbps(store.codec, lambda: call(at, 0, count, True, store.scratch, target == mapped, cursors=False))

    def decode(on_host):
        status, scratch = block.status_ptr, store.scratch
        return gbps(store.codec, lambda: pipeline._kv_decode(at, 0, num, True, status, scratch, on_host))

    speed = {"h2d": copy(load.copy, raw, host.ctypes.data, runtime.memcpyHostToDevice)}
    speed["d2h"] = copy(store.copy, host.ctypes.data, raw, runtime.memcpyDeviceToHost)
    # decoding writes the pages, last: values of a grid take the encoder longer
    speed["store burst"] = encode(packed)
    speed["launch_us"] = nbytes / encode(packed, count=1) / 1e3
    speed["store fused"] = encode(mapped)
    speed["load fused"] = decode(on_host=True)
    aim(packed)
    speed["load burst"] = decode(on_host=False)
    rows = np.empty((num, ROW_WORDS), np.uint32)
    runtime.memcpyAsync(rows.ctypes.data, at["rows"], rows.nbytes, runtime.memcpyDeviceToHost, store.codec.ptr)
    store.codec.synchronize()
    speed["ratio"] = nbytes / int(rows[:, 1].sum(dtype=np.int64))
    if pipeline.table.pages_per_row == 1 and pipeline.table.rows:  # no two pages go in one copy
        scattered = np.random.default_rng(1).permutation(places)
        width = max(16, int(slot_bytes / speed["ratio"]) // 16 * 16)

        def seconds(count: int) -> float:
            pieces = host.ctypes.data + scattered[:count], packed + places[:count], np.full(count, width)
            times = []
            for _ in range(1 + REPEATS):  # by the clock: the host plans each of them
                begin = time.perf_counter()
                raw_copy.copies(*pieces, runs(*pieces), runtime.memcpyDeviceToHost, store.copy.ptr)
                store.copy.synchronize()
                times.append(time.perf_counter() - begin)
            return min(times[1:])

        speed["copy_us"] = 1e6 * (seconds(num) - seconds(1)) / max(1, num - 1)
    pipeline._put_block(block)
    return speed


def expected_us(pipeline, direction: str, num_pages: int) -> dict[str, float]:
    """Return transport -> the time to expect, in microseconds, for a batch in ``direction``.

    ``staged``: its launches, the first tile's codec time, then the slowest of link, codec and, where pages lie
    apart, a copy for each. ``fused``: its launches, then the slower of link and kernel. ``raw``: the slower of
    link and copies. The ratio is that of the pages encoded so far, or of the noise that was measured with.
    """
    speed, nbytes = pipeline.speed, num_pages * pipeline._slot_bytes
    seen = pipeline.stats.store
    copied = seen.transports.get("raw", 0) * pipeline.page_bytes  # which tells nothing of the ratio
    encoded = seen.payload_bytes - copied
    ratio = (seen.raw_bytes - copied) / encoded if encoded > 0 else speed["ratio"]
    link = speed["d2h" if direction == "store" else "h2d"] * 1e3  # bytes a microsecond
    burst, fused = speed[f"{direction} burst"] * 1e3, speed[f"{direction} fused"] * 1e3
    launch, copies = speed["launch_us"], num_pages * speed.get("copy_us", 0.0)
    times = {}
    if direction == "store":  # a load takes what was stored
        times["raw"] = 2 * launch + max(nbytes / link, copies)
    tile_pages = pipeline._store_pages if direction == "store" else pipeline._tile_pages
    first = min(nbytes, tile_pages * pipeline._slot_bytes) / burst
    times["staged"] = 4 * launch + first + max(nbytes / min(ratio * link, burst), copies)
    times["fused"] = 2 * launch + nbytes / min(ratio * link, fused)
    return times


def fastest(pipeline, direction: str, num_pages: int) -> str:
    """Return the transport with the shortest expected time; ``staged`` rather than a ``fused`` hardly shorter."""
    times = expected_us(pipeline, direction, num_pages)
    best = min(times, key=times.get)
    return "staged" if best == "fused" and times["staged"] <= LIGHT * times["fused"] else best


def explain(pipeline) -> str:
    """Return what was measured, what is picked for batches of which size, and why, as text."""
    head = (
        f"pages of {pipeline.page_bytes} bytes, tiles of {pipeline._store_pages} pages to the host and "
        f"{pipeline._tile_pages} from it, transport {pipeline.transport}"
    )
    s = pipeline.speed
    if not s:
        return f"{head}; nothing measured: calibrate() does"
    lines = [
        head,
        f"measured: D2H {s['d2h']:.1f}, H2D {s['h2d']:.1f} GB/s; bursts: encode {s['store burst']:.0f}, "
        f"decode {s['load burst']:.0f} GB/s; {pipeline.fused_blocks} blocks on host memory: encode "
        f"{s['store fused']:.0f}, decode {s['load fused']:.0f} GB/s; a launch {s['launch_us']:.0f} us"
        + (f"; pages lie apart, a copy takes {s['copy_us']:.1f} us" if "copy_us" in s else ""),
    ]
    sizes = [1 << i for i in range(pipeline.num_slots.bit_length())]
    for direction in ("store", "load"):
        picks = [fastest(pipeline, direction, size) for size in sizes]
        changes = [i for i in range(len(picks)) if i == 0 or picks[i] != picks[i - 1]]
        text = ", ".join(f"{picks[i]} from {sizes[i]} page(s) on" for i in changes)
        times = expected_us(pipeline, direction, sizes[-1])
        speeds = ", ".join(
            f"{name} {sizes[-1] * pipeline.page_bytes / us / 1e3:.1f}" for name, us in times.items()
        )
        lines.append(f"{direction}: {text}; expected GB/s for {sizes[-1]} pages: {speeds}")
    return "\n".join(lines)
