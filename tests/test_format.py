"""The metadata of stream ``kv`` and what both streams compute from it: layout, limits, steps, checksum."""

import math
import random
import struct
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuszp_cupy.format import (
    CODE_WORDS,
    HEADER_BYTES,
    STEP_LIMIT,
    FormatError,
    Geometry,
    PageHeader,
    check_coding,
    check_mode,
    checksum,
    max_stream_bytes,
    pack_word1,
    rate_bytes,
    step_number,
    step_parts,
    step_size,
    unpack_word1,
)

GEOMETRY = Geometry(tokens=16, channels=64, outer=3, parts=(32, 32))
HEADER = PageHeader("bfloat16", GEOMETRY, "fixed", (-5, 7), 512, 0xDEADBEEF)
#                      'kv', version, dtype   steps -5, 7; fixed  tokens         channels
HEADER_LITERAL = bytes.fromhex("6b760101 fb1d1800 10000000 40000000 20002000 03000000 00020000 efbeadde")
#                                                             kw, vw   outer, 0 payload  checksum


# --- header -----------------------------------------------------------------------------------------------
def test_header_bytes_are_those_of_the_specification():
    assert len(HEADER_LITERAL) == HEADER_BYTES == 32
    assert HEADER.pack() == HEADER_LITERAL
    assert HEADER.word1 == (512 - 5) | (512 + 7) << 10 | 1 << 20
    one_part = PageHeader("float16", Geometry(3, 5), "raw", (0, 0), 30, 1)
    assert (
        one_part.pack().hex(" ", 4) == "6b760100 00020800 03000000 05000000 00000000 01000000 1e000000 01000000"
    )


headers = st.builds(
    lambda dtype, tokens, channels, outer, parts, raw, steps, payload, check: PageHeader(
        dtype,
        g := Geometry(16 * tokens if parts else tokens, channels * sum(parts or (1,)), outer, parts),
        "raw" if raw or g.code_bytes >= g.nbytes else "fixed",
        (0, 0) if raw or g.code_bytes >= g.nbytes else (steps[0], steps[1] if parts else 0),
        g.nbytes
        if raw or g.code_bytes >= g.nbytes
        else g.code_bytes + payload % ((g.nbytes - g.code_bytes + 3) // 4) * 4,
        check,
    ),
    st.sampled_from(["float16", "bfloat16"]),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(1, 9),
    st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda p: (2 * p[0], 2 * p[1])),
    st.booleans(),
    st.tuples(*[st.integers(-STEP_LIMIT, STEP_LIMIT)] * 2),
    st.integers(0, 2**32),
    st.integers(0, 2**32 - 1),
)


@given(headers)
def test_parse_undoes_pack(header):
    blob = header.pack() + bytes(header.payload_bytes)
    assert PageHeader.parse(blob) == header
    assert PageHeader.parse(np.frombuffer(blob, np.uint8)) == header
    assert unpack_word1(header.word1, header.geometry) == (header.coding, header.steps)


def word1(step0=0, step1=0, coding=1, tables=0) -> bytes:
    return struct.pack("<I", (step0 + 512) | (step1 + 512) << 10 | coding << 20 | tables << 24)


#: (what is wrong, where in the header, bytes put there, the message)
BAD_FIELDS = [
    ("magic", 0, b"KV", r"expected the magic b'kv', got b'KV'"),
    ("version 0", 2, b"\0", "this release reads version 1, got 0"),
    ("version 2", 2, b"\2", "this release reads version 1, got 2"),
    ("dtype", 3, b"\2", r"dtype: expected 0 \(float16\) or 1 \(bfloat16\), got 2"),
    ("coding 3", 4, word1(coding=3), r"coding: expected 0 \(raw\), 1 \(fixed\) or 2 \(entropy\), got 3"),
    ("coding 15", 4, word1(coding=15), r"coding: .* got 15"),
    ("tables", 7, b"\1", r"tables: expected 0 \(coding fixed has none\), got 1"),
    ("step above", 4, word1(401), "step of part 0: expected -400..400, got 401"),
    ("step below", 4, word1(-401), "step of part 0: expected -400..400, got -401"),
    ("step of part 1 above", 4, word1(0, 511), "step of part 1: expected -400..400, got 511"),
    ("step of part 1 below", 4, word1(0, -512), "step of part 1: expected -400..400, got -512"),
    ("tokens 0", 8, bytes(4), "tokens: expected an integer from 1 .* got 0"),
    ("tokens 2^31", 8, b"\0\0\0\x80", "tokens: expected an integer from 1 to 2147483647, got 2147483648"),
    ("channels 0", 12, bytes(4), "channels: expected an integer from 1 .* got 0"),
    ("too many values", 8, b"\0\0\0\x10", "page: at most 67108864 values, got 3 x 268435456 x 64"),
    ("kw 0", 16, bytes(2), r"parts: expected two widths or none, got \(0, 32\)"),
    ("vw 0", 18, bytes(2), r"parts: expected two widths or none, got \(32, 0\)"),
    ("parts that do not divide", 16, b"\x22\0", r"sum divides the 64 channels, got \(34, 32\)"),
    (
        "flat with narrow parts",
        8,
        b"\x0f\0\0\0" + b"\x40\0\0\0" + b"\x08\0\x38\0",
        "page shape not supported: 15 t",
    ),
    ("outer 0", 20, bytes(2), "outer: expected an integer from 1 to 65535, got 0"),
    ("reserved", 22, b"\1\0", "header bytes 22-23: expected 0, got 1"),
    ("reserved", 22, b"\0\x80", "header bytes 22-23: expected 0, got 32768"),
    ("payload below its codes", 24, struct.pack("<I", 44), "payload bytes: expected .* from 48 to 6143, got 44"),
    ("payload as large as raw", 24, struct.pack("<I", 6144), "payload bytes: .* got 6144"),
    ("payload of 2^32 - 4", 24, struct.pack("<I", 2**32 - 4), "payload bytes: .* got 4294967292"),
    (
        "payload that is no words",
        24,
        struct.pack("<I", 511),
        "payload bytes: expected a multiple of 4 .* got 511",
    ),
    ("raw with a step", 4, word1(1, coding=0), "step of part 0: expected 0, got 1"),
    ("raw with a step of part 1", 4, word1(0, -1, coding=0), "step of part 1: expected 0, got -1"),
    ("raw of another size", 4, word1(coding=0), "payload bytes: a raw page has 6144, got 512"),
]


@pytest.mark.parametrize(
    ("offset", "new", "message"), [b[1:] for b in BAD_FIELDS], ids=[b[0] for b in BAD_FIELDS]
)
def test_bad_fields_are_named(offset, new, message):
    blob = bytearray(HEADER.pack() + bytes(512))
    PageHeader.parse(blob)
    blob[offset : offset + len(new)] = new
    with pytest.raises(FormatError, match=message):
        PageHeader.parse(blob)


def test_a_missing_part_has_no_step():
    header = replace(HEADER, geometry=Geometry(16, 64, 3))
    with pytest.raises(FormatError, match="step of part 1: expected 0, got 7"):
        PageHeader.parse(header.pack() + bytes(512))


@pytest.mark.parametrize("size", [0, 1, 31])
def test_a_blob_shorter_than_a_header_is_refused(size):
    with pytest.raises(FormatError, match=f"a page needs at least 32 bytes, got {size}"):
        PageHeader.parse(HEADER.pack()[:size])


@pytest.mark.parametrize("size", [0, 1, 508, 511, 513, 516, 1024])
def test_a_payload_that_is_not_all_there_or_too_long_is_refused(size):
    with pytest.raises(FormatError, match=f"the header says 512 payload bytes, {size} are there"):
        PageHeader.parse(HEADER.pack() + bytes(size))


# --- geometry ---------------------------------------------------------------------------------------------
#: geometry, flat, groups, part_values, code_bytes
GEOMETRIES = [
    (Geometry(1, 1), True, 1, (1,), 16),
    (Geometry(16, 2), False, 1, (32,), 16),  # the smallest page of token groups
    (Geometry(16, 1), True, 1, (16,), 16),  # odd channels
    (Geometry(15, 2), True, 1, (30,), 16),
    (Geometry(17, 64), True, 34, (1088,), 32),
    (Geometry(16, 64), False, 32, (1024,), 16),  # 32 groups: the codes fill 16 bytes
    (Geometry(16, 66), False, 33, (1056,), 32),
    (Geometry(16, 64, 1, (30, 34)), False, 32, (480, 544), 16),
    (Geometry(16, 64, 3, (2, 14)), False, 96, (3 * 16 * 8, 3 * 16 * 56), 48),
    (Geometry(5, 192, 2, (32, 64)), True, 60, (640, 1280), 32),
    (Geometry(16, 192, 1, (64, 32)), False, 96, (2048, 1024), 48),
]


@pytest.mark.parametrize(("geometry", "flat", "groups", "part_values", "code_bytes"), GEOMETRIES)
def test_geometry(geometry, flat, groups, part_values, code_bytes):
    assert (geometry.flat, geometry.groups) == (flat, groups)
    assert geometry.part_values == part_values and sum(part_values) == geometry.values
    assert geometry.code_bytes == code_bytes
    assert geometry.nbytes == 2 * geometry.values == 2 * math.prod(geometry.shape)
    assert geometry.shape[-2:] == (geometry.tokens, geometry.channels)
    assert len(geometry.shape) == (2 if geometry.outer == 1 else 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "tokens: expected an integer from 1 to 2147483647, got 0"),
        ((-16, 2), "tokens: .* got -16"),
        ((1.0, 1), "tokens: .* got 1.0"),
        ((1, 2**31), "channels: .* got 2147483648"),
        ((1, "2"), "channels: .* got '2'"),
        ((1, 1, 0), "outer: expected an integer from 1 to 65535, got 0"),
        ((1, 1, 65536), "outer: .* got 65536"),
        ((2**15, 2**15), "page: at most 67108864 values, got 1 x 32768 x 32768; split it"),
        ((16, 4, 1, (2,)), r"parts: expected None or \(K width, V width\), got \(2,\)"),
        ((16, 4, 1, (0, 4)), "parts: expected two widths from 1 to 65535"),
        ((16, 4, 1, (-2, 6)), "parts: expected two widths from 1 to 65535"),
        ((16, 2**16 + 2, 1, (2**16, 2)), "parts: expected two widths from 1 to 65535"),
        ((16, 8, 1, (2, 4)), r"sum divides the 8 channels, got \(2, 4\)"),
        ((16, 8, 1, (3, 5)), r"page shape not supported: 16 tokens with parts \(3, 5\)"),
        ((8, 48, 1, (32, 16)), "page shape not supported: 8 tokens"),
    ],
)
def test_bad_geometries_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Geometry(*arguments)


def test_geometry_takes_numpy_integers_and_lists():
    geometry = Geometry(np.int64(16), np.int32(8), parts=[np.int64(2), 6])
    assert geometry == Geometry(16, 8, parts=(2, 6)) and hash(geometry) == hash(Geometry(16, 8, parts=(2, 6)))


# --- steps ------------------------------------------------------------------------------------------------
def threshold(s: int) -> Fraction:
    """2.7: the smallest 2 eb whose step number is s: its step; where m > 4, with the margin of 1 + 2^-16."""
    k, m = s // 4, s % 4 + 4
    return m * Fraction(2) ** (k - 2) * (1 if m == 4 else 1 + Fraction(1, 2**16))


def largest_step_number(two_eb: Fraction) -> int:
    s = 4 * round(math.log2(two_eb)) + 12
    while threshold(s) > two_eb:
        s -= 1
    return s


def test_step_parts_and_sizes():
    assert [step_size(s) for s in range(-1, 6)] == [7 / 8, 1, 1.25, 1.5, 1.75, 2, 2.5]
    assert [step_parts(s) for s in (-5, -1, 0, 3, 4)] == [(-2, 7), (-1, 7), (0, 4), (0, 7), (1, 4)]
    assert step_size(STEP_LIMIT) == 2.0**100 and step_size(-STEP_LIMIT) == 2.0**-100


def test_step_number_at_every_threshold():
    for s in range(-520, 521):
        at = float(threshold(s))
        assert at == threshold(s)
        assert step_number(at) == s and step_number(math.nextafter(at, 0)) == s - 1
        assert step_size(s) <= at <= step_size(s) * (1 + 2**-16)
        square = at * at
        if s % 4:  # 38 significant bits: exact
            assert Fraction(square) == threshold(s) ** 2
        assert step_number(square, squared=True) == s
        assert step_number(math.nextafter(square, 0), squared=True) == s - 1


@given(st.floats(min_value=1e-200, max_value=1e200), st.integers(-200, 200))
def test_step_number_is_the_largest_within_the_bound(two_eb, exponent):
    value = Fraction(two_eb) * Fraction(2) ** exponent
    assert step_number(two_eb, exponent) == largest_step_number(value)
    s = step_number(two_eb, exponent, squared=True)
    assert threshold(s) ** 2 <= value < threshold(s + 1) ** 2


def test_step_number_of_extremes():
    assert step_number(math.inf) > STEP_LIMIT and step_number(math.inf, squared=True) > STEP_LIMIT
    assert step_number(5e-324) == 4 * -1074 and step_number(1.5e-323) == 4 * -1073 + 1  # 1.5 x 2^-1073
    assert step_number(5e-324, squared=True) == 4 * -537
    assert step_number(1e-310) == largest_step_number(Fraction(1e-310))  # subnormal
    assert step_number(float(np.finfo(np.float64).max)) == 4 * 1023 + 3
    assert step_number(1.0, -2000) == -8000 and step_number(1.0, -2000, squared=True) == -4000
    assert step_number(1.0, -3, squared=True) == -8 + 1  # sqrt(1/8) = 1.41 x 2^-2


# --- checksum ---------------------------------------------------------------------------------------------
def plain_checksum(header: bytes, payload: bytes) -> int:
    """2.2, a word at a time in Python integers."""
    payload += bytes(-len(payload) % 4)
    words = [(i, struct.unpack_from("<I", header, 4 * i)[0]) for i in range(7)]
    words += [(8 + i, struct.unpack_from("<I", payload, 4 * i)[0]) for i in range(len(payload) // 4)]
    total = 0
    for i, word in words:
        total += word * ((i + 1) * 0x9E3779B1 % 2**26 | 1)
    return total % (2**32 - 5)


PAYLOAD = random.Random(0).randbytes(60)


def test_checksum_is_that_of_the_specification():
    assert checksum(HEADER_LITERAL, PAYLOAD) == plain_checksum(HEADER_LITERAL, PAYLOAD)
    assert checksum(HEADER_LITERAL, b"\1\2\3\4\5\6") == 154836472
    assert checksum(HEADER_LITERAL, b"\1\2\3\4\5\6") == checksum(HEADER_LITERAL, b"\1\2\3\4\5\6\0\0")


@given(st.binary(min_size=28, max_size=32), st.binary(min_size=1, max_size=99))
def test_checksum_is_that_of_plain_integers(header, payload):
    assert checksum(header, payload) == plain_checksum(header, payload)


def test_every_flipped_bit_changes_the_checksum():
    data = HEADER_LITERAL[:28] + PAYLOAD
    seen = {checksum(data[:28], data[28:])}
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(checksum(flipped[:28], flipped[28:]))
    assert len(seen) == 1 + 8 * len(data)  # all differ, from each other too


def test_swapped_words_change_the_checksum():
    words = list(struct.unpack("<22I", HEADER_LITERAL[:28] + PAYLOAD))
    assert len(set(words)) == 22
    seen = {checksum(HEADER_LITERAL, PAYLOAD)}
    for i in range(22):
        for j in range(i):
            swapped = words.copy()
            swapped[i], swapped[j] = swapped[j], swapped[i]
            data = struct.pack("<22I", *swapped)
            seen.add(checksum(data[:28], data[28:]))
    assert len(seen) == 1 + 22 * 21 // 2


def test_the_checksum_field_itself_is_left_out():
    assert checksum(HEADER_LITERAL, PAYLOAD) == checksum(HEADER_LITERAL[:28] + b"....", PAYLOAD)


# --- sizes and names --------------------------------------------------------------------------------------
def test_code_words_are_those_of_the_specification():
    assert CODE_WORDS.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16]


@pytest.mark.parametrize(
    ("n", "rates", "most"),
    [
        (0, 0, 0),
        (1, 1024, 1024 + 128),  # one value: a whole chunk of rate bytes, a block of 32 planes and signs
        (32, 1024, 1024 + 128),
        (33, 1024, 1024 + 256),
        (32768, 1024, 1024 + 131072),
        (32769, 2048, 2048 + 131072 + 128),
        (2**31 - 1, 65536 * 1024, 65536 * 1024 + 2**33),
    ],
)
def test_sizes_of_stream_cuszp(n, rates, most):
    assert (rate_bytes(n), max_stream_bytes(n)) == (rates, most)


def test_names_of_modes_and_codings():
    assert [check_mode(mode) for mode in ("fixed", "plain", "outlier")] == ["fixed", "plain", "outlier"]
    assert [check_coding(coding) for coding in ("raw", "fixed", "entropy")] == ["raw", "fixed", "entropy"]
    with pytest.raises(ValueError, match="mode: expected one of fixed, plain, outlier, got 'Plain'"):
        check_mode("Plain")
    with pytest.raises(ValueError, match="coding: expected one of raw, fixed, entropy, got 'huffman'"):
        check_coding("huffman")


def test_word1_has_no_room_left():
    assert pack_word1("raw", (0, 0)) == 512 | 512 << 10
    assert pack_word1("fixed", (-400, 400)) == 112 | 912 << 10 | 1 << 20
