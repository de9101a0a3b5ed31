"""Faults by injection on a GPU: the call that meets one says so; what was stored before is served or refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from assertions import assert_same_bits
from test_pipeline import BOUND, DTYPES, GEOMETRY, empty_pages, held, make_pages, make_pipeline, on_device

from cuszp_cupy import FormatError, pipeline, raw
from cuszp_cupy.codec import pinned
from cuszp_cupy.pipeline import HostRows, SwapPipeline
from cuszp_cupy.reference import decode_page, encode_page

NUM = 24  # pages: three tiles


def no_memory(num_pages):
    raise MemoryError("no bytes of device memory")


class Stored:
    """A pipeline with pages in slots 0 .. 23, of 48, and what to expect of them."""

    def __init__(self, coding="fixed", **options):
        self.pages = make_pages(NUM)
        blobs = [encode_page(page, BOUND, coding, geometry=GEOMETRY) for page in self.pages]
        self.expected = np.stack([decode_page(blob) for blob in blobs])  # coding entropy: zeros of other signs
        self.device, self.out = on_device(self.pages), empty_pages(NUM)
        self.swap = make_pipeline(num_slots=48, coding=coding, **options)
        self.swap.store(self.device, range(NUM)).wait()

    def check(self) -> None:
        """Assert that the pages come back, that others can be stored, and that raw transfers work."""
        for transport, expected in (("staged", self.expected), ("fused", self.expected), ("raw", self.pages)):
            self.swap.load(range(NUM), self.out).wait()
            assert_same_bits(self.out.get(), self.expected)
            self.swap.store(self.device, range(NUM, 2 * NUM), transport=transport).wait()
            self.swap.load(range(NUM, 2 * NUM), self.out).wait()
            assert_same_bits(self.out.get(), expected)
        self.swap.drop(range(NUM, 2 * NUM))

    def check_raw(self) -> None:
        """Assert that pages can go and come as they are."""
        self.swap.store(self.device, range(NUM, 2 * NUM), transport="raw").wait()
        self.swap.load(range(NUM, 2 * NUM), self.out).wait()
        assert_same_bits(self.out.get(), self.pages)
        self.swap.drop(range(NUM, 2 * NUM))


@pytest.mark.gpu
@pytest.mark.parametrize("host", ["arena", "rows", "slots"])
def test_the_smallest_ring(host):
    """Tiles of one page, or one row of four: the ring goes round many times."""
    per_row = 4 if host == "rows" else 1
    stored = Stored(host=host, ring_bytes=2 * pipeline.TILES["fixed"][0] * per_row * GEOMETRY.nbytes)
    assert stored.swap._tile_pages == per_row
    stored.check()
    stored.swap.close()


@pytest.mark.gpu
def test_without_memory_for_arguments_a_call_waits_for_those_in_flight(monkeypatch):
    stored = Stored()
    swap = stored.swap

    monkeypatch.setattr(swap, "_new_block", no_memory)
    del swap._blocks[1:]  # one is left, which the first call takes
    first = swap.load(range(NUM), stored.out)
    second = swap.store(stored.device, range(NUM, 2 * NUM))
    assert first.query(), "its arguments were needed"
    swap._blocks.clear()
    second.wait()  # and gives its own back
    swap._blocks.clear()
    with pytest.raises(MemoryError, match="no bytes of device memory"):
        swap.load(range(NUM), stored.out)
    monkeypatch.undo()
    stored.check()
    swap.close()


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused"])
def test_a_load_that_waits_for_its_arguments_knows_what_finished_meanwhile(transport, monkeypatch):
    stored = Stored()
    swap = stored.swap
    reap, take = swap._reap, swap._take_block
    monkeypatch.setattr(swap, "_reap", lambda: None)  # nobody looks until the load waits
    stores = [swap.store(stored.device[:8], range(NUM + 8 * i, NUM + 8 * i + 8)) for i in range(3)]

    def wait(num_pages):
        for store in stores:
            store.done.synchronize()
        reap()
        return take(num_pages)

    monkeypatch.setattr(swap, "_take_block", wait)
    load = swap.load(range(NUM, NUM + 8), stored.out[:8], transport=transport)
    monkeypatch.undo()
    load.wait()
    assert_same_bits(stored.out.get()[:8], stored.expected[:8])
    stored.check()
    swap.close()


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["staged", "fused", "raw"])
def test_a_stream_that_cannot_be_waited_for(transport, monkeypatch):
    """As of another device: the calls raise, and hold nothing."""
    import cupy

    stored = Stored()
    swap, stream = stored.swap, cupy.cuda.Stream(non_blocking=True)
    before, blocks, record = swap.memory(), len(swap._blocks), swap._runtime.eventRecord

    def refuse(event, on):
        if on == stream.ptr:
            raise RuntimeError("of another device")
        record(event, on)

    monkeypatch.setattr(swap._runtime, "eventRecord", refuse)
    for call in (
        lambda: swap.store(stored.device, range(NUM, 2 * NUM), stream, transport=transport),
        lambda: swap.load(range(NUM), stored.out, stream, transport=transport),
    ):
        with pytest.raises(RuntimeError, match="of another device"):
            call()
    monkeypatch.undo()
    assert swap.memory() == before and len(swap._blocks) == blocks and not swap._in_flight
    stored.check()
    swap.close()


@pytest.mark.gpu
def test_no_memory_to_prepare_a_store_leaves_the_slots_as_they_were(monkeypatch):
    stored = Stored()
    swap, used = stored.swap, stored.swap.memory()["arena_used_bytes"]

    monkeypatch.setattr(swap, "_take_block", no_memory)
    with pytest.raises(MemoryError, match="no bytes of device memory"):
        swap.prepare_store(stored.device, range(NUM))
    monkeypatch.undo()
    assert swap.memory()["arena_used_bytes"] == used
    stored.check()
    swap.close()


@pytest.mark.gpu
def test_a_prepared_transfer_closes_once_its_launches_are_through():
    import cupy

    stored, stream = Stored(), cupy.cuda.Stream(non_blocking=True)
    prepared = stored.swap.prepare_load(range(NUM), stored.out)
    closing = threading.Thread(target=prepared.close)
    with stream:
        prepared.launch()  # compiled by now
    stream.synchronize()
    stored.out.view(cupy.uint16)[...] = 0
    cupy.cuda.Device().synchronize()
    with held(stream):
        with stream:
            prepared.launch()
        closing.start()
        closing.join(0.3)
        assert closing.is_alive()
    closing.join()
    assert_same_bits(stored.out.get(), stored.expected)
    stored.check()
    stored.swap.close()


@pytest.mark.gpu
def test_a_damaged_row_beside_pages_that_fill_their_tile():
    """Counted as 16 bytes at the begin of its row, it overlaps another page, on the far side of a tile's edge."""
    pages = (
        np.random.default_rng(5).integers(0, 1 << 16, (6, *GEOMETRY.shape), np.uint16).view(DTYPES["bfloat16"])
    )
    size = GEOMETRY.nbytes
    memory = pinned(2 * 3 * size)
    host = HostRows(memory.ctypes.data, 3 * size, 3, memory)
    ring = 2 * pipeline.TILES["fixed"][0] * 3 * size
    with make_pipeline(host, num_slots=6, ring_bytes=ring) as swap:
        store = swap.store(on_device(pages), range(6))
        store.done.synchronize()
        place = 16 * swap.table.memory[:, 3].astype(int)
        first, last = (
            [int(np.flatnonzero(place[r : r + 3] == at)[0]) + r for at in (0, 2 * size)] for r in (0, 3)
        )
        swap.table.memory[last[1]] = 0
        slots = [*first, last[0], last[1]]
        out = empty_pages(4)
        load = swap.load(slots, out)
        with pytest.raises(FormatError, match=f"1 of 4 pages are damaged: slot {last[1]}:"):
            load.wait()
        assert_same_bits(out.get()[:3], pages[slots[:3]])


@pytest.mark.gpu
@pytest.mark.parametrize("coding", ["fixed", "entropy"])
def test_kernels_that_do_not_compile(coding, monkeypatch):
    """Calls that need one raise what the compiler says and hold nothing; raw transfers need none, and work."""
    import cupy

    stored = Stored(coding=coding)
    with monkeypatch.context() as patch:
        patch.setattr(raw, "source", lambda name: "#error broken on purpose")
        raw._function.cache_clear()
        for call in (
            lambda: stored.swap.store(stored.device, range(NUM, 2 * NUM)),
            lambda: stored.swap.store(stored.device, range(NUM, 2 * NUM), transport="fused"),
            lambda: stored.swap.load(range(NUM), stored.out),
        ):
            with pytest.raises(cupy.cuda.compiler.CompileException, match="broken on purpose"):
                call()
        with pytest.raises(ValueError, match="nothing is stored in slots 24, 25"):
            stored.swap.load(range(NUM, 2 * NUM), stored.out)
        stored.check_raw()
        assert stored.swap.stats.failed_calls == 3
    raw._function.cache_clear()
    stored.check()
    stored.swap.close()


def construct(monkeypatch, which: str, fail_at: int) -> tuple[int, list]:
    """Make a pipeline whose allocation ``fail_at`` of pinned or device memory is refused; close it if none is.

    Returns:
        (allocations that were granted, weak references to the pinned memory)
    """
    real_pinned, real_allocate, count, arrays = pipeline.pinned, SwapPipeline._allocate, [0], []

    def granted(name):
        if name == which:
            if count[0] == fail_at:
                raise MemoryError("refused on purpose")
            count[0] += 1

    def pinned(nbytes):
        granted("pinned")
        array = real_pinned(nbytes)
        arrays.append(weakref.ref(array))
        return array

    def allocate(self, nbytes):
        granted("device")
        return real_allocate(self, nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "pinned", pinned)
        patch.setattr(SwapPipeline, "_allocate", allocate)
        try:
            make_pipeline().close()
        except MemoryError as error:
            assert "refused on purpose" in str(error)
    gc.collect()
    return count[0], arrays


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["pinned", "device"])
def test_memory_refused_at_construction_leaves_nothing_behind(which, monkeypatch):
    """Each allocation in turn is the one that fails."""
    import cupy

    needed, _ = construct(monkeypatch, which, -1)
    assert needed == {"pinned": 2, "device": 1}[which] + pipeline.BLOCKS  # arena and table, or ring; arguments
    before = cupy.get_default_memory_pool().used_bytes()
    for fail_at in range(needed):
        granted, arrays = construct(monkeypatch, which, fail_at)
        assert granted == fail_at
        assert cupy.get_default_memory_pool().used_bytes() == before
        assert not any(array() is not None for array in arrays)
    Stored().check()


@pytest.mark.gpu
def test_two_pipelines_when_device_memory_runs_out():
    """The second one is refused, with what to do; the first one goes on; later there is room for both."""
    import cupy

    pool = cupy.cuda.MemoryPool()  # with no free memory left by other tests
    with cupy.cuda.using_allocator(pool.malloc):
        first = Stored()
        first.check()
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + GEOMETRY.nbytes)
        with pytest.raises(MemoryError, match="lower ring_bytes"):
            make_pipeline()
        first.check()
        pool.set_limit(size=0)
        second = Stored()
        first.check()
        second.check()
        first.swap.close()
        second.check()
    second.swap.close()


@pytest.mark.gpu
def test_no_device_memory_for_arguments(monkeypatch):
    """Store and load are refused before anything is enqueued: all is as it was."""
    stored = Stored()
    swap = stored.swap
    swap.synchronize()
    blocks, used = swap._blocks[:], swap.memory()["arena_used_bytes"]
    swap._blocks.clear()

    def refuse(nbytes):
        raise MemoryError("refused on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(swap, "_allocate", refuse)
        for call in (
            lambda: swap.store(stored.device, range(NUM)),  # over what is there
            lambda: swap.load(range(NUM), stored.out),
        ):
            with pytest.raises(MemoryError, match="refused on purpose"):
                call()
        assert swap.memory()["arena_used_bytes"] == used and not swap._in_flight
    swap._blocks.extend(blocks)
    stored.check()
    swap.close()


@pytest.mark.gpu
@pytest.mark.parametrize("host", ["arena", "rows", "slots"])
def test_the_page_table_is_lost(host):
    """Its memory is overwritten after the host has learnt the rows: nothing changes, and stores go on."""
    stored = Stored(host=host)
    stored.swap.synchronize()
    rng = np.random.default_rng(0)
    for lost in (0, 0xFFFFFFFF, None):
        memory = stored.swap.table.memory
        memory[...] = rng.integers(0, 1 << 32, memory.shape, np.uint32) if lost is None else lost
        stored.check()
    assert stored.swap.stats.failed_pages == 0
    stored.swap.close()


@pytest.mark.gpu
@pytest.mark.parametrize("damage", ["row", "size", "place"])
def test_a_row_that_is_damaged_before_the_host_sees_it(damage):
    """The slot is refused by name, whatever the row says; the others are served; its memory comes back."""
    stored = Stored()
    swap = stored.swap
    store = swap.store(stored.device, range(NUM, 2 * NUM))
    store.done.synchronize()  # the rows are there, and nobody has looked
    word, value = {"row": (0, 0xFFFFFFFF), "size": (1, 0xFFFFFFF0), "place": (3, 0xFFFFFFFF)}[damage]
    swap.table.memory[NUM + 5, word] = value
    store.wait()
    with pytest.raises(
        FormatError, match=f"1 of {NUM} pages are damaged: slot {NUM + 5}: its table row is damaged"
    ):
        swap.load(range(NUM, 2 * NUM), stored.out).wait()
    swap.drop(range(NUM, 2 * NUM))
    stored.check()
    swap.drop(range(NUM))
    swap.synchronize()
    assert swap.memory()["arena_used_bytes"] == 0
    swap.close()


WORKER = """
import sys
sys.path.insert(0, "tests")
from test_pipeline import make_pages, make_pipeline, on_device
swap, pages = make_pipeline(num_slots=48, arena_bytes=1 << 20), on_device(make_pages(24))
while True:
    stores = swap.store(pages, range(24)), swap.store(pages, range(24, 48), transport="fused")
    print("stored", flush=True)
    for store in stores:
        store.wait()
"""


@pytest.mark.gpu
def test_a_worker_killed_during_a_store_leaves_the_device_to_others():
    stored = Stored()
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as worker:
        try:
            for _ in range(20):
                assert worker.stdout.readline() == "stored\n"
        finally:
            worker.kill()
    assert worker.returncode == -9
    stored.check()
    stored.swap.close()
