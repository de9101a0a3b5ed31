"""Host-side geometry: the arena against a plain model, and how pages are grouped, tiled, merged, predicted."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cuszp_cupy.arena import (
    GAPS,
    MAX_PITCH,
    Arena,
    Predictor,
    by_row,
    changes,
    complement,
    orders,
    parts,
    row_regions,
    runs,
    spans,
    tiles,
)

SIZE = 640  # of the modelled arena: room for fragmentation, small enough to fill up


class ArenaMachine(RuleBasedStateMachine):
    """An arena beside one bool a byte."""

    def __init__(self):
        super().__init__()
        self.arena, self.taken, self.held, self.saved = Arena(SIZE), np.zeros(SIZE, bool), [], None

    @rule(num=st.integers(0, 12), unit=st.sampled_from([16, 48]), most=st.integers(1, 8))
    def reserve(self, num, unit, most):
        edges = np.flatnonzero(np.diff(self.taken, prepend=True, append=True))  # of the holes
        holes = edges[1::2] - edges[::2]
        room = holes // unit
        before = self.arena.free_bytes
        if num > room.sum():
            with pytest.raises(MemoryError, match=f"{num} x {unit} bytes"):
                self.arena.reserve(num, unit, most)
            assert self.arena.free_bytes == before
            return
        offsets, units = self.arena.reserve(num, unit, most)
        assert units.sum() == num and (units > 0).all() and (units <= most).all()
        for i, (offset, count) in enumerate(zip(offsets.tolist(), units.tolist(), strict=True)):
            assert not self.taken[offset : offset + count * unit].any(), "handed out twice"
            assert offset + count * unit <= SIZE
            self.taken[offset : offset + count * unit] = True
            if i == 0 and room.max(initial=0) >= min(num, most):  # the smallest hole that takes it whole
                begin, end = edges[np.searchsorted(edges, offset, side="right") - 1 :][:2]
                assert count == min(num, most)
                assert (end - begin) // unit == room[room >= count].min()
            self.held.append((offset, offset + count * unit))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        """Ranges, or halves of them, in any order, with empty ranges between."""
        chosen = data.draw(st.lists(st.integers(0, len(self.held) - 1), min_size=1, max_size=6, unique=True))
        starts, ends = [], []
        for i in chosen:
            start, end = self.held[i]
            middle = data.draw(st.sampled_from([start, (start + end) // 32 * 16, end]))
            middle = min(max(middle, start), end)
            starts += [start, start]
            ends += [middle, start]
            self.taken[start:middle] = False
            self.held[i] = (middle, end)
        self.held = [(start, end) for start, end in self.held if start < end]
        self.arena.release(np.array(starts), np.array(ends))

    @rule()
    def try_and_undo(self):
        state = self.arena.snapshot()
        if self.arena.free_bytes >= 16 and self.arena.largest_free >= 16:
            self.arena.reserve(1, 16, 1)
        self.arena.restore(state)

    @rule()
    def release_all(self):
        starts, ends = (np.array([r[i] for r in self.held], np.int64) for i in range(2))
        self.arena.release(starts, ends)
        self.taken[:], self.held = False, []
        assert self.arena.largest_free == SIZE and self.arena.fragmentation == 0

    @invariant()
    def same_as_the_model(self):
        free = int((~self.taken).sum())
        assert self.arena.free_bytes == free
        padded = np.concatenate([[True], self.taken, [True]])
        largest = int(np.diff(np.flatnonzero(padded)).max()) - 1
        assert self.arena.largest_free == largest
        assert self.arena.fragmentation == pytest.approx(1 - largest / free if free else 0)


TestArena = ArenaMachine.TestCase


def test_arena_refuses_what_is_free_already_or_outside():
    arena = Arena(100)
    arena.reserve(1, 64, 1)
    for start, end in [(32, 80), (90, 101), (-1, 4)]:
        with pytest.raises(AssertionError):
            arena.release(np.array([start]), np.array([end]))


def test_arena_uses_small_holes_first_and_large_ones_when_none_is_large_enough():
    arena = Arena(1000)
    arena.reserve(10, 100, 10)
    arena.release(np.array([0, 300, 800]), np.array([100, 500, 1000]))  # holes of 100, 200, 200
    assert [a.tolist() for a in arena.reserve(1, 100, 4)] == [[0], [1]]
    assert [a.tolist() for a in arena.reserve(3, 100, 4)] == [[300, 800], [2, 1]]
    with pytest.raises(MemoryError, match="2 x 100 bytes do not fit into 100 free bytes"):
        arena.reserve(2, 100, 4)


@given(st.data())
def test_complement(data):
    """Outer ranges with holes between them, inner ones anywhere inside: byte by byte."""
    kinds = data.draw(st.lists(st.sampled_from("oi-"), max_size=60))  # outer only, inner, neither
    kinds = np.array(["-", *kinds, "-"])

    def ranges(mask):
        edges = np.diff(mask.astype(int))
        return np.flatnonzero(edges == 1) + 1, np.flatnonzero(edges == -1) + 1

    starts, ends = complement(*ranges(kinds != "-"), *ranges(kinds == "i"))
    covered = np.zeros(kinds.size, int)
    for start, end in zip(starts, ends, strict=True):
        covered[start:end] += 1
    np.testing.assert_array_equal(covered, (kinds == "o").astype(int))


@given(st.integers(1, 5), st.data())
def test_row_regions(pages_per_row, data):
    slots = np.array(data.draw(st.lists(st.integers(0, 39), unique=True)), np.int64)
    order, first, home = row_regions(slots, pages_per_row)
    assert sorted(order.tolist()) == list(range(slots.size)) and first[0] == 0 and first[-1] == slots.size
    wholly = {
        row for row in range(40) if set(range(row * pages_per_row, (row + 1) * pages_per_row)) <= set(slots)
    }
    seen = set()
    for region, start in enumerate(home.tolist()):
        pages = slots[order[first[region] : first[region + 1]]].tolist()
        assert sorted(pages) == list(range(start, start + len(pages))), "a region begins at its home"
        if start // pages_per_row in wholly:
            assert len(pages) == pages_per_row and start % pages_per_row == 0
            seen.add(start // pages_per_row)
        else:
            assert len(pages) == 1
    assert seen == wholly


@given(st.lists(st.integers(1, 4), max_size=30), st.integers(4, 9))
def test_tiles(counts, tile_pages):
    """No tile has too many pages, none could have taken the next region as well."""
    first = np.cumsum([0, *counts])
    bounds = tiles(first, tile_pages)
    assert bounds[0] == 0 and bounds[-1] == len(counts) and sorted(set(bounds)) == bounds
    for i, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        assert first[hi] - first[lo] <= tile_pages
        if i + 2 < len(bounds):
            assert first[hi + 1] - first[lo] > tile_pages


def test_tiles_asserts_that_regions_fit():
    with pytest.raises(AssertionError):
        tiles(np.array([0, 5]), 4)


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 40)), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sampled_from([0, 5000, 20_000]),
)
def test_spans_cover_every_payload_and_fit_the_tile(pieces, tile_pages, stride):
    """Payloads apart by ``gap`` and ``length``, in 16 bytes; with rows, none crosses one."""
    page_bytes = 16 * 40
    starts, at = [], 0
    for gap, length in pieces:
        at += 16 * gap
        if stride and at // stride != (at + page_bytes) // stride:
            at = -(-at // stride) * stride
        starts.append(at)
        at += 16 * length
    starts = np.array(starts, np.int64)
    lengths = 16 * np.array([length for _, length in pieces])
    ends, base = starts + lengths, 1 << 20
    rows = (base, stride, starts // stride) if stride else ()
    first_span, first_page, span_starts, span_ends, position = spans(
        starts + base, lengths, tile_pages, tile_pages * page_bytes, *rows
    )
    span = np.repeat(np.arange(first_page.size), np.diff(first_page, append=starts.size))
    assert (span_starts[span] <= starts + base).all() and (ends + base <= span_ends[span]).all()
    assert first_span[0] == 0 and first_span[-1] == first_page.size
    assert len(first_span) - 1 == -(-starts.size // tile_pages)
    for tile, (lo, hi) in enumerate(zip(first_span[:-1], first_span[1:], strict=True)):
        assert first_page[lo] == tile * tile_pages
        widths = (span_ends - span_starts)[lo:hi]
        assert widths.sum() <= tile_pages * page_bytes
        np.testing.assert_array_equal(position[lo:hi], np.cumsum(widths) - widths)
    if stride:
        assert ((span_starts - base) // stride == (span_ends - 1 - base) // stride).all()


def test_spans_copy_small_gaps_along_and_not_large_ones():
    # pages of 32 KiB: a gap of 4 KiB, one of 60 KiB, one just too large
    sizes, gaps = [1 << 15] * 4, [1 << 12, 60 << 10, GAPS[0] + 16]
    starts = np.cumsum([0, *(size + gap for size, gap in zip(sizes, gaps, strict=False))])
    few = spans(starts, np.full(4, 1 << 15), 4, 1 << 20)
    assert few[1].tolist() == [0, 2, 3]  # 64 KiB of gaps would be over a fifth: 4 KiB are the limit
    many = np.arange(40, dtype=np.int64) * (1 << 16)
    many[20:] += 1 << 13
    assert spans(many, np.full(40, 1 << 16), 40, 1 << 22)[1].tolist() == [0], "8 KiB in 2.5 MiB are copied along"


def test_spans_take_payloads_in_any_order_that_lie_side_by_side():
    starts, lengths = np.array([64, 0, 32, 96, 128]), np.array([32, 32, 32, 32, 16])
    first_span, first, span_starts, span_ends, _ = spans(starts, lengths, 3, 128)
    assert first_span.tolist() == [0, 1, 2] and first.tolist() == [0, 3]
    assert span_starts.tolist() == [0, 96] and span_ends.tolist() == [96, 144]
    assert spans(starts * 64, lengths, 3, 128) is None, "these must be sorted"


def test_spans_want_rows_one_after_the_other():
    """Layer by layer, as vLLM names pages: row 0, row 1, row 0, row 1. Each page would be a copy."""
    stride, rows, layers = 4096, np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    starts, lengths = rows * stride + layers * 512, np.full(4, 512)
    assert spans(starts, lengths, 4, 8192, 0, stride, rows) is None
    order = np.argsort(starts)
    _, first, span_starts, _, _ = spans(starts[order], lengths, 4, 8192, 0, stride, rows[order])
    assert first.tolist() == [0, 2] and span_starts.tolist() == [0, stride]


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 40)), min_size=1, max_size=60),
    st.integers(1, 30),
    st.integers(40, 400),
    st.booleans(),
)
def test_spans_never_fill_a_tile_beyond_its_bytes(pieces, tile_pages, tile_units, in_rows):
    """As loads ask: in the orders of ``orders``, with more pages a tile than fit raw. Slots may come twice."""
    base, page_bytes, per_row, stride = 1 << 20, 16 * 40, 4, 16 * 40 * 4 + 64
    length_of = {slot: 16 * length for slot, length in pieces}
    slots = np.array([slot for slot, _ in pieces])
    rows, j = np.divmod(slots, per_row)
    starts, lengths = (
        base + rows * stride + j * page_bytes,
        np.array([length_of[slot] for slot in slots.tolist()]),
    )
    tile_bytes, found = 16 * tile_units, None
    for order in orders(starts, rows if in_rows else None):
        mine = (base, stride, rows[order]) if in_rows else ()
        for pages in (tile_pages, tile_bytes // page_bytes):
            found = spans(starts[order], lengths[order], pages, tile_bytes, *mine)
            if found is None:
                continue
            first_span, first_page, span_starts, span_ends, position = found
            assert np.add.reduceat(span_ends - span_starts, first_span[:-1]).max() <= tile_bytes
            assert (position + span_ends - span_starts).max() <= tile_bytes
            span = np.repeat(np.arange(first_page.size), np.diff(first_page, append=slots.size))
            assert (span_starts[span] <= starts[order]).all()
            assert (starts[order] + lengths[order] <= span_ends[span]).all()
    assert found is not None, "the last order will do, with as many pages as fit raw"


def test_spans_are_not_widened_beyond_the_tile():
    stride, lengths = 4096, np.array([960, 1024, 992])
    starts = np.arange(3, dtype=np.int64) * stride
    for tile_bytes, width in ((3072, 1024), (3071, None)):
        _, _, span_starts, span_ends, _ = spans(starts, lengths, 3, tile_bytes, 0, stride, np.arange(3))
        assert (span_ends - span_starts).tolist() == ([width] * 3 if width else lengths.tolist())
    assert spans(starts, lengths, 3, 2975) is None, "three do not fit"


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 1 << 18)), max_size=60))
def test_by_row_keeps_the_order_within_a_row(rows):
    """With rows beyond 16 bits, which are sorted in another way."""
    rows = np.array(rows, np.int64)
    assert by_row(rows).tolist() == sorted(range(rows.size), key=rows.tolist().__getitem__)
    assert np.flatnonzero(changes(rows)).tolist() == [
        i for i in range(rows.size) if not i or rows[i] != rows[i - 1]
    ]


@given(st.integers(1, 5), st.permutations(range(20)), st.integers(0, 20), st.sampled_from((0, 70_000)))
def test_row_regions_keep_the_order_of_a_rows_pages(per_row, order, num, first_row):
    slots = np.array(order[:num], np.int64) + first_row * per_row
    taken, first, home = row_regions(slots, per_row)
    own = {row: [i for i in range(num) if slots[i] // per_row == row] for row in sorted(set(slots // per_row))}
    whole = [pages for pages in own.values() if len(pages) == per_row]
    single = [[i] for pages in own.values() if len(pages) < per_row for i in pages]
    assert [taken[a:b].tolist() for a, b in zip(first[:-1], first[1:], strict=True)] == whole + single
    assert home.tolist() == [int(slots[region].min()) for region in whole + single]


def test_spans_of_rows_get_one_width_if_that_costs_little():
    stride, lengths = 4096, np.array([960, 1024, 992])
    starts = np.arange(3, dtype=np.int64) * stride
    _, first, span_starts, span_ends, position = spans(starts, lengths, 3, 4096, 0, stride, np.arange(3))
    assert (span_ends - span_starts).tolist() == [1024] * 3 and position.tolist() == [0, 1024, 2048]
    assert runs(position, span_starts, span_ends - span_starts).tolist() == [0, 3]
    lengths = np.array([16, 1024, 16])
    _, first, span_starts, span_ends, _ = spans(starts, lengths, 3, 4096, 0, stride, np.arange(3))
    assert (span_ends - span_starts).tolist() == [16, 1024, 16]


@given(st.lists(st.tuples(*[st.integers(8, 11)] * 2, st.integers(7, 8)), min_size=1, max_size=40))
def test_runs_describe_the_same_copies(steps):
    """What 2-D copies from the runs move is what the list says."""
    dst = np.cumsum([step[0] for step in steps])
    src = np.cumsum([step[1] for step in steps])
    width = np.array([step[2] for step in steps])
    bound = len(steps) // 2
    edges = runs(dst, src, width, (0, bound, len(steps)))
    assert edges[0] == 0 and edges[-1] == len(steps) and (np.diff(edges) > 0).all() and bound in edges
    before, after = parts(edges, [0, bound, len(steps)])
    assert before.tolist() == [edge for edge in edges if edge <= bound]
    assert after.tolist() == [edge for edge in edges if edge >= bound]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        rows = np.arange(end - begin)
        to, by = (dst[begin + 1] - dst[begin], src[begin + 1] - src[begin]) if end - begin > 1 else (8, 8)
        assert min(to, by) >= width[begin]
        np.testing.assert_array_equal(dst[begin:end], dst[begin] + rows * to)
        np.testing.assert_array_equal(src[begin:end], src[begin] + rows * by)
        assert (width[begin:end] == width[begin]).all()


def test_runs_break_where_a_2d_copy_cannot_go():
    far = np.array([0, MAX_PITCH + 1])
    near, width = np.array([0, 16]), np.array([16, 16])
    assert runs(near, near, width).tolist() == [0, 2]
    assert runs(far, near, width).tolist() == [0, 1, 2], "too far apart"
    assert runs(near, near[::-1], width).tolist() == [0, 1, 2], "backwards"
    assert runs(np.array([0, 8]), near, width).tolist() == [0, 1, 2], "overlapping"


def test_predictor():
    predictor = Predictor(0.75)
    sizes = np.array([1600, 160, 16])
    assert predictor.predict(sizes).tolist() == [1600, 160, 16], "raw until something was seen"
    predictor.update(np.array([]))
    assert predictor.share == 1
    predictor.update(np.array([0.25, 0.9, 0.2, 0.22]))
    assert predictor.share == 0.9, "a quarter of few is the largest"
    predictor.update(np.arange(100) / 100)
    assert predictor.share == 0.75
    predictor.update(np.full(50, 0.25))
    assert predictor.share == 0.68, "of the last 128"
    assert predictor.predict(sizes).tolist() == [1088, 112, 16], "rounded up to 16"
    predictor.update(np.array([0.8]))
    assert predictor.share == 0.8, "up at once"
    for _ in range(2):
        predictor.update(np.full(Predictor.WINDOW, 0.25))
    assert predictor.share == 0.25, "forgets"
    predictor.update(np.array([1.0]))
    assert (predictor.predict(sizes) == sizes).all()
    last = Predictor(1.0)
    last.update(np.array([0.3, 0.5, 0.4]))
    assert last.share == 0.5, "the largest"
