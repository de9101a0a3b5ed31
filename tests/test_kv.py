"""Stream ``kv`` through the reference: bound, idempotence, parts, raw, damage, rate (format.py, section 2)."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from assertions import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st

from cuszp_cupy.bound import parse_parts
from cuszp_cupy.evaluation import data
from cuszp_cupy.format import HEADER_BYTES, LOWEST_STEP, FormatError, Geometry, PageHeader, checksum, step_size
from cuszp_cupy.reference import decode_page, encode_page

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
DTYPES = [FLOAT16, BFLOAT16]
EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16)
#: A page's mean square is summed in float32 (2.7): its eb is that of float64 to this much only.
RMS_TOLERANCE = 1e-5


def to_dtype(x, dtype) -> np.ndarray:
    """x rounded to a 16-bit float type, beyond its range to infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float32).astype(dtype)


def split(page: np.ndarray, parts) -> list[np.ndarray]:
    """The page as one 2-D array a part."""
    if parts is None:
        return [page.reshape(1, -1)]
    turns = page.reshape(-1, sum(parts))
    return [turns[:, : parts[0]], turns[:, parts[0] :]]


def error_bound(x: np.ndarray, bound) -> float:
    """eb of one part, computed apart from the package, in float64."""
    with np.errstate(invalid="ignore"):
        finite = x.astype(np.float64)
    finite = finite[np.isfinite(finite)]
    if bound.kind == "abs":
        return bound.value
    if not finite.any():
        return 0.0
    if bound.kind == "rel":
        return bound.value * (finite.max() - finite.min())
    scale = np.abs(finite).max()
    return bound.value * (1 + RMS_TOLERANCE) * scale * np.sqrt(np.sum((finite / scale) ** 2) / x.size)


def check_page(page, bound, geometry=None) -> np.ndarray:
    """Encode and decode; check bound, size and header; return the decoded page."""
    blob = encode_page(page, bound, geometry=geometry)
    decoded = decode_page(blob)
    header = PageHeader.parse(blob)
    parts = header.geometry.parts
    assert len(blob) <= HEADER_BYTES + page.nbytes
    assert decoded.dtype == page.dtype and decoded.shape == header.geometry.shape
    bounds = parse_parts(bound, 2 if parts else 1)
    for x, y, b in zip(split(page, parts), split(decoded, parts), bounds, strict=True):
        assert_within(x, y, error_bound(x, b))
    zero = (page.view(np.uint16) == 0x8000).reshape(decoded.shape)
    assert (decoded.view(np.uint16)[zero] == 0x8000).all()
    if header.coding == "raw":
        assert len(blob) == HEADER_BYTES + page.nbytes
        assert_same_bits(decoded, page.reshape(decoded.shape))
    return decoded


# --- bound ------------------------------------------------------------------------------------------------
def token_layout(patterns: np.ndarray) -> np.ndarray:
    """Patterns as a page of 16 tokens whose groups hold 32 neighbouring patterns each, pair by pair."""
    return patterns.reshape(-1, 16, 2).transpose(1, 0, 2).reshape(16, -1)


@pytest.mark.parametrize("factor", [1, 1.3, 1.7])  # of the power of two: steps with m = 4, 5, 6
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strict_bound_for_every_pattern(dtype, factor):
    x = EVERY_PATTERN.view(dtype)
    with np.errstate(invalid="ignore"):
        not_finite = ~np.isfinite(x.astype(np.float64))
    coded = 0
    for exponent in range(-14, 7):
        eb = factor * 2.0**exponent
        blob = encode_page(x.reshape(1, -1), eb)
        header = PageHeader.parse(blob)
        y = decode_page(blob).reshape(-1)
        step = step_size(header.steps[0])
        assert header.coding == "fixed" and header.geometry.flat and eb < step <= 2 * eb
        assert_within(x, y, step / 2)
        np.testing.assert_array_equal(y.view(np.uint16)[not_finite], EVERY_PATTERN[not_finite])
        assert y.view(np.uint16)[0x8000] == 0x8000
        coded += np.count_nonzero(y.view(np.uint16) != EVERY_PATTERN)

        in_tokens = encode_page(token_layout(EVERY_PATTERN).view(dtype), eb)  # the same groups
        assert in_tokens[HEADER_BYTES:] == blob[HEADER_BYTES:]
        np.testing.assert_array_equal(decode_page(in_tokens).view(np.uint16), token_layout(y.view(np.uint16)))
    assert coded > 21 * 10_000  # most pages did lose something


@pytest.mark.parametrize("eb", [0.3, 0.5, 0.63, 0.76, 0.88, 1, 1.26, 1.51, 1.76, 1.99, 2, 2.51, 3.6, 7.3])
def test_strict_bound_among_the_denormals_of_float16(eb):
    """Points of steps below 2^-22 would fall between float16's denormals, 2^-24 apart: such pages are raw."""
    spacing = 2.0**-24
    page = np.arange(-1024, 1024).reshape(1, -1) * spacing
    check_page(page.astype(FLOAT16), eb * spacing)
    header = PageHeader.parse(encode_page(page.astype(FLOAT16), eb * spacing))
    assert header.coding == ("fixed" if eb >= 2 else "raw")
    assert eb < 2 or header.steps[0] >= LOWEST_STEP["float16"]


@pytest.mark.parametrize("eb", ["1e-36", "3e-31", "4e-31", "1e30", "1e38", "rel:0.001", "rel:0.3"])
def test_strict_bound_at_the_ends_of_bfloat16(eb):
    """The smallest and the largest steps, and what lies beyond them."""
    eb = eb if ":" in eb else f"abs:{eb}"
    for magnitudes in (np.arange(0x1000), np.arange(0x7000, 0x7F80)):  # up to 2.5e-29; from 1.6e29 on
        bits = np.concatenate([magnitudes, magnitudes | 0x8000]).astype(np.uint16)
        check_page(bits.view(BFLOAT16).reshape(1, -1), eb)


@pytest.mark.parametrize("kind", ["rms", "rel"])
def test_steps_change_where_the_bound_says(kind):
    """+-x has the rms x and the range 2 x; x has 11 bits, so that no grid of these steps holds it (2.8)."""
    x = 1027 / 1024
    page = to_dtype(np.resize([x, -x], (16, 32)), FLOAT16)
    for s in range(-16, 4):
        two_eb = step_size(s) * (1 if s % 4 == 0 else 1 + 2**-16)  # 2.7: from here on the step is s
        value = two_eb / 2 / (x if kind == "rms" else 2 * x)
        for factor, expected in ((1 + 1e-6, s), (1 - 1e-6, s - 1)):
            blob = encode_page(page, f"{kind}:{value * factor!r}")
            assert PageHeader.parse(blob).steps[0] == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (1, 33), (3, 31)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_does_not_count(dtype, shape):
    """Of a flat page whose values all lie near 10, or near -10, the padding's zeros are not in the range."""
    x = 10 + np.random.default_rng(0).random(shape)
    for page in (to_dtype(x, dtype), to_dtype(-x, dtype), to_dtype(np.full(shape, 10), dtype)):
        check_page(page, "rel:0.3")
        check_page(page, "rms:0.3")


@pytest.mark.parametrize("bound", ["rms:1e-200", "rel:5e-324", "abs:5e-324"])
def test_bounds_that_vanish_lose_nothing(bound):
    page = to_dtype(np.random.default_rng(0).standard_normal((16, 32)), BFLOAT16)
    assert_same_bits(check_page(page, bound), page)


@pytest.mark.parametrize("bound", ["rms:1e300", "rel:1e300", "abs:1e300"])
def test_bounds_beyond_every_step_are_held_too(bound):
    page = to_dtype(np.random.default_rng(0).standard_normal((16, 32)), BFLOAT16)
    assert not check_page(page, bound).astype(np.float32).any()


# --- any page ---------------------------------------------------------------------------------------------
KINDS = ["normal", "zeros", "constant", "signs", "outlier", "sparse", "denormal", "patterns", "holes", "few"]


@st.composite
def geometries(draw) -> Geometry:
    tokens, outer = draw(st.integers(1, 40)), draw(st.sampled_from([1, 1, 2, 3]))
    if draw(st.booleans()):  # token groups are 3 in 40 otherwise
        tokens = draw(st.sampled_from([16, 32]))
    if draw(st.booleans()):
        return Geometry(tokens, draw(st.integers(1, 70)), outer)
    unit = 2 if tokens % 16 == 0 else 32
    kw, vw = (unit * draw(st.integers(1, 35 if unit == 2 else 2)) for _ in range(2))
    return Geometry(tokens, (kw + vw) * draw(st.integers(1, 2)), outer, (kw, vw))


@st.composite
def pages(draw) -> tuple[np.ndarray, Geometry]:
    geometry, dtype, kind = draw(geometries()), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    eighths = draw(
        st.integers(-100, 100) | st.sampled_from([-1023, -800, 800, 980] if dtype is BFLOAT16 else [128])
    )
    scale = 2.0 ** (eighths / 8)  # powers of 2^(1/8) come near every threshold of the step
    n = geometry.values
    x = rng.standard_normal(n) * scale
    if kind == "zeros":
        x = rng.choice([0.0, -0.0], n)
    elif kind == "constant":
        x = np.full(n, scale)
    elif kind == "signs":
        x = rng.choice([-scale, scale], n)
    elif kind == "outlier":
        x[rng.integers(n)] *= 1e4
    elif kind == "sparse":
        x[rng.random(n) < 0.9] = 0
    elif kind == "few":
        x = rng.integers(-3, 4, n) * scale
    page = to_dtype(x, dtype).view(np.uint16)
    if kind == "denormal":
        page = rng.integers(0, 2**7 if dtype is BFLOAT16 else 2**10, n, np.uint16)
    elif kind == "patterns":
        page = rng.integers(0, 2**16, n, np.uint16)
    elif kind == "holes":  # a few values that are not finite, -0.0 or the largest
        holes = [0x7C00, 0xFE01, 0x7BFF] if dtype is FLOAT16 else [0x7F80, 0xFFC1, 0x7F7F]
        page[rng.integers(n, size=3)] = rng.choice([0x8000, *holes], 3)
    return page.view(dtype).reshape(geometry.shape), geometry


def log_floats(low: float, high: float):
    return st.floats(np.log2(low), np.log2(high)).map(lambda e: float(2**e))


#: Within what 2.8 promises for pages that come back: rms:A with A < 0.5, rel:A with A < 0.25.
text_bounds = st.one_of(
    log_floats(0.001, 0.45).map("rms:{}".format),
    log_floats(0.001, 0.24).map("rel:{}".format),
    log_floats(1e-9, 100).map("abs:{}".format),
)


@given(pages(), text_bounds | st.tuples(text_bounds, text_bounds))
def test_any_page_comes_back_within_its_bound_and_again_unchanged(page_and_geometry, bound):
    page, geometry = page_and_geometry
    if geometry.parts is None and isinstance(bound, tuple):
        bound = bound[0]
    once = check_page(page, bound, geometry)
    assert_again_unchanged(once, bound, geometry)


def assert_again_unchanged(once, bound, geometry=None):
    twice = decode_page(encode_page(once, bound, geometry=geometry))
    assert_same_bits(twice, once)
    assert_same_bits(decode_page(encode_page(twice, bound, geometry=geometry)), once)


@given(pages(), log_floats(0.001, 1e6), st.sampled_from(["rms", "rel"]))
def test_any_bound_holds(page_and_geometry, value, kind):
    """Also the coarse ones, under which a page may come back as zeros."""
    check_page(page_and_geometry[0], f"{kind}:{value}", page_and_geometry[1])


# --- pages seen before (2.8) ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bound", ["rms:0.01", "rms:0.05", "rms:0.2", "rms:0.45", "rel:0.01", "rel:0.24", "abs:0.1"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_near_a_threshold_of_the_step_come_back_unchanged(dtype, bound):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((16, 8))
    moved = 0
    for eighth in range(-40, 41):
        scale = 2.0 ** (eighth / 8)
        for x in (normal * scale, np.full((16, 8), scale), rng.choice([-1, 0, 1], (16, 8)) * scale):
            page = to_dtype(x, dtype)
            once = check_page(page, bound)
            assert_again_unchanged(once, bound)
            moved += not np.array_equal(once, page)
    assert moved > 40


def test_a_page_seen_before_is_needed_for_idempotence():
    """Without 2.8 this page, whose rms moves over a threshold, would be coded with another step."""
    page = to_dtype(np.full((16, 2), 1.3), BFLOAT16)
    blob = encode_page(page, "rms:0.45")  # 2 eb = 1.17, step 1: 1.3 -> 1, whose 2 eb = 0.9, step 0.875
    once = decode_page(blob)
    assert PageHeader.parse(blob).steps[0] == 0 and (once == 1).all()
    assert PageHeader.parse(encode_page(once, "abs:0.45")).steps[0] == -1
    assert_again_unchanged(once, "rms:0.45")


def test_the_coarsest_grid_that_fits_is_taken():
    """2.8: s+4 comes first; 1.0 lies on the grid of 0.25 (s = -8), as of 0.5 (s = -4); 2 eb = 0.3."""
    page = to_dtype(np.full((16, 2), 1.0), FLOAT16)
    assert PageHeader.parse(encode_page(page, "abs:0.15")).steps[0] == -8
    assert PageHeader.parse(encode_page(page, "rms:0.15")).steps[0] == -4


def test_groups_with_nan_lie_on_every_grid():
    """As before, in 15 of 16 groups; the other keeps its 1.3 beside a NaN."""
    page = to_dtype(np.full((16, 32), 1.3), BFLOAT16)
    page[3, 5] = np.nan
    once = check_page(page, "rms:0.45")
    assert np.count_nonzero(once == 1) == 15 * 32
    assert_again_unchanged(once, "rms:0.45")


@pytest.mark.parametrize("bound", ["rel:0.0795", "rms:0.3"])
def test_values_near_the_largest_float16_are_kept(bound):
    """62400 would go to 65536, beyond the largest float16: its group keeps its storage bits."""
    page = np.zeros((1, 32), FLOAT16)
    page[0, 0] = 62400
    once = check_page(page, bound)
    assert_again_unchanged(once, bound)
    assert once[0, 0] == 62400


def test_a_group_with_nan_comes_back_unchanged_beside_others():
    rng = np.random.default_rng(3)
    for seed in range(20):
        x = rng.standard_normal((16, 16)) * 2 ** (seed / 8)
        page = to_dtype(x, BFLOAT16)
        page[3, 5], page[4, 5], page[0, 15] = np.nan, np.inf, 1e30
        once = check_page(page, "rel:1e-33")
        assert_again_unchanged(once, "rel:1e-33")
        page[0, 15] = 0
        once = check_page(page, "rms:0.1")
        assert_same_bits(once[:, 4:6], page[:, 4:6])  # the group that holds NaN and Inf
        assert not np.array_equal(once[:, :4], page[:, :4])
        assert_again_unchanged(once, "rms:0.1")


# --- parts ------------------------------------------------------------------------------------------------
def test_each_part_has_its_own_step():
    """K is 100 times V. Under one step for both, V would come back as zeros."""
    rng = np.random.default_rng(0)
    page = rng.standard_normal((16, 3, 2, 8))  # tokens, heads, K/V, size
    page[:, :, 0] *= 100
    page = to_dtype(page.reshape(16, 48), BFLOAT16)
    geometry = Geometry(16, 48, parts=(8, 8))
    decoded = check_page(page, "rms:0.05", geometry)
    k_step, v_step = PageHeader.parse(encode_page(page, "rms:0.05", geometry=geometry)).steps
    assert 25 <= k_step - v_step <= 28  # log2(100) = 6.6 octaves of four steps
    x, y = (split(p, (8, 8))[1].astype(np.float64) for p in (page, decoded))
    assert np.count_nonzero(y) > 0.9 * y.size and np.abs(x - y).max() < 0.06
    together = decode_page(encode_page(page, "rms:0.05"))
    assert np.abs(split(together, (8, 8))[1].astype(np.float64)).max() < 10
    assert np.abs(split(together, (8, 8))[1].astype(np.float64) - x).max() > 1


@pytest.mark.parametrize(("tokens", "size"), [(16, 64), (32, 2), (5, 32)], ids=["vllm", "narrow", "flat"])
def test_both_kv_layouts_of_the_same_data_take_the_same_steps(tokens, size):
    """[tokens][heads][K|V] is one outer index and heads turns; [heads][tokens][K|V] has heads outer indices."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, 3, 2, size)) * [[[3.0], [0.02]]]
    by_token = to_dtype(x, FLOAT16).reshape(tokens, 6 * size)
    by_head = to_dtype(x.swapaxes(0, 1), FLOAT16).reshape(3, tokens, 2 * size)
    a, b = Geometry(tokens, 6 * size, parts=(size, size)), Geometry(tokens, 2 * size, 3, (size, size))
    assert a.flat == b.flat == (tokens == 5)
    check_page(by_token, "rms:0.05", a)
    check_page(by_head, "rms:0.05", b)
    blob_a, blob_b = (encode_page(p, "rms:0.05", geometry=g) for p, g in ((by_token, a), (by_head, b)))
    assert PageHeader.parse(blob_a).steps == PageHeader.parse(blob_b).steps
    assert len(blob_a) == len(blob_b)
    decoded_a = decode_page(blob_a).reshape(tokens, 3, 2 * size).swapaxes(0, 1)
    assert_same_bits(np.ascontiguousarray(decoded_a), decode_page(blob_b))


def test_bounds_may_differ_between_parts():
    rng = np.random.default_rng(2)
    page = to_dtype(rng.standard_normal((16, 64)), FLOAT16)
    geometry = Geometry(16, 64, parts=(32, 32))
    blob = encode_page(page, ("abs:0.5", "abs:0.125"), geometry=geometry)
    assert [step_size(s) for s in PageHeader.parse(blob).steps] == [1, 0.25]
    pairs = zip(split(page, (32, 32)), split(decode_page(blob), (32, 32)), strict=True)
    k, v = (np.abs(x.astype(np.float64) - y) for x, y in pairs)
    assert 0.4 < k.max() <= 0.5 and v.max() <= 0.125


def test_a_part_of_zeros_does_not_disturb_the_other():
    page = to_dtype(np.random.default_rng(0).standard_normal((16, 8)), FLOAT16)
    page[:, 4:] = 0
    blob = encode_page(page, "rms:0.05", geometry=Geometry(16, 8, parts=(4, 4)))
    alone = encode_page(np.ascontiguousarray(page[:, :4]), "rms:0.05")
    assert PageHeader.parse(blob).steps == (PageHeader.parse(alone).steps[0], 0)
    assert blob[-(len(alone) - 48) :] == alone[48:]  # groups of zeros take no words


# --- bytes ------------------------------------------------------------------------------------------------
#: bfloat16, 1 token, 32 channels, abs:0.5 (step 1): 1, -2, then zeros
SMALL_PAGE = to_dtype([[1, -2] + [0] * 30], BFLOAT16)
SMALL_BLOB = bytes.fromhex(
    "6b760101 00021800 01000000 20000000 00000000 01000000 1c000000 09f714b1"
    + "03000000 00000000 00000000 00000000"  # width code 3 of the only group
    + "01000000 00000100 00000100"  # plane 0: first value of pair 0; plane 1: its second value; signs
)
RAW_PAGE = to_dtype([[1.5, -0.0, np.nan]], FLOAT16)
RAW_BLOB = bytes.fromhex(
    "6b760100 00020800 01000000 03000000 00000000 01000000 06000000 4b01b20d" + "003e 0080 007e"
)


def test_the_bytes_of_a_small_page_are_those_of_the_specification():
    assert encode_page(SMALL_PAGE, "abs:0.5") == SMALL_BLOB
    assert_same_bits(decode_page(SMALL_BLOB), SMALL_PAGE)


def test_the_bytes_of_a_raw_page_are_its_own():
    assert encode_page(RAW_PAGE, "abs:0.5", "raw") == encode_page(RAW_PAGE, "abs:0.5") == RAW_BLOB
    assert_same_bits(decode_page(RAW_BLOB), RAW_PAGE)


def test_random_bits_are_stored_raw():
    """Nearly every group holds a value that is not finite or beyond 2^13 steps."""
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        page = rng.integers(0, 2**16, (16, 64), np.uint16).view(dtype)
        blob = encode_page(page, "abs:1e-6")
        assert PageHeader.parse(blob).coding == "raw" and len(blob) == 32 + 2048
        assert_same_bits(decode_page(blob), page)


def test_zeros_take_half_a_byte_a_group():
    page = np.zeros((16, 1024), BFLOAT16)
    for bound in ("rms:0.05", "rel:0.05", "abs:0.05"):
        blob = encode_page(page, bound)
        assert len(blob) == 32 + 512 // 2
        assert_same_bits(decode_page(blob), page)
    page[0, 0] = -0.0  # its sign takes a plane
    assert len(encode_page(page)) == 32 + 512 // 2 + 4
    assert_same_bits(decode_page(encode_page(page)), page)


def test_magnitudes_from_2_to_the_13_on_take_the_storage_bits():
    page = np.zeros((16, 64), FLOAT16)
    for value, words in ((8184, 14), (8192, 16)):  # neighbours in float16; the step is 1
        page[0, 0] = value
        assert len(encode_page(page, "abs:0.5")) == HEADER_BYTES + 16 + 4 * words
        assert decode_page(encode_page(page, "abs:0.5"))[0, 0] == value


def test_memory_order_and_shape_do_not_matter_to_the_encoder():
    page = to_dtype(np.random.default_rng(0).standard_normal((16, 32)), BFLOAT16)
    blob = encode_page(page)
    assert encode_page(np.asfortranarray(page)) == blob
    wide = np.zeros((16, 64), BFLOAT16)
    wide[:, ::2] = page
    assert encode_page(wide[:, ::2]) == blob
    assert encode_page(page.reshape(16, 2, 16), geometry=Geometry(16, 32)) == blob


# --- damage -----------------------------------------------------------------------------------------------
BLOBS = pytest.mark.parametrize("blob", [SMALL_BLOB, RAW_BLOB], ids=["fixed", "raw"])


@BLOBS
def test_every_flipped_bit_is_found(blob):
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_page(damaged)


@BLOBS
def test_every_truncation_and_extension_is_found(blob):
    for size in range(len(blob)):
        with pytest.raises(FormatError, match="a page needs at least 32 bytes|payload bytes, .* are there"):
            decode_page(blob[:size])
    for more in (b"\0", bytes(4), blob):
        with pytest.raises(FormatError, match="are there"):
            decode_page(blob + more)


def sealed(payload: bytes, blob: bytes = SMALL_BLOB, **changes) -> bytes:
    """The blob with another payload and a checksum that fits."""
    header = replace(PageHeader.parse(blob), payload_bytes=len(payload), checksum=0, **changes)
    return replace(header, checksum=checksum(header.pack(), payload)).pack() + payload


def test_sealed_seals():
    assert sealed(SMALL_BLOB[32:]) == SMALL_BLOB and sealed(RAW_BLOB[32:], RAW_BLOB) == RAW_BLOB


CODES, WORDS = SMALL_BLOB[32:48], SMALL_BLOB[48:]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (CODES + WORDS + bytes(4), "ask for 3 words, 4 are there"),
        (CODES + WORDS[:8], "ask for 3 words, 2 are there"),
        (CODES, "ask for 3 words, 0 are there"),
        (b"\x04" + CODES[1:] + WORDS, "ask for 4 words, 3 are there"),
        (b"\x00" + CODES[1:] + WORDS, "ask for 0 words, 3 are there"),
        (b"\x0f" + CODES[1:] + WORDS, "ask for 16 words, 3 are there"),
        (b"\x13" + CODES[1:] + WORDS, "padding is not zero"),  # the group after the last
        (CODES[:-1] + b"\x10" + WORDS, "padding is not zero"),
    ],
)
def test_payloads_that_contradict_themselves_are_refused_whatever_their_checksum(payload, message):
    with pytest.raises(FormatError, match=message):
        decode_page(sealed(payload))


def test_a_wrong_checksum_is_named():
    with pytest.raises(FormatError, match="checksum: the blob was altered"):
        decode_page(SMALL_BLOB[:-1] + b"\1")


@given(st.binary(max_size=200), st.integers(0, len(SMALL_BLOB)))
def test_any_bytes_raise_nothing_but_format_errors(noise, keep):
    blob = SMALL_BLOB[:keep] + noise
    if blob == SMALL_BLOB:
        return
    with pytest.raises(FormatError):
        decode_page(blob)


@given(st.binary(min_size=28, max_size=60), st.integers(-400, 400), st.sampled_from(["float16", "bfloat16"]))
def test_any_sealed_payload_decodes_or_raises_format_error(payload, step, dtype):
    """Nothing that a foreign encoder may write makes the decoder warn or fail otherwise."""
    payload = payload[: len(payload) // 4 * 4]
    try:
        page = decode_page(sealed(payload, steps=(step, 0), dtype=dtype))
    except FormatError:
        return
    assert page.shape == (1, 32)


# --- what is refused --------------------------------------------------------------------------------------
def test_other_dtypes_are_refused():
    for dtype in (np.float32, np.float64, np.int16, np.uint16, ml_dtypes.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"expected float16 or bfloat16, got {np.dtype(dtype).name}"):
            encode_page(np.zeros((16, 2), dtype))


@pytest.mark.parametrize("shape", [(), (32,), (1, 16, 2)])
def test_other_shapes_are_refused_without_a_geometry(shape):
    with pytest.raises(ValueError, match=r"expected the shape \(tokens, channels\)"):
        encode_page(np.zeros(shape, FLOAT16))


def test_a_geometry_that_does_not_fit_is_refused():
    page = np.zeros((16, 4), FLOAT16)
    with pytest.raises(ValueError, match=r"the geometry has 32 values, the page \(16, 4\)"):
        encode_page(page, geometry=Geometry(16, 2))
    with pytest.raises(ValueError, match="tokens: expected an integer from 1"):
        encode_page(np.zeros((0, 4), FLOAT16))


def test_other_codings_and_bounds_are_refused():
    page = np.zeros((16, 4), FLOAT16)
    with pytest.raises(ValueError, match="coding: expected one of raw, fixed, entropy, got 'plain'"):
        encode_page(page, coding="plain")
    for coding in ("fixed", "raw"):
        with pytest.raises(ValueError, match=r"the page has 1 part\(s\), got 2 bounds"):
            encode_page(page, ("rms:1", "rms:1"), coding)
        with pytest.raises(ValueError, match=r"the page has 2 part\(s\), got 1 bounds"):
            encode_page(page, ["rms:1"], coding, geometry=Geometry(16, 4, parts=(2, 2)))
        with pytest.raises(ValueError, match="got the kind 'max'"):
            encode_page(page, "max:1", coding)


# --- rate -------------------------------------------------------------------------------------------------
def bits_at(pages_, bound: str, target: float) -> float:
    """Bits a value, whole blobs counted, brought to sqrt(3) RMSE / RMS = ``target`` by a bit a halving."""
    results = []
    for page in pages_:
        blob = encode_page(page, bound)
        x, y = page.astype(np.float64), decode_page(blob).astype(np.float64)
        error = np.sqrt(3 * np.mean((x - y) ** 2) / np.mean(x**2))
        results.append(8 * len(blob) / page.size + np.log2(error / target))
    return float(np.mean(results))


def test_rate_on_the_sample():
    """Real K and V, 16 tokens of 3 heads of 64: 5.933 bits a value at an error of 5 % of the rms."""
    k, v = (bits_at(pages_, "rms:0.05", 0.05) for pages_ in data.kv_pages().values())
    assert 5.5 < k < v < 6.3  # far less would mean that something is not counted
    assert (k + v) / 2 <= 6.0
