"""A SwapPipeline without a GPU: the same calls, on memory of this process, and nothing in flight."""

from __future__ import annotations

import ctypes

import numpy as np

from cuszp_cupy import reference
from cuszp_cupy.stats import Counters, TransferStats

POISON = 0xEE  # what a stored page's home holds: nobody may take it for the page


class FakeTransfer:
    def __init__(self, slots, pages):
        self.slots, self.pages, self.failed, self.finished, self.waited = slots, pages, {}, True, []

    def query(self) -> bool:
        return self.finished

    def wait(self): ...

    def wait_on(self, stream):
        self.waited.append(stream)


class FakePipeline:
    """Keeps pages by slot; encodes them with the reference if ``codec`` is set, else as they are."""

    codec = False

    def __init__(self, geometry, dtype, bound, coding="fixed", *, num_slots, transport, host, ring_bytes):
        assert host.stride >= host.pages_per_row * geometry.nbytes and num_slots % host.pages_per_row == 0
        self.geometry, self.dtype, self.bound, self.coding = geometry, dtype, bound, coding
        self.num_slots, self.transport, self.host, self.ring_bytes = num_slots, transport, host, ring_bytes
        self.pages, self.calls, self.damaged, self.stats = {}, [], {}, Counters()
        self.no_memory = self.closed = False
        self.at_work = ()  # directions

    def _home(self, slot: int) -> int:
        row, j = divmod(slot, self.host.pages_per_row)
        return self.host.pointer + row * self.host.stride + j * self.geometry.nbytes

    def store(self, pages, slots, stream=None, *, transport=None, join=True):
        if self.no_memory:
            raise MemoryError("no device memory")
        assert pages.dtype == np.uint64 and len(set(slots.tolist())) == len(slots)
        self.calls.append(("store", slots.tolist(), transport, stream))
        rows, counts = np.unique(slots // self.host.pages_per_row, return_counts=True)
        for row in rows[counts == self.host.pages_per_row]:  # packed: the homes are overwritten
            for slot in range(row * self.host.pages_per_row, (row + 1) * self.host.pages_per_row):
                self.pages.pop(slot, None)
        for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
            assert 0 <= slot < self.num_slots
            self.pages[slot] = self._code(ctypes.string_at(page, self.geometry.nbytes))
            ctypes.memset(self._home(slot), POISON, self.geometry.nbytes)
        return self._count("store", slots, pages)

    def busy(self, direction):
        return direction in self.at_work

    def load(self, slots, pages, stream=None, *, transport=None, join=True, disjoint=False):
        assert not disjoint or (np.diff(np.sort(pages)) >= self.geometry.nbytes).all()
        self.calls.append(("load", slots.tolist(), transport, stream))
        for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
            if slot not in self.pages:
                raise ValueError(f"slots: nothing is stored in slot {slot}")
            ctypes.memmove(page, self.pages[slot], self.geometry.nbytes)
        transfer = self._count("load", slots, pages)
        transfer.failed = {slot: self.damaged[slot] for slot in slots.tolist() if slot in self.damaged}
        return transfer

    def _count(self, way: str, slots, pages) -> FakeTransfer:
        nbytes = len(slots) * self.geometry.nbytes
        getattr(self.stats, way).add(TransferStats("staged", len(slots), nbytes, nbytes // 2, nbytes // 2, 1.0))
        return FakeTransfer(slots, pages)

    def _code(self, page: bytes) -> bytes:
        if not self.codec:
            return page
        values = np.frombuffer(page, np.uint16).view(reference._NUMPY_DTYPES[self.dtype])
        blob = reference.encode_page(values, self.bound, self.coding, geometry=self.geometry)
        return reference.decode_page(blob).tobytes()

    def drop(self, slots):
        for slot in slots.tolist():
            self.pages.pop(slot, None)

    def synchronize(self): ...

    def close(self):
        self.closed = True
