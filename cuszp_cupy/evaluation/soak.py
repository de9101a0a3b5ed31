"""Random stores, loads and drops for minutes, every page that comes back compared with what it must be."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from .. import reference
from ..codec import pinned
from ..pipeline import HostRows, SwapPipeline
from . import machine, swap

PAGE_KIB, NUM_SLOTS, PAGES_PER_ROW = 16, 4096, 8
ARENA_SHARE = 0.4  # of the raw size of all slots: too little, so that old pages must go
RING_BYTES = 4 << 20  # small, so that batches take several tiles
MOST_PAGES = 512  # of a call
NUM_STREAMS, MOST_IN_FLIGHT = 4, 24
MOST_TOLD = 20  # wrong pages that are described
WARM_SHARE = 0.2  # of the time, until memory must not grow any more


class Model:
    """What each slot of a pipeline must bring back: index of an expected page, -1 where it holds nothing."""

    def __init__(self, num_slots: int, pages_per_row: int):
        self.content = np.full(num_slots, -1)
        self._packed, self._per_row = np.zeros(-(-num_slots // pages_per_row), bool), pages_per_row

    def store(self, slots: np.ndarray, content: np.ndarray, raw: bool) -> None:
        """Take note of a store; what a packed row loses is lost here too (``HostRows``)."""
        row, count = np.unique(slots // self._per_row, return_counts=True)
        whole = (count == self._per_row) & ((not raw) | (self._per_row == 1))
        spoilt = row[~whole & self._packed[row]]
        self.content[(spoilt[:, None] * self._per_row + np.arange(self._per_row)).ravel()] = -1
        self.content[slots], self._packed[row] = content, whole

    def stored(self) -> np.ndarray:
        """Return the slots that hold something."""
        return np.flatnonzero(self.content >= 0)


def library(bound: str, coding: str) -> tuple[np.ndarray, np.ndarray, swap.PageSet]:
    """Return pages of all kinds and what they decode to, as (n, values) uint16: real ones, zeros, NaNs, noise."""
    pages = swap.page_set(PAGE_KIB)
    bits, rng = pages.pages.view(np.uint16), np.random.default_rng(0)
    special = rng.integers(0, 1 << 16, (4, *bits.shape[1:]), np.uint16)  # random bits: NaN, infinities, raw pages
    special[0], special[1] = 0, 0x7FC0
    special[2, :, ::7] = bits[0, :, ::7]
    x = np.concatenate([bits, special])
    sort = {"bound": bound, "coding": coding, "geometry": pages.geometry}
    blobs = [reference.encode_page(p.view(pages.pages.dtype), **sort) for p in x]
    decoded = np.stack([reference.decode_page(blob).view(np.uint16) for blob in blobs])
    return x.reshape(len(x), -1), decoded.reshape(len(x), -1), pages


def differences(loaded, expected, xp=np):
    """Return (3, n): how many values of each page differ, the first one and the last; ``xp``: NumPy or CuPy."""
    differ = loaded != expected
    last = differ.shape[1] - 1 - differ[:, ::-1].argmax(axis=1)
    return xp.stack([differ.sum(axis=1), differ.argmax(axis=1), last])


@dataclass
class Load:
    """A load, and its ``differences`` from what it must bring, which are there after ``done``.

    ``slots`` and what was known of them when it was called: ``addresses`` as in ``PageTable``, whether ``raw``.
    """

    transfer: object
    slots: np.ndarray
    addresses: np.ndarray
    raw: np.ndarray
    differences: object
    done: object

    def wrong(self, reader) -> list[dict]:
        """Return what can be told of each wrong page, once it is done; ``reader``: the stream to copy on."""
        self.transfer.query()
        counts, first, last = self.differences.get(stream=reader)
        return [
            {
                "slot": int(self.slots[i]), "address": int(self.addresses[i]), "raw": bool(self.raw[i]),
                "transport": self.transfer.transport, "pages": len(self.slots), "differ": int(counts[i]),
                "first": int(first[i]), "last": int(last[i]),
                "reason": self.transfer.failed.get(int(self.slots[i])),
            }
            for i in np.flatnonzero(counts)
        ]  # fmt: skip


def soak(minutes: float, bound: str, coding: str, step=lambda text: None, seed: int = 0) -> dict:
    """Use two pipelines, arena and rows, at random on several streams; return what was done and found.

    Returns:
        ``seconds``; ``calls`` of each kind and ``evictions``; ``pages_stored``, ``pages_loaded``, ``mismatches``
        (pages that came back other than expected), ``damaged`` (pages that were named as damaged);
        ``wrong``, what can be told of the first mismatches (``Load.wrong``);
        ``growth_bytes`` since the warm-up, of ``device`` (all processes on it), ``pool`` (CuPy's), ``arguments``
        (the pipelines', pinned and as much on the device) and ``host`` (what the process holds);
        ``fragmentation`` of the arena, the largest and the last.
    """
    import cupy

    x, decoded, pages = library(bound, coding)
    geometry, size, rng = pages.geometry, pages.geometry.nbytes, np.random.default_rng(seed)
    host = pinned(NUM_SLOTS * size)
    common = {"num_slots": NUM_SLOTS, "transport": "auto", "ring_bytes": RING_BYTES}
    slots_bytes = int(NUM_SLOTS * size * ARENA_SHARE)
    arena = SwapPipeline(geometry, "bfloat16", bound, coding, arena_bytes=slots_bytes, **common)
    rows = HostRows(host.ctypes.data, PAGES_PER_ROW * size, PAGES_PER_ROW, host)
    rows = SwapPipeline(geometry, "bfloat16", bound, coding, host=rows, **common)
    sides = [(arena, Model(NUM_SLOTS, 1)), (rows, Model(NUM_SLOTS, PAGES_PER_ROW))]

    source, expected = cupy.asarray(x), cupy.asarray(np.concatenate([decoded, x]))  # as stored raw: unchanged
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(NUM_STREAMS)]
    targets = [cupy.empty((MOST_PAGES, size // 2), cupy.uint16) for _ in streams]
    reader, wrong = cupy.cuda.Stream(non_blocking=True), []
    cupy.cuda.Device().synchronize()
    calls, in_flight, fragmentation = Counter(), deque(), [0.0]
    stored = loaded = mismatches = 0

    def finish() -> None:
        nonlocal mismatches
        oldest = in_flight.popleft()
        oldest.done.synchronize()
        found = oldest.wrong(reader) if isinstance(oldest, Load) else []
        mismatches += len(found)
        wrong.extend(found[: MOST_TOLD - len(wrong)])

    begin, base = time.monotonic(), None
    while (passed := time.monotonic() - begin) < 60 * minutes or base is None:
        if base is None and passed >= 60 * minutes * WARM_SHARE:
            base = memory(sides)
        pipeline, model = sides[rng.integers(2)]
        which, what = rng.integers(NUM_STREAMS), rng.random()
        transport = ("staged", "fused", "raw", "auto")[rng.integers(4)]
        num = int(rng.integers(1, MOST_PAGES + 1)) if rng.random() < 0.5 else int(rng.integers(1, 9))
        stream, full = streams[which], model.stored()
        if what < 0.45:
            slots = some_slots(rng, num)
            ids = rng.integers(0, len(x), slots.size)
            try:
                transfer = pipeline.store(
                    swap.pointers(source, ids, size),
                    slots,
                    stream,
                    transport=transport,
                    join=bool(rng.integers(2)),
                )
            except MemoryError:  # what an evicting cache does
                pipeline.synchronize()
                fragmentation.append(pipeline.memory()["fragmentation"])
                gone = rng.choice(full, -(-full.size // 2), replace=False)
                pipeline.drop(gone)
                model.content[gone] = -1
                calls["evictions"] += 1
                continue
            call, raw = transfer, transfer.transport == "raw"
            model.store(slots, ids + len(x) * raw, raw)
            stored += slots.size
        elif what < 0.9 and full.size:
            slots = rng.choice(full, min(num, full.size))
            target = targets[which][: slots.size]
            with stream:
                target.fill(0x5A5A)
            addresses = swap.pointers(target, np.arange(slots.size), size)
            content, places = model.content[slots], pipeline.table.address[slots]
            transfer = pipeline.load(slots, addresses, stream, transport=transport)
            with stream:
                found = differences(target, expected[cupy.asarray(content)], cupy)
            call = Load(transfer, slots, places, content >= len(x), found, stream.record())
            loaded += slots.size
        elif full.size:
            slots = rng.choice(full, min(num, full.size), replace=False)
            pipeline.drop(slots)
            model.content[slots] = -1
            calls["drop"] += 1
            continue
        else:
            continue
        calls[f"{transfer.direction} {transfer.transport}"] += 1
        in_flight.append(call)
        while len(in_flight) > MOST_IN_FLIGHT:
            finish()
        if sum(calls.values()) % 1000 == 0:
            step(f"soak: {passed:.0f} s, {stored} pages stored, {loaded} loaded")
    for pipeline, _ in sides:
        pipeline.synchronize()
    while in_flight:
        finish()
    after, fragments = memory(sides), arena.memory()["fragmentation"]
    return {
        "seconds": time.monotonic() - begin, "calls": dict(calls), "pages_stored": stored, "pages_loaded": loaded,
        "mismatches": mismatches, "wrong": wrong,
        "damaged": sum(pipeline.stats.failed_pages for pipeline, _ in sides),
        "growth_bytes": {name: after[name] - base[name] for name in after},
        "fragmentation": {"largest": max(*fragmentation, fragments), "last": fragments},
    }  # fmt: skip


def some_slots(rng, num: int) -> np.ndarray:
    """Return ``num`` or fewer distinct slots: any, neighbours, or whole rows."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.choice(NUM_SLOTS, num, replace=False)
    if kind == 1:
        first = rng.integers(NUM_SLOTS - num + 1)
        return np.arange(first, first + num)
    row = rng.choice(NUM_SLOTS // PAGES_PER_ROW, -(-num // PAGES_PER_ROW), replace=False)
    return (row[:, None] * PAGES_PER_ROW + np.arange(PAGES_PER_ROW)).ravel()


def memory(sides) -> dict[str, int]:
    """Return bytes in use: of the device, CuPy's pool, the pipelines' arguments, this process on the host."""
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    arguments = sum(pipeline.memory()["argument_bytes"] for pipeline, _ in sides)
    pool = cupy.get_default_memory_pool().total_bytes()
    return {"device": total - free, "pool": pool, "arguments": arguments, "host": machine.resident()}
