"""SwapPipeline(engine="library"): its arithmetic anywhere; all of it where a GPU and the real library are."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
from assertions import assert_same_bits, assert_within

from cuszp_cupy import FormatError, Geometry, HostRows, SwapPipeline, library_swap, reference
from cuszp_cupy.bound import parse_parts
from cuszp_cupy.library_swap import Slots, measure, narrow, page_ebs, widen
from cuszp_cupy.raw import library

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
GEOMETRY = Geometry(16, 128, parts=(32, 32))  # 4 KiB, K and V side by side


def make_pages(dtype="bfloat16", geometry=GEOMETRY, seed=0) -> np.ndarray:
    """Twelve pages, V ten times K: noise at four scales, zeros, NaNs, one Inf, random bits, and noise again."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, geometry.values)) * 2.0 ** rng.integers(-4, 4, (12, 1))
    if geometry.parts:
        turns = x.reshape(12, -1, sum(geometry.parts))
        turns[..., geometry.parts[0] :] *= 10
    x[4] = 0
    bits = x.astype(np.float32).astype(DTYPES[dtype]).view(np.uint16)
    bits[5] |= 0x7F81
    bits[6, -1] = np.array(np.inf, DTYPES[dtype]).view(np.uint16)
    bits[7] = rng.integers(0, 1 << 16, geometry.values, np.uint16)
    return bits.view(DTYPES[dtype]).reshape(12, *geometry.shape)


def ebs_of(pages: np.ndarray, bound, geometry=GEOMETRY) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs are data here
        ranges = measure(pages.astype(np.float32).reshape(len(pages), -1), geometry)
    return page_ebs(ranges, geometry, parse_parts(bound, len(geometry.part_values)))


def part_ebs(page: np.ndarray, bound: str, geometry=GEOMETRY) -> np.ndarray:
    """The eb of each value of a page, by its part: the definition, in float64."""
    kind, value = bound.split(":")
    x = page.astype(np.float64).reshape(-1, sum(geometry.parts))
    ebs = np.empty(x.shape)
    for part in np.split(np.arange(x.shape[1]), geometry.parts[:1]):
        piece = x[:, part]
        scale = {"abs": 1, "rel": np.ptp(piece), "rms": np.sqrt(np.mean(piece**2))}[kind]
        ebs[:, part] = float(value) * scale
    return ebs.reshape(page.shape)


def half_ulp(page: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of each finite value's larger neighbourhood, float64."""
    info = ml_dtypes.finfo(page.dtype)
    exponent = np.maximum(np.frexp(page.astype(np.float64))[1], info.minexp + 1)
    return 2.0 ** (exponent - info.nmant - 1)


def through_reference(pages: np.ndarray, bound: str, geometry=GEOMETRY) -> tuple[np.ndarray, np.ndarray]:
    """What should come back, with the reference in libcuSZp's place; and the bytes kept of each page."""
    out, sizes = pages.copy(), []
    for page, eb in zip(out, ebs_of(pages, bound, geometry), strict=True):
        stream = reference.compress(page.astype(np.float32), float(eb), "fixed") if eb else b"-" * page.nbytes
        sizes.append(min(len(stream), page.nbytes))
        if len(stream) < page.nbytes:
            y = reference.decompress(stream, page.size, "float32", float(eb), "fixed").reshape(page.shape)
            page[...] = narrow(y, page.dtype.name).view(page.dtype)
    return out, np.array(sizes)


# --- arithmetic -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_pattern_survives_widening_and_rounding(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = widen(bits, dtype)
    np.testing.assert_array_equal(x, bits.view(DTYPES[dtype]).astype(np.float32))
    finite = np.isfinite(x)
    np.testing.assert_array_equal(narrow(x[finite], dtype), bits[finite])
    assert np.isinf(x).sum() == 2  # they become the largest finite values: nothing rounds to Inf
    np.testing.assert_array_equal(narrow(x[np.isinf(x)], dtype), bits[np.isinf(x)] - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    y = np.concatenate([y, (y.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)])  # ties of bfloat16
    y = np.concatenate([y, rng.standard_normal(100_000).astype(np.float32)])  # in float16's range
    y = y[abs(y) <= float(ml_dtypes.finfo(DTYPES[dtype]).max)]  # NaN goes too
    np.testing.assert_array_equal(narrow(y, dtype), y.astype(DTYPES[dtype]).view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", ["rms:0.05", "rel:0.01", "abs:0.1"])
def test_bound_of_each_part_holds_and_rounding_comes_on_top(bound, dtype):
    pages = make_pages(dtype)[:4]
    decoded, sizes = through_reference(pages, bound)
    assert (sizes < GEOMETRY.nbytes).all()
    for page, back in zip(pages, decoded, strict=True):
        eb = part_ebs(page, bound)
        assert_within(page, back, np.minimum(1.00001 * eb + half_ulp(back), 2.00002 * eb))
        if bound != "abs:0.1":
            assert eb.max() > 5 * eb.min()  # V's is ten times K's, and the page has K's


def test_eb_is_the_smallest_of_the_parts_and_never_rounded_up():
    pages = make_pages()[:4]
    for bound in ("rms:0.05", "rel:0.01", ("abs:0.3", "abs:0.1"), ("rms:0.5", "abs:1e-3")):
        ebs = ebs_of(pages, bound)
        bounds = (bound, bound) if isinstance(bound, str) else bound
        for page, eb in zip(pages, ebs, strict=True):
            turns = page.reshape(-1, 64)
            exact = min(part_ebs(page, b)[..., at].flat[0] for b, at in zip(bounds, (0, 32), strict=True))
            assert turns.size and exact * (1 - 2.0**-22) < eb <= exact * (1 + 1e-12)


def test_parts_of_zeros_have_no_say():
    page = np.zeros((1, *GEOMETRY.shape), DTYPES["bfloat16"])
    assert ebs_of(page, "rms:0.05") == ebs_of(page, "rel:0.05") == 1
    assert ebs_of(page, "abs:0.125") == 0.125
    page.reshape(-1, 64)[:, 32:] = np.array([[1], [-1]] * 16, DTYPES["bfloat16"])
    assert ebs_of(page, "rms:0.25") == 0.25 and ebs_of(page, "rel:0.25") == 0.5


def test_pages_that_the_quantiser_would_lose_are_raw():
    page = np.ones((1, *GEOMETRY.shape), DTYPES["bfloat16"])
    assert ebs_of(page, "abs:1") == 1
    assert ebs_of(page, "rel:0.1") == 0  # constant: its range is 0
    assert ebs_of(page, "abs:1e-40") == 0  # no normal float32
    for value, eb in ((2.0**31, 0), (-(2.0**31), 0), (2.0**30, 1), (np.inf, 0), (-np.inf, 0), (np.nan, 0)):
        for at in (0, 40, -1):  # in K, in V, the last one
            page.reshape(-1)[at] = value
            assert ebs_of(page, "abs:1") == eb, (value, at)
            page.reshape(-1)[at] = 1


def test_bound_above_every_float32_is_used_as_far_as_float32_goes():
    page = np.ones((1, *GEOMETRY.shape), DTYPES["bfloat16"])
    assert ebs_of(page, "abs:1e300") == np.finfo(np.float32).max


def test_values_that_float32_is_too_coarse_for_come_back_as_they_were():
    """From 2^22 eb on the float32 error passes eb, by far at 2^31 eb; 16 bits are coarser still."""
    rng = np.random.default_rng(0)
    for name, dtype in DTYPES.items():
        x = (2.0 ** rng.uniform(22, 31, GEOMETRY.shape) * rng.choice([-1, 1], GEOMETRY.shape)).astype(np.float32)
        page = (np.clip(x * 2.0**-16, -60000, 60000) if name == "float16" else x).astype(dtype)
        eb = 2.0**-16 if name == "float16" else 1.0
        page = page[abs(page.astype(np.float64)) < 2.0**31 * eb]
        y = reference.decompress(reference.compress(page.astype(np.float32), eb), page.size, "float32", eb)
        assert abs(y - page.astype(np.float32)).max() > eb
        np.testing.assert_array_equal(narrow(y, name), page.view(np.uint16))


def test_pages_of_other_shapes_have_one_eb_each():
    for geometry in (Geometry(1, 65), Geometry(16, 4), Geometry(16, 64, outer=2, parts=(16, 48))):
        pages = make_pages(geometry=geometry)[:4]
        ranges = measure(pages.astype(np.float32).reshape(4, -1), geometry)
        assert ranges.shape == (4, len(geometry.part_values), 3)
        for page, measured in zip(pages, ranges, strict=True):
            x = page.astype(np.float64).reshape(-1, sum(geometry.parts or (geometry.values,)))
            for part, found in zip(np.split(x, geometry.parts[:1] if geometry.parts else [], axis=1), measured,
                                   strict=True):  # fmt: skip
                np.testing.assert_allclose(found, [part.min(), part.max(), (part**2).sum()], rtol=1e-12)


# --- slots ------------------------------------------------------------------------------------------------
def used(table: Slots) -> int:
    return table.arena.nbytes - table.arena.free_bytes


def test_slots_never_share_bytes_and_come_back_whole():
    """A thousand random stores and drops of pages of 40 bytes (padded: 48), against a list of who owns what."""
    rng, table = np.random.default_rng(0), Slots(16, 40)
    for _ in range(1000):
        slots = rng.permutation(16)[: rng.integers(0, 7)]
        if rng.random() < 0.3:
            table.drop(slots)
        else:
            try:
                table.reserve(slots)
            except MemoryError:
                continue
            for slot in slots.tolist():
                nbytes = int(rng.integers(1, 41))
                assert table.put(slot, nbytes, 0.0 if nbytes == 40 else 0.5) % 16 == 0
        owner = np.full(table.arena.nbytes, -1)
        for slot in np.flatnonzero(table.nbytes):
            mine = owner[table.offset[slot] : table.offset[slot] + -(-table.nbytes[slot] // 16) * 16]
            assert mine.size >= table.nbytes[slot] and (mine == -1).all()
            mine[:] = slot
        assert used(table) == (owner >= 0).sum() and not table._room
    table.drop(np.arange(16))
    assert used(table) == 0 and table.arena.largest_free == table.arena.nbytes == 20 * 48


def test_default_arena_holds_pages_that_do_not_shrink():
    table = Slots(7, 40)
    for slots in (np.arange(7), np.array([3]), np.arange(7)):  # the second and third time in place of the first
        table.reserve(slots)
        for slot in slots.tolist():
            table.put(slot, 40, 0.0)
    assert used(table) == 7 * 48


def test_full_arena_leaves_everything_as_it_was():
    table = Slots(4, 40, arena_bytes=2 * 48)
    table.reserve(np.array([0]))
    table.put(0, 17, 0.5)
    before = table.offset.copy(), table.nbytes.copy(), table.eb.copy(), used(table)
    with pytest.raises(MemoryError, match="a store of 3 pages needs 3 x 48 bytes .* 96 of 96 are free"):
        table.reserve(np.array([0, 1, 2]))
    assert all(
        np.array_equal(a, b) for a, b in zip(before[:3], (table.offset, table.nbytes, table.eb), strict=True)
    )
    assert used(table) == before[3] == 32
    with pytest.raises(MemoryError):
        table.reserve(np.array([1, 2]))  # 64 bytes are free
    table.reserve(np.array([0, 2]))  # but what 0 holds may go
    table.put(0, 40, 0.0)
    assert table.put(2, 40, 0.0) == 48


def test_abandoned_store_gives_all_its_room_back():
    """After none, one and two of its three pages; with and without old content in the slots."""
    for put, old in ((0, 0), (1, 0), (2, 0), (0, 3), (2, 3)):
        table = Slots(4, 40)
        for num in (old, put):
            table.reserve(np.arange(3))
            for slot in range(num):
                table.put(slot, 33, 0.5)
            if num == 3:
                assert used(table) == 3 * 48
                continue
            table.abandon(np.arange(3))
        assert used(table) == 0 and not table.nbytes.any() and not table._room


def test_arena_smaller_than_a_page_is_refused():
    with pytest.raises(ValueError, match=r"at least one page \(48\), got 47"):
        Slots(4, 40, arena_bytes=47)


# --- what is refused --------------------------------------------------------------------------------------
def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine: expected one of kernels, library, got 'cuda'"):
        SwapPipeline(GEOMETRY, "bfloat16", num_slots=4, engine="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "fused"}, "transport: .* only 'auto', the default; got 'fused'; leave it out"),
        ({"host": HostRows(16, 4096, 1)}, "host: .* only None, the default; got HostRows.*engine='kernels'"),
        ({"coding": "raw"}, "coding: .* only 'fixed', the default; got 'raw'"),
        ({"timing": True}, "timing: .* only False, the default; got True"),
    ],
)
def test_options_of_the_kernels_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SwapPipeline(GEOMETRY, "bfloat16", num_slots=4, engine="library", **options)


def test_missing_library_is_said_before_anything_else(monkeypatch):
    monkeypatch.setenv("CUSZP_LIBRARY", "/nowhere/libcuSZp.so")
    with pytest.raises(library.LibraryError, match="no such file; set CUSZP_LIBRARY=/path/to/libcuSZp.so"):
        SwapPipeline(GEOMETRY, "bfloat16", num_slots=4, engine="library")


# --- on a GPU, with the real library ----------------------------------------------------------------------
@pytest.fixture
def real():
    if "CUSZP_LIBRARY" not in os.environ:
        pytest.skip("CUSZP_LIBRARY is not set: no libcuSZp to swap through")
    return library.load()


def make_swap(bound="rms:0.05", dtype="bfloat16", geometry=GEOMETRY, num_slots=16, **options) -> SwapPipeline:
    return SwapPipeline(geometry, dtype, bound, num_slots=num_slots, engine="library", **options)


def on_device(pages: np.ndarray):
    import cupy

    return cupy.asarray(pages.view(np.uint16)).view(pages.dtype)


def garbage(num: int, dtype="bfloat16", geometry=GEOMETRY):
    """Pages of NaN on the device: one that is not written shows."""
    import cupy

    return cupy.full((num, *geometry.shape), 0x7FFF, cupy.uint16).view(DTYPES[dtype])


def loaded(swap: SwapPipeline, slots) -> np.ndarray:
    out = garbage(len(slots), swap.dtype, swap.geometry)
    swap.load(slots, out).wait()
    return out.get()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_equals_the_reference(real, dtype):
    """An ``abs`` bound is the same number on both sides, so every bit is known. Raw: 5, 6, 7 (random bits)."""
    pages, slots = make_pages(dtype), np.random.default_rng(1).permutation(16)[:12]
    with make_swap("abs:0.1", dtype) as swap:
        expected, sizes = through_reference(pages, "abs:0.1")
        assert np.flatnonzero(sizes == GEOMETRY.nbytes).tolist() == [5, 6, 7]
        assert sizes[4] == 1024  # zeros: a rate area
        store = swap.store(on_device(pages), slots)
        assert store.query() and (store.transport, store.direction) == ("library", "store")
        assert_same_bits(loaded(swap, slots), expected)
        some = [8, 3, 8, 5]  # out of order, one of them twice
        assert_same_bits(loaded(swap, slots[some]), expected[some])
        np.testing.assert_array_equal(swap._library.table.nbytes[slots], sizes)
        assert swap.memory()["arena_used_bytes"] == (-(-sizes // 16) * 16).sum()

        assert store.stats.payload_bytes == sizes.sum() + 16 * 12 and store.stats.link_bytes == sizes.sum()
        total = swap.stats
        assert (total.store.pages, total.load.pages, total.raw_pages) == (12, 16, 3)
        assert (total.store.calls, total.load.calls) == (1, 2) and total.store.transports == {"library": 12}
        assert total.store.raw_bytes == 12 * GEOMETRY.nbytes and total.store.gbps > 0 and total.load.gbps > 0
        assert total.load.link_bytes == sizes.sum() + sizes[some].sum()
        assert not (total.failed_calls or total.failed_pages or total.mispredicted)
        assert total.store.overlap is None


@pytest.mark.gpu
def test_finite_pages_that_do_not_shrink_are_raw(real):
    """At this bound some noise takes more than its 4096 bytes, and some less."""
    pages = make_pages()[:4]
    expected, sizes = through_reference(pages, "abs:0.002")
    num_raw = int((sizes == GEOMETRY.nbytes).sum())
    assert 0 < num_raw < 4
    with make_swap("abs:0.002") as swap:
        assert swap.store(on_device(pages), np.arange(4)).stats.link_bytes == sizes.sum()
        assert swap.stats.raw_pages == num_raw
        assert_same_bits(loaded(swap, np.arange(4)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", ["rms:0.05", "rel:0.01"])
def test_bound_of_each_part_holds_on_the_gpu(real, bound, dtype):
    pages = make_pages(dtype)
    with make_swap(bound, dtype) as swap:
        swap.store(on_device(pages), np.arange(12))
        decoded = loaded(swap, np.arange(12))
        assert_same_bits(decoded[4:8], pages[4:8])  # zeros, and what is raw
        for i in (0, 1, 2, 3, 8, 9, 10, 11):
            assert 1024 < swap._library.table.nbytes[i] < GEOMETRY.nbytes
            eb = part_ebs(pages[i], bound)
            limit = np.minimum(1.00001 * eb + half_ulp(decoded[i]), 2.00002 * eb)
            assert_within(pages[i], decoded[i], limit)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "geometry",
    # less than a rate area: all raw; odd, so that float32 pages need padding; heads outside; two chunks
    [Geometry(16, 4), Geometry(1, 4097), Geometry(16, 64, outer=2, parts=(16, 48)), Geometry(16, 2112)],
    ids=str,
)
def test_other_shapes_scattered_and_in_groups(real, geometry, monkeypatch):
    """Pages two bytes off, with gaps, in groups of five: the last one is smaller."""
    import cupy

    monkeypatch.setattr(library_swap, "GROUP_BYTES", 5 * geometry.nbytes + 1)
    pages = make_pages(geometry=geometry)
    expected, sizes = through_reference(pages, "abs:0.1", geometry)
    memory = cupy.zeros(12 * (geometry.values + 3) + 1, cupy.uint16)
    rows = memory[1:].reshape(12, -1)[:, : geometry.values]
    rows[...] = cupy.asarray(pages.view(np.uint16).reshape(12, -1))
    apart = np.uint64(2 * (geometry.values + 3))
    pointers = np.uint64(memory.data.ptr + 2) + np.arange(12, dtype=np.uint64) * apart
    with make_swap("abs:0.1", geometry=geometry) as swap:
        swap.store(pointers, np.arange(12))
        np.testing.assert_array_equal(swap._library.table.nbytes[:12], sizes)
        assert_same_bits(loaded(swap, np.arange(12)), expected)
        memory.fill(0x7FFF)
        swap.load(np.arange(12)[::-1].copy(), pointers[::-1].copy())
        assert_same_bits(rows.get().view(pages.dtype).reshape(pages.shape), expected)
        gaps = memory[1:].reshape(12, -1)[:, geometry.values :]
        assert bool((gaps == 0x7FFF).all()) and int(memory[0]) == 0x7FFF


@pytest.mark.gpu
def test_overwrite_drop_and_reuse(real):
    """A hundred random stores and drops of some of 16 slots in an arena of 20 pages, against a list."""
    pages = make_pages()
    expected, _ = through_reference(pages, "abs:0.1")
    x, rng, content = on_device(pages), np.random.default_rng(2), np.full(16, -1)
    with make_swap("abs:0.1") as swap:
        for _ in range(100):
            slots = rng.permutation(16)[: rng.integers(0, 5)]
            if rng.random() < 0.4:
                swap.drop(slots)
                content[slots] = -1
            else:
                chosen = rng.integers(0, 12, len(slots))
                addresses = np.uint64(x.data.ptr) + chosen.astype(np.uint64) * np.uint64(GEOMETRY.nbytes)
                swap.store(addresses, slots)
                content[slots] = chosen
        full, empty = np.flatnonzero(content >= 0), np.flatnonzero(content < 0)
        assert len(full) > 4 and len(empty) > 1
        assert_same_bits(loaded(swap, full), expected[content[full]])
        with pytest.raises(ValueError, match=f"slots: nothing is stored in slots {empty[0]}, {empty[1]}"):
            swap.load(empty, garbage(len(empty)))
        swap.drop(np.arange(16))
        assert swap.memory()["arena_used_bytes"] == 0


@pytest.mark.gpu
def test_full_arena_keeps_what_it_holds(real):
    pages = make_pages()
    with make_swap("abs:0.1", arena_bytes=4 * GEOMETRY.nbytes) as swap:
        swap.store(on_device(pages[5:7]), [0, 1])  # raw: half of it
        with pytest.raises(MemoryError, match="a store of 3 pages needs 3 x 4096 bytes .* drop slots"):
            swap.store(on_device(pages[:3]), [2, 3, 4])
        assert_same_bits(loaded(swap, [0, 1]), pages[5:7])
        with pytest.raises(ValueError, match="nothing is stored in slots 2, 3, 4"):
            swap.load([2, 3, 4], garbage(3))
        assert swap.stats.failed_calls == 0


@pytest.mark.gpu
def test_store_that_the_library_fails_leaves_empty_slots(real, monkeypatch):
    pages, calls = make_pages(), []
    compress_array = library.compress_array

    def fail_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise library.LibraryError("by the test")
        return compress_array(*arguments)

    with make_swap() as swap:
        swap.store(on_device(pages[:2]), [0, 1])
        monkeypatch.setattr(library, "compress_array", fail_at_the_third)
        with pytest.raises(library.LibraryError, match="by the test"):
            swap.store(on_device(pages[:4]), [1, 2, 3, 4])
        with pytest.raises(ValueError, match="nothing is stored in slots 1, 2, 3, 4"):
            swap.load([0, 1, 2, 3, 4], garbage(5))
        assert np.isfinite(loaded(swap, [0]).astype(np.float32)).all()
        assert swap.stats.failed_calls == 1 and swap.stats.store.calls == 1
        swap.drop([0])
        assert swap.memory()["arena_used_bytes"] == 0


@pytest.mark.gpu
def test_damaged_stream_is_named_and_the_others_are_good(real):
    pages = make_pages()
    expected, _ = through_reference(pages, "abs:0.1")
    with make_swap("abs:0.1") as swap:
        swap.store(on_device(pages), np.arange(12))
        swap._library._host[int(swap._library.table.offset[2])] = 0x40  # no rate byte of mode fixed
        out = garbage(12)
        load = swap.load(np.arange(12), out)
        with pytest.raises(FormatError, match="1 of 12 pages are damaged: slot 2: .* not valid in mode 'fixed'"):
            load.wait()
        assert list(load.failed) == [2] and swap.stats.failed_pages == 1
        swap.load([2, 3, 2], garbage(3))
        assert swap.stats.failed_pages == 3, "slot 2 came back three times"
        expected.view(np.uint16)[2] = 0x7FFF  # not written
        assert_same_bits(out.get(), expected)


@pytest.mark.gpu
def test_pages_still_being_written_are_waited_for(real):
    """On a stream that the null stream does not wait for."""
    import cupy

    pages = make_pages()
    expected, _ = through_reference(pages, "abs:0.1")
    x, y, busy = on_device(pages), garbage(12), cupy.ones((4096, 4096), cupy.float32)
    late, stream = garbage(12), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with make_swap("abs:0.1") as swap, stream:
        for _ in range(5):
            busy @ busy  # some ms before the pages are there
        late.view(cupy.uint16)[...] = x.view(cupy.uint16)
        swap.store(late, np.arange(12), join=False)
        for _ in range(5):
            busy @ busy
        y.view(cupy.uint16).fill(0x7FFF)  # still to come when it is loaded
        swap.load(np.arange(12), y).wait_on(stream)
        assert_same_bits(y.get(), expected)


@pytest.mark.gpu
def test_calls_that_do_not_fit_are_refused(real):
    x = on_device(make_pages())
    swap = make_swap()
    for call, arguments in (
        ("prepare_store", (x, np.arange(12))),
        ("prepare_load", ([0], x[:1])),
        ("calibrate", ()),
        ("explain", ()),
    ):
        with pytest.raises(ValueError, match=f"{call}: engine 'library' .* engine='kernels'"):
            getattr(swap, call)(*arguments)
    swap.store(x, np.arange(12), transport="auto")
    with pytest.raises(ValueError, match="transport: engine 'library' .* got 'fused'"):
        swap.store(x, np.arange(12), transport="fused")
    with pytest.raises(ValueError, match="transport: engine 'library' .* got 'raw'"):
        swap.load(np.arange(12), x, transport="raw")
    with pytest.raises(ValueError, match="each slot once"):
        swap.store(x[:2], [3, 3])
    with pytest.raises(ValueError, match="pages that do not overlap"):
        swap.load([0, 1], np.full(2, x.data.ptr, np.uint64))
    with pytest.raises(ValueError, match="expected 0 to 15"):
        swap.drop([16])
    with pytest.raises(TypeError, match="the pipeline is for bfloat16, got float16"):
        swap.store(on_device(make_pages("float16")), np.arange(12))
    assert swap.stats.store.calls == 1 and not swap.stats.failed_calls
    swap.synchronize()
    swap.store([], [])
    assert swap.load([], []).stats.pages == 0
    swap.close()
    swap.close()
    for call, arguments in (
        ("store", (x, np.arange(12))),
        ("load", ([0], x[:1])),
        ("drop", ([0],)),
        ("memory", ()),
        ("synchronize", ()),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            getattr(swap, call)(*arguments)
