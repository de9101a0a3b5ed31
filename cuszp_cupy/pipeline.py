"""SwapPipeline: pages to pinned host memory and back, encoded on the way, without the host waiting.

Transports:

- ``staged``: pages are encoded in bursts into a ring on the device, packed; copy engines move the packed tiles;
  on the way back they fill the ring, and bursts decode from it. The one for large batches.
- ``fused``: the kernels write to and read from host memory themselves, with few thread blocks. For batches
  that are small or urgent (it has streams of its own).
- ``raw``: pages are copied as they are.
- ``auto``: the fastest of these by what ``calibrate`` measured on this machine, ``staged`` in preference to a
  ``fused`` that is hardly faster; ``explain`` tells.

A *slot* is a page's place in the table; slots are numbered from 0. Host memory is the pipeline's own pinned
arena, or rows of the caller's (``HostRows``).
"""

from __future__ import annotations

import sys
import threading

import numpy as np

from . import auto, library_swap
from .arena import Arena, Predictor, orders, parts, runs, spans, tiles
from .bound import parse_parts
from .codec import ENGINES, NOT_DECODED, _cupy, _page_pointers, aligned_to, failures, mapped_pointer, pinned
from .format import ROW_WORDS, Geometry, check_coding
from .page_codec import PageCodec
from .page_table import COPIED, KNOWN, PENDING, HostRows, PageTable, check_slots, check_stored, index
from .raw import copy as raw_copy
from .raw import kv
from .reference import check_page_dtype
from .stats import Counters
from .tables import BUILT_IN, Tables
from .transfer import Block, Buffer, Lane, Prepared, Stage, Transfer, stream_pointer

TRANSPORTS = ("auto", "staged", "fused", "raw")
#: coding -> tiles of each direction in the ring at least; raw bytes of a store's at most, and ring bytes of a
#: load's (which in rows may hold as many raw ones as a store's). Large ones cost the host less. Beside kernels
#: that fill the GPU, one tile is coded whenever one of those ends; stores come beside prefills: they have what
#: loads leave of the ring. Small ones of coding ``entropy``, whose kernels take longer, leave others more of it.
TILES = {
    "raw": (2, 256 << 20, 64 << 20), "fixed": (2, 256 << 20, 64 << 20), "entropy": (4, 32 << 20, 32 << 20)
}  # fmt: skip
STORE_TILES = 4  # at most
SCRATCH_BYTES = 98 << 20, 32 << 20, 32 << 20, 32 << 20  # of coding ``entropy``, for the lanes; a tile of stores
FUSED_THREADS = 8192  # they fill the link, and leave the others' memory traffic alone
BLOCKS, BLOCK_PAGES = 4, 1 << 15  # calls, and pages of a call, that arguments are preallocated for
BLOCK_LIMIT = 1 << 28  # bytes of argument blocks; a call waits for one rather than go beyond
LIKELY = 0.9  # of a tile's bytes that a load may fill by the mean length of its payloads
SPAN_BYTES, BATCH_SPAN_BYTES = 32 << 10, 8 << 10  # shorter copies than these, on average: the kernel reads itself
_NOT_READY = 600  # cudaErrorNotReady


class SwapPipeline:
    """Stores pages to host memory and loads them, asynchronously, on streams of its own.

    Args:
        geometry: of every page.
        dtype: ``float16`` or ``bfloat16``.
        bound, coding, tables: as in ``encode_pages``.
        num_slots: slots there are.
        transport: ``auto`` (measures the machine first, some 0.3 s), ``staged``, ``fused`` or ``raw``.
        host: ``HostRows``, or None for an arena.
        arena_bytes: pinned bytes of the arena; by default enough for pages that do not shrink. A store takes
            the raw size of its pages until it has finished.
        ring_bytes: device memory at most; less where the slots need less. Loads have 128 MiB of it at most,
            and no more than half. Coding ``entropy`` takes up to 200 MiB more, to work in.
        fused_blocks: thread blocks of the fused kernels; by default as many as have 8192 threads (16 for pages
            of 64 KiB).    burst_blocks: of the staged ones (None: a page each).
        quantile: staged stores copy as much of each region (tile or row) as this part of them took of late; a
            kernel writes what is longer.
        priority: of the streams, as in CuPy: 0 or, more urgent, negative. Kernels of a more urgent stream take
            thread blocks' places as these end.
        timing: measure stages too, for ``overlap``; costs some microseconds a tile.
        engine: ``kernels`` (ours), or ``library``, a baseline: the user's libcuSZp, page by page, synchronously;
            its bound is that before rounding to ``dtype`` (see ``library_swap.py``). It has an arena, the default
            ``coding``, ``transport`` and ``timing``, and no use for what concerns ring and kernels.

    Belongs to the device current when it is made. Any number of threads may use it; their calls take turns.

    Raises:
        ValueError, TypeError: an argument that does not fit.    MemoryError: no pinned or device memory.
        RuntimeError: no CuPy or no GPU, or (asked for) no libcuSZp.
    """

    def __init__(
        self,
        geometry: Geometry,
        dtype: str,
        bound="rms:0.05",
        coding: str = "fixed",
        *,
        num_slots: int,
        transport: str = "auto",
        host: HostRows | None = None,
        arena_bytes: int | None = None,
        ring_bytes: int = 256 << 20,
        fused_blocks: int | None = None,
        burst_blocks: int | None = None,
        quantile: float = 0.75,
        priority: int = 0,
        timing: bool = False,
        engine: str = "kernels",
        tables: Tables = BUILT_IN,
    ):
        self._closed = True  # until everything is there
        if engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
        if engine == "library":
            library_swap.check_options(coding=coding, transport=transport, host=host, timing=timing)
        cupy = self._cupy = _cupy()
        self._runtime = runtime = cupy.cuda.runtime
        self.geometry, self.dtype, self.coding = geometry, check_page_dtype(dtype), check_coding(coding)
        self.bounds = parse_parts(bound, len(geometry.part_values))
        self.transport, self.num_slots = _check_transport(transport), int(num_slots)
        if self.num_slots < 1:
            raise ValueError(f"num_slots: expected at least 1, got {num_slots}")
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile: expected 0 to 1, got {quantile}")
        self.timing = timing
        self.fused_blocks = fused_blocks or FUSED_THREADS // kv.block_threads(geometry)
        self.burst_blocks = burst_blocks
        self.page_bytes = geometry.nbytes
        self._slot_bytes = -(-geometry.nbytes // 16) * 16
        self._device = runtime.getDevice()
        self._lock = threading.RLock()
        self.stats = Counters()
        self._in_flight: dict[int, Transfer] = {}
        self._stamp = np.zeros(self.num_slots, np.int64)  # for check_slots
        self._ring = self._library = None
        self._codec = PageCodec(geometry, self.dtype, self.bounds, coding, tables)
        if engine == "library":
            self._library = library_swap.LibrarySwap(
                geometry, self.dtype, self.bounds, num_slots=self.num_slots, arena_bytes=arena_bytes
            )
            self.stats, self.arena = self._library.stats, self._library.table.arena
            self._closed = False
            return

        pages_per_row = host.pages_per_row if host else 1
        num_loads, most_stored, most_loaded = TILES[coding]
        self._tile_pages = min(self.num_slots, tile_limit(ring_bytes, coding) // self._slot_bytes)
        if self._tile_pages < pages_per_row:
            row_bytes, what = pages_per_row * self._slot_bytes, "row" if host else "page"
            if row_bytes > most_loaded:
                raise ValueError(
                    f"pages_per_row: expected rows of {most_loaded} bytes at most, which is what tiles of "
                    f"coding {coding!r} may have, got {row_bytes}"
                )
            raise ValueError(
                f"ring_bytes: expected {2 * num_loads} x {row_bytes} bytes or more, for tiles of one {what}, "
                f"got {ring_bytes}"
            )
        self._tile_bytes = self._tile_pages * self._slot_bytes
        left = ring_bytes - num_loads * self._tile_bytes
        num_stores = min(STORE_TILES, max(num_loads, left // most_stored))
        self._store_pages = min(self.num_slots, min(most_stored, left // num_stores) // self._slot_bytes)
        if host is None:
            if arena_bytes is None:
                arena_bytes = (
                    self.num_slots + min(self.num_slots, num_stores * self._store_pages)
                ) * self._slot_bytes
            if arena_bytes < self._slot_bytes:
                raise ValueError(
                    f"arena_bytes: expected at least one page ({self._slot_bytes}), got {arena_bytes}"
                )
            # a page more than is used: a damaged row may make a kernel read that far
            self._host = pinned(arena_bytes + self._slot_bytes)
            base, self.arena = self._host.ctypes.data, Arena(arena_bytes)
            self._shift = mapped_pointer(base, "arena") - base  # what to add for the device's address
        else:
            base, self.arena, self._shift = host.pointer, None, self._check_rows(host)

        memory = pinned(16 * self.num_slots).view(np.uint32).reshape(-1, ROW_WORDS)
        memory[...] = 0
        self._table_ptr = mapped_pointer(memory.ctypes.data, "page table")
        self.table = PageTable(
            memory, self.page_bytes, host, self.arena, base, self._tile_pages, self._in_flight.keys()
        )

        # a page more, as above
        sizes = self._store_pages * self._slot_bytes, self._tile_bytes
        counts = num_stores, num_loads, 0, 0
        self._ring_bytes = sizes[0] * num_stores + sizes[1] * num_loads
        self._ring = self._allocate(self._ring_bytes + self._slot_bytes)
        self._lanes, address = {}, self._ring.ptr
        for i, name in enumerate(("store", "load", "fused store", "fused load")):
            streams = [cupy.cuda.Stream(non_blocking=True, priority=priority) for _ in range(2 if i < 2 else 1)]
            tile_bytes = sizes[i % 2]
            buffers = [Buffer(address + j * tile_bytes, self._event(), self._event()) for j in range(counts[i])]
            address += counts[i] * tile_bytes
            self._lanes[name] = Lane(
                streams, i % 2, buffers, self._event(), np.zeros(self.table.num_units, np.int64),
                self._codec.new_scratch(tile_bytes // self._slot_bytes, SCRATCH_BYTES[i]),
            )  # fmt: skip

        cupy.cuda.get_current_stream().synchronize()  # scratch and tables are filled there, and read elsewhere
        self._blocks = []  # free argument blocks
        self._block_bytes = 0
        for _ in range(BLOCKS):
            self._blocks.append(self._new_block(min(self.num_slots, BLOCK_PAGES)))
        self._number = 0
        self._packed_share, self._single_share = Predictor(quantile), Predictor(quantile)
        self._stage_events: list = []  # free ones
        self.speed: dict[str, float] = {}  # what calibrate measured
        self._closed = False
        if transport == "auto":
            self.calibrate()

    # --- store and load -----------------------------------------------------------------------------------
    def store(self, pages, slots, stream=None, *, transport: str | None = None, join: bool = True) -> Transfer:
        """Enqueue the encoding of ``pages`` and their way into ``slots``; return a handle at once.

        Args:
            pages: as in ``encode_pages``, of the pipeline's geometry and dtype; or a uint64 NumPy array of device
                addresses (multiples of 2; of 8: faster), whose memory the caller keeps until it is done.
            slots: as many distinct slot numbers. What they held is gone.
            stream: the caller's stream (CuPy's, torch's, or its address); CuPy's current one when None. Pages are
                read after all that it holds now.
            transport: instead of the pipeline's.
            join: make ``stream`` wait for the store, so that work enqueued there later may overwrite ``pages``.
                Without, it is up to the caller (``Transfer.wait_on``, ``wait``).

        Raises:
            TypeError, ValueError: pages or slots that do not fit.    MemoryError: no room in the arena; nothing
            was enqueued.    RuntimeError: the stream is capturing (see ``prepare_store``), the device failed.
        """
        pointers, owner = self._check_pages(pages, "pages")
        caller = self._check_stream(stream)
        with self._lock:
            slots = check_slots(slots, self._stamp, len(pointers), distinct=True)
            if self._library:
                return self._library.store(pointers, slots, caller, transport)
            self.table.check_writable(slots)
            self._reap()
            transport = self._choose("store", len(slots), transport)
            lane = self._lanes["fused store" if transport == "fused" else "store"]
            transfer = self._transfer("store", transport, owner, caller)
            block = transfer._block = None if transport == "raw" else self._take_block(len(slots))
            try:
                order, first, hosts, waits = self.table.place(slots, alone=transport == "raw")
            except BaseException:
                self._put_block(block)
                raise
            slots, pointers = slots[order], pointers[order]
            transfer.slots, counts = slots, np.diff(first)
            transfer._regions, units = (hosts, counts), self.table.units(slots)
            # rows: one place, many writers. arena: only the table, which one lane writes in order
            others = [other for other in self._lanes.values() if self.table.rows or other is not lane]
            try:
                self._begin(transfer, lane, waits | self._conflicts(others, units), units)
                self.table.expect(slots, transfer._number, hosts, counts)
                if transport == "raw":
                    self._copy_out(transfer, lane, pointers, hosts)
                elif len(slots):
                    self._encode(transfer, lane, pointers, first)
                self._end(transfer, lane, caller if join else None)
            except BaseException as error:
                self._abandon(transfer, lane, error)
                raise
        return transfer

    def load(
        self,
        slots,
        pages,
        stream=None,
        *,
        transport: str | None = None,
        join: bool = True,
        disjoint: bool = False,
    ) -> Transfer:
        """Enqueue the way of ``slots`` back into ``pages``; return a handle at once.

        Args:
            slots: slot numbers; stored before, finished or not. A slot may be named more than once.
            pages, stream, transport, join: as in ``store``; pages are written after all that ``stream``
                holds now. Slots stored raw are copied and the others decoded, whatever the transport.
            disjoint: the caller knows that no two pages overlap: that is not looked at, which saves a sort.

        Damaged pages are found by the GPU: ``Transfer.wait`` raises, ``Transfer.failed`` names them.

        Raises:
            TypeError, ValueError: pages or slots that do not fit, pages that overlap, a slot that holds nothing.
            RuntimeError: the stream is capturing (see ``prepare_load``), the device failed.
        """
        pointers, owner = self._check_pages(pages, "pages")
        caller = self._check_stream(stream)
        if not disjoint:
            self._check_disjoint(pointers)
        with self._lock:
            slots = check_slots(slots, self._stamp, len(pointers))
            if self._library:
                check_stored(self._library.table.nbytes, slots)
                return self._library.load(slots, pointers, caller, transport)
            self._reap()
            counts, simple = (slots.size, 0, 0), bool((self.table.state[index(slots)] == KNOWN).all())
            if not simple:
                check_stored(self.table.state, slots)
            transport = self._choose("load", len(slots), transport)
            transfer = self._transfer("load", transport, owner, caller)
            transfer._block = self._take_block(len(slots))  # may wait: what is known by then counts
            if not simple:
                state = self.table.state[slots]
                known, pending, copied = (np.flatnonzero(state == s) for s in (KNOWN, PENDING, COPIED))
                order, counts = np.concatenate([known, pending, copied]), (known.size, pending.size, copied.size)
                slots, pointers = slots[order], pointers[order]
            if transport == "raw" and counts[2] < slots.size:
                transfer.transport = "staged"  # they were stored encoded
            lane = self._lanes["fused load" if transfer.transport == "fused" else "load"]
            transfer.slots, transfer._counts = slots, counts
            units = self.table.units(slots)
            # in the arena, only those that read the table on the device are in the way of later stores
            marks = units if self.table.rows else slots[counts[0] : counts[0] + counts[1]]
            waits = self._conflicts([self._lanes["store"], self._lanes["fused store"]], units)
            try:
                self._begin(transfer, lane, waits, marks)
                self._decode(transfer, lane, pointers, units)
                self._end(transfer, lane, caller if join else None)
            except BaseException as error:
                self._abandon(transfer, lane, error)
                raise
        return transfer

    def drop(self, slots) -> None:
        """Forget what ``slots`` hold; their memory is used again when no transfer needs it any more.

        Raises:
            ValueError: no such slot, or one that a prepared transfer holds.
        """
        with self._lock:
            slots = check_slots(slots, self._stamp)
            if self._library:
                return self._library.drop(np.unique(slots))
            self.table.check_writable(slots)
            self._reap()
            self.table.forget(np.unique(slots))

    def busy(self, direction: str) -> bool:
        """Return whether stores or loads (``direction``) are in flight, as far as is known; looks at no event."""
        return any(transfer.direction == direction for transfer in list(self._in_flight.values()))

    def synchronize(self) -> None:
        """Wait for all transfers so far. Damaged pages stay with their handles; none is raised here."""
        for transfer in list(self._in_flight.values()):
            transfer.done.synchronize()
        with self._lock:
            self._reap()

    def close(self) -> None:
        """Wait for all transfers and give the memory back. Further calls raise RuntimeError."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            if self._library:
                return self._library.close()
            for lane in self._lanes.values():
                for stream in lane.streams:
                    stream.synchronize()
            self._reap()
            self._ring = self._blocks = self._host = self.table.memory = self.table.rows = None

    def __enter__(self) -> SwapPipeline:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if not (self._closed or sys.is_finalizing()):
            self.close()

    def memory(self) -> dict[str, int | float]:
        """Return the bytes in use: ring, arguments and scratch (device), arena and table (pinned host),
        fragmentation.
        """
        with self._lock:
            self._reap()
            if self._library:
                return self._library.memory()
            usage = {
                "ring_bytes": self._ring_bytes,
                "argument_bytes": self._block_bytes,
                "scratch_bytes": sum(lane.scratch.nbytes for lane in self._lanes.values() if lane.scratch),
                "table_bytes": self.table.memory.nbytes,
            }
            if self.arena:
                usage["arena_bytes"] = self.arena.nbytes
                usage["arena_used_bytes"] = self.arena.nbytes - self.arena.free_bytes
                usage["fragmentation"] = self.arena.fragmentation
        return usage

    # --- CUDA graphs --------------------------------------------------------------------------------------
    def prepare_store(self, pages, slots) -> Prepared:
        """Return a fused store of these very ``pages`` to ``slots``, for CUDA graphs. Waits.

        ``launch`` enqueues it on CuPy's current stream, which may be capturing; it does nothing else, so a graph
        can be replayed on what the pages hold by then. Each page has room for its raw size. The caller orders it
        against the pipeline's other calls: load what it stored from the same stream. Until ``Prepared.close``,
        ``store`` and ``drop`` refuse the slots.
        """
        self._check_kernels("prepare_store")
        pointers, owner = self._check_pages(pages, "pages")
        with self._lock:
            slots = check_slots(slots, self._stamp, len(pointers), distinct=True)
            if not slots.size:
                raise ValueError("pages: expected at least one page to prepare, got none")
            self.table.check_writable(slots)
            self.synchronize()
            prepared = Prepared(self, "store", slots.size, owner)
            try:
                order, _, hosts, _ = self.table.place(slots, alone=True)
            except BaseException:
                self._put_block(prepared._block)
                raise
            slots, pointers = slots[order], pointers[order]
            self.table.prepare(slots, hosts)
            return prepared.hold(slots, pointers)

    def prepare_load(self, slots, pages) -> Prepared:
        """Return a fused load of ``slots`` into these very ``pages``, for CUDA graphs; see ``prepare_store``.

        The slots were prepared for a store, or stored encoded (not ``raw``). Waits.
        """
        self._check_kernels("prepare_load")
        pointers, owner = self._check_pages(pages, "pages")
        self._check_disjoint(pointers)
        with self._lock:
            slots = check_slots(slots, self._stamp, len(pointers))
            if not slots.size:
                raise ValueError("pages: expected at least one page to prepare, got none")
            check_stored(self.table.state, slots)
            self.synchronize()
            if (self.table.state[slots] == COPIED).any():
                raise ValueError("slots: expected slots stored encoded, got some stored by transport 'raw'")
            return Prepared(self, "load", slots.size, owner).hold(slots, pointers)

    # --- which transport ----------------------------------------------------------------------------------
    def calibrate(self) -> None:
        """Measure link, codec and launch cost of this machine, for ``auto``. Waits; compiles the kernels."""
        self._check_kernels("calibrate")
        with self._lock:
            self.synchronize()
            self.speed = auto.measure(self)

    def explain(self) -> str:
        """Return what ``calibrate`` measured, what ``auto`` picks for batches of which size, and why."""
        self._check_kernels("explain")
        return auto.explain(self)

    def _choose(self, direction: str, num_pages: int, transport: str | None) -> str:
        transport = self.transport if transport is None else _check_transport(transport)
        if transport != "auto":
            return transport
        if not self.speed:
            raise ValueError("transport 'auto': nothing is measured yet; call calibrate() before")
        return auto.fastest(self, direction, num_pages)

    # --- what a store enqueues ----------------------------------------------------------------------------
    def _encode(self, transfer, lane, pointers, first) -> None:
        """Encode tile by tile and move what was packed; fused: encode to the host in one launch."""
        hosts, counts = transfer._regions
        sizes = counts * self._slot_bytes
        fused, block, num = transfer.transport == "fused", transfer._block, len(pointers)
        if fused:
            bounds, works, widths = [0, len(hosts)], hosts + self._shift, sizes
        else:
            bounds = tiles(first, self._store_pages)
            buffers = [lane.next_buffer() for _ in bounds[1:]]
            tile = np.repeat(np.arange(len(buffers)), np.diff(bounds))
            works = np.array([buffer.address for buffer in buffers])[tile]
            works += (first[:-1] - first[bounds[:-1]][tile]) * self._slot_bytes
            packed, single = (p.predict(sizes) for p in (self._packed_share, self._single_share))
            widths = np.where(counts > 1, packed, single)
        block.slots[:], block.pages[:] = transfer.slots, pointers
        block.payloads[:], block.regions[:] = np.repeat(works, counts), np.repeat(np.arange(len(hosts)), counts)
        regions = len(hosts)
        block.hosts[:regions], block.works[:regions] = hosts + self._shift, works
        block.copied[:regions], block.cursors[:regions] = widths // 16, 0
        block.upload("hosts", "payloads", lane.codec)
        transfer._widths = widths
        aligned, at, runtime = aligned_to(pointers, 8), block.device_pointers, self._runtime
        if fused:
            with Stage(transfer, "store encode", lane.codec), lane.codec:
                self._kv_encode(at, 0, num, aligned, lane.scratch, on_host=True)
                raw_copy.publish(at["rows"], at["slots"], self._table_ptr, num)
            return
        to_host, edges = runtime.memcpyDeviceToHost, self._runs(hosts, works, widths, bounds)
        with lane.codec:
            tiles_of = zip(buffers, bounds[:-1], bounds[1:], parts(edges, bounds), strict=True)
            for buffer, lo, hi, mine in tiles_of:
                page, end = int(first[lo]), int(first[hi])
                runtime.streamWaitEvent(lane.codec.ptr, buffer.free.ptr)
                with Stage(transfer, "store encode", lane.codec):
                    self._kv_encode(at, page, end - page, aligned, lane.scratch)
                    runtime.eventRecord(buffer.ready.ptr, lane.codec.ptr)
                    raw_copy.publish(
                        at["rows"] + 16 * page, at["slots"] + 4 * page, self._table_ptr, end - page,
                        at["hosts"] + 8 * lo, at["works"] + 8 * lo, at["copied"] + 4 * lo, at["cursors"] + 4 * lo,
                        hi - lo,
                    )  # fmt: skip
                runtime.streamWaitEvent(lane.copy.ptr, buffer.ready.ptr)
                with Stage(transfer, "store copy", lane.copy):
                    raw_copy.copies(hosts, works, widths, mine, to_host, lane.copy.ptr)
                runtime.eventRecord(buffer.free.ptr, lane.copy.ptr)

    def _copy_out(self, transfer, lane, pointers, hosts) -> None:
        """Transport raw: copy the pages to places of their own."""
        slots = transfer.slots
        self.table.copied(slots, hosts)  # there is nothing to learn when it is done
        if not slots.size:
            return
        pieces = hosts, pointers.astype(np.int64), np.full(len(hosts), self.page_bytes)
        with Stage(transfer, "store copy", lane.copy):
            raw_copy.copies(*pieces, self._runs(*pieces), self._runtime.memcpyDeviceToHost, lane.copy.ptr)

    def _finish_store(self, transfer) -> tuple[int, int]:
        """Learn where a finished store's pages lie; return payload and link bytes."""
        slots = transfer.slots
        hosts, counts = transfer._regions
        if transfer.transport == "raw":
            self.stats.raw_pages += len(slots)
            return (len(slots) * self.page_bytes,) * 2
        nbytes, used = self.table.learn(slots, transfer._number, hosts, counts)
        if transfer.error is not None or not len(slots):
            return 0, 0
        shares = used / (counts * self._slot_bytes)
        for predictor, some in ((self._packed_share, counts > 1), (self._single_share, counts == 1)):
            predictor.update(shares[some & (used > 0)])
        self.stats.raw_pages += int(np.count_nonzero(nbytes == self.page_bytes))
        payload = int(nbytes.sum()) + 16 * nbytes.size
        if transfer.transport == "fused":
            return payload, int(((nbytes + 15) & -16).sum())
        self.stats.mispredicted += int((used > transfer._widths).sum())
        return payload, int(np.maximum(used, transfer._widths).sum())

    # --- what a load enqueues -----------------------------------------------------------------------------
    def _decode(self, transfer, lane, pointers, units) -> None:
        """Decode what is known in tiles, what is pending from the host, and copy what is raw."""
        slots, block, runtime = transfer.slots, transfer._block, self._runtime
        num_known, num_pending, num_copied = transfer._counts
        coded = num_known + num_pending
        transfer._payload_bytes = transfer._link_bytes = num_copied * self.page_bytes
        if not len(slots):
            return
        addresses, plan = self.table.address[index(slots)], []
        if num_known:
            rows = np.take(self.table.known, slots[:num_known], axis=0)
            nbytes = rows[:, 1].astype(np.int64)
            lengths = (np.maximum(nbytes, 1) + 15) & -16  # of damaged rows: 0
            transfer._payload_bytes += int(nbytes.sum()) + 16 * num_known
            known, found = slice(num_known), None
            if transfer.transport != "fused":
                for order in orders(addresses[known], units[known] if self.table.rows else None):
                    found = self._spans(addresses[known][order], lengths[order], units[known][order])
                    if found is not None:
                        break
            if found is None:  # fused; or damaged rows make payloads overlap: the kernel reads the host itself
                plan = [(None, 0, num_known, None)]
                transfer._link_bytes += int(lengths.sum())
            else:
                if not isinstance(order, slice):
                    rows, lengths = rows[order], lengths[order]
                    order = np.concatenate([order, np.arange(num_known, slots.size)])
                    slots, pointers, addresses = slots[order], pointers[order], addresses[order]
                    transfer.slots = slots
                copies, plan = self._plan_tiles(transfer, lane, addresses[:num_known], lengths, found)
            block.rows[:num_known] = rows
            block.rows[:num_known, 3] = 0  # payload addresses are exact
        block.slots[:], block.pages[:] = slots, pointers
        block.status[:coded], block.status[coded:] = NOT_DECODED, 0
        block.payloads[:coded] = addresses[:coded] + self._shift
        for buffer, page, end, _ in plan:
            if buffer:
                block.payloads[page:end] = transfer._in_ring[page:end] + buffer.address
        aligned, at = aligned_to(pointers[:coded], 4), block.device_pointers
        if coded:
            block.upload("slots", "rows", lane.codec)
        with lane.codec:
            for buffer, page, end, edges in plan:
                if buffer:
                    runtime.streamWaitEvent(lane.copy.ptr, buffer.free.ptr)
                    with Stage(transfer, "load copy", lane.copy):
                        raw_copy.copies(*copies, edges, runtime.memcpyHostToDevice, lane.copy.ptr)
                    runtime.eventRecord(buffer.ready.ptr, lane.copy.ptr)
                    runtime.streamWaitEvent(lane.codec.ptr, buffer.ready.ptr)
                with Stage(transfer, "load decode", lane.codec):
                    self._kv_decode(
                        at, page, end - page, aligned, block.status_ptr, lane.scratch, on_host=not buffer
                    )
                if buffer:
                    runtime.eventRecord(buffer.free.ptr, lane.codec.ptr)
            if num_pending:
                with Stage(transfer, "load decode", lane.codec):
                    raw_copy.collect(
                        self._table_ptr, at["slots"] + 4 * num_known, at["rows"] + 16 * num_known, num_pending
                    )
                    status = block.status_ptr
                    self._kv_decode(at, num_known, num_pending, aligned, status, lane.scratch, on_host=True)
        if num_copied:
            order = np.argsort(addresses[coded:])
            pieces = (
                pointers[coded:][order].astype(np.int64),
                addresses[coded:][order],
                np.full(num_copied, self.page_bytes),
            )
            with Stage(transfer, "load copy", lane.copy):
                raw_copy.copies(*pieces, self._runs(*pieces), runtime.memcpyHostToDevice, lane.copy.ptr)

    def _spans(self, starts, lengths, units):
        """Do as ``arena.spans``; in rows with as many pages a tile as should fit, else with as many as fit raw.

        In an arena the pages of a store lie in no order, and regions apart: more would seldom do.
        """
        if not self.table.rows:
            return spans(starts, lengths, self._tile_pages, self._tile_bytes)
        rows = self.table.base, self.table.rows.stride, units
        most, per_row = TILES[self.coding][1] // self._slot_bytes, self.table.pages_per_row
        fit = int(self._tile_bytes * LIKELY * lengths.size / max(1, int(lengths.sum())))
        likely = min(most, fit) // per_row * per_row
        for pages in (likely, self._tile_pages) if likely > self._tile_pages else (self._tile_pages,):
            found = spans(starts, lengths, pages, self._tile_bytes, *rows)
            if found is not None:
                return found
        return None

    def _plan_tiles(self, transfer, lane, starts, lengths, found) -> tuple[tuple, list[tuple]]:
        """Plan the tiles of known pages: the copies, and (ring buffer, pages, edges of its copies) of each tile.

        The buffer is None where so little would go at once that the kernel had better read the host itself.
        """
        first_span, first_page, span_starts, span_ends, position = found
        widths, plan, pages = span_ends - span_starts, [], np.append(first_page, starts.size)
        transfer._in_ring = starts + np.repeat(position - span_starts, np.diff(pages))
        bounds = first_span.tolist()
        edges = self._runs(position, span_starts, widths, bounds)
        shortest = BATCH_SPAN_BYTES if raw_copy.has_batch() else SPAN_BYTES
        num_bytes = np.add.reduceat(widths, first_span[:-1]).tolist()
        for lo, hi, mine, copied in zip(bounds[:-1], bounds[1:], parts(edges, bounds), num_bytes, strict=True):
            page, end = int(pages[lo]), int(pages[hi])
            if copied < (len(mine) - 1) * shortest and len(mine) > 2:
                plan.append((None, page, end, None))
                transfer._link_bytes += int(lengths[page:end].sum())
                continue
            buffer = lane.next_buffer()
            position[lo:hi] += buffer.address
            plan.append((buffer, page, end, mine))
            transfer._link_bytes += copied
        return (position, span_starts, widths), plan

    def _finish_load(self, transfer) -> tuple[int, int]:
        """Collect the verdicts of a finished load; return payload and link bytes."""
        if transfer.error is not None or not len(transfer.slots):
            return 0, 0
        found = failures(transfer._block.status)
        transfer.failed = {int(transfer.slots[i]): reason for i, reason in found.items()}
        self.stats.failed_pages += len(found)
        num_known, num_pending, _ = transfer._counts
        pending = transfer.slots[num_known : num_known + num_pending]
        payload = int(self.table.memory[pending, 1].sum(dtype=np.int64))
        return transfer._payload_bytes + payload + 16 * num_pending, transfer._link_bytes + payload

    # --- kernels, on the current stream -------------------------------------------------------------------
    # on_host: payloads lie there, and `fused_blocks` reach them
    def _kv_encode(self, at, page, num, aligned, scratch, on_host=False, cursors=True) -> None:
        self._codec.encode(
            at["pages"] + 8 * page, at["payloads"] + 8 * page, at["rows"] + 16 * page, num,
            aligned=aligned, scratch=scratch,
            blocks=self.fused_blocks if on_host else self.burst_blocks, device_blocks=self.burst_blocks,
            regions_ptr=at["regions"] + 4 * page if cursors else 0, cursors_ptr=at["cursors"] if cursors else 0,
        )  # fmt: skip

    def _kv_decode(self, at, page, num, aligned, status_ptr, scratch, on_host=False) -> None:
        self._codec.decode(
            at["payloads"] + 8 * page, at["rows"] + 16 * page, at["pages"] + 8 * page, status_ptr + 4 * page, num,
            aligned=aligned, scratch=scratch, on_host=on_host,
            blocks=self.fused_blocks, device_blocks=self.burst_blocks,
        )  # fmt: skip

    def _runs(self, dst, src, width, bounds=()) -> np.ndarray:
        """Return the edges of runs of copies that may go as one."""
        if self.table.rows and self.table.rows.separate:
            return np.arange(dst.size + 1)
        return runs(dst, src, width, bounds)

    # --- order --------------------------------------------------------------------------------------------
    def _conflicts(self, lanes, units) -> set[int]:
        """Return the numbers of what is in flight that ``lanes`` last had there. A lane finishes in order."""
        lanes = [lane for lane in lanes if lane.newest in self._in_flight]
        return self._in_flight.keys() & {int(lane.last[units].max(initial=0)) for lane in lanes}

    def _transfer(self, direction: str, transport: str, owner, caller: int) -> Transfer:
        """Return a handle for work behind what the caller's stream holds; if that fails, nothing has changed."""
        transfer = Transfer(self, direction, transport, owner)
        self._runtime.eventRecord(transfer._ready.ptr, caller)
        return transfer

    def _begin(self, transfer, lane, waits, marks) -> None:
        """Number the transfer and make its streams wait for the caller's and for the transfers ``waits``."""
        runtime, events = self._runtime, [transfer._ready, *(self._in_flight[number].done for number in waits)]
        self._number += 1
        transfer._number = lane.newest = self._number
        self._in_flight[self._number] = transfer
        lane.last[index(marks)] = self._number
        for stream in lane.streams:
            for event in events:
                runtime.streamWaitEvent(stream.ptr, event.ptr)
        runtime.eventRecord(transfer._start.ptr, lane.streams[0].ptr)

    def _end(self, transfer, lane, caller: int | None) -> None:
        """Record ``done`` behind all streams of the lane; let the caller's stream wait for it."""
        runtime, last = self._runtime, lane.streams[-1].ptr
        for stream in lane.streams[:-1]:
            runtime.eventRecord(lane.join.ptr, stream.ptr)
            runtime.streamWaitEvent(last, lane.join.ptr)
        runtime.eventRecord(transfer.done.ptr, last)
        if caller is not None:
            runtime.streamWaitEvent(caller, transfer.done.ptr)

    def _abandon(self, transfer, lane, error) -> None:
        """After an error half-way: the slots hold nothing; memory comes back when the streams are through."""
        transfer.error = error
        self.stats.failed_calls += 1
        if transfer.direction == "store":
            self.table.forget(transfer.slots)
        try:
            self._end(transfer, lane, None)
        except self._runtime.CUDARuntimeError:  # the device is lost: nothing can be reused, nor needs to be
            self._in_flight.pop(transfer._number, None)

    def _reap(self) -> None:
        """Take note of all transfers that have finished; wait for none."""
        if self._closed and self._ring is None:
            raise RuntimeError("the pipeline is closed")
        for number, transfer in list(self._in_flight.items()):
            status = self._runtime.eventQuery(transfer.done.ptr)
            if status == _NOT_READY:
                continue
            if status:
                raise self._runtime.CUDARuntimeError(status)
            del self._in_flight[number]
            finish = self._finish_store if transfer.direction == "store" else self._finish_load
            payload, link = finish(transfer)
            transfer._complete(payload, link)
            if transfer.error is None:
                getattr(self.stats, transfer.direction).add(transfer.stats)
            self._put_block(transfer._block)
            transfer._block = transfer._owner = transfer._regions = None
        if not self._library:
            self.table.settle()

    # --- device memory and arguments ----------------------------------------------------------------------
    def _allocate(self, nbytes: int):
        try:
            return self._cupy.cuda.alloc(nbytes)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise MemoryError(f"no {nbytes} bytes of device memory ({error}); lower ring_bytes") from None

    def _new_block(self, num_pages: int) -> Block:
        capacity = max(256, 1 << (num_pages - 1).bit_length())
        with self._lanes["store"].codec:  # what CuPy has for another stream, that one may still be using
            host, device = pinned(Block.BYTES * capacity), self._allocate(Block.BYTES * capacity)
        self._block_bytes += Block.BYTES * capacity
        return Block(capacity, host, device, mapped_pointer(host.ctypes.data, "arguments"))

    def _take_block(self, num_pages: int) -> Block:
        """Return the smallest free argument block that fits, or a new one; without memory, wait for one.

        At BLOCK_LIMIT, too.

        Raises:
            MemoryError: nothing is in flight that could give one back.
        """
        while True:
            fits = [block for block in self._blocks if block.capacity >= num_pages]
            if fits:
                block = min(fits, key=lambda block: block.capacity)
                self._blocks.remove(block)
                return block.lay_out(num_pages)
            if self._block_bytes < BLOCK_LIMIT or not self._in_flight:
                try:
                    return self._new_block(max(num_pages, 1)).lay_out(num_pages)
                except MemoryError:
                    if not self._in_flight:
                        raise
            next(iter(self._in_flight.values())).done.synchronize()
            self._reap()

    def _put_block(self, block) -> None:
        if block is not None and self._blocks is not None:
            self._blocks.append(block)

    def _event(self):
        return self._cupy.cuda.Event(disable_timing=True)

    # --- checks -------------------------------------------------------------------------------------------
    def _check_kernels(self, what: str) -> None:
        if self._library:
            raise ValueError(
                f"{what}: engine 'library' has one way, which waits; make the pipeline with engine='kernels'"
            )

    def _check_pages(self, pages, name: str):
        """Return (device addresses, owner) of ``pages``, checked."""
        if self._closed:
            raise RuntimeError("the pipeline is closed")
        if self._runtime.getDevice() != self._device:
            raise ValueError(
                f"the pipeline belongs to device {self._device}, the current one is {self._runtime.getDevice()}; "
                f"work inside 'with cupy.cuda.Device({self._device})'"
            )
        if isinstance(pages, np.ndarray) and pages.dtype == np.uint64:
            if pages.ndim != 1:
                raise ValueError(f"{name}: expected a 1-D array of addresses, got the shape {pages.shape}")
            for pointer in {int(pages.min()), int(pages.max()) + self.page_bytes - 1} if pages.size else ():
                found = self._runtime.pointerGetAttributes(pointer)
                if found.type not in (self._runtime.memoryTypeDevice, self._runtime.memoryTypeManaged):
                    raise ValueError(
                        f"{name}: {pointer:#x} is no device memory, or a page reaches beyond its end"
                    )
                if found.device != self._device:
                    raise ValueError(f"{name}: {pointer:#x} lies on device {found.device}, not on {self._device}")
            if not aligned_to(pages, 2):
                raise ValueError(
                    f"{name}: expected addresses that are multiples of 2, got {pages[pages % 2 > 0][0]:#x}"
                )
            return pages, None
        if isinstance(pages, (list, tuple)) and not pages:
            return np.zeros(0, np.uint64), None
        pointers, dtype, _, owner = _page_pointers(pages, self.geometry, name)
        if dtype != self.dtype:
            raise TypeError(f"{name}: the pipeline is for {self.dtype}, got {dtype}")
        return pointers, owner

    def _check_disjoint(self, pointers) -> None:
        if (pointers[1:] >= pointers[:-1] + np.uint64(self.page_bytes)).all():
            return
        ordered = np.sort(pointers)
        overlap = np.flatnonzero(np.diff(ordered) < self.page_bytes)
        if overlap.size:
            raise ValueError(
                f"pages: expected pages that do not overlap, got {int(ordered[overlap[0]]):#x} and "
                f"{int(ordered[overlap[0] + 1]):#x} of {self.page_bytes} bytes"
            )

    def _check_stream(self, stream) -> int:
        """Return the address of the caller's stream."""
        if stream is None:
            stream = self._cupy.cuda.get_current_stream()
        pointer = stream_pointer(stream)
        if self._runtime.streamIsCapturing(pointer):
            raise RuntimeError("the stream is capturing a graph; use prepare_store and prepare_load, made before")
        return pointer

    def _check_rows(self, host: HostRows) -> int:
        """Return what to add to a host address for the device's address of the same memory."""
        if host.pages_per_row < 1 or self.num_slots % host.pages_per_row:
            raise ValueError(
                f"pages_per_row: expected a divisor of the {self.num_slots} slots, got {host.pages_per_row}"
            )
        row_bytes = host.pages_per_row * self.page_bytes
        if self.page_bytes % 16 or host.pointer % 16 or host.stride % 16 or host.stride < row_bytes:
            raise ValueError(
                f"host rows: expected pages, address and stride to be multiples of 16 and rows of "
                f"{row_bytes} bytes, got pages of {self.page_bytes} bytes at {host.pointer:#x}, stride "
                f"{host.stride}; use an arena"
            )
        last = (self.num_slots // host.pages_per_row - 1) * host.stride + row_bytes - 1
        shifts = {mapped_pointer(host.pointer + at, "host rows") - host.pointer - at for at in (0, last)}
        if len(shifts) > 1:
            raise ValueError("host rows: expected memory that is mapped in one piece; register it as one")
        return shifts.pop()


def tile_limit(ring_bytes: int, coding: str) -> int:
    """Return the ring bytes of a load's tile at most; a store's is no smaller. Rows must fit in."""
    buffers, _, most = TILES[coding]
    return min(most, ring_bytes // (2 * buffers))


def _check_transport(transport: str) -> str:
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {transport!r}")
    return transport
