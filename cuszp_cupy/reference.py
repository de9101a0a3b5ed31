"""Encoder and decoder of both stream formats in NumPy, in the order of the spec (format.py).

This is the oracle: plain, slow, the same bytes as the kernels. Numbers in comments are sections of
format.py.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import replace

import ml_dtypes
import numpy as np

from .bound import parse_parts
from .format import (
    BLOCK,
    CLASS_LIMIT,
    CODE_WORDS,
    DTYPES,
    ESCAPED,
    EXACT_CLASS,
    EXACT_SYMBOLS,
    HEADER_BYTES,
    LOWEST_STATE,
    LOWEST_STEP,
    MAX_MAGNITUDE,
    MAX_VALUES,
    NUM_SYMBOLS,
    NUM_TABLES,
    SIGNED_ZEROS,
    STEP_LIMIT,
    STREAM_GROUPS,
    STREAM_LANES,
    TABLE_BITS,
    TABLE_TOTAL,
    TILE_TOKENS,
    FormatError,
    Geometry,
    PageHeader,
    check_coding,
    check_mode,
    checksum,
    rate_bytes,
    step_number,
    stream_lanes,
)
from .tables import BUILT_IN, POSSIBLE, Tables, frequencies

_NUMPY_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# --- Stream cuszp ----------------------------------------------------------------------------------


def compress(x: np.ndarray, eb: float, mode: str = "fixed") -> bytes:
    """Return the ``cuszp`` stream of ``x``, from which every value comes back within ``eb`` (1.6c).

    Args:
        x: float32 or float64, C-contiguous, any shape; coded as one array in memory order.
        eb: absolute bound, in the unit of ``x``; > 0. Used in the dtype of ``x``.
        mode: ``fixed``, ``plain`` or ``outlier``.

    Raises:
        TypeError, ValueError: another dtype, an array that is not contiguous or too large, or a bad
            ``eb`` or mode.

    >>> len(compress(np.zeros(5, np.float32), 0.1)), len(compress(np.ones(5, np.float32), 0.1))
    (1024, 1040)
    """
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x: expected a NumPy array, got {type(x).__name__}; pass numpy.asarray(x)")
    dtype = _check_dtype(x.dtype)
    if not x.flags.c_contiguous:
        raise ValueError(
            f"x: expected a C-contiguous array, got strides {x.strides}; pass numpy.ascontiguousarray(x)"
        )
    n, eb = _check_n(x.size), _check_eb(eb, dtype)
    check_mode(mode)
    v = _codes(_bins(x.reshape(-1), eb), mode)
    magnitude = np.abs(v)  # INT_MIN stays: negative, so no maximum sees it; all 31 plane bits are 0

    k = _bits(magnitude.max(axis=1, initial=0))  # 1.3
    outlier_bytes = np.zeros_like(k)
    if mode == "outlier":  # 1.4
        first = magnitude[:, 0].copy()
        k2 = _bits(magnitude[:, 1:].max(axis=1, initial=0))
        ob = (_bits(first) + 7) // 8
        apart = np.where(k, 4 + 4 * k, 0) > 4 + 4 * k2 + ob
        k = np.where(apart, k2, k)
        outlier_bytes = np.where(apart, ob, 0)
        magnitude[apart, 0] = 0
    rates = np.where(outlier_bytes, 0x80 | (outlier_bytes - 1) << 5, 0) | k

    rows = np.zeros((len(v), 8 + 4 * int(k.max(initial=0))), np.uint8)  # a[0], signs, planes
    if mode == "outlier":
        rows[:, :4] = first.astype("<i4").view(np.uint8).reshape(-1, 4)
    rows[:, 4:8] = np.packbits(v < 0, axis=1)
    for p in range(rows.shape[1] // 4 - 2):
        rows[:, 8 + 4 * p : 12 + 4 * p] = np.packbits(magnitude >> p & 1, axis=1)
    area = np.zeros(rate_bytes(n), np.uint8)
    area[: len(rates)] = rates
    return area.tobytes() + rows[_stored(k, outlier_bytes)].tobytes()


def decompress(stream, n: int, dtype, eb: float, mode: str = "fixed") -> np.ndarray:
    """Return the (n,) array that a ``cuszp`` stream holds.

    Args:
        stream: the whole stream, bytes or any contiguous buffer.
        n, dtype, eb, mode: as it was compressed; the stream holds none of them.

    Raises:
        TypeError, ValueError: a bad ``n``, dtype, ``eb`` or mode.
        FormatError: a rate byte no encoder writes, or a stream whose length is not what its rate
            bytes say.
    """
    dtype = _check_dtype(dtype)
    n, eb = _check_n(n), _check_eb(eb, dtype)
    check_mode(mode)
    data = np.frombuffer(stream, np.uint8) if memoryview(stream).nbytes else np.zeros(0, np.uint8)
    if data.size < rate_bytes(n):
        raise FormatError(f"stream: the rate area of {n} values has {rate_bytes(n)} bytes, got {data.size}")
    area, payload = data[: rate_bytes(n)], data[rate_bytes(n) :]
    num_blocks = -(-n // BLOCK)
    rates = area[:num_blocks].astype(np.int32)
    k, outlier_bytes = rates & 31, np.zeros_like(rates)
    illegal = rates > 31
    if mode == "outlier":
        outlier_bytes = np.where(rates & 0x80, (rates >> 5 & 3) + 1, 0)
        illegal &= (outlier_bytes == 0) | (k == 31)  # no form with 31 planes is smaller than 1.3
    for bad in (np.flatnonzero(illegal), num_blocks + np.flatnonzero(area[num_blocks:])):
        if bad.size:
            raise FormatError(f"rate byte {bad[0]}: {area[bad[0]]:#04x} is not valid in mode {mode!r}")
    stored = _stored(k, outlier_bytes)
    if payload.size != stored.sum():
        raise FormatError(f"payloads: the rate bytes say {stored.sum()} bytes, {payload.size} are there")

    rows = np.zeros(stored.shape, np.uint8)
    rows[stored] = payload
    first = np.ascontiguousarray(rows[:, :4]).view("<u4")[:, 0]
    negative = np.unpackbits(rows[:, 4:8], axis=1).astype(bool)
    magnitude = np.zeros((num_blocks, BLOCK), np.uint32)
    for p in range(rows.shape[1] // 4 - 2):
        bits = np.unpackbits(rows[:, 8 + 4 * p : 12 + 4 * p], axis=1)
        magnitude |= bits.astype(np.uint32) << np.uint32(p)
    magnitude[:, 0] = np.where(outlier_bytes, first, magnitude[:, 0])
    v = np.where(negative, -magnitude, magnitude).view(np.int32)
    q = v if mode == "fixed" else np.cumsum(v, axis=1, dtype=np.int32)
    with np.errstate(over="ignore"):
        return (q.reshape(-1)[:n].astype(dtype) * eb) * dtype.type(2)  # 1.5


def _bins(x: np.ndarray, eb) -> np.ndarray:
    """Return the int32 bin numbers of 1.1. All overflow is specified, so no warning is due."""
    T = x.dtype.type
    limits = np.iinfo(np.int32)
    with np.errstate(all="ignore"):
        s = x * (T(0.5) / eb)
        t = (s + T(0.5)).astype(np.float64)  # exact, and holds both int32 limits
    t[np.isnan(t)] = 0 if T is np.float32 else limits.min
    q = np.clip(t, limits.min, limits.max).astype(np.int32)  # astype truncates
    return q - (~(s >= T(-0.5))).astype(np.int32)


def _codes(q: np.ndarray, mode: str) -> np.ndarray:
    """Return the int32 codes v of 1.2, one row of 32 a block."""
    v = np.zeros((-(-q.size // BLOCK), BLOCK), np.int32)
    v.reshape(-1)[: q.size] = q
    if mode != "fixed":
        v[:, 1:] -= v[:, :-1].copy()
        v.reshape(-1)[q.size :] = 0
    return v


def _bits(a: np.ndarray) -> np.ndarray:
    """Return the bit length of each int32 (0 for what is not positive)."""
    return np.frexp(np.maximum(a, 0).astype(np.float64))[1]


def _stored(k: np.ndarray, outlier_bytes: np.ndarray) -> np.ndarray:
    """Return which bytes of the rows (a[0], signs, planes) are stored: (blocks, 8 + 4 max k) bool."""
    column = np.arange(8 + 4 * int(k.max(initial=0)))
    words = np.where((k > 0) | (outlier_bytes > 0), k + 1, 0)[:, None]
    return np.where(column < 4, column < outlier_bytes[:, None], column - 4 < 4 * words)


def _check_dtype(dtype) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype: stream cuszp holds float32 or float64, got {dtype}")
    return dtype


def _check_n(n: int) -> int:
    if not isinstance(n, numbers.Integral):
        raise TypeError(f"n: expected an integer, got {n!r}")
    if not 0 <= n <= MAX_VALUES:
        raise ValueError(f"n: expected 0 to {MAX_VALUES} values, got {n}; split the array")
    return int(n)


def _check_eb(eb: float, dtype: np.dtype):
    """Return ``eb`` in ``dtype``, in which it must be positive and finite."""
    if not isinstance(eb, numbers.Real):
        raise TypeError(f"eb: expected a number, got {eb!r}")
    with np.errstate(over="ignore", under="ignore"):
        value = dtype.type(eb)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"eb: expected a bound that is positive and finite in {dtype}, got {eb!r}")
    return value


# --- Stream kv -------------------------------------------------------------------------------------
def encode_page(
    page: np.ndarray,
    bound="rms:0.05",
    coding: str = "fixed",
    *,
    geometry: Geometry | None = None,
    tables: Tables = BUILT_IN,
) -> bytes:
    """Return ``page`` as a self-describing blob: 32 bytes of metadata, then the payload.

    Args:
        page: (tokens, channels) float16 or ml_dtypes.bfloat16; any shape of the right size if ``geometry``
            is given.
        bound: a Bound or its text, for every part; or a pair, for K and V (``cuszp_cupy.bound``).
        coding: ``entropy`` (``fixed`` where that is not larger), ``fixed`` (``raw`` where that is not larger), or
            ``raw``.
        geometry: where K and V lie; one part of (tokens, channels) when None.
        tables: of coding ``entropy``, as ``calibrate`` returns them.

    Raises:
        TypeError: another dtype.    ValueError: an unknown coding or bound, or a page or tables that do not fit.

    >>> import numpy as np
    >>> page = np.linspace(-1, 1, 16 * 64).astype(np.float16).reshape(16, 64)
    >>> blob = encode_page(page, "abs:0.01")
    >>> len(blob), bool(abs(decode_page(blob) - page).max() <= 0.01)
    (944, True)
    """
    page = np.asarray(page)
    dtype = check_page_dtype(page.dtype)
    check_coding(coding)
    geometry = page_geometry(page.shape, geometry)
    tables.check_geometry(geometry)
    bounds = parse_parts(bound, len(geometry.part_values))
    bits = np.ascontiguousarray(page).view(np.uint16).ravel()
    groups = _groups(bits, geometry)
    steps = _steps(groups, dtype, geometry, bounds) if coding != "raw" else None
    smallest = ("raw", (), bits.tobytes())
    if steps is not None:
        payload = _encode_fixed(groups, dtype, geometry, steps)
        if len(payload) < len(smallest[2]):
            smallest = ("fixed", steps, payload)
    if smallest[0] == "fixed" and coding == "entropy":
        payload = _encode_entropy(groups, dtype, geometry, steps, tables)
        if payload is not None and len(payload) < len(smallest[2]):
            smallest = ("entropy", steps, payload)
    coding, steps, payload = smallest
    used = tables if coding == "entropy" else BUILT_IN
    header = PageHeader(dtype, geometry, coding, (*steps, 0, 0)[:2], len(payload), 0, used.id)
    header = replace(header, checksum=checksum(header.pack(), payload, used.digest))
    return header.pack() + payload


def decode_page(blob, *, tables: Tables = BUILT_IN) -> np.ndarray:
    """Return the page of ``blob``, in the shape of its geometry.

    Args:
        tables: those that a page of coding ``entropy`` was encoded with. Pages that need none, or the built-in
            ones, decode with any.

    Raises:
        FormatError: a blob that is truncated, altered, of another version, or encoded with other tables.
    """
    header = PageHeader.parse(blob)
    payload = bytes(memoryview(blob).cast("B")[HEADER_BYTES:])
    geometry = header.geometry
    if header.tables not in (0, tables.id):
        known = f"{tables.id} was given" if tables.id else "none was given"
        raise FormatError(f"tables: the page was encoded with the calibrated tables {header.tables}, {known}")
    tables = tables if header.tables else BUILT_IN
    if checksum(header.pack(), payload, tables.digest) != header.checksum:
        raise FormatError("checksum: the blob was altered after it was written, or the tables are others")
    if header.coding == "raw":
        bits = np.frombuffer(payload, np.uint16).copy()
    else:
        steps = np.asarray(header.steps)[_part_of_group(geometry)]
        if header.coding == "fixed":
            groups = _decode_fixed(payload, header.dtype, geometry, steps)
        else:
            try:
                tables.check_geometry(geometry)
            except ValueError as error:
                raise FormatError(str(error)) from None
            groups = _decode_entropy(payload, header.dtype, geometry, steps, tables)
        bits = _ungroup(groups, geometry)
    return bits.view(_NUMPY_DTYPES[header.dtype]).reshape(geometry.shape)


def calibrate(pages, bound="rms:0.05", *, geometry: Geometry | None = None, hints: bool = True) -> Tables:
    """Return tables for coding ``entropy``, made from ``pages`` for pages of the same model or layer.

    Args:
        pages: pages as ``encode_page`` takes them, of one shape, at least one; some dozens serve.
        bound: as pages will be encoded with; another one of the same kind costs little.
        geometry: as for ``encode_page``.
        hints: whether to note what is usual in each pair of channels. That is worth a hundredth of the size or so
            for pages of one layer; off for tables that serve all layers, or pages of several shapes. Flat pages
            have none.

    Raises:
        TypeError, ValueError: as ``encode_page``; and where no page can be used.
    """
    usable = []
    for page in pages:
        dtype = check_page_dtype(np.asarray(page).dtype)
        geometry = page_geometry(np.asarray(page).shape, geometry)
        groups = _groups(np.ascontiguousarray(page).view(np.uint16).ravel(), geometry)
        steps = _steps(groups, dtype, geometry, parse_parts(bound, len(geometry.part_values)))
        if steps is not None:
            usable.append((groups, dtype, geometry, steps))
    if not usable:
        raise ValueError("pages: expected one or more that need not be raw, got none")
    tables = BUILT_IN
    if hints and not geometry.flat:
        tables = replace(BUILT_IN, hints=_hints(usable))
    # What was rare in these pages may be less so in others: the built-in tables count as a few groups more.
    class_counts = 4 * BUILT_IN.classes / TABLE_TOTAL
    symbol_counts = 128 * _with_empty(BUILT_IN.symbols) / TABLE_TOTAL
    for groups, dtype, geometry, steps in usable:
        magnitude, _, _, classes = _residuals(groups, dtype, geometry, steps, tables)
        part = _part_of_group(geometry)
        np.add.at(class_counts, (part, _class_symbols(classes, geometry, tables)[0]), 1)
        rows = np.broadcast_to(_table_of(part, classes)[:, None, None], magnitude.shape)
        np.add.at(symbol_counts, (rows, _symbols(magnitude, classes)[0]), 1)
    symbol_counts = symbol_counts.reshape(2, -1, NUM_SYMBOLS)[:, 1:]
    return Tables(frequencies(class_counts), frequencies(symbol_counts, POSSIBLE), tables.hints)


def _hints(usable) -> np.ndarray:
    """2.9: o and f of each pair of channels, from groups of pages."""
    sizes = []  # log2 of the sum of |v| of each group, without and with prediction
    for groups, dtype, geometry, steps in usable:
        pairs = geometry.channels // 2
        for f in (0, 1):
            forced = replace(BUILT_IN, hints=np.tile(np.array([0, f], np.int8), (pairs, 1)))
            magnitude, _, _, classes = _residuals(groups, dtype, geometry, steps, forced)
            size = np.where(classes == ESCAPED, np.nan, np.log2(magnitude.sum(axis=(1, 2)) + 0.5))
            sizes.append(size.reshape(-1, pairs))
    with np.errstate(invalid="ignore"):
        sizes = np.stack([np.concatenate(sizes[f::2]) for f in (0, 1)])  # (f, rows, pairs)
        mean = np.nansum(sizes, axis=1) / np.maximum(np.isfinite(sizes).sum(axis=1), 1)
    f = (mean[1] < mean[0]).astype(np.intp)
    best = mean[f, np.arange(f.size)]
    part = _part_of_group(geometry)[: f.size]
    typical = np.array([best[part == p].mean() if (part == p).any() else 0 for p in (0, 1)])
    o = np.clip(np.rint(best - typical[part]), -CLASS_LIMIT, CLASS_LIMIT)
    return np.stack([o, f], axis=1).astype(np.int8)


def check_page_dtype(dtype) -> str:
    """Return the name of ``dtype`` if pages may have it; else raise TypeError."""
    name = np.dtype(dtype).name
    if name not in DTYPES:
        raise TypeError(f"page: expected float16 or bfloat16, got {name}; other types are not compressed")
    return name


def page_geometry(shape: tuple[int, ...], geometry: Geometry | None) -> Geometry:
    """Return the geometry of a page of ``shape``: ``geometry`` if it fits, (tokens, channels) if None."""
    if geometry is None:
        if len(shape) != 2:
            raise ValueError(f"page: expected the shape (tokens, channels), got {shape}; or pass a geometry")
        return Geometry(*shape)
    if math.prod(shape) != geometry.values:
        raise ValueError(f"page: the geometry has {geometry.values} values, the page {shape}")
    return geometry


# Groups are (groups, 16 pairs, 2) arrays here; "planes" are (groups, 16) words.


def _groups(bits: np.ndarray, geometry: Geometry) -> np.ndarray:
    """2.4: 'a group is 16 tokens x 2 neighbouring channels ... Else (flat): 32 values in memory order'."""
    if geometry.flat:
        return np.append(bits, np.zeros(-bits.size % BLOCK, np.uint16)).reshape(-1, 16, 2)
    tiles = bits.reshape(-1, TILE_TOKENS, geometry.channels // 2, 2)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, 16, 2)


def _ungroup(groups: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The inverse of ``_groups``."""
    if geometry.flat:
        return groups.ravel()[: geometry.values]
    tiles = groups.reshape(-1, geometry.channels // 2, TILE_TOKENS, 2)
    return tiles.transpose(0, 2, 1, 3).ravel()


def _part_of_group(geometry: Geometry) -> np.ndarray:
    """The part (0 or 1) of each group."""
    group = np.arange(geometry.groups)
    if geometry.parts is None:
        return np.zeros_like(group)
    channel = group * BLOCK if geometry.flat else group % (geometry.channels // 2) * 2
    return (channel % sum(geometry.parts) >= geometry.parts[0]).astype(np.intp)


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs are data here
        return bits.view(_NUMPY_DTYPES[dtype]).astype(np.float32)


def _steps(groups, dtype, geometry, bounds) -> tuple[int, ...] | None:
    """2.7 and 2.8: one step number a part, or None where the page must be raw."""
    part_of_group = _part_of_group(geometry)
    present = np.arange(groups.size).reshape(groups.shape) < geometry.values  # padding is no data
    steps = []
    for part, (bound, n) in enumerate(zip(bounds, geometry.part_values, strict=True)):
        x = _floats(groups[part_of_group == part], dtype)
        finite = np.isfinite(x) & present[part_of_group == part]
        x_finite = np.where(finite, x, np.float32(0))
        if bound.kind != "abs" and not x_finite.any():
            steps.append(0)
            continue
        s = _step_for(bound, n, x_finite, finite)
        if s is None or s < LOWEST_STEP[dtype]:
            return None
        s = min(s, STEP_LIMIT)
        steps.append(s if bound.kind == "abs" else _step_seen_before(x, s, dtype))
    return tuple(steps)


def _step_for(bound, n, x_finite, finite) -> int | None:
    """2.7: the step number, unlimited; None if the statistic is out of float32's range."""
    if bound.kind == "abs":
        return step_number(2 * bound.value)
    if bound.kind == "rel":
        values = x_finite[finite].astype(np.float64)
        two_eb = 2 * bound.value * (values.max() - values.min())
        return step_number(two_eb) if two_eb > 0 else None
    # "pairs in order, first and second values each summed apart by fused multiply-add from 0"; squares of
    # 16-bit floats are exact in float32 unless they leave its range, so the fused result is the rounded sum
    # of the exact square, which float64 holds, too.
    sums = np.zeros((len(x_finite), 2), np.float32)
    with np.errstate(over="ignore"):
        for pair in range(16):
            square = x_finite[:, pair].astype(np.float64) ** 2
            sums = (sums.astype(np.float64) + square).astype(np.float32)
        t = sums[:, 0] + sums[:, 1]
    if not np.isfinite(t).all() or t.max() < 2.0**-100:
        return None
    exponent = math.frexp(t.max())[1]
    total = int(np.trunc(np.ldexp(t.astype(np.float64), 20 - exponent)).astype(np.int64).sum())
    two_eb_squared = 4 * bound.value * bound.value / n * total
    return step_number(two_eb_squared, exponent - 20, squared=True) if two_eb_squared > 0 else None


def _step_seen_before(x: np.ndarray, s: int, dtype: str) -> int:
    """2.8: 'the first one on whose grid each group of the part lies'; else s."""
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(x.astype(np.float64))
    for candidate in range(s + 4, s - 5, -1):
        if abs(candidate) > STEP_LIMIT:
            continue
        q, escaped = _quantise(x, candidate, dtype)
        on_grid = (_grid(q, candidate) == magnitude).all(axis=(1, 2))
        if (on_grid | escaped).all():
            return candidate
    return s


def _quantise(x: np.ndarray, s, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """2.6: magnitudes q (float64); and 2.5: whether a group needs width code 15."""
    k, m = _km(s)
    largest = np.float32(ml_dtypes.finfo(_NUMPY_DTYPES[dtype]).max)
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.abs(x.astype(np.float64))
        inverse = (1 / np.ldexp(m, k - 2)).astype(np.float32).astype(np.float64)
        q = np.maximum(np.rint(magnitude * inverse), np.rint(np.ldexp(magnitude, -k) - 8.0 * (m - 4)))
        within = (q < MAX_MAGNITUDE) & (np.abs(x) + np.ldexp(m, k - 2).astype(np.float32) <= largest)
    return q, ~within.all(axis=(1, 2))


def _grid(q: np.ndarray, s) -> np.ndarray:
    """2.3: y(q)."""
    k, m = _km(s)
    return np.ldexp(np.minimum(q * m, 4 * q + 32.0 * (m - 4)), k - 2)


def _km(s):
    """(k, m) as arrays that broadcast against (groups, 16, 2); s is a number or one number a group."""
    s = np.asarray(s)
    s = s.reshape(s.shape + (1, 1)) if s.ndim else s
    return s // 4, (s % 4 + 4).astype(np.float64)


def _planes(v: np.ndarray) -> np.ndarray:
    """(groups, 16 pairs, 2) 16-bit patterns -> (groups, 16) plane words: 'bit i: first value of pair i'."""
    position = np.arange(16, dtype=np.uint32)[:, None] + np.array([0, 16], np.uint32)
    planes = [((v.astype(np.uint32) >> np.uint32(p) & 1) << position).sum(axis=(1, 2)) for p in range(16)]
    return np.stack(planes, axis=1).astype(np.uint32)


def _unplanes(planes: np.ndarray) -> np.ndarray:
    """The inverse of ``_planes``."""
    position = np.arange(16, dtype=np.uint32)[:, None] + np.array([0, 16], np.uint32)
    v = np.zeros((planes.shape[0], 16, 2), np.uint16)
    for p in range(16):
        v |= ((planes[:, p, None, None] >> position & 1) << np.uint32(p)).astype(np.uint16)
    return v


def _encode_fixed(groups, dtype, geometry, steps) -> bytes:
    """2.5."""
    q, escaped = _quantise(_floats(groups, dtype), np.asarray(steps)[_part_of_group(geometry)], dtype)
    q = np.where(escaped[:, None, None], 0, q).astype(np.uint16)
    magnitude_bits = np.frexp(q.max(axis=(1, 2)).astype(np.float64))[1]
    nothing = (q == 0).all(axis=(1, 2)) & (groups != 0x8000).all(axis=(1, 2))
    code = np.where(escaped, 15, np.where(nothing, 0, magnitude_bits + 1))
    planes = _planes(np.where(escaped[:, None, None], groups, q | groups & 0x8000))
    # "then the plane of sign bits": plane 15 moves to word b = code - 1
    regular = np.flatnonzero((code > 0) & (code < 15))
    planes[regular, code[regular] - 1] = planes[regular, 15]
    nibbles = np.zeros(2 * geometry.code_bytes, np.uint8)
    nibbles[: code.size] = code
    words = planes[np.arange(16) < CODE_WORDS[code][:, None]]
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes() + words.astype("<u4").tobytes()


def _decode_fixed(payload, dtype, geometry, steps) -> np.ndarray:
    """2.5 read backwards: (groups, 16, 2) storage bits. ``steps``: one step number a group."""
    packed = np.frombuffer(payload, np.uint8, geometry.code_bytes)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).ravel()
    code = nibbles[: geometry.groups].astype(np.intp)
    if nibbles[geometry.groups :].any():
        raise FormatError("width codes: the padding is not zero")
    words = np.frombuffer(payload, "<u4", offset=geometry.code_bytes)
    present = np.arange(16) < CODE_WORDS[code][:, None]
    if words.size != present.sum():
        raise FormatError(f"width codes: they ask for {present.sum()} words, {words.size} are there")
    planes = np.zeros((code.size, 16), np.uint32)
    planes[present] = words
    regular = np.flatnonzero((code > 0) & (code < 15))
    planes[regular, 15] = planes[regular, code[regular] - 1]
    planes[regular, code[regular] - 1] = 0
    v = _unplanes(planes)
    return np.where((code == 15)[:, None, None], v, _points(v & 0x7FFF, v & 0x8000, steps, dtype))


def _points(q, sign, steps, dtype) -> np.ndarray:
    """2.3: the storage bits of magnitudes q under one step number a group, with the given sign bit."""
    with np.errstate(over="ignore"):  # only points that no encoder writes
        y = _grid(q.astype(np.float64), steps).astype(np.float32).astype(_NUMPY_DTYPES[dtype])
    return y.view(np.uint16) | sign


def _encode_entropy(groups, dtype, geometry, steps, tables) -> bytes | None:
    """2.9 to 2.11; None where the coding is not allowed."""
    part = _part_of_group(geometry)
    magnitude, sign, flag, classes = _residuals(groups, dtype, geometry, steps, tables)
    class_symbol, bases = _class_symbols(classes, geometry, tables)
    symbol, low = _symbols(magnitude, classes)
    rest = magnitude & ((1 << low) - 1)
    signed = (magnitude != 0) | (classes >= SIGNED_ZEROS)[:, None, None]

    # Backwards from here on: the coder of all lanes, (streams, 32 lanes) at once.
    at, last = _lanes(geometry)
    table = _table_of(part, classes)
    class_f, class_c = _cumulative(tables.classes)
    symbol_f, symbol_c = _cumulative(_with_empty(tables.symbols))
    late = (sign[:, :, 1] << np.arange(16)).sum(axis=1)
    x = 0x10000 + late[last]
    taken = []  # (which lanes, their half-words), last first

    def make_room(need, limit):
        """Move the low half-word of x to the stream where x >= limit, so that the next pushes fit."""
        nonlocal x
        need = need & (x >= limit)
        taken.append((need, (x & 0xFFFF).astype(np.uint16)))
        x = np.where(need, x >> 16, x)

    def push(need, f, c):
        nonlocal x
        x = np.where(need, (x // f << TABLE_BITS) + x % f + c, x)

    def push_bits(need, bits, n):
        nonlocal x
        x = np.where(need, x << n | bits, x)

    for j in reversed(range(len(at))):
        here, g = at[j] >= 0, np.maximum(at[j], 0)
        for i in reversed(range(BLOCK)):
            pair, second = divmod(i, 2)
            f = symbol_f[table[g], symbol[g, pair, second]]
            n, r = low[g, pair, second], rest[g, pair, second]
            with_sign = signed[g, pair, second] & ~(bool(second) & (g == last))
            wide = n > 4
            make_room(here, np.where(wide, 1 << (35 - n - with_sign), f << np.maximum(21 - n - with_sign, 0)))
            push_bits(here & with_sign, sign[g, pair, second], 1)
            push_bits(here & wide, r >> 4, np.maximum(n - 4, 0))
            make_room(here & wide, f << 17)
            push_bits(here, np.where(wide, r & 15, r), np.minimum(n, 4))
            push(here, f, symbol_c[table[g], symbol[g, pair, second]])
        f = class_f[part[g], class_symbol[g]]
        make_room(here, f << (20 if tables.hints is None else 21))
        if tables.hints is None:
            push_bits(here, flag[g], 1)
        push(here, f, class_c[part[g], class_symbol[g]])

    which = np.stack([need for need, _ in reversed(taken)], axis=1)  # (streams, events, lanes)
    half_words = np.stack([words for _, words in reversed(taken)], axis=1)
    counts, streams = [], []
    for s, g in enumerate(geometry.streams):
        states = x[s, : stream_lanes(g)].astype("<u4").view("<u2")
        streams += [states, half_words[s][which[s]].astype("<u2")]
        counts.append(states.size + streams[-1].size)
        if counts[-1] > BLOCK * g:
            return None
    payload = bases.astype(np.uint8).tobytes() + np.concatenate([np.array(counts, "<u2"), *streams]).tobytes()
    return payload + bytes(-len(payload) % 4)


def _decode_entropy(payload, dtype, geometry, steps, tables) -> np.ndarray:
    """2.9 to 2.11 read backwards: (groups, 16, 2) storage bits."""
    part, (shift, given_flag) = _part_of_group(geometry), tables.hints_of_groups(geometry)
    bases = np.frombuffer(payload, np.uint8, 2)
    if (bases > CLASS_LIMIT).any() or (geometry.parts is None and bases[1]):
        raise FormatError(f"bases: expected 0..{CLASS_LIMIT}, 0 for a missing part, got {bases.tolist()}")
    half_words = np.frombuffer(payload, "<u2").astype(np.int64)
    sizes = np.array(geometry.streams)
    counts, lanes = half_words[1 : 1 + sizes.size], np.array([stream_lanes(g) for g in geometry.streams])
    if ((counts < 2 * lanes) | (counts > BLOCK * sizes)).any():
        raise FormatError(f"streams: expected {2 * lanes} to {BLOCK * sizes} half-words, got {counts}")
    ends = 1 + sizes.size + np.cumsum(counts)
    if half_words.size != (ends[-1] + 1) // 2 * 2 or half_words[ends[-1] :].any():
        raise FormatError(f"streams: they end after {ends[-1]} half-words, the payload has {half_words.size}")

    at, last = _lanes(geometry)
    starts = ends - counts
    present = at[0] >= 0
    first = np.where(present, starts[:, None] + 2 * np.arange(STREAM_LANES), 0)
    x = np.where(present, half_words[first] | half_words[first + 1] << 16, LOWEST_STATE)
    if ((x < LOWEST_STATE) | (x >> 31 != 0)).any():
        raise FormatError("streams: a lane starts outside 2^15 .. 2^31 - 1")
    position = starts + 2 * lanes

    def refill(need):
        nonlocal x, position
        need = need & (x < LOWEST_STATE)
        index = position[:, None] + np.cumsum(need, axis=1) - need
        position = position + need.sum(axis=1)
        if (position > ends).any():
            raise FormatError("streams: one ends early")
        x = np.where(need, x << 16 | half_words[np.where(need, index, 0)], x)

    def read(need, rows, f, c, slots):
        nonlocal x
        symbol = slots[rows, x & (TABLE_TOTAL - 1)]
        x = np.where(need, f[rows, symbol] * (x >> TABLE_BITS) + (x & (TABLE_TOTAL - 1)) - c[rows, symbol], x)
        return symbol

    def bits(need, n):
        nonlocal x
        value = np.where(need, x & ((1 << n) - 1), 0)
        x = np.where(need, x >> n, x)
        return value

    class_table, symbol_table = _slots(tables.classes), _slots(_with_empty(tables.symbols))
    magnitude = np.zeros((geometry.groups, 16, 2), np.int64)
    sign = np.zeros_like(magnitude)
    classes, flag = np.zeros(geometry.groups, np.int64), given_flag.copy()
    for j in range(len(at)):
        here, g = at[j] >= 0, np.maximum(at[j], 0)
        symbol = read(here, part[g], *class_table)
        f = bits(here, 1) if tables.hints is None else given_flag[g]
        refill(here)
        c = (symbol - CLASS_LIMIT + bases[part[g]] + shift[g]) % ESCAPED
        c = np.where(symbol == ESCAPED, ESCAPED, c)
        flag[g[here]], classes[g[here]] = f[here], c[here]
        table, class_low = _table_of(part[g], c), _class_low(c)
        for i in range(BLOCK):
            pair, second = divmod(i, 2)
            s = read(here, table, *symbol_table)
            large = s >= EXACT_SYMBOLS
            n = np.where(large, s - 12, 0) + class_low
            r = bits(here, np.minimum(n, 4))
            refill(here & (n > 4))
            r += bits(here & (n > 4), np.maximum(n - 4, 0)) << 4
            m = np.where(here, (np.where(large, 1 << np.maximum(s - 12, 0), s) << class_low) + r, 0)
            with_sign = here & ((m != 0) | (c >= SIGNED_ZEROS)) & ~(bool(second) & (g == last))
            magnitude[g[here], pair, second] = m[here]
            sign[g[here], pair, second] = bits(with_sign, np.int64(1))[here]
            refill(here)
    if (position != ends).any():
        raise FormatError("streams: one ends late")
    plain, escaped = (classes < SIGNED_ZEROS)[:, None, None], (classes == ESCAPED)[:, None, None]
    sign[last[present], :, 1] = x[present, None] >> np.arange(16) & 1
    if (x[present] >> 16 != 1).any() or (sign & (magnitude == 0) & plain).any():
        raise FormatError("streams: a lane ends with what is no signs")
    q = _unpredicted(np.where(sign, -magnitude, magnitude), flag * plain[:, 0, 0])
    if (np.abs(q) >= np.where(escaped, 2**15, MAX_MAGNITUDE)).any():
        raise FormatError(f"values: a magnitude reaches {MAX_MAGNITUDE}")
    negative = np.where(plain, q < 0, sign) << 15
    coded = _points(np.where(escaped, 0, np.abs(q)), negative.astype(np.uint16), steps, dtype)
    return np.where(escaped, magnitude | negative, coded).astype(np.uint16)


def _residuals(groups, dtype, geometry, steps, tables):
    """2.9: magnitude and sign of v (groups, 16, 2), flag f and class c of each group."""
    q, escaped = _quantise(_floats(groups, dtype), np.asarray(steps)[_part_of_group(geometry)], dtype)
    plain = ~escaped & (groups != 0x8000).all(axis=(1, 2))
    q = np.where(escaped[:, None, None], 0, q).astype(np.int64)
    q = np.where(groups >= 0x8000, -q, q)
    difference = q - _predicted(q)
    flag = tables.hints_of_groups(geometry)[1]
    if tables.hints is None:
        flag = (np.abs(difference).sum(axis=(1, 2)) < np.abs(q).sum(axis=(1, 2))).astype(np.int64)
    flag = flag * plain
    v = np.where(flag[:, None, None], difference, q)
    e = _bits(np.abs(v).sum(axis=(1, 2)))
    classes = np.where(escaped, ESCAPED, np.where(plain, e, e + SIGNED_ZEROS))
    magnitude = np.where(escaped[:, None, None], groups & 0x7FFF, np.abs(v)).astype(np.int64)
    return magnitude, np.where(plain[:, None, None], v < 0, groups >> 15).astype(np.int64), flag, classes


def _class_symbols(classes, geometry, tables) -> tuple[np.ndarray, np.ndarray]:
    """2.9, 2.10: the symbol of the class of each group, and the bases of the two parts."""
    part, (shift, _) = _part_of_group(geometry), tables.hints_of_groups(geometry)
    bases = np.zeros(2, np.int64)
    for p in range(len(geometry.part_values)):
        e = (classes % SIGNED_ZEROS - shift)[(part == p) & (classes != ESCAPED)]
        bases[p] = np.clip((2 * e.sum() + e.size) // (2 * max(e.size, 1)), 0, CLASS_LIMIT)
    symbol = (classes - shift - bases[part] + CLASS_LIMIT) % ESCAPED
    return np.where(classes == ESCAPED, ESCAPED, symbol), bases


def _symbols(magnitude, classes) -> tuple[np.ndarray, np.ndarray]:
    """2.10: the symbol s of each value, and the number n of the bits behind it."""
    low = _class_low(classes)[:, None, None]
    scaled = np.where((classes == ESCAPED)[:, None, None], 0, magnitude >> low)
    large = scaled >= EXACT_SYMBOLS
    symbol = np.where(large, _bits(scaled) + EXACT_SYMBOLS - 5, scaled)
    return symbol, low + np.where(large, symbol - 12, 0)


def _class_low(classes) -> np.ndarray:
    """2.10: the bits behind each symbol that the class asks for."""
    return np.where(classes == ESCAPED, 15, np.maximum(classes % SIGNED_ZEROS - EXACT_CLASS, 0))


def _predicted(q: np.ndarray) -> np.ndarray:
    """2.9: p of each value."""
    p = np.zeros_like(q)
    a = 10 * q[:, 0]
    for t in range(1, 16):
        p[:, t] = (a + 8) >> 4
        a = a + (3 * (16 * q[:, t] - a) >> 3)
    return p


def _unpredicted(v: np.ndarray, flag: np.ndarray) -> np.ndarray:
    """2.9 backwards: q from v."""
    q = v.copy()
    a = 10 * q[:, 0]
    for t in range(1, 16):
        q[:, t] += np.where(flag[:, None], (a + 8) >> 4, 0)
        a = a + (3 * (16 * q[:, t] - a) >> 3)
    return q


def _lanes(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """2.11: the groups of each lane, -1 for none, (turns, streams, 32); and the last one of each, 0 for none."""
    sizes, lane = np.array(geometry.streams)[:, None], np.arange(STREAM_LANES)
    lanes = np.array([[stream_lanes(g)] for g in geometry.streams])
    in_stream = np.arange((-(-sizes // lanes)).max())[:, None, None] * lanes + lane
    first = np.arange(len(sizes))[:, None] * STREAM_GROUPS
    at = np.where((lane < lanes) & (in_stream < sizes), first + in_stream, -1)
    return at, np.maximum(at.max(axis=0), 0)


def _table_of(part, classes):
    """The row of tables for a class: 0 for classes without one."""
    row = np.where(classes == ESCAPED, 0, np.minimum(classes % SIGNED_ZEROS, NUM_TABLES))
    return part * (NUM_TABLES + 1) + row


def _with_empty(symbols: np.ndarray) -> np.ndarray:
    """Tables of both parts as (2 * 9, 19), each part's led by one that says symbol 0 and costs nothing."""
    empty = np.zeros((2, 1, NUM_SYMBOLS), np.int64)
    empty[:, :, 0] = TABLE_TOTAL
    return np.concatenate([empty, symbols], axis=1).reshape(-1, NUM_SYMBOLS)


def _cumulative(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F and C of tables (n, symbols)."""
    f = f.astype(np.int64)
    return f, np.cumsum(f, axis=1) - f


def _slots(f: np.ndarray):
    """F and C of tables, and the symbol of each slot."""
    symbols = np.arange(f.shape[1])
    return *_cumulative(f), np.stack([np.repeat(symbols, row) for row in f])
