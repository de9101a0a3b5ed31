"""Pages and bounds at their edges, in every coding: the bound holds; what came back once comes back unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from assertions import assert_same_bits
from test_kv import DTYPES, FLOAT16, assert_within, error_bound, to_dtype

from cuszp_cupy.bound import parse_parts
from cuszp_cupy.format import HEADER_BYTES, FormatError, Geometry, PageHeader
from cuszp_cupy.reference import calibrate, compress, decode_page, decompress, encode_page
from cuszp_cupy.tables import BUILT_IN

SHAPE = (16, 8)  # four groups of tokens
GEOMETRY, FLAT, PARTS = Geometry(*SHAPE), Geometry(1, 128), Geometry(*SHAPE, parts=(4, 4))


def edge_pages(dtype) -> dict[str, np.ndarray]:
    """Name -> page. Why each is said beside it."""
    rng = np.random.default_rng(7)
    normal = to_dtype(rng.standard_normal(SHAPE), dtype)
    inf = to_dtype(np.inf, dtype).view(np.uint16)
    largest = int(inf) - 1

    def bits(values) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, np.uint16), SHAPE).copy().view(dtype)

    def put(page, at, value) -> np.ndarray:
        page = page.copy()
        page.view(np.uint16)[at] = value
        return page

    return {
        # the statistic of rel and rms has nothing to look at
        "zeros": bits(0),
        "negative zeros": bits(0x8000),
        "all NaN": bits(int(inf) + 1),
        "all -Inf": bits(int(inf) | 0x8000),
        # one group is stored as it is, the others must not notice
        "a NaN": put(normal, (3, 5), int(inf) + 1),
        "a NaN with all bits set": put(normal, (3, 5), 0xFFFF),
        "an Inf": put(normal, (0, 0), int(inf)),
        "Inf beside the largest value": put(put(normal, (0, 0), int(inf)), (1, 1), largest),
        # the range is 0: rel has no step
        "constant": bits(normal.view(np.uint16)[0, 0]),
        "constant, largest": bits(largest),
        "constant, smallest denormal": bits(1),
        "one value, the rest zeros": put(bits(0), (7, 5), normal.view(np.uint16)[0, 0]),
        # steps below or among the type's denormals
        "denormals": bits(rng.integers(1, 100, SHAPE) | rng.integers(0, 2, SHAPE) << 15),
        "denormals beside the largest value": put(bits(rng.integers(1, 100, SHAPE)), (0, 0), largest),
        # one value decides the range, and much of the rms
        "one huge outlier": put(normal, (2, 2), largest),
        "one huge negative outlier": put(normal, (2, 2), largest | 0x8000),
        # sums of squares overflow float32 in bfloat16; range overflows float32 too
        "largest of both signs": bits(np.where(rng.random(SHAPE) < 0.5, largest, largest | 0x8000)),
        # a page that was never written: any bits; a freed block's, half of it old values
        "any bits": bits(rng.integers(0, 1 << 16, SHAPE)),
        "half written": np.where(np.arange(16)[:, None] < 8, normal, bits(rng.integers(0, 1 << 16, SHAPE))),
        "a poisoned page": bits(0xA5A5),
        "normal": normal,
    }  # fmt: skip


#: Why each: what a server uses; coarse, but within what 2.8 promises; the smallest and the largest step, and
#: what is beyond; as large as the types' largest values, as small as their smallest; float64's own limits.
BOUNDS = [
    "rms:0.05", "rms:0.45", "rel:0.0002", "rel:0.24", "abs:0.1",
    "abs:3.944304526105059e-31", "abs:1e-31", "abs:6.338253001141147e29", "abs:1e31",
    "abs:65504", "abs:3.3895313892515355e38", "abs:2.9802322387695312e-08", "abs:4.6e-41",
    "abs:5e-324", "abs:1.7976931348623157e308", "rms:1e-300", "rel:5e-324",
]  # fmt: skip
#: codings with the tables they are given; those with hints are for one page shape
CODINGS = ["raw", "fixed", "entropy", "entropy, calibrated"]


def tables_for(coding: str, dtype, geometry: Geometry):
    if "calibrated" not in coding:
        return BUILT_IN
    rng = np.random.default_rng(1)
    return calibrate([to_dtype(rng.standard_normal(geometry.shape), dtype)], geometry=geometry)


def check(page, bound, coding, geometry, tables) -> None:
    """Bound, size, special values, and that storing it again changes neither the page nor the blob."""
    coding = coding.partition(",")[0]
    options = {"geometry": geometry, "tables": tables}
    blob = encode_page(page, bound, coding, **options)
    once = decode_page(blob, tables=tables)
    header = PageHeader.parse(blob)
    x, y = page.reshape(-1), once.reshape(-1)
    assert len(blob) <= HEADER_BYTES + page.nbytes
    if coding == "raw" or header.coding == "raw":
        assert_same_bits(x, y)
    if geometry.parts is None:
        (parsed,) = parse_parts(bound, 1)
        assert_within(x, y, error_bound(x, parsed))
    zero = x.view(np.uint16) == 0x8000
    assert (y.view(np.uint16)[zero] == 0x8000).all()
    again = encode_page(once, bound, coding, **options)
    twice = decode_page(again, tables=tables)
    assert_same_bits(once, twice)
    assert encode_page(twice, bound, coding, **options) == again
    if parse_parts(bound, len(geometry.part_values))[0].kind == "abs":  # whose step does not depend on the page
        assert PageHeader.parse(again).steps == header.steps or "raw" in (
            header.coding,
            PageHeader.parse(again).coding,
        )


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edge_pages(dtype, coding):
    """One part in token groups; the same values flat, as 1 token; and as two parts of K and V."""
    for geometry in (GEOMETRY, FLAT, PARTS):
        tables = tables_for(coding, dtype, geometry)
        for name, page in edge_pages(dtype).items():
            for bound in BOUNDS if geometry is GEOMETRY else BOUNDS[:5]:
                try:
                    check(page.reshape(geometry.shape), bound, coding, geometry, tables)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {bound}, {geometry}: {error}") from None


#: Why each: one value; odd channels; 1 token; 15, 16 and 17 tokens; a tail of one value; 1 MiB + 2 bytes, whose
#: last group has one value, and whose last stream has one lane.
SHAPES = [(1, 1), (1, 31), (1, 33), (16, 1), (16, 65), (15, 64), (17, 64), (3, 11), (1, 1024), (1, 524_289)]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edge_sizes(shape, coding):
    x = np.random.default_rng(3).standard_normal(shape)
    dtype = DTYPES[sum(shape) % 2]
    geometry = Geometry(*shape)
    tables = tables_for(coding, dtype, geometry)
    for bound in ("rms:0.05", "abs:0.1"):
        check(to_dtype(x, dtype), bound, coding, geometry, tables)


def test_pages_of_no_values_are_refused():
    for shape in ((0, 64), (16, 0)):
        with pytest.raises(ValueError, match="expected an integer from 1"):
            encode_page(np.zeros(shape, FLOAT16))
    with pytest.raises(FormatError, match="at least 32 bytes, got 0"):
        decode_page(b"")


#: 0 and 1 value; a block; 1 MiB + 4 bytes, which ends in a chunk of one value
@pytest.mark.parametrize("n", [0, 1, 32, 262_145])
@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier"])
def test_edges_of_streams(mode, n):
    """Values as above, in float32; from the second time on, all comes back unchanged where no value is lost."""
    info = np.finfo(np.float32)
    special = [0.0, -0.0, info.smallest_subnormal, -info.tiny, 1.0, -1.0, 1e3, 0.5, -0.5]
    for x in (np.resize(np.float32(special), n), np.zeros(n, np.float32), np.full(n, 7.25, np.float32)):
        for eb in (0.5, 0.01, 1000.0):
            once = decompress(compress(x, eb, mode), n, "float32", eb, mode)
            assert (np.abs(once.astype(np.float64) - x) <= eb + 2 * np.spacing(np.abs(x))).all()
            stream = compress(once, eb, mode)
            twice = decompress(stream, n, "float32", eb, mode)
            assert twice.tobytes() == once.tobytes() and compress(twice, eb, mode) == stream


@pytest.mark.gpu
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_edge_pages(dtype, coding):
    """The reference's blobs and pages, for every edge and bound, and for the sizes."""
    import cupy

    from cuszp_cupy import encode_pages

    def compare(pages, bound, geometry):
        tables = tables_for(coding, dtype, geometry)
        name, options = coding.partition(",")[0], {"geometry": geometry, "tables": tables}
        if name != "entropy":
            options.pop("tables")
        encoded = encode_pages(cupy.asarray(pages.view(np.uint16)).view(dtype), bound, name, **options)
        blobs = [encode_page(page, bound, name, **options) for page in pages]
        assert [encoded.blob(i) for i in range(len(pages))] == blobs, f"{bound}, {geometry}"
        decoded = encoded.decode().get()
        for page, blob in zip(decoded, blobs, strict=True):
            assert_same_bits(page, decode_page(blob, tables=tables))

    pages = np.stack(list(edge_pages(dtype).values()))
    for geometry in (GEOMETRY, FLAT, PARTS):
        for bound in BOUNDS if geometry is GEOMETRY else BOUNDS[:5]:
            compare(pages.reshape(len(pages), *geometry.shape), bound, geometry)
    for shape in SHAPES:
        compare(
            to_dtype(np.random.default_rng(3).standard_normal((1, *shape)), dtype), "rms:0.05", Geometry(*shape)
        )
