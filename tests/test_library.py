"""The binding to libcuSZp: against C stubs anywhere; against the kernels where a GPU and the real library are."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuszp_cupy import format, reference
from cuszp_cupy.raw import library

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "golden" / "cuszp_golden.npz")
META = json.loads(GOLDEN["meta"].tobytes())
F4 = float(np.float32(0.1))

# Above 2^32, so that a pointer cut to an int is seen; aligned as libcuSZp wants it.
X, OUT, STREAM = 0x7F12_3456_7890, 0x7F98_7654_3214, 0x5555_AAAA_1118


# --- stubs ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Return a function that compiles a stub: build(name, *flags) -> path of the shared library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no C compiler (cc or gcc) for the stubs")
    folder = tmp_path_factory.mktemp("stub")

    def build(name, *flags):
        path = folder / f"lib{name}{''.join(flags)}.so"
        if not path.exists():
            source = HERE / "stub" / f"{name}.c"
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-Wall", "-Werror", *flags, "-o", path, source], check=True
            )
        return path

    return build


@pytest.fixture
def stub(build, monkeypatch):
    monkeypatch.setenv("CUSZP_LIBRARY", str(build("v3")))
    return library.load()


def last_call(stub) -> str:
    return (ctypes.c_char * 512).in_dll(stub.cdll, "last_call").value.decode()


@pytest.mark.parametrize("cuda_stream", [None, STREAM])
@pytest.mark.parametrize("mode, number", [("fixed", 0), ("plain", 1), ("outlier", 2)])
def test_f32_arguments_arrive(stub, mode, number, cuda_stream):
    # The float nearest to 0.1, and the struct by value between two ints: both are lost without argtypes.
    rest = f"eb={F4:.17g} dim=1 dims=5,1,1 type=0 mode={number} stream={cuda_stream or 0:x}"
    assert library.compress(X, 5, "float32", 0.1, mode, OUT, 1152, cuda_stream) == 1024
    assert last_call(stub) == f"compress data={X:x} cmp={OUT:x} n=5 size=1024 {rest}"
    library.decompress(OUT, 1029, 5, "float32", 0.1, mode, X, cuda_stream)
    assert last_call(stub) == f"decompress data={X:x} cmp={OUT:x} n=5 size=1029 {rest}"


@pytest.mark.parametrize("cuda_stream", [None, STREAM])
@pytest.mark.parametrize("mode", format.MODES)
def test_f64_arguments_arrive_with_a_double_bound(stub, mode, cuda_stream):
    rest = f"eb={0.1:.17g} stream={cuda_stream or 0:x}"
    assert 0.1 != F4
    assert library.compress(X, 5, "float64", 0.1, mode, OUT, 1152, cuda_stream) == 1024
    assert last_call(stub) == f"compress {mode} data={X:x} cmp={OUT:x} n=5 size=1024 {rest}"
    library.decompress(OUT, 1029, 5, "float64", 0.1, mode, X, cuda_stream)
    assert last_call(stub) == f"decompress {mode} data={X:x} cmp={OUT:x} n=5 size=1029 {rest}"


def test_largest_n_arrives(stub):
    n = 2**31 - 1
    library.decompress(OUT, 2**33, n, "float32", 0.1, "fixed", X)
    assert f"n={n} size={2**33} " in last_call(stub) and f"dims={n},1,1 " in last_call(stub)


def test_declarations_pass_size_t_and_enums_whole(stub):
    """Below our checks: sizes over 2^32 are not cut, and type and mode take their places."""
    size, dims = ctypes.c_size_t(), library.Uint3(2**32 - 1, 2, 3)
    stub.cdll.cuSZp_compress(X, OUT, 2**33, ctypes.byref(size), 0.1, 3, dims, 1, 2, STREAM)
    rest = f"eb={F4:.17g} dim=3 dims=4294967295,2,3 type=1 mode=2 stream={STREAM:x}"
    assert last_call(stub) == f"compress data={X:x} cmp={OUT:x} n=8589934592 size=1024 {rest}"
    stub.cdll.cuSZp_decompress(X, OUT, 2**33, 2**34 + 1, 0.1, 3, dims, 1, 2, STREAM)
    assert last_call(stub) == f"decompress data={X:x} cmp={OUT:x} n=8589934592 size=17179869185 {rest}"
    stub.f64("compress", "plain")(X, OUT, 2**33, ctypes.byref(size), 0.1, None)
    assert (
        last_call(stub) == f"compress plain data={X:x} cmp={OUT:x} n=8589934592 size=1024 eb={0.1:.17g} stream=0"
    )
    assert size.value == 1024


GOOD = {"x": X, "n": 5, "dtype": "float32", "eb": 0.1, "mode": "fixed", "data": OUT, "data_bytes": 1152}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"n": 0}, ValueError, "1 to 2147483647 values, got 0"),
        ({"n": 2**31}, ValueError, "got 2147483648"),
        ({"n": 2**33 + 5}, ValueError, "got 8589934597"),
        ({"n": 5.0}, TypeError, "expected an integer, got 5.0"),
        ({"dtype": "float16"}, TypeError, "got 'float16'"),
        ({"mode": "aatrox"}, ValueError, "got 'aatrox'"),
        ({"eb": 0}, ValueError, "positive and finite in float32, got 0"),
        ({"eb": -1.0}, ValueError, "got -1.0"),
        ({"eb": float("nan")}, ValueError, "got nan"),
        ({"eb": 1e-50}, ValueError, "positive and finite in float32, got 1e-50"),  # 0 as a float
        ({"eb": 1e50}, ValueError, "positive and finite in float32, got 1e\\+50"),  # inf as a float
        ({"eb": float("inf"), "dtype": "float64"}, ValueError, "positive and finite in float64, got inf"),
        ({"eb": "0.1"}, TypeError, "expected a number, got '0.1'"),
        ({"x": X + 8}, ValueError, "aligned to 16 bytes, got 0x7f1234567898; pass a copy"),
        ({"data": OUT + 2}, ValueError, "data|out: .* aligned to 4 bytes"),
        ({"x": 0}, ValueError, "got 0x0"),
        ({"data": 0}, ValueError, "got 0x0"),
        ({"data_bytes": 1023}, ValueError, "got (room for )?1023"),
    ],
)
def test_refused_arguments_do_not_arrive(stub, change, error, message):
    ctypes.memset((ctypes.c_char * 512).in_dll(stub.cdll, "last_call"), 0, 512)
    a = GOOD | change
    with pytest.raises(error, match=message):
        library.compress(a["x"], a["n"], a["dtype"], a["eb"], a["mode"], a["data"], a["data_bytes"])
    with pytest.raises(error, match=message):
        library.decompress(a["data"], a["data_bytes"], a["n"], a["dtype"], a["eb"], a["mode"], a["x"])
    assert last_call(stub) == ""


def test_capacity_is_the_worst_case(stub):
    library.compress(X, 33, "float32", 0.1, "fixed", OUT, 1024 + 2 * 128)
    with pytest.raises(ValueError, match="33 values can take 1280 bytes, got room for 1279"):
        library.compress(X, 33, "float32", 0.1, "fixed", OUT, 1279)


def test_last_error_is_read_and_cleared(stub):
    ctypes.c_int.in_dll(stub.cdll, "next_error").value = 2
    assert [stub.last_error(), stub.last_error()] == ["out of memory", ""]


# --- finding it -------------------------------------------------------------------------------------------
def test_version_and_path(stub):
    assert (stub.version, stub.path) == ("3.0.0", os.environ["CUSZP_LIBRARY"])
    assert library.load() is stub


def test_variable_is_read_again_when_it_changes(stub, build, monkeypatch):
    monkeypatch.setenv("CUSZP_LIBRARY", str(build("v2")))
    with pytest.raises(library.LibraryError):
        library.load()
    monkeypatch.setenv("CUSZP_LIBRARY", stub.path)
    assert library.load() is stub


@pytest.mark.parametrize(
    "name, flags, reason",
    [
        ("v2", [], "this is V2, which reads shared memory it has not initialised"),
        ("v1", [], "this is V1, .* static library only"),
        ("other", [], "it has no cuSZp functions"),
        ("v3", ["-DINCOMPLETE"], "incomplete: .*cuSZp_compress_1D_fixed_f64"),
    ],
)
def test_unusable_libraries_are_refused_with_the_reason(build, monkeypatch, name, flags, reason):
    path = str(build(name, *flags))
    monkeypatch.setenv("CUSZP_LIBRARY", path)
    with pytest.raises(library.LibraryError, match=reason) as caught:
        library.load()
    assert path in str(caught.value) and "set CUSZP_LIBRARY=" in str(caught.value)


def test_variable_pointing_nowhere(monkeypatch, tmp_path):
    for path in (tmp_path / "libcuSZp.so", tmp_path, ""):  # missing, a folder, set to nothing
        monkeypatch.setenv("CUSZP_LIBRARY", str(path))
        with pytest.raises(library.LibraryError, match="no such file; set CUSZP_LIBRARY=/path/to/libcuSZp.so"):
            library.load()


def test_variable_pointing_to_no_library(monkeypatch):
    monkeypatch.setenv("CUSZP_LIBRARY", __file__)
    with pytest.raises(library.LibraryError, match="test_library.py.*cannot be loaded .*ELF"):
        library.load()


def run_python(code: str, **env) -> str:
    """Return what ``code`` prints in a new process whose environment has ``env`` and no CUSZP_LIBRARY."""
    env = {k: v for k, v in os.environ.items() if k not in ("CUSZP_LIBRARY", "LD_LIBRARY_PATH")} | env
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


LOAD = """
from cuszp_cupy.raw import library
try:
    print(library.load().path)
except library.LibraryError as error:
    print(error)
"""


def test_loader_finds_it(build, tmp_path):
    shutil.copy(build("v3"), tmp_path / "libcuSZp.so")
    assert run_python(LOAD, LD_LIBRARY_PATH=str(tmp_path)) == str(tmp_path / "libcuSZp.so")


def test_set_variable_never_falls_back_to_the_loader(build, tmp_path):
    shutil.copy(build("v3"), tmp_path / "libcuSZp.so")
    said = run_python(LOAD, LD_LIBRARY_PATH=str(tmp_path), CUSZP_LIBRARY="/nowhere.so")
    assert said.startswith("CUSZP_LIBRARY='/nowhere.so': no such file")


def test_absent_library_says_how_to_point_to_it():
    said = run_python(LOAD)
    if said.endswith(".so"):
        pytest.skip(f"the loader finds one here: {said}")
    assert said.startswith("libcuSZp not found by the loader (libcuSZp.so: cannot open shared object file")
    assert said.endswith(
        "set CUSZP_LIBRARY=/path/to/libcuSZp.so; to install it, see https://github.com/szcompressor/cuSZp"
    )


def test_import_loads_nothing(build):
    code = "import cuszp_cupy.raw.library as l{}\nprint('libv3.so' in open('/proc/self/maps').read())"
    path = str(build("v3"))
    assert run_python(code.format(""), CUSZP_LIBRARY=path) == "False"
    assert run_python(code.format("; l.load()"), CUSZP_LIBRARY=path) == "True"


# --- the size of a stream ---------------------------------------------------------------------------------
def test_stream_bytes_of_golden_streams():
    wrong = 0
    for case in META["small"]:
        stream = GOLDEN[f"s{case['id']}"]
        assert library.stream_bytes(stream, case["n"], case["mode"]) == stream.size == case["stream_bytes"], case
        wrong += case["cmpSize_reported_by_libcuSZp"] != stream.size
    assert wrong > 200  # the library's own answer is 1024 for all of them, which is right for zeros alone


@pytest.mark.parametrize("n", [32768, 32769, 65536])  # a full chunk, one more block in the next, two full ones
@pytest.mark.parametrize("mode", format.MODES)
def test_stream_bytes_across_chunks(mode, n):
    x = np.cumsum(np.random.default_rng(n).standard_normal(n)).astype(np.float32) + 100
    stream = reference.compress(x, 1e-2, mode)
    assert library.stream_bytes(np.frombuffer(stream, np.uint8), n, mode) == len(stream)


def test_stream_bytes_refuses_what_no_encoder_writes():
    area = np.zeros(2048, np.uint8)
    with pytest.raises(format.FormatError, match="rate area of 32769 values has 2048 bytes, got 2047"):
        library.stream_bytes(area[:2047], 32769, "fixed")
    for mode in format.MODES:
        for rate in range(256):
            legal = rate < 32 or (mode == "outlier" and rate >= 128 and rate & 31 < 31)
            for position in (0, 1024, 1025, 2047):  # a block, the last block, the padding after it
                area[:] = 0
                area[position] = rate
                if rate == 0 or (legal and position <= 1024):
                    assert 2048 <= library.stream_bytes(area, 32769, mode) <= 2048 + 128
                else:
                    with pytest.raises(format.FormatError, match=f"not valid in mode '{mode}'"):
                        library.stream_bytes(area, 32769, mode)


def test_untouched_rate_area_is_refused_whatever_its_size():
    # compress_array tells by it that no kernel ran; 2^24 blocks of a marker 2^40 would sum to 0 in 64 bits
    for n in (1, 32768, 2**29):
        area = np.full(format.rate_bytes(n), 0xFF, np.uint8)
        for mode in format.MODES:
            with pytest.raises(format.FormatError):
                library.stream_bytes(area, n, mode)


# --- on a GPU, with a stub that computes nothing ----------------------------------------------------------
@pytest.mark.gpu
def test_library_whose_kernels_do_not_run_is_found_out(stub, monkeypatch):
    import cupy

    x = cupy.ones(100, cupy.float32)
    with pytest.raises(
        library.LibraryError, match="a block of ones did not come back; was it built for this GPU"
    ):
        library.compress_array(x, 0.1, "fixed")
    monkeypatch.setattr(library, "_first_use", lambda *_: None)
    for mode in format.MODES:
        with pytest.raises(library.LibraryError, match="compress left no stream"):
            library.compress_array(x, 0.1, mode)


@pytest.mark.gpu
def test_bad_streams_and_arrays_are_refused_before_the_library_sees_them(stub, monkeypatch):
    import cupy

    monkeypatch.setattr(library, "_first_use", lambda *_: None)
    ctypes.memset((ctypes.c_char * 512).in_dll(stub.cdll, "last_call"), 0, 512)
    stream = np.frombuffer(reference.compress(np.ones(100, np.float32), 0.1, "outlier"), np.uint8)
    damaged = stream.copy()
    damaged[0] = 0x40
    with pytest.raises(format.FormatError, match=f"say {stream.size} bytes, {stream.size - 1} are there"):
        library.decompress_array(cupy.asarray(stream[:-1]), 100, "float32", 0.1, "outlier")
    with pytest.raises(format.FormatError, match="not valid in mode 'outlier'"):
        library.decompress_array(cupy.asarray(damaged), 100, "float32", 0.1, "outlier")
    with pytest.raises(format.FormatError, match="1024 bytes, got 1000"):
        library.decompress_array(cupy.asarray(stream[:1000]), 100, "float32", 0.1, "outlier")
    with pytest.raises(ValueError, match="out: expected 100 C-contiguous values of float32, got shape .99,."):
        out = cupy.empty(99, cupy.float32)
        library.decompress_array(cupy.asarray(stream), 100, "float32", 0.1, "outlier", out)
    with pytest.raises(ValueError, match="x: libcuSZp needs an address aligned to 16 bytes"):
        library.compress_array(cupy.ones(100, cupy.float32)[1:], 0.1, "fixed")
    with pytest.raises(TypeError, match="got 'float16'"):
        library.compress_array(cupy.ones(100, cupy.float16), 0.1, "fixed")
    assert last_call(stub) == ""


# --- on a GPU, with the real library ----------------------------------------------------------------------
@pytest.fixture
def real():
    if "CUSZP_LIBRARY" not in os.environ:
        pytest.skip("CUSZP_LIBRARY is not set: no libcuSZp to compare with")
    return library.load()


def library_compress(x: np.ndarray, eb, mode) -> bytes:
    import cupy

    data, nbytes = library.compress_array(cupy.asarray(x), eb, mode)
    assert data.size == format.max_stream_bytes(x.size)
    return data[:nbytes].get().tobytes()


def library_decompress(stream: bytes, n, dtype, eb, mode) -> bytes:
    """Decode into an output full of NaN: what the library leaves untouched would show."""
    import cupy

    out = cupy.full(n, cupy.nan, dtype)
    data = cupy.asarray(np.frombuffer(stream, np.uint8))
    assert library.decompress_array(data, n, dtype, eb, mode, out) is out
    return out.get().tobytes()


def kernels_compress(x: np.ndarray, eb, mode) -> bytes:
    import cupy

    from cuszp_cupy.raw import cuszp

    x, out = cupy.asarray(x), cupy.empty(format.max_stream_bytes(x.size), cupy.uint8)
    size, workspace = cupy.zeros(1, cupy.uint64), cupy.zeros(cuszp.workspace_bytes(x.size), cupy.uint8)
    cuszp.compress(x.data.ptr, x.size, x.dtype.name, eb, mode, out.data.ptr, size.data.ptr, workspace.data.ptr)
    return out[: int(size[0])].get().tobytes()


def kernels_decompress(stream: bytes, n, dtype, eb, mode) -> bytes:
    import cupy

    from cuszp_cupy.raw import cuszp

    data, out = cupy.asarray(np.frombuffer(stream, np.uint8)), cupy.full(n, cupy.nan, dtype)
    status, workspace = cupy.zeros(1, cupy.uint32), cupy.zeros(cuszp.workspace_bytes(n), cupy.uint8)
    cuszp.decompress(
        data.data.ptr, data.nbytes, n, out.dtype.name, eb, mode, out.data.ptr, workspace.data.ptr, status.data.ptr
    )  # fmt: skip
    assert int(status[0]) == 0
    return out.get().tobytes()


def assert_engines_agree(x: np.ndarray, eb: float, mode: str, case) -> tuple[bytes, bytes]:
    """Check that kernels and library write the same stream and decode it to the same values; return both."""
    ours, theirs = kernels_compress(x, eb, mode), library_compress(x, eb, mode)
    assert ours == theirs, case
    decoded = library_decompress(ours, x.size, x.dtype, eb, mode)
    assert kernels_decompress(theirs, x.size, x.dtype, eb, mode) == decoded, case
    return theirs, decoded


def golden_input(case) -> np.ndarray:
    """The inputs of the large cases, as META["large_inputs"] spells them."""
    n, dtype = case["n"], np.dtype(case["dtype"])
    if case["kind"] == "zeros":
        return np.zeros(n, dtype)
    p = ((np.arange(n) * 2654435) % 2**32) * 2.0**-31 - 1.0
    return (((p * (1 - abs(p)) * 4) * 7) + 3).astype(dtype)


@pytest.mark.gpu
def test_engines_agree_on_golden_cases(real):
    for case in META["small"]:
        x, eb = (
            GOLDEN[f"x{case['id']}"],
            float(np.float32(case["eb"])),
        )  # made through the API whose eb is a float
        stream, decoded = assert_engines_agree(x, eb, case["mode"], case)
        assert stream == GOLDEN[f"s{case['id']}"].tobytes(), case
        assert hashlib.sha256(decoded).hexdigest() == case["sha256_of_decoded_little_endian_bytes_zeroed_output"]


@pytest.mark.gpu
def test_engines_agree_on_large_golden_cases(real):
    for case in META["large"]:
        stream, decoded = assert_engines_agree(
            golden_input(case), float(np.float32(case["eb"])), case["mode"], case
        )
        assert hashlib.sha256(stream).hexdigest() == case["stream_sha256"], case
        assert hashlib.sha256(decoded).hexdigest() == case["decoded_sha256"], case


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_engines_agree_on_random_cases(real, seed):
    rng = np.random.default_rng(seed)
    # Log-uniform sizes up to 30 chunks, a third of them at the edge of a block or chunk.
    n = int(2 ** rng.uniform(0, 20))
    if rng.random() < 1 / 3:
        n = max(1, -(-n // 32768) * 32768 if n > 4096 else -(-n // 32) * 32) + int(rng.integers(-1, 2))
    kind = rng.integers(4)
    x = rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4)
    if kind == 1:  # smooth
        x = np.cumsum(x)
    elif kind == 2:  # blocks without payload between others
        x *= np.repeat(rng.random(-(-n // 32)) < 0.3, 32)[:n]
    elif kind == 3:  # what saturates the quantiser
        x[rng.random(n) < 0.01] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, -0.0])
    x = x.astype(rng.choice(["float32", "float64"]))
    eb, mode = float(10 ** rng.uniform(-5, 1)), str(rng.choice(format.MODES))  # float64: no float has this eb
    assert_engines_agree(x, eb, mode, (n, kind, x.dtype, eb, mode))


@pytest.mark.gpu
def test_engines_of_the_public_functions_agree(real):
    import cupy

    import cuszp_cupy

    x = cupy.asarray(np.cumsum(np.random.default_rng(3).standard_normal(100_000)).astype(np.float32))
    for mode in format.MODES:
        ours, theirs = (cuszp_cupy.compress(x, 1e-2, mode, engine=engine) for engine in ("kernels", "library"))
        assert ours.tobytes() == theirs.tobytes()
        assert ours.decompress().get().tobytes() == theirs.decompress().get().tobytes()


@pytest.mark.gpu
def test_size_defect_is_handled(real):
    """The library reports 1024 for 1000 values; what comes back to the caller is the whole stream."""
    import cupy

    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    out, d_x = cupy.empty(format.max_stream_bytes(1000), cupy.uint8), cupy.asarray(x)
    assert library.compress(d_x.data.ptr, 1000, "float32", 1e-3, "fixed", out.data.ptr, out.nbytes) == 1024
    stream = library_compress(x, 1e-3, "fixed")
    assert len(stream) > 2000 and stream == reference.compress(x, 1e-3, "fixed")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", format.MODES)
def test_untouched_block_defect_is_handled(real, mode):
    """The library leaves a block without payload as it was; the caller gets zeros."""
    import cupy

    x = np.zeros(96, np.float32)
    x[32:64] = 5
    stream = library_compress(x, 0.5, mode)
    data, out = cupy.asarray(np.frombuffer(stream, np.uint8)), cupy.full(96, -7, cupy.float32)
    cupy.cuda.get_current_stream().synchronize()
    library.decompress(data.data.ptr, data.nbytes, 96, "float32", 0.5, mode, out.data.ptr)
    cupy.cuda.runtime.deviceSynchronize()
    assert out.get().tolist() == [-7] * 32 + [5] * 32 + [-7] * 32
    assert np.frombuffer(library_decompress(stream, 96, "float32", 0.5, mode), np.float32).tolist() == x.tolist()


@pytest.mark.gpu
def test_works_from_a_non_blocking_stream(real):
    """Its input is still being written, and its output is read, on a stream the null stream does not wait for."""
    import cupy

    x = np.cumsum(np.random.default_rng(1).standard_normal(3_000_000)).astype(np.float32)
    expected = library_compress(x, 1e-2, "plain")
    busy = cupy.ones((4096, 4096), cupy.float32)
    with cupy.cuda.Stream(non_blocking=True):
        source = cupy.asarray(x)
        for _ in range(10):
            late = cupy.full(x.size, cupy.nan, cupy.float32)
            for _ in range(5):
                busy @ busy  # keeps the stream busy for some ms before the input is there
            late[:] = source
            data, nbytes = library.compress_array(late, 1e-2, "plain")
            assert data[:nbytes].get().tobytes() == expected
            busy @ busy
            y = library.decompress_array(data, x.size, "float32", 1e-2, "plain")
            assert float(abs(y - source).max()) <= 1.01e-2


@pytest.mark.gpu
def test_pool_that_holds_all_memory_is_emptied(real):
    import cupy

    x = cupy.arange(100_000, dtype=cupy.float32)
    library.compress_array(x, 0.5, "fixed")  # the library's own 900 MB are taken now
    free, held = cupy.cuda.runtime.memGetInfo()[0], []
    try:
        held.append(cupy.cuda.alloc(free - (256 << 20)))
        while True:
            held.append(cupy.cuda.alloc(2 << 20))
    except cupy.cuda.memory.OutOfMemoryError:
        held.clear()  # back to the pool, not to the device
    assert cupy.cuda.runtime.memGetInfo()[0] < 6 << 20
    data, nbytes = library.compress_array(x, 0.5, "fixed")
    assert data[:nbytes].get().tobytes() == reference.compress(x.get(), 0.5, "fixed")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_values(real, dtype):
    import cupy

    data, nbytes = library.compress_array(cupy.empty(0, dtype), 0.1, "fixed")
    assert (data.size, nbytes) == (0, 0)
    assert library.decompress_array(data, 0, dtype, 0.1, "fixed").shape == (0,)
