"""PageCodec: the launches that encode and decode batches of pages of one sort. Pointers in; nothing waits.

Coding ``entropy`` takes two launches for what ``fixed`` does in one: first ``fixed`` to scratch slots, which also
chooses the steps, then the streams. Pages of more than one chunk (1024 groups) take a launch for each step that
needs the results of all their chunks. So both work on as many pages at a time as there is scratch for.
"""

from __future__ import annotations

import numpy as np

from .format import ROW_WORDS, Geometry
from .raw import copy as raw_copy
from .raw import kv
from .tables import BUILT_IN, Tables

SCRATCH_BYTES = 400 << 20  # two thousand pages of 64 KiB: with fewer, most of the GPU waits for single lanes


class PageCodec:
    """Encodes and decodes batches of pages on CuPy's current stream.

    Args:
        geometry, dtype: of every page.    bounds: one a part.    coding: ``raw``, ``fixed`` or ``entropy``.
        tables: of coding ``entropy``; they are copied to the current device.

    Raises:
        ValueError: tables that do not fit the geometry, or tables for another coding.
    """

    def __init__(self, geometry: Geometry, dtype: str, bounds: tuple, coding: str, tables: Tables = BUILT_IN):
        self.geometry, self.dtype, self.bounds, self.coding = geometry, dtype, bounds, coding
        self.tables, self._device_tables = tables, None
        if coding == "entropy":
            import cupy

            tables.check_geometry(geometry)
            self._device_tables = cupy.asarray(kv.entropy_tables(tables))
        elif tables is not BUILT_IN:
            raise ValueError(f"tables: coding {coding!r} has none; use coding 'entropy'")

    def new_scratch(self, num_pages: int, nbytes: int | None = None) -> Scratch | None:
        """Return scratch for batches of ``num_pages``, or None if the coding needs none for such pages.

        At most about ``nbytes`` (SCRATCH_BYTES when None). One scratch serves one stream.
        """
        slot_bytes = kv.entropy_slot_bytes(self.geometry) if self.coding == "entropy" else 0
        chunks = kv.num_chunks(self.geometry)
        if chunks == 1 and not slot_bytes:
            return None
        page_bytes = slot_bytes + kv.EXCHANGE_BYTES + 4 * chunks
        return Scratch(min(num_pages, max(1, (nbytes or SCRATCH_BYTES) // page_bytes)), slot_bytes, chunks)

    def encode(
        self,
        pages_ptr: int,
        payloads_ptr: int,
        rows_ptr: int,
        num_pages: int,
        *,
        aligned: bool,
        scratch: Scratch | None,
        blocks: int | None = None,
        device_blocks: int | None = None,
        regions_ptr: int = 0,
        cursors_ptr: int = 0,
    ) -> None:
        """Encode ``num_pages`` pages; see ``raw.kv.encode``. ``scratch``: from ``new_scratch``.

        ``blocks``: of the kernel that writes payloads; ``device_blocks``: of those before it.
        """
        sort = self.dtype, self.geometry
        for first, count in _batches(num_pages, scratch):
            pages, payloads, rows = pages_ptr + 8 * first, payloads_ptr + 8 * first, rows_ptr + 16 * first
            packed = {"regions_ptr": regions_ptr and regions_ptr + 4 * first, "cursors_ptr": cursors_ptr}
            options = {"aligned": aligned, "device_blocks": device_blocks}
            if scratch:
                options |= {"exchange_ptr": scratch.exchange_ptr, "sizes_ptr": scratch.sizes_ptr}
            if self.coding != "entropy":
                options |= {"blocks": blocks, **packed}
                kv.encode(pages, payloads, rows, count, *sort, self.bounds, self.coding, **options)
                continue
            slots = scratch.slots_ptr, scratch.rows_ptr
            kv.encode(pages, *slots, count, *sort, self.bounds, "fixed", blocks=device_blocks, **options)
            kv.encode_entropy(
                pages, scratch.rows_ptr, scratch.slots_ptr, payloads, rows, count, *sort, self.tables,
                self._device_tables.data.ptr, aligned=aligned, blocks=self._entropy_blocks(blocks),
                device_blocks=self._entropy_blocks(device_blocks), **packed,
            )  # fmt: skip

    def decode(
        self,
        payloads_ptr: int,
        rows_ptr: int,
        pages_ptr: int,
        status_ptr: int,
        num_pages: int,
        *,
        aligned: bool,
        scratch: Scratch | None,
        blocks: int | None = None,
        device_blocks: int | None = None,
        on_host: bool = False,
    ) -> None:
        """Decode ``num_pages`` pages; see ``raw.kv.decode``. ``scratch``: from ``new_scratch``.

        ``on_host``: payloads lie in host memory. Those of coding ``entropy``, which are read in small pieces, are
        then brought to the device first. ``blocks``: of the kernels that read payloads there; ``device_blocks``:
        of those that read them on the device.
        """
        sort, entropy = (self.dtype, self.geometry), self.coding == "entropy"
        needed = kv.num_chunks(self.geometry) > 1 or (entropy and on_host)
        for first, count in _batches(num_pages, scratch if needed else None):
            payloads, rows = payloads_ptr + 8 * first, rows_ptr + 16 * first
            pages, status = pages_ptr + 8 * first, status_ptr + 4 * first
            if entropy and on_host:
                raw_copy.gather(
                    payloads, rows, scratch.slots_ptr, scratch.rows_ptr, count, self.geometry.nbytes, blocks
                )
                payloads, rows = scratch.slots_ptr, scratch.rows_ptr
            most = device_blocks if entropy or not on_host else blocks
            exchange, sizes = (scratch.exchange_ptr, scratch.sizes_ptr) if scratch else (0, 0)
            kv.decode(
                payloads, rows, pages, status, count, *sort,
                aligned=aligned, blocks=most, exchange_ptr=exchange, sizes_ptr=sizes,
            )  # fmt: skip
            if entropy:
                kv.decode_entropy(
                    payloads, rows, pages, status, count, *sort, self.tables, self._device_tables.data.ptr,
                    aligned=aligned, blocks=self._entropy_blocks(most),
                )  # fmt: skip

    def _entropy_blocks(self, blocks: int | None) -> int | None:
        """Blocks that have as many threads as ``blocks`` of the other kernels."""
        if blocks is None:
            return None
        return max(1, blocks * kv.block_threads(self.geometry) // kv.entropy_threads(self.geometry))


def _batches(num_pages: int, scratch: Scratch | None):
    """Yield (first page, number) of what there is scratch for at once."""
    step = scratch.num_pages if scratch else num_pages
    for first in range(0, num_pages, step):
        yield first, min(step, num_pages - first)


class Scratch:
    """Device memory, from CuPy's pool, for a number of pages: slots and table rows, and what blocks exchange."""

    def __init__(self, num_pages: int, slot_bytes: int, chunks: int):
        import cupy

        self.num_pages = num_pages
        self._exchange = cupy.zeros(num_pages * kv.EXCHANGE_BYTES, cupy.uint8)
        self._sizes = cupy.empty(num_pages * chunks, cupy.uint32)
        self._memory = cupy.empty(max(16, num_pages * slot_bytes), cupy.uint8)
        slots = np.uint64(self._memory.data.ptr) + np.arange(num_pages, dtype=np.uint64) * np.uint64(slot_bytes)
        self._slots, self._rows = cupy.asarray(slots), cupy.empty((num_pages, ROW_WORDS), cupy.uint32)
        self.slots_ptr, self.rows_ptr = self._slots.data.ptr, self._rows.data.ptr
        self.exchange_ptr, self.sizes_ptr = self._exchange.data.ptr, self._sizes.data.ptr
        arrays = self._exchange, self._sizes, self._memory, self._slots, self._rows
        self.nbytes = sum(array.nbytes for array in arrays)
