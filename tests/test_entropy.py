"""Coding ``entropy`` of stream ``kv`` in the reference: bytes, bound, rate, tables, damage (format.py, 2.9)."""

import importlib
import zlib
from dataclasses import replace

import numpy as np
import pytest
from assertions import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from test_kv import (
    BFLOAT16,
    DTYPES,
    EVERY_PATTERN,
    error_bound,
    pages,
    split,
    text_bounds,
    to_dtype,
    token_layout,
)

from cuszp_cupy import reference
from cuszp_cupy.evaluation import data
from cuszp_cupy.format import (
    CLASS_FREQUENCIES,
    ESCAPED,
    HEADER_BYTES,
    SIGNED_ZEROS,
    SYMBOL_FREQUENCIES,
    FormatError,
    Geometry,
    PageHeader,
    checksum,
    step_size,
    stream_lanes,
    unpack_word1,
)
from cuszp_cupy.reference import calibrate, decode_page, encode_page
from cuszp_cupy.tables import BUILT_IN, POSSIBLE, Tables, frequencies

ROW_BYTES = 16  # metadata of a page in a table


def entropy(page, bound="rms:0.05", **keywords) -> bytes:
    return encode_page(page, bound, "entropy", **keywords)


def payload_of(page, bound="rms:0.05", geometry=None, tables=BUILT_IN) -> bytes | None:
    """The payload of coding ``entropy``, whether or not another one is smaller."""
    geometry = reference.page_geometry(page.shape, geometry)
    groups = reference._groups(np.ascontiguousarray(page).view(np.uint16).ravel(), geometry)
    bounds = reference.parse_parts(bound, len(geometry.part_values))
    steps = reference._steps(groups, page.dtype.name, geometry, bounds)
    return reference._encode_entropy(groups, page.dtype.name, geometry, steps, tables)


# --- bytes ------------------------------------------------------------------------------------------------
#: bfloat16, 16 tokens x 4 channels, abs:0.5 (step 1). Channels 0 and 1 count up and down, 2 and 3 are small.
SMALL_PAGE = to_dtype(
    np.stack([np.arange(16) + 3, 20 - np.arange(16), np.arange(16) % 3 - 1, np.arange(16) == 5], axis=1), BFLOAT16
)
SMALL_BLOB = bytes.fromhex(
    "6b760101 00022800 10000000 04000000 00000000 01000000 20000000 2e07e16f"
    + "0600 0d00"  # base 6, 13 half-words of the only stream
    + "355b5000"  # x of its only lane
    + "fd139363 bc8c2955 348a8c8a 475e4f92 34cfc7c7 58fc 0000"  # half-words, padding
)


def test_the_bytes_of_a_small_page_are_those_of_the_specification():
    assert entropy(SMALL_PAGE, "abs:0.5") == SMALL_BLOB
    assert_same_bits(decode_page(SMALL_BLOB), SMALL_PAGE)


def test_the_bytes_of_real_pages_stay_what_they_are():
    """K and V at two bounds, and packed pages of four streams: a change of any of their bytes is a new format."""
    k, v = (kind[5] for kind in data.kv_pages().values())
    packed = data.packed_pages(heads=8, head_size=128)[0]
    blobs = [entropy(page, bound) for page in (k, v) for bound in ("rms:0.05", "rms:0.2")]
    blobs.append(entropy(packed, geometry=Geometry(16, 2048, parts=(128, 128))))
    assert all(PageHeader.parse(blob).coding == "entropy" for blob in blobs)
    assert [(len(blob), zlib.crc32(blob)) for blob in blobs] == [
        (1876, 4137515326),
        (1132, 3843420211),
        (2044, 2023614806),
        (1268, 2299206500),
        (20568, 2999883307),
    ]


def test_a_slow_decoder_written_from_the_specification_agrees():
    """2.10 step by step in plain integers, without NumPy's broadcasting."""
    for page in (SMALL_PAGE, data.kv_pages()["K"][7][:, :36]):
        blob = entropy(page, "rms:0.1")
        header = PageHeader.parse(blob)
        if header.coding == "entropy":
            assert slow_signed(blob[HEADER_BYTES:], header.geometry) == signed_integers(decode_page(blob), header)


def signed_integers(page, header) -> list[int]:
    """q with its sign of every value, group by group, of a page that lies on the grid."""
    groups = reference._groups(page.view(np.uint16).ravel(), header.geometry)
    q, escaped = reference._quantise(reference._floats(groups, header.dtype), header.steps[0], header.dtype)
    assert not escaped.any()
    return np.where(groups >= 0x8000, -q, q).astype(int).ravel().tolist()


def slow_signed(payload: bytes, geometry: Geometry) -> list[int]:
    """A decoder for one stream without escaped groups, as the sentences of the specification say it."""
    words = np.frombuffer(payload, "<u2").tolist()
    base, lanes = payload[0], stream_lanes(geometry.groups)
    assert geometry.groups <= 256 and -(-(words[1] + 2) // 2) * 4 == len(payload)
    words = words[2:]
    x = [words[2 * lane] | words[2 * lane + 1] << 16 for lane in range(lanes)]
    words = iter(words[2 * lanes :])
    turns = -(-geometry.groups // lanes)
    q = [[] for _ in range(geometry.groups)]

    def read(lane, f):
        slot, symbol, below = x[lane] % 1024, 0, 0
        while below + f[symbol] <= slot:
            below += f[symbol]
            symbol += 1
        x[lane] = f[symbol] * (x[lane] // 1024) + slot - below
        return symbol

    def bits(lane, n):
        value = x[lane] % 2**n
        x[lane] //= 2**n
        return value

    def refill(some):
        for lane in some:
            if x[lane] < 2**15:
                x[lane] = 2**16 * x[lane] + next(words)

    for turn in range(turns):
        here = [lane for lane in range(lanes) if turn * lanes + lane < geometry.groups]
        e = {lane: base + read(lane, CLASS_FREQUENCIES) - 19 for lane in here}
        flag = {lane: bits(lane, 1) for lane in here}
        refill(here)
        for i in range(32):
            m, wide = {}, {}
            for lane in here:
                s = read(lane, SYMBOL_FREQUENCIES[min(e[lane], 8) - 1]) if e[lane] else 0
                n = (s - 12 if s >= 16 else 0) + max(e[lane] - 7, 0)
                m[lane] = ((s if s < 16 else 2 ** (s - 12)) << max(e[lane] - 7, 0)) + bits(lane, min(n, 4))
                if n > 4:
                    wide[lane] = n - 4
            refill(wide)
            for lane, n in wide.items():
                m[lane] += 16 * bits(lane, n)
            for lane in here:
                group = turn * lanes + lane
                late = i % 2 and group + lanes >= geometry.groups
                negative = m[lane] and not late and bits(lane, 1)
                q[group].append(-m[lane] if negative else m[lane])
            refill(here)
        for lane in here:
            group = turn * lanes + lane
            if group + lanes >= geometry.groups:
                assert x[lane] >> 16 == 1
                for t in range(16):
                    if x[lane] >> t & 1:
                        q[group][2 * t + 1] *= -1
            for start in (0, 1):
                a = 0
                for t in range(16):
                    q[group][2 * t + start] += flag[lane] * ((a + 8) // 16)
                    now = q[group][2 * t + start]
                    a = 10 * now if t == 0 else a + 3 * (16 * now - a) // 8
    assert not any(words)
    return sum(q, [])


# --- bound ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [1, 1.3])  # steps with m = 4, 5
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strict_bound_for_every_pattern(dtype, factor):
    """Every pattern, in groups of neighbouring ones: all kinds of groups; the values are those of ``fixed``."""
    groups = np.random.default_rng(0).permutation(EVERY_PATTERN.reshape(-1, 32))  # a stream of NaN is not allowed
    page = token_layout(groups).view(dtype)
    classes = set()
    for exponent in range(-14, 7, 4):
        eb = factor * 2.0**exponent
        fixed = encode_page(page, eb)
        header = replace(PageHeader.parse(fixed), coding="entropy")
        y = decode_page(sealed(payload_of(page, eb), header))  # fixed is smaller where most groups are escaped
        step = step_size(header.steps[0])
        assert eb < step <= 2 * eb
        assert_within(page, y, step / 2)
        same_values(y, decode_page(fixed))
        assert y.view(np.uint16)[page.view(np.uint16) == 0x8000] == 0x8000
        assert_same_bits(decode_page(sealed(payload_of(y, eb), header)), y)
        groups = reference._groups(page.view(np.uint16).ravel(), header.geometry)
        classes |= set(reference._residuals(groups, dtype.name, header.geometry, header.steps[:1], BUILT_IN)[3])
    assert {0, 5, 7, 8, 12, SIGNED_ZEROS, ESCAPED} <= classes


def same_values(x, y) -> None:
    """The same values; zeros may differ in sign, since fixed keeps more of their signs than there must be."""
    with np.errstate(invalid="ignore"):
        both_zero = (x == 0) & (y == 0)
    x, y = (np.where(both_zero, 0, z.view(np.uint16)) for z in (x, y))
    np.testing.assert_array_equal(x, y)


@given(pages(), text_bounds | st.tuples(text_bounds, text_bounds))
def test_any_page_comes_back_as_from_fixed_and_is_no_larger(page_and_geometry, bound):
    """``test_kv`` shows that what comes back from fixed is within the bound."""
    page, geometry = page_and_geometry
    if geometry.parts is None and isinstance(bound, tuple):
        bound = bound[0]
    blob, fixed = entropy(page, bound, geometry=geometry), encode_page(page, bound, geometry=geometry)
    assert len(blob) <= len(fixed)
    y = decode_page(blob)
    bounds = reference.parse_parts(bound, len(geometry.part_values))
    if PageHeader.parse(fixed).coding == "fixed":
        same_values(y, decode_page(fixed))
    for x, part, b in zip(split(page, geometry.parts), split(y, geometry.parts), bounds, strict=True):
        assert_within(x, part, error_bound(x, b))
    zero = page.view(np.uint16).reshape(y.shape) == 0x8000
    assert (y.view(np.uint16)[zero] == 0x8000).all()
    assert_same_bits(decode_page(entropy(y, bound, geometry=geometry)), y)


@given(pages(), text_bounds)
def test_payloads_round_trip_where_another_coding_would_be_chosen(page_and_geometry, bound):
    page, geometry = page_and_geometry
    fixed = encode_page(page, bound, geometry=geometry)
    header = PageHeader.parse(fixed)
    if header.coding == "raw":
        return
    payload = payload_of(page, bound, geometry)
    if payload is None or not len(payload) < geometry.nbytes:
        return
    same_values(decode_page(sealed(payload, replace(header, coding="entropy"))), decode_page(fixed))


# --- which coding is taken --------------------------------------------------------------------------------
def test_noise_is_stored_raw_and_what_fixed_codes_better_as_fixed():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**16, (16, 64), np.uint16).view(BFLOAT16)
    assert entropy(noise, "abs:1e-6") == encode_page(noise, "abs:1e-6")
    assert PageHeader.parse(entropy(noise, "abs:1e-6")).coding == "raw"
    signs = to_dtype(rng.choice([-1.0, 1.0], (16, 4)) * 7, BFLOAT16)  # 2 groups; all magnitudes are 7
    assert entropy(signs, "abs:0.5") == encode_page(signs, "abs:0.5")
    assert PageHeader.parse(entropy(signs, "abs:0.5")).coding == "fixed"


def test_zeros_take_little():
    """4096 groups of zeros each take an eighth of a lane, a class and a flag; with fixed, which wins, 4 bits."""
    page = np.zeros((16, 8192), BFLOAT16)
    assert len(entropy(page)) == len(encode_page(page)) == HEADER_BYTES + 4096 // 2
    assert_same_bits(decode_page(entropy(page)), page)


def test_a_stream_larger_than_raw_is_not_allowed():
    page = data.kv_pages()["V"][:11].transpose(1, 0, 2).reshape(16, 2112)[:, :2048].copy()  # four streams
    assert PageHeader.parse(entropy(page)).coding == "entropy"
    page.view(np.uint16)[:, :1024] = np.random.default_rng(0).integers(0x8000, 0xFFFF, (16, 1024))
    page.view(np.uint16)[::8, :1024] = 0x8000  # escapes every group of the first two: 16.1 bits a value
    assert payload_of(page, "abs:0.01") is None
    assert PageHeader.parse(entropy(page, "abs:0.01")).coding == "fixed"


def test_prediction_pays_where_neighbours_resemble_each_other():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((16, 256))
    offset = to_dtype(noise + 20 * rng.standard_normal(256), BFLOAT16)
    shuffled = to_dtype(rng.permuted(offset.astype(np.float32), axis=1), BFLOAT16)  # same values, no neighbours
    assert len(entropy(offset, "abs:0.05")) < 0.75 * len(entropy(shuffled, "abs:0.05"))


def test_zeros_keep_their_sign_where_one_is_negative():
    """Else only -0.0 needs it: a page that came back from fixed holds many."""
    page = data.kv_pages()["V"][3]
    fixed = decode_page(encode_page(page, "rms:0.2"))
    assert (fixed.view(np.uint16) == 0x8000).sum() > 100
    blob = entropy(fixed, "rms:0.2")
    assert PageHeader.parse(blob).coding == "entropy" and len(entropy(page, "rms:0.2")) < len(blob)
    assert_same_bits(decode_page(blob), fixed)


# --- damage -----------------------------------------------------------------------------------------------
def sealed(payload: bytes, header: PageHeader | None = None, tables=BUILT_IN, **changes) -> bytes:
    """A blob with another payload and a checksum that fits."""
    header = header or PageHeader.parse(SMALL_BLOB)
    header = replace(header, payload_bytes=len(payload), checksum=0, **changes)
    return replace(header, checksum=checksum(header.pack(), payload, tables.digest)).pack() + payload


def test_sealed_seals():
    assert sealed(SMALL_BLOB[HEADER_BYTES:]) == SMALL_BLOB


def test_every_flipped_bit_is_found():
    for bit in range(8 * len(SMALL_BLOB)):
        damaged = bytearray(SMALL_BLOB)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_page(damaged)


def test_every_truncation_and_extension_is_found():
    for size in range(len(SMALL_BLOB)):
        with pytest.raises(FormatError, match="a page needs at least 32 bytes|payload bytes, .* are there"):
            decode_page(SMALL_BLOB[:size])
    with pytest.raises(FormatError, match="are there"):
        decode_page(SMALL_BLOB + bytes(4))


def altered(at: int, new: bytes) -> bytes:
    payload = bytearray(SMALL_BLOB[HEADER_BYTES:])
    payload[at : at + len(new)] = new
    return bytes(payload)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (altered(0, b"\x14"), "bases: expected 0..19, 0 for a missing part, got"),
        (altered(1, b"\1"), "bases: expected 0..19, 0 for a missing part, got"),
        (altered(0, b"\x13"), "class: expected 0..19|streams"),
        (altered(2, b"\1\0"), "streams: expected .2. to .64. half-words, got .1."),
        (altered(2, b"\x41\0"), "streams: expected .2. to .64. half-words, got .65."),
        (altered(2, b"\2\0"), "streams: they end after 4 half-words, the payload has"),
        (altered(2, b"\x40\0"), "streams: they end after 66 half-words, the payload has"),
        (altered(6, b"\0\0"), r"streams: a lane starts outside 2\^15"),
        (altered(6, b"\0\x80"), r"streams: a lane starts outside 2\^15"),
    ],
)
def test_payloads_that_contradict_themselves_are_refused_whatever_their_checksum(payload, message):
    with pytest.raises(FormatError, match=message):
        decode_page(sealed(payload))


def test_any_altered_half_word_is_refused_or_decodes():
    """Nothing that a foreign encoder may write makes the decoder warn, or fail otherwise."""
    seen = set()
    for at in range(4, len(SMALL_BLOB) - HEADER_BYTES):
        for new in (b"\0", b"\x55", b"\xff"):
            try:
                assert decode_page(sealed(altered(at, new))).shape == SMALL_PAGE.shape
            except FormatError as error:
                seen.add(str(error).split(":")[0] + ":" + str(error).split(":")[1][:8])
    assert len(seen) >= 3  # early, late, and what is no signs


@given(st.binary(min_size=12, max_size=120), st.integers(-400, 400), st.sampled_from(["float16", "bfloat16"]))
def test_any_sealed_payload_decodes_or_raises_format_error(payload, step, dtype):
    payload = payload[: len(payload) // 4 * 4]
    counted = bytearray(payload)
    counted[2:4] = (len(payload) // 2 - 2).to_bytes(2, "little")
    counted[0], counted[1] = counted[0] % 20, 0
    for candidate in (payload, bytes(counted)):
        try:
            page = decode_page(sealed(candidate, steps=(step, 0), dtype=dtype))
        except FormatError:
            continue
        assert page.shape == SMALL_PAGE.shape


# --- tables -----------------------------------------------------------------------------------------------
def test_the_built_in_tables_come_from_their_formula():
    """2.12, by numerical integration; ties of the rounding may go the other way on another machine."""
    d = np.abs(np.arange(39) - 19)
    assert np.abs(frequencies(np.append(2.0 ** (-2 * d), 0)).astype(int) - CLASS_FREQUENCIES).max() <= 1
    x = np.linspace(0, 30, 60_001)
    density = np.exp(-(x**1.5))
    below = np.append(0, np.cumsum(density[1:] + density[:-1]))
    for e in range(1, 9):
        values = np.arange(2 ** min(e, 7))
        middle = values + 0.5 if e == 8 else values
        edges = np.append(values, values.size) if e == 8 else np.append(0, values + 0.5)
        total = np.zeros(values.size)
        for j in range(8):
            low, high = 1e-3, 200.0
            for _ in range(60):
                c = (low * high) ** 0.5
                p = np.diff(np.interp(edges / c, x, below))
                p /= p.sum()
                low, high = (c, high) if p @ middle < 2 ** (min(e, 7) - 6 + (j + 0.5) / 8) else (low, c)
            total += p
        counts = np.zeros(19)
        np.add.at(counts, np.where(values < 16, values, np.frexp(values.astype(float))[1] + 11), total)
        built_in = BUILT_IN.symbols[0, e - 1].astype(int)
        assert np.abs(frequencies(counts, POSSIBLE[e - 1]).astype(int) - built_in).max() <= 1
        assert (built_in > 0).sum() == len(SYMBOL_FREQUENCIES[e - 1])


@pytest.fixture(scope="module")
def calibrated() -> Tables:
    return calibrate(data.kv_pages()["K"][:16], "rms:0.05")


def test_calibrated_tables_save_load_and_take_fewer_bits(calibrated, tmp_path):
    calibrated.save(tmp_path / "tables.npz")
    loaded = Tables.load(tmp_path / "tables.npz")
    assert loaded.digest == calibrated.digest and 1 <= loaded.id <= 255 and loaded.hints.shape == (96, 2)
    bits = {None: 0, calibrated: 0}
    for page in data.kv_pages()["K"][16:32]:  # other tokens of the same layer
        plain, blob = entropy(page), entropy(page, tables=calibrated)
        assert PageHeader.parse(blob).tables == calibrated.id
        assert_same_bits(decode_page(blob, tables=loaded), decode_page(plain, tables=loaded))
        bits[None] += len(plain) / page.size / 2
        bits[calibrated] += len(blob) / page.size / 2
    assert bits[calibrated] < bits[None] - 0.04


def test_pages_of_unknown_tables_are_refused_by_name(calibrated):
    blob = entropy(data.kv_pages()["K"][20], tables=calibrated)
    with pytest.raises(FormatError, match=f"tables: .* the calibrated tables {calibrated.id}, none was given"):
        decode_page(blob)
    others = calibrate(data.kv_pages()["V"][:4])
    with pytest.raises(FormatError, match=f"calibrated tables {calibrated.id}, {others.id} was given"):
        decode_page(blob, tables=others)
    same_id = replace(calibrated)
    object.__setattr__(same_id, "digest", calibrated.digest + 255)
    with pytest.raises(FormatError, match="or the tables are others"):
        decode_page(blob, tables=same_id)


def test_tables_with_hints_are_for_one_geometry(calibrated):
    page = data.kv_pages()["K"][20]
    with pytest.raises(ValueError, match="calibrated for pages of 192 channels in groups of tokens, not for"):
        entropy(page[:, :64], tables=calibrated)
    with pytest.raises(ValueError, match="calibrated for pages of 192 channels"):
        entropy(page[:15], tables=calibrated)
    header = replace(PageHeader.parse(SMALL_BLOB), tables=calibrated.id)
    with pytest.raises(FormatError, match="calibrated for pages of 192 channels"):
        decode_page(sealed(SMALL_BLOB[HEADER_BYTES:], header, calibrated), tables=calibrated)
    pooled = calibrate(data.kv_pages()["K"][:4], hints=False)
    assert pooled.hints is None
    for part in (page[:, :64], page[:15]):
        assert_same_bits(decode_page(entropy(part, tables=pooled), tables=pooled), decode_page(entropy(part)))


def test_calibrated_tables_serve_packed_and_strange_pages():
    geometry = Geometry(16, 1920, parts=(64, 64))
    packed = data.packed_pages(heads=15, head_size=64)[:3].copy()
    packed[0][3, 5], packed[0][4, 6] = np.nan, -0.0
    tables = calibrate(packed[:2], geometry=geometry)
    for page in (*packed, np.zeros_like(packed[0])):
        blob = entropy(page, geometry=geometry, tables=tables)
        same_values(decode_page(blob, tables=tables), decode_page(encode_page(page, geometry=geometry)))
    with pytest.raises(ValueError, match="pages: expected one or more that need not be raw, got none"):
        calibrate([to_dtype(np.full((16, 4), 1e-30), BFLOAT16)])


def damaged_tables(calibrated, **changes):
    arrays = {name: getattr(calibrated, name).copy() for name in ("classes", "symbols", "hints")}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    return arrays


def put(array, at, value):
    array[at] = value
    return array


BAD_TABLES = {
    "a frequency of 0": {"classes": lambda f: put(put(f, (0, 3), 0), (0, 4), f[0, 4] + 1)},
    "an impossible symbol": {"symbols": lambda f: put(put(f, (1, 0, 18), 1), (1, 0, 0), f[1, 0, 0] - 1)},
    "a sum of 1025": {"symbols": lambda f: put(f, (0, 7, 0), f[0, 7, 0] + 1)},
    "a sum of 2^16 + 1024": {"classes": lambda f: put(put(f, (0, 0), 33000), (0, 1), 33000)},
    "another dtype": {"classes": lambda f: f.astype(np.int64)},
    "another shape": {"symbols": lambda f: f[:1]},
    "a shift of 20": {"hints": lambda h: put(h, (0, 0), 20)},
    "a shift of -128": {"hints": lambda h: put(h, (0, 0), -128)},
    "a flag of 2": {"hints": lambda h: put(h, (3, 1), 2)},
    "no pairs": {"hints": lambda h: h[:0]},
    "flat hints": {"hints": lambda h: h.ravel()},
}


@pytest.mark.parametrize("changes", BAD_TABLES.values(), ids=BAD_TABLES)
def test_files_of_crafted_tables_are_refused(calibrated, changes, tmp_path):
    arrays = damaged_tables(calibrated, **changes)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(FormatError, match="tables: "):
        Tables.load(tmp_path / "bad.npz")


def test_files_that_are_no_tables_are_refused(calibrated, tmp_path):
    file = tmp_path / "bad.npz"
    np.savez(file, **damaged_tables(calibrated), more=np.zeros(1))
    with pytest.raises(FormatError, match=r"expected the arrays classes, symbols \(and hints\)"):
        Tables.load(file)
    np.savez(file, classes=calibrated.classes, symbols=np.array([object()], object))
    with pytest.raises(FormatError, match="no tables can be read from it"):
        Tables.load(file)
    calibrated.save(file)
    whole = file.read_bytes()
    for content in (b"", b"PK\3\4", whole[: len(whole) // 2], np.zeros(3).tobytes()):
        file.write_bytes(content)
        with pytest.raises(FormatError, match="no tables can be read from it"):
            Tables.load(file)
    with pytest.raises(FileNotFoundError):
        Tables.load(tmp_path / "none.npz")


# --- rate -------------------------------------------------------------------------------------------------
def bits_at(pages_, target: float, geometry=None) -> float:
    """Bits a value with 16 bytes of metadata a page, brought to sqrt(3) RMSE / RMS = ``target`` a bit a halving.

    Of pages with two parts: the mean of the parts' corrections, as both have as many values.
    """
    results = []
    for page in pages_:
        blob = entropy(page, f"rms:{target}", geometry=geometry)
        turns = page.reshape(-1, sum(geometry.parts)) if geometry else page
        parts = np.split(np.arange(turns.shape[1]), geometry.parts[:1] if geometry else [])
        x, y = turns.astype(np.float64), decode_page(blob).reshape(turns.shape).astype(np.float64)
        error = [np.sqrt(3 * np.mean((x[:, p] - y[:, p]) ** 2) / np.mean(x[:, p] ** 2)) for p in parts]
        bits = 8 * (len(blob) - HEADER_BYTES + ROW_BYTES) / page.size
        results.append(bits + np.mean(np.log2(np.array(error) / target)))
    return float(np.mean(results))


@pytest.mark.parametrize(("target", "small", "large"), [(0.05, 5.1, 4.95), (0.2, 3.2, 3.05)])
def test_rate_on_the_sample(target, small, large):
    """Real K and V without calibration: pages of 6 KiB (16 tokens of 3 heads of 64) and of 64 KiB (K and V)."""
    k, v = (bits_at(kind[::8], target) for kind in data.kv_pages().values())
    assert small - 0.5 < (k + v) / 2 <= small  # far less would mean that something is not counted
    packed = data.packed_pages(heads=8, head_size=128)
    assert large - 0.5 < bits_at(packed, target, Geometry(16, 2048, parts=(128, 128))) <= large


# --- kernels ----------------------------------------------------------------------------------------------
#: Why each: one lane; K|V as vLLM lays them out, one stream and four; parts within one stream; a last stream of
#: one group; more streams than warps; flat with a tail; flat with parts; one value.
GEOMETRIES = [
    Geometry(16, 2),
    Geometry(16, 512, parts=(64, 64)),
    Geometry(16, 2048, parts=(128, 128)),
    Geometry(32, 48, outer=2, parts=(2, 6)),
    Geometry(16, 1026),
    Geometry(16, 4800),
    Geometry(7, 333),
    Geometry(3, 192, parts=(64, 32)),
    Geometry(1, 1),
]


def real_pages(geometry, dtype, seed) -> np.ndarray:
    """Three pages of real values, of which the last one came back from fixed and has NaN, Inf and an outlier."""
    values = np.concatenate([kind.ravel() for kind in data.kv_pages(dtype=dtype).values()])
    at = np.random.default_rng(seed).integers(values.size, size=3)
    pages_ = np.stack([np.resize(np.roll(values, i), geometry.values).reshape(geometry.shape) for i in at])
    pages_[2] = decode_page(encode_page(pages_[2], "rms:0.2", geometry=geometry))
    last = pages_[2].reshape(-1)
    last[[0, last.size // 2, last.size // 3]] = np.nan, np.inf, 1000
    return pages_


class OnGpu:
    """Blobs of pages, and pages of blobs, through the kernels' launch functions alone."""

    def __init__(self, geometry, dtype, tables=BUILT_IN, shift=0):
        self.cupy = pytest.importorskip("cupy")
        self.kernels = importlib.import_module("cuszp_cupy.raw.kv")
        self.geometry, self.dtype, self.tables, self.shift = geometry, np.dtype(dtype), tables, shift
        self.common = (self.dtype.name, geometry)
        self.memory = self.cupy.asarray(self.kernels.entropy_tables(tables))
        self.keywords = {"aligned": shift % 4 == 0, "blocks": 2}  # so that each block takes more than one page

    def _rows(self, n, nbytes):
        memory = self.cupy.full((n, -(-nbytes // 16) * 16 + 16), 0xA5, self.cupy.uint8)
        return memory, memory.data.ptr + np.arange(n, dtype=np.uint64) * memory.shape[1]

    def encode(self, pages_, bound, shared_region=False) -> list[bytes]:
        cupy, kernels, n = self.cupy, self.kernels, len(pages_)
        source, addresses = self._rows(n, self.geometry.nbytes + self.shift)
        bits = np.ascontiguousarray(pages_).view(np.uint8).reshape(n, -1)
        source[:, self.shift : self.shift + bits.shape[1]] = cupy.asarray(bits)
        addresses = cupy.asarray(addresses + np.uint64(self.shift))
        slots, slot_addresses = self._rows(n, kernels.entropy_slot_bytes(self.geometry))
        slot_addresses = cupy.asarray(slot_addresses)
        payloads, payload_addresses = self._rows(n, self.geometry.nbytes)
        if shared_region:
            payload_addresses[:] = payload_addresses[0]
        cursors = cupy.zeros(1, cupy.uint32)
        exchange = cupy.zeros(n * kernels.EXCHANGE_BYTES, cupy.uint8)
        sizes = cupy.zeros(n * kernels.num_chunks(self.geometry), cupy.uint32)
        fixed_rows, rows = (cupy.zeros((n, 4), cupy.uint32) for _ in range(2))
        bounds = reference.parse_parts(bound, len(self.geometry.part_values))
        kernels.encode(
            addresses.data.ptr,
            slot_addresses.data.ptr,
            fixed_rows.data.ptr,
            n,
            *self.common,
            bounds,
            aligned=False,
            exchange_ptr=exchange.data.ptr,
            sizes_ptr=sizes.data.ptr,
        )
        destination = cupy.asarray(payload_addresses)
        kernels.encode_entropy(
            addresses.data.ptr, fixed_rows.data.ptr, slot_addresses.data.ptr, destination.data.ptr,
            rows.data.ptr, n, *self.common, self.tables, self.memory.data.ptr,
            cursors_ptr=cursors.data.ptr if shared_region else 0, **self.keywords,
        )  # fmt: skip
        slots, payloads, rows = slots.get(), payloads.get(), rows.get()
        assert (slots[:, -16:] == 0xA5).all()
        blobs = []
        for i, (word1, size, check, place) in enumerate(rows.tolist()):
            assert shared_region or (payloads[i, -(-size // 16) * 16 :] == 0xA5).all()
            start = 16 * place if shared_region else i * payloads.shape[1]
            coding, steps = unpack_word1(word1, self.geometry)
            header = PageHeader(self.dtype.name, self.geometry, coding, steps, size, check, word1 >> 24)
            blobs.append(header.pack() + payloads.reshape(-1)[start : start + size].tobytes())
        if shared_region:
            assert int(cursors.get()[0]) == sum(-(-row[1] // 16) for row in rows.tolist())
        return blobs

    def decode(self, blobs) -> tuple[np.ndarray, np.ndarray]:
        cupy, n = self.cupy, len(blobs)
        payloads, addresses = self._rows(n, max(len(blob) for blob in blobs))
        rows = np.zeros((n, 4), np.uint32)
        for i, blob in enumerate(blobs):
            rows[i, :3] = np.frombuffer(blob[:HEADER_BYTES], "<u4")[[1, 6, 7]]
            payloads[i, : len(blob) - HEADER_BYTES] = cupy.asarray(np.frombuffer(blob, np.uint8)[HEADER_BYTES:])
        pages_, page_addresses = self._rows(n, self.geometry.nbytes + self.shift)
        addresses, rows = cupy.asarray(addresses), cupy.asarray(rows)
        page_addresses = cupy.asarray(page_addresses + np.uint64(self.shift))
        status = cupy.full(n, 77, cupy.uint32)
        pointers = (addresses.data.ptr, rows.data.ptr, page_addresses.data.ptr, status.data.ptr, n)
        exchange = cupy.zeros(n * self.kernels.EXCHANGE_BYTES, cupy.uint8)
        sizes = cupy.zeros(n * self.kernels.num_chunks(self.geometry), cupy.uint32)
        scratch = {"exchange_ptr": exchange.data.ptr, "sizes_ptr": sizes.data.ptr}
        self.kernels.decode(*pointers, *self.common, aligned=False, **scratch)
        self.kernels.decode_entropy(*pointers, *self.common, self.tables, self.memory.data.ptr, **self.keywords)
        memory, size = pages_.get(), self.geometry.nbytes
        assert (memory[:, : self.shift] == 0xA5).all() and (memory[:, self.shift + size :] == 0xA5).all()
        values = np.ascontiguousarray(memory[:, self.shift : self.shift + size]).view(self.dtype)
        return values.reshape(n, *self.geometry.shape), status.get()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_kernels_equal_reference(geometry, dtype):
    codings = set()
    for seed, bound in enumerate(["rms:0.05", "rms:0.3", "rel:0.0002", "abs:0.02"]):
        pages_ = real_pages(geometry, dtype.name, seed)
        gpu = OnGpu(geometry, dtype, shift=2 * (seed % 2))
        expected = [entropy(page, bound, geometry=geometry) for page in pages_]
        assert gpu.encode(pages_, bound) == expected
        assert gpu.encode(pages_, bound, shared_region=True) == expected
        values, status = gpu.decode(expected)
        assert not status.any()
        for blob, page in zip(expected, values, strict=True):
            assert_same_bits(page, decode_page(blob))
            codings.add(PageHeader.parse(blob).coding)
    assert geometry.values < 64 or "entropy" in codings


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_reference_for_every_pattern(dtype):
    groups = np.random.default_rng(0).permutation(EVERY_PATTERN.reshape(-1, 32))
    page = token_layout(groups).view(dtype)
    gpu = OnGpu(Geometry(*page.shape), dtype)
    for exponent in range(-14, 8, 3):
        expected = entropy(page, 2.0**exponent)
        assert gpu.encode(page[None], 2.0**exponent) == [expected]
        values, status = gpu.decode([expected])
        assert not status.any()
        assert_same_bits(values[0], decode_page(expected))


@pytest.mark.gpu
def test_kernels_equal_reference_with_calibrated_tables(calibrated):
    pages_ = data.kv_pages()["K"][16:24]
    packed, geometry = data.packed_pages(heads=15, head_size=64)[:3], Geometry(16, 1920, parts=(64, 64))
    for tables, batch, shape in (
        (calibrated, pages_, Geometry(16, 192)),
        (calibrate(pages_, hints=False), pages_, Geometry(16, 192)),
        (calibrate(packed, geometry=geometry), packed, geometry),
    ):
        gpu = OnGpu(shape, BFLOAT16, tables)
        expected = [entropy(page, geometry=shape, tables=tables) for page in batch]
        assert gpu.encode(batch, "rms:0.05") == expected
        values, status = gpu.decode(expected)
        assert not status.any()
        for blob, page in zip(expected, values, strict=True):
            assert_same_bits(page, decode_page(blob, tables=tables))
        assert (OnGpu(shape, BFLOAT16).decode(expected)[1] == 8).all()  # other tables


@pytest.mark.gpu
def test_kernels_refuse_what_the_reference_refuses():
    """Altered and foreign payloads under a checksum that fits: no crash, nothing outside, the same verdict."""
    rng = np.random.default_rng(0)
    sources = [
        entropy(kind[i], bound)
        for kind in data.kv_pages().values()
        for i in (0, 9)
        for bound in ("rms:0.02", "rms:0.5")
    ]
    blobs, verdicts = [], []
    while len(blobs) < 400:
        source = sources[len(blobs) % len(sources)]
        payload = bytearray(source[HEADER_BYTES:])
        way = rng.integers(4)
        if way == 0:
            payload[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        elif way == 1:
            payload[rng.integers(64)] = rng.integers(256)
        elif way == 2:
            payload = payload[: len(payload) // 8 * 4]
            payload[2:4] = (len(payload) // 2 - 2).to_bytes(2, "little")
        else:
            payload[4:] = rng.bytes(len(payload) - 4)
        blobs.append(sealed(bytes(payload), PageHeader.parse(source)))
        try:
            verdicts.append(decode_page(blobs[-1]))
        except FormatError:
            verdicts.append(None)
    values, status = OnGpu(Geometry(16, 192), BFLOAT16).decode(blobs)
    assert [v is None for v in verdicts] == (status != 0).tolist() and 10 < (status == 0).sum() < 390
    for page, verdict in zip(values, verdicts, strict=True):
        if verdict is not None:
            assert_same_bits(page, verdict)
    broken = bytearray(sources[0])
    broken[100] ^= 1
    assert OnGpu(Geometry(16, 192), BFLOAT16).decode([bytes(broken)])[1].tolist() == [4]
