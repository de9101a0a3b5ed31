"""A serving engine's KV pages by way of ``SwapPipeline``: which are compressed, where, what became of them.

Knows vLLM's terms, but imports neither vLLM nor torch: ``vllm_patch`` brings their objects. Tensors are used by
``shape``, ``stride()``, ``data_ptr()`` and, on the CPU, as NumPy arrays.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .arena import by_row, changes
from .arena import runs as copy_runs
from .bound import parse_parts
from .codec import pinned
from .format import Geometry, check_coding
from .pipeline import TILES, TRANSPORTS, HostRows, tile_limit
from .raw import copy as raw_copy

MOST_PIPELINES = 4  # each has streams and a ring of its own
PIECE_PAGES = 4096  # that the GPU starts on while the host plans the next ones of a call, four times as many
AT_ONCE = 64  # pages that a verifier fetches and checks: few, so that they stay in the caches
ATTENTION = ("FullAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec")
NEVER, RAW, HELD = range(3)  # what a slot was last written by: nothing, vLLM's function, the pipeline
#: why vLLM's function moves a descriptor; "" where the tensor is no run's
REASONS = (
    "", "no whole page", "uninstalled", "no device memory for arguments", "stored uncompressed", "never stored",
)  # fmt: skip

_log = logging.getLogger("vllm.cuszp_cupy")  # below "vllm", so that vLLM's handlers show it


# --- settings ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """What the variables say, checked; see ``configure``."""

    bound: str = "rms:0.05"
    coding: str = "fixed"
    transport: str = "staged"
    layers: str = ""
    verify: float = 0.0
    ring_mb: int = 1024
    stats_dir: str = ""

    @classmethod
    def read(cls, environ=os.environ) -> Settings:
        """Return the settings of the environment; raise ValueError, naming the variable, where one is wrong."""
        values = {}
        for name, variable in VARIABLES.items():
            text = environ.get(variable, "").strip()
            try:
                if text:
                    values[name] = _CHECKS.get(name, str)(text)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{variable}={text!r}: {error}") from None
        return cls(**values)

    def bound_of(self, names) -> tuple[str, str] | None:
        """Return the (K, V) bounds of the layers ``names``, or None if they stay raw.

        Raises:
            ValueError: layers that share memory, with different bounds.
        """
        per_layer = _layers(self.layers)
        found = {per_layer.get(_layer_number(name), self.bound) for name in names}
        if len(found) > 1:
            raise ValueError(f"layers {', '.join(names)} share memory and need one bound, got {sorted(found)}")
        (bound,) = found
        return None if bound == "raw" else _pair(bound)


VARIABLES = {setting.name: f"CUSZP_{setting.name.upper()}" for setting in fields(Settings)}


def _pair(text: str) -> tuple[str, str]:
    """``rms:0.05``, K and V apart ``rms:0.05/rms:0.1``, or a preset: as (K, V)."""
    return tuple(str(bound) for bound in parse_parts(text, 2))


def _layers(text: str) -> dict[int, str]:
    """Return layer number -> bound or ``raw``.

    >>> _layers("0-1,5=raw; 30=rms:0.02/rms:0.04")
    {0: 'raw', 1: 'raw', 5: 'raw', 30: 'rms:0.02/rms:0.04'}
    """
    found = {}
    for rule in filter(None, (rule.strip() for rule in text.split(";"))):
        match = re.fullmatch(r"([\d,\s-]+)=(.+)", rule)
        if not match:
            raise ValueError(f"expected rules like '0-1,5=raw' or '30=rms:0.02', got {rule!r}")
        if match[2].strip() != "raw":
            _pair(match[2])
        for piece in match[1].split(","):
            first, _, last = piece.strip().partition("-")
            if not first.isdigit() or not (last or first).isdigit():
                raise ValueError(f"expected layer numbers like '3' or '0-7', got {piece.strip()!r}")
            found.update(dict.fromkeys(range(int(first), int(last or first) + 1), match[2].strip()))
    return found


def _layer_number(name: str) -> int | None:
    """The number in ``model.layers.12.self_attn.attn``."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def _checked(check):
    def keep(text):
        check(text)
        return text

    return keep


def _check_transport(text: str) -> None:
    if text not in TRANSPORTS:
        raise ValueError(f"expected one of {', '.join(TRANSPORTS)}")


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError("expected a share of pages from 0 to 1")
    return share


def _megabytes(text: str) -> int:
    if int(text) < 1:
        raise ValueError("expected at least 1")
    return int(text)


_CHECKS = {
    "bound": _checked(_pair), "coding": _checked(check_coding), "transport": _checked(_check_transport),
    "layers": _checked(_layers), "verify": _share, "ring_mb": _megabytes,
}  # fmt: skip


def configure(**settings) -> Settings:
    """Set up what workers that start from now on do; return all settings. Sets the ``CUSZP_*`` variables.

    Args:
        bound: for every layer, as ``bound.parse_parts`` takes it: ``rms:0.05``, a pair (K, V), as text ``K/V``,
            or a preset like ``as-fp8``.
        coding: ``fixed``, ``entropy`` or ``raw``.    transport: of ``SwapPipeline``.
        layers: bounds of some layers, by number: ``{0: "raw", "1-3": "rms:0.02"}``, or the text
            ``"0=raw;1-3=rms:0.02"``. Each stretch of neighbours that differs from the next takes a pipeline of
            its own, four at most; what is beyond stays raw.
        verify: keep a raw copy beside each page and check each loaded one against it; waits at each transfer
            and takes as much memory as vLLM's CPU cache: for tests. True, or the share of pages that are also
            compared with what the reference makes of them.
        ring_mb: device memory of a worker for tiles, in MiB, at most; outside vLLM's budget; pipelines share it.
            Whenever one of a prefill's kernels ends, a tile is encoded: of 256 MiB, less where this is under 640
            (of ``entropy`` 32 MiB, an eighth of this at most): less makes stores slower.
        stats_dir: a folder where each worker writes its ``stats``, as ``cuszp-PID.json``, once a second.

    Raises:
        TypeError, ValueError: an unknown setting, or a wrong value; nothing is set then.
    """
    unknown = settings.keys() - VARIABLES.keys()
    if unknown:
        raise TypeError(f"configure: expected {', '.join(VARIABLES)}, got {', '.join(sorted(unknown))}")
    texts = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = ";".join(f"{layers}={_text(bound)}" for layers, bound in value.items())
        texts[VARIABLES[name]] = _text(value)
    read = Settings.read({**os.environ, **texts})
    os.environ.update(texts)
    return read


def _text(value) -> str:
    if isinstance(value, (tuple, list)):
        return "/".join(str(part) for part in value)
    return str(float(value)) if isinstance(value, bool) else str(value)


# --- which pages ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """How a layer's pages are to be read."""

    geometry: Geometry
    dtype: str


def layer_kinds(kv_cache_config, kv_caches) -> list[tuple[str, int, Kind | str]]:
    """Return (layer, address of its first page, ``Kind`` or why its pages stay raw), for all KV layers."""
    kinds = []
    for group in kv_cache_config.kv_cache_groups:
        per_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            spec, view = per_layer.get(name, group.kv_cache_spec), kv_caches.get(name)
            if isinstance(view, (list, tuple)):  # state tensors, which share a page
                view = view[0] if view else None
            if view is not None:
                kinds.append((name, view.data_ptr(), page_kind(spec, view)))
    return kinds


def page_kind(spec, view) -> Kind | str:
    """Return how to read the pages of a layer, or why they stay raw.

    Args:
        spec: the layer's ``kv_cache_spec``.
        view: its KV tensor as vLLM's backends see it, ``[blocks, heads, tokens, K then V]`` in any order of
            memory; a page may be several blocks of it.
    """
    if type(spec).__name__ not in ATTENTION:
        return f"{type(spec).__name__}, no K and V of attention"
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in ("float16", "bfloat16") or str(view.dtype) != str(spec.dtype) or int(spec.kv_quant_mode):
        return f"KV cache of {dtype}, quantised already"
    packing = (getattr(spec, name, None) for name in ("num_head_slots", "state_content_bytes"))
    if any(value is not None for value in packing) or getattr(spec, "tokens_per_state", 1) != 1:
        return "pages packed by the attention backend"
    heads, k_width = spec.num_kv_heads, spec.head_size
    v_width = getattr(spec, "head_size_v", None) or k_width
    width = k_width + v_width
    shape, strides = tuple(view.shape), tuple(view.stride())
    if len(shape) != 4 or (shape[1], shape[3]) != (heads, width) or spec.block_size % shape[2]:
        return f"KV tensor of shape {shape}, not [blocks, {heads} heads, tokens, {width}]"
    tokens = shape[2]
    if strides != (tokens * heads * width, width, heads * width, 1) and strides != (
        tokens * heads * width, tokens * width, width, 1,
    ):  # fmt: skip
        return f"KV tensor of strides {strides}, neither tokens nor heads outermost and dense"
    tokens_first = strides[2] == heads * width
    page_bytes = 2 * spec.block_size * heads * width
    if spec.page_size_bytes != page_bytes:
        return f"pages of {spec.page_size_bytes} bytes, {page_bytes} of them used"
    if page_bytes % 16:
        return f"pages of {page_bytes} bytes, no multiple of 16"
    try:
        if tokens_first:
            geometry = Geometry(spec.block_size, heads * width, parts=(k_width, v_width))
        else:
            geometry = Geometry(tokens, width, heads * (spec.block_size // tokens), (k_width, v_width))
    except ValueError as error:
        return str(error)
    return Kind(geometry, dtype)


@dataclass
class Tensor:
    """A tensor of vLLM's offloading: a page a block on the GPU, ``width`` bytes a chunk on the CPU."""

    names: list[str]
    kind: Kind | str
    bound: tuple[str, str] | None
    gpu: int
    gpu_bytes: int
    page_bytes: int
    cpu: int
    stride: int
    width: int
    num_rows: int

    def continues(self, last: Tensor) -> bool:
        """Whether its part of a row follows that of ``last``, and its pages are of the same sort."""
        same = "kind", "bound", "page_bytes", "stride", "width", "num_rows"
        return self.cpu == last.cpu + last.width and all(getattr(self, n) == getattr(last, n) for n in same)


def tensors_of(store_handler, kinds, settings: Settings) -> list[Tensor]:
    """Describe the tensors of a worker; ``kinds`` as from ``layer_kinds``."""
    tensors = []
    for gpu, cpu in zip(store_handler.src_tensors, store_handler.dst_tensors, strict=True):
        here = [(name, kind) for name, address, kind in kinds if address == gpu.data_ptr()]
        names = [name for name, _ in here]
        sorts = {kind for _, kind in here}
        page_bytes, bound = int(gpu.shape[1]), None
        kind = sorts.pop() if len(sorts) == 1 else "memory shared by layers of different sorts"
        if not here:
            kind = "memory of several layers, or of none"
        elif isinstance(kind, Kind):
            bound = settings.bound_of(names)
            if bound is None:
                kind = "raw by setting"
            elif kind.geometry.nbytes != page_bytes:
                kind = f"blocks of {page_bytes} bytes, pages of {kind.geometry.nbytes}"
        tensors.append(
            Tensor(
                names,
                kind,
                bound,
                gpu.data_ptr(),
                gpu.shape[0] * page_bytes,
                page_bytes,
                cpu.data_ptr(),
                cpu.stride(0),
                int(cpu.shape[1]),
                int(cpu.shape[0]),
            )  # fmt: skip
        )
    return tensors


class Taken(NamedTuple):
    """What a pipeline is to move, row by row: slots, addresses of pages, numbers of the descriptors.

    ``disjoint``: it is known that no pages overlap.
    """

    slots: np.ndarray
    pages: np.ndarray
    index: np.ndarray
    disjoint: bool = False


class Run:
    """Tensors side by side in vLLM's rows, pages of one sort and bound: the slots of one pipeline.

    Slots count pages as they lie; a row of the pipeline is vLLM's, or, where that exceeds a tile of the ring, a
    part of it.

    Args:
        ring_bytes, coding: the pipeline's.

    Raises:
        ValueError: no page fits the ring, or none is aligned as the pipeline needs it.
    """

    def __init__(self, tensors: list[Tensor], ring_bytes: int, coding: str):
        first = tensors[0]
        self.tensors, self.kind, self.bound = tensors, first.kind, first.bound
        self.page_bytes, self.base, self.stride = first.page_bytes, first.cpu, first.stride
        self.num_rows, self.row_pages = first.num_rows, len(tensors) * first.width // first.page_bytes
        if self.base % 16 or self.stride % 16:
            raise ValueError("CPU memory whose pages or rows are no multiples of 16 bytes apart")
        room = tile_limit(ring_bytes, coding) // self.page_bytes
        parts = [n for n in range(1, min(self.row_pages, room) + 1) if self.row_pages % n == 0]
        fit = [n for n in parts if n == self.row_pages or self.stride % (n * self.page_bytes) == 0]
        if not fit:
            raise ValueError(
                f"rows of {self.row_pages} pages of {self.page_bytes} bytes, {self.stride} bytes apart, and "
                f"tiles of {room} pages (a ring of {ring_bytes} bytes; {TILES[coding][2]} a tile at most)"
            )
        self.pages_per_row = max(fit)
        self.whole_rows = self.pages_per_row == self.row_pages
        row_bytes = self.pages_per_row * self.page_bytes
        self.host = HostRows(self.base, self.stride if self.whole_rows else row_bytes, self.pages_per_row)
        if self.whole_rows:
            self.num_slots = self.num_rows * self.row_pages
        else:
            extent = (self.num_rows - 1) * self.stride + self.row_pages * self.page_bytes
            self.num_slots = extent // self.page_bytes
        self.state = np.full(self.num_slots, NEVER, np.uint8)
        self._gpu = np.array([tensor.gpu for tensor in tensors])
        self._gpu_bytes = np.array([tensor.gpu_bytes for tensor in tensors])
        begin, end = np.sort(self._gpu), np.sort(self._gpu + self._gpu_bytes)
        self._apart = bool((begin[1:] >= end[:-1]).all())  # tensors, on the GPU
        self.pipeline = None
        self.verifier = None

    def turns(self, cpu: np.ndarray, gpu: np.ndarray, sizes: np.ndarray):
        """Return ``Taken``, all descriptors, where they are whole pages, no two the same, of the same blocks of
        each tensor in turn, as those of vLLM's calls are; else None. The first tensor's tell of all.
        """
        if not self._layer_by_layer(cpu, gpu, sizes):
            return None
        turn = np.arange(len(self.tensors))[:, None]
        first = len(cpu) // turn.size
        slots, whole, _ = self.find(cpu[:first], gpu[:first], sizes[:first])
        if not whole.all() or not np.diff(np.sort(gpu[:first])).all():
            return None
        order = by_row(slots // self.row_pages)
        slots = slots[order] + self.row_pages // turn.size * turn
        pages = gpu[order] + (self._gpu - self._gpu[0])[:, None]
        every = slots.T.ravel(), pages.T.ravel().astype(np.uint64), (order + first * turn).T.ravel()
        return Taken(*every, disjoint=True)

    def _layer_by_layer(self, cpu: np.ndarray, gpu: np.ndarray, sizes: np.ndarray) -> bool:
        """Whether descriptors name the same blocks of each tensor in turn, in rows that go whole."""
        first, num = self.tensors[0], len(self.tensors)
        if num == 1 or not len(cpu) or len(cpu) % num or not (self.whole_rows and self._apart):
            return False
        per = len(cpu) // num
        inside = (cpu[:per] - self.base) % self.stride
        return bool(
            (self._gpu_bytes == self._gpu_bytes[0]).all()
            and ((inside >= 0) & (inside < first.width)).all()
            and (cpu.reshape(num, per) - cpu[:per] == first.width * np.arange(num)[:, None]).all()
            and (gpu.reshape(num, per) - gpu[:per] == (self._gpu - self._gpu[0])[:, None]).all()
            and (sizes == self.page_bytes).all()
        )

    def find(self, cpu: np.ndarray, gpu: np.ndarray, sizes: np.ndarray):
        """Return (slots, which descriptors are whole pages of this run, which touch its slots at all)."""
        offset = cpu - self.base
        row = offset // self.stride  # by whole numbers, with remainders from there: much faster than np.divmod
        inside = offset - row * self.stride
        page = inside // self.page_bytes
        touch = (row >= 0) & (row < self.num_rows) & (page < self.row_pages)
        slots = row * self.row_pages + page if self.whole_rows else offset // self.page_bytes
        whole = (inside == page * self.page_bytes) & (sizes == self.page_bytes) & self._on_gpu(gpu, page)
        return slots, touch & whole, touch

    def _on_gpu(self, gpu: np.ndarray, page: np.ndarray) -> np.ndarray:
        """Whether addresses are pages of the very tensor that lies at ``page`` of a row."""
        each = self.row_pages // len(self.tensors)
        tensor = np.clip(page // each, 0, len(self.tensors) - 1)
        offset = gpu - self._gpu[tensor]
        whole = offset // self.page_bytes * self.page_bytes == offset
        return (offset >= 0) & (offset < self._gpu_bytes[tensor]) & whole

    def pieces(self, slots: np.ndarray, direction: str):
        """Yield slices of ``slots``, which lie row by row: PIECE_PAGES or more, whole rows together.

        One, where the pipeline has transfers in that direction to do meanwhile.
        """
        if slots.size <= PIECE_PAGES or self.pipeline.busy(direction):
            yield slice(0, slots.size)
            return
        starts = np.append(np.flatnonzero(changes(slots // self.pages_per_row)), slots.size)
        begin, most = 0, PIECE_PAGES
        while begin < slots.size:
            fits = int(np.searchsorted(starts, begin + most, side="right")) - 1
            end = int(max(starts[fits], starts[np.searchsorted(starts, begin) + 1]))
            yield slice(begin, end)
            begin, most = end, 4 * most

    def held(self, slots, whole, touch, why) -> np.ndarray:
        """Return which descriptors of a load the pipeline has; note in ``why`` what became of the others."""
        state = np.full(len(slots), NEVER, np.uint8)
        state[touch] = self.state[slots[touch]]
        if (touch & ~whole & (state == HELD)).any():
            raise RuntimeError("vLLM loads a part of a page that is stored compressed")
        why[touch & (state == RAW)] = REASONS.index("stored uncompressed")
        why[touch & (state == NEVER)] = REASONS.index("never stored")
        return whole & (state == HELD)

    def overwrite(self, slots, whole) -> None:
        """vLLM's function is about to write these slots: what shares a packed row with them is gone."""
        rows = np.unique(slots // self.pages_per_row)
        beside = (rows[:, None] * self.pages_per_row + np.arange(self.pages_per_row)).ravel()
        held = beside[self.state[beside] == HELD]
        if held.size:
            self.pipeline.drop(held)  # those that are not written now stay HELD: loading one raises
        self.state[slots[whole]] = RAW

    def where(self, slot: int) -> str:
        """Return the layer and chunk of a slot, for messages."""
        row_bytes = self.host.stride
        offset = slot // self.pages_per_row * row_bytes + slot % self.pages_per_row * self.page_bytes
        row, inside = divmod(offset, self.stride)
        return f"{', '.join(self.tensors[inside // self.tensors[0].width].names)}, chunk {row}"

    def warm(self) -> None:
        """Compile all kernels on a page of noise, before the first request. Leaves the first row empty. Waits."""
        import cupy

        noise = np.random.default_rng(0).standard_normal(self.page_bytes // 2).astype(np.float32)
        page = cupy.asarray(noise.astype(self.kind.dtype).view(np.uint8))
        row, pages = np.arange(self.pages_per_row), np.full(self.pages_per_row, page.data.ptr, np.uint64)
        stream, pipeline = cupy.cuda.get_current_stream(), self.pipeline
        for transport in {"fused", "staged" if pipeline.transport == "auto" else pipeline.transport}:
            pipeline.store(pages, row, stream, transport=transport).wait()
            pipeline.load(row[:1], pages[:1], stream, transport=transport).wait()
        pipeline.drop(row)
        pipeline.stats = type(pipeline.stats)()

    def describe(self) -> str:
        """Return what is compressed and how, for logs."""
        geometry, (k, v) = self.kind.geometry, self.bound
        order = "[heads][tokens][K|V]" if geometry.outer > 1 else "[tokens][heads][K|V]"
        return (
            f"{len(self.tensors)} KV tensors of {self.kind.dtype} pages of {self.page_bytes} bytes "
            f"({geometry.outer} x {geometry.tokens} tokens x {geometry.channels} channels, {order}, "
            f"{geometry.parts[0]}+{geometry.parts[1]}), {self.num_rows} chunks of {self.row_pages} pages, "
            f"packed by {self.pages_per_row}; bound K {k}, V {v}"
        )


def plan(tensors: list[Tensor], ring_bytes: int, coding: str = "fixed") -> tuple[list[Run], Counter]:
    """Return the runs to compress, in order of memory, and reason -> number of the tensors that stay raw."""
    raw = Counter(tensor.kind for tensor in tensors if isinstance(tensor.kind, str))
    stretches: list[list[Tensor]] = []
    for tensor in sorted((t for t in tensors if isinstance(t.kind, Kind)), key=lambda t: t.cpu):
        if stretches and tensor.continues(stretches[-1][-1]):
            stretches[-1].append(tensor)
        else:
            stretches.append([tensor])
    kept = sorted(stretches, key=len, reverse=True)[:MOST_PIPELINES]
    beyond = sum(len(stretch) for stretch in stretches if stretch not in kept)
    if beyond:
        raw[f"beyond {MOST_PIPELINES} stretches of tensors side by side"] += beyond
    runs = []
    for stretch in sorted(kept, key=lambda stretch: stretch[0].cpu):
        try:
            runs.append(Run(stretch, ring_bytes // len(kept), coding))
        except ValueError as error:
            raw[str(error)] += len(stretch)
    return runs, raw


# --- transfers --------------------------------------------------------------------------------------------
class Swap:
    """What a handler calls in place of vLLM's function: the same arguments, the same guarantees.

    All is enqueued on torch's current stream when it returns; the host does not wait.
    """

    def __init__(self, original, to_cpu: bool):
        self.original, self.to_cpu, self.urgent = original, to_cpu, False
        self.worker: Worker | None = None

    def __call__(self, src_ptrs, dst_ptrs, sizes, is_src_access_order_any=False) -> None:
        if self.worker is None:
            self.original(src_ptrs, dst_ptrs, sizes, is_src_access_order_any=is_src_access_order_any)
        elif len(sizes):
            self.worker.swap(self, src_ptrs, dst_ptrs, sizes, is_src_access_order_any)


@dataclass
class Worker:
    """The pipelines of one vLLM worker, for both directions of its transfers.

    Args:
        runs: with their pipelines.    settings: in force.
        current_stream: returns torch's.    device: context in which CuPy's device is the worker's.
        version: of vLLM.    storing: stores are compressed.    raw_tensors: from ``plan``.
    """

    runs: list[Run]
    settings: Settings
    current_stream: object
    device: object = contextlib.nullcontext
    version: str = ""
    storing: bool = True
    raw_tensors: Counter = field(default_factory=Counter)
    passed: dict[str, list[int]] = field(default_factory=dict)  # reason -> descriptors, bytes
    swaps: list[Swap] = field(default_factory=list)
    _loads: list = field(default_factory=list)
    _reported: float = 0.0

    def swap(self, swap: Swap, src, dst, sizes, any_order: bool) -> None:
        """Enqueue one call of vLLM: whole pages to the pipelines, the others to vLLM's function."""
        src_ptrs, dst_ptrs, nbytes = (np.asarray(array) for array in (src, dst, sizes))
        gpu, cpu = (src_ptrs, dst_ptrs) if swap.to_cpu else (dst_ptrs, src_ptrs)
        stream, transfers, way = self.current_stream(), [], "store" if swap.to_cpu else "load"
        rest, why = np.ones(len(cpu), bool), np.zeros(len(cpu), np.uint8)
        with self.device():
            try:
                for run in self.runs:
                    taken, left = self._take(swap, run, cpu, gpu, nbytes, why)
                    for some in run.pieces(taken.slots, way) if taken.slots.size else ():
                        slots, pages, index = taken.slots[some], taken.pages[some], taken.index[some]
                        if (transfer := self._start(swap, run, slots, pages, stream, taken.disjoint)) is None:
                            why[index] = REASONS.index("no device memory for arguments")
                            run.overwrite(slots, np.ones(slots.size, bool))
                            continue
                        transfers.append((run, transfer, slots, pages))
                        rest[index] = False
                    if left:
                        run.overwrite(*left)
                if rest.any():
                    self._pass(swap, src, dst, sizes, any_order, nbytes, rest, why)
            finally:  # what was begun goes on, whatever fails
                for _, transfer, _, _ in transfers:
                    transfer.wait_on(stream)
            for run, _, slots, pages in transfers:
                if run.verifier:
                    stream.synchronize()
                    (run.verifier.keep if swap.to_cpu else run.verifier.check)(slots, pages)

    def _take(self, swap: Swap, run: Run, cpu, gpu, nbytes, why):
        """Return what the pipeline takes (a copy: vLLM reuses its arrays), and (slots, which are whole) of what
        else a store writes to, if anything; note in ``why`` what keeps descriptors from it.
        """
        taken = run.turns(cpu, gpu, nbytes)
        if taken and (self.storing if swap.to_cpu else (run.state[taken.slots] == HELD).all()):
            return taken, None
        slots, whole, touch = run.find(cpu, gpu, nbytes)
        mine = self._storable(whole, touch, why) if swap.to_cpu else run.held(slots, whole, touch, why)
        index, left = np.flatnonzero(mine), touch & ~mine
        index = index[by_row(slots[index] // run.pages_per_row)]
        taken = Taken(slots[index], gpu[index].astype(np.uint64), index)
        return taken, (slots[left], whole[left]) if swap.to_cpu and left.any() else None

    def _storable(self, whole, touch, why) -> np.ndarray:
        """Return which descriptors of a store the pipeline takes; note in ``why`` what keeps the others."""
        why[touch & ~whole] = REASONS.index("no whole page")
        if self.storing:
            return whole
        why[whole] = REASONS.index("uninstalled")
        return np.zeros_like(whole)

    def _start(self, swap: Swap, run: Run, slots, pages, stream, disjoint: bool):
        if swap.to_cpu:
            run.state[slots] = HELD  # even if this fails: what vLLM had stored there may be overwritten in part
            try:
                return run.pipeline.store(pages, slots, stream, join=False)
            except MemoryError:  # vLLM's function needs none
                return None
        urgent = swap.urgent and self.settings.transport in ("auto", "staged")
        transport = "fused" if urgent else None  # has streams of its own, behind no bulk of loads
        transfer = run.pipeline.load(slots, pages, stream, transport=transport, join=False, disjoint=disjoint)
        self._loads.append((run, transfer))
        return transfer

    def _pass(self, swap: Swap, src, dst, sizes, any_order, nbytes, rest, why) -> None:
        """Hand what the pipelines do not take to vLLM's function, and count it."""
        for code in np.unique(why[rest]):
            some = rest & (why == code)
            count = self.passed.setdefault(REASONS[code] or self._other_reason(), [0, 0])
            count[0] += int(some.sum())
            count[1] += int(nbytes[some].sum())
        if not rest.all():
            index = np.flatnonzero(rest)
            src, dst, sizes = src[index], dst[index], sizes[index]
        swap.original(src, dst, sizes, is_src_access_order_any=any_order)

    def _other_reason(self) -> str:
        return "; ".join(self.raw_tensors) or "no page of a registered KV tensor"

    def check(self) -> None:
        """Raise RuntimeError if a load that has finished brought damaged pages."""
        damaged, left = [], []
        for run, transfer in self._loads:
            if not transfer.query():
                left.append((run, transfer))
            damaged += [f"{run.where(slot)}: {why}" for slot, why in transfer.failed.items()]
        self._loads = left
        if damaged:
            listed = "; ".join(damaged[:8]) + ("; ..." if len(damaged) > 8 else "")
            raise RuntimeError(
                f"{len(damaged)} KV pages came back damaged from CPU memory ({listed}). They must not be used, "
                "and vLLM's offloading can neither recompute them nor forget them: the engine stops. Restart "
                "it, and have the memory checked."
            )

    def report(self) -> None:
        """Write ``stats`` to the folder of the settings, once a second at most; warn once where that fails."""
        if self.settings.stats_dir and time.monotonic() - self._reported > 1:
            self._reported = time.monotonic()
            path = Path(self.settings.stats_dir) / f"cuszp-{os.getpid()}.json"
            try:
                path.with_suffix(".new").write_text(json.dumps(self.stats()), encoding="utf-8")
                path.with_suffix(".new").replace(path)  # whole, whenever it is read
            except OSError as error:  # no reason to stop a server
                self._reported = math.inf
                _log.warning("cuszp_cupy: no more stats are written: %s", error)

    def stats(self) -> dict:
        """Return what it has done; see ``vllm_patch.stats``."""
        names = "calls", "pages", "raw_bytes", "payload_bytes", "link_bytes", "elapsed_ms", "ratio", "gbps"
        pipelines = []
        for run in self.runs:
            counters = run.pipeline.stats
            both = {
                way: {name: getattr(getattr(counters, way), name) for name in names} for way in ("store", "load")
            }
            pages = {name: getattr(counters, name) for name in ("raw_pages", "failed_pages", "mispredicted")}
            checked = {"verified": run.verifier.counts()} if run.verifier else {}
            pipelines.append({"layers": run.describe(), **both, **pages, **checked})
        passed = {reason: {"descriptors": n, "bytes": size} for reason, (n, size) in self.passed.items()}
        return {
            "pid": os.getpid(), "vllm": self.version, "settings": vars(self.settings), "pipelines": pipelines,
            "passed_through": passed,
        }  # fmt: skip

    def close(self) -> None:
        """Wait for all transfers, say what was done, and give the memory back."""
        for run in self.runs:
            run.pipeline.synchronize()
        self._reported = 0.0
        self.report()
        for run in self.runs:
            counters = run.pipeline.stats
            _log.info("cuszp_cupy store: %s; load: %s", counters.store, counters.load)
        _log.info("cuszp_cupy passed through: %s", self.stats()["passed_through"] or "nothing")
        for run in self.runs:
            run.pipeline.close()
        for swap in self.swaps:
            swap.worker = None


class Verifier:
    """A raw copy beside each stored page, and checks of each loaded one. Waits: for tests.

    Args:
        run: whose pages.    share: of the loaded pages that are compared with the reference too.
    """

    def __init__(self, run: Run, coding: str, share: float):
        self.run, self.coding, self.share = run, coding, share
        self.stored = np.empty((run.num_slots, run.page_bytes // 2), np.uint16)  # touched as pages come
        self.checked = self.compared = self.kept = 0
        self.worst = 0.0

    def keep(self, slots, pages) -> None:
        """Copy pages that were stored."""
        for some, bits in self._fetched(slots, pages):
            self.stored[some] = bits
        self.kept += len(slots)

    def check(self, slots, pages) -> None:
        """Raise AssertionError if a loaded page is not what it must be."""
        for some, loaded in self._fetched(slots, pages):
            self._check(some, self.stored[some], loaded)

    def _fetched(self, slots, pages):
        for at in range(0, len(slots), AT_ONCE):
            some = slots[at : at + AT_ONCE]
            bits = np.empty((len(some), self.stored.shape[1]), np.uint16)
            fetch(pages[at : at + AT_ONCE], bits)
            yield some, bits

    def _check(self, slots, stored, loaded) -> None:
        from cuszp_cupy import reference
        from cuszp_cupy.evaluation.codec import RMS_TOLERANCE
        from cuszp_cupy.evaluation.data import DTYPES

        kind = self.run.kind
        over = (
            error_over_eb(stored, loaded, kind, self.run.bound) if self.coding != "raw" else np.zeros(len(slots))
        )
        self.worst = max(self.worst, float(over.max()))
        for i in np.flatnonzero(~(over <= 1 + RMS_TOLERANCE)):
            raise AssertionError(f"{self.run.where(int(slots[i]))}: error / bound is {over[i]:.6g}")
        self.checked += len(slots)
        before = self.compared
        self.compared = int(self.checked * self.share)
        for i in range(min(self.compared - before, len(slots))):
            page = stored[i].view(DTYPES[kind.dtype])
            blob = reference.encode_page(page, self.run.bound, self.coding, geometry=kind.geometry)
            if not np.array_equal(reference.decode_page(blob).view(np.uint16).ravel(), loaded[i]):
                raise AssertionError(f"{self.run.where(int(slots[i]))}: not what the reference decodes")

    def counts(self) -> dict:
        return {
            "kept": self.kept, "checked": self.checked, "compared_with_reference": self.compared,
            "largest_error_over_bound": self.worst,
        }  # fmt: skip


def fetch(addresses: np.ndarray, out: np.ndarray) -> None:
    """Copy pages at device ``addresses``, AT_ONCE at most, to the rows of ``out``. Waits."""
    from cupy.cuda import runtime

    nbytes = out.strides[0]
    memory, stream = _landing(nbytes)
    rows = memory[: len(out)]
    places = rows.ctypes.data + np.arange(len(rows)) * nbytes
    copies = places, addresses.astype(np.int64), np.full(len(out), nbytes)
    raw_copy.copies(*copies, copy_runs(*copies), runtime.memcpyDeviceToHost, stream.ptr)
    stream.synchronize()
    out[:] = rows.view(out.dtype)


@functools.cache
def _landing(page_bytes: int):
    """Return pinned memory for AT_ONCE pages, a row each, and a stream."""
    import cupy

    return pinned(AT_ONCE * page_bytes).reshape(AT_ONCE, page_bytes), cupy.cuda.Stream(non_blocking=True)


def error_over_eb(stored: np.ndarray, loaded: np.ndarray, kind: Kind, bound) -> np.ndarray:
    """Return the largest |x - y| / eb of each page (bits, a row a page); infinite where NaN or Inf changed."""
    from cuszp_cupy.evaluation.codec import as_float32
    from cuszp_cupy.evaluation.data import DTYPES

    worst = np.zeros(len(stored))
    k_width, v_width = kind.geometry.parts
    turns = [a.view(DTYPES[kind.dtype]).reshape(len(a), -1, k_width + v_width) for a in (stored, loaded)]
    for part, one in zip((np.s_[..., :k_width], np.s_[..., k_width:]), parse_parts(bound, 2), strict=True):
        both = [np.ascontiguousarray(a[part]).reshape(len(a), -1) for a in turns]
        x, y = (as_float32(a) for a in both)
        finite = np.isfinite(x)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(x - y).max(axis=1, where=finite, initial=0)
        if one.kind == "abs":
            eb = np.full(len(x), one.value)
        elif one.kind == "rel":
            ends = x.max(axis=1, where=finite, initial=-np.inf), x.min(axis=1, where=finite, initial=np.inf)
            eb = one.value * (ends[0].astype(np.float64) - ends[1])
        else:
            values = np.where(finite, x, 0).astype(np.float64)
            eb = one.value * np.sqrt(np.einsum("ij,ij->i", values, values) / np.maximum(finite.sum(axis=1), 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            over = np.where(error == 0, 0, error / eb)
        if not finite.all():
            x_bits, y_bits = (a.view(np.uint16) for a in both)
            over[((x_bits != y_bits) & ~finite).any(axis=1)] = np.inf
        over[np.isnan(over)] = np.inf
        worst = np.maximum(worst, over)
    return worst
