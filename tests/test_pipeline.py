"""SwapPipeline on a GPU: every way there and back equals the reference, in any order, and nothing waits."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from assertions import assert_same_bits

from cuszp_cupy import FormatError, Geometry, pipeline, reference
from cuszp_cupy.pipeline import HostRows, SwapPipeline
from cuszp_cupy.raw import copy as raw_copy
from cuszp_cupy.raw import kv
from cuszp_cupy.transfer import Block

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
GEOMETRY = Geometry(16, 128, parts=(32, 32))  # 4 KiB, K and V side by side
BOUND = "rms:0.05"
TRANSPORTS = ["staged", "fused", "raw", "auto"]
HOSTS = ["arena", "rows", "slots"]
PAGES_PER_ROW = 4
TILE_PAGES = 8  # small, so that few pages make many tiles, and the ring goes round

FLAGS = []  # kept, since kernels may still look at them after a test has failed
#: Spins until *flag is not 0, at most 10 s, so that a failing test does not hang the GPU.
SPIN = r"""
extern "C" __global__ void spin(volatile unsigned int* flag) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (!*flag && now - begin < 10000000000ull);
}
"""


def make_pages(num, dtype="bfloat16", geometry=GEOMETRY, seed=0, kinds=("normal", "zeros", "nans")):
    """(num, *geometry.shape): noise that shrinks, zeros, and NaNs of all kinds, which do not shrink, in turns."""
    rng = np.random.default_rng([seed, num])
    pages = np.zeros((num, geometry.values), np.uint16)
    for i in range(num):
        kind = kinds[i % len(kinds)]
        if kind == "normal":
            x = (rng.standard_normal(geometry.values) * 2.0 ** rng.integers(-4, 4)).astype(np.float32)
            pages[i] = x.astype(DTYPES[dtype]).view(np.uint16)
        elif kind == "nans":
            pages[i] = rng.integers(0, 1 << 16, geometry.values, np.uint16) | 0x7F81
    return pages.view(DTYPES[dtype]).reshape(num, *geometry.shape)


def through_reference(pages, geometry=GEOMETRY, bound=BOUND):
    return np.stack([reference.decode_page(reference.encode_page(p, bound, geometry=geometry)) for p in pages])


def on_device(pages):
    import cupy

    return cupy.asarray(pages.view(np.uint16)).view(pages.dtype)


def empty_pages(num, dtype="bfloat16", geometry=GEOMETRY):
    import cupy

    return cupy.zeros((num, *geometry.shape), cupy.uint16).view(DTYPES[dtype])


def page_pointers(array, geometry=GEOMETRY):
    return np.uint64(array.data.ptr) + np.arange(len(array), dtype=np.uint64) * np.uint64(geometry.nbytes)


def pinned(nbytes):
    import cupy

    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


def make_pipeline(host="arena", num_slots=48, dtype="bfloat16", geometry=GEOMETRY, **options):
    """A pipeline with tiles of TILE_PAGES pages; rows have a gap of 64 bytes, slots one of 16."""
    options = {
        "transport": "staged",
        "ring_bytes": 2 * pipeline.TILES[options.get("coding", "fixed")][0] * TILE_PAGES * geometry.nbytes,
        **options,
    }
    if isinstance(host, HostRows):
        options["host"] = host
    elif host != "arena":
        pages_per_row, gap = (PAGES_PER_ROW, 64) if host == "rows" else (1, 16)
        stride = pages_per_row * geometry.nbytes + gap
        memory = pinned(num_slots // pages_per_row * stride)
        options["host"] = HostRows(memory.ctypes.data, stride, pages_per_row, memory)
    return SwapPipeline(geometry, dtype, BOUND, num_slots=num_slots, **options)


def warm_up(swap):
    """Launch every kernel and copy once: loading code may wait for the kernel that holds a stream up."""
    import cupy

    page, other = empty_pages(1, geometry=swap.geometry), empty_pages(1, geometry=swap.geometry)
    other.view(cupy.uint16)[...] = page.view(cupy.uint16)
    other.view(cupy.uint16)[...] = 1  # a kernel; 0 would be a memset
    prepared = swap.prepare_store(page, [0])
    prepared.launch()
    swap.load([0], page).wait()
    prepared.close()
    swap.store(page, [0]).wait()
    swap.load([0], page).wait()
    swap.drop([0])
    cupy.cuda.Device().synchronize()


@contextlib.contextmanager
def held(stream):
    """Keep ``stream`` busy until the block ends."""
    import cupy

    kernel = cupy.RawKernel(SPIN, "spin")
    flag = pinned(4).view(np.uint32)
    FLAGS.append(flag)
    pointer = np.uint64(cupy.cuda.runtime.pointerGetAttributes(flag.ctypes.data).devicePointer)
    flag[0] = 1
    with stream:
        kernel((1,), (1,), (pointer,))  # loads it, before anything is held up
    stream.synchronize()
    flag[0] = 0
    with stream:
        kernel((1,), (1,), (pointer,))
    try:
        yield
    finally:
        flag[0] = 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_round_trip_equals_reference(transport, host, dtype):
    """40 pages, 5 tiles: the ring's buffers go round. Slots out of order; loads of all, of some, of one."""
    swap = make_pipeline(host, dtype=dtype, transport=transport, timing=True)
    pages = make_pages(40, dtype)
    rng = np.random.default_rng(1)
    slots = np.concatenate([rng.permutation(40), [47]])[:40]
    for _ in range(2):  # the second time with a prediction, and over the first content
        store = swap.store(on_device(pages), slots)
        store.wait()
        expected = pages if store.transport == "raw" else through_reference(pages)
        for chosen in (np.arange(40), rng.permutation(40)[:17], np.array([3])):
            out = empty_pages(len(chosen), dtype)
            load = swap.load(slots[chosen], out)
            load.wait()
            assert_same_bits(out.get(), expected[chosen])
            assert load.query() and not load.failed
            assert load.stats.raw_bytes == len(chosen) * GEOMETRY.nbytes and load.stats.gbps > 0
    payload = sum(len(reference.encode_page(page, BOUND, geometry=GEOMETRY)) - 16 for page in pages)
    if store.transport != "raw":
        assert store.stats.payload_bytes == payload
        assert store.stats.link_bytes >= payload - 16 * 40
    assert swap.stats.store.pages == 80 and swap.stats.load.pages == 2 * 58
    assert swap.stats.failed_pages == swap.stats.unsupported_pages == swap.stats.failed_calls == 0
    assert swap.stats.raw_pages == 2 * (40 if store.transport == "raw" else 13)
    assert swap.stats.store.overlap > 0 and swap.stats.load.overlap > 0
    swap.close()
    with pytest.raises(RuntimeError, match="closed"):
        swap.store(on_device(pages), slots)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [True, False], ids=["batched copies", "one by one"])
@pytest.mark.parametrize(
    "geometry",
    # the least page of two groups a thread; flat, 2 mod 16 bytes; per head, of one chunk and of two
    [Geometry(16, 4), Geometry(1, 65), *(Geometry(16, 4 * n, outer=2, parts=(n, n)) for n in (160, 260))],
    ids=str,
)
def test_geometries_scattered(geometry, batch, monkeypatch):
    """Every second slot, and single pages at odd addresses: spans, gaps, and pages not 8-byte aligned."""
    import cupy

    if batch and not raw_copy.has_batch():
        pytest.skip("the driver has no cuMemcpyBatchAsync")
    monkeypatch.setattr(raw_copy, "has_batch", lambda: batch)
    monkeypatch.setattr(pipeline, "SPAN_BYTES", 64)
    monkeypatch.setattr(pipeline, "BATCH_SPAN_BYTES", 64)
    pages = make_pages(31, geometry=geometry)
    expected = through_reference(pages, geometry)
    with make_pipeline(num_slots=64, geometry=geometry) as swap:
        memory = cupy.zeros(31 * (geometry.values + 3) + 1, cupy.uint16)
        rows = memory[1:].reshape(31, -1)[:, : geometry.values]
        rows[...] = cupy.asarray(pages.view(np.uint16).reshape(31, -1))
        apart = np.uint64(2 * (geometry.values + 3))
        pointers = np.uint64(memory.data.ptr + 2) + np.arange(31, dtype=np.uint64) * apart
        slots = np.arange(31) * 2
        swap.store(pointers, slots).wait()
        swap.store(on_device(pages), slots + 1).wait()
        for chosen in (slots, slots + 1, slots[::3]):
            out = empty_pages(len(chosen), geometry=geometry)
            swap.load(chosen, out).wait()
            assert_same_bits(out.get(), expected[chosen // 2])
        memory[...] = 0
        swap.load(slots, pointers).wait()
        back = np.ascontiguousarray(rows.get()).view(pages.dtype).reshape(pages.shape)
        assert_same_bits(back, expected)
        assert not memory[1:].reshape(31, -1)[:, geometry.values :].get().any(), "written between pages"


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused", "raw"])
@pytest.mark.parametrize("host", HOSTS)
def test_order_on_the_callers_stream(host, transport):
    """Pages written just before a store and overwritten just after, output read just after a load; no waits."""
    import cupy

    first, second = make_pages(24, seed=1), make_pages(24, seed=2)
    expected = [first, second] if transport == "raw" else [through_reference(p) for p in (first, second)]
    device = [on_device(p) for p in (first, second)]
    with make_pipeline(host, transport=transport) as swap, cupy.cuda.Stream(non_blocking=True) as stream:
        warm_up(swap)
        work, out, seen = empty_pages(24), empty_pages(24), [empty_pages(24) for _ in range(2)]
        warm_up(swap)
        slots = np.random.default_rng(2).permutation(24)
        with held(stream):  # all of it is enqueued before any of it runs
            handles = []
            for round_, source in enumerate(device):
                work.view(cupy.uint16)[...] = source.view(cupy.uint16)
                handles.append(swap.store(work, slots))
                work.view(cupy.uint16)[...] = 0x1234
                handles.append(swap.load(slots, out))
                seen[round_].view(cupy.uint16)[...] = out.view(cupy.uint16)
                out.view(cupy.uint16)[...] = 0x4321
            assert not any(handle.query() for handle in handles)
        for handle in handles:
            handle.wait()
        for got, want in zip(seen, expected, strict=True):
            assert_same_bits(got.get(), want)


@pytest.mark.gpu
def test_load_before_the_store_is_done_and_explicit_waits():
    import cupy

    pages = make_pages(20)
    reader, writer = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with make_pipeline() as swap:
        device, out = on_device(pages), empty_pages(20)
        warm_up(swap)
        with held(writer):
            store = swap.store(device, range(20), writer, join=False)
            load = swap.load(range(20)[::-1], out, reader, join=False)
            assert not store.query() and not load.query() and "in flight" in repr(load)
            load.wait_on(reader)
        reader.synchronize()
        assert_same_bits(out.get(), through_reference(pages)[::-1])
        load.wait()
        assert store.query() and "done" in repr(store)
        assert load.stats.payload_bytes == store.stats.payload_bytes


@pytest.mark.gpu
def test_new_arguments_do_not_lie_where_the_current_stream_is_at_work():
    """CuPy gives freed memory out again to work on the same stream; the pipeline's runs on its own."""
    import cupy

    pages = make_pages(8)
    caller, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with make_pipeline() as swap:
        device, out, num = on_device(pages), empty_pages(8), Block.BYTES * 256 // 2
        warm_up(swap)
        swap._blocks.clear()
        with held(other), other:
            freed = cupy.empty(num, cupy.uint16)
            freed[...] = 1
            place = freed.data.ptr
            del freed
            store = swap.store(device, range(8), caller)
            assert store._block.capacity == 256 and store._block.device_pointers["hosts"] != place
            assert cupy.empty(num, cupy.uint16).data.ptr == place, "which was there to be had"
        store.wait()
        swap.load(range(8), out).wait()
        assert_same_bits(out.get(), through_reference(pages))


@pytest.mark.gpu
@pytest.mark.parametrize("host", HOSTS)
def test_random_use_against_a_model(host):
    """200 random stores, loads and drops over 3 streams and all transports; each loaded page compared."""
    import cupy

    rng, num_slots = np.random.default_rng(5), 24
    pool = make_pages(60, seed=3)
    decoded, pool_device = through_reference(pool), on_device(pool)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    cupy.cuda.Device().synchronize()
    model, packed, loads, full = {}, set(), [], 0

    def check(count):
        for load, out, want in loads[:count]:
            load.wait()
            assert_same_bits(out.get(), np.stack(want))
        del loads[:count]

    options = {"arena_bytes": 30 * GEOMETRY.nbytes} if host == "arena" else {}
    with make_pipeline(host, num_slots, **options) as swap:
        for _ in range(200):
            transport = str(rng.choice(["staged", "fused", "raw"]))
            action, stream = rng.random(), streams[rng.integers(3)]
            if action < 0.5:
                if host == "rows" and rng.random() < 0.6:
                    rows = rng.choice(num_slots // PAGES_PER_ROW, rng.integers(1, 4), replace=False)
                    slots = rng.permutation((rows[:, None] * PAGES_PER_ROW + np.arange(PAGES_PER_ROW)).ravel())
                else:
                    slots = rng.choice(num_slots, rng.integers(1, 12), replace=False)
                source = rng.choice(60, len(slots))
                pointers = page_pointers(pool_device)[source]
                try:
                    swap.store(pointers, slots, stream, transport=transport, join=bool(rng.integers(2)))
                except MemoryError:
                    full += 1
                    swap.synchronize()
                    continue
                if host == "rows":
                    for row, count in zip(*np.unique(slots // PAGES_PER_ROW, return_counts=True), strict=True):
                        if row in packed:
                            for slot in range(row * PAGES_PER_ROW, (row + 1) * PAGES_PER_ROW):
                                model.pop(slot, None)
                        packed.discard(row)
                        if count == PAGES_PER_ROW and transport != "raw":
                            packed.add(row)
                for slot, i in zip(slots.tolist(), source, strict=True):
                    model[slot] = pool[i] if transport == "raw" else decoded[i]
            elif action < 0.9 and model:
                slots = rng.choice(sorted(model), rng.integers(1, 12))  # some of them twice
                out = empty_pages(len(slots))
                cupy.cuda.get_current_stream().synchronize()
                load = swap.load(slots, out, stream, transport=transport, join=bool(rng.integers(2)))
                loads.append((load, out, [model[slot] for slot in slots.tolist()]))
            else:
                slots = rng.choice(num_slots, rng.integers(1, 8))
                swap.drop(slots)
                for slot in slots.tolist():
                    model.pop(slot, None)
            if rng.random() < 0.2:
                check(rng.integers(len(loads) + 1))
        check(len(loads))
        swap.synchronize()
        assert swap.stats.failed_pages == 0 and min(swap.stats.store.pages, swap.stats.load.pages) > 200
        assert full < 50
        if host == "arena":
            usage = swap.memory()
            assert 0 <= usage["fragmentation"] < 1 and usage["scratch_bytes"] == 0
            held_bytes = sum(-(-len(reference.encode_page(p, BOUND, geometry=GEOMETRY)) // 16) for p in pool) * 16
            assert 0 < usage["arena_used_bytes"] <= max(held_bytes, num_slots * GEOMETRY.nbytes)
            swap.drop(range(num_slots))
            assert swap.memory()["arena_used_bytes"] == 0 and swap.memory()["fragmentation"] == 0


@pytest.mark.gpu
def test_threads_streams_and_two_pipelines():
    """4 threads, each with a stream and slots of its own, on two pipelines at once."""
    import cupy

    pages = [make_pages(12, seed=s) for s in range(4)]
    expected = [through_reference(p) for p in pages]
    device = [on_device(p) for p in pages]
    outs = [empty_pages(12) for _ in range(4)]
    cupy.cuda.Device().synchronize()
    swaps, errors = [make_pipeline(), make_pipeline("rows")], []

    def work(i):
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                for round_ in range(24):
                    which = (i + round_) % 4
                    swap, slots = swaps[round_ % 2], np.arange(12) + 12 * i
                    transport = ["staged", "fused"][round_ // 2 % 2]
                    swap.store(device[which], slots, transport=transport)
                    swap.load(slots, outs[i], transport=transport)
                    stream.synchronize()
                    assert_same_bits(outs[i].get(), expected[which])
        except BaseException as error:  # the main thread raises it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for swap in swaps:
        swap.synchronize()
        assert swap.stats.store.pages + swap.stats.load.pages == 2 * 4 * 12 * 12
        swap.close()


@pytest.mark.gpu
@pytest.mark.parametrize("host", HOSTS)
def test_mispredicted_lengths(host):
    """After pages that shrink well, pages that do not shrink at all: the kernel moves what the copies left."""
    small, large = make_pages(40, kinds=("zeros",)), make_pages(40, kinds=("nans",))
    with make_pipeline(host, num_slots=64) as swap:
        swap.store(on_device(small), range(40)).wait()
        assert swap.stats.mispredicted == 0
        second = swap.store(on_device(small), range(40))
        second.wait()
        assert second.stats.link_bytes < 40 * GEOMETRY.nbytes / 4, "it should have predicted short regions"
        store = swap.store(on_device(large), range(40))
        store.wait()
        assert swap.stats.mispredicted == {"arena": 5, "rows": 10, "slots": 40}[host], "every region"
        assert store.stats.link_bytes == 40 * GEOMETRY.nbytes
        out = empty_pages(40)
        swap.load(range(40), out).wait()
        assert_same_bits(out.get(), large)
        swap.store(on_device(large), range(40)).wait()
        assert swap.stats.mispredicted == {"arena": 5, "rows": 10, "slots": 40}[host], "it should have learnt"


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused"])
def test_damage_is_named_and_contained(transport):
    pages = make_pages(16, kinds=("normal",))
    expected = through_reference(pages)
    with make_pipeline("slots", num_slots=16, transport=transport) as swap:
        memory = swap.table.rows.owner
        swap.store(on_device(pages), range(16)).wait()
        memory[5 * swap.table.rows.stride + 100] ^= 4
        memory[9 * swap.table.rows.stride + 700] ^= 128
        out = empty_pages(16)
        load = swap.load(range(16), out)
        with pytest.raises(FormatError, match=r"2 of 16 pages are damaged: slot 5: .*; slot 9: its checksum"):
            load.wait()
        assert sorted(load.failed) == [5, 9] and load.query()
        good = [i for i in range(16) if i not in load.failed]
        assert_same_bits(out.get()[good], expected[good])
        assert swap.stats.failed_pages == 2
        swap.load(good, out[: len(good)]).wait()  # the pipeline goes on
        swap.store(on_device(pages), range(16)).wait()
        swap.load(range(16), out).wait()
        assert_same_bits(out.get(), expected)


def tiles_of(swap, monkeypatch):
    """Return a list that gets (pages, copied bytes) of each tile that a load plans."""
    seen, plan_tiles = [], swap._plan_tiles

    def spy(transfer, lane, starts, lengths, found):
        copies, plan = plan_tiles(transfer, lane, starts, lengths, found)
        bounds, widths = found[0], found[3] - found[2]
        seen.extend((end - page, int(widths[lo:hi].sum()))
                    for (_, page, end, _), lo, hi in zip(plan, bounds[:-1], bounds[1:], strict=True))  # fmt: skip
        return copies, plan

    monkeypatch.setattr(swap, "_plan_tiles", spy)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("host", ["arena", "rows"])
def test_stores_have_what_loads_leave_of_the_ring(host, monkeypatch):
    page = GEOMETRY.nbytes
    monkeypatch.setitem(pipeline.TILES, "fixed", (2, 8 * page, 4 * page))
    for ring, (num, tile) in {16: (2, 4), 23: (2, 7), 29: (2, 8), 32: (3, 8), 40: (4, 8), 99: (4, 8)}.items():
        with make_pipeline(host, ring_bytes=ring * page) as swap:
            stores, loads = (swap._lanes[name].buffers for name in ("store", "load"))
            assert (len(stores), swap._store_pages, len(loads), swap._tile_pages) == (num, tile, 2, 4)
            places = [(b.address, tile * page) for b in stores] + [(b.address, 4 * page) for b in loads]
            assert all(place + size <= other for (place, size), (other, _) in itertools.pairwise(places))
            assert swap.memory()["ring_bytes"] == (num * tile + 8) * page <= ring * page
            pages, slots = make_pages(48), np.arange(48)
            for _ in range(2):
                swap.store(on_device(pages), slots).wait()
                out = empty_pages(48)
                swap.load(slots, out).wait()
                assert_same_bits(out.get(), through_reference(pages))


@pytest.mark.gpu
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("kinds", "expected"),
    # mixed: the last pages raw, so that by the mean length more pages go in a tile than fit of those
    [("zeros", [40]), ("normal", None), ("nans", [8] * 5), ("mixed", [8] * 5)],
)
def test_a_tile_of_a_load_takes_what_fits_encoded(host, kinds, expected, monkeypatch):
    monkeypatch.setattr(pipeline, "SPAN_BYTES", 1)
    monkeypatch.setattr(pipeline, "BATCH_SPAN_BYTES", 1)
    pages = make_pages(40, kinds=("zeros" if kinds == "mixed" else kinds,))
    if kinds == "mixed":
        pages[16:] = make_pages(24, kinds=("nans",))
    slots = np.random.default_rng(1).permutation(40)
    with make_pipeline(host, num_slots=64) as swap:
        seen = tiles_of(swap, monkeypatch)
        slots = slots if kinds != "mixed" else np.arange(40)
        swap.store(on_device(pages), slots).wait()
        for _ in range(3):
            out = empty_pages(40)
            swap.load(slots, out).wait()
            assert_same_bits(out.get(), through_reference(pages))
            assert max(copied for _, copied in seen) <= swap._tile_bytes
            taken = [num for num, _ in seen]
            assert sum(taken) == 40 and max(taken) <= 40
            if host != "arena":  # there tiles are a store's, whose pages lie in any order, with gaps between them
                assert taken == expected if expected else len(taken) < 5, taken
            seen.clear()


@pytest.mark.gpu
def test_damage_is_named_where_pages_are_loaded_in_another_order():
    """Layer by layer: the load takes row by row, and names slots, not places in the call."""
    pages = make_pages(16, kinds=("normal",))
    expected = through_reference(pages)
    slots = np.arange(16).reshape(-1, PAGES_PER_ROW).T.ravel()
    with make_pipeline("rows", num_slots=16) as swap:
        swap.store(on_device(pages), slots).wait()
        memory, address = swap.table.rows.owner, swap.table.address - swap.table.rows.pointer
        for slot in (5, 9):
            memory[address[slot] + 40] ^= 4
        out = empty_pages(16)
        load = swap.load(slots, out)
        with pytest.raises(FormatError, match=r"2 of 16 pages are damaged: slot 5: .*; slot 9: "):
            load.wait()
        assert sorted(load.failed) == [5, 9] and sorted(load.slots) == list(range(16))
        good = ~np.isin(slots, [5, 9])
        assert_same_bits(out.get()[good], expected[good])


@pytest.mark.gpu
def test_damage_in_the_arena_is_named():
    pages = make_pages(8, kinds=("normal",))
    with make_pipeline() as swap:
        swap.store(on_device(pages), range(8)).wait()
        swap._host[int(swap.table.address[3]) - swap.table.base + 200] ^= 1
        with pytest.raises(FormatError, match="1 of 8 pages are damaged: slot 3: "):
            swap.load(range(8), empty_pages(8)).wait()
        swap.load([3, 2, 3], empty_pages(3)).done.synchronize()
        swap.synchronize()
        assert swap.stats.failed_pages == 3, "slot 3 came back three times"


@pytest.mark.gpu
def test_what_is_refused():
    """Each with a message that says what to do; nothing is enqueued, nothing forgotten."""
    import cupy

    pages, device = make_pages(8), on_device(make_pages(8))
    pageable = np.zeros(8 * GEOMETRY.nbytes + 16, np.uint8)
    aligned = pageable.ctypes.data + -pageable.ctypes.data % 16
    with make_pipeline(num_slots=12) as swap, make_pipeline("rows", num_slots=12) as rows:
        swap.store(device, range(8)).wait()
        pointers = page_pointers(device)
        out = empty_pages(8)
        cases = [
            (lambda: swap.load([8], out[:1]), ValueError, "nothing is stored in slot 8; they were never stored"),
            (lambda: swap.load(range(8), out[:7]), ValueError, "one a page, 7, got 8"),
            (lambda: swap.load([12], out[:1]), ValueError, "0 to 11, got 12 to 12"),
            (lambda: swap.load([0.5], out[:1]), TypeError, "sequence of integers"),
            (lambda: swap.load([0, 1], page_pointers(out)[[3, 3]]), ValueError, "do not overlap"),
            (
                lambda: swap.load([0, 1], page_pointers(out)[:2] // 2 + page_pointers(out)[0] // 2),
                ValueError,
                "overlap",
            ),
            (lambda: swap.store(device[:2], [3, 3]), ValueError, "each slot once, got slot 3 more than once"),
            (lambda: swap.store(device[:1], [-1]), ValueError, "0 to 11, got -1"),
            (lambda: swap.store(pages, range(8)), TypeError, "array on the GPU"),
            (lambda: swap.store(device.view(cupy.uint16).view(np.float16), range(8)), TypeError, "for bfloat16"),
            (lambda: swap.store(device[:, :8], range(8)), ValueError, "C-contiguous"),
            (lambda: swap.store(pointers[:1] + np.uint64(1), [0]), ValueError, "multiples of 2"),
            (lambda: swap.store(np.array([aligned], np.uint64), [0]), ValueError, "no device memory"),
            (lambda: swap.store(pointers[None, :1], [0]), ValueError, "1-D array"),
            (lambda: swap.store(device, range(8), transport="best"), ValueError, "transport: expected one of"),
            (lambda: swap.store(device, range(8), transport="auto"), ValueError, "call calibrate"),
            (lambda: swap.store(device, range(8), "stream"), TypeError, "CuPy or torch stream"),
            (lambda: swap.drop([99]), ValueError, "0 to 11"),
            (lambda: make_pipeline(num_slots=0), ValueError, "num_slots"),
            (lambda: make_pipeline(quantile=1.1), ValueError, "quantile"),
            (lambda: make_pipeline(transport="best"), ValueError, "transport"),
            (lambda: make_pipeline(ring_bytes=1000), ValueError, "ring_bytes: expected 4 x 4096"),
            (lambda: make_pipeline(arena_bytes=1000), ValueError, "at least one page"),
            (lambda: make_pipeline(arena_bytes=1 << 50), MemoryError, "cannot pin"),
            (lambda: make_pipeline(host=HostRows(aligned, 4096, 1), num_slots=8), ValueError, "not pinned"),
            (lambda: make_pipeline(host=HostRows(aligned, 4090, 1), num_slots=8), ValueError, "multiples of 16"),
            (
                lambda: make_pipeline(host=HostRows(aligned, 4096, 2), num_slots=8),
                ValueError,
                "rows of 8192 bytes",
            ),
            (lambda: make_pipeline(host=HostRows(aligned, 4096, 3), num_slots=8), ValueError, "divisor of the 8"),
        ]
        for call, error, match in cases:
            with pytest.raises(error, match=match):
                call()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                for call in (lambda: swap.store(device, range(8)), lambda: swap.load(range(8), out)):
                    with pytest.raises(RuntimeError, match="capturing a graph; use prepare_store"):
                        call()
            finally:
                stream.end_capture()
        assert not swap._in_flight and swap.stats.store.pages == 8 and swap.stats.load.pages == 0
        swap.load(range(8), out).wait()
        assert_same_bits(out.get(), through_reference(pages))
        swap.drop([2])
        with pytest.raises(ValueError, match="nothing is stored in slot 2"):
            swap.load(range(8), out)
        # rows: a page alone in a row that was packed makes the row a new one
        rows.store(device, range(8)).wait()
        rows.store(device[:1], [1]).wait()
        rows.load([1, 4, 5, 6, 7], out[:5]).wait()
        with pytest.raises(ValueError, match="nothing is stored in slots 0, 2, 3"):
            rows.load(range(8), out)
        empty = swap.store(empty_pages(0), [])
        empty.wait()
        swap.load([], []).wait()
        assert empty.stats.pages == 0


@pytest.mark.gpu
def test_full_arena():
    """Too many pages are refused and change nothing; what is overwritten or dropped makes room, at once."""
    import cupy

    pages = make_pages(10, kinds=("nans",))
    with make_pipeline(num_slots=20, arena_bytes=10 * GEOMETRY.nbytes + 100) as swap:
        device, out = on_device(pages), empty_pages(10)
        swap.store(device, range(10)).wait()
        with pytest.raises(MemoryError, match=r"store of 3 pages needs 3 x 4096 bytes .* 100 of 41060 are free"):
            swap.store(device[:3], [10, 11, 12])
        with pytest.raises(MemoryError, match="store of 4 pages"):
            swap.store(device[:4], [0, 10, 11, 12])
        load = swap.load(range(10), out)  # still good
        load.wait()
        assert_same_bits(out.get(), pages)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with held(stream):  # the room of slots that a load in flight still reads
            load = swap.load(range(10), out, stream)
            swap.drop(range(4))
            store = swap.store(device[4:8], [10, 11, 12, 13], stream)
            again = swap.store(page_pointers(device)[:6], range(4, 10), stream)
            assert not load.query() and not store.query()
        again.wait()
        assert_same_bits(out.get(), pages)
        with pytest.raises(ValueError, match="nothing is stored in slots 0, 1, 2, 3"):
            swap.load(range(10), out)
        swap.load(range(4, 14), out).wait()
        assert_same_bits(out.get(), pages[[0, 1, 2, 3, 4, 5, 4, 5, 6, 7]])


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused", "raw"])
def test_room_that_a_load_still_reads(transport):
    """Stores that take dropped room out of a load in flight wait for it: the first one, and those after it."""
    import cupy

    pages, other = make_pages(10, kinds=("nans",)), make_pages(4, seed=9, kinds=("nans",))
    reader, writer = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with make_pipeline(num_slots=20, arena_bytes=10 * GEOMETRY.nbytes, transport=transport) as swap:
        device, other_device, out = on_device(pages), on_device(other), empty_pages(10)
        warm_up(swap)
        swap.store(device, range(10)).wait()
        with held(reader):
            load = swap.load(range(10), out, reader)
            swap.drop(range(7))
            for i in range(4):
                swap.store(other_device[i : i + 1], [10 + i], writer)
            time.sleep(0.05)  # what does not wait has happened by now
            assert not load.query()
        load.wait()
        assert_same_bits(out.get(), pages)
        swap.load(range(10, 14), out[:4]).wait()
        assert_same_bits(out.get()[:4], other)


@pytest.mark.gpu
def test_slots_are_used_again_without_growth():
    """40 times the pages that the arena holds raw; memory in use stays what it was after the first round."""
    pages = make_pages(24, kinds=("normal",))
    device, out, expected = on_device(pages), empty_pages(24), through_reference(pages)
    rng, usage = np.random.default_rng(4), []
    with make_pipeline(num_slots=24, arena_bytes=36 * GEOMETRY.nbytes) as swap:
        before = swap.memory()["argument_bytes"]
        for _ in range(60):
            order = rng.permutation(24)
            for part in np.split(order, 4):
                swap.store(page_pointers(device)[part], part)
            swap.load(range(24), out).wait()
            swap.synchronize()
            assert_same_bits(out.get(), expected)
            usage.append(swap.memory())
        assert max(u["argument_bytes"] for u in usage) <= before * 5 // 4, "at most 5 calls are in flight"
        assert len({u["arena_used_bytes"] for u in usage}) == 1
        assert max(u["fragmentation"] for u in usage) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["store", "load"])
def test_an_error_half_way(what, monkeypatch):
    """The call raises, its slots hold nothing (store), others are as they were, and memory comes back."""
    pages = make_pages(24)
    device, out, expected = on_device(pages), empty_pages(24), through_reference(pages)
    with make_pipeline(num_slots=48, arena_bytes=60 * GEOMETRY.nbytes) as swap:
        swap.store(device, range(24)).wait()
        used = swap.memory()["arena_used_bytes"]
        real, calls = getattr(kv, "encode" if what == "store" else "decode"), []

        def fail(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no launch")
            real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(kv, "encode" if what == "store" else "decode", fail)
            with pytest.raises(RuntimeError, match="no launch"):
                if what == "store":
                    swap.store(device, range(24, 48))
                else:
                    swap.load(range(24), out)
        swap.synchronize()
        assert swap.stats.failed_calls == 1 and swap.memory()["arena_used_bytes"] == used
        if what == "store":
            with pytest.raises(ValueError, match="nothing is stored in slots 24, 25"):
                swap.load(range(24, 48), out)
        swap.load(range(24), out).wait()
        assert_same_bits(out.get(), expected)
        swap.store(device, range(24, 48)).wait()
        swap.load(range(24, 48), out).wait()
        assert_same_bits(out.get(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused"])
@pytest.mark.parametrize("host", ["arena", "rows"])
def test_calls_return_at_once_and_allocate_nothing(host, transport, monkeypatch):
    """With the caller's stream held up: 3 stores and 3 loads within 50 ms each, no allocation, no wait."""
    import cupy

    pages = make_pages(40)
    expected, device = through_reference(pages), on_device(pages)
    outs = [empty_pages(40) for _ in range(3)]
    stream = cupy.cuda.Stream(non_blocking=True)
    with make_pipeline(host, num_slots=120, transport=transport) as swap:
        warm_up(swap)
        for _ in range(2):  # more of it: makes argument blocks for as many calls in flight
            with held(stream):
                for i in range(3):
                    swap.store(device, np.arange(40) + 40 * i, stream)
                    swap.load(np.arange(40) + 40 * i, outs[i], stream)
            swap.synchronize()
        pool = cupy.get_default_memory_pool()
        gc.collect()  # what earlier tests left must not be freed in the middle
        cupy.cuda.Device().synchronize()
        used, forbidden, times, handles = (pool.used_bytes(), pool.total_bytes()), [], [], []
        with held(stream), monkeypatch.context() as patch:

            def forbid(owner, *names):
                for name in names:
                    if hasattr(owner, name):
                        patch.setattr(owner, name, lambda *_, name=name, **__: forbidden.append(name))

            forbid(cupy.cuda, "alloc", "alloc_pinned_memory", "PinnedMemory")
            forbid(cupy.cuda.Stream, "synchronize")
            forbid(cupy.cuda.Event, "synchronize")
            forbid(
                cupy.cuda.runtime, "malloc", "mallocAsync", "hostAlloc", "free", "freeHost", "memcpy", "memset"
            )
            forbid(cupy.cuda.runtime, "streamSynchronize", "eventSynchronize", "deviceSynchronize")
            for i in range(3):
                slots = np.arange(40) + 40 * i
                for call, arguments in ((swap.store, (device, slots)), (swap.load, (slots, outs[i]))):
                    begin = time.perf_counter()
                    handles.append(call(*arguments, stream))
                    times.append(time.perf_counter() - begin)
            still = [not handle.query() for handle in handles]
            assert (pool.used_bytes(), pool.total_bytes()) == used
        assert forbidden == [] and all(still), "a transfer ran although its stream was held up"
        assert max(times) < 0.05, times
        for handle, i in zip(handles[1::2], range(3), strict=True):
            handle.wait()
            assert_same_bits(outs[i].get(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("host", HOSTS)
def test_cuda_graph(host):
    """A fused store and load, captured once, replayed on other data, and mixed with ordinary calls."""
    import cupy

    batches = [make_pages(10, kinds=(kind,)) for kind in ("normal", "nans", "zeros")]
    stream = cupy.cuda.Stream(non_blocking=True)
    with make_pipeline(host, num_slots=24) as swap:
        pages, out = empty_pages(10), empty_pages(10)
        slots = np.random.default_rng(6).permutation(16)[:10]
        with pytest.raises(ValueError, match="nothing is stored"):
            swap.prepare_load(slots, out)
        store = swap.prepare_store(pages, slots)
        load = swap.prepare_load(slots, out)
        cupy.cuda.Device().synchronize()
        with stream:
            store.launch()
            load.launch()  # warm-up
            stream.begin_capture()
            store.launch()
            load.launch()
            graph = stream.end_capture()
            for batch in [*batches, *batches]:
                pages.set(batch.view(np.uint16).view(pages.dtype))
                graph.launch(stream)
                stream.synchronize()
                assert_same_bits(out.get(), through_reference(batch))
                assert load.failed() == store.failed() == {}
            other = empty_pages(10)
            swap.load(slots, other).wait()  # of what a graph stored
            assert_same_bits(other.get(), through_reference(batches[-1]))
        for call in (lambda: swap.store(pages[:1], slots[:1]), lambda: swap.drop(slots[:1])):
            with pytest.raises(ValueError, match="a prepared transfer holds slot"):
                call()
        store.close()
        load.close()
        load.close()
        swap.store(pages, slots).wait()
        swap.load(slots, other).wait()
        assert_same_bits(other.get(), through_reference(batches[-1]))
        swap.store(pages, slots, transport="raw").wait()
        with pytest.raises(ValueError, match="stored encoded"):
            swap.prepare_load(slots, out)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused", "raw"])
def test_rows_that_are_pinned_one_by_one(transport):
    """Each row registered by itself: no copy may span two registrations."""
    import cupy

    runtime, stride = (
        cupy.cuda.runtime,
        4 * GEOMETRY.nbytes,
    )  # whole system pages: registrations must not share one
    memory = np.zeros(13 * stride, np.uint8)
    base = -(-memory.ctypes.data // stride) * stride
    for row in range(12):
        runtime.hostRegister(base + row * stride, stride, 0)
    try:
        with make_pipeline(HostRows(base, stride, 4, memory, separate=True), transport=transport) as swap:
            pages, slots = make_pages(48), np.arange(48)
            swap.store(on_device(pages), slots).wait()
            out = empty_pages(48)
            for chosen in (slots, slots[5:30], slots[::3]):
                swap.load(chosen, out[: len(chosen)]).wait()
                expected = pages if transport == "raw" else through_reference(pages)
                assert_same_bits(out[: len(chosen)].get(), expected[chosen])
    finally:
        for row in range(12):
            runtime.hostUnregister(base + row * stride)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused"])
@pytest.mark.parametrize("host", HOSTS)
def test_coding_entropy(host, transport, monkeypatch):
    """The same pages in fewer bytes, also while the store is in flight and in a graph; scratch for 3 pages."""
    import cupy

    slot_bytes = kv.entropy_slot_bytes(GEOMETRY)
    monkeypatch.setattr(pipeline, "SCRATCH_BYTES", (3 * slot_bytes,) * 4)
    pages, slots = make_pages(40), np.random.default_rng(3).permutation(40)
    blobs = [reference.encode_page(page, BOUND, "entropy", geometry=GEOMETRY) for page in pages]
    expected = np.stack([reference.decode_page(blob) for blob in blobs])  # signs of zeros differ from fixed's
    device, out = on_device(pages), empty_pages(40)
    with make_pipeline(host, coding="entropy", transport=transport) as swap:
        assert 4 * 2 * slot_bytes < swap.memory()["scratch_bytes"] < 4 * 4 * slot_bytes
        for _ in range(2):  # the second time with a prediction
            store = swap.store(device, slots)
            load = swap.load(slots, out)  # before the host knows where
            load.wait()
            assert_same_bits(out.get(), expected)
            assert store.query() and store.stats.payload_bytes == sum(len(blob) - 16 for blob in blobs)
            out.view(cupy.uint16)[...] = 0
            swap.load(slots[7:30], out[7:30]).wait()
            assert_same_bits(out.get()[7:30], expected[7:30])
        prepared = swap.prepare_store(device[:10], slots[:10]), swap.prepare_load(slots[:10], out[:10])
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for each in prepared:
                each.launch()  # warm-up
            stream.begin_capture()
            for each in prepared:
                each.launch()
            graph = stream.end_capture()
            out.view(cupy.uint16)[...] = 0
            graph.launch(stream)
            stream.synchronize()
        assert_same_bits(out.get()[:10], expected[:10])
        assert not prepared[1].failed()
        for each in prepared:
            each.close()
    with make_pipeline(host, transport=transport) as fixed:
        fixed.store(device, slots).wait()
        assert fixed.stats.store.payload_bytes > store.stats.payload_bytes


@pytest.mark.gpu
def test_auto_measures_and_explains():
    with make_pipeline(num_slots=64, transport="auto") as swap:
        assert set(swap.speed) == {
            "h2d", "d2h", "store burst", "load burst", "store fused", "load fused", "ratio", "launch_us",
        }  # fmt: skip
        assert all(value > 0 for value in swap.speed.values())
        text = swap.explain()
        print(text)
        assert "measured: D2H" in text and text.splitlines()[2].startswith("store: ")
        swap.speed = {
            **dict.fromkeys(swap.speed, 50.0),
            "store burst": 1000.0,
            "load burst": 1000.0,
            "launch_us": 1.0,
        }
        swap.speed |= {"ratio": 3.0, "store fused": 80.0, "load fused": 80.0}
        pages = make_pages(64, kinds=("normal",))
        assert swap.store(on_device(pages[:1]), [0]).transport == "fused", "one launch less"
        swap.speed["launch_us"] = 1e-3
        assert swap.store(on_device(pages), range(64)).transport == "staged"
        swap.speed |= {"ratio": 1.0, "launch_us": 10.0}
        swap.synchronize()  # takes note of the stores so far, whose ratio would count
        swap.stats.store.payload_bytes = 0
        assert swap.store(on_device(pages[:1]), [0], transport="auto").transport == "raw", (
            "when nothing is gained"
        )
        out = empty_pages(64)
        swap.load(range(64), out).wait()
        expected = through_reference(pages)
        expected[0] = pages[0]
        assert_same_bits(out.get(), expected)
    with make_pipeline() as swap:
        assert "nothing measured" in swap.explain()
        calls = []
        for name in ("_kv_encode", "_kv_decode"):
            launch = getattr(swap, name)
            setattr(swap, name, lambda *a, n=name, f=launch, **k: (calls.append(n), f(*a, **k)))
        swap.calibrate()
        assert calls == sorted(calls, reverse=True), "decoded pages lie on a grid: they take the encoder longer"
        assert len(set(calls)) == 2 and "expected GB/s" in swap.explain()


@pytest.mark.gpu
def test_torch_tensors_and_streams():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pages = make_pages(12)
    with make_pipeline() as swap:
        tensor = torch.from_numpy(pages.view(np.int16)).cuda().view(torch.bfloat16)
        out = torch.empty_like(tensor)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        swap.store(tensor, range(12), stream)
        swap.load(range(12), out, stream)
        stream.synchronize()
        assert_same_bits(out.view(torch.int16).cpu().numpy().view(pages.dtype), through_reference(pages))


@pytest.mark.gpu
@pytest.mark.parametrize("host", ["arena", "rows"])
def test_many_descriptors_in_one_call(host):
    """20,000 pages in one call, 40 tiles to store: host time, and no memory beyond the ring and the arguments."""
    import cupy

    num, geometry = (
        20_000,
        Geometry(16, 64),
    )  # 2 KiB, so that the host memory stays small; as many calls as 64 KiB
    pages = make_pages(50, geometry=geometry, kinds=("normal",))
    expected = through_reference(pages, geometry)
    device = on_device(pages)
    memory = cupy.empty(num * geometry.nbytes, cupy.uint8)
    sources = page_pointers(device, geometry)[np.arange(num) % 50]
    targets = np.uint64(memory.data.ptr) + np.arange(num, dtype=np.uint64) * np.uint64(geometry.nbytes)
    slots = np.random.default_rng(7).permutation(num // PAGES_PER_ROW)[:, None] * PAGES_PER_ROW
    slots = (slots + np.arange(PAGES_PER_ROW)).ravel()
    ring = 2 * pipeline.TILES["fixed"][0] * 500 * geometry.nbytes
    with make_pipeline(host, num_slots=num, geometry=geometry, ring_bytes=ring) as swap:
        for name in ("warm-up", "measured"):
            before = swap.memory()
            begin = time.perf_counter()
            store = swap.store(sources, slots)
            middle = time.perf_counter()
            store.wait()
            then = time.perf_counter()
            load = swap.load(slots, targets)
            end = time.perf_counter()
            load.wait()
            if name == "measured":
                assert swap.memory()["argument_bytes"] == before["argument_bytes"]
            print(f"{host}, {name}: store {(middle - begin) * 1e3:.2f} ms, load {(end - then) * 1e3:.2f} ms")
        assert middle - begin < 0.05 and end - then < 0.05, "ten times the aim, for busy machines"
        got = memory.view(cupy.uint16).reshape(num, *geometry.shape).get().view(pages.dtype)
        assert_same_bits(got, expected[np.arange(num) % 50])
        assert load.stats.link_bytes < 1.3 * load.stats.payload_bytes
