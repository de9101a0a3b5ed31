"""Stream cuszp: the reference against upstream's streams, and the kernels against the reference."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cuszp_cupy.format import MODES, FormatError, max_stream_bytes, rate_bytes
from cuszp_cupy.raw import cuszp
from cuszp_cupy.reference import compress, decompress

DTYPES = ("float32", "float64")
CASES = int(os.environ.get("CUSZP_FUZZ_CASES", 0))  # see test_fuzz.py
GUARD = 0xA5  # around every buffer a kernel writes
GUARD_BYTES = 512

# One value; a block and its neighbours; a chunk and its neighbours: where a rate area grows by 1024 bytes.
SIZES = (1, 31, 32, 33, 32767, 32768, 32769)

each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# --- golden streams ---------------------------------------------------------------------------------------
@functools.cache
def golden():
    """Return (cases, file): every golden case as (meta, eb), and the file that holds inputs and streams."""
    file = np.load(Path(__file__).parent / "golden" / "cuszp_golden.npz")
    meta = json.loads(bytes(file["meta"]))
    assert (len(meta["small"]), len(meta["large"])) == (360, 36)
    return meta, file


def golden_eb(case) -> float:
    """Return the bound in force: upstream's generic functions take a C float, whatever the dtype."""
    return float(np.float32(case["eb"]))


def large_input(case) -> np.ndarray:
    """Return the input of a large case, by the recipe in the file."""
    n = case["n"]
    if case["kind"] == "zeros":
        return np.zeros(n, case["dtype"])
    p = ((np.arange(n) * 2654435) % 2**32) * 2.0**-31 - 1.0
    return ((p * (1 - abs(p)) * 4) * 7 + 3).astype(case["dtype"])


def sha256(data) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def test_small_golden_streams():
    meta, file = golden()
    for case in meta["small"]:
        x, stream, eb = file[f"x{case['id']}"], file[f"s{case['id']}"].tobytes(), golden_eb(case)
        assert compress(x, eb, case["mode"]) == stream, case["name"]
        y = decompress(stream, case["n"], case["dtype"], eb, case["mode"])
        assert sha256(y) == case["sha256_of_decoded_little_endian_bytes_zeroed_output"], case["name"]


def test_large_golden_streams():
    for case in golden()[0]["large"]:
        stream = compress(large_input(case), golden_eb(case), case["mode"])
        assert len(stream) == case["stream_bytes"], case["name"]
        assert hashlib.sha256(stream).hexdigest() == case["stream_sha256"], case["name"]
        y = decompress(stream, case["n"], case["dtype"], golden_eb(case), case["mode"])
        assert sha256(y) == case["decoded_sha256"], case["name"]


# --- the specification, byte by byte ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "rate", "payload"),
    [
        # q = 3, -3, 1: two planes, values in the top bits of byte 0.
        ("fixed", 2, "40000000 e0000000 c0000000"),
        # v = 3, -6, 4.
        ("plain", 3, "40000000 80000000 c0000000 60000000"),
        # 4 + 4 * 3 is not more than 4 + 4 * 3 + 1: as plain.
        ("outlier", 3, "40000000 80000000 c0000000 60000000"),
    ],
)
def test_three_values_by_hand(mode, rate, payload):
    x = np.array([3, -3, 1], np.float32)
    stream = compress(x, 0.5, mode)
    assert stream[:1024] == bytes([rate]) + bytes(1023)
    assert stream[1024:] == bytes.fromhex(payload)
    assert decompress(stream, 3, "float32", 0.5, mode).tolist() == [3, -3, 1]


def test_constant_block_stores_its_first_value_apart():
    stream = compress(np.full(32, 300, np.float32), 0.5, "outlier")
    assert stream[0] == 0x80 | 1 << 5 | 0
    assert stream[1024:] == bytes.fromhex("2c01 00000000")


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (0.5, 1),
        (-0.5, 0),  # the one half that does not go away from zero
        (-1.5, -2),
        (2.0**40, 2**31 - 1),
        (-(2.0**40), 2**31 - 1),
        (np.inf, 2**31 - 1),
        (-np.inf, 2**31 - 1),
        (-0.0, 0),
        (5e-324, 0),
    ],
)
@each_dtype
def test_special_values(x, q, dtype):
    x = np.array([x], dtype)
    y = decompress(compress(x, 0.5), 1, dtype, 0.5)
    assert y[0] == np.dtype(dtype).type(q)
    assert np.signbit(y[0]) == (q < 0)


def test_nan_depends_on_the_dtype():
    assert decompress(compress(np.array([np.nan], "f4"), 0.5), 1, "f4", 0.5)[0] == -1
    assert decompress(compress(np.array([np.nan], "f8"), 0.5), 1, "f8", 0.5)[0] == 2**31 - 1


def test_int_min_is_lost_as_specified():
    x = np.array([0.25 - 2.0**31, 7.0])  # q = INT_MIN, which float64 alone can reach
    stream = compress(x, 0.5)
    assert stream[0] == 3
    assert decompress(stream, 2, "float64", 0.5).tolist() == [0.0, 7.0]


# --- round trips ------------------------------------------------------------------------------------------
def assert_within(x, y, eb, ulps=2):
    """Assert |x - y| <= eb + ulps ulp(x) everywhere, in float64; say where it first fails."""
    error = np.abs(x.astype(np.float64) - y.astype(np.float64))
    bad = ~(error <= eb + ulps * np.spacing(np.abs(x)).astype(np.float64))  # NaN is bad
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise AssertionError(
            f"bound {eb:g} broken at {bad.sum()} of {x.size} values, first at [{i}]: {x[i]!r} -> {y[i]!r}"
        )


def test_assert_within_fails_on_excess_and_nan():
    x = np.array([0.0, 1.0])
    assert_within(x, x + 0.5, 0.5)
    for y in (np.array([0.0, np.nan]), np.array([0.0, 1.6])):
        with pytest.raises(AssertionError, match=r"broken at 1 of 2 values, first at \[1\]"):
            assert_within(x, y, 0.5)


@each_mode
@pytest.mark.parametrize("width", [32, 64])
@given(data=st.data())
def test_round_trip_keeps_the_bound(mode, width, data):
    # |x| / eb < 2^22: beyond it the dtype's own rounding shows (format.py 1.6).
    eb = data.draw(st.floats(2.0**-10, 2.0**10, width=32))
    x = data.draw(hnp.arrays(f"f{width // 8}", st.integers(0, 100), elements=st.floats(-4096, 4096, width=width)))
    stream = compress(x, eb, mode)
    assert len(stream) <= max_stream_bytes(x.size)
    y = decompress(stream, x.size, x.dtype, eb, mode)
    assert_within(x, y, eb)
    assert compress(x, eb, mode) == stream


@each_mode
@each_dtype
@pytest.mark.parametrize("n", SIZES)
def test_sizes(n, dtype, mode):
    x = np.random.default_rng(n).normal(size=n).astype(dtype)
    stream = compress(x, 0.01, mode)
    assert not any(stream[-(-n // 32) : rate_bytes(n)])
    assert_within(x, decompress(stream, n, dtype, 0.01, mode), np.dtype(dtype).type(0.01))
    zeros = compress(np.zeros(n, dtype), 0.01, mode)
    assert zeros == bytes(rate_bytes(n))
    y = decompress(zeros, n, dtype, 0.01, mode)
    assert y.tobytes() == bytes(y.nbytes)  # +0.0, all of it


@each_mode
@each_dtype
def test_empty(dtype, mode):
    assert compress(np.zeros(0, dtype), 0.1, mode) == b""
    y = decompress(b"", 0, dtype, 0.1, mode)
    assert y.size == 0 and y.dtype == dtype


@each_mode
def test_largest_stream(mode):
    x = np.full(64, 2.0**40)  # 31 planes in every block of mode fixed
    x[1::2] = 0
    assert len(compress(x, 0.5, "fixed")) == max_stream_bytes(64)
    assert len(compress(x, 0.5, mode)) <= max_stream_bytes(64)


@each_mode
@each_dtype
def test_largest_and_smallest_values(dtype, mode):
    info = np.finfo(dtype)
    x = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, -info.tiny] * 20, dtype)
    y = decompress(compress(x, 1.0, mode), x.size, dtype, 1.0, mode)
    assert np.isfinite(y).all()


def test_shape_is_memory_order():
    x = np.arange(24, dtype=np.float32)
    assert compress(x.reshape(2, 3, 4), 0.5) == compress(x, 0.5)


# --- user errors ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("x", "eb", "mode", "error", "match"),
    [
        ([1.0], 0.1, "fixed", TypeError, "NumPy array"),
        (np.zeros(3, np.float16), 0.1, "fixed", TypeError, "float32 or float64, got float16"),
        (np.zeros(3, ">f4"), 0.1, "fixed", TypeError, "got >f4"),
        (np.zeros(6, np.float32)[::2], 0.1, "fixed", ValueError, "ascontiguousarray"),
        (np.zeros(3, np.float32), 0, "fixed", ValueError, "eb"),
        (np.zeros(3, np.float32), -1.0, "fixed", ValueError, "eb"),
        (np.zeros(3, np.float32), np.nan, "fixed", ValueError, "eb"),
        (np.zeros(3, np.float32), np.inf, "fixed", ValueError, "eb"),
        (np.zeros(3, np.float32), 1e-50, "fixed", ValueError, "finite in float32"),  # 0 in float32
        (np.zeros(3, np.float32), 1e50, "fixed", ValueError, "finite in float32"),
        (np.zeros(3, np.float32), "0.1", "fixed", TypeError, "eb: expected a number"),
        (np.zeros(3, np.float32), 0.1, "delta", ValueError, "fixed, plain, outlier"),
    ],
)
def test_compress_refuses(x, eb, mode, error, match):
    with pytest.raises(error, match=match):
        compress(x, eb, mode)


@pytest.mark.parametrize(
    ("n", "dtype", "eb", "mode", "error", "match"),
    [
        (-1, "float32", 0.1, "fixed", ValueError, "n: expected 0 to"),
        (2**31, "float32", 0.1, "fixed", ValueError, "n: expected 0 to"),
        (1.0, "float32", 0.1, "fixed", TypeError, "n: expected an integer"),
        (1, "float16", 0.1, "fixed", TypeError, "float32 or float64"),
        (1, "float32", 0.0, "fixed", ValueError, "eb"),
        (1, "float32", 0.1, "FIXED", ValueError, "mode"),
    ],
)
def test_decompress_refuses(n, dtype, eb, mode, error, match):
    with pytest.raises(error, match=match):
        decompress(bytes(1024), n, dtype, eb, mode)


# --- damaged streams --------------------------------------------------------------------------------------
def example(mode: str, n: int = 100) -> bytes:
    """Return a stream with a bit of everything: a block of zeros, a constant one, a partial one."""
    x = np.random.default_rng(1).normal(size=n).astype(np.float32)
    x[:32] = 0
    x[32:64] = 77.0
    return compress(x, 0.01, mode)


@each_mode
def test_every_truncation_is_refused(mode):
    stream = example(mode)
    for size in range(len(stream)):
        with pytest.raises(FormatError):
            decompress(stream[:size], 100, "float32", 0.01, mode)
    with pytest.raises(FormatError, match="payloads"):
        decompress(stream + b"\0", 100, "float32", 0.01, mode)


def payload_bytes(mode: str, rate: int) -> int | None:
    """Return the payload size that a rate byte stands for; None if it is illegal. Format.py 1.3 and 1.4."""
    if rate < 32:
        return 4 + 4 * rate if rate else 0
    if mode == "outlier" and rate & 0x80 and rate & 31 < 31:
        return 4 + 4 * (rate & 31) + (rate >> 5 & 3) + 1
    return None


@each_mode
def test_every_rate_byte(mode):
    """An illegal value is refused by name; a legal one is decoded if, and only if, the size is its own."""
    for rate in range(256):
        size = payload_bytes(mode, rate)
        stream = bytes([rate]) + bytes(1023)
        if size is None:
            with pytest.raises(FormatError, match=f"rate byte 0: {rate:#04x} is not valid in mode '{mode}'"):
                decompress(stream, 32, "float32", 0.5, mode)
            continue
        assert decompress(stream + bytes(size), 32, "float32", 0.5, mode).tolist() == [0.0] * 32
        for wrong in {size + 1, size - 1} - {-1}:
            with pytest.raises(FormatError, match=f"say {size} bytes, {wrong} are there"):
                decompress(stream + bytes(wrong), 32, "float32", 0.5, mode)


@each_mode
def test_rate_bytes_beyond_the_blocks_must_be_zero(mode):
    stream = bytearray(example(mode))
    stream[4] = 1
    with pytest.raises(FormatError, match="rate byte 4: 0x01"):
        decompress(stream, 100, "float32", 0.01, mode)


@each_mode
@given(stream=st.binary(min_size=1024, max_size=1400), n=st.integers(1, 200))
def test_any_bytes_decode_or_are_refused(mode, stream, n):
    try:
        y = decompress(stream, n, "float64", 1.0, mode)
    except FormatError:
        return
    assert y.shape == (n,)


@each_mode
@given(payload=st.binary(min_size=128, max_size=128), rates=st.lists(st.integers(0, 159), min_size=2, max_size=2))
def test_any_payload_decodes(mode, payload, rates):
    """Payload bits carry no redundancy: whatever they are, they decode, to multiples of 2 eb."""
    sizes = [payload_bytes(mode, rate) or 0 for rate in rates]
    rates = [rate if size else 0 for rate, size in zip(rates, sizes, strict=True)]
    stream = bytes(rates) + bytes(1022) + (payload * 2)[: sum(sizes)]
    y = decompress(stream, 64, "float64", 0.5, mode)
    assert (y == np.round(y)).all()


# --- launch functions -------------------------------------------------------------------------------------
def test_workspace_serves_smaller_arrays_too():
    sizes = [0, *SIZES, cuszp.MAX_SMALL, cuszp.MAX_SMALL + 1, 2**31 - 1]
    assert sorted(cuszp.workspace_bytes(n) for n in sizes) == [cuszp.workspace_bytes(n) for n in sizes]
    for n in sizes:
        warps = cuszp.SMALL_TILE if n <= cuszp.MAX_SMALL else cuszp.LARGE_TILE
        assert cuszp.workspace_bytes(n) >= 8 * (1 + rate_bytes(n) // (32 * warps))


@pytest.fixture
def launches(monkeypatch):
    """Collect (name, expression, grid, block, types, arguments) instead of launching."""
    collected = []
    monkeypatch.setattr(cuszp, "launch", lambda *launch: collected.append(launch))
    return collected


@each_mode
@each_dtype
def test_launches_cover_the_rate_area_with_listed_kernels(launches, dtype, mode):
    for n in (*SIZES, cuszp.MAX_SMALL, cuszp.MAX_SMALL + 1, 2**31 - 1):
        cuszp.compress(256, n, dtype, 0.25, mode, 512, 1024, 2048)
        cuszp.decompress(512, 4096, n, dtype, 0.25, mode, 256, 2048, 1024)
        for name, expression, grid, block, _, _ in launches:
            assert expression in cuszp.KERNELS[name]
            assert grid * block == rate_bytes(n)
        assert launches[0][5] == (256, n, 2.0, 512, 1024, 2048)  # r = 0.5 / eb
        assert launches[1][5] == (512, 4096, n, 0.25, 256, 1024, 2048)
        launches.clear()


def test_launch_functions_assert_their_contract(launches):
    good = dict(x_ptr=4, n=1, dtype="float32", eb=0.1, mode="fixed", out_ptr=4, size_ptr=8, workspace_ptr=8)
    cuszp.compress(**good)
    assert len(launches) == 1
    for bad in ("x_ptr", "out_ptr", "size_ptr", "workspace_ptr"):
        with pytest.raises(AssertionError):
            cuszp.compress(**{**good, bad: good[bad] + 2})
    for bad in (dict(n=2**31), dict(n=-1), dict(dtype="float16"), dict(eb=0.0), dict(eb=-1.0), dict(size_ptr=0)):
        with pytest.raises(AssertionError):
            cuszp.compress(**{**good, **bad})


# --- kernels ----------------------------------------------------------------------------------------------
class Device:
    """One side of a test on the GPU: guarded buffers, a workspace and a stream that is not the default one."""

    def __init__(self, max_n: int):
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self.stream:
            self.workspace = cupy.zeros(cuszp.workspace_bytes(max_n), np.uint8)

    def guarded(self, content) -> tuple:
        """Return (buffer, view): a copy of ``content`` on the GPU with guard bytes on both sides."""
        content = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        buffer = self.cupy.full(content.size + 2 * GUARD_BYTES, GUARD, np.uint8)
        view = buffer[GUARD_BYTES : GUARD_BYTES + content.size]
        if content.size:
            view.set(content)
        return buffer, view

    def unguarded(self, buffer, used: int) -> np.ndarray:
        """Return the ``used`` bytes between the guards, once nothing else has been written."""
        host = buffer.get()
        before, content, after = np.split(host, [GUARD_BYTES, GUARD_BYTES + used])
        assert (before == GUARD).all(), "bytes written before the buffer"
        assert (after == GUARD).all(), "bytes written past the end"
        assert not self.workspace.get().any(), "workspace left dirty"
        return content

    def compress(self, x: np.ndarray, eb: float, mode: str) -> bytes:
        capacity = max_stream_bytes(x.size)
        with self.stream:
            source = self.cupy.asarray(x)
            buffer, out = self.guarded(np.full(capacity, GUARD, np.uint8))
            size = self.cupy.full(1, 2**63, np.uint64)
            cuszp.compress(
                source.data.ptr, x.size, x.dtype.name, eb, mode,
                out.data.ptr, size.data.ptr, self.workspace.data.ptr,
            )  # fmt: skip
            stream_bytes = int(size.get()[0])
            assert stream_bytes <= capacity
            return self.unguarded(buffer, stream_bytes).tobytes()

    def decompress(self, stream, n: int, dtype, eb: float, mode: str, stream_bytes=None):
        """Return (values, status) of the first ``stream_bytes`` bytes of ``stream`` (None: of all)."""
        dtype = np.dtype(dtype)
        with self.stream:
            _, source = self.guarded(np.frombuffer(stream, np.uint8) if len(stream) else np.zeros(0, np.uint8))
            buffer, out = self.guarded(np.full(n, 77, dtype))
            status = self.cupy.zeros(1, np.uint32)
            cuszp.decompress(
                source.data.ptr, len(stream) if stream_bytes is None else stream_bytes, n, dtype.name, eb, mode,
                out.data.ptr, self.workspace.data.ptr, status.data.ptr,
            )  # fmt: skip
            return self.unguarded(buffer, n * dtype.itemsize).view(dtype), int(status.get()[0])

    def check(self, x: np.ndarray, eb: float, mode: str, stream: bytes, name: str) -> None:
        """Assert that the kernels give ``stream`` and what the reference decodes it to, twice."""
        y = decompress(stream, x.size, x.dtype, eb, mode).tobytes()
        for _ in range(2):
            assert self.compress(x, eb, mode) == stream, name
            values, status = self.decompress(stream, x.size, x.dtype, eb, mode)
            assert values.tobytes() == y, name
            assert status == 0, name


@pytest.fixture(scope="module")
def device():
    return Device(3_000_000)


@pytest.mark.gpu
@each_mode
def test_kernels_on_golden_streams(device, mode):
    meta, file = golden()
    for case in meta["small"]:
        if case["mode"] == mode:
            x, stream = file[f"x{case['id']}"], file[f"s{case['id']}"].tobytes()
            device.check(x, golden_eb(case), mode, stream, case["name"])
    for case in meta["large"]:
        if case["mode"] == mode:
            x = large_input(case)
            device.check(x, golden_eb(case), mode, compress(x, golden_eb(case), mode), case["name"])


def random_case(i: int) -> tuple[np.ndarray, float, str]:
    """Return case i: (x, eb, mode), over sizes, scales, smoothness, zero blocks and special values."""
    rng = np.random.default_rng(i)
    # A warp's 1024 values, tiles of 2048 and 8192, chunks, and the size from which on tiles are large.
    edges = [*SIZES, 1024, 2048, 8192, 65536, cuszp.MAX_SMALL, cuszp.MAX_SMALL + 8192]
    n = int(rng.choice(edges)) + int(rng.integers(-1, 2)) if i % 2 else int(2 ** rng.uniform(0, 18))
    x = rng.normal(size=max(n, 1))
    if i % 3 == 1:
        x = np.cumsum(x)
    if i % 5 == 1:
        x *= np.repeat(rng.random(x.size // 32 + 1) < 0.3, 32)[: x.size]
    if i % 5 == 2:
        x += np.repeat(10.0 ** rng.uniform(-2, 7, x.size // 32 + 1), 32)[: x.size]
    if i % 7 == 3:
        special = [np.nan, np.inf, -np.inf, 1e30, -1e30, -0.0, 1e-320, -0.5, 0.5]
        x[rng.random(x.size) < 0.05] = special[i % 9]
    with np.errstate(over="ignore"):
        return x.astype(DTYPES[i % 4 // 2]), float(np.float32(10.0 ** rng.uniform(-4, 0))), MODES[i % 3]


@pytest.mark.gpu
def test_kernels_on_random_arrays(device):
    for i in range(200):
        x, eb, mode = random_case(i)
        device.check(x, eb, mode, compress(x, eb, mode), f"case {i}: {x.size} {x.dtype} {mode} {eb}")


@pytest.mark.gpu
@each_mode
@each_dtype
def test_kernels_on_many_tiles(device, dtype, mode):
    """2.5e6 values: 312 large tiles, so look-back goes through more than one window of 32."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=2_500_001) * np.repeat(10.0 ** rng.uniform(-3, 3, 78126), 32)[:2_500_001]).astype(dtype)
    device.check(x, 0.01, mode, compress(x, 0.01, mode), mode)


@pytest.mark.gpu
@each_mode
def test_kernels_need_no_more_alignment_than_they_say(device, mode):
    """Values aligned to T, streams to 4 bytes; and ``stream_bytes`` may be a capacity."""
    import cupy

    x = np.random.default_rng(6).normal(size=5000).astype(np.float32)
    with device.stream:
        source, out = cupy.asarray(x)[1:], cupy.zeros(max_stream_bytes(4999) + 4, np.uint8)[4:]
        size, status = cupy.zeros(1, np.uint64), cupy.zeros(1, np.uint32)
        y = cupy.zeros(5000, np.float32)[1:]
        workspace = device.workspace.data.ptr
        cuszp.compress(
            source.data.ptr, 4999, "float32", 0.1, mode, out.data.ptr, size.data.ptr, workspace
        )  # fmt: skip
        cuszp.decompress(
            out.data.ptr, out.size, 4999, "float32", 0.1, mode, y.data.ptr, workspace, status.data.ptr
        )  # fmt: skip
        expected = compress(x[1:], 0.1, mode)
        assert out.get().tobytes()[: int(size.get()[0])] == expected
        assert y.get().tobytes() == decompress(expected, 4999, "float32", 0.1, mode).tobytes()
        assert status.get()[0] == 0


@pytest.mark.gpu
def test_nothing_to_compress(device):
    assert device.compress(np.zeros(0, np.float32), 0.1, "fixed") == b""
    values, status = device.decompress(b"", 0, "float32", 0.1, "fixed")
    assert values.size == 0 and status == 0


@pytest.mark.gpu
@each_mode
def test_kernels_in_a_graph(device, mode):
    """Two launches of each kernel, captured once and replayed: the workspace needs no memset between."""
    import cupy

    x = np.random.default_rng(7).normal(size=100_000).astype(np.float32)
    expected = compress(x, 0.01, mode)
    device.check(x, 0.01, mode, expected, "before capture")  # compiles, which a capture cannot
    workspace = device.workspace.data.ptr
    with device.stream as stream:
        source, y = cupy.asarray(x), cupy.zeros(x.size, np.float32)
        out = cupy.zeros(max_stream_bytes(x.size), np.uint8)
        size, status = cupy.zeros(1, np.uint64), cupy.zeros(1, np.uint32)
        stream.begin_capture()
        for _ in range(2):
            cuszp.compress(
                source.data.ptr, x.size, "float32", 0.01, mode, out.data.ptr, size.data.ptr, workspace
            )  # fmt: skip
            cuszp.decompress(
                out.data.ptr, out.size, x.size, "float32", 0.01, mode, y.data.ptr, workspace, status.data.ptr
            )  # fmt: skip
        graph = stream.end_capture()
        for _ in range(3):
            out.fill(0)
            y.fill(0)
            graph.launch(stream)
            assert out.get().tobytes()[: int(size.get()[0])] == expected
            assert y.get().tobytes() == decompress(expected, x.size, "float32", 0.01, mode).tobytes()
            assert status.get()[0] == 0


@pytest.mark.gpu
@each_mode
def test_kernels_on_damaged_streams(device, mode):
    """Status says so, nothing is written outside, later calls are right: checked by ``unguarded``."""
    rng = np.random.default_rng(8)
    n = 70_000
    x = rng.normal(size=n).astype(np.float32)
    stream = compress(x, 0.01, mode)
    # Cut everywhere: in the rate area, at its end, in payloads, one byte short.
    cuts = [0, 1, 1023, 1024, 2187, 3071, 3072, 3073, len(stream) - 1, *rng.integers(0, len(stream), 20)]
    for cut in cuts:
        values, status = device.decompress(stream[:cut], n, "float32", 0.01, mode)
        assert status == 1, f"cut at {cut}"
        again, _ = device.decompress(stream, n, "float32", 0.01, mode, stream_bytes=cut)
        assert values.tobytes() == again.tobytes(), f"cut at {cut}: bytes past the end were used"
    # Every rate byte, or a tenth of CUSZP_FUZZ_CASES, at the first and the last block and in the padding.
    for rate in rng.permutation(256)[: CASES // 10 or 256].tolist():
        for at in (0, 2187, 2188):
            damaged = bytearray(stream)
            damaged[at] = rate
            _, status = device.decompress(damaged, n, "float32", 0.01, mode)
            size, before = payload_bytes(mode, rate), payload_bytes(mode, stream[at])
            illegal = size is None or (at == 2188 and rate != 0)
            assert status == (illegal or size > before), f"rate byte {at}: {rate:#x}"
    for _ in range(20):
        device.decompress(rng.integers(0, 256, len(stream), dtype=np.uint8).tobytes(), n, "float32", 0.01, mode)
    device.check(x, 0.01, mode, stream, "after damaged streams")
