"""PageCodec: the launches that encode and decode batches of pages of one sort. Pointers in; nothing waits.

Coding ``entropy`` takes two launches for what ``fixed`` does in one: first ``fixed`` to scratch slots, which also
chooses the steps, then the streams. So it works on as many pages at a time as there is scratch for.
"""

from __future__ import annotations

import numpy as np

from .format import ROW_WORDS, Geometry
from .raw import copy as raw_copy
from .raw import kv
from .tables import BUILT_IN, Tables

SCRATCH_BYTES = 192 << 20  # a thousand pages of 64 KiB: with fewer, most of the GPU waits for single lanes


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
        """Return scratch for batches of ``num_pages``, or None if the coding needs none.

        At most about ``nbytes`` (SCRATCH_BYTES when None). One scratch serves one stream.
        """
        if self.coding != "entropy":
            return None
        slot_bytes = kv.entropy_slot_bytes(self.geometry)
        return Scratch(min(num_pages, max(1, (nbytes or SCRATCH_BYTES) // slot_bytes)), slot_bytes)

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
        regions_ptr: int = 0,
        cursors_ptr: int = 0,
    ) -> None:
        """Encode ``num_pages`` pages; see ``raw.kv.encode``. ``scratch``: from ``new_scratch``."""
        if self.coding != "entropy":
            kv.encode(
                pages_ptr, payloads_ptr, rows_ptr, num_pages, self.dtype, self.geometry, self.bounds, self.coding,
                aligned=aligned, blocks=blocks, regions_ptr=regions_ptr, cursors_ptr=cursors_ptr,
            )  # fmt: skip
            return
        for first in range(0, num_pages, scratch.num_pages):
            count = min(scratch.num_pages, num_pages - first)
            kv.encode(
                pages_ptr + 8 * first, scratch.slots_ptr, scratch.rows_ptr, count, self.dtype, self.geometry,
                self.bounds, "fixed", aligned=aligned, blocks=blocks,
            )  # fmt: skip
            kv.encode_entropy(
                pages_ptr + 8 * first, scratch.rows_ptr, scratch.slots_ptr, payloads_ptr + 8 * first,
                rows_ptr + 16 * first, count, self.dtype, self.geometry, self.tables,
                self._device_tables.data.ptr, aligned=aligned, blocks=self._entropy_blocks(blocks),
                regions_ptr=regions_ptr and regions_ptr + 4 * first, cursors_ptr=cursors_ptr,
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
        blocks: int | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Decode ``num_pages`` pages; see ``raw.kv.decode``.

        ``scratch``: brings payloads of coding ``entropy`` to the device first, which pays where they lie in host
        memory: streams are read in small pieces.
        """
        if self.coding != "entropy":
            kv.decode(
                payloads_ptr, rows_ptr, pages_ptr, status_ptr, num_pages, self.dtype, self.geometry,
                aligned=aligned, blocks=blocks,
            )  # fmt: skip
            return
        step = scratch.num_pages if scratch else num_pages
        for first in range(0, num_pages, step):
            count = min(step, num_pages - first)
            payloads, rows = payloads_ptr + 8 * first, rows_ptr + 16 * first
            if scratch:
                raw_copy.gather(
                    payloads, rows, scratch.slots_ptr, scratch.rows_ptr, count, self.geometry.nbytes, blocks
                )
                payloads, rows = scratch.slots_ptr, scratch.rows_ptr
            pages, status = pages_ptr + 8 * first, status_ptr + 4 * first
            kv.decode(
                payloads, rows, pages, status, count, self.dtype, self.geometry, aligned=aligned, blocks=blocks
            )
            kv.decode_entropy(
                payloads, rows, pages, status, count, self.dtype, self.geometry, self.tables,
                self._device_tables.data.ptr, aligned=aligned, blocks=self._entropy_blocks(blocks),
            )  # fmt: skip

    def _entropy_blocks(self, blocks: int | None) -> int | None:
        """Blocks that have as many threads as ``blocks`` of the other kernels."""
        if blocks is None:
            return None
        return max(1, blocks * kv.block_threads(self.geometry) // kv.entropy_threads(self.geometry))


class Scratch:
    """Slots in device memory, and table rows, for a number of pages. Allocated from CuPy's pool."""

    def __init__(self, num_pages: int, slot_bytes: int):
        import cupy

        self.num_pages = num_pages
        self._memory = cupy.empty(num_pages * slot_bytes, cupy.uint8)
        slots = np.uint64(self._memory.data.ptr) + np.arange(num_pages, dtype=np.uint64) * np.uint64(slot_bytes)
        self._slots, self._rows = cupy.asarray(slots), cupy.empty((num_pages, ROW_WORDS), cupy.uint32)
        self.slots_ptr, self.rows_ptr = self._slots.data.ptr, self._rows.data.ptr
        self.nbytes = self._memory.nbytes + self._slots.nbytes + self._rows.nbytes
