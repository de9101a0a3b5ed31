"""Bounds: parsing, showing, refusing; and the assertions with which all tests check bounds."""

import fractions
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from assertions import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st

from cuszp_cupy.bound import KINDS, PRESETS, Bound, parse_parts


@pytest.mark.parametrize(
    ("given_bound", "kind", "value"),
    [
        ("abs:1e-3", "abs", 1e-3),
        ("rel:0.5", "rel", 0.5),
        ("rms:0.05", "rms", 0.05),
        (" rms : 2 ", "rms", 2.0),
        (0.25, "abs", 0.25),
        (3, "abs", 3.0),
        (np.float32(0.5), "abs", 0.5),
        (fractions.Fraction(1, 4), "abs", 0.25),
        (Bound("rel", 2), "rel", 2.0),
    ],
)
def test_parse(given_bound, kind, value):
    bound = Bound.parse(given_bound)
    assert (bound.kind, bound.value) == (kind, value) and type(bound.value) is float


@given(st.sampled_from(KINDS), st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_what_is_shown_parses_to_the_same(kind, value):
    bound = Bound(kind, value)
    assert Bound.parse(str(bound)) == bound and eval(repr(bound)) == bound


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("0.05", r"expected text like 'abs:1e-3', 'rel:1e-3' or 'rms:0.05' .*, got '0.05'"),
        ("", r"expected text like .* got ''"),
        ("psnr:60", r"expected abs:E, rel:E or rms:A, got the kind 'psnr'"),
        (":1", r"got the kind ''"),
        ("ABS:1", r"got the kind 'ABS'"),
        ("rms:", r"expected a number after 'rms:', got ''"),
        ("rms:a", r"expected a number after 'rms:', got 'a'"),
        ("rms:1:2", r"expected a number after 'rms:', got '1:2'"),
        ("rms:0", r"expected a positive finite number, got rms:0"),
        ("abs:-1", r"expected a positive finite number, got abs:-1"),
        ("abs:nan", r"expected a positive finite number, got abs:nan"),
        ("rel:inf", r"expected a positive finite number, got rel:inf"),
        (0, r"expected a positive finite number, got abs:0"),
        (math.nan, r"expected a positive finite number, got abs:nan"),
    ],
)
def test_bad_values_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Bound.parse(bad)


@pytest.mark.parametrize("bad", [None, [1, 2], b"rms:1", 1j])
def test_bad_types_are_refused(bad):
    with pytest.raises(TypeError, match="expected a number after 'abs:', got"):
        Bound.parse(bad)


def test_a_bound_is_one_for_all_parts_or_one_each():
    a, b = Bound("rms", 0.05), Bound("abs", 1)
    assert parse_parts("rms:0.05", 1) == (a,)
    assert parse_parts(a, 2) == (a, a)
    assert parse_parts(("rms:0.05", 1), 2) == parse_parts([a, "abs:1"], 2) == (a, b)
    assert parse_parts([a], 1) == (a,)


@pytest.mark.parametrize(("bounds", "parts"), [(["rms:1"], 2), (["rms:1"] * 2, 1), ((1, 2, 3), 2), ([], 1)])
def test_a_wrong_number_of_bounds_is_refused(bounds, parts):
    with pytest.raises(ValueError, match=rf"the page has {parts} part\(s\), got {len(bounds)} bounds"):
        parse_parts(bounds, parts)


# --- the assertions ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_assert_within_takes_what_is_within(dtype):
    x = np.array([1, -1, np.nan, np.inf, 0], dtype)
    y = np.array([1.5, -0.5, np.nan, np.inf, -0.5], dtype)
    assert_within(x, y, 0.5)
    assert_within(x, y, np.array([0.5, 0.5, 0, 0, 1]))


@pytest.mark.parametrize("wrong", [1.625, -1, np.nan, np.inf])
def test_assert_within_fails_and_says_where(wrong):
    x, y = np.array([0, 1], np.float16), np.array([0, wrong], np.float16)
    with pytest.raises(AssertionError, match=r"broken at 1 of 2 values, first at \[1\]: .*1.0.* -> "):
        assert_within(x, y, 0.5)


def test_assert_within_fails_beyond_the_bound_by_one_step_of_the_dtype():
    x = np.zeros(1, np.float16)
    y = np.array([1], np.float16)
    assert_within(x, y, 1.0)
    with pytest.raises(AssertionError, match="error 1, eb 1"):
        assert_within(x, y, np.nextafter(1.0, 0))


@pytest.mark.parametrize("bits", [0x7E01, 0x7C00, 0xFE00, 0x0000])
def test_assert_within_wants_the_bits_of_what_is_not_finite(bits):
    x, y = np.array([0x7E00], np.uint16), np.array([bits], np.uint16)
    with pytest.raises(AssertionError, match="broken at 1 of 1"):
        assert_within(x.view(np.float16), y.view(np.float16), math.inf)


def test_assert_same_bits_fails_on_the_sign_of_zero_and_on_shapes():
    zero = np.zeros(2, np.float16)
    assert_same_bits(zero, zero.copy())
    for other in (-zero, np.zeros((1, 2), np.float16), np.zeros(2, ml_dtypes.bfloat16)):
        with pytest.raises(AssertionError):
            assert_same_bits(zero, other)


def test_presets_are_backed_by_the_results():
    """Each name's bounds were measured, and no more was lost than with the cache it is named for."""
    rows = json.loads((Path(__file__).parents[1] / "results" / "accuracy-h100.json").read_text())["rows"]
    peers = {row["variant"]: row["kl"] for row in rows if row["bound"] is None}
    limits = {"as-fp8": peers["FP8 e4m3"], "as-nvfp4": peers["NVFP4"], "near-lossless": 0.26 * peers["FP8 e4m3"]}
    lost = {}
    for row in rows:
        if row["bound"]:
            lost[parse_parts(row["bound"], 2)] = row["kl"]
    assert PRESETS.keys() == limits.keys()
    for name, limit in limits.items():
        assert lost[parse_parts(name, 2)] <= limit, name


def test_pairs_as_text():
    assert parse_parts("rms:0.05 / rel:0.1", 2) == (Bound("rms", 0.05), Bound("rel", 0.1))
    assert parse_parts("as-fp8", 1) == (Bound("rms", 0.05),)
    for text, parts, message in (
        ("rms:1/rms:2", 1, "1 part"),
        ("rms:1/rms:2/rms:3", 2, "2 part"),
        ("rms:1/", 2, "text like"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_parts(text, parts)
    with pytest.raises(ValueError, match="'as-fp8', 'as-nvfp4', 'near-lossless'"):
        parse_parts("as-fp16", 2)
