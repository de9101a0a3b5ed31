"""PageTable against a model: no memory is handed out that somebody else needs, and none is lost."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cuszp_cupy.arena import Arena
from cuszp_cupy.page_table import (
    COPIED,
    EMPTY,
    KNOWN,
    PENDING,
    HostRows,
    PageTable,
    check_slots,
    check_stored,
    index,
)

BASE, PAGE_BYTES, SLOT_BYTES = 1 << 20, 120, 128  # pages that do not fill their places
NUM_SLOTS, NUM_PLACES, MOST_PAGES = 12, 17, 5  # little room to spare, regions of several pages
some_slots = st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=8, unique=True).map(np.array)


def make_table(rows=None, in_flight=()):
    arena = None if rows else Arena(NUM_PLACES * SLOT_BYTES)
    memory = np.zeros((NUM_SLOTS, 4), np.uint32)
    return PageTable(memory, PAGE_BYTES if arena else 128, rows, arena, BASE, MOST_PAGES, in_flight)


class Transfers(RuleBasedStateMachine):
    """Stores and loads of an arena in flight; stores finish in order, as those of one lane do, loads in any."""

    def __init__(self):
        super().__init__()
        self.in_flight = {}  # number -> (what is to be learnt, bytes it may touch)
        self.table = make_table(in_flight=self.in_flight.keys())
        self.number = 0

    def touched(self, starts, sizes):
        mask = np.zeros(NUM_PLACES * SLOT_BYTES, bool)
        for start, size in zip(np.asarray(starts) - BASE, np.asarray(sizes), strict=True):
            mask[start : start + size] = True
        return mask

    @rule(slots=some_slots, alone=st.booleans(), seed=st.integers(0, 99))
    def store(self, slots, alone, seed):
        slots = slots.astype(np.int64)
        held, free = self.table._held.copy(), self.table.arena.free_bytes
        try:
            order, first, hosts, waits = self.table.place(slots, alone=alone)
        except MemoryError:
            np.testing.assert_array_equal(self.table._held, held)
            assert self.table.arena.free_bytes == free, "nothing has changed"
            return
        slots, counts = slots[order], np.diff(first)
        assert counts.sum() == slots.size and counts.max() <= (1 if alone else MOST_PAGES)
        mask = self.touched(hosts, counts * SLOT_BYTES)
        assert mask.sum() == slots.size * SLOT_BYTES, "regions overlap"
        for number, (_, other) in self.in_flight.items():
            assert number in waits or not (mask & other).any(), "still in use, and nobody waits"
        self.number += 1
        self.in_flight[self.number] = None, mask
        if alone:
            self.table.copied(slots, hosts)
            assert (self.table.state[slots] == COPIED).all()
        else:
            self.table.expect(slots, self.number, hosts, counts)
            self.in_flight[self.number] = (slots, hosts, counts, seed), mask
            assert (self.table.state[slots] == PENDING).all()
        self.mine = self.touched_by_slots()

    @rule(slots=some_slots)
    def load(self, slots):
        slots = slots[np.isin(self.table.state[slots], (KNOWN, COPIED))]
        if slots.size:
            self.number += 1
            mask = self.touched(self.table.address[slots], self.table._held[slots])
            self.in_flight[self.number] = None, mask

    def touched_by_slots(self):
        return self.touched(self.table.address, np.where(self.table.state == PENDING, 0, self.table._held))

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.integers(0, 1000))
    def finish(self, pick):
        number = list(self.in_flight)[pick % len(self.in_flight)]
        learnt = self.in_flight[number][0]
        if learnt is None:
            del self.in_flight[number]
        else:
            number = min(n for n, (each, _) in self.in_flight.items() if each is not None)
            slots, hosts, counts, seed = self.in_flight.pop(number)[0]
            rng = np.random.default_rng(seed)
            nbytes, places = rng.integers(1, PAGE_BYTES + 1, slots.size), np.zeros(slots.size, np.int64)
            for begin, count in zip(np.cumsum(counts) - counts, counts, strict=True):
                order = begin + rng.permutation(count)  # places come in no particular order
                padded = -(-nbytes[order] // 16) * 16
                places[order] = np.cumsum(padded) - padded
            before = self.table.state[slots], self.table._owner[slots]
            self.table.memory[slots, 1], self.table.memory[slots, 3] = nbytes, places // 16
            lengths, used = self.table.learn(slots, number, hosts, counts)
            mine = before[1] == number
            np.testing.assert_array_equal(lengths, nbytes[mine])
            assert (self.table.state[slots[mine]] == KNOWN).all()
            np.testing.assert_array_equal(self.table.state[slots[~mine]], before[0][~mine])
            np.testing.assert_array_equal(
                self.table.address[slots[mine]], (np.repeat(hosts, counts) + places)[mine]
            )
            ends = np.where(mine, places + -(-nbytes // 16) * 16, 0)
            expected = [ends[b : b + c].max() for b, c in zip(np.cumsum(counts) - counts, counts, strict=True)]
            np.testing.assert_array_equal(used, expected)
        self.table.settle()

    @rule(slots=some_slots)
    def drop(self, slots):
        self.table.forget(slots)
        assert (self.table.state[slots] == EMPTY).all()

    @invariant()
    def no_byte_is_lost_or_used_twice(self):
        table = self.table
        regions = sum(int(c.sum()) * SLOT_BYTES for each, _ in self.in_flight.values() if each for c in [each[2]])
        waiting = sum(int((ends - starts).sum()) for _, starts, ends in table._limbo)
        total = table.arena.free_bytes + int(table._held.sum()) + regions + waiting
        assert total == table.arena.nbytes
        live = table._held > 0
        assert self.touched(table.address[live], table._held[live]).sum() == table._held.sum(), "overlap"


most = max(150, settings.default.max_examples)  # more where the profile says so
Transfers.TestCase.settings = settings(max_examples=most, stateful_step_count=40, deadline=None)
TestTransfers = Transfers.TestCase


def test_rows_are_packed_as_a_whole_or_not_at_all():
    table = make_table(HostRows(BASE, 1024, 4))
    slots = np.array([5, 4, 7, 6, 9])  # row 1, and one slot of row 2
    order, first, hosts, waits = table.place(slots, alone=False)
    assert slots[order].tolist() == [5, 4, 7, 6, 9] and first.tolist() == [0, 4, 5] and not waits
    assert hosts.tolist() == [BASE + 1024, BASE + 2 * 1024 + 128]
    table.expect(slots[order], 1, hosts, np.diff(first))
    table.memory[4:8, 1], table.memory[4:8, 3] = 100, [14, 0, 7, 21]  # 100 bytes take 7 x 16
    table.memory[9, 1] = 64
    nbytes, used = table.learn(slots[order], 1, hosts, np.diff(first))
    assert nbytes.tolist() == [100, 100, 100, 100, 64] and used.tolist() == [448, 64]
    assert table.address[4:8].tolist() == [BASE + 1024 + 16 * place for place in (14, 0, 7, 21)]
    np.testing.assert_array_equal(table.regions(slots), [BASE + 1024] * 4 + [BASE + 2 * 1024 + 128])
    assert table.units(slots).tolist() == [1, 1, 1, 1, 2]
    order, first, hosts, _ = table.place(np.array([6]), alone=False)  # to its home, over what was packed there
    assert hosts.tolist() == [BASE + 1024 + 2 * 128]
    assert table.state[4:8].tolist() == [EMPTY] * 4 and table.state[9] == KNOWN


#: word of the row and what it becomes: more bytes than a page, than memory; a place beyond the region; a lost row
DAMAGED_ROWS = [
    (1, PAGE_BYTES + 1),
    (1, 2**32 - 1),
    (3, 4 * SLOT_BYTES // 16),
    (3, 2**32 - 1),
    (slice(4), 0xFFFFFFFF),
]


@pytest.mark.parametrize(("word", "value"), DAMAGED_ROWS)
def test_a_row_that_points_outside_its_region_is_refused(word, value):
    """It becomes 0, which no decoder takes; the others of its region stay, and no byte is lost."""
    table = make_table()
    slots = np.array([3, 1, 5, 2])
    order, first, hosts, _ = table.place(slots, alone=False)
    assert first.tolist() == [0, 4]
    table.expect(slots[order], 1, hosts, np.diff(first))
    table.memory[slots, 0], table.memory[slots, 1], table.memory[slots, 3] = 7, 20, [0, 2, 4, 6]
    table.memory[5, word] = value
    nbytes, used = table.learn(slots, 1, hosts, np.diff(first))
    assert nbytes.tolist() == [20, 20, 0, 20] and used.tolist() == [8 * 16]
    assert table.known[slots, 0].tolist() == [7, 7, 0, 7] and not table.known[5].any()
    assert (table.state[slots] == KNOWN).all() and BASE <= table.address[5] < BASE + 4 * SLOT_BYTES
    assert table.arena.free_bytes == table.arena.nbytes - 3 * 32
    table.forget(slots)
    assert table.arena.free_bytes == table.arena.nbytes


def test_what_is_known_does_not_depend_on_the_tables_memory():
    """Kernels can write to it, those of others too; what the host has learnt is kept elsewhere."""
    table = make_table()
    slots = np.arange(3)
    _, first, hosts, _ = table.place(slots, alone=False)
    table.expect(slots, 1, hosts, np.diff(first))
    table.memory[slots] = [[7, 20, 9, 0], [8, 30, 9, 2], [9, 40, 9, 4]]
    table.learn(slots, 1, hosts, np.diff(first))
    known, address = table.known.copy(), table.address.copy()
    table.memory[:] = 0xFFFFFFFF
    np.testing.assert_array_equal(table.known, known)
    np.testing.assert_array_equal(table.address, address)
    assert known[slots, 1].tolist() == [20, 30, 40]


def test_prepared_slots_are_held():
    table = make_table(HostRows(BASE, 1024, 4))
    table.hold(np.array([5]))
    table.check_writable(np.array([3, 8]))
    with pytest.raises(ValueError, match="prepared transfer holds slot 5"):
        table.check_writable(np.array([4]))  # of the same row
    table.let_go(np.array([5]))
    table.check_writable(np.array([4, 5]))


def test_checks_say_what_is_wrong():
    stamp = np.zeros(10, np.int64)
    assert check_slots(range(3), stamp, 3, distinct=True).dtype == np.int64
    assert check_slots([], stamp).size == 0
    for bad, error, text in (
        ([0.5], TypeError, "sequence of integers, got float64"),
        ([[1]], TypeError, "shape"),
        ([1, 10], ValueError, "0 to 9, got 1 to 10"),
        ([-1], ValueError, "0 to 9"),
        ([3, 1, 3, 1], ValueError, "each slot once, got slots 1, 3 more than once"),
    ):
        with pytest.raises(error, match=text):
            check_slots(bad, stamp, distinct=True)
    with pytest.raises(ValueError, match="one a page, 2, got 1"):
        check_slots([1], stamp, 2)
    with pytest.raises(ValueError, match="nothing is stored in slots 0, 1, 2, 3, 4, 5, 6, 7, ..."):
        check_stored(np.zeros(10, np.uint8), np.arange(10))


def test_index_is_a_slice_only_where_that_is_the_same():
    array = np.arange(20)
    for slots in ([4, 5, 6], [7], [5, 4, 6], [4, 6], [6, 5, 4], []):
        slots = np.array(slots, np.int64)
        assert isinstance(index(slots), slice) == (slots.tolist() in ([4, 5, 6], [7]))
        np.testing.assert_array_equal(array[index(slots)], array[slots])
