"""PageTable: what every slot of a pipeline holds, where, and the host memory behind it. NumPy; no CUDA.

Stores and loads in flight are known by their numbers: memory that is free, but that one of them may still use,
waits until that one is through.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from .arena import Arena, complement, row_regions

EMPTY, PENDING, KNOWN, COPIED = range(4)  # states of slots; PENDING: the host has not seen its row yet


@dataclass(frozen=True)
class HostRows:
    """The caller's pinned host memory, in rows that are stored and freed as one.

    Slot ``row * pages_per_row + j`` has its home ``j`` pages after ``pointer + row * stride``. A store with all
    slots of a row packs them from the row's start; other slots go to their homes, and if the row was packed,
    its other slots are gone.

    Args:
        pointer: host address of row 0, a multiple of 16.
        stride: bytes from row to row, a multiple of 16.
        pages_per_row: slots of a row.
        owner: kept alive with the pipeline.
        separate: rows may be pinned one by one (registered apart), so that no copy may go from row to row.
    """

    pointer: int
    stride: int
    pages_per_row: int
    owner: object = None
    separate: bool = False


class PageTable:
    """The slots of a pipeline. Addresses are the host's; bytes.

    Args:
        memory: (num_slots, 4) uint32, the rows as kernels write and read them (pinned).
        page_bytes: of a page. In an arena it takes that rounded up to 16.
        rows: the caller's memory; None: ``arena``, whose byte 0 is at ``base``.
        most_pages: of a region in the arena.
        in_flight: numbers of the transfers that are; kept up to date by the caller.
    """

    def __init__(
        self,
        memory: np.ndarray,
        page_bytes: int,
        rows: HostRows | None,
        arena: Arena | None,
        base: int,
        most_pages: int,
        in_flight: Collection[int],
    ):
        self.memory, self.arena, self.base = memory, arena, base
        self.known = np.zeros_like(memory)  # rows of KNOWN slots, where no stray write of the GPU gets at them
        self.num_slots, self.page_bytes, self.slot_bytes = len(memory), page_bytes, -(-page_bytes // 16) * 16
        self.rows, self.pages_per_row = rows, rows.pages_per_row if rows else 1
        self._most_pages, self._in_flight = most_pages, in_flight
        # per slot
        self.state = np.zeros(self.num_slots, np.uint8)
        self.address = np.zeros(self.num_slots, np.int64)  # of its payload; PENDING: what its place counts from
        self._owner = np.zeros(self.num_slots, np.int64)  # number of the store in flight that writes it, else 0
        self._held = np.zeros(self.num_slots, np.int64)  # bytes at its address that go back to the arena
        self._fixed = np.zeros(self.num_slots, np.int32)  # prepared transfers that count on it
        self._num_prepared = 0  # of them
        self._packed = np.zeros(self.num_units, bool)
        self._limbo: list[tuple[set[int], np.ndarray, np.ndarray]] = []  # freed, but transfers may still use it
        self._guard: set[int] = set()  # transfers that may still use what is free in the arena

    @property
    def num_units(self) -> int:
        """Rows, or in an arena slots: what transfers can be in each other's way at."""
        return -(-self.num_slots // self.pages_per_row)

    def units(self, slots: np.ndarray) -> np.ndarray:
        """Return the unit of each slot."""
        return slots // self.pages_per_row if self.pages_per_row > 1 else slots

    # --- a store ------------------------------------------------------------------------------------------
    def place(self, slots: np.ndarray, *, alone: bool):
        """Find host memory for a store, in regions, or each page by itself; the slots' old content is gone then.

        Returns:
            (order of the pages, first page of each region and the end, host addresses of the regions, numbers of
            the transfers that must finish before the memory is written)

        Raises:
            MemoryError: no room in the arena; nothing has changed.
        """
        if self.rows:
            if alone:
                order, first, home = np.argsort(slots), np.arange(slots.size + 1), np.sort(slots)
            else:
                order, first, home = row_regions(slots, self.pages_per_row)
            row, j = np.divmod(home, self.pages_per_row)
            whole = np.diff(first) == self.pages_per_row
            spoilt = row[~whole & self._packed[row]]
            if spoilt.size:
                self.forget(self._slots_of_rows(spoilt))
            self._packed[row] = whole
            return order, first, self.base + row * self.rows.stride + j * self.page_bytes, set()
        try:
            offsets, units = self.arena.reserve(slots.size, self.slot_bytes, self._most_pages)
        except MemoryError:
            offsets, units = self._reserve_more(slots)
            self._guard = set(self._in_flight)
        self._give_back(slots)
        if alone:
            first = np.arange(slots.size + 1)
            inside = first[:-1] - np.repeat(np.cumsum(units) - units, units)
            offsets = np.repeat(offsets, units) + inside * self.slot_bytes
        else:
            first = np.append(0, np.cumsum(units))
        return slice(None), first, self.base + offsets, self._guard.intersection(self._in_flight)

    def _reserve_more(self, slots):
        """Reserve with what freed ranges and the slots' old content offer, though transfers may still use it."""
        old = slots[self._held[slots] > 0]
        start = self.address[old] - self.base
        ranges = [*(limbo[1:] for limbo in self._limbo), (start, start + self._held[old])]
        wait = ", or wait for the stores in flight, which need less in the end" if self._in_flight else ""
        regions = reserve_after(self.arena, ranges, slots.size, self.slot_bytes, self._most_pages, wait)
        self._limbo.clear()
        self._held[old] = 0
        return regions

    def expect(self, slots: np.ndarray, number: int, hosts: np.ndarray, counts: np.ndarray) -> None:
        """Note that store ``number`` writes ``slots``, in regions at ``hosts`` of ``counts`` pages."""
        at = index(slots)
        self._owner[at], self.state[at], self.address[at] = number, PENDING, np.repeat(hosts, counts)

    def copied(self, slots: np.ndarray, hosts: np.ndarray) -> None:
        """Note that ``slots`` are stored raw, each at its own place."""
        self.address[slots], self.state[slots], self._owner[slots] = hosts, COPIED, 0
        self._held[slots] = self.slot_bytes if self.arena else 0

    def learn(self, slots, number: int, hosts, counts) -> tuple[np.ndarray, np.ndarray]:
        """Take note of the rows that store ``number`` has written; what its regions did not need is free.

        A row whose payload would lie outside its region is damaged; it becomes 0, which every decoder refuses.

        Returns:
            (payload bytes of the slots that are still its own, bytes used of each region: up to the end of the
            last such payload)
        """
        first = np.cumsum(counts) - counts
        live = self._owner[slots] == number  # else overwritten or dropped since; no row of ours then
        every = bool(live.all())
        mine, homes = slots, np.repeat(hosts, counts)
        if not every:
            mine, homes = mine[live], homes[live]
        at = index(mine)
        rows = np.take(self.memory, mine, axis=0)
        nbytes, place = rows[:, 1].astype(np.int64), 16 * rows[:, 3].astype(np.int64)
        kept = (nbytes + 15) & -16
        ends = place + kept  # in its region
        room = np.repeat(counts, counts) * self.slot_bytes
        damaged = (nbytes > self.page_bytes) | (ends > (room if every else room[live]))
        if damaged.any():
            rows[damaged], every = 0, False
            for derived in (nbytes, place, kept, ends):
                derived[damaged] = 0
        self.known.view("V16")[at, 0] = rows.view("V16")[:, 0]  # 16 bytes at a time
        self.address[at], self.state[at], self._owner[at] = homes + place, KNOWN, 0
        upto = ends
        if not every:
            upto = np.zeros(slots.size, np.int64)
            upto[live] = ends
        used = np.maximum.reduceat(upto, first) if slots.size else upto
        if self.arena:
            self._held[at] = kept
            outer, sizes = hosts - self.base, counts * self.slot_bytes
            if every:  # pages lie side by side, from the start of their region
                self.arena.release(outer + used, outer + sizes)
            else:
                inner = homes + place - self.base
                self._release(*complement(outer, outer + sizes, inner, inner + kept))
        return nbytes, used

    # --- forgetting ---------------------------------------------------------------------------------------
    def forget(self, slots: np.ndarray) -> None:
        """Make distinct slots empty."""
        if self.arena:
            self._give_back(slots)
        self.state[slots], self._owner[slots] = EMPTY, 0

    def _give_back(self, slots) -> None:
        """Give back what distinct slots hold of the arena."""
        held = self._held[index(slots)]
        if not held.any():
            return
        old = slots[held > 0]
        start = self.address[old] - self.base
        self._release(start, start + held[held > 0])
        self._held[old] = 0

    def _release(self, starts, ends) -> None:
        """Give ranges back to the arena, once the transfers in flight are through."""
        if not self._in_flight:
            self.arena.release(starts, ends)
        elif len(starts):
            self._limbo.append((set(self._in_flight), starts, ends))

    def settle(self) -> None:
        """Give back what waited for transfers that are through."""
        left = []
        for numbers, starts, ends in self._limbo:
            if numbers.isdisjoint(self._in_flight):
                self.arena.release(starts, ends)
            else:
                left.append((numbers, starts, ends))
        self._limbo = left

    def _slots_of_rows(self, row) -> np.ndarray:
        return (np.unique(row)[:, None] * self.pages_per_row + np.arange(self.pages_per_row)).ravel()

    # --- prepared transfers -------------------------------------------------------------------------------
    def hold(self, slots: np.ndarray) -> None:
        """Let nobody store to ``slots`` or drop them, until ``let_go``."""
        np.add.at(self._fixed, slots, 1)
        self._num_prepared += 1

    def let_go(self, slots: np.ndarray) -> None:
        """Undo one ``hold``."""
        np.subtract.at(self._fixed, slots, 1)
        self._num_prepared -= 1

    def prepare(self, slots: np.ndarray, hosts: np.ndarray) -> None:
        """Note that ``slots`` lie at ``hosts``, raw size each; the host will never look at their rows."""
        self.address[slots], self.state[slots] = hosts, PENDING
        self._held[slots] = self.slot_bytes if self.arena else 0

    def regions(self, slots: np.ndarray) -> np.ndarray:
        """Return what the places in the rows of encoded slots count from."""
        places = np.where(self.state[slots] == KNOWN, 16 * self.memory[slots, 3].astype(np.int64), 0)
        return self.address[slots] - places

    # --- checks -------------------------------------------------------------------------------------------
    def check_writable(self, slots: np.ndarray) -> None:
        """Raise ValueError if a prepared transfer holds one of ``slots``."""
        if not self._num_prepared:
            return
        if self.rows:  # what happens to one slot of a row may happen to all
            slots = self._slots_of_rows(slots // self.pages_per_row)
        fixed = slots[self._fixed[slots] > 0]
        if fixed.size:
            raise ValueError(f"slots: a prepared transfer holds {_some(fixed)}; close it first")


def reserve_after(arena: Arena, ranges, num_pages: int, slot_bytes: int, most: int, otherwise: str):
    """Give back ``ranges`` (starts, ends), then do as ``Arena.reserve``; if that fails, nothing has changed."""
    before = arena.snapshot()
    for starts, ends in ranges:
        arena.release(starts, ends)
    try:
        return arena.reserve(num_pages, slot_bytes, most)
    except MemoryError:
        free = arena.free_bytes
        arena.restore(before)
        raise MemoryError(
            f"arena: a store of {num_pages} pages needs {num_pages} x {slot_bytes} bytes until it has finished; "
            f"{free} of {arena.nbytes} are free; drop slots{otherwise}"
        ) from None


def check_slots(slots, stamp: np.ndarray, num_pages: int | None = None, *, distinct: bool = False) -> np.ndarray:
    """Return ``slots`` as int64; raise TypeError or ValueError for what are no slot numbers, one for each page.

    ``stamp``: (num_slots,) int64, working memory.
    """
    slots = np.asarray(slots)
    if slots.size == 0:
        slots = np.zeros(0, np.int64)
    if slots.ndim != 1 or slots.dtype.kind not in "iu":
        raise TypeError(f"slots: expected a sequence of integers, got {slots.dtype} of shape {slots.shape}")
    slots = slots.astype(np.int64)
    if num_pages is not None and len(slots) != num_pages:
        raise ValueError(f"slots: expected one a page, {num_pages}, got {len(slots)}")
    if slots.size and not (0 <= slots.min() and slots.max() < stamp.size):
        raise ValueError(f"slots: expected 0 to {stamp.size - 1}, got {slots.min()} to {slots.max()}")
    if distinct and not (slots[1:] > slots[:-1]).all():
        order = np.arange(slots.size)
        stamp[slots] = order
        twice = slots[stamp[slots] != order]
        if twice.size:
            raise ValueError(f"slots: expected each slot once, got {_some(np.unique(twice))} more than once")
    return slots


def check_stored(state: np.ndarray, slots: np.ndarray) -> None:
    """Raise ValueError if ``state`` is EMPTY (0) at one of ``slots``."""
    empty = slots[state[slots] == EMPTY]
    if empty.size:
        raise ValueError(f"slots: nothing is stored in {_some(empty)}; they were never stored, or dropped")


def index(slots):
    """Return what indexes an array at ``slots``: a slice where they are consecutive, which is faster."""
    if slots.size and slots[-1] - slots[0] == slots.size - 1 and (slots[1:] > slots[:-1]).all():
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return slots


def _some(slots) -> str:
    """Slots for a message."""
    listed = ", ".join(str(int(slot)) for slot in slots[:8])
    return f"slot {listed}" if len(slots) == 1 else f"slots {listed}{', ...' if len(slots) > 8 else ''}"
