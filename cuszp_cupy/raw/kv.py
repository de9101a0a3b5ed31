"""Launches of the ``kv`` kernels: device pointers in, few launches a batch, on CuPy's current stream.

No allocation, no host synchronisation, no policy. Arguments are asserted, not diagnosed: callers check.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from ..bound import Bound
from ..format import (
    CODINGS,
    DTYPES,
    EXACT_SYMBOLS,
    LOWEST_STEP,
    NUM_CLASS_SYMBOLS,
    NUM_SYMBOLS,
    NUM_TABLES,
    STEP_LIMIT,
    TABLE_TOTAL,
    TILE_TOKENS,
    Geometry,
    step_number,
)
from . import MOST_SHARED, launch

MAX_THREADS = 512  # as in kv_common.cuh; each thread takes two groups
PHASES = 5  # of kv_encode_large
EXCHANGE_BYTES = 64  # a page, as in the _large kernels
KERNELS = {
    name: tuple(f"{name}<{dtype}, {fast}>" for dtype in DTYPES for fast in ("true", "false"))
    for name in ("kv_encode", "kv_decode", "kv_entropy_decode")
} | {
    "kv_entropy_encode": tuple(f"kv_entropy_encode<{dtype}>" for dtype in DTYPES)
    + tuple(f"kv_entropy_analyse<{dtype}, {fast}>" for dtype in DTYPES for fast in ("true", "false")),
    "kv_decode_large": tuple(
        f"kv_decode_large<{dtype}, {fast}>" for dtype in DTYPES for fast in ("true", "false")
    )
    + ("kv_decode_sizes",),
    "kv_encode_large": tuple(
        f"kv_encode_large<{dtype}, {fast}, {phase}>"
        for dtype in DTYPES
        for fast in ("true", "false")
        for phase in range(PHASES)
    ),
}
ENTROPY_WARPS = 4  # as in kv_entropy.cuh; each warp takes a stream
DECODE_BYTES, PART_BYTES = 11936, 15312  # as there: tables of a part, for the decoder, and for both
_KINDS = {"abs": 0, "rel": 1, "rms": 2}


def encode(
    pages_ptr: int,
    payloads_ptr: int,
    rows_ptr: int,
    num_pages: int,
    dtype: str,
    geometry: Geometry,
    bounds: tuple[Bound, ...],
    coding: str = "fixed",
    *,
    aligned: bool,
    blocks: int | None = None,
    device_blocks: int | None = None,
    regions_ptr: int = 0,
    cursors_ptr: int = 0,
    exchange_ptr: int = 0,
    sizes_ptr: int = 0,
) -> None:
    """Encode ``num_pages`` pages, each into a slot of its own, or packed into regions they share.

    Args:
        pages_ptr: device or mapped address of uint64[num_pages], the addresses of the pages.
        payloads_ptr: likewise of the slots, each 16-byte aligned with room for a raw page, in device or mapped
            pinned memory; or, with ``cursors_ptr``, of the region each page goes to.
        rows_ptr: 16-byte aligned address of uint32[num_pages, 4], the table rows to write.
        dtype: ``float16`` or ``bfloat16``.
        bounds: one a part.
        aligned: whether every page address is a multiple of 8.
        blocks: thread blocks at most of the launch that writes payloads; one a page (or chunk) when None.
        device_blocks: likewise of the launches before, which touch nothing but pages and scratch.
        regions_ptr: address of uint32[num_pages], each page's index into the cursors; 0: all have index 0.
        cursors_ptr: device address of uint32 cursors, room taken in each region in units of 16 bytes; zero them
            before the first launch. A payload then lies 16 x its row's place (word 3) after its region's address.
            A region needs room for its pages raw, each rounded up to 16 bytes.
        exchange_ptr: of pages of several chunks (``num_chunks``): device address of EXCHANGE_BYTES for each page,
            16-byte aligned, zero before the first launch. One launch after the other may use it.
        sizes_ptr: likewise of uint32[num_pages, chunks], of any content.
    """
    assert num_pages > 0 and rows_ptr % 16 == 0
    fast, code, bound_arguments = _encoding(dtype, geometry, bounds, coding, aligned)
    before = pages_ptr, payloads_ptr, rows_ptr, regions_ptr, cursors_ptr, num_pages, code
    after = *_geometry_arguments(geometry), *bound_arguments
    chunks = num_chunks(geometry)
    if chunks == 1:
        expression = f"kv_encode<{dtype}, {_bool(fast)}>"
        _launch("kv_encode", expression, geometry, num_pages, blocks, "Q" * 18 + "qqdqqd", (*before, *after))
        return
    assert exchange_ptr and exchange_ptr % 16 == 0 and sizes_ptr and sizes_ptr % 4 == 0
    kinds = {_KINDS[bound.kind] for bound in bounds}
    statistics = [] if kinds == {_KINDS["abs"]} or code == CODINGS.index("raw") else [0, 1, 2]
    arguments = *before, exchange_ptr, sizes_ptr, *after
    for phase in [*statistics, 3, 4]:
        if phase == 1 and _KINDS["rms"] not in kinds:
            continue
        expression = f"kv_encode_large<{dtype}, {_bool(fast)}, {phase}>"
        types = "Q" * 20 + "qqdqqd"
        most = blocks if phase == PHASES - 1 else device_blocks
        _launch("kv_encode_large", expression, geometry, num_pages * chunks, most, types, arguments)


@functools.lru_cache(1024)
def _encoding(dtype, geometry, bounds, coding, aligned) -> tuple[bool, int, tuple]:
    """(whether the fast kernel will do, number of the coding, (kind, step, factor) of two parts)."""
    assert len(bounds) == len(geometry.part_values)
    fast = aligned and _is_fast(geometry) and not any(w % 4 for w in _widths(geometry))
    parts = [_part(bound, n) for bound, n in zip(bounds, geometry.part_values, strict=True)]
    raw = coding == "raw" or any(k == 0 and s < LOWEST_STEP[dtype] for k, s, _ in parts)
    first, second = (parts * 2)[:2]
    return fast, CODINGS.index("raw" if raw else coding), (*first, *second)


def decode(
    payloads_ptr: int,
    rows_ptr: int,
    pages_ptr: int,
    status_ptr: int,
    num_pages: int,
    dtype: str,
    geometry: Geometry,
    *,
    aligned: bool,
    blocks: int | None = None,
    exchange_ptr: int = 0,
    sizes_ptr: int = 0,
) -> None:
    """Decode ``num_pages`` pages; ``status`` (uint32[num_pages], device) becomes 0 where a page is good.

    Args:
        payloads_ptr: as in ``encode``; the row's place counts from there.
        rows_ptr, pages_ptr, num_pages, dtype, geometry, exchange_ptr, sizes_ptr: as in ``encode``.
        blocks: thread blocks at most; one a page (or chunk) when None.
        aligned: whether every page address is a multiple of 4.
    """
    assert num_pages > 0 and rows_ptr % 16 == 0
    fast = _bool(aligned and _is_fast(geometry))
    before, after = (payloads_ptr, rows_ptr, pages_ptr, status_ptr, num_pages), _geometry_arguments(geometry)
    chunks = num_chunks(geometry)
    if chunks == 1:
        expression = f"kv_decode<{dtype}, {fast}>"
        _launch("kv_decode", expression, geometry, num_pages, blocks, "Q" * 16, (*before, *after))
        return
    assert exchange_ptr and exchange_ptr % 16 == 0 and sizes_ptr and sizes_ptr % 4 == 0
    warps = MAX_THREADS // 32  # each takes a chunk
    grid = min(-(-num_pages * chunks // warps), blocks or num_pages * chunks)
    first = payloads_ptr, rows_ptr, num_pages, sizes_ptr, *after
    launch("kv_decode_large", "kv_decode_sizes", grid, MAX_THREADS, "Q" * 15, first)
    expression, arguments = f"kv_decode_large<{dtype}, {fast}>", (*before, exchange_ptr, sizes_ptr, *after)
    _launch("kv_decode_large", expression, geometry, num_pages * chunks, blocks, "Q" * 18, arguments)


def num_chunks(geometry: Geometry) -> int:
    """Return how many thread blocks share a page."""
    return -(-geometry.groups // (2 * MAX_THREADS))


def encode_entropy(
    pages_ptr: int,
    fixed_rows_ptr: int,
    slots_ptr: int,
    payloads_ptr: int,
    rows_ptr: int,
    num_pages: int,
    dtype: str,
    geometry: Geometry,
    tables,
    tables_ptr: int,
    *,
    aligned: bool,
    blocks: int | None = None,
    device_blocks: int | None = None,
    regions_ptr: int = 0,
    cursors_ptr: int = 0,
) -> None:
    """Encode ``num_pages`` pages with coding ``entropy``, after ``encode`` has put them in slots with ``fixed``.

    Args:
        pages_ptr, payloads_ptr, rows_ptr, num_pages, dtype, geometry, blocks, device_blocks, regions_ptr,
            cursors_ptr: as in ``encode``.
        fixed_rows_ptr: the rows that ``encode`` wrote, given no cursors.
        slots_ptr: device or mapped address of uint64[num_pages], the slots that ``encode`` was given as payloads:
            ``entropy_slot_bytes`` each, in device memory, 16-byte aligned.
        tables: the ``Tables``.
        tables_ptr: device address of ``entropy_tables(tables)``, 16-byte aligned.
        aligned: whether every page address is a multiple of 4.
    """
    first, grid, threads = _entropy_launch(tables, tables_ptr, geometry, num_pages, blocks)
    after = _geometry_arguments(geometry)
    fast = _bool(aligned and _is_fast(geometry))
    most = min(num_pages, device_blocks or num_pages)
    launch(
        "kv_entropy_encode", f"kv_entropy_analyse<{dtype}, {fast}>", most, threads, "Q" * 16,
        (pages_ptr, fixed_rows_ptr, slots_ptr, num_pages, first[1], *after),
    )  # fmt: skip
    pointers = fixed_rows_ptr, slots_ptr, payloads_ptr, rows_ptr, regions_ptr, cursors_ptr
    launch(
        "kv_entropy_encode", f"kv_entropy_encode<{dtype}>", grid, threads, "Q" * 23,
        (*pointers, num_pages, *first, *after), (PART_BYTES - DECODE_BYTES) * first[-1] + 2048 * threads // 32,
    )  # fmt: skip


def decode_entropy(
    payloads_ptr: int,
    rows_ptr: int,
    pages_ptr: int,
    status_ptr: int,
    num_pages: int,
    dtype: str,
    geometry: Geometry,
    tables,
    tables_ptr: int,
    *,
    aligned: bool,
    blocks: int | None = None,
) -> None:
    """Decode those pages that have coding ``entropy``, after ``decode`` has decoded the others.

    Args:
        payloads_ptr, rows_ptr, pages_ptr, status_ptr, num_pages, dtype, geometry, aligned, blocks: as in
            ``decode``, which leaves these pages with a status that says that their row is bad.
        tables, tables_ptr: as in ``encode_entropy``.
    """
    first, grid, threads = _entropy_launch(tables, tables_ptr, geometry, num_pages, blocks)
    fast = aligned and _is_fast(geometry)
    launch(
        "kv_entropy_decode", f"kv_entropy_decode<{dtype}, {_bool(fast)}>", grid, threads, "Q" * 21,
        (payloads_ptr, rows_ptr, pages_ptr, status_ptr, num_pages, *first, *_geometry_arguments(geometry)),
        DECODE_BYTES * first[-1] + (512 if fast else 2560) * threads // 32,
    )  # fmt: skip


def entropy_threads(geometry: Geometry) -> int:
    """Return the threads of a block of the entropy kernels for such pages."""
    return 32 * min(len(geometry.streams), ENTROPY_WARPS)


def entropy_slot_bytes(geometry: Geometry) -> int:
    """Bytes of a slot of ``encode_entropy``, a multiple of 16."""
    # as struct Slot of kv_entropy_encode.cu says: half-words, words, ends of streams, bases, classes
    work = 512 + 128 * geometry.groups + 4 * len(geometry.streams) + 4 + geometry.groups
    return -(-geometry.nbytes // 16) * 16 + -(-work // 16) * 16


@functools.lru_cache(64)
def entropy_tables(tables) -> np.ndarray:
    """Return what the kernels read of ``Tables``, as uint8: for each part, then the hints (kv_entropy.cuh)."""
    memory = [_part_tables(tables, part) for part in range(2)]
    if tables.hints is not None:
        memory.append(tables.hints.ravel().view(np.uint8))
    return np.concatenate(memory)


def _part_tables(tables, part: int) -> np.ndarray:
    empty = np.zeros((1, NUM_SYMBOLS), np.uint16)
    empty[0, 0] = TABLE_TOTAL
    rows = [*empty, *tables.symbols[part], tables.classes[part]]
    entries = np.arange(sum(row.size for row in rows))  # fewer than 256
    slots = np.repeat(entries, np.concatenate(rows)).astype(np.uint8)
    f = np.concatenate(rows).astype(np.uint64)
    c = np.concatenate([np.cumsum(row) - row for row in rows]).astype(np.uint64)
    # x // F for x < 2^31 = (x * factor >> 32) >> shift. For F = 1 this is x - 1, put right by what is added.
    k = np.maximum(np.ceil(np.log2(np.maximum(f, 1))), 1).astype(np.uint64)
    factor = -(-(np.uint64(1) << (k + np.uint64(31))).astype(object) // np.maximum(f, 1).astype(object))
    factor = np.where(f > 1, factor, 2**32 - 1).astype(np.uint64)
    added = c + np.where(f == 1, np.uint64(TABLE_TOTAL - 1), np.uint64(0))
    total = np.uint64(TABLE_TOTAL)
    divide = np.stack([factor, f << np.uint64(21), total - f, added << np.uint64(5) | k - np.uint64(1)], axis=1)
    memory = np.zeros(PART_BYTES, np.uint8)
    memory[: slots.size] = slots
    s = np.arange(NUM_SYMBOLS)
    value = np.where(s < EXACT_SYMBOLS, s, 1 << np.maximum(s - 12, 0) | (s - 12) << 16)
    meaning = np.concatenate([np.tile(value, 1 + NUM_TABLES), np.arange(NUM_CLASS_SYMBOLS)])
    symbols = (
        np.stack([f | c << np.uint64(16), meaning.astype(np.uint64)], axis=1).astype("<u4").ravel().view(np.uint8)
    )
    memory[slots.size : slots.size + symbols.size] = symbols
    divide = divide.astype("<u4").ravel().view(np.uint8)
    memory[DECODE_BYTES : DECODE_BYTES + divide.size] = divide
    return memory


def _entropy_launch(tables, tables_ptr: int, geometry: Geometry, num_pages: int, blocks: int | None):
    """((addresses of tables and hints, id, digest, parts whose tables are in shared memory), grid, threads)."""
    assert num_pages > 0 and tables_ptr % 16 == 0
    tables.check_geometry(geometry)
    same = geometry.parts is None or _parts_are_equal(tables)
    hints_ptr = 0 if tables.hints is None else tables_ptr + 2 * PART_BYTES
    arguments = tables_ptr, hints_ptr, tables.id, tables.digest, 1 if same else 2
    return arguments, min(num_pages, blocks or num_pages), entropy_threads(geometry)


@functools.lru_cache(64)
def _parts_are_equal(tables) -> bool:
    return bool((tables.classes[0] == tables.classes[1]).all() and (tables.symbols[0] == tables.symbols[1]).all())


def _launch(name, expression, geometry, num_tasks, blocks, types, arguments) -> None:
    threads = block_threads(geometry)
    shared = 64 * 2 * threads + 16
    assert shared <= MOST_SHARED
    launch(name, expression, min(num_tasks, blocks or num_tasks), threads, types, arguments, shared)


def _is_fast(geometry: Geometry) -> bool:
    """Whether FAST kernels, which divide by approximation, find the groups of such pages."""
    return not geometry.flat and geometry.groups < 1 << 20


def _bool(value: bool) -> str:
    return "true" if value else "false"


@functools.lru_cache(1024)
def block_threads(geometry: Geometry) -> int:
    """Return the threads of a block for such pages."""
    return min(-(-geometry.groups // 64) * 32, MAX_THREADS)


def _widths(geometry: Geometry) -> tuple[int, ...]:
    """Extents along which the two groups of a thread must not part (1: never, for flat pages)."""
    return (1,) if geometry.flat else (geometry.channels, *(geometry.parts or ()))


@functools.lru_cache(1024)
def _geometry_arguments(geometry: Geometry) -> tuple[int, ...]:
    channels, parts = geometry.channels, geometry.parts
    kw, vw = parts or (0, 0)
    flat = geometry.flat
    numbers = (
        geometry.groups,
        1 if flat else channels // 2,
        32 if flat else TILE_TOKENS * channels,
        2 if flat else channels,
        geometry.values,
        sum(parts) if parts else channels,
        parts[0] if parts else channels,
        geometry.tokens,
        channels,
        kw | vw << 16,
        geometry.outer,
    )
    return tuple(int(number) for number in numbers)


def _part(bound: Bound, n: int) -> tuple[int, int, float]:
    """(kind, step number, factor) of 2.7 for the kernel."""
    kind = _KINDS[bound.kind]
    if bound.kind == "abs":
        return kind, min(step_number(2 * bound.value), STEP_LIMIT), 0.0
    factor = 2 * bound.value if bound.kind == "rel" else 4 * bound.value * bound.value / n
    return kind, 0, min(factor, 2.0**1023) if math.isfinite(factor) else 2.0**1023
