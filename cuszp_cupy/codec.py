"""Arrays and batches of pages on the GPU: check, allocate, launch.

Everything runs on CuPy's current stream of the current device and returns without waiting, unless a
docstring says otherwise. Arrays may be CuPy's, or anything with ``__cuda_array_interface__`` or DLPack on
a CUDA device (torch tensors, bfloat16 ones too); they are read in place, never copied.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from .bound import Bound, parse_parts
from .format import (
    DTYPES,
    HEADER_BYTES,
    MAX_VALUES,
    ROW_WORDS,
    FormatError,
    Geometry,
    PageHeader,
    check_coding,
    check_mode,
    max_stream_bytes,
    unpack_word1,
)
from .page_codec import PageCodec
from .reference import page_geometry
from .tables import BUILT_IN, Tables

ENGINES = ("kernels", "library")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NOT_DECODED = 1 << 31  # what a caller may set a status to, to see whether the kernel wrote it
_STATUS = {
    1: "its table row is damaged",
    2: "its width codes, or its streams, are damaged",
    4: "its checksum is wrong",
    8: "it was coded with other tables",
    NOT_DECODED: "it was not decoded",
}


# --- float32 and float64 arrays: stream cuszp -------------------------------------------------------------
def compress(x, bound, mode: str = "fixed", *, engine: str = "kernels") -> Compressed:
    """Compress ``x`` to a ``cuszp`` stream.

    Args:
        x: float32 or float64, any shape, C-contiguous, on the current device.
        bound: a Bound, its text (``"abs:1e-3"``), or a number (absolute). Values come back within it, but
            for the rounding that format.py 1.6c tells of.
        mode: ``fixed``, ``plain`` (differences of neighbours) or ``outlier`` (plain, first value apart).
        engine: ``kernels`` (ours), or ``library``: the user's libcuSZp (``raw/library.py``), which waits
            for the device.

    Runs on the current stream. Waits for it only if the bound is ``rel`` or ``rms``, to learn eb. With float32
    the kernels take eb from 1.18e-38 to 4.25e+37: neither it nor its inverse may be a denormal.

    Raises:
        TypeError: another dtype, or no array on a CUDA device.    ValueError: not contiguous, too large, or
        a bound, mode or engine that is none.    RuntimeError: no CuPy, no GPU, or no library.
    """
    check_mode(mode)
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    bound = Bound.parse(bound)
    x = _array(x, ("float32", "float64"), "x")
    if x.size > MAX_VALUES:
        raise ValueError(f"x: a stream holds at most {MAX_VALUES} values, got {x.size}; split the array")
    eb = _absolute(bound, x)
    cupy = _cupy()
    if engine == "library":
        from .raw import library

        data, nbytes = library.compress_array(x, eb, mode)
        return Compressed(data, x.shape, x.dtype, eb, mode, engine, nbytes=nbytes)
    check_kernel_eb(eb, x.dtype.name)
    data = cupy.empty(max_stream_bytes(x.size), cupy.uint8)
    size = cupy.empty(1, cupy.uint64)
    if x.size == 0:
        return Compressed(data, x.shape, x.dtype, eb, mode, engine, nbytes=0)
    from .raw import cuszp

    workspace = _workspace(cuszp.workspace_bytes(x.size))
    cuszp.compress(x.data.ptr, x.size, x.dtype.name, eb, mode, data.data.ptr, size.data.ptr, workspace.data.ptr)
    return Compressed(data, x.shape, x.dtype, eb, mode, engine, size=size)


class Compressed:
    """A ``cuszp`` stream on the device, with what is needed to decompress it.

    Attributes:
        data: (capacity,) uint8 CuPy array; the stream is its first ``nbytes`` bytes.
        shape, dtype, n: of the array that was compressed.
        eb: the absolute bound, in the dtype's precision.
        mode, engine: as given to ``compress``.
    """

    def __init__(self, data, shape, dtype, eb, mode, engine="kernels", *, size=None, nbytes=None):
        self.data, self.shape, self.dtype = data, tuple(shape), np.dtype(dtype)
        self.eb, self.mode, self.engine = eb, mode, engine
        self._size, self._nbytes = size, nbytes

    @property
    def n(self) -> int:
        """Values in the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stream. The first access waits for the current stream."""
        if self._nbytes is None:
            self._nbytes = int(self._size.get()[0])
        return self._nbytes

    @property
    def ratio(self) -> float:
        """Raw bytes over stream bytes (1 for an empty array)."""
        return self.n * self.dtype.itemsize / self.nbytes if self.n else 1.0

    @property
    def bits_per_value(self) -> float:
        """Stream bits over values (0 for an empty array)."""
        return 8 * self.nbytes / self.n if self.n else 0.0

    def decompress(self, out=None):
        """Return the array; into ``out`` (same shape and dtype, C-contiguous) if given.

        Runs on the current stream. With engine ``kernels`` it waits for nothing once ``nbytes`` is known.

        Raises:
            FormatError: (when ``nbytes`` came from outside) a damaged stream; see ``from_bytes``.
        """
        cupy = _cupy()
        if out is None:
            out = cupy.empty(self.shape, self.dtype)
        else:
            out = _array(out, (self.dtype.name,), "out")
            if out.shape != self.shape:
                raise ValueError(f"out: expected the shape {self.shape}, got {out.shape}")
        if self.n == 0:
            return out
        if self.engine == "library":
            from .raw import library

            library.decompress_array(self.data, self.n, self.dtype.name, self.eb, self.mode, out.reshape(-1))
            return out
        from .raw import cuszp

        check_kernel_eb(self.eb, self.dtype.name)
        status = cupy.zeros(1, cupy.uint32)
        cuszp.decompress(
            self.data.data.ptr, self.data.size, self.n, self.dtype.name, self.eb, self.mode, out.data.ptr,
            _workspace(cuszp.workspace_bytes(self.n)).data.ptr, status.data.ptr,
        )  # fmt: skip
        if self._size is None and int(status.get()[0]):
            raise FormatError("stream: its rate bytes do not fit its size; it is damaged or no cuszp stream")
        return out

    @classmethod
    def from_bytes(cls, stream, shape, dtype, eb: float, mode: str = "fixed") -> Compressed:
        """Return the Compressed for a stream that was kept as bytes; ``decompress`` then checks it and waits."""
        data = _cupy().asarray(np.frombuffer(stream, np.uint8))
        return cls(data, shape, dtype, eb, check_mode(mode), nbytes=data.size)

    def tobytes(self) -> bytes:
        """Return the stream as host bytes. Waits for the current stream."""
        return self.data[: self.nbytes].get().tobytes()

    def __repr__(self) -> str:
        return (
            f"<Compressed {self.dtype} {self.shape} {self.mode} eb={self.eb:.6g}: {self.nbytes} bytes, "
            f"ratio {self.ratio:.2f}, {self.bits_per_value:.2f} bits/value>"
        )

    def _repr_html_(self) -> str:
        return _html({"array": f"{self.dtype} {self.shape}", "mode": self.mode, "eb": f"{self.eb:.6g}"}, self)


# --- pages of 16-bit floats: stream kv --------------------------------------------------------------------
def encode_pages(
    pages,
    bound="rms:0.05",
    coding: str = "fixed",
    *,
    geometry: Geometry | None = None,
    out=None,
    tables: Tables = BUILT_IN,
) -> EncodedPages:
    """Encode a batch of independent pages.

    Args:
        pages: float16 or bfloat16: one array (num_pages, tokens, channels), C-contiguous, or a list of
            (tokens, channels) arrays of one shape. With ``geometry``, any shape of that many values a page.
        bound: a Bound or its text for all parts, or a pair of them for K and V; strict (format.py 2).
        coding: ``fixed`` (pages that would not shrink are stored ``raw``), ``entropy`` (the same values in
            fewer bits, slower; pages that are not smaller for it are stored ``fixed``), or ``raw``.
        geometry: where K and V lie in a page; one part when None.
        out: (num_pages, slot_bytes) uint8 for the payloads, slot_bytes a multiple of 16 that is not less than a
            raw page; a CuPy array, or a NumPy array over pinned memory (the kernel then writes straight to the
            host). Allocated on the device when None.
        tables: of coding ``entropy``: the built-in ones, or from ``reference.calibrate``.

    Runs on the current stream and waits for nothing; ``out`` on the host is complete when the stream is.

    Raises:
        TypeError: another dtype, or no array on a CUDA device.    ValueError: not contiguous, shapes that
        differ or do not fit, a bound or coding that is none, tables for other pages, ``out`` too small,
        misaligned or not pinned.
        RuntimeError: no CuPy or no GPU.
    """
    check_coding(coding)
    cupy = _cupy()
    pointers, dtype, geometry, owner = _page_pointers(pages, geometry, "pages")
    codec = PageCodec(geometry, dtype, parse_parts(bound, len(geometry.part_values)), coding, tables)
    num_pages = len(pointers)
    slot_bytes = -(-geometry.nbytes // 16) * 16
    if out is None:
        out = cupy.empty((num_pages, slot_bytes), cupy.uint8)
    payloads = _slot_pointers(out, num_pages, geometry)
    rows = cupy.empty((num_pages, ROW_WORDS), cupy.uint32)
    if num_pages:
        addresses = cupy.asarray(np.stack([pointers, payloads]))
        codec.encode(
            addresses[0].data.ptr, addresses[1].data.ptr, rows.data.ptr, num_pages,
            aligned=aligned_to(pointers, 8), scratch=codec.new_scratch(num_pages),
        )  # fmt: skip
    del owner  # stream order keeps the memory alive long enough: CuPy's pool reuses it on this stream
    return EncodedPages(out, rows, dtype, geometry, codec)


class EncodedPages:
    """A batch of encoded pages: payload slots and a table of their metadata.

    Attributes:
        payload: (num_pages, slot_bytes) uint8; page i's payload is the first bytes of row i. On the device, or
            the pinned NumPy array that was given as ``out``.
        rows: (num_pages, 4) uint32 CuPy array, the table (format.py 2.1).
        dtype: ``float16`` or ``bfloat16``.
        geometry: of every page.
        tables: that pages of coding ``entropy`` were coded with.
    """

    def __init__(self, payload, rows, dtype: str, geometry: Geometry, codec: PageCodec | None = None):
        self.payload, self.rows, self.dtype, self.geometry = payload, rows, dtype, geometry
        self._codec = codec or PageCodec(geometry, dtype, (), "fixed")
        self.tables = self._codec.tables
        self._host_rows = None

    @property
    def num_pages(self) -> int:
        """Pages in the batch."""
        return len(self.rows)

    @property
    def host_rows(self) -> np.ndarray:
        """The table on the host. The first access waits for the current stream."""
        if self._host_rows is None:
            self._host_rows = self.rows.get()
        return self._host_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads and of the table. The first access waits for the current stream."""
        return int(self.host_rows[:, 1].sum(dtype=np.uint64)) + 4 * ROW_WORDS * self.num_pages

    @property
    def num_raw(self) -> int:
        """Pages that did not shrink and are stored raw. The first access waits for the current stream."""
        return int((self.host_rows[:, 0] >> 20 == 0).sum())

    @property
    def ratio(self) -> float:
        """Raw bytes over encoded bytes, table included (1 for no pages)."""
        return self.num_pages * self.geometry.nbytes / self.nbytes if self.num_pages else 1.0

    @property
    def bits_per_value(self) -> float:
        """Encoded bits over values, table included (0 for no pages)."""
        return 8 * self.nbytes / (self.num_pages * self.geometry.values) if self.num_pages else 0.0

    def header(self, i: int) -> PageHeader:
        """Return the metadata of page ``i``; raise FormatError where its row is damaged."""
        word1, payload_bytes, check, _ = (int(word) for word in self.host_rows[i])
        coding, steps = unpack_word1(word1, self.geometry)
        return PageHeader(self.dtype, self.geometry, coding, steps, payload_bytes, check, word1 >> 24)

    def blob(self, i: int) -> bytes:
        """Return page ``i`` as a self-describing blob, for ``reference.decode_page`` or a file. Waits."""
        header = self.header(i)
        payload = self.payload[i, : header.payload_bytes]
        if isinstance(payload, np.ndarray):
            _cupy().cuda.get_current_stream().synchronize()
            return header.pack() + payload.tobytes()
        return header.pack() + payload.get().tobytes()

    @classmethod
    def from_blobs(cls, blobs, *, tables: Tables = BUILT_IN) -> EncodedPages:
        """Return the batch of ``blobs``, pages of one dtype and geometry, copied to the device.

        ``tables``: that those of coding ``entropy`` were coded with.

        Raises:
            FormatError: a blob that is damaged (the checksum is left to ``decode_pages``).
            ValueError: blobs of different dtype or geometry, or none.
        """
        cupy = _cupy()
        headers = [PageHeader.parse(blob) for blob in blobs]
        if not headers:
            raise ValueError("blobs: expected at least one page, got none")
        if len({(header.dtype, header.geometry) for header in headers}) > 1:
            raise ValueError("blobs: expected pages of one dtype and geometry, got several; decode them apart")
        geometry = headers[0].geometry
        payload = np.zeros((len(headers), -(-geometry.nbytes // 16) * 16), np.uint8)
        for slot, blob in zip(payload, blobs, strict=True):
            data = np.frombuffer(blob, np.uint8)[HEADER_BYTES:]
            slot[: data.size] = data
        rows = np.array([(h.word1, h.payload_bytes, h.checksum, 0) for h in headers], np.uint32)
        entropy = any(header.coding == "entropy" for header in headers)
        codec = PageCodec(geometry, headers[0].dtype, (), *(("entropy", tables) if entropy else ("fixed",)))
        return cls(cupy.asarray(payload), cupy.asarray(rows), headers[0].dtype, geometry, codec)

    def decode(self, out=None):
        """Return the pages; see ``decode_pages``."""
        return decode_pages(self, out)

    def __repr__(self) -> str:
        return (
            f"<EncodedPages {self.num_pages} x {self.dtype} {self.geometry.shape}: {self.nbytes} bytes, "
            f"ratio {self.ratio:.2f}, {self.bits_per_value:.2f} bits/value, {self.num_raw} raw>"
        )

    def _repr_html_(self) -> str:
        return _html(
            {"pages": f"{self.num_pages} x {self.dtype} {self.geometry.shape}", "raw": self.num_raw}, self
        )


def decode_pages(encoded: EncodedPages, out=None, *, check: bool = True, status=None):
    """Return the pages of ``encoded`` as one array (num_pages, \\*geometry.shape).

    Args:
        encoded: from ``encode_pages`` or ``EncodedPages.from_blobs``.
        out: an array to decode into, of that shape and dtype, C-contiguous; or a list of pages. A CuPy array
            is allocated when None.
        check: wait for the stream and raise if a page is damaged. Else the caller looks at ``status``.
        status: (num_pages,) uint32 CuPy array to fill (0: good); allocated when None.

    Raises:
        FormatError: damaged pages, all of them named; the other pages of ``out`` are good.
        TypeError, ValueError: an ``out`` that does not fit.
    """
    cupy = _cupy()
    geometry, num_pages = encoded.geometry, encoded.num_pages
    if out is None:
        out = _empty((num_pages, *geometry.shape), encoded.dtype)
    pointers, dtype, _, owner = _page_pointers(out, geometry, "out")
    if dtype != encoded.dtype or len(pointers) != num_pages:
        raise ValueError(f"out: expected {num_pages} pages of {encoded.dtype}, got {len(pointers)} of {dtype}")
    if num_pages == 0:
        return out
    if status is None:
        status = cupy.empty(num_pages, cupy.uint32)
    payloads = _slot_pointers(encoded.payload, num_pages, geometry)
    addresses = cupy.asarray(np.stack([payloads, pointers]))
    codec = encoded._codec
    on_host = isinstance(encoded.payload, np.ndarray)
    codec.decode(
        addresses[0].data.ptr, encoded.rows.data.ptr, addresses[1].data.ptr, status.data.ptr, num_pages,
        aligned=aligned_to(pointers, 4), scratch=codec.new_scratch(num_pages), on_host=on_host,
    )  # fmt: skip
    if check:
        bad = status.get()
        if bad.any():
            reasons = [f"page {i}: {reason}" for i, reason in failures(bad).items()]
            raise FormatError(f"{len(reasons)} of {num_pages} pages are damaged: " + "; ".join(reasons))
    return out


def failures(status: np.ndarray) -> dict[int, str]:
    """Return index -> what is wrong, of the pages that ``status`` (uint32, from the decoder) says are damaged."""
    return {
        int(i): ", ".join(text for bit, text in _STATUS.items() if int(status[i]) & bit)
        for i in np.flatnonzero(status)
    }


# --- what both share --------------------------------------------------------------------------------------
def _cupy():
    """Return CuPy; raise RuntimeError, with what to do, where it or a GPU is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            f"CuPy cannot be imported ({error}); install cuszp_cupy[cuda13] or [cuda12] to match your driver. "
            "cuszp_cupy.reference does the same without a GPU"
        ) from None
    try:
        cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        hint = (
            "the driver is older than CuPy's CUDA: update it, or install cuszp_cupy[cuda12]"
            if "insufficient" in str(error)
            else "check that nvidia-smi lists a GPU and CUDA_VISIBLE_DEVICES allows it"
        )
        raise RuntimeError(f"no usable GPU ({error}); {hint}. cuszp_cupy.reference needs none") from None
    return cupy


def _array(x, dtypes: tuple[str, ...], name: str):
    """Return ``x`` as a C-contiguous CuPy array over the same memory, of one of ``dtypes``."""
    cupy = _cupy()
    if isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected an array on the GPU, got a NumPy array; pass cupy.asarray({name})")
    if not isinstance(x, cupy.ndarray):
        x = _adopt(x, name)
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {x.dtype.name}")
    if not x.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a C-contiguous array, got {x.shape} with strides {x.strides}; "
            f"pass cupy.ascontiguousarray({name})"
        )
    if x.size and x.device.id != cupy.cuda.runtime.getDevice():
        raise ValueError(
            f"{name}: expected an array on the current device {cupy.cuda.runtime.getDevice()}, got one on "
            f"device {x.device.id}; work inside 'with cupy.cuda.Device({x.device.id})'"
        )
    return x


def _adopt(x, name: str):
    """A foreign array as a CuPy array over the same memory."""
    cupy = _cupy()
    if str(getattr(x, "dtype", "")) == "torch.bfloat16":  # torch offers no interface for it but its bits
        import torch

        return _array(x.detach().view(torch.int16), ("int16",), name).view(_BFLOAT16)
    if hasattr(x, "detach"):
        x = x.detach()  # torch exports nothing that requires a gradient
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return cupy.asarray(x)
        if hasattr(x, "__dlpack__"):
            return cupy.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: this {type(x).__name__} cannot be used on the GPU ({error})") from None
    raise TypeError(
        f"{name}: expected a CuPy array or an object with __cuda_array_interface__ or __dlpack__, "
        f"got {type(x).__name__}"
    )


def _empty(shape, dtype: str):
    cupy = _cupy()
    return cupy.empty(shape, cupy.uint16).view(np.float16 if dtype == "float16" else _BFLOAT16)


def _page_pointers(pages, geometry: Geometry | None, name: str):
    """(addresses of the pages, dtype, geometry, the arrays that own the memory)."""
    if isinstance(pages, (list, tuple)):
        if not pages:
            raise ValueError(f"{name}: expected at least one page, got an empty list")
        arrays = [_array(page, DTYPES, f"{name}[{i}]") for i, page in enumerate(pages)]
        kinds = {(page.shape, page.dtype.name) for page in arrays}
        if len(kinds) > 1:
            raise ValueError(f"{name}: expected pages of one shape and dtype, got {sorted(kinds)}")
        geometry = page_geometry(arrays[0].shape, geometry)
        return np.array([a.data.ptr for a in arrays], np.uint64), arrays[0].dtype.name, geometry, arrays
    array = _array(pages, DTYPES, name)
    if array.ndim < 2:
        raise ValueError(
            f"{name}: expected (num_pages, tokens, channels), got {array.shape}; or pass a list of pages"
        )
    geometry = page_geometry(array.shape[1:], geometry)
    return _strided(array.data.ptr, len(array), geometry.nbytes), array.dtype.name, geometry, array


def _slot_pointers(slots, num_pages: int, geometry: Geometry) -> np.ndarray:
    """The device addresses of ``slots``, checked to hold ``num_pages`` payloads."""
    cupy = _cupy()
    if not isinstance(slots, (np.ndarray, cupy.ndarray)) or slots.dtype != np.uint8 or slots.ndim != 2:
        raise TypeError(f"out: expected a 2-D uint8 CuPy array or pinned NumPy array, got {type(slots).__name__}")
    pointer = slots.ctypes.data if isinstance(slots, np.ndarray) else slots.data.ptr
    if (
        slots.shape[0] != num_pages
        or slots.shape[1] < geometry.nbytes
        or slots.shape[1] % 16
        or not slots.flags.c_contiguous
        or pointer % 16
    ):
        raise ValueError(
            f"out: expected {num_pages} slots of {-(-geometry.nbytes // 16) * 16} bytes or more (a multiple of "
            f"16), C-contiguous and 16-byte aligned, got {slots.shape} at {pointer:#x}"
        )
    if isinstance(slots, np.ndarray) and slots.size:
        pointer = mapped_pointer(pointer, "out")
    return _strided(pointer, num_pages, slots.shape[1])


def _strided(pointer: int, num: int, stride: int) -> np.ndarray:
    return np.uint64(pointer) + np.arange(num, dtype=np.uint64) * np.uint64(stride)


def pinned(nbytes: int) -> np.ndarray:
    """Return pinned host memory as a uint8 NumPy array; raise MemoryError where it cannot be had."""
    cuda = _cupy().cuda
    try:  # not alloc_pinned_memory, which rounds up to a power of two
        memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(nbytes), 0)
    except cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(f"cannot pin {nbytes} bytes of host memory ({error}); ask for less") from None
    return np.frombuffer(memory, np.uint8, nbytes)


def mapped_pointer(pointer: int, name: str) -> int:
    """Return the device address of pinned host memory; raise ValueError where it is not pinned."""
    runtime = _cupy().cuda.runtime
    attributes = runtime.pointerGetAttributes(pointer)
    if attributes.type != runtime.memoryTypeHost or not attributes.devicePointer:
        raise ValueError(
            f"{name}: host memory at {pointer:#x} is not pinned; take it from cupy.cuda.alloc_pinned_memory "
            "or register it with cudaHostRegister"
        )
    return attributes.devicePointer


def aligned_to(pointers: np.ndarray, nbytes: int) -> bool:
    """Return whether all addresses are multiples of ``nbytes``, a power of two."""
    return not int(np.bitwise_or.reduce(pointers)) & (nbytes - 1)


def _absolute(bound: Bound, x) -> float:
    """eb of ``bound`` for the array ``x``, in the array's precision; waits for rel and rms."""
    cupy = _cupy()
    eb = bound.value
    if bound.kind != "abs" and x.size:
        finite = x[cupy.isfinite(x)].astype(cupy.float64)
        scale = 0.0
        if finite.size:
            scale = finite.max() - finite.min() if bound.kind == "rel" else cupy.sqrt((finite**2).mean())
        eb *= float(scale)
    rounded = float(x.dtype.type(eb))
    if not (rounded > 0 and math.isfinite(rounded)):
        raise ValueError(
            f"bound: {bound} of this {x.dtype.name} array is eb = {eb:g}, which is no positive finite "
            f"{x.dtype.name}; pass abs:E with a usable E"
        )
    return rounded


def check_kernel_eb(eb: float, dtype: str) -> None:
    """Raise ValueError if the kernels cannot compute with eb: compiled by CuPy they take denormals for zeros."""
    tiny = float(np.finfo(np.float32).tiny)
    if dtype == "float32" and not tiny <= eb <= 0.5 / tiny:
        raise ValueError(
            f"eb: the kernels take {tiny:.3g} to {0.5 / tiny:.3g} with float32, got {eb:.6g}; "
            "use the reference, engine 'library', or float64"
        )


_workspaces: dict[tuple[int, int], object] = {}


def _workspace(nbytes: int):
    """Zeroed scratch memory for the current device and stream; the kernels leave it zeroed."""
    cupy = _cupy()
    key = (cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)
    workspace = _workspaces.get(key)
    if workspace is None or workspace.nbytes < nbytes:
        workspace = _workspaces[key] = cupy.zeros(max(nbytes, 1 << 16), cupy.uint8)
    return workspace


def _html(rows: dict, encoded) -> str:
    rows = {
        **rows,
        "bytes": f"{encoded.nbytes:,}",
        "ratio": f"{encoded.ratio:.2f}",
        "bits/value": f"{encoded.bits_per_value:.2f}",
    }
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"
