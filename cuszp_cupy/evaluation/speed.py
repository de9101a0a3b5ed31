"""Speed on the GPU: the codec beside a device copy and, where they can be loaded, libcuSZp and nvCOMP; the link.

Everything is verified before it is timed: bytes against the reference, errors against the bound.
"""

from __future__ import annotations

import itertools

import numpy as np

from .. import reference
from ..bound import Bound, parse_parts
from ..format import HEADER_BYTES, MODES, Geometry, max_stream_bytes
from ..page_codec import PageCodec
from ..raw import cuszp, library
from . import codec, data, timing
from .codec import ARRAY_BOUND, KV_BOUNDS, KV_CODINGS, PageSet

BATCH_BYTES = 256 << 20  # several times the L2 cache of any GPU, so one set of buffers is cold
SMALL_BYTES = 1 << 20
NUM_CHECKED = 4  # pages whose bytes are compared with the reference's
DEVICE_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_DEVICE = 2, 1, 3  # cudaMemcpyKind
NVCOMP = {"algorithm": "ANS", "data_type": "<f2", "uncomp_chunk_size": 256 << 10}  # lossless, for 16-bit floats


def gpu_rows(quick: bool = False, step=lambda text: None) -> dict:
    """Measure on the current GPU.

    Args:
        quick: fewer rows, shorter.
        step: called with a line on what comes next.

    Returns:
        ``rows`` (keys: ``codec.ROW``), ``link`` (see ``link_rows``), and ``notes``: what is missing, and why.

    Raises:
        AssertionError: bytes other than the reference's, or an error beyond the bound.
    """
    seconds = 0.3 if quick else 1.5  # of timing, a set of data
    rows, notes = [], []
    sets = codec.page_sets(quick)
    for pages in sets:
        step(f"{pages.name}: checking, then timing")
        rows += kv_rows(pages, seconds)
        if pages is sets[0] and not quick:
            step(f"{pages.name}: nvCOMP")
            rows += nvcomp_rows(pages, seconds, notes)
    for nbytes in (BATCH_BYTES,) if quick else (BATCH_BYTES, SMALL_BYTES):
        step(f"K f32, {nbytes >> 20} MiB: checking, then timing")
        rows += array_rows(nbytes, 2 * seconds, notes, calls=not quick)
    step("the link: checking, then timing")
    link = link_rows(sets[0], seconds, KV_BOUNDS[1:2] if quick else KV_BOUNDS)
    return {"rows": rows, "link": link, "notes": notes}


def _speeds(raw_bytes: int, touched_bytes: int, copy: timing.Timing, **timings: timing.Timing) -> dict:
    """Return the entries of a row for its compress= and decompress= timings, all times of ``raw_bytes``."""
    copied = 2 * raw_bytes / copy.ms  # bytes read and written
    entries = {}
    for what, measured in timings.items():
        entries[f"{what}_gbps"] = raw_bytes / measured.ms / 1e6
        entries[f"{what}_spread_percent"] = measured.spread_percent
        entries[f"{what}_of_copy"] = touched_bytes / measured.ms / copied
    return entries


def _copy_row(name: str, nbytes: int, copy: timing.Timing) -> dict:
    speeds = _speeds(nbytes, 2 * nbytes, copy, compress=copy)
    return codec.row(data=name, mbytes=nbytes / 1e6, codec="copy", ratio=1.0, **speeds)


def copy_bytes(to_ptr: int, from_ptr: int, nbytes: int, kind: int = DEVICE_TO_DEVICE) -> None:
    """Enqueue a copy on the current stream."""
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    cupy.cuda.runtime.memcpyAsync(to_ptr, from_ptr, nbytes, kind, stream)


# --- kv ---------------------------------------------------------------------------------------------------
class Batch:
    """Pages on the GPU with everything that encoding them takes, in device or pinned host memory.

    Args:
        x: (num_pages, tokens, channels) CuPy array of float16 or bfloat16.
        payload: uint8 CuPy array, (num_pages, bytes of a raw page), from ``cupy.empty`` or ``pinned``.
    """

    def __init__(self, x, geometry: Geometry, bound: str, payload, coding: str = "fixed"):
        import cupy

        self.x, self.geometry, self.payload, self.coding = x, geometry, payload, coding
        self.codec = PageCodec(geometry, x.dtype.name, parse_parts(bound, len(geometry.part_values)), coding)
        self.scratch = self.codec.new_scratch(len(x))
        self.rows = cupy.zeros((len(x), 4), cupy.uint32)
        self.status = cupy.zeros(len(x), cupy.uint32)
        self.x_addresses, self.payload_addresses = _addresses(x), _addresses(payload)

    def encode(self, i: int = 0) -> None:
        """Enqueue the encoding of all pages."""
        self.codec.encode(
            self.x_addresses.data.ptr, self.payload_addresses.data.ptr, self.rows.data.ptr, len(self.x),
            aligned=True, scratch=self.scratch,
        )  # fmt: skip

    def decoder(self, y):
        """Return a function that enqueues the decoding of all pages to ``y``."""
        y_addresses = _addresses(y)

        def decode(i: int = 0) -> None:
            self.codec.decode(
                self.payload_addresses.data.ptr, self.rows.data.ptr, y_addresses.data.ptr, self.status.data.ptr,
                len(self.x), aligned=True, scratch=self.scratch,
            )  # fmt: skip

        return decode

    @property
    def nbytes(self) -> int:
        """Bytes of payloads and table rows. Waits."""
        return int(self.rows[:, 1].sum()) + self.rows.nbytes


def _addresses(array):
    """Return the address of each ``array[i]`` as a uint64 CuPy array."""
    import cupy

    return cupy.arange(len(array), dtype=cupy.uint64) * array.strides[0] + array.data.ptr


def kv_rows(pages: PageSet, seconds: float, bounds=KV_BOUNDS, nbytes: int = BATCH_BYTES) -> list[dict]:
    """Return the rows of ``nbytes`` of pages: a device copy, then ``kv`` in both codings at each bound."""
    import cupy

    x = data.tiled(pages.pages, nbytes, xp=cupy)
    y = cupy.empty_like(x)
    samplers = {"copy": timing.events(lambda i: copy_bytes(y.data.ptr, x.data.ptr, nbytes), 4)}
    batches, errors = {}, {}
    for coding, bound in itertools.product(KV_CODINGS, bounds):
        payload = cupy.empty((len(x), pages.geometry.nbytes), cupy.uint8)
        batch = batches[coding, bound] = Batch(x, pages.geometry, bound, payload, coding)
        errors[coding, bound] = check_batch(batch, y, f"{pages.name}, {coding}, {bound}", bound)
        samplers[coding, bound, "compress"] = timing.events(batch.encode, 4)
        samplers[coding, bound, "decompress"] = timing.events(batch.decoder(y), 4)
    times = timing.interleaved(samplers, seconds)

    rows = [_copy_row(pages.name, nbytes, times["copy"])]
    for (coding, bound), batch in batches.items():
        both = {what: times[coding, bound, what] for what in ("compress", "decompress")}
        rows.append(
            codec.row(
                data=pages.name, mbytes=nbytes / 1e6, codec=f"kv {coding}", bound=bound,
                ratio=nbytes / batch.nbytes, bits_per_value=16 * batch.nbytes / nbytes,
                max_error_over_eb=errors[coding, bound],
                **_speeds(nbytes, nbytes + batch.nbytes, times["copy"], **both),
            )
        )  # fmt: skip
    return rows


def check_batch(batch: Batch, y, what: str, bound: str) -> float:
    """Encode, decode to ``y``, return max error / eb over all pages; raise AssertionError if a byte is wrong."""
    import cupy

    y.view(cupy.uint16).fill(0x7FFF)  # NaN: a page that is not written shows
    batch.encode()
    batch.decoder(y)()
    if int(batch.status.any()):
        raise AssertionError(f"{what}: the decoder found a fault in a page the encoder has just written")
    for i in np.linspace(0, len(batch.x) - 1, NUM_CHECKED).astype(int):
        page, decoded = (cupy.asnumpy(a[i].view(cupy.uint16)) for a in (batch.x, y))
        page = page.view(data.DTYPES[batch.x.dtype.name])
        blob = reference.encode_page(page, bound, batch.coding, geometry=batch.geometry)
        row, words = batch.rows[i].get(), np.frombuffer(blob[:HEADER_BYTES], "<u4")
        payload = batch.payload[i, : int(row[1])].get().tobytes()
        if payload != blob[HEADER_BYTES:] or row[:3].tolist() != words[[1, 6, 7]].tolist():
            raise AssertionError(f"{what}: page {i} is not coded as the reference codes it")
        if not np.array_equal(decoded, reference.decode_page(blob).view(np.uint16).reshape(decoded.shape)):
            raise AssertionError(f"{what}: page {i} is not decoded as the reference decodes it")
    error = 0.0
    for first in range(0, len(y), 512):  # a piece at a time: float64 takes four times the room
        piece = slice(first, first + 512)
        error = max(error, codec.page_error_over_eb(batch.x[piece], y[piece], bound, batch.geometry.parts, cupy))
    return codec.check_within(error, what)


def nvcomp_rows(pages: PageSet, seconds: float, notes: list[str], nbytes: int = BATCH_BYTES) -> list[dict]:
    """Return the row of nvCOMP's ANS: whole calls; without nvCOMP none, and a line in ``notes``."""
    import cupy

    nvcomp = find_nvcomp(notes)
    if not nvcomp:
        return []
    x = data.tiled(pages.pages, nbytes, xp=cupy).view(cupy.uint8).reshape(-1)
    y = cupy.empty_like(x)
    cupy.cuda.Device().synchronize()  # nvCOMP works on a stream of its own
    ans, array = nvcomp.Codec(**NVCOMP), nvcomp.as_array(x)
    encoded = ans.encode(array)
    decoded = cupy.asarray(ans.decode(encoded)).view(cupy.uint8).reshape(-1)
    if not bool((decoded == x).all()):
        raise AssertionError(f"{pages.name}: nvCOMP ANS did not bring the bytes back")
    times = timing.interleaved(
        {
            "copy": timing.events(lambda i: copy_bytes(y.data.ptr, x.data.ptr, nbytes), 4),
            "compress": timing.wall(lambda: ans.encode(array)),
            "decompress": timing.wall(lambda: ans.decode(encoded)),
        },
        seconds,
    )
    copy, encoded_bytes = times.pop("copy"), encoded.buffer_size
    return [
        codec.row(
            data=pages.name, mbytes=nbytes / 1e6, codec="nvCOMP ANS (call)",
            bound="lossless", ratio=nbytes / encoded_bytes, bits_per_value=16 * encoded_bytes / nbytes,
            max_error_over_eb=0.0, **_speeds(nbytes, nbytes + encoded_bytes, copy, **times),
        )
    ]  # fmt: skip


# --- cuszp ------------------------------------------------------------------------------------------------
def array_rows(nbytes: int, seconds: float, notes: list[str], calls: bool = True) -> list[dict]:
    """Return the rows of float32 arrays of ``nbytes``: a device copy, then ``cuszp`` in each mode.

    As many different arrays as make up BATCH_BYTES are worked on in turn, so that small ones are cold too.

    Args:
        calls: also time whole calls, ``codec.compress`` and libcuSZp's own; without libcuSZp a line in ``notes``.
    """
    import cupy

    n, name = nbytes // 4, f"K f32 {nbytes >> 20} MiB"
    x = float32_batch().reshape(-1, n)
    y = cupy.empty_like(x)
    eb = codec.value_range_eb(x, ARRAY_BOUND)
    num_runs = max(4, len(x))
    workspace = cupy.zeros(cuszp.workspace_bytes(n), cupy.uint8)
    status = cupy.zeros(1, cupy.uint32)

    def copy(i):
        copy_bytes(_address(y, i), _address(x, i), nbytes)

    samplers = {"copy": timing.events(copy, num_runs)}
    compressed_bytes, errors = {}, {}
    for mode in MODES:
        out = cupy.empty((len(x), -(-max_stream_bytes(n) // 256) * 256), cupy.uint8)
        sizes = cupy.zeros(len(x), cupy.uint64)

        def compress(i, mode=mode, out=out, sizes=sizes):
            to, size = _address(out, i), _address(sizes, i)
            cuszp.compress(_address(x, i), n, "float32", eb, mode, to, size, workspace.data.ptr)

        for i in range(len(x)):
            compress(i)
        stream_bytes = sizes.get().tolist()

        def decompress(i, mode=mode, out=out, stream_bytes=stream_bytes):
            stream = _address(out, i), stream_bytes[i % len(x)]
            cuszp.decompress(*stream, n, "float32", eb, mode, _address(y, i), workspace.data.ptr, status.data.ptr)

        for i in range(len(x)):
            decompress(i)
        errors[mode] = check_arrays(x, y, eb, mode, int(status[0]))
        compressed_bytes[mode] = sum(stream_bytes)
        samplers[f"cuszp {mode}", "compress"] = timing.events(compress, num_runs)
        samplers[f"cuszp {mode}", "decompress"] = timing.events(decompress, num_runs)
        if calls:
            samplers |= _call_samplers(x[0], eb, mode, out[0, : stream_bytes[0]], notes)
    times = timing.interleaved(samplers, seconds)

    rows = [_copy_row(name, nbytes, times["copy"])]
    for what in dict.fromkeys(key[0] for key in samplers if key != "copy"):
        mode = what.split()[1]
        mean_bytes = compressed_bytes[mode] / len(x)
        both = {direction: times[what, direction] for direction in ("compress", "decompress")}
        rows.append(
            codec.row(
                data=name, mbytes=nbytes / 1e6, codec=what, bound=ARRAY_BOUND, ratio=nbytes / mean_bytes,
                bits_per_value=8 * mean_bytes / n, max_error_over_eb=errors[mode],
                **_speeds(nbytes, nbytes + mean_bytes, times["copy"], **both),
            )
        )  # fmt: skip
    return rows


def float32_batch(nbytes: int = BATCH_BYTES):
    """Return ``nbytes`` of the sample's K as one float32 CuPy array, (nbytes / 4,)."""
    import cupy

    pages = data.kv_pages()["K"]
    num_pages = -(-nbytes // (2 * pages[0].nbytes))
    x = codec.as_float32(data.tiled(pages, num_pages * pages[0].nbytes, xp=cupy), cupy)
    return x.reshape(-1)[: nbytes // 4].copy()


def check_arrays(x, y, eb: float, mode: str, status: int) -> float:
    """Return max error / eb of arrays (k, n) and their decoded ones; raise AssertionError if something is wrong.

    The bytes of the first MiB, compressed on its own, are compared with the reference's.
    """
    import cupy

    from ..codec import compress

    if status:
        raise AssertionError(f"cuszp {mode}: the decoder found a fault in a stream the encoder has just written")
    piece = x[0, : SMALL_BYTES // 4]
    if compress(piece, Bound("abs", eb), mode).tobytes() != reference.compress(cupy.asnumpy(piece), eb, mode):
        raise AssertionError(f"cuszp {mode}: the stream is not the reference's")
    largest = float(cupy.abs(x).max())
    tolerance = 2 * float(np.spacing(np.float32(largest))) / eb  # format.py, 1.6c
    error = max(float(cupy.abs(a - b).max()) for a, b in zip(x, y, strict=True)) / eb
    return codec.check_within(error, f"cuszp {mode}", tolerance)


def _call_samplers(x, eb: float, mode: str, stream, notes: list[str]) -> dict:
    """Return samplers of whole calls on ``x``, whose stream is known: ours, and libcuSZp's if it is there."""
    import cupy

    from ..codec import compress

    bound = Bound("abs", eb)
    ours = compress(x, bound, mode)
    samplers = {
        (f"cuszp {mode} (call)", "compress"): timing.wall(lambda: compress(x, bound, mode).nbytes),
        (f"cuszp {mode} (call)", "decompress"): timing.wall(ours.decompress),
    }
    if not find_library(notes):
        return samplers
    out, nbytes = library.compress_array(x, eb, mode)
    if nbytes != len(stream) or not bool((out[:nbytes] == stream).all()):
        raise AssertionError(f"libcuSZp {mode}: its stream of {nbytes} bytes differs from ours of {len(stream)}")
    y = cupy.empty_like(x)

    def library_compress():  # the bare functions: no checks and no zeroing, which raw/library.py adds for arrays
        library.compress(x.data.ptr, x.size, "float32", eb, mode, out.data.ptr, out.nbytes)

    def library_decompress():
        library.decompress(out.data.ptr, nbytes, x.size, "float32", eb, mode, y.data.ptr)

    samplers[f"libcuSZp {mode} (call)", "compress"] = timing.wall(library_compress)
    samplers[f"libcuSZp {mode} (call)", "decompress"] = timing.wall(library_decompress)
    return samplers


def find_library(notes: list[str]) -> bool:
    """Return whether libcuSZp is there; put a line in ``notes``: which one it is, or how to point to it."""
    try:
        found = library.load()
        note = f"libcuSZp {found.version}: {found.path}"
    except library.LibraryError as error:
        found, note = None, f"libcuSZp is left out: {error}"
    if note not in notes:
        notes.append(note)
    return found is not None


def find_nvcomp(notes: list[str]):
    """Return the module of nvCOMP, or None; a line in ``notes`` says then how to have it."""
    try:
        from nvidia import nvcomp
    except ImportError as error:
        note = f"nvCOMP is left out ({error}): to compare, install nvidia-nvcomp-cu13 (or -cu12)"
        if note not in notes:
            notes.append(note)
        return None
    return nvcomp


def _address(array, i: int) -> int:
    """Return the address of ``array[i % len(array)]``."""
    return array.data.ptr + i % len(array) * array.strides[0]


# --- the link ---------------------------------------------------------------------------------------------
def link_rows(pages: PageSet, seconds: float, bounds=KV_BOUNDS, nbytes: int = BATCH_BYTES) -> list[dict]:
    """Return how fast a batch gets to pinned host memory and back, as it is and through the codec.

    Returns:
        dicts of ``data``, ``what`` (copy or kv fixed), ``bound``, ``ratio``, and, each for ``to_host_`` and
        ``from_host_``: ``raw_gbps``, ``link_gbps``, ``spread_percent``.
    """
    import cupy

    x = data.tiled(pages.pages, nbytes, xp=cupy)
    y, host = cupy.empty_like(x), pinned(nbytes)

    def to_host(i):
        copy_bytes(host.data.ptr, x.data.ptr, nbytes, DEVICE_TO_HOST)

    def from_host(i):
        copy_bytes(y.data.ptr, host.data.ptr, nbytes, HOST_TO_DEVICE)

    samplers = {
        ("copy", None, "to_host"): timing.events(to_host, 1),
        ("copy", None, "from_host"): timing.events(from_host, 1),
    }
    link_bytes = {("copy", None): nbytes}
    for bound in bounds:
        batch = Batch(x, pages.geometry, bound, pinned(nbytes).reshape(len(x), -1))
        check_batch(batch, y, f"{pages.name}, {bound}, through the link", bound)
        link_bytes["kv fixed", bound] = batch.nbytes
        samplers["kv fixed", bound, "to_host"] = timing.events(batch.encode, 1)
        samplers["kv fixed", bound, "from_host"] = timing.events(batch.decoder(y), 1)
    times = timing.interleaved(samplers, 2 * seconds)

    rows = []
    for (what, bound), crossed in link_bytes.items():
        row = {"data": pages.name, "what": what, "bound": bound, "ratio": nbytes / crossed}
        for where in ("to_host", "from_host"):
            measured = times[what, bound, where]
            row[f"{where}_raw_gbps"] = nbytes / measured.ms / 1e6
            row[f"{where}_link_gbps"] = crossed / measured.ms / 1e6
            row[f"{where}_spread_percent"] = measured.spread_percent
        rows.append(row)
    return rows


def pinned(nbytes: int):
    """Return pinned host memory as a uint8 CuPy array: kernels reach it over the link, at the same address."""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(nbytes)
    device_view = cupy.cuda.UnownedMemory(memory.ptr, nbytes, memory, cupy.cuda.Device().id)
    return cupy.ndarray(nbytes, cupy.uint8, cupy.cuda.MemoryPointer(device_view, 0))
