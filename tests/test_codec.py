"""The GPU codec against the reference: bytes, bounds, damage, and what it refuses."""

import itertools
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import cuszp_cupy
from cuszp_cupy import FormatError, Geometry, codec, decode_pages, encode_pages, reference
from cuszp_cupy.format import step_size

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMPY_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}

#: Why each: the smallest token page; K|V per head as vLLM 0.33 and 0.26 lay it out; a part of 2 channels (two
#: groups of a thread in different parts); an odd number of channel pairs; flat by tokens, by odd channels, by
#: both with a tail; flat with parts; one value; exactly one block of 512 threads; one group more than that (two
#: chunks); three chunks with an uneven last one; flat over several chunks with a tail.
GEOMETRIES = [
    Geometry(16, 2),
    Geometry(16, 512, parts=(64, 64)),
    Geometry(32, 128, outer=3, parts=(64, 64)),
    Geometry(16, 48, parts=(2, 6)),
    Geometry(48, 66),
    Geometry(5, 64),
    Geometry(16, 63),
    Geometry(7, 33),
    Geometry(3, 192, parts=(64, 32)),
    Geometry(1, 1),
    Geometry(16, 2048),
    Geometry(16, 2050),
    Geometry(64, 1300, parts=(600, 50)),
    Geometry(1, 99_999),
]
KINDS = ["normal", "bits", "zeros", "outlier", "mixed", "decoded"]
BOUNDS = ["rms:0.05", "rms:0.3", "rel:0.01", "abs:0.02", "abs:1e-30"]


def values(kind, dtype, geometry, seed):
    """A page of ``kind`` in ``dtype``: realistic, hostile, or decoded before (format.py 2.8)."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    numpy_dtype, n = NUMPY_DTYPES[dtype], geometry.values
    if kind == "bits":  # every pattern, NaN and Inf included; some runs of -0.0
        page = rng.integers(0, 1 << 16, n, np.uint16)
        page[: n // 3] = 0x8000
    elif kind == "zeros":
        page = np.zeros(n, np.uint16)
    else:
        x = rng.standard_normal(n) * 2.0 ** rng.integers(-8, 8)
        if kind == "outlier":
            x *= 0.01
            x[rng.integers(n)] = 1000
        if kind == "mixed":
            x *= 2.0 ** rng.integers(-12, 12, n)
            x[rng.integers(n)], x[rng.integers(n)] = np.nan, np.inf
        with np.errstate(over="ignore"):
            page = x.astype(np.float32).astype(numpy_dtype).view(np.uint16)
    page = page.view(numpy_dtype).reshape(geometry.shape)
    if kind == "decoded":
        page = reference.decode_page(reference.encode_page(page, "rms:0.05", geometry=geometry))
    return page


def same_bits(a, b):
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(np.uint16), np.ascontiguousarray(b).view(np.uint16)
    )


def test_same_bits_fails_on_a_negative_zero():
    with pytest.raises(AssertionError):
        same_bits(np.zeros(1, np.float16), -np.zeros(1, np.float16))


def on_device(pages, guard=0):
    """(num_pages, ...) CuPy array over memory with ``guard`` bytes 0xA5 before and after, and that memory."""
    import cupy

    memory = cupy.full(pages.nbytes + 2 * guard, 0xA5, cupy.uint8)
    inner = memory[guard : guard + pages.nbytes]
    inner.set(np.ascontiguousarray(pages).view(np.uint8).ravel())
    return inner.view(pages.dtype).reshape(pages.shape), memory


def assert_guard(memory, guard):
    for edge in (memory[:guard], memory[len(memory) - guard :]):
        assert (edge.get() == 0xA5).all(), "bytes outside the buffer were written"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_kernels_equal_reference(geometry, dtype):
    """Same blobs, same pages, twice, on a non-blocking stream, guard bytes intact."""
    import cupy

    for bound, seed in itertools.product(BOUNDS, range(2)):
        pages = np.stack([values(kind, dtype, geometry, seed) for kind in KINDS])
        blobs = [reference.encode_page(page, bound, geometry=geometry) for page in pages]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            device_pages, _ = on_device(pages)
            slot_bytes = -(-geometry.nbytes // 16) * 16
            slots, slot_memory = on_device(np.zeros((len(pages), slot_bytes), np.uint8), guard=256)
            out, out_memory = on_device(np.zeros_like(pages), guard=256)
            for _ in range(2):
                slots[...] = 0xC3
                encoded = encode_pages(device_pages, bound, geometry=geometry, out=slots)
                for i, kind in enumerate(KINDS):
                    assert encoded.blob(i) == blobs[i], f"{kind} {bound}"
                    end = encoded.header(i).payload_bytes
                    assert (slots[i, end:].get() == 0xC3).all(), "bytes past the payload were written"
                out[...] = 0
                decode_pages(encoded, out)
                same_bits(out.get(), np.stack([reference.decode_page(blob) for blob in blobs]))
            stream.synchronize()
            assert_guard(slot_memory, 256)
            assert_guard(out_memory, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_coding_entropy(dtype, monkeypatch):
    """Blobs of the reference, in device and pinned memory, more pages than scratch; tables are asked for."""
    from cuszp_cupy import page_codec
    from cuszp_cupy.codec import pinned

    geometry = Geometry(16, 256, parts=(64, 64))
    monkeypatch.setattr(page_codec, "SCRATCH_BYTES", 3 * page_codec.kv.entropy_slot_bytes(geometry))
    pages = np.stack([values(kind, dtype, geometry, seed) for kind in KINDS for seed in range(2)])
    calibrated = reference.calibrate(pages[:2], geometry=geometry)
    device_pages, _ = on_device(pages)
    slot_bytes = -(-geometry.nbytes // 16) * 16
    host = pinned(len(pages) * slot_bytes).reshape(len(pages), -1)
    for tables in (reference.BUILT_IN, calibrated):
        options = {"geometry": geometry, "tables": tables}
        blobs = [reference.encode_page(page, "rms:0.05", "entropy", **options) for page in pages]
        expected = np.stack([reference.decode_page(blob, tables=tables) for blob in blobs])
        for out in (None, host):
            encoded = encode_pages(device_pages, "rms:0.05", "entropy", out=out, **options)
            assert [encoded.blob(i) for i in range(len(pages))] == blobs
            same_bits(encoded.decode().get(), expected)
        same_bits(cuszp_cupy.EncodedPages.from_blobs(blobs, tables=tables).decode().get(), expected)
    with pytest.raises(FormatError, match="other tables"):
        cuszp_cupy.EncodedPages.from_blobs(blobs).decode()
    with pytest.raises(ValueError, match="coding 'fixed' has none"):
        encode_pages(device_pages, geometry=geometry, tables=calibrated)


@pytest.mark.gpu
def test_random_pages_equal_reference():
    """200 random shapes, types, bounds and kinds of data."""
    import cupy

    rng = np.random.default_rng(20)
    for case in range(200):
        tokens, channels = int(rng.choice([1, 3, 16, 17, 32, 64])), int(rng.integers(1, 400))
        geometry = Geometry(tokens, channels, outer=int(rng.integers(1, 4)))
        if channels % 4 == 0 and tokens % 16 == 0:
            kw = 2 * int(rng.integers(1, channels // 4 + 1))
            geometry = Geometry(tokens, channels, geometry.outer, (kw, channels - kw) if kw < channels else None)
        dtype, kind = rng.choice(list(NUMPY_DTYPES)), str(rng.choice(KINDS))
        bound = f"{rng.choice(['abs', 'rel', 'rms'])}:{2.0 ** rng.uniform(-12, -1.1)!r}"
        page = values(kind, dtype, geometry, case)
        blob = reference.encode_page(page, bound, geometry=geometry)
        device_page = cupy.asarray(page.view(np.uint16)).view(page.dtype)
        encoded = encode_pages(device_page[None], bound, geometry=geometry)
        assert encoded.blob(0) == blob, f"case {case}: {geometry} {dtype} {kind} {bound}"
        same_bits(encoded.decode().get()[0], reference.decode_page(blob))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_strict_bound_over_all_patterns(dtype):
    """Every one of the 65,536 patterns, flat and in token groups, at 63 bounds: |x - y| <= eb, rest bit-exact."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    tiles = patterns.reshape(-1, 16, 2).transpose(1, 0, 2).reshape(16, 4096)  # groups of 32 neighbours
    for pages in (patterns.reshape(1, 1, -1), tiles[None]):
        x = pages.view(NUMPY_DTYPES[dtype])
        device, _ = on_device(x)
        with np.errstate(invalid="ignore"):
            exact = x.astype(np.float64)
        finite = np.isfinite(exact)
        for exponent, factor in itertools.product(range(-14, 7), (1, 1.3, 1.7)):
            eb = factor * 2.0**exponent
            encoded = encode_pages(device, f"abs:{eb!r}")
            y = encoded.decode().get()
            with np.errstate(invalid="ignore"):
                error = np.abs(y.astype(np.float64)[finite] - exact[finite])
            assert error.max() <= eb
            assert error.max() <= step_size(encoded.header(0).steps[0]) / 2
            same_bits(y[~finite], x[~finite])
            same_bits(y[pages == 0x8000], x[pages == 0x8000])


@pytest.mark.gpu
def test_misaligned_pages_and_lists():
    """Pages at odd addresses (2 mod 4) and one by one, as a server hands them over."""
    import cupy

    geometry = Geometry(16, 128, parts=(32, 32))
    pages = np.stack([values("normal", "bfloat16", geometry, seed) for seed in range(4)])
    memory = cupy.zeros(pages.size + 1, cupy.uint16)
    memory[1:].set(pages.view(np.uint16).ravel())
    shifted = memory[1:].view(BFLOAT16).reshape(pages.shape)
    encoded = encode_pages([shifted[i] for i in (2, 0, 3, 1)], geometry=geometry)
    blobs = [reference.encode_page(pages[i], geometry=geometry) for i in (2, 0, 3, 1)]
    assert [encoded.blob(i) for i in range(4)] == blobs
    out = cupy.zeros(pages.size + 1, cupy.uint16)
    views = out[1:].view(BFLOAT16).reshape(pages.shape)
    decode_pages(encoded, [views[i] for i in (2, 0, 3, 1)])
    same_bits(
        views.get(), np.stack([reference.decode_page(reference.encode_page(p, geometry=geometry)) for p in pages])
    )
    assert int(out[0]) == 0


@pytest.mark.gpu
def test_pinned_slots():
    """Payloads straight to and from mapped pinned host memory."""
    import cupy

    pages = np.stack([values("normal", "bfloat16", Geometry(16, 512), seed) for seed in range(8)])
    memory = cupy.cuda.alloc_pinned_memory(pages.nbytes)
    slots = np.frombuffer(memory, np.uint8, pages.nbytes).reshape(8, -1)
    device, _ = on_device(pages)
    encoded = encode_pages(device, "rms:0.1", out=slots)
    blobs = [reference.encode_page(page, "rms:0.1") for page in pages]
    assert [encoded.blob(i) for i in range(8)] == blobs
    same_bits(encoded.decode().get(), np.stack([reference.decode_page(blob) for blob in blobs]))
    with pytest.raises(ValueError, match="not pinned"):
        encode_pages(device, out=np.zeros_like(slots))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_and_dlpack(dtype):
    """torch tensors and DLPack exporters are read and written in place."""
    import cupy

    torch = pytest.importorskip("torch", reason="torch is not installed")
    page = values("normal", dtype, Geometry(16, 64), 0)
    tensor = torch.from_numpy(page.view(np.int16)).cuda().view(getattr(torch, dtype))[None]
    encoded = encode_pages(tensor)
    assert encoded.blob(0) == reference.encode_page(page)
    out = torch.empty_like(tensor)
    decode_pages(encoded, out)
    same_bits(out.view(torch.int16).cpu().numpy()[0].view(page.dtype), reference.decode_page(encoded.blob(0)))

    class Exporter:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    half = cupy.asarray(page.astype(np.float16))
    if dtype == "float16":
        assert encode_pages([Exporter(half)]).blob(0) == reference.encode_page(page)
    x = torch.linspace(0, 1, 100, device="cuda")
    assert float(abs(cuszp_cupy.compress(x, 0.01).decompress() - cupy.asarray(x)).max()) <= 0.0101


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", [Geometry(16, 64), Geometry(16, 2304)], ids=["one chunk", "two chunks"])
def test_damage_is_reported_and_contained(geometry):
    """Each damaged page is named, none of the others suffers, a one-chunk page is not even written."""
    import cupy

    pages = np.stack([values("normal", "bfloat16", geometry, seed) for seed in range(6)])
    device, _ = on_device(pages)
    encoded = encode_pages(device, "rms:0.05")
    good = encoded.decode().get()
    payload = cupy.asarray(encoded.payload.get())  # all of it written: copied without remarks of initcheck
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = cuszp_cupy.EncodedPages(payload.copy(), encoded.rows.copy(), encoded.dtype, geometry)
        victim = int(rng.integers(6))
        if rng.random() < 0.3:
            damaged.rows[victim, int(rng.integers(3))] ^= np.uint32(1 << int(rng.integers(32)))
        else:
            at = int(rng.integers(encoded.header(victim).payload_bytes))
            damaged.payload[victim, at] ^= np.uint8(1 << int(rng.integers(8)))
        out, memory = on_device(np.zeros_like(pages), guard=4096)
        with pytest.raises(FormatError, match=rf"1 of 6 pages are damaged: page {victim}: "):
            decode_pages(damaged, out)
        others = [i for i in range(6) if i != victim]
        same_bits(out.get()[others], good[others])
        if geometry.groups <= 1024:
            assert not out[victim].view(cupy.uint16).any()
        assert_guard(memory, 4096)


@pytest.mark.gpu
def test_hostile_tables_touch_nothing_outside():
    """Random rows and payloads, batched: every page fails or decodes, nothing outside is written."""
    import cupy

    rng = np.random.default_rng(2)
    for geometry in (Geometry(16, 64), Geometry(16, 66, parts=(2, 64)), Geometry(3, 33), Geometry(16, 2304)):
        count = 300
        pages = np.stack([values("normal", "bfloat16", geometry, seed) for seed in range(3)] * (count // 3))
        device, _ = on_device(pages)
        encoded = encode_pages(device, "rms:0.05")
        rows, payload = encoded.rows.get(), encoded.payload.get()
        for i in range(count):
            for _ in range(int(rng.integers(1, 4))):
                rows[i, rng.integers(2)] ^= np.uint32(rng.integers(1, 1 << 32) >> int(rng.integers(32)))
            payload[i, : geometry.code_bytes] = rng.integers(0, 256, geometry.code_bytes)
        hostile = cuszp_cupy.EncodedPages(cupy.asarray(payload), cupy.asarray(rows), "bfloat16", geometry)
        out, memory = on_device(np.zeros_like(pages), guard=65536)
        status = cupy.zeros(count, cupy.uint32)
        decode_pages(hostile, out, check=False, status=status)
        assert (status.get() != 0).mean() > 0.99
        assert_guard(memory, 65536)


@pytest.mark.gpu
def test_blobs_round_trip_and_empty_batch():
    import cupy

    pages = np.stack([values("normal", "float16", Geometry(16, 64), seed) for seed in range(3)])
    encoded = encode_pages(cupy.asarray(pages), ("rms:0.05",))
    again = cuszp_cupy.EncodedPages.from_blobs([encoded.blob(i) for i in range(3)])
    same_bits(again.decode().get(), encoded.decode().get())
    assert again.ratio == encoded.ratio > 2
    assert "3 x float16 (16, 64)" in repr(encoded) and "<table>" in encoded._repr_html_()
    nothing = encode_pages(cupy.empty((0, 16, 64), cupy.float16))
    assert nothing.num_pages == 0 and nothing.nbytes == 0 and nothing.decode().shape == (0, 16, 64)


@pytest.mark.gpu
def test_no_wait_and_no_allocation_inside_the_launch():
    """The launch functions can be captured into a CUDA graph (which forbids both) and replayed on other data."""
    import cupy

    from cuszp_cupy.bound import Bound
    from cuszp_cupy.raw import kv

    geometry = Geometry(16, 512)
    pages = [np.stack([values("normal", "bfloat16", geometry, s + 10 * r) for s in range(4)]) for r in range(2)]
    device, _ = on_device(pages[0])
    encoded = encode_pages(device)  # warm-up: compiles
    encoded.decode()
    pointers = cupy.asarray(device.data.ptr + np.arange(4, dtype=np.uint64) * np.uint64(geometry.nbytes))
    slots = cupy.asarray(encoded.payload.data.ptr + np.arange(4, dtype=np.uint64) * np.uint64(geometry.nbytes))
    out, status = cupy.empty_like(device), cupy.empty(4, cupy.uint32)
    outs = cupy.asarray(out.data.ptr + np.arange(4, dtype=np.uint64) * np.uint64(geometry.nbytes))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        kv.encode(
            pointers.data.ptr, slots.data.ptr, encoded.rows.data.ptr, 4, "bfloat16", geometry,
            (Bound("rms", 0.05),), aligned=True,
        )  # fmt: skip
        kv.decode(
            slots.data.ptr, encoded.rows.data.ptr, outs.data.ptr, status.data.ptr, 4, "bfloat16", geometry,
            aligned=True,
        )  # fmt: skip
        graph = stream.end_capture()
        for batch in pages:
            device.view(cupy.uint16).set(batch.view(np.uint16))
            graph.launch(stream)
            stream.synchronize()
            expected = [reference.decode_page(reference.encode_page(page)) for page in batch]
            same_bits(out.get(), np.stack(expected))
            assert not status.get().any()


@pytest.mark.gpu
def test_what_is_refused():
    import cupy

    page = cupy.zeros((2, 16, 64), cupy.float16)
    for call, error, match in [
        (
            lambda: encode_pages(cupy.zeros((2, 16, 64), cupy.float32)),
            TypeError,
            "float16 or bfloat16, got float32",
        ),
        (lambda: encode_pages(np.zeros((2, 16, 64), np.float16)), TypeError, "cupy.asarray"),
        (lambda: encode_pages([[1.0]]), TypeError, "CuPy array or an object"),
        (lambda: encode_pages(page[:, ::2]), ValueError, "C-contiguous"),
        (lambda: encode_pages(page[0, 0]), ValueError, "num_pages, tokens, channels"),
        (lambda: encode_pages([]), ValueError, "at least one page"),
        (lambda: encode_pages([page[0], page[0, :8]]), ValueError, "one shape and dtype"),
        (lambda: encode_pages(page, "rms:0"), ValueError, "positive finite"),
        (lambda: encode_pages(page, "rms:nan"), ValueError, "positive finite"),
        (lambda: encode_pages(page, "rms:inf"), ValueError, "positive finite"),
        (lambda: encode_pages(page, coding="zip"), ValueError, "coding: expected one of raw, fixed"),
        (lambda: encode_pages(page, geometry=Geometry(16, 32)), ValueError, "512 values"),
        (lambda: encode_pages(page, out=cupy.zeros((2, 1024), cupy.uint8)), ValueError, "2 slots of 2048 bytes"),
        (lambda: encode_pages(page, out=cupy.zeros((2, 2048), cupy.int8)), TypeError, "uint8"),
        (
            lambda: encode_pages(page).decode(cupy.zeros((3, 16, 64), cupy.float16)),
            ValueError,
            "expected 2 pages",
        ),
        (lambda: cuszp_cupy.compress(page, 0.1), TypeError, "float32 or float64, got float16"),
        (lambda: cuszp_cupy.compress(cupy.zeros(4), 0.1, "best"), ValueError, "mode: expected one of fixed"),
        (lambda: cuszp_cupy.compress(cupy.zeros(4), 0.1, engine="cpu"), ValueError, "engine: expected"),
        (lambda: cuszp_cupy.compress(cupy.zeros(4), -0.1), ValueError, "positive finite"),
        (lambda: cuszp_cupy.compress(cupy.zeros(4), "rel:0.1"), ValueError, "no positive finite"),
        (lambda: cuszp_cupy.compress(cupy.zeros(4, cupy.float32), 1e-60), ValueError, "no positive finite"),
        (lambda: cuszp_cupy.compress(cupy.zeros((4, 4)).T[:2], 0.1), ValueError, "C-contiguous"),
    ]:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier"])
def test_compressed_arrays(mode):
    """The public class around the cuszp kernels: bounds, sizes, bytes in and out."""
    import cupy

    x = np.cumsum(np.random.default_rng(3).standard_normal(100_000)).reshape(100, 1000).astype(np.float32)
    for bound, eb in [
        ("abs:0.01", 0.01),
        ("rel:1e-4", 1e-4 * np.ptp(x)),
        ("rms:0.01", 0.01 * np.sqrt(np.mean(x**2))),
    ]:
        c = cuszp_cupy.compress(cupy.asarray(x), bound, mode)
        assert c.eb == pytest.approx(eb, rel=1e-5)
        assert c.tobytes() == reference.compress(x, c.eb, mode)
        assert c.ratio == x.nbytes / len(c.tobytes()) and "ratio" in repr(c) and "<table>" in c._repr_html_()
        y = c.decompress()
        assert y.shape == x.shape and np.abs(y.get() - x).max() <= c.eb * 1.001
        again = cuszp_cupy.Compressed.from_bytes(c.tobytes(), x.shape, x.dtype, c.eb, mode)
        np.testing.assert_array_equal(again.decompress(cupy.empty_like(y)).get(), y.get())
    broken = cuszp_cupy.Compressed.from_bytes(c.tobytes()[:-40], x.shape, x.dtype, c.eb, mode)
    with pytest.raises(FormatError, match="damaged"):
        broken.decompress()
    assert cuszp_cupy.compress(cupy.empty(0), 0.1, mode).decompress().shape == (0,)


def test_without_cupy_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"install cuszp_cupy\[cuda13\]"):
        cuszp_cupy.compress(np.zeros(4, np.float32), 0.1)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("cudaErrorNoDevice: no CUDA-capable device is detected", "nvidia-smi"),
        (
            "cudaErrorInsufficientDriver: CUDA driver version is insufficient",
            r"update it, or install cuszp_cupy\[cuda12\]",
        ),
    ],
)
def test_without_a_usable_gpu_the_error_says_what_to_do(monkeypatch, reason, advice):
    class CUDARuntimeError(RuntimeError):
        pass

    def get_device():
        raise CUDARuntimeError(reason)

    runtime = types.SimpleNamespace(getDevice=get_device, CUDARuntimeError=CUDARuntimeError)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match=f"no usable GPU.*{advice}"):
        encode_pages([np.zeros((16, 2), np.float16)])


def test_bounds_that_the_kernels_cannot_compute_with():
    for eb in (1.2e-38, 4.2e37):
        codec.check_kernel_eb(eb, "float32")
    for eb in (1.1e-38, 4.4e37):  # a denormal; one whose inverse is
        codec.check_kernel_eb(eb, "float64")
        with pytest.raises(ValueError, match="kernels take 1.18e-38 to 4.25e"):
            codec.check_kernel_eb(eb, "float32")
