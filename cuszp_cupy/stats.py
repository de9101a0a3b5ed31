"""What a pipeline has done: counters of pages, bytes and time, each way."""

from __future__ import annotations

from dataclasses import dataclass, field


class _Speed:
    """What follows from ``raw_bytes``, ``payload_bytes`` and ``elapsed_ms``."""

    @property
    def ratio(self) -> float:
        """Raw over payload bytes (1 for no pages)."""
        return self.raw_bytes / self.payload_bytes if self.payload_bytes else 1.0

    @property
    def gbps(self) -> float:
        """Raw bytes over elapsed time, in 1e9 bytes a second."""
        return self.raw_bytes / self.elapsed_ms / 1e6 if self.elapsed_ms else 0.0


@dataclass
class TransferStats(_Speed):
    """One store or load, once it has finished. Bytes; milliseconds of the GPU's clock.

    Attributes:
        pages, raw_bytes: what the caller asked for.
        payload_bytes: the same pages encoded, 16 bytes of metadata each counted.
        link_bytes: what crossed the link; not the metadata and arguments, some 70 bytes a page.
        elapsed_ms: from the first of its work, ready to run, to its last.
        stage_ms: sum of the times of its copies and kernels, with ``timing=True``; else None.
    """

    transport: str
    pages: int
    raw_bytes: int
    payload_bytes: int
    link_bytes: int
    elapsed_ms: float
    stage_ms: float | None = None

    @property
    def overlap(self) -> float | None:
        """Stage times over elapsed time: 1 for one stage after the other, more where they overlap."""
        return self.stage_ms / self.elapsed_ms if self.stage_ms is not None and self.elapsed_ms else None


@dataclass
class Direction(_Speed):
    """Sums over the transfers of one direction; see ``TransferStats``."""

    calls: int = 0
    pages: int = 0
    raw_bytes: int = 0
    payload_bytes: int = 0
    link_bytes: int = 0
    elapsed_ms: float = 0.0  # transfers that overlap count each
    stage_ms: float = 0.0
    staged_ms: float = 0.0  # elapsed_ms of those that have stage_ms
    transports: dict[str, int] = field(default_factory=dict)  # pages by transport

    def add(self, transfer: TransferStats) -> None:
        """Count one finished transfer."""
        self.calls += 1
        for name in ("pages", "raw_bytes", "payload_bytes", "link_bytes", "elapsed_ms"):
            setattr(self, name, getattr(self, name) + getattr(transfer, name))
        if transfer.stage_ms is not None:
            self.stage_ms += transfer.stage_ms
            self.staged_ms += transfer.elapsed_ms
        self.transports[transfer.transport] = self.transports.get(transfer.transport, 0) + transfer.pages

    @property
    def overlap(self) -> float | None:
        """Stage times over elapsed times; None without ``timing=True``."""
        return self.stage_ms / self.staged_ms if self.staged_ms else None

    def __str__(self) -> str:
        text = (
            f"{self.calls} calls, {self.pages} pages, {self.raw_bytes / 1e6:.1f} MB raw, "
            f"{self.payload_bytes / 1e6:.1f} MB encoded (ratio {self.ratio:.2f}), "
            f"{self.link_bytes / 1e6:.1f} MB over the link, {self.gbps:.1f} GB/s"
        )
        return text if self.overlap is None else f"{text}, overlap {self.overlap:.2f}"


@dataclass
class Counters:
    """Everything a pipeline counts; finished transfers only.

    Attributes:
        store, load: sums each way.
        raw_pages: pages that did not shrink, or that went through transport ``raw``.
        unsupported_pages: pages that a caller kept away from the codec; the pipeline leaves it at 0.
        mispredicted: regions of staged stores that came out longer than predicted (a kernel moved the rest).
        failed_pages: pages that came back damaged, a slot that a load names twice counting twice.
        failed_calls: calls that an error cut short.
    """

    store: Direction = field(default_factory=Direction)
    load: Direction = field(default_factory=Direction)
    raw_pages: int = 0
    unsupported_pages: int = 0
    mispredicted: int = 0
    failed_pages: int = 0
    failed_calls: int = 0

    def __str__(self) -> str:
        return (
            f"store: {self.store}\nload: {self.load}\n"
            f"{self.raw_pages} raw pages, {self.unsupported_pages} unsupported, "
            f"{self.mispredicted} lengths mispredicted, {self.failed_pages} pages damaged, "
            f"{self.failed_calls} calls failed"
        )
