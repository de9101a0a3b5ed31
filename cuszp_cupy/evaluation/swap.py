"""Swapping pages to the host and back: every transport of ``SwapPipeline`` beside plain copies of the same pages.

Verified before it is timed: loaded pages against the reference's, and every transport's against each other's.
A *flow* is one direction of a run: batches one after the other, always more than one in flight.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from .. import reference
from ..arena import runs
from ..codec import pinned
from ..format import Geometry
from ..pipeline import HostRows, SwapPipeline
from ..raw import copy as raw_copy
from . import data, timing
from .codec import RMS_TOLERANCE, PageSet, check_within, page_error_over_eb
from .speed import DEVICE_TO_HOST, HOST_TO_DEVICE, NVCOMP, find_library, find_nvcomp

BATCH_BYTES = 256 << 20
NUM_BATCHES = 5  # of a run: the first one fills the pipeline, the others are timed
DEPTH = 3  # batches in flight where a flow goes on until something else is done
LOOP_PAGES = 4096  # of a batch copied with one call a page
LIBRARY_PAGES = 32  # of a call through libcuSZp, which takes some ten milliseconds for them
PAGE_KIB, QUICK_KIB = (4, 16, 64, 256, 2048), 64
#: where slots lie -> bytes of a row of theirs; None: the pipeline's arena
ROWS = {"arena": None, "rows 512 KiB": 512 << 10, "rows 2 MiB": 2 << 20, "scattered": 0}
DIRECTIONS = {"D2H": ("store",), "H2D": ("load",), "both": ("store", "load")}
#: name -> transport of the pipeline, and whether its fused kernels get a block a page
TRANSPORTS = {
    "staged": ("staged", False), "fused": ("fused", False), "fused, all blocks": ("fused", True),
    "auto": ("auto", False),
}  # fmt: skip
LARGE, RAW, LOOP = "large copy", "raw copy", "one call a page"
DESCRIPTORS = 20_000
ROW = (
    "page_kib", "slots", "direction", "transport", "used", "gbps", "spread_percent", "alone_gbps", "of_copy",
    "share", "link_gbps", "ratio", "overlap", "host_bytes", "host_ms", "mispredicted",
)  # fmt: skip


def gpu_rows(quick: bool, bound: str, coding: str, seconds: float, step=lambda text: None) -> dict:
    """Measure on the current GPU; ``seconds`` of timing a table section.

    Returns:
        ``rows`` (keys: ROW), ``ablation``, ``descriptors``, ``tax``, ``timeline``, and ``notes``.

    Raises:
        AssertionError: a page that came back wrong.
    """
    from . import tax

    host = pinned(2 * NUM_BATCHES * BATCH_BYTES)
    result = {"rows": [], "notes": []}
    if not raw_copy.has_batch():
        result["notes"].append("the driver has no cuMemcpyBatchAsync (CUDA 12.8): copies go one by one")
    for kib in (QUICK_KIB,) if quick else PAGE_KIB:
        pages = page_set(kib)
        for kind in list(ROWS)[:2] if quick else ROWS:
            if ROWS[kind] and ROWS[kind] < pages.geometry.nbytes:
                continue
            step(f"{pages.name}, {kind}: checking, then timing")
            case = Case(pages, kind, host, bound, coding)
            rows = case_rows(case, seconds)
            if kib == QUICK_KIB and kind == "arena":
                result["timeline"] = timeline(case)
                step(f"{pages.name}: one direction only")
                result["ablation"] = ablation_rows(case, seconds)
                result["tax"] = tax.tax_rows(case, seconds, result["notes"], step)
                step(f"{pages.name}: nvCOMP, libcuSZp")  # last: they keep device memory for good
                rows += nvcomp_rows(case, seconds, result["notes"])
                rows += library_rows(case, seconds, result["notes"])
            result["rows"] += sorted(rows, key=lambda row: list(DIRECTIONS).index(row["direction"]))
            case.swap.close()
            if case.swap.stats.failed_pages:
                raise AssertionError(f"{pages.name}, {kind}: pages came back damaged:\n{case.swap.stats}")
    step(f"{DESCRIPTORS} descriptors")
    result["descriptors"] = descriptor_rows(host, bound, coding)
    add_shares(result["rows"])
    return result


def page_set(kib: int) -> PageSet:
    """Return the sample as bfloat16 pages ``[tokens][heads][K|V]`` of ``kib`` KiB.

    4, 16 and 64 KiB are 16 tokens; larger pages take more. The sample being short, windows of 16 tokens of one
    layer repeat in a page with other signs (``data.tiled``).

    >>> page_set(256).geometry
    Geometry(tokens=64, channels=2048, outer=1, parts=(128, 128))
    """
    heads, head_size = {4: (1, 64), 16: (4, 64)}.get(kib, (8, 128))
    pages = data.packed_pages(heads, head_size)
    windows = (kib << 10) // pages[0].nbytes
    if windows > 1:
        layers = np.split(pages, len(data.kv_sample()))
        tiled = [data.tiled(layer, windows * layer[0].nbytes, seed) for seed, layer in enumerate(layers)]
        pages = np.stack(tiled).reshape(len(layers), -1, pages.shape[2])
    return PageSet(f"KV bf16 {kib} KiB", pages, Geometry(*pages.shape[1:], parts=(head_size, head_size)))


class Case:
    """Pages on the device, a pipeline, and slots: batch i goes to ``slots[0, i]`` and comes from ``slots[1, i]``.

    So no batch in flight waits for another one's slots. All batches are of the same pages ``x``, and come back to
    ``y``. The arena takes pages in their order; to rows and scattered slots they go in random order, as the
    blocks of a cache do. Rows are named as vLLM does: the first page of each, then the second of each.

    Args:
        kind: a key of ROWS.
        host: pinned memory for plain copies and for slots in rows.
    """

    def __init__(self, pages: PageSet, kind: str, host: np.ndarray, bound: str, coding: str):
        import cupy

        self.pages, self.kind, self.bound, self.coding, self._host = pages, kind, bound, coding, host
        size = pages.geometry.nbytes
        self.num = num = BATCH_BYTES // size
        slots, order, rng = np.arange(2 * NUM_BATCHES * num), np.arange(num), np.random.default_rng(0)
        if kind == "arena":  # room for slots in use, for what replaces them, and for holes
            options = {"arena_bytes": (2 * NUM_BATCHES + DEPTH) * BATCH_BYTES}
        else:
            per_row = ROWS[kind] // size or 1
            options = {"host": HostRows(host.ctypes.data, per_row * size, per_row, host)}
            order = rng.permutation(num)
        if kind == "scattered":  # each half of the host memory by itself: plain copies write to the first one
            slots = rng.permuted(slots.reshape(2, -1), axis=1)
        self.slots = slots.reshape(2, NUM_BATCHES, num)
        if ROWS[kind]:
            self.slots = layer_by_layer(self.slots, per_row)
        self.x = data.tiled(pages.pages, BATCH_BYTES, xp=cupy)
        self.y = cupy.empty_like(self.x)
        self.x_ptrs, self.y_ptrs = (pointers(array, order, size) for array in (self.x, self.y))
        self.swap = SwapPipeline(
            pages.geometry, "bfloat16", bound, coding, num_slots=slots.size, transport="staged", **options
        )
        self._fused_blocks = self.swap.fused_blocks
        self.swap.calibrate()
        self.stream, *streams = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        self._streams = dict(zip(("store", "load"), streams, strict=True))
        cupy.cuda.Device().synchronize()
        for i in range(NUM_BATCHES):
            self.transfers("load", "staged", prepare=True)(i).wait()

    def transfers(self, direction: str, transport: str, *, all_blocks: bool = False, prepare: bool = False):
        """Return a function that starts batch i and returns its ``Transfer``.

        ``prepare``: store what will be loaded.
        """
        swap, into = self.swap, int(direction == "load")

        def start(i: int):
            swap.fused_blocks = None if all_blocks else self._fused_blocks
            slots = self.slots[into, i % NUM_BATCHES]
            if into and not prepare:
                return swap.load(slots, self.y_ptrs, self.stream, transport=transport, join=False)
            return swap.store(self.x_ptrs, slots, self.stream, transport=transport, join=False)

        return start

    def copies(self, direction: str, what: str):
        """Return a function that starts the plain copy (LARGE, RAW, LOOP) of batch i and returns its ``Copy``."""
        import cupy

        store, stream, size = direction == "store", self._streams[direction], self.pages.geometry.nbytes
        kind, device = (DEVICE_TO_HOST, self.x_ptrs) if store else (HOST_TO_DEVICE, self.y_ptrs)
        calls = []
        for slots in self.slots[0 if store else 1]:
            on_host, on_device = self._host.ctypes.data + slots * size, device.astype(np.int64)
            if what == LARGE:
                at = self._host.ctypes.data + len(calls) * BATCH_BYTES + (0 if store else self._host.nbytes // 2)
                on_host, on_device = np.array([at]), np.array([(self.x if store else self.y).data.ptr])
            to, by = (on_host, on_device) if store else (on_device, on_host)
            width = np.full(len(to), BATCH_BYTES if what == LARGE else size)
            if what == LOOP:
                calls.append(list(zip(to[:LOOP_PAGES].tolist(), by[:LOOP_PAGES].tolist(), strict=True)))
            else:
                calls.append((to, by, width, runs(to, by, width)))

        def start(i: int) -> Copy:
            call = calls[i % NUM_BATCHES]
            if what == LOOP:
                for to, by in call:
                    cupy.cuda.runtime.memcpyAsync(to, by, size, kind, stream.ptr)
            else:
                raw_copy.copies(*call, kind, stream.ptr)
            done = cupy.cuda.Event()
            done.record(stream)
            return Copy(done)

        return start


def layer_by_layer(slots: np.ndarray, per_row: int) -> np.ndarray:
    """Return whole rows of slots in the order in which vLLM names them.

    >>> layer_by_layer(np.arange(6), 3).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    rows = slots.reshape(*slots.shape[:-1], -1, per_row)
    return rows.swapaxes(-1, -2).reshape(slots.shape)


def pointers(array, order, nbytes: int) -> np.ndarray:
    """Return the addresses of the pieces ``order`` of ``nbytes`` each."""
    return np.uint64(array.data.ptr) + order.astype(np.uint64) * np.uint64(nbytes)


@dataclass
class Copy:
    """A plain copy on its way."""

    done: object
    stats: None = None


# --- runs -------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What NUM_BATCHES batches of each flow took.

    Attributes:
        ms: of a batch, once the flows are steady.    alone_ms: of the first one, from the call on.
        host_ms: of each call.    used: transports.
        ratio, overlap (stage times over elapsed), link_bytes of a batch: of a pipeline's flows, else None.
    """

    ms: float
    alone_ms: float
    host_ms: list[float]
    used: str = ""
    ratio: float | None = None
    overlap: float | None = None
    link_bytes: float | None = None
    mispredicted: int = 0


def steady_ms(times: list[list[float]]) -> float:
    """Return the milliseconds a batch takes, from when the batches of each flow were done, the first not counted.

    >>> steady_ms([[5.0, 6.0, 7.0], [5.5, 6.5, 8.0]])  # two flows: until the slower one is through
    1.5
    """
    return (max(flow[-1] for flow in times) - min(flow[0] for flow in times)) / (len(times[0]) - 1)


def run(case: Case, starts) -> Run:
    """Run one flow for each of ``starts``, all at once; wait for them."""
    import cupy

    swap = case.swap
    swap.synchronize()
    if swap.arena:
        swap.drop(case.slots[0].ravel())
    missed, begin = swap.stats.mispredicted, cupy.cuda.Event()
    flows, host_ms = [[] for _ in starts], []
    begin.record(case.stream)
    for i in range(NUM_BATCHES):
        for flow, start in zip(flows, starts, strict=True):
            called = time.perf_counter()
            flow.append(start(i))
            host_ms.append(1e3 * (time.perf_counter() - called))
    times = [_times(begin, [batch.done for batch in flow]) for flow in flows]
    swap.synchronize()
    result = Run(steady_ms(times), max(flow[0] for flow in times), host_ms)
    stats = [batch.stats for flow in flows for batch in flow if batch.stats]
    if stats:
        result.used = "+".join(sorted({each.transport for each in stats}))
        result.ratio = sum(each.raw_bytes for each in stats) / sum(each.payload_bytes for each in stats)
        result.link_bytes = sum(each.link_bytes for each in stats) / len(stats)
        result.mispredicted = swap.stats.mispredicted - missed
        if swap.timing:
            result.overlap = sum(each.stage_ms for each in stats) / max(flow[-1] for flow in times)
    return result


def _times(origin, events) -> list[float]:
    """Wait for the events; return their times since ``origin``."""
    import cupy

    for event in (origin, *events):
        event.synchronize()
    return [cupy.cuda.get_elapsed_time(origin, event) for event in events]


class Feeder:
    """Keeps DEPTH batches of a flow in flight, as often as ``top_up`` is called."""

    def __init__(self, start):
        self._start, self._in_flight, self.events = start, deque(), []

    def top_up(self) -> None:
        """Start batches in place of those that are done."""
        while self._in_flight and timing.reached(self._in_flight[0]):
            self._in_flight.popleft()
        while len(self._in_flight) < DEPTH:
            event = self._start(len(self.events)).done
            self.events.append(event)
            self._in_flight.append(event)

    def times(self, origin) -> list[float]:
        """Wait for all batches; return when each was done, since ``origin``."""
        return _times(origin, self.events)


def rate_gbps(times: list[float], begin: float, end: float, nbytes: int) -> float | None:
    """Return the speed of a flow between two times, from when its batches were done; None: too few of them.

    >>> rate_gbps([1.0, 3.0, 5.0, 9.0], 2.0, 6.0, 4_000_000)
    2.0
    """
    inside = [t for t in times if begin <= t <= end]
    return (len(inside) - 1) * nbytes / (inside[-1] - inside[0]) / 1e6 if len(inside) > 1 else None


# --- tables -----------------------------------------------------------------------------------------------
def case_rows(case: Case, seconds: float) -> list[dict]:
    """Verify every transport, time them in turns with the plain copies, return the rows."""
    starts, facts = {}, {}
    good = None
    for name, (transport, all_blocks) in TRANSPORTS.items():
        host_bytes, decoded = check(case, transport, all_blocks, good)
        good = decoded if good is None else good
        for direction, ways in DIRECTIONS.items():
            key = direction, name
            starts[key] = [case.transfers(way, transport, all_blocks=all_blocks) for way in ways]
            case.swap.timing = True
            facts[key] = {"overlap": run(case, starts[key]).overlap, "host_bytes": host_bytes}
            case.swap.timing = False
    num_bytes = {}
    for name in (LARGE, RAW) + ((LOOP,) if case.kind == "scattered" else ()):
        for direction, ways in DIRECTIONS.items():
            starts[direction, name] = [case.copies(way, name) for way in ways]
            facts[direction, name] = {"host_bytes": BATCH_BYTES, "ratio": 1.0}
            if name == LOOP:
                num_bytes[direction, name] = min(LOOP_PAGES, case.num) * case.pages.geometry.nbytes
    check_copies(case)
    logs = {key: [] for key in starts}

    def sampler(key):
        def sample() -> float:
            logs[key].append(run(case, starts[key]))
            return logs[key][-1].ms

        return sample

    times = timing.interleaved({key: sampler(key) for key in starts}, seconds)
    rows = []
    for (direction, name), timed in times.items():
        key = direction, name
        taken = logs[key][-timed.num_samples :]  # without those that warmed up
        nbytes, flows = num_bytes.get(key, BATCH_BYTES), len(starts[key])
        link_bytes = taken[-1].link_bytes or nbytes
        values = {
            "page_kib": case.pages.geometry.nbytes >> 10, "slots": case.kind, "direction": direction,
            "transport": name, "used": taken[-1].used, "gbps": flows * nbytes / timed.ms / 1e6,
            "spread_percent": timed.spread_percent,
            "alone_gbps": flows * nbytes / statistics.median(each.alone_ms for each in taken) / 1e6,
            "link_gbps": flows * link_bytes / timed.ms / 1e6, "ratio": taken[-1].ratio,
            "host_ms": statistics.median(ms for each in taken for ms in each.host_ms),
            "mispredicted": sum(each.mispredicted for each in taken),
        }  # fmt: skip
        rows.append(dict.fromkeys(ROW) | values | facts[key])
    return rows


def library_rows(case: Case, seconds: float, notes: list[str]) -> list[dict]:
    """Verify and time the baseline, ``engine="library"``; return a row each way, by the wall clock of calls.

    Without libcuSZp: no rows, and a line in ``notes``.
    """
    import cupy

    if not find_library(notes):
        return []
    notes.append(
        f"libcuSZp in the swap table: blocking calls (wall clock) for {LIBRARY_PAGES} pages, one after the other "
        "by way of float32; host MB: of these pages"
    )
    geometry, slots = case.pages.geometry, np.arange(LIBRARY_PAGES)
    x, y, nbytes = case.x[:LIBRARY_PAGES], case.y[:LIBRARY_PAGES], LIBRARY_PAGES * geometry.nbytes
    swap = SwapPipeline(geometry, "bfloat16", case.bound, num_slots=LIBRARY_PAGES, engine="library")
    with swap:
        y.view(cupy.uint16).fill(0x7FFF)  # NaN: a page that is not written shows
        done = {"D2H": swap.store(x, slots), "H2D": swap.load(slots, y)}
        done["H2D"].wait()
        error = page_error_over_eb(x, y, case.bound, geometry.parts, cupy)
        # rounding to bfloat16 comes on top, and at most doubles the error (library_swap.py)
        check_within(error, f"{case.pages.name}, libcuSZp", 1 + RMS_TOLERANCE)
        host_bytes = swap.memory()["arena_used_bytes"]
        calls = {"D2H": lambda: swap.store(x, slots), "H2D": lambda: swap.load(slots, y)}
        times = timing.interleaved({key: timing.wall(call) for key, call in calls.items()}, seconds)
    stats = {direction: transfer.stats for direction, transfer in done.items()}
    return [
        call_row(case, "libcuSZp", direction, timed, nbytes, stats[direction].link_bytes)
        | {"used": stats[direction].transport, "ratio": stats[direction].ratio, "host_bytes": host_bytes}
        for direction, timed in times.items()
    ]


def nvcomp_rows(case: Case, seconds: float, notes: list[str]) -> list[dict]:
    """Verify and time nvCOMP's ANS and a copy of its bytes; return a row each way, by the wall clock of calls.

    Without nvCOMP: no rows, and a line in ``notes``.
    """
    import cupy

    nvcomp = find_nvcomp(notes)
    if not nvcomp:
        return []
    notes.append(
        "nvCOMP in the swap table: ANS, lossless, of a whole batch as one array; coding and copy one after the "
        "other (wall clock), so that ratio x link is what overlapping them would give at most"
    )
    x = case.x.view(cupy.uint8).reshape(-1)
    cupy.cuda.Device().synchronize()  # nvCOMP works on a stream of its own
    ans, array = nvcomp.Codec(**NVCOMP), nvcomp.as_array(x)
    back = cupy.asarray(ans.encode(array)).view(cupy.uint8).reshape(-1).copy()  # on the device, from the host
    host, stream = pinned(back.nbytes), cupy.cuda.Stream(non_blocking=True)

    def copy(target: int, source: int, kind: int) -> None:
        cupy.cuda.runtime.memcpyAsync(target, source, back.nbytes, kind, stream.ptr)
        stream.synchronize()

    def store() -> None:
        encoded = cupy.asarray(ans.encode(array))
        cupy.cuda.Device().synchronize()
        copy(host.ctypes.data, encoded.data.ptr, DEVICE_TO_HOST)

    def load():
        copy(back.data.ptr, host.ctypes.data, HOST_TO_DEVICE)
        return ans.decode(nvcomp.as_array(back))

    store()
    back.fill(0)
    if not bool((cupy.asarray(load()).view(cupy.uint8).reshape(-1) == x).all()):
        raise AssertionError(f"{case.pages.name}: nvCOMP ANS did not bring the bytes back")
    times = timing.interleaved({"D2H": timing.wall(store), "H2D": timing.wall(load)}, seconds)
    return [
        call_row(case, "nvCOMP ANS", direction, timed, x.nbytes, back.nbytes)
        | {"used": "nvCOMP", "ratio": x.nbytes / back.nbytes, "host_bytes": back.nbytes}
        for direction, timed in times.items()
    ]


def call_row(case: Case, name: str, direction: str, timed: timing.Timing, nbytes: int, link_bytes: int) -> dict:
    """Return what all rows of blocking calls have."""
    return dict.fromkeys(ROW) | {
        "page_kib": case.pages.geometry.nbytes >> 10, "slots": case.kind, "direction": direction,
        "transport": name, "gbps": nbytes / timed.ms / 1e6, "spread_percent": timed.spread_percent,
        "link_gbps": link_bytes / timed.ms / 1e6, "host_ms": timed.ms, "mispredicted": 0,
    }  # fmt: skip


def add_shares(rows: list[dict]) -> None:
    """Set ``of_copy``, speed over that of the best large copy of that direction in ``rows``, and ``share`` of it
    times the ratio."""
    best = {}
    for row in rows:
        if row["transport"] == LARGE:
            best[row["direction"]] = max(best.get(row["direction"], 0.0), row["gbps"])
    for row in rows:
        row["of_copy"] = row["gbps"] / best[row["direction"]]
        row["share"] = row["of_copy"] / row["ratio"]


def check(case: Case, transport: str, all_blocks: bool, good) -> tuple[int, object]:
    """Store a batch, load it back, compare; return (host bytes it took, the pages that came back).

    Args:
        good: what another transport brought back; None: compare some pages with the reference's.
    """
    import cupy

    swap, what = case.swap, f"{case.pages.name}, {case.kind}, {transport}"
    swap.synchronize()
    if swap.arena:
        swap.drop(case.slots[0].ravel())
    before = swap.memory().get("arena_used_bytes")
    swap.fused_blocks = None if all_blocks else case._fused_blocks
    stored = swap.store(case.x_ptrs, case.slots[0, 0], transport=transport)
    stored.wait()
    host_bytes = BATCH_BYTES if before is None else swap.memory()["arena_used_bytes"] - before
    case.y.view(cupy.uint16).fill(0x7FFF)  # NaN: a page that is not written shows
    swap.load(case.slots[0, 0], case.y_ptrs, transport=transport).wait()
    if stored.transport == "raw":
        expected = case.x
    elif good is not None:
        expected = good
    else:
        expected = case.y.view(cupy.uint16).copy()
        for i in np.linspace(0, case.num - 1, 4 if case.num > 1024 else 2).astype(int):
            page = cupy.asnumpy(case.x[i].view(cupy.uint16)).view(case.pages.pages.dtype)
            blob = reference.encode_page(page, case.bound, case.coding, geometry=case.pages.geometry)
            wanted = reference.decode_page(blob).view(np.uint16)
            if not np.array_equal(cupy.asnumpy(case.y[i].view(cupy.uint16)), wanted):
                raise AssertionError(f"{what}: page {i} did not come back as the reference decodes it")
    if not same_bits(case.y, expected):
        raise AssertionError(f"{what}: pages came back other than they should")
    return host_bytes, None if stored.transport == "raw" else expected


def check_copies(case: Case) -> None:
    """Compare what a raw copy brings back; raise AssertionError."""
    import cupy

    case.y.view(cupy.uint16).fill(0x7FFF)
    cupy.cuda.Device().synchronize()
    ways, slots = DIRECTIONS["both"], case.slots
    case.slots = np.stack([slots[0], slots[0]])  # back from where it went
    for way in ways:
        case.copies(way, RAW)(0).done.synchronize()
    case.slots = slots
    if not same_bits(case.x, case.y):
        raise AssertionError(f"{case.pages.name}, {case.kind}: a raw copy did not bring the pages back")


def same_bits(a, b) -> bool:
    """Return whether two device arrays of 16-bit values are the same, bit for bit."""
    import cupy

    return bool((a.view(cupy.uint16) == b.view(cupy.uint16)).all())


def ablation_rows(case: Case, seconds: float) -> list[dict]:
    """Return how fast both directions go at once, with the codec in both, one or none of them.

    Returns:
        dicts of ``store`` and ``load`` (``staged`` or ``raw``), ``store_gbps``, ``load_gbps``, ``gbps`` (both):
        medians of raw bytes a second, while both flows are under way.
    """
    raw = NUM_BATCHES // 2  # batches to load that are stored raw; the others are encoded
    for i in range(raw):
        case.transfers("load", "raw", prepare=True)(i).wait()
    logs = {}

    def sampler(store, load):
        speeds = logs[store, load] = []
        loaded = case.transfers("load", load)
        first, num = (0, raw) if load == "raw" else (raw, NUM_BATCHES - raw)
        starts = case.transfers("store", store), lambda i: loaded(first + i % num)

        def sample() -> float:
            speeds.append(both_gbps(case, starts))
            return 2 * BATCH_BYTES / sum(speeds[-1]) / 1e6

        return sample

    modes = ("raw", "raw"), ("staged", "raw"), ("raw", "staged"), ("staged", "staged")
    times = timing.interleaved({mode: sampler(*mode) for mode in modes}, seconds)
    rows = []
    for (store, load), timed in times.items():
        taken = logs[store, load][-timed.num_samples :]
        each = [statistics.median(speeds) for speeds in zip(*taken, strict=True)]
        rows.append(
            {"store": store, "load": load, "store_gbps": each[0], "load_gbps": each[1],
             "gbps": statistics.median(map(sum, taken)), "spread_percent": timed.spread_percent}
        )  # fmt: skip
    for i in range(raw):
        case.transfers("load", "staged", prepare=True)(i).wait()
    return rows


def both_gbps(case: Case, starts) -> tuple[float, float]:
    """Return the speeds of two flows while both are under way, however much faster one is."""
    import cupy

    case.swap.synchronize()
    case.swap.drop(case.slots[0].ravel())
    origin, feeders = cupy.cuda.Event(), [Feeder(start) for start in starts]
    origin.record(case.stream)
    while min(len(feeder.events) for feeder in feeders) < 2 * NUM_BATCHES:
        for feeder in feeders:
            feeder.top_up()
    times = [feeder.times(origin) for feeder in feeders]
    window = max(flow[0] for flow in times), min(flow[-1] for flow in times)
    return tuple(rate_gbps(flow, *window, BATCH_BYTES) for flow in times)


def timeline(case: Case) -> list[dict]:
    """Return the stages of one staged store and one staged load of a batch, each by itself.

    Returns:
        dicts of ``direction``, ``stage`` (encode, copy, decode), ``begin_ms``, ``end_ms``.
    """
    import cupy

    stages, elapsed = [], cupy.cuda.get_elapsed_time
    case.swap.timing = True
    for direction, names in (("store", ("encode", "copy")), ("load", ("copy", "decode"))):
        case.swap.synchronize()
        transfer = case.transfers(direction, "staged")(0)
        transfer.done.synchronize()
        for i, (begin, end) in enumerate(transfer._stages):  # nothing was called since, so they are still there
            times = {f"{what}_ms": elapsed(transfer._start, at) for what, at in (("begin", begin), ("end", end))}
            stages.append({"direction": direction, "stage": names[i % 2]} | times)
        transfer.wait()
    case.swap.timing = False
    return stages


def descriptor_rows(
    host: np.ndarray, bound: str, coding: str, num: int = DESCRIPTORS, calls: int = 7
) -> list[dict]:
    """Return the host's time for calls of ``num`` pages of 64 KiB given by their addresses, rows of 512 KiB.

    Returns:
        dicts of ``direction``, ``descriptors``, ``host_ms``, ``largest_host_ms`` (the first call, which warms up,
        not counted), ``gbps`` from call to done, and ``device_growth_bytes`` over all calls after the first.
    """
    import cupy

    pages = page_set(QUICK_KIB)
    size, per_row = pages.geometry.nbytes, ROWS["rows 512 KiB"] // pages.geometry.nbytes
    num -= num % per_row
    x = data.tiled(pages.pages, num * size, xp=cupy)
    order = np.random.default_rng(0).permutation(num)
    rows, stream = HostRows(host.ctypes.data, per_row * size, per_row, host), cupy.cuda.Stream(non_blocking=True)
    swap = SwapPipeline(pages.geometry, "bfloat16", bound, coding, num_slots=num, transport="staged", host=rows)
    cupy.cuda.Device().synchronize()
    addresses, slots, results = pointers(x, order, size), layer_by_layer(np.arange(num), per_row), []
    for direction in DIRECTIONS["both"]:
        host_ms, gbps = [], []
        for _ in range(calls):
            begin = cupy.cuda.Event()
            begin.record(stream)
            called = time.perf_counter()
            arguments = (addresses, slots) if direction == "store" else (slots, addresses)
            transfer = getattr(swap, direction)(*arguments, stream, transport="staged", join=False)
            host_ms.append(1e3 * (time.perf_counter() - called))
            gbps.append(num * size / _times(begin, [transfer.done])[0] / 1e6)
            transfer.wait()
            if len(host_ms) == 1:
                free = cupy.cuda.runtime.memGetInfo()[0]
        results.append(
            {"direction": direction, "transport": transfer.transport, "descriptors": num,
             "host_ms": statistics.median(host_ms[1:]), "largest_host_ms": max(host_ms[1:]),
             "gbps": statistics.median(gbps[1:]),
             "device_growth_bytes": free - cupy.cuda.runtime.memGetInfo()[0]}
        )  # fmt: skip
    swap.close()
    return results
