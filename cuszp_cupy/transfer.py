"""What a pipeline hands out and what its calls are made of: handles, arguments, streams, stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .codec import aligned_to, failures
from .format import ROW_WORDS, FormatError
from .raw import copy as raw_copy
from .stats import TransferStats


class Transfer:
    """A store or load on its way.

    Attributes:
        done: CuPy event behind all of its work.
        direction, transport: what it is; ``slots``: (num_pages,) int64, in the order it went.
        stats: ``TransferStats`` once it has finished, else None.
        failed: slot -> reason, of the pages of a load that came back damaged; once it has finished.
        error: the exception that cut the call short, if one did.
    """

    def __init__(self, pipeline, direction, transport, owner):
        event = pipeline._cupy.cuda.Event
        self.done, self._start, self._ready = event(), event(), event(disable_timing=True)
        self.direction, self.transport, self.slots = direction, transport, np.zeros(0, np.int64)
        self.stats: TransferStats | None = None
        self.failed: dict[int, str] = {}
        self.error: BaseException | None = None
        self._pipeline, self._owner, self._block = pipeline, owner, None
        self._number, self._regions, self._stages = 0, None, []

    def query(self) -> bool:
        """Return whether it has finished; waits for nothing."""
        if self.stats is None:
            with self._pipeline._lock:
                if self.stats is None:
                    self._pipeline._reap()
        return self.stats is not None

    def wait(self) -> None:
        """Wait until it has finished.

        Raises:
            FormatError: damaged pages, all of them named; the others are good.
        """
        if self.stats is None:
            self.done.synchronize()
            self.query()
        if self.failed:
            reasons = "; ".join(f"slot {slot}: {reason}" for slot, reason in sorted(self.failed.items()))
            raise FormatError(f"{len(self.failed)} of {len(self.slots)} pages are damaged: {reasons}")

    def wait_on(self, stream) -> None:
        """Make ``stream`` (CuPy's, torch's, or its address) wait for it."""
        self._pipeline._runtime.streamWaitEvent(stream_pointer(stream), self.done.ptr)

    def _complete(self, payload_bytes: int, link_bytes: int) -> None:
        elapsed = self._pipeline._cupy.cuda.get_elapsed_time
        stage_ms = sum(elapsed(begin, end) for begin, end in self._stages) if self._pipeline.timing else None
        for pair in self._stages:
            self._pipeline._stage_events.extend(pair)
        self._stages = []
        num = len(self.slots)
        self.stats = TransferStats(
            self.transport, num, num * self._pipeline.page_bytes, payload_bytes, link_bytes,
            elapsed(self._start, self.done), stage_ms,
        )  # fmt: skip

    def __repr__(self) -> str:
        state = "done" if self.stats else "cut short" if self.error else "in flight"
        return f"<Transfer: {self.direction} of {len(self.slots)} pages, {self.transport}, {state}>"


class Prepared:
    """A fused store or load that only enqueues kernels, over and over; see ``SwapPipeline.prepare_store``."""

    def __init__(self, pipeline, direction, num_pages: int, owner):
        self.direction, self._pipeline, self._owner = direction, pipeline, owner
        self._scratch = pipeline._codec.new_scratch(num_pages)
        pipeline._cupy.cuda.get_current_stream().synchronize()  # it is filled there
        self._block = pipeline._take_block(num_pages)

    def hold(self, slots, pointers) -> Prepared:
        """Take ``slots`` for these pages; return itself."""
        self.slots, self._aligned = slots, aligned_to(pointers, 8)
        pipeline, block = self._pipeline, self._block
        block.slots[:], block.pages[:] = slots, pointers
        block.payloads[:] = pipeline.table.regions(slots) + pipeline._shift
        stream = pipeline._lanes["store"].codec
        block.upload("slots", "payloads", stream)
        stream.synchronize()
        pipeline.table.hold(slots)
        return self

    def launch(self) -> None:
        """Enqueue it on CuPy's current stream, which may be capturing. Compiles at the first call: warm up."""
        pipeline, at, num = self._pipeline, self._block.device_pointers, len(self.slots)
        if self.direction == "store":
            pipeline._kv_encode(at, 0, num, self._aligned, self._scratch, on_host=True, cursors=False)
            raw_copy.publish(at["rows"], at["slots"], pipeline._table_ptr, num)
        else:
            raw_copy.collect(pipeline._table_ptr, at["slots"], at["rows"], num)
            pipeline._kv_decode(at, 0, num, self._aligned, self._block.status_ptr, self._scratch, on_host=True)

    def failed(self) -> dict[int, str]:
        """Return slot -> reason of the pages that the last load found damaged; wait for the stream before."""
        if self.direction == "store":
            return {}
        return {int(self.slots[i]): reason for i, reason in failures(self._block.status).items()}

    def close(self) -> None:
        """Wait for the device, then let go of the slots, which keep their content.

        Graphs with it must not be launched again.
        """
        if self._block is not None:
            self._pipeline._cupy.cuda.Device().synchronize()  # what was launched reads the arguments
            with self._pipeline._lock:
                self._pipeline.table.let_go(self.slots)
                self._pipeline._put_block(self._block)
                self._block = None


class Block:
    """The arguments of one call, in pinned memory and as a copy on the device: BYTES a page.

    What a store uploads is hosts to payloads, what a load uploads is slots to rows.
    """

    FIELDS = (
        ("hosts", np.uint64, 1), ("works", np.uint64, 1), ("copied", np.uint32, 1), ("cursors", np.uint32, 1),
        ("regions", np.uint32, 1), ("slots", np.uint32, 1), ("pages", np.uint64, 1), ("payloads", np.uint64, 1),
        ("rows", np.uint32, ROW_WORDS), ("status", np.uint32, 1),
    )  # fmt: skip
    BYTES = sum(np.dtype(dtype).itemsize * width for _, dtype, width in FIELDS)

    def __init__(self, capacity, pinned, device, mapped):
        self.capacity, self._pinned, self._device, self._mapped = capacity, pinned, device, mapped
        self._num = None  # pages that it is laid out for

    def lay_out(self, num: int) -> Block:
        """Divide the memory for ``num`` pages: the fields become arrays of that length."""
        if num == self._num:
            return self
        self._num = num
        padded, offset, self._offsets, self.device_pointers = -(-num // 4) * 4, 0, {}, {}
        for name, dtype, width in self.FIELDS:
            nbytes = np.dtype(dtype).itemsize * width
            field = self._pinned[offset : offset + num * nbytes].view(dtype)
            setattr(self, name, field.reshape(-1, width) if width > 1 else field)
            self._offsets[name] = offset, offset + num * nbytes
            self.device_pointers[name] = self._device.ptr + offset
            offset += padded * nbytes
        self.status_ptr = self._mapped + self._offsets["status"][0]  # kernels write it on the host
        return self

    def upload(self, first: str, last: str, stream) -> None:
        """Copy the fields from ``first`` to ``last`` to the device, on ``stream``."""
        begin, end = self._offsets[first][0], self._offsets[last][1]
        with stream:
            raw_copy.fetch(self._mapped + begin, self._device.ptr + begin, end - begin)


@dataclass
class Buffer:
    """A tile of the ring: ``ready`` when filled, ``free`` when read."""

    address: int
    ready: object
    free: object


class Lane:
    """The streams of one kind of transfer, which finish in the order of the calls."""

    def __init__(self, streams, loads: int, buffers, join, last, scratch):
        self.streams = streams  # done events are recorded on the last
        self.codec, self.copy = streams[-1 if loads else 0], streams[0 if loads else -1]
        self.buffers, self.join, self.scratch = buffers, join, scratch
        self.last = last  # number of the last transfer on each slot (arena) or row
        self.newest = self._next = 0  # number of the last transfer

    def next_buffer(self) -> Buffer:
        self._next += 1
        return self.buffers[self._next % len(self.buffers)]


class Stage:
    """An NVTX range around the calls and, with ``timing``, events around the work."""

    def __init__(self, transfer, name: str, stream):
        self._transfer, self._name, self._stream = transfer, name, stream
        self._pipeline = transfer._pipeline

    def __enter__(self):
        self._pipeline._cupy.cuda.nvtx.RangePush(self._name)
        if self._pipeline.timing:
            self._record()

    def __exit__(self, *_):
        if self._pipeline.timing:
            begin, end = self._begin, self._record()
            self._transfer._stages.append((begin, end))
        self._pipeline._cupy.cuda.nvtx.RangePop()

    def _record(self):
        pool = self._pipeline._stage_events
        self._begin = pool.pop() if pool else self._pipeline._cupy.cuda.Event()
        self._pipeline._runtime.eventRecord(self._begin.ptr, self._stream.ptr)
        return self._begin


def stream_pointer(stream) -> int:
    for name in ("ptr", "cuda_stream"):  # CuPy's, torch's
        if hasattr(stream, name):
            return getattr(stream, name)
    if not isinstance(stream, int):
        raise TypeError(f"stream: expected a CuPy or torch stream or its address, got {type(stream).__name__}")
    return stream
