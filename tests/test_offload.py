"""Which of a serving engine's pages are compressed and where they lie; a fake pipeline stands for the GPU's."""

from __future__ import annotations

import ctypes
import json
import time
import types

import hypothesis.strategies as st
import numpy as np
import pytest
from fake_pipeline import POISON, FakePipeline
from hypothesis import assume, given, settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from cuszp_cupy import offload
from cuszp_cupy.format import Geometry
from cuszp_cupy.offload import HELD, NEVER, RAW, Kind, Settings, Swap, Tensor, Verifier, Worker, plan

KIND = Kind(Geometry(16, 2 * 64, parts=(32, 32)), "bfloat16")  # 2 heads of 32: pages of 4 KiB
PAGE = KIND.geometry.nbytes
BOUND = ("rms:0.05", "rms:0.05")


class Stream:
    def synchronize(self): ...


class Server:
    """GPU and CPU memory of ``layers`` tensors in rows, as vLLM has them, and one call of its copy function.

    Args:
        blocks_per_chunk: pages of a tensor in a row.    before, after: bytes of others in each row.
        kinds: one a layer.
    """

    def __init__(
        self, layers=4, blocks=40, chunks=6, blocks_per_chunk=2, before=0, after=0, kinds=None, ring=1 << 20
    ):
        self.width, self.blocks_per_chunk = PAGE * blocks_per_chunk, blocks_per_chunk
        self.stride = before + layers * self.width + after
        self.gpu = np.random.default_rng(0).integers(0, 256, (layers, blocks, PAGE), np.uint8)
        self.cpu = np.zeros(chunks * self.stride + 16, np.uint8)
        self.cpu_ptr = -(-self.cpu.ctypes.data // 16) * 16 + before
        self.tensors = [
            Tensor(
                [f"model.layers.{i}.attn"], (kinds or {}).get(i, KIND), BOUND, self.gpu[i].ctypes.data,
                blocks * PAGE, PAGE, self.cpu_ptr + i * self.width, self.stride, self.width, chunks,
            )
            for i in range(layers)
        ]  # fmt: skip
        self.runs, self.raw = plan(self.tensors, ring)
        for run in self.runs:
            run.pipeline = FakePipeline(
                run.kind.geometry, run.kind.dtype, run.bound, num_slots=run.num_slots, transport="staged",
                host=run.host, ring_bytes=ring,
            )  # fmt: skip
        self.stream, self.by_vllm = Stream(), []
        self.worker = Worker(self.runs, Settings(), lambda: self.stream, raw_tensors=self.raw)
        self.store, self.load = (Swap(self._copy, to_cpu) for to_cpu in (True, False))
        self.store.worker = self.load.worker = self.worker

    def _copy(self, src, dst, sizes, is_src_access_order_any=False):
        self.by_vllm.append((src.copy(), dst.copy(), sizes.copy(), is_src_access_order_any))
        for to, by, size in zip(dst, src, sizes, strict=True):
            ctypes.memmove(int(to), int(by), int(size))

    def pages(self, layers, blocks, chunk_pages):
        """Return (GPU addresses, CPU addresses, sizes) as vLLM lists them: layer by layer."""
        gpu, cpu = [], []
        for i in layers:
            for block, (chunk, j) in zip(blocks, chunk_pages, strict=True):
                gpu.append(self.gpu[i, block].ctypes.data)
                cpu.append(self.cpu_ptr + chunk * self.stride + i * self.width + j * PAGE)
        return np.array(gpu), np.array(cpu), np.full(len(gpu), PAGE)

    def chunks(self, chunks):
        return [(chunk, j) for chunk in chunks for j in range(self.blocks_per_chunk)]


def random_bits(server: Server) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, server.gpu.shape, np.uint8)


# --- settings ---------------------------------------------------------------------------------------------
def test_configure_sets_the_variables_that_workers_read(monkeypatch):
    for variable in offload.VARIABLES.values():
        monkeypatch.setenv(variable, "")
    assert Settings.read() == Settings()
    read = offload.configure(
        bound=("rms:0.02", "abs:1"), layers={0: "raw", "2-3": ("rms:1", "rms:2")}, verify=True
    )
    assert read == Settings.read() == Settings("rms:0.02/abs:1", layers="0=raw;2-3=rms:1/rms:2", verify=1.0)
    assert read.bound_of(["model.layers.0.attn"]) is None
    assert read.bound_of(["model.layers.3.attn"]) == ("rms:1.0", "rms:2.0")
    assert read.bound_of(["model.layers.30.attn", "encoder"]) == ("rms:0.02", "abs:1.0")
    with pytest.raises(ValueError, match="share memory and need one bound"):
        read.bound_of(["model.layers.0.attn", "model.layers.1.attn"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bound": "rms"}, r"CUSZP_BOUND='rms': bound: expected text like"),
        ({"bound": "rms:1/rms:2/rms:3"}, "got 3 bounds"),
        ({"coding": "zip"}, "CUSZP_CODING='zip'"),
        ({"transport": "bus"}, "CUSZP_TRANSPORT='bus': expected one of auto, staged, fused, raw"),
        ({"layers": "one=raw"}, "CUSZP_LAYERS='one=raw': expected rules like"),
        ({"layers": "1-x=raw"}, "expected rules like"),
        ({"layers": "-1=raw"}, "expected layer numbers"),
        ({"layers": "1=rms:-2"}, "CUSZP_LAYERS"),
        ({"verify": 2}, "CUSZP_VERIFY='2': expected a share"),
        ({"ring_mb": 0}, "CUSZP_RING_MB='0': expected at least 1"),
    ],
)
def test_configure_refuses_and_sets_nothing(monkeypatch, settings, message):
    (name,) = settings
    variable = offload.VARIABLES[name]
    monkeypatch.setenv(variable, "")
    with pytest.raises(ValueError, match=message):
        offload.configure(**settings)
    with pytest.raises(ValueError, match=message):
        Settings.read({variable: str(settings[name])})
    assert Settings.read() == Settings()
    with pytest.raises(TypeError, match="configure: expected bound, .* got bond"):
        offload.configure(bond="rms:1")


# --- where pages lie --------------------------------------------------------------------------------------
# One page a tensor in a row and several; rows of our tensors alone, and beside those of other workers.
@pytest.mark.parametrize(
    ("blocks_per_chunk", "before", "after"), [(1, 0, 0), (3, 0, 0), (2, PAGE, 3 * PAGE + 16)]
)
def test_pages_come_back_as_they_were_stored(blocks_per_chunk, before, after):
    server = Server(blocks_per_chunk=blocks_per_chunk, before=before, after=after)
    (run,) = server.runs
    assert run.whole_rows and run.pages_per_row == 4 * blocks_per_chunk and run.num_slots == 6 * run.pages_per_row
    places = server.chunks([3, 0, 5])
    blocks = np.random.default_rng(0).permutation(40)[: len(places)]
    gpu, cpu, sizes = server.pages(range(4), blocks, places)
    server.store(gpu, cpu, sizes)
    assert not server.by_vllm and (run.state == HELD).sum() == len(gpu)
    before_load = server.gpu.copy()
    server.gpu[:] = random_bits(server)
    kept = server.gpu.copy()
    kept[:, blocks] = before_load[:, blocks]
    server.load(cpu, gpu, sizes, is_src_access_order_any=True)
    np.testing.assert_array_equal(server.gpu, kept)
    assert not server.by_vllm and [call[0] for call in run.pipeline.calls] == ["store", "load"]
    used = np.zeros(server.stride, bool)  # nothing but our part of a row is written
    used[: 4 * server.width] = True
    offset = server.cpu_ptr - server.cpu.ctypes.data
    for chunk in range(6):
        row = server.cpu[offset + chunk * server.stride :][: server.stride]
        expected = POISON if chunk in (3, 0, 5) else 0
        assert (row[used[: row.size]] == expected).all() and (row[~used[: row.size]] == 0).all()


def test_rows_beyond_a_tile_are_packed_in_parts():
    """Rows of 12 pages, a tile of 4: parts of 4, 3 of them a row, slots as the pages lie."""
    server = Server(layers=6, ring=4 * 4 * PAGE)
    (run,) = server.runs
    assert not run.whole_rows and run.pages_per_row == 4 and run.host.stride == 4 * PAGE
    gpu, cpu, sizes = server.pages(range(6), [7, 9], server.chunks([2]))
    server.store(gpu, cpu, sizes)
    (_, slots, _, _) = run.pipeline.calls[0]
    assert sorted(slots) == list(range(24, 36))
    assert run.where(24) == "model.layers.0.attn, chunk 2" and run.where(35) == "model.layers.5.attn, chunk 2"
    before_load = server.gpu.copy()
    server.gpu[:] = 0
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, [7, 9]], before_load[:, [7, 9]])
    # beside other workers' pages, in rows that no number of pages divides, there is no such part
    runs, raw = plan(Server(layers=6, after=PAGE // 2).tensors, 4 * 4 * PAGE)
    ((reason, number),) = raw.items()
    assert not runs and number == 6
    assert reason.startswith(
        "rows of 12 pages of 4096 bytes, 51200 bytes apart, and tiles of 4 pages (a ring of 65536"
    )


@pytest.mark.parametrize("pages", [1, 12, 20, 1000])
def test_a_long_call_goes_in_pieces_of_whole_rows(monkeypatch, pages):
    """Layer by layer in, row by row out: a row in two pieces would not be packed."""
    monkeypatch.setattr(offload, "PIECE_PAGES", pages)
    server = Server(layers=4, blocks_per_chunk=2)
    (run,) = server.runs
    gpu, cpu, sizes = server.pages(range(4), range(10), server.chunks([5, 0, 3, 2, 1]))
    before = server.gpu.copy()
    server.store(gpu, cpu, sizes)
    calls = [slots for _, slots, _, _ in run.pipeline.calls]
    assert [len(slots) for slots in calls] == {1: [8, 8, 16, 8], 12: [8, 32], 20: [16, 24], 1000: [40]}[pages]
    for slots in calls:
        assert len({slot // 8 for slot in slots}) * 8 == len(slots), "whole rows"
    server.gpu[:] = 0
    run.pipeline.at_work = ("load",)
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, :10], before[:, :10])
    assert not server.by_vllm
    assert len(run.pipeline.calls) == len(calls) + 1, "in one, where the GPU has others to do meanwhile"


@st.composite
def descriptors(draw):
    """Tensors of a run, and what vLLM may name of them: layer by layer, or nearly so."""
    layers, per, chunks, blocks = (draw(st.integers(1, most)) for most in (6, 3, 6, 8))
    before, after = (16 * draw(st.sampled_from((0, 5, 256))) for _ in range(2))
    width, gap = per * PAGE, draw(st.sampled_from((0, 64, PAGE)))
    stride = before + layers * width + after
    tensors = [
        Tensor(
            [f"layers.{i}"], KIND, BOUND, (1 << 33) + i * (blocks * PAGE + gap), blocks * PAGE, PAGE,
            (1 << 34) + before + i * width, stride, width, chunks,
        ) for i in range(layers)
    ]  # fmt: skip
    place = st.tuples(st.integers(-1, chunks), st.integers(0, per - 1), st.integers(0, blocks))
    chunk, page, block = np.array(draw(st.lists(place, min_size=1, max_size=8))).T
    which = np.array(draw(st.permutations(range(layers)) if draw(st.booleans()) else st.just(range(layers))))
    cpu = (tensors[0].cpu + chunk * stride + page * PAGE + which[:, None] * width).ravel()
    gpu = (block * PAGE + np.array([tensor.gpu for tensor in tensors])[which][:, None]).ravel()
    sizes = np.full(cpu.size, PAGE)
    for array in draw(st.sampled_from(((), (cpu,), (gpu,), (sizes,), (cpu, gpu)))):
        at = draw(st.sampled_from((slice(None), draw(st.integers(0, cpu.size - 1)))))
        array[at] += draw(st.sampled_from((PAGE, -PAGE, 16, width, stride)))
    return tensors, cpu, gpu, sizes


@given(descriptors(), st.sampled_from((1, 2, 3, 4, 6, 100)), st.sampled_from((1, 3, 8, 4096)))
def test_one_layer_tells_of_all_and_pieces_are_whole_rows(case, tile_pages, piece_pages):
    tensors, cpu, gpu, sizes = case
    runs, _ = plan(tensors, 4 * tile_pages * PAGE)
    assume(runs)
    run = runs[0]
    run.pipeline = types.SimpleNamespace(busy=lambda direction: False)
    slots, whole, touch = run.find(cpu, gpu, sizes)
    turns = run.turns(cpu, gpu, sizes)
    worker = Worker([run], Settings(), current_stream=None)
    taken, left = worker._take(Swap(None, True), run, cpu, gpu, sizes, np.zeros(cpu.size, np.uint8))
    assert taken.disjoint == (turns is not None)
    assert sorted(taken.index) == np.flatnonzero(whole).tolist()
    np.testing.assert_array_equal(taken.slots, slots[taken.index])
    np.testing.assert_array_equal(taken.pages, gpu[taken.index])
    if taken.disjoint:
        assert whole.all() and np.diff(np.sort(gpu)).min(initial=PAGE) >= PAGE
    others = touch & ~whole
    assert (left is None) == (not others.any())
    if left:
        np.testing.assert_array_equal(left, (slots[others], whole[others]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "PIECE_PAGES", piece_pages)
        pieces = list(run.pieces(taken.slots, "load"))
    assert np.concatenate([np.arange(cpu.size)[piece] for piece in pieces]).tolist() == list(range(whole.sum()))
    rows = [set((taken.slots[piece] // run.pages_per_row).tolist()) for piece in pieces]
    assert sum(map(len, rows)) == len(set().union(*rows)), "a row in two pieces"
    assert all(row for row in rows) or not whole.any()


def test_calls_as_vllm_makes_them_are_looked_at_by_the_first_layer():
    """But not where a block comes twice, or an address is another's."""
    server = Server(layers=4, blocks_per_chunk=2)
    (run,) = server.runs
    gpu, cpu, sizes = server.pages(range(4), range(6), server.chunks([5, 0, 3]))
    assert run.turns(cpu, gpu, sizes).disjoint
    for array, at in ((gpu, 17), (cpu, 23), (sizes, 3)):
        array[at] += PAGE
        assert run.turns(cpu, gpu, sizes) is None
        array[at] -= PAGE
    assert run.turns(cpu, gpu, sizes).disjoint
    gpu, cpu, sizes = server.pages(range(4), [1, 2, 3, 1], server.chunks([5, 0]))
    assert run.turns(cpu, gpu, sizes) is None, "a block twice"
    overlapping = Server(layers=4, blocks_per_chunk=1)
    overlapping.tensors[1].gpu = overlapping.tensors[0].gpu + PAGE
    (run,), _ = plan(overlapping.tensors, 1 << 20)
    gpu, cpu, sizes = overlapping.pages(range(4), [1, 2], overlapping.chunks([5, 0]))
    gpu[2:4] = gpu[:2] + PAGE
    assert run.turns(cpu, gpu, sizes) is None and run.find(cpu, gpu, sizes)[1].all()


def test_tensors_of_one_sort_side_by_side_share_a_pipeline():
    other = Kind(Geometry(16, 128, parts=(64, 64)), "bfloat16")  # one head of 64
    server = Server(layers=7, kinds={2: "raw by setting", 3: "raw by setting", 6: other})
    assert [[t.names[0][13] for t in run.tensors] for run in server.runs] == [list("01"), list("45"), ["6"]]
    assert server.raw == {"raw by setting": 2}
    gpu, cpu, sizes = server.pages(range(7), [1, 2], server.chunks([4]))
    server.store(gpu, cpu, sizes)
    assert [len(run.pipeline.pages) for run in server.runs] == [4, 4, 2]
    ((src, dst, moved, any_order),) = server.by_vllm
    np.testing.assert_array_equal(src, gpu[4:8])
    np.testing.assert_array_equal(dst, cpu[4:8])
    assert (moved == PAGE).all() and not any_order
    assert server.worker.passed == {"raw by setting": [4, 4 * PAGE]}
    before_load = server.gpu.copy()
    server.gpu[:] = 0
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, [1, 2]], before_load[:, [1, 2]])
    assert server.worker.passed == {"raw by setting": [8, 8 * PAGE]}


def test_rows_that_are_not_aligned_stay_raw():
    runs, raw = plan(Server(after=8).tensors, 1 << 20)
    assert not runs and raw == {"CPU memory whose pages or rows are no multiples of 16 bytes apart": 4}


def test_no_more_than_four_pipelines():
    kinds = {i: Kind(KIND.geometry, "float16") for i in range(1, 12, 2)}
    server = Server(layers=12, kinds=kinds)
    assert len(server.runs) == 4 and server.raw == {"beyond 4 stretches of tensors side by side": 8}


# --- what goes to vLLM's function -------------------------------------------------------------------------
def test_a_call_without_pages_does_nothing():
    server = Server()
    empty = np.zeros(0, np.int64)
    server.store(empty, empty, empty)
    server.load(empty, empty, empty)
    assert not server.by_vllm and not server.runs[0].pipeline.calls


def test_what_is_no_whole_page_passes_untouched():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [3], [(1, 0)])
    elsewhere = np.zeros(3 * PAGE, np.uint8)
    sizes[0] = PAGE // 2  # a part
    gpu[1] += 16  # from the middle of a page
    cpu[2] += 32  # to the middle of one
    cpu[3] = elsewhere.ctypes.data  # another's memory
    gpu, cpu, sizes = gpu.copy(), cpu.copy(), sizes.copy()
    server.store(gpu, cpu, sizes)
    ((src, dst, moved, _),) = server.by_vllm
    assert (src == gpu).all() and (dst == cpu).all() and (moved == sizes).all()
    assert not server.runs[0].pipeline.calls and (server.runs[0].state == NEVER).all()
    assert server.worker.passed == {
        "no whole page": [3, PAGE // 2 + 2 * PAGE], "no page of a registered KV tensor": [1, PAGE],
    }  # fmt: skip


def test_pages_from_another_tensor_than_their_place_says_are_not_taken():
    """The codec would be right about the bytes, but not about whose bound they get."""
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [3], [(1, 0)])
    server.store(gpu[::-1].copy(), cpu, sizes)
    assert server.worker.passed == {"no whole page": [4, 4 * PAGE]}


def test_part_of_a_chunk_goes_to_its_homes_and_comes_back():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [3], [(1, 1)])  # the second half of chunk 1
    server.store(gpu, cpu, sizes)
    before_load = server.gpu.copy()
    server.gpu[:] = 0
    gpu, cpu, sizes = server.pages(range(4), [8, 3], [(1, 0), (1, 1)])
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, 3], before_load[:, 3])
    assert server.worker.passed == {"never stored": [4, 4 * PAGE]}  # vLLM asked for it, so it has it
    np.testing.assert_array_equal(server.gpu[:, 8], 0)


def test_a_slot_written_by_vllm_is_loaded_by_vllm():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    server.worker.storing = False  # as uninstall() leaves it
    other_gpu, _, _ = server.pages(range(4), [5, 6], server.chunks([0]))
    server.store(other_gpu, cpu, sizes)
    (run,) = server.runs
    assert not run.pipeline.pages and (run.state[:8] == RAW).all()
    expected = server.gpu[:, [5, 6]].copy()
    server.gpu[:] = 0
    server.load(cpu, other_gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, [5, 6]], expected)
    assert server.worker.passed == {"uninstalled": [8, 8 * PAGE], "stored uncompressed": [8, 8 * PAGE]}
    server.worker.storing = True
    server.store(gpu, cpu, sizes)
    assert (run.state[:8] == HELD).all()


def test_a_page_beside_one_that_vllm_wrote_is_not_served():
    """They shared a packed row, whose bytes are overwritten."""
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    server.worker.storing = False
    server.store(gpu[:1], cpu[:1], sizes[:1])
    with pytest.raises(ValueError, match="nothing is stored in slot 1"):
        server.load(cpu[:2], gpu[:2], sizes[:2])


def test_part_of_a_compressed_page_is_never_loaded_as_bytes():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    with pytest.raises(RuntimeError, match="part of a page that is stored compressed"):
        server.load(cpu[:1] + 64, gpu[:1], sizes[:1] - 64)
    assert not server.by_vllm


def test_a_store_without_device_memory_goes_to_vllm_and_a_load_does_not():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.runs[0].pipeline.no_memory = True
    server.store(gpu, cpu, sizes)
    assert server.worker.passed == {"no device memory for arguments": [8, 8 * PAGE]}
    expected = server.gpu.copy()
    server.gpu[:] = 0
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, [1, 2]], expected[:, [1, 2]])


def fail(*_, **__):
    raise RuntimeError("the driver failed")


def test_after_a_store_that_failed_half_way_no_bytes_are_served():
    """What vLLM had stored there before may be overwritten in part, so it is not loaded as raw bytes either."""
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.worker.storing = False
    server.store(gpu, cpu, sizes)
    (run,) = server.runs
    assert (run.state[:8] == RAW).all() and len(server.by_vllm) == 1
    server.worker.storing = True
    store, run.pipeline.store = run.pipeline.store, fail
    with pytest.raises(RuntimeError, match="the driver failed"):
        server.store(gpu, cpu, sizes)
    with pytest.raises(ValueError, match="nothing is stored in slot 0"):
        server.load(cpu, gpu, sizes)
    assert len(server.by_vllm) == 1
    run.pipeline.store = store
    server.store(gpu, cpu, sizes)
    before_load = server.gpu.copy()
    server.gpu[:] = 0
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, [1, 2]], before_load[:, [1, 2]])


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_load_that_fails_reaches_the_engine_and_moves_nothing_else(error):
    """Of two pipelines the second one fails: nothing goes by vLLM's function, or is said to be loaded."""
    other = Kind(KIND.geometry, "float16")
    server = Server(kinds={2: other, 3: other})
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    first, second = server.runs

    def no_load(*_, **__):
        raise error("not now")

    load, second.pipeline.load = second.pipeline.load, no_load
    with pytest.raises(error, match="not now"):
        server.load(cpu, gpu, sizes)
    assert not server.by_vllm and [run for run, _ in server.worker._loads] == [first]
    second.pipeline.load = load
    before_load = server.gpu.copy()
    server.gpu[:] = 0
    server.load(cpu, gpu, sizes)
    np.testing.assert_array_equal(server.gpu[:, [1, 2]], before_load[:, [1, 2]])
    server.worker.check()


def test_without_device_memory_a_row_that_was_packed_is_given_up():
    """Half of a packed chunk is stored again, by vLLM's function: the other half is gone, and said to be."""
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    (run,) = server.runs
    run.pipeline.no_memory = True
    server.store(gpu[:4], cpu[:4], sizes[:4])
    assert (run.state[:4] == RAW).all() and (run.state[4:8] == HELD).all() and not run.pipeline.pages
    server.load(cpu[:4], gpu[:4], sizes[:4])
    with pytest.raises(ValueError, match="nothing is stored in slot 4"):
        server.load(cpu[4:], gpu[4:], sizes[4:])


def test_a_folder_for_stats_that_is_gone_stops_nothing(tmp_path, caplog):
    server = Server()
    server.worker.settings = Settings(stats_dir=str(tmp_path / "gone"))
    server.worker.report()
    server.worker.report()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["cuszp_cupy"]
    assert "no more stats are written" in caplog.text
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    server.load(cpu, gpu, sizes)
    server.worker.check()


def test_vllm_may_reuse_its_arrays_at_once():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    taken = []
    pipeline = server.runs[0].pipeline
    store = pipeline.store
    pipeline.store = lambda pages, slots, *a, **k: taken.extend([pages, slots]) or store(pages, slots, *a, **k)
    server.store(gpu, cpu, sizes)
    assert not any(np.shares_memory(one, other) for one in taken for other in (gpu, cpu, sizes))


# --- order and failure ------------------------------------------------------------------------------------
def test_the_callers_stream_waits_for_all_of_it():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    made = []
    pipeline = server.runs[0].pipeline
    count = pipeline._count
    pipeline._count = lambda *args: made.append(count(*args)) or made[-1]
    server.store(gpu, cpu, sizes)
    server.load(cpu, gpu, sizes)
    assert [transfer.waited for transfer in made] == [[server.stream]] * 2
    assert [call[3] for call in pipeline.calls] == [server.stream] * 2


@pytest.mark.parametrize(("transport", "expected"), [("staged", [None, None, "fused"]), ("raw", [None] * 3)])
def test_urgent_loads_do_not_queue_behind_others(transport, expected):
    server = Server()
    server.worker.settings = Settings(transport=transport)
    urgent = Swap(server._copy, False)
    urgent.worker, urgent.urgent = server.worker, True
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    server.load(cpu, gpu, sizes)
    urgent(cpu, gpu, sizes)
    assert [call[2] for call in server.runs[0].pipeline.calls] == expected


def test_a_damaged_page_stops_everything_once_its_load_has_finished():
    server = Server()
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([3]))
    server.store(gpu, cpu, sizes)
    server.load(cpu, gpu, sizes)
    server.worker.check()
    server.runs[0].pipeline.damaged[24 + 5] = "checksum differs"
    server.load(cpu, gpu, sizes)
    ((_, transfer),) = server.worker._loads
    transfer.finished, found = False, transfer.failed
    transfer.failed = {}
    server.worker.check()  # nothing is known yet
    transfer.finished, transfer.failed = True, found
    with pytest.raises(
        RuntimeError, match=r"1 KV pages .* \(model\.layers\.2\.attn, chunk 3: checksum differs\)"
    ):
        server.worker.check()


def test_thirty_two_thousand_descriptors_cost_little_host_time():
    """Llama-8B's shape: 16,000 tokens, 32 layers; what is measured is the split, not the pipeline."""
    server = Server(layers=32, blocks=1, chunks=1000, blocks_per_chunk=1)
    gpu, cpu, sizes = server.pages(range(32), [0] * 1000, server.chunks(range(1000)))
    run, times = server.runs[0], []

    class Nothing(FakePipeline):
        def store(self, pages, slots, stream=None, **_):
            return self._count("store", slots, pages)

        load = lambda self, slots, pages, stream=None, **_: self._count("load", slots, pages)  # noqa: E731

    run.pipeline.__class__ = Nothing
    for swap, arguments in [(server.store, (gpu, cpu, sizes)), (server.load, (cpu, gpu, sizes))] * 3:
        begin = time.perf_counter()
        swap(*arguments)
        times.append(time.perf_counter() - begin)
    assert min(times[::2]) < 0.02 and min(times[1::2]) < 0.02, times
    assert run.pipeline.stats.load.pages == 3 * 32_000 and not server.by_vllm


# --- any calls, with faults -------------------------------------------------------------------------------
class Calls(RuleBasedStateMachine):
    """Stores and loads in any order against a dictionary, while memory runs out and stores fail half-way.

    A load raises, or brings what was stored last; after a store that went well, its pages do come back.
    """

    def __init__(self):
        super().__init__()
        self.server = Server(
            chunks=3, kinds={2: Kind(KIND.geometry, "float16")}
        )  # three runs; rows of 4, 2, 2 pages
        self.model = {}  # address on the CPU -> content
        self.packed = set()  # (run, row)
        self.stored = self.failing = 0
        for i, run in enumerate(self.server.runs):
            store, load = run.pipeline.store, run.pipeline.load
            run.pipeline.store = lambda *args, i=i, store=store, **options: self.to_pipeline(i, store, *args)
            run.pipeline.load = lambda *args, i=i, load=load, **options: self.from_pipeline(i, load, *args)

    def row_of(self, run, slot):
        first = slot // run.pages_per_row * run.pages_per_row
        return np.arange(first, first + run.pages_per_row)

    def to_pipeline(self, i, store, pages, slots, stream=None):
        """As the real one: a row that is not stored whole loses what was packed in it."""
        run = self.server.runs[i]
        rows, counts = np.unique(slots // run.pages_per_row, return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            if self.failing or (i, row) in self.packed:
                run.pipeline.drop(self.row_of(run, row * run.pages_per_row))
            (self.packed.add if count == run.pages_per_row else self.packed.discard)((i, row))
        if self.failing:
            for slot in slots.tolist():
                ctypes.memset(run.pipeline._home(slot), POISON, PAGE)
            raise RuntimeError("the driver failed")
        return store(pages, slots, stream)

    def from_pipeline(self, i, load, slots, pages, stream=None):
        """What the pipeline holds lies in the row, or in its home: nobody may have written there since."""
        run = self.server.runs[i]
        for slot in slots.tolist():
            if slot in run.pipeline.pages:
                places = self.row_of(run, slot) if (i, slot // run.pages_per_row) in self.packed else [slot]
                for place in places:
                    assert ctypes.string_at(run.pipeline._home(int(place)), PAGE) == bytes([POISON]) * PAGE
        return load(slots, pages, stream)

    def pages(self, places, layers, first):
        blocks = first + np.arange(len(places))
        return self.server.pages(layers, blocks % 40, [divmod(place, 2) for place in places])

    some_places = st.lists(st.integers(0, 3), min_size=1, unique=True)
    some_layers = st.sampled_from([range(4), range(4), [0], [1, 2], [3]])

    @rule(places=some_places, layers=some_layers, first=st.integers(0, 39), fault=st.sampled_from(" dum"))
    def store(self, places, layers, first, fault):
        """``fault``: the driver fails, uninstalled, no memory."""
        server, (gpu, cpu, sizes) = self.server, self.pages(places, layers, first)
        server.gpu[:] = np.random.default_rng(self.stored).integers(0, 256, server.gpu.shape, np.uint8)
        self.stored += 1
        self.failing, server.worker.storing = fault == "d", fault != "u"
        for run in server.runs:
            run.pipeline.no_memory = fault == "m"
        try:
            server.store(gpu, cpu, sizes)
        except RuntimeError:  # what was there before is served, or refused
            return
        self.model.update(
            (to, ctypes.string_at(by, PAGE)) for by, to in zip(gpu.tolist(), cpu.tolist(), strict=True)
        )
        self.load(places, layers, first, must=True)

    @rule(places=some_places, layers=some_layers, first=st.integers(0, 39))
    def load(self, places, layers, first, must=False):
        server, (gpu, cpu, sizes) = self.server, self.pages(places, layers, first)
        known = np.array([address in self.model for address in cpu.tolist()])
        gpu, cpu, sizes = gpu[known], cpu[known], sizes[known]
        server.gpu[:] = 0
        try:
            server.load(cpu, gpu, sizes)
        except ValueError as error:
            assert not must and "nothing is stored" in str(error)
            for address in cpu.tolist():  # one of them is gone; the engine would stop here
                self.model.pop(address)
            return
        for by, to in zip(cpu.tolist(), gpu.tolist(), strict=True):
            assert ctypes.string_at(to, PAGE) == self.model[by], "a page was served wrong"


Calls.TestCase.settings = settings(max_examples=max(200, settings.default.max_examples), stateful_step_count=25)
TestCalls = Calls.TestCase


# --- verify, counters -------------------------------------------------------------------------------------
@pytest.fixture
def verified(monkeypatch):
    """Make servers of real values, NaN and Inf among them, whose pipeline codes; ``damage`` acts after loads."""

    def make(damage=lambda bits: None, coding="fixed", share=1.0) -> Server:
        server = Server()
        (run,) = server.runs
        values = np.random.default_rng(2).standard_normal((*server.gpu.shape[:2], PAGE // 2)).astype(np.float32)
        values[0, 1, 3], values[1, 2, :] = np.nan, np.inf
        values[2, 1, :] = 0
        server.gpu.view(np.uint16)[:] = (values.view(np.uint32) >> 16).astype(np.uint16)
        run.pipeline.codec, run.pipeline.coding = True, coding

        def fetch(addresses, out):
            for address, row in zip(addresses, out, strict=True):
                ctypes.memmove(row.ctypes.data, int(address), row.nbytes)
            if run.verifier.kept:
                damage(out)

        monkeypatch.setattr(offload, "fetch", fetch)
        run.verifier = Verifier(run, coding, share)
        return server

    return make


def swap_both_ways(server: Server) -> dict:
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    server.load(cpu, gpu, sizes)
    return server.runs[0].verifier.counts()


@pytest.mark.parametrize(("coding", "share", "compared"), [("fixed", 1.0, 8), ("fixed", 0.5, 4), ("raw", 1.0, 8)])
def test_verify_checks_every_page(verified, coding, share, compared):
    counts = swap_both_ways(verified(coding=coding, share=share))
    assert counts.pop("largest_error_over_bound") <= 1
    assert counts == {"kept": 8, "checked": 8, "compared_with_reference": compared}


def test_verify_finds_a_broken_bound_and_a_changed_bit(verified):
    def set_first(value):
        def damage(bits):
            bits[-1, 0] = value

        return damage

    with pytest.raises(AssertionError, match=r"layers\.3\.attn, chunk 0: error / bound is "):
        swap_both_ways(verified(set_first(0x7F00)))
    with pytest.raises(AssertionError, match="error / bound is inf"):
        swap_both_ways(verified(set_first(0x7FC0)))  # a NaN where there was none

    def flip(bits):
        bits[-1, 0] ^= 1

    with pytest.raises(AssertionError, match="not what the reference decodes"):
        swap_both_ways(verified(flip))


def test_error_over_eb_is_each_parts_own():
    stored = np.zeros((2, 2048), np.float16)
    kind = Kind(Geometry(16, 128, parts=(64, 64)), "float16")
    turns = stored.reshape(2, -1, 128)
    turns[:, :, :64], turns[:, :, 64:] = 1, 4
    loaded = stored.copy()
    loaded.reshape(2, -1, 128)[1, 3, 70] += 1
    bits = stored.view(np.uint16), loaded.view(np.uint16)
    assert offload.error_over_eb(*bits, kind, ("rms:0.5", "rms:0.5")).tolist() == [0, 0.5]
    assert offload.error_over_eb(*bits, kind, ("rms:0.5", "abs:0.25")).tolist() == [0, 4]
    assert offload.error_over_eb(*bits, kind, ("abs:9", "rel:1")).tolist() == [0, np.inf]  # a range of 0


def test_stats_say_what_was_done(tmp_path):
    server = Server(kinds={3: "raw by setting"})
    server.worker.settings, server.worker.version = Settings(stats_dir=str(tmp_path)), "0.33.0"
    gpu, cpu, sizes = server.pages(range(4), [1, 2], server.chunks([0]))
    server.store(gpu, cpu, sizes)
    stats = server.worker.stats()
    assert stats["pipelines"][0]["store"] == {
        "calls": 1, "pages": 6, "raw_bytes": 6 * PAGE, "payload_bytes": 3 * PAGE, "link_bytes": 3 * PAGE,
        "elapsed_ms": 1.0, "ratio": 2.0, "gbps": 6 * PAGE / 1e6,
    }  # fmt: skip
    assert stats["passed_through"] == {"raw by setting": {"descriptors": 2, "bytes": 2 * PAGE}}
    server.worker.close()
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == stats
    assert all(run.pipeline.closed for run in server.runs)


# --- on a GPU ---------------------------------------------------------------------------------------------
@pytest.mark.gpu
# the layout of vLLM 0.33 and that of 0.26; rows that fit a tile and rows packed in parts
@pytest.mark.parametrize(
    ("geometry", "ring"), [(KIND.geometry, 8 << 20), (Geometry(16, 64, 2, (32, 32)), 4 * 8 * PAGE)]
)
def test_real_pipeline_with_verify_and_damage(geometry, ring):
    import cupy

    from cuszp_cupy.codec import pinned
    from cuszp_cupy.pipeline import SwapPipeline

    layers, blocks, chunks, each = 6, 64, 12, 4
    stride, kind = layers * each * PAGE, Kind(geometry, "bfloat16")
    values = np.random.default_rng(3).standard_normal((layers, blocks, PAGE // 2)).astype(np.float32)
    values[1, 2, 5], values[2, 3] = np.nan, 0
    gpu = cupy.asarray((values.view(np.uint32) >> 16).astype(np.uint16))
    cpu = pinned(chunks * stride)
    tensors = [
        Tensor(
            [f"layers.{i}"], kind, BOUND, gpu[i].data.ptr, blocks * PAGE, PAGE, cpu.ctypes.data + i * each * PAGE,
            stride, each * PAGE, chunks,
        )
        for i in range(layers)
    ]  # fmt: skip
    (run,), _ = plan(tensors, ring)
    assert run.whole_rows == (ring == 8 << 20)
    run.pipeline = SwapPipeline(
        geometry, "bfloat16", BOUND, num_slots=run.num_slots, transport="staged", host=run.host, ring_bytes=ring
    )
    run.warm()
    run.verifier = Verifier(run, "fixed", 1.0)
    stream = cupy.cuda.Stream(non_blocking=True)
    worker = Worker([run], Settings(), lambda: stream)
    store, load = Swap(None, True), Swap(None, False)
    store.worker = load.worker = worker
    rng = np.random.default_rng(4)

    def call(swap, blocks_, chunks_):
        block, chunk = np.repeat([blocks_], layers, 0).ravel(), np.repeat(np.tile(chunks_, layers), each)
        layer, j = np.repeat(np.arange(layers), len(blocks_)), np.tile(np.arange(each), len(chunk) // each)
        device = gpu.data.ptr + (layer * blocks + block) * PAGE
        host = cpu.ctypes.data + chunk * stride + (layer * each + j) * PAGE
        swap(*((device, host) if swap.to_cpu else (host, device)), np.full(len(host), PAGE))

    for _ in range(6):
        some = rng.permutation(chunks)[:3]
        call(store, rng.permutation(blocks)[: 3 * each], some)
        call(load, rng.permutation(blocks)[: 3 * each], some)
        stream.synchronize()
        worker.check()
    counts = run.verifier.counts()
    assert counts["checked"] == counts["compared_with_reference"] == 6 * 3 * each * layers
    assert run.pipeline.stats.store.ratio > 2 and not worker.passed
    run.verifier = None
    row = cpu[some[0] * stride :][:stride]
    row[:4096] ^= 0x55  # each part starts with a page's payload
    call(load, np.arange(each), some[:1])
    stream.synchronize()
    with pytest.raises(RuntimeError, match=rf"pages came back damaged .*chunk {some[0]}: "):
        worker.check()
    worker.close()
