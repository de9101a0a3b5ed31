"""Where pages lie on the host, and in what pieces they travel: NumPy on addresses, knows no CUDA.

A *region* is a stretch of host memory that pages are packed into: a part of the arena, or one of the
caller's rows. A *span* is a stretch that one load copies. Addresses, sizes: bytes, int64.
"""

from __future__ import annotations

import bisect

import numpy as np

#: Gaps between payloads that a load copies along rather than starting another copy: a call costs what 64 KiB
#: on the link do. The smaller limits apply where gaps would make up more than a fifth of what is copied.
GAPS = (1 << 16, 1 << 12, 0)
WIDEN = 1.15  # rows are copied to one width, which makes one 2-D copy of them, if that costs no more than this
MAX_PITCH = 2**31 - 1  # of cudaMemcpy2D


class Arena:
    """Byte ranges of a buffer: taken in whole units, given back in any pieces; neighbours grow together.

    Args:
        nbytes: bytes of the buffer; ranges are offsets into it.

    >>> arena = Arena(1000)
    >>> arena.reserve(5, unit=100, most=3)
    (array([  0, 300]), array([3, 2]))
    >>> arena.release(np.array([50, 200]), np.array([150, 300]))
    >>> arena.free_bytes, arena.largest_free
    (700, 500)
    """

    def __init__(self, nbytes: int):
        self.nbytes = int(nbytes)
        # free ranges, sorted, none empty, no two touching; replaced, never changed in place (see `restore`)
        self._starts, self._ends = np.array([0][:nbytes], np.int64), np.array([nbytes][:nbytes], np.int64)

    @property
    def free_bytes(self) -> int:
        """Bytes that are not taken."""
        return int((self._ends - self._starts).sum())

    @property
    def largest_free(self) -> int:
        """Bytes of the largest free range."""
        return int((self._ends - self._starts).max(initial=0))

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes that lies outside the largest free range: 0 (one range) to nearly 1."""
        return 1 - self.largest_free / self.free_bytes if self.free_bytes else 0.0

    def reserve(self, num: int, unit: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Take ``num`` units of ``unit`` bytes, in ranges of at most ``most`` units; return (offsets, units).

        Each range comes from the smallest free range with room for it; where none has, the largest ones are
        used up first.

        Raises:
            MemoryError: too few units fit; nothing is taken then.
        """
        starts, ends = self._starts.copy(), self._ends
        room = (ends - starts) // unit
        if num > int(room.sum()):
            raise MemoryError(f"{num} x {unit} bytes do not fit into {self.free_bytes} free bytes")
        offsets, units = [], []
        left = num
        while left:
            fits = np.flatnonzero(room >= min(left, most))
            if fits.size:
                hole = fits[np.argmin(room[fits])]
                times = max(1, min(left, int(room[hole])) // most)  # as many ranges as it has room for
                offsets.append(starts[hole] + np.arange(times) * min(left, most) * unit)
                units.append(np.full(times, min(left, most)))
                taken = times * min(left, most)
                starts[hole] += taken * unit
                room[hole] -= taken
                left -= taken
            else:
                holes = np.argsort(-room, kind="stable")
                takes = np.minimum(room[holes], np.maximum(left - (np.cumsum(room[holes]) - room[holes]), 0))
                holes, takes = holes[takes > 0], takes[takes > 0]
                offsets.append(starts[holes])
                units.append(takes)
                starts[holes] += takes * unit
                room[holes] -= takes
                left -= int(takes.sum())
        keep = starts < ends
        self._starts, self._ends = starts[keep], ends[keep]
        if not num:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(offsets), np.concatenate(units)

    def release(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Give back the ranges [start, end), in any order; empty ones are ignored."""
        some = starts < ends
        if not some.any():
            return
        starts, ends = np.concatenate([self._starts, starts[some]]), np.concatenate([self._ends, ends[some]])
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        assert starts[0] >= 0 and ends.max() <= self.nbytes and (starts[1:] >= ends[:-1]).all(), "freed twice"
        apart = starts[1:] > ends[:-1]
        self._starts = starts[np.concatenate([[True], apart])]
        self._ends = ends[np.concatenate([apart, [True]])]

    def snapshot(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the state, for ``restore``."""
        return self._starts, self._ends

    def restore(self, state: tuple[np.ndarray, np.ndarray]) -> None:
        """Go back to a state that ``snapshot`` returned."""
        self._starts, self._ends = state


def complement(starts, ends, inner_starts, inner_ends) -> tuple[np.ndarray, np.ndarray]:
    """Return what the outer ranges hold besides the inner ones; all disjoint, each inner one within an outer.

    >>> complement(np.array([0, 50]), np.array([40, 60]), np.array([10]), np.array([30]))
    (array([ 0, 30, 50]), array([10, 40, 60]))
    """
    return np.sort(np.concatenate([starts, inner_ends])), np.sort(np.concatenate([ends, inner_starts]))


class Predictor:
    """How much of its raw size a region will take: a quantile of the shares seen of late. Until then, 1.

    Not the largest one: a longer copy costs bytes of every region, a shorter one costs a kernel's writes for few.

    Args:
        quantile: of the last WINDOW shares, or of the newest ones alone if that is more.
    """

    WINDOW = 128

    def __init__(self, quantile: float):
        self.share, self._quantile, self._window = 1.0, quantile, np.zeros(0)

    def update(self, shares: np.ndarray) -> None:
        """Take note of the shares that some regions took."""
        if len(shares):
            self._window = np.concatenate([self._window, shares])[-self.WINDOW :]
            self.share = max(self._of(self._window), self._of(shares))

    def _of(self, shares: np.ndarray) -> float:
        at = min(int(self._quantile * len(shares)), len(shares) - 1)
        return float(np.partition(shares, at)[at])

    def predict(self, sizes: np.ndarray) -> np.ndarray:
        """Return the bytes to expect of regions of raw ``sizes``: at most those, rounded up to 16."""
        return np.minimum(sizes, (np.ceil(sizes * (self.share / 16)) * 16).astype(np.int64))


def row_regions(slots: np.ndarray, pages_per_row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group a store's slots by rows: one region a row that is wholly there, one a slot elsewhere.

    Returns:
        (order of the pages, first page of each region and the end, slot at the start of each region)

    >>> order, first, home = row_regions(np.array([5, 2, 0, 3]), 2)
    >>> order.tolist(), first.tolist(), home.tolist()
    ([1, 3, 2, 0], [0, 2, 3, 4], [2, 0, 5])
    """
    row = slots // pages_per_row
    order = by_row(row)
    row = row[order]
    first = np.flatnonzero(changes(row))
    counts = np.diff(first, append=slots.size)
    whole = counts == pages_per_row
    home = row[first[whole]] * pages_per_row
    if not whole.all():
        full = np.repeat(whole, counts)
        order = np.concatenate([order[full], order[~full]])
    num_full = home.size * pages_per_row
    first = np.concatenate([np.arange(0, num_full, pages_per_row), np.arange(num_full, slots.size + 1)])
    return order, first, np.concatenate([home, slots[order[num_full:]]])


def by_row(rows: np.ndarray) -> np.ndarray:
    """Return an order in which the pages of each row follow each other, in their own order."""
    if (rows[1:] >= rows[:-1]).all():
        return np.arange(rows.size)
    few = rows.max() < 1 << 16
    return np.argsort(rows.astype(np.uint16) if few else rows, kind="stable")  # 16 bits: a radix sort


def tiles(first: np.ndarray, tile_pages: int) -> list[int]:
    """Return the bounds of tiles in regions, ``first`` being the regions' first pages and the end.

    >>> tiles(np.array([0, 2, 4, 5]), 4)
    [0, 2, 3]
    """
    bounds, first = [0], first.tolist()
    while bounds[-1] < len(first) - 1:
        end = bisect.bisect_right(first, first[bounds[-1]] + tile_pages) - 1
        assert end > bounds[-1], "a region is larger than a tile"
        bounds.append(end)
    return bounds


def changes(values: np.ndarray) -> np.ndarray:
    """Return which values differ from the one before; the first one does."""
    found = np.empty(values.size, bool)
    found[:1] = True
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found


def _cuts(starts, ends, apart):
    """Yield ways to cut payloads into spans: before ``apart`` only, then where gaps are large, then at each gap.

    As first payloads, starts and ends. Only the first way will do for payloads that are not sorted.
    """
    n, whole = starts.size, np.flatnonzero(apart)
    yield whole, np.minimum.reduceat(starts, whole), np.maximum.reduceat(ends, whole)
    gaps = starts[1:] - ends[:-1]
    if n > 1 and (starts[1:] < starts[:-1]).any():
        return
    if n > 1 and gaps.min() < 0:  # a payload that is loaded twice
        ends = np.maximum.accumulate(ends)
        gaps = starts[1:] - ends[:-1]
    for gap in GAPS:
        here = apart.copy()
        here[1:] |= gaps > gap
        first = np.flatnonzero(here)
        yield first, starts[first], ends[np.append(first[1:], n) - 1]


def orders(starts: np.ndarray, rows: np.ndarray | None):
    """Yield orders of payloads to try ``spans`` with, the cheap ones first; the last one will do.

    Not always where payloads overlap that are not loaded twice, as those of damaged rows may.
    """
    yield slice(None)
    if rows is not None:
        yield by_row(rows)
    yield np.argsort(starts, kind="stable")


def spans(starts, lengths, tile_pages: int, tile_bytes: int, base: int = 0, stride: int = 0, rows=None):
    """Cut a load into tiles of pages and spans to copy; None if payloads must come in another order (``orders``).

    Where rows take turns, as with pages that come layer by layer, they must: spans would hold a payload each.

    Args:
        starts, lengths: of the payloads, multiples of 16.
        tile_pages, tile_bytes: pages and copied bytes of a tile at most. None too if so many pages do not fit.
        base, stride, rows: where rows begin, and each payload's row, which spans do not leave; None: no rows.

    Returns:
        (first span of each tile and the end, first page of each span, starts and ends of the spans, position
        of each span in its tile)
    """
    total = int(lengths.sum())
    if rows is None:
        apart = np.zeros(starts.size, bool)
    elif (rows[1:] < rows[:-1]).any():
        return None
    else:
        apart = changes(rows)
    apart[::tile_pages] = True
    for cut in _cuts(starts, starts + lengths, apart):
        first, span_starts, span_ends = cut
        first_span = np.flatnonzero(changes(first // tile_pages))
        copied = np.add.reduceat(span_ends - span_starts, first_span)
        if copied.max() <= tile_bytes and copied.sum() * 4 <= total * 5:
            break
    else:
        return None
    bounds = np.append(first_span, first.size)
    num_spans = np.diff(bounds)
    if rows is not None:
        origin = base + rows[first] * stride
        low = np.minimum.reduceat(span_starts - origin, first_span)
        high = np.maximum.reduceat(span_ends - origin, first_span)
        wide = (high - low) * num_spans
        rows_once = np.add.reduceat(changes(rows[first]), first_span, dtype=np.int64) == num_spans
        widen = np.repeat(rows_once & (wide <= copied * WIDEN) & (wide <= tile_bytes), num_spans)
        span_starts = np.where(widen, origin + np.repeat(low, num_spans), span_starts)
        span_ends = np.where(widen, origin + np.repeat(high, num_spans), span_ends)
    position = np.cumsum(span_ends - span_starts) - (span_ends - span_starts)
    position -= np.repeat(position[first_span], num_spans)
    return bounds, first, span_starts, span_ends, position


def runs(dst: np.ndarray, src: np.ndarray, width: np.ndarray, bounds=()) -> np.ndarray:
    """Return where runs of copies of one width at equal distances begin, and the end: one 2-D copy a run.

    Args:
        bounds: indices at which a run begins in any case.

    >>> runs(np.array([0, 10, 20, 50]), np.array([0, 30, 60, 90]), np.array([8, 8, 8, 8])).tolist()
    [0, 3, 4]
    """
    if dst.size == 1 or len(bounds) > dst.size:
        return np.arange(dst.size + 1)
    to, by = dst[1:] - dst[:-1], src[1:] - src[:-1]
    link = (width[1:] == width[:-1]) & (np.minimum(to, by) >= width[1:]) & (np.maximum(to, by) <= MAX_PITCH)
    link[[bound - 1 for bound in bounds if 0 < bound < dst.size]] = False
    same = np.ones(link.size, bool)
    same[1:] = ~link[:-1] | ((to[1:] == to[:-1]) & (by[1:] == by[:-1]))
    return np.concatenate([[0], np.flatnonzero(~(link & same)) + 1, [dst.size]])


def parts(edges: np.ndarray, bounds: list[int]) -> list[np.ndarray]:
    """Return the edges (of ``runs``) from each of ``bounds``, which are among them, to the next.

    >>> [part.tolist() for part in parts(np.array([0, 3, 4, 9]), [0, 3, 9])]
    [[0, 3], [3, 4, 9]]
    """
    at = np.searchsorted(edges, bounds).tolist()
    return [edges[begin : end + 1] for begin, end in zip(at[:-1], at[1:], strict=True)]
