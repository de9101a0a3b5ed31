"""LibrarySwap: what ``SwapPipeline(engine="library")`` works with, the baseline through the user's libcuSZp.

libcuSZp (``raw/library.py``) knows one array of float32 at a time and nothing else. So a page is widened to
float32 on the device, compressed in mode ``fixed``, and its stream copied to pinned host memory; on the way back
the stream is copied in, decompressed and rounded to the page's type. Pages stay apart, so that any one of them
can be loaded. **Everything is synchronous**: a call waits for the caller's stream, libcuSZp makes the whole
device idle for each page, and the call returns when all is done. Widening and rounding go through groups of
pages, so their cost is small beside the library's.

The bound: a stream has one eb, so it is the smaller one of K and V. It holds in float32 (format.py, 1.6c).
Rounding to the page's type comes on top, unlike with our kernels: |x - y| <= eb + half a unit in the last place,
though never more than 2 eb, x being a value of that type itself. Where float32 gets too coarse for eb, from
|x| = 2^22 eb on, 16 bits are so much coarser that x itself comes back. -0.0 comes back as 0.0. There is no
checksum: of damage in host memory only wrong rate bytes are noticed.

Stored raw, bit for bit: a page whose stream would not be smaller; one with a NaN, an Inf or a value of 2^31 eb or
more, which the quantiser would lose; one whose eb is no normal float32 number (as under ``rel``, where a part is
constant but not 0).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .arena import Arena, runs
from .bound import Bound, parse_parts
from .codec import _cupy, pinned
from .format import FormatError, Geometry
from .page_table import reserve_after
from .raw import copy as raw_copy
from .raw import library
from .stats import Counters
from .transfer import Transfer

MODE = "fixed"
GROUP_BYTES = 8 << 20  # pages widened at once; takes some ten times as much device memory
METADATA_BYTES = 16  # of a page, counted as our kernels' are: place, size, eb
_DEVICE_TO_DEVICE = 3  # cudaMemcpyKind
_LARGEST = {"float16": np.float32(65504), "bfloat16": np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}


class LibrarySwap:
    """Pages to pinned host memory and back through libcuSZp, one by one; see the module.

    ``SwapPipeline`` makes it, checks what its callers give, and lets only one of them in at a time.

    Args:
        geometry, dtype, bound: as in ``SwapPipeline``.
        num_slots: slots there are.
        arena_bytes: pinned bytes; by default a quarter more than the slots' raw size. A store takes the raw size
            of its pages until it has finished.

    Attributes:
        table: ``Slots``.    stats: ``Counters``.

    Raises:
        LibraryError: no usable library.    RuntimeError: no CuPy or no GPU.    MemoryError: no pinned memory.
    """

    def __init__(self, geometry: Geometry, dtype: str, bound, *, num_slots: int, arena_bytes: int | None = None):
        library.load()
        self._cupy = _cupy()
        self._runtime = self._cupy.cuda.runtime
        self.geometry, self.dtype, self.page_bytes = geometry, dtype, geometry.nbytes
        self.bounds = parse_parts(bound, len(geometry.part_values))
        self.table = Slots(num_slots, geometry.nbytes, arena_bytes)
        self._host = pinned(self.table.arena.nbytes)
        self._stream = self._cupy.cuda.Stream()  # blocking: in order with the null stream, which libcuSZp is on
        self.stats = Counters()
        self.timing, self._stage_events = False, []  # for Transfer

    def store(self, pointers: np.ndarray, slots: np.ndarray, caller: int, transport=None) -> Transfer:
        """Compress the pages at ``pointers`` (device addresses) into distinct ``slots``; return when it is done.

        ``caller``: address of the stream that is waited for first.    ``transport``: None or ``auto``.

        Raises:
            ValueError: another transport.    RuntimeError: closed.
            MemoryError: no room in the arena; nothing has changed.
            LibraryError: libcuSZp failed; ``slots`` hold nothing then.
        """
        check_options(transport=transport)
        transfer = self._begin("store", slots, caller)
        self.table.reserve(slots)
        try:
            with self._stream:
                for some in self._groups(slots.size):
                    self._compress(pointers[some], slots[some].tolist())
                self._end(transfer, slots)
        except BaseException as error:
            self.table.abandon(slots)
            self._fail(transfer, error)
            raise
        self.stats.raw_pages += int((self.table.eb[slots] == 0).sum())
        return transfer

    def load(self, slots: np.ndarray, pointers: np.ndarray, caller: int, transport=None) -> Transfer:
        """Decompress ``slots``, none of them empty, to the pages at ``pointers``; return when it is done.

        ``Transfer.failed`` names pages whose stream is damaged; they are not written.

        Raises:
            ValueError: another transport.    RuntimeError: closed.    LibraryError: libcuSZp failed.
        """
        check_options(transport=transport)
        transfer = self._begin("load", slots, caller)
        try:
            with self._stream:
                for some in self._groups(slots.size):
                    transfer.failed |= self._decompress(slots[some].tolist(), pointers[some])
                self._end(transfer, slots)
        except BaseException as error:
            self._fail(transfer, error)
            raise
        self.stats.failed_pages += int(np.isin(slots, list(transfer.failed)).sum())
        return transfer

    def drop(self, slots: np.ndarray) -> None:
        """Forget what distinct ``slots`` hold; raise RuntimeError if closed."""
        self._check_open()
        self.table.drop(slots)

    def memory(self) -> dict[str, int | float]:
        """Return the pinned bytes in use; raise RuntimeError if closed. libcuSZp's own 900 MB are not counted."""
        self._check_open()
        arena = self.table.arena
        return {
            "arena_bytes": arena.nbytes,
            "arena_used_bytes": arena.nbytes - arena.free_bytes,
            "fragmentation": arena.fragmentation,
        }

    def close(self) -> None:
        """Give the pinned memory back. Further calls raise RuntimeError."""
        self._host = None

    # --- pages --------------------------------------------------------------------------------------------
    def _compress(self, pointers, slots) -> None:
        cupy, runtime, values = self._cupy, self._runtime, self.geometry.values
        bits = cupy.empty((len(slots), values), cupy.uint16)
        self._copy_pages(self._rows(bits), pointers)
        x = self._float32_rows(len(slots))
        x[:, :values] = widen(bits, self.dtype, cupy)
        ranges = measure(x[:, :values], self.geometry, cupy).get()
        ebs = page_ebs(ranges, self.geometry, self.bounds).tolist()
        for i, (slot, eb) in enumerate(zip(slots, ebs, strict=True)):
            source, nbytes = int(pointers[i]), self.page_bytes
            if eb:
                data, nbytes = library.compress_array(x[i, :values], eb, MODE)
                source = data.data.ptr
            if nbytes >= self.page_bytes:
                source, nbytes, eb = int(pointers[i]), self.page_bytes, 0.0
            to = self._host.ctypes.data + self.table.put(slot, nbytes, eb)
            # `data` may go: the pool hands its memory out again on this stream only, behind the copy
            runtime.memcpyAsync(to, source, nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)

    def _decompress(self, slots, pointers) -> dict[int, str]:
        cupy, runtime, values = self._cupy, self._runtime, self.geometry.values
        y, decoded, failed = self._float32_rows(len(slots)), [], {}
        for i, slot in enumerate(slots):
            nbytes, eb = int(self.table.nbytes[slot]), float(self.table.eb[slot])
            data = cupy.empty(nbytes, cupy.uint8) if eb else None
            to = data.data.ptr if eb else int(pointers[i])
            source = self._host.ctypes.data + int(self.table.offset[slot])
            runtime.memcpyAsync(to, source, nbytes, runtime.memcpyHostToDevice, self._stream.ptr)
            if eb:
                try:
                    library.decompress_array(data, values, "float32", eb, MODE, y[i, :values])
                    decoded.append(i)
                except FormatError as error:
                    failed[slot] = str(error)
        if decoded:
            bits = narrow(y[cupy.asarray(decoded), :values], self.dtype, cupy)
            self._copy_pages(pointers[decoded], self._rows(bits))
        return failed

    def _float32_rows(self, num: int):
        """Return a float32 CuPy array of ``num`` pages; its rows are 16-byte aligned, as libcuSZp wants them."""
        return self._cupy.empty((num, -(-self.geometry.values // 4) * 4), self._cupy.float32)

    def _rows(self, array) -> np.ndarray:
        return array.data.ptr + np.arange(len(array)) * self.page_bytes

    def _copy_pages(self, to, source) -> None:
        pieces = to.astype(np.int64), source.astype(np.int64), np.full(len(to), self.page_bytes)
        raw_copy.copies(*pieces, runs(*pieces), _DEVICE_TO_DEVICE, self._stream.ptr)

    def _groups(self, num: int) -> list[slice]:
        step = max(1, GROUP_BYTES // self.page_bytes)
        return [slice(first, first + step) for first in range(0, num, step)]

    # --- calls --------------------------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self._host is None:
            raise RuntimeError("the pipeline is closed")

    def _begin(self, direction: str, slots, caller: int) -> Transfer:
        self._check_open()
        transfer = Transfer(self, direction, "library", None)
        transfer.slots = slots
        self._runtime.streamSynchronize(caller)
        transfer._start.record(self._stream)
        return transfer

    def _end(self, transfer: Transfer, slots) -> None:
        transfer.done.record(self._stream)
        transfer.done.synchronize()
        nbytes = int(self.table.nbytes[slots].sum())
        transfer._complete(nbytes + METADATA_BYTES * slots.size, nbytes)
        getattr(self.stats, transfer.direction).add(transfer.stats)

    def _fail(self, transfer: Transfer, error: BaseException) -> None:
        transfer.error = error
        self.stats.failed_calls += 1


class Slots:
    """Where the pages of slots lie in an arena, and what they need to be decoded. Bytes; NumPy only.

    Attributes:
        arena: ``Arena``.
        offset, nbytes: of each slot's page, (num_slots,) int64; nbytes is 0 for an empty slot.
        eb: of its stream, (num_slots,) float32; 0 for a raw page.
    """

    def __init__(self, num_slots: int, page_bytes: int, arena_bytes: int | None = None):
        self._slot_bytes = _padded(page_bytes)
        if arena_bytes is None:
            arena_bytes = -(-5 * num_slots // 4) * self._slot_bytes
        if arena_bytes < self._slot_bytes:
            raise ValueError(f"arena_bytes: expected at least one page ({self._slot_bytes}), got {arena_bytes}")
        self.arena = Arena(arena_bytes)
        self.offset, self.nbytes = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)
        self.eb = np.zeros(num_slots, np.float32)
        self._room: list[list[int]] = []  # what `reserve` took: next offset, pages still to come, end

    def reserve(self, slots: np.ndarray) -> None:
        """Empty distinct ``slots`` and take room for as many raw pages, which ``put`` then hands out.

        Raises:
            MemoryError: too little is free, the old content of ``slots`` included; nothing has changed.
        """
        num, ranges, fewer = slots.size, [self._ranges(slots)], ", or store fewer pages at once"
        offsets, pages = reserve_after(self.arena, ranges, num, self._slot_bytes, max(num, 1), fewer)
        self.nbytes[slots] = 0
        ends = offsets + pages * self._slot_bytes
        self._room = [list(each) for each in zip(offsets.tolist(), pages.tolist(), ends.tolist(), strict=True)]

    def put(self, slot: int, nbytes: int, eb: float) -> int:
        """Give ``slot`` the next ``nbytes``, a raw page's at most, of the reserved room; return their offset."""
        room = self._room[0]
        offset = room[0]
        room[0] += _padded(nbytes)
        room[1] -= 1
        if not room[1]:
            self._close_room()
        self.offset[slot], self.nbytes[slot], self.eb[slot] = offset, nbytes, eb
        return offset

    def abandon(self, slots: np.ndarray) -> None:
        """Empty distinct ``slots`` and give back the room that is still reserved: a store went wrong."""
        while self._room:
            self._close_room()
        self.drop(slots)

    def drop(self, slots: np.ndarray) -> None:
        """Empty distinct ``slots``."""
        self.arena.release(*self._ranges(slots))
        self.nbytes[slots] = 0

    def _close_room(self) -> None:
        start, _, end = self._room.pop(0)
        self.arena.release(np.array([start]), np.array([end]))

    def _ranges(self, slots):
        """Return what ``slots`` hold of the arena, as (starts, ends)."""
        return self.offset[slots], self.offset[slots] + _padded(self.nbytes[slots])


def _padded(nbytes):
    return -(-nbytes // 16) * 16


# --- arithmetic, in the array module xp (NumPy or CuPy) ---------------------------------------------------
def widen(bits, dtype: str, xp=np):
    """Return 16-bit patterns of ``dtype`` as float32, exactly."""
    if dtype == "float16":
        return bits.view(xp.float16).astype(xp.float32)
    return (bits.astype(xp.uint32) << 16).view(xp.float32)


def narrow(y, dtype: str, xp=np):
    """Return float32 values (no NaN) rounded to the nearest finite value of ``dtype``, as 16-bit patterns."""
    y = xp.clip(y, -_LARGEST[dtype], _LARGEST[dtype])
    if dtype == "float16":
        return y.astype(xp.float16).view(xp.uint16)
    bits = y.view(xp.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(xp.uint16)  # ties to even


def measure(x, geometry: Geometry, xp=np):
    """Return (num_pages, parts, 3) float64: lowest and highest value and sum of squares of each part.

    Args:
        x: (num_pages, values) float32. The sum is finite if and only if all values are.
    """
    parts = [x]
    if geometry.parts:
        turns, width = x.reshape(len(x), -1, sum(geometry.parts)), geometry.parts[0]
        parts = [turns[..., :width], turns[..., width:]]
    ranges = []
    for part in parts:
        axes = tuple(range(1, part.ndim))
        squares = xp.square(part, dtype=xp.float64).sum(axis=axes)
        low, high = (extreme.astype(xp.float64) for extreme in (part.min(axis=axes), part.max(axis=axes)))
        ranges.append(xp.stack([low, high, squares], axis=-1))
    return xp.stack(ranges, axis=1)


def page_ebs(ranges: np.ndarray, geometry: Geometry, bounds: tuple[Bound, ...]) -> np.ndarray:
    """Return the eb of each page, (num_pages,) float32, never above any of its parts'; 0: store it raw.

    Under ``rel`` and ``rms`` a part of zeros has no say, as any eb brings zeros back.

    Args:
        ranges: from ``measure``, as a NumPy array.
        bounds: one a part.

    >>> ranges = np.array([[[-3.0, 2.0, 4.0 * 32], [-1.0, 1.0, 0.25 * 32]]])  # a page: K's RMS is 2, V's is 0.5
    >>> page_ebs(ranges, Geometry(16, 4, parts=(2, 2)), parse_parts("rms:0.25", 2))
    array([0.125], dtype=float32)
    """
    low, high, squares = np.moveaxis(ranges, -1, 0)
    ebs = np.empty(low.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.maximum(abs(low), abs(high))
        for part, (bound, n) in enumerate(zip(bounds, geometry.part_values, strict=True)):
            if bound.kind == "abs":
                ebs[:, part] = bound.value
                continue
            scale = high - low if bound.kind == "rel" else np.sqrt(squares / n)
            ebs[:, part] = np.where(largest[:, part] > 0, bound.value * scale[:, part], np.inf)
        exact = ebs.min(axis=1)
        exact[exact == np.inf] = 1.0
        eb = exact.astype(np.float32)
        eb = np.where(eb > exact, np.nextafter(eb, np.float32(0)), eb)
        usable = np.isfinite(squares).all(axis=1) & (eb >= np.finfo(np.float32).tiny)
        usable &= largest.max(axis=1) < 2.0**31 * eb.astype(np.float64)
    return np.where(usable, eb, np.float32(0))


def check_options(coding="fixed", transport: str | None = "auto", host=None, timing: bool = False) -> None:
    """Raise ValueError for what engine ``library`` does not have, and LibraryError where libcuSZp is missing."""
    for name, given, only in (
        ("coding", coding, ("fixed",)),
        ("transport", transport, ("auto", None)),
        ("host", host, (None,)),
        ("timing", timing, (False,)),
    ):
        if given not in only:
            raise ValueError(
                f"{name}: engine 'library' copies pages one by one to an arena of its own and takes only "
                f"{only[0]!r}, the default; got {given!r}; leave it out, or use engine='kernels'"
            )
    library.load()
