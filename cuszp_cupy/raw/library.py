"""ctypes binding to the user's own libcuSZp (V3): the engine ``library`` of stream ``cuszp``. It is never needed.

Found by the environment variable ``CUSZP_LIBRARY`` (its path), else by the loader's search for
``libcuSZp.so``; looked for at first use, not at import. Versions are told apart by their C++ symbols,
since upstream has no version function.

First half: the two calls on raw pointers, checked but without policy. Second half: the same on CuPy
arrays, with everything the library leaves to its caller:

- it reports a stream size of 1024 for every n <= 32768: the size is taken from the rate bytes;
- it decodes nothing into a block without payload: the output is zeroed first;
- it checks no stream: the rate bytes are compared with the stream's length first;
- it reports no error: its kernels are seen to run once a device, rate bytes are seen to be written at
  each call, and the device and its CUDA runtime are asked afterwards;
- it clears its flags on the legacy default stream, so its kernel must not run on a non-blocking one: it
  runs on the null stream, after the caller's stream, and the host waits for it. Nothing overlaps;
- its cudaMalloc finds nothing where CuPy's pool holds all memory: the pool is emptied then. The first
  compress keeps about 900 MB on an H100 for as long as the process lives (its kernels' local arrays).
"""

from __future__ import annotations

import ctypes
import functools
import math
import numbers
import os
from dataclasses import dataclass

import numpy as np

from ..format import (
    BLOCK,
    CHUNK,
    MAX_STREAM_BYTES,
    MAX_VALUES,
    MODES,
    FormatError,
    check_mode,
    max_stream_bytes,
    rate_bytes,
)

VARIABLE = "CUSZP_LIBRARY"
_HINT = f"set {VARIABLE}=/path/to/libcuSZp.so; to install it, see https://github.com/szcompressor/cuSZp"

# A symbol that only this version has. cuSZp_compress is in V2 and V3, with different arguments.
_V3 = "_Z27cuSZp_compress_1D_fixed_f32PfPhmPmfP11CUstream_st"
_V2 = "_Z24cuSZp_compress_plain_f32PfPhmPmfP11CUstream_st"
_V1 = "_Z26SZp_compress_deviceptr_f32PfPhmPmfP11CUstream_st"

_DIM_1D, _TYPE_FLOAT = 1, 0  # upstream's enums; its modes are numbered as in MODES
_STACK_BYTES = 4352  # a thread of upstream's compress kernels, from cuobjdump --dump-resource-usage
#: As a payload size it marks a rate byte that no encoder writes: more than all payloads of the largest legal
#: stream (2^26 blocks of 132 bytes), and 2^26 of it still fit int64.
_ILLEGAL = 2**34
_FEW_RATES = 64 << 10  # rate bytes up to this many are summed on the host: a copy costs less than several kernels


class LibraryError(RuntimeError):
    """libcuSZp is not there, is a version that cannot be used, or failed."""


class Uint3(ctypes.Structure):
    """CUDA's ``uint3``: extents, x fastest. Ignored in 1-D."""

    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


@dataclass(frozen=True)
class Library:
    """A loaded libcuSZp: the file the loader took it from, its version, and its functions."""

    path: str
    version: str
    cdll: ctypes.CDLL

    def f64(self, what: str, mode: str):
        """Return the 1-D float64 function (``what``: compress, decompress). Its eb is a true double."""
        name = f"cuSZp_{what}_1D_{mode}_f64"
        return getattr(self.cdll, f"_Z{len(name)}{name}PdPhm{'Pm' if what == 'compress' else 'm'}dP11CUstream_st")

    def last_error(self) -> str:
        """Return and clear the last error of the CUDA runtime it links; "" if none.

        Also "" where that runtime is linked statically: it shows no functions then.
        """
        if not hasattr(self.cdll, "cudaGetLastError"):
            return ""
        code = self.cdll.cudaGetLastError()
        self.cdll.cudaGetErrorString.restype = ctypes.c_char_p
        return self.cdll.cudaGetErrorString(code).decode() if code else ""


def load() -> Library:
    """Return libcuSZp, loaded at the first call and again only where ``CUSZP_LIBRARY`` has changed.

    Raises:
        LibraryError: not found (with the way to point to it), not loadable, or not V3. A set
            ``CUSZP_LIBRARY`` is the only place looked at.
    """
    return _load(os.environ.get(VARIABLE))


@functools.cache
def _load(path: str | None) -> Library:
    if path is not None and not os.path.isfile(path):
        raise LibraryError(f"{VARIABLE}={path!r}: no such file; {_HINT}")
    try:
        cdll = ctypes.CDLL("libcuSZp.so" if path is None else os.path.abspath(path))
    except OSError as error:
        where = "libcuSZp not found by the loader" if path is None else f"{VARIABLE}={path!r}: cannot be loaded"
        raise LibraryError(f"{where} ({error}); {_HINT}") from None
    name = path or "libcuSZp.so"
    if not hasattr(cdll, _V3):
        if hasattr(cdll, _V2):
            reason = "this is V2, which reads shared memory it has not initialised and may write wrong streams"
        elif hasattr(cdll, _V1):
            reason = "this is V1, whose functions take other arguments (upstream has it as a static library only)"
        else:
            reason = "it has no cuSZp functions"
        raise LibraryError(f"{name}: {reason}; V3.0.0 is needed: {_HINT}")
    library = Library(_path_of(cdll), "3.0.0", cdll)
    try:
        _declare(library)
    except AttributeError as error:
        raise LibraryError(f"{name}: incomplete: {error}; V3.0.0 is needed: {_HINT}") from None
    return library


def _declare(library: Library) -> None:
    pointer, size, stream, enum = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    cdll = library.cdll
    # void cuSZp_compress(void* d_oriData, unsigned char* d_cmpBytes, size_t nbEle, size_t* cmpSize,
    #                     float errorBound, cuszp_dim_t dim, uint3 dims, cuszp_type_t type,
    #                     cuszp_mode_t mode, cudaStream_t stream)          cmpSize: on the host
    cdll.cuSZp_compress.argtypes = (
        pointer, pointer, size, ctypes.POINTER(size), ctypes.c_float, enum, Uint3, enum, enum, stream,
    )  # fmt: skip
    # void cuSZp_decompress(void* d_decData, unsigned char* d_cmpBytes, size_t nbEle, size_t cmpSize,
    #                       float errorBound, cuszp_dim_t dim, uint3 dims, cuszp_type_t type,
    #                       cuszp_mode_t mode, cudaStream_t stream)
    cdll.cuSZp_decompress.argtypes = (
        pointer, pointer, size, size, ctypes.c_float, enum, Uint3, enum, enum, stream,
    )  # fmt: skip
    cdll.cuSZp_compress.restype = cdll.cuSZp_decompress.restype = None
    for mode in MODES:
        # void cuSZp_compress_1D_<mode>_f64(double* d_oriData, unsigned char* d_cmpBytes, size_t nbEle,
        #                                   size_t* cmpSize, double errorBound, cudaStream_t stream)
        function = library.f64("compress", mode)
        function.argtypes = (pointer, pointer, size, ctypes.POINTER(size), ctypes.c_double, stream)
        function.restype = None
        # void cuSZp_decompress_1D_<mode>_f64(double* d_decData, unsigned char* d_cmpBytes, size_t nbEle,
        #                                     size_t cmpSize, double errorBound, cudaStream_t stream)
        function = library.f64("decompress", mode)
        function.argtypes = (pointer, pointer, size, size, ctypes.c_double, stream)
        function.restype = None


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    ]


def _path_of(cdll: ctypes.CDLL) -> str:
    """Return the file that the loader took ``cdll`` from."""
    info = _DlInfo()
    # int dladdr(const void* addr, Dl_info* info)
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_DlInfo))
    found = dladdr(ctypes.cast(getattr(cdll, _V3), ctypes.c_void_p), info)
    assert found, "dladdr does not know a symbol that dlsym has just found"
    return os.fsdecode(info.dli_fname)


# --- raw calls ------------------------------------------------------------------------------------
def compress(
    x_ptr: int, n: int, dtype: str, eb: float, mode: str, out_ptr: int, out_bytes: int,
    cuda_stream: int | None = None,
) -> int:  # fmt: skip
    """Compress the ``n`` values at device address ``x_ptr`` to ``out_ptr``; return the size the library reports.

    That size is 1024 for every n <= 32768: use ``stream_bytes``. The call blocks until the size is
    copied, but does not order itself after a non-blocking ``cuda_stream`` (None: the null stream).

    Args:
        x_ptr: 16-byte aligned. out_ptr: 4-byte aligned, with at least ``max_stream_bytes(n)`` bytes there.
        dtype: ``float32`` or ``float64``. eb: absolute, rounded to ``dtype``.

    Raises:
        LibraryError: as ``load``. TypeError, ValueError: an argument that upstream would not survive.
    """
    library, eb = load(), _check(n, dtype, eb, mode)
    _check_pointer("x", x_ptr, 16)
    _check_pointer("out", out_ptr, 4)
    if out_bytes < max_stream_bytes(n):
        raise ValueError(f"out: {n} values can take {max_stream_bytes(n)} bytes, got room for {out_bytes}")
    reported = ctypes.c_size_t()
    size = ctypes.byref(reported)
    if dtype == "float64":
        library.f64("compress", mode)(x_ptr, out_ptr, n, size, eb, cuda_stream)
    else:
        what = (_DIM_1D, Uint3(n, 1, 1), _TYPE_FLOAT, MODES.index(mode))
        library.cdll.cuSZp_compress(x_ptr, out_ptr, n, size, eb, *what, cuda_stream)
    return reported.value


def decompress(
    data_ptr: int, data_bytes: int, n: int, dtype: str, eb: float, mode: str, out_ptr: int,
    cuda_stream: int | None = None,
) -> None:  # fmt: skip
    """Decompress the stream at device address ``data_ptr`` to the ``n`` values at ``out_ptr``.

    Values of blocks without payload are not written. The payloads are read where the rate bytes say,
    whatever ``data_bytes`` is: check them first. The output is ready when the device is idle.

    Args:
        data_ptr: 4-byte aligned. out_ptr: 16-byte aligned. Others and errors: as ``compress``.
    """
    library, eb = load(), _check(n, dtype, eb, mode)
    _check_pointer("data", data_ptr, 4)
    _check_pointer("out", out_ptr, 16)
    if data_bytes < rate_bytes(n):
        raise ValueError(f"data: the rate area of {n} values has {rate_bytes(n)} bytes, got {data_bytes}")
    if dtype == "float64":
        library.f64("decompress", mode)(out_ptr, data_ptr, n, data_bytes, eb, cuda_stream)
    else:
        what = (_DIM_1D, Uint3(n, 1, 1), _TYPE_FLOAT, MODES.index(mode))
        library.cdll.cuSZp_decompress(out_ptr, data_ptr, n, data_bytes, eb, *what, cuda_stream)


def _check(n: int, dtype: str, eb: float, mode: str) -> float:
    """Raise for what the library cannot take; return ``eb`` rounded to ``dtype``."""
    check_mode(mode)
    if dtype not in ("float32", "float64"):
        raise TypeError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
    if not isinstance(n, numbers.Integral):
        raise TypeError(f"n: expected an integer, got {n!r}")
    if not 1 <= n <= MAX_VALUES:
        raise ValueError(f"n: libcuSZp takes 1 to {MAX_VALUES} values, got {n}")
    if not isinstance(eb, numbers.Real):
        raise TypeError(f"eb: expected a number, got {eb!r}")
    value = (ctypes.c_float if dtype == "float32" else ctypes.c_double)(eb).value
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"eb: expected a bound that is positive and finite in {dtype}, got {eb!r}")
    return value


def _check_pointer(name: str, pointer: int, alignment: int) -> None:
    if not pointer or pointer % alignment:
        raise ValueError(
            f"{name}: libcuSZp needs an address aligned to {alignment} bytes, got {pointer:#x}; pass a copy"
        )


# --- on CuPy arrays -------------------------------------------------------------------------------
def stream_bytes(rates, n: int, mode: str) -> int:
    """Return the size of a stream from its rate area: ``rate_bytes(n)`` + what the bytes promise (1.3, 1.4).

    Args:
        rates: uint8, NumPy or CuPy (then waits for the current stream); at least ``rate_bytes(n)`` of it.

    Raises:
        FormatError: a rate byte that no encoder writes, or too few of them.

    >>> stream_bytes(np.r_[np.uint8(3), np.zeros(1023, np.uint8)], 32, "plain")
    1040
    """
    if rates.size < rate_bytes(n):
        raise FormatError(f"stream: the rate area of {n} values has {rate_bytes(n)} bytes, got {rates.size}")
    payload_bytes, rates = _payload_bytes(check_mode(mode)), rates[: rate_bytes(n)]
    if not isinstance(rates, np.ndarray):
        if rates.size <= _FEW_RATES:
            rates = rates.get()
        else:
            import cupy

            payload_bytes = cupy.asarray(payload_bytes)
    sizes = payload_bytes[rates]
    num_blocks = -(-n // BLOCK)
    sizes[num_blocks:] = (rates[num_blocks:] != 0) * _ILLEGAL  # 0 after the last block
    total = int(sizes.sum())
    if total >= _ILLEGAL:
        raise FormatError(f"stream: its rate area holds a byte that is not valid in mode {mode!r}")
    return rate_bytes(n) + total


@functools.cache
def _payload_bytes(mode: str) -> np.ndarray:
    """Return the payload size of each rate byte, (256,) int64."""
    rate = np.arange(256)
    sizes = np.where(rate, 4 + 4 * rate, 0)
    legal = rate < 32
    if mode == "outlier":
        sizes = np.where(rate & 0x80, (rate >> 5 & 3) + 1 + 4 + 4 * (rate & 31), sizes)
        legal |= (rate >= 0x80) & (rate & 31 < 31)  # with 31 planes the form of 1.3 is never larger
    return np.where(legal, sizes, _ILLEGAL)


def compress_array(x, eb: float, mode: str):
    """Return ``(data, nbytes)``: the stream of CuPy array ``x`` and its size. The host waits for it.

    Args:
        x: float32 or float64, C-contiguous, 16-byte aligned, any shape.
        eb, mode: as ``reference.compress``.

    Returns:
        ``data``: uint8 CuPy array of ``max_stream_bytes(x.size)``; the stream is its first ``nbytes``.

    Raises:
        LibraryError: no usable library, or it failed. TypeError, ValueError: a bad argument.
    """
    import cupy

    with x.device:
        data = cupy.empty(max_stream_bytes(x.size), cupy.uint8)
        if not x.size:
            return data, 0
        rates = data[: rate_bytes(x.size)]
        rates.fill(0xFF)  # valid in no mode: whatever of it is left shows a kernel that did not run
        arguments = (x.data.ptr, x.size, x.dtype.name, eb, mode, data.data.ptr, data.nbytes)
        _call(compress, arguments, x.size)
        try:
            nbytes = stream_bytes(rates, x.size, mode)
        except FormatError as error:
            raise _failure(f"compress left no stream ({error})") from None
    if nbytes > MAX_STREAM_BYTES:
        raise ValueError(
            f"x: its stream has {nbytes} bytes, libcuSZp counts to {MAX_STREAM_BYTES}; split the array"
        )
    return data, nbytes


def decompress_array(data, n: int, dtype, eb: float, mode: str, out=None):
    """Return the (n,) CuPy array that the stream at the start of ``data`` holds. The host waits for it.

    Args:
        data: uint8 CuPy array, 4-byte aligned; the stream may be followed by other bytes.
        n, dtype, eb, mode: as it was compressed.
        out: where to decode to: ``n`` values of ``dtype``, C-contiguous, 16-byte aligned; else a new array.

    Raises:
        FormatError: the rate bytes are not valid or promise more than ``data`` has. Others: as
            ``compress_array``.
    """
    import cupy

    with data.device:
        dtype = np.dtype(dtype)
        out = cupy.empty(n, dtype) if out is None else out
        if out.size != n or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out: expected {n} C-contiguous values of {dtype}, got shape {out.shape} of {out.dtype}, "
                f"strides {out.strides}"
            )
        if not n:
            return out
        arguments = (data.data.ptr, data.nbytes, n, dtype.name, eb, mode, out.data.ptr)
        nbytes = stream_bytes(data, n, mode)
        if nbytes > data.nbytes:
            raise FormatError(f"stream: its rate bytes say {nbytes} bytes, {data.nbytes} are there")
        out.fill(0)
        _call(decompress, arguments, n)
    return out


def _call(function, arguments: tuple, n: int) -> None:
    """Run a raw call on the null stream after the caller's stream, wait for it, and raise for its errors."""
    import cupy

    _first_use(load(), cupy.cuda.Device().id)
    # Three arrays of uint32, each in an allocation of at least 2 MiB. Had it none, its kernel would
    # write to address 0, and no CUDA call of this process would work again.
    _leave_room(3 * (4 * (n // CHUNK + 2) + (2 << 20)))
    _run(function, arguments)


@functools.cache
def _first_use(library: Library, device: int) -> None:
    """See that the library's kernels run on the current device: one block of ones, there and back."""
    import cupy

    attributes = cupy.cuda.Device().attributes
    threads = attributes["MultiProcessorCount"] * attributes["MaxThreadsPerMultiProcessor"]
    _leave_room(3 * (2 << 20), threads * _STACK_BYTES)
    data, x = cupy.zeros(max_stream_bytes(BLOCK), cupy.uint8), cupy.ones(BLOCK, cupy.float32)
    _run(compress, (x.data.ptr, BLOCK, "float32", 0.5, "fixed", data.data.ptr, data.nbytes))
    x.fill(0)
    _run(decompress, (data.data.ptr, data.nbytes, BLOCK, "float32", 0.5, "fixed", x.data.ptr))
    if not bool((x == 1).all()):
        raise _failure("a block of ones did not come back")


def _leave_room(need: int, want: int = 0) -> None:
    """Empty CuPy's pool if less than ``need + want`` bytes are free; raise if ``need`` are not free then."""
    import cupy

    if cupy.cuda.runtime.memGetInfo()[0] < need + want:
        cupy.get_default_memory_pool().free_all_blocks()
        free = cupy.cuda.runtime.memGetInfo()[0]
        if free < need:
            raise LibraryError(f"libcuSZp needs {need} bytes of device memory of its own, {free} are free")


def _run(function, arguments: tuple) -> None:
    import cupy

    cupy.cuda.get_current_stream().synchronize()
    load().last_error()  # an older one is not the library's
    function(*arguments)
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise _failure(f"{function.__name__}: {error}") from error
    if error := load().last_error():
        raise _failure(f"{function.__name__}: {error}")


def _failure(what: str) -> LibraryError:
    import cupy

    return LibraryError(
        f"{load().path}: {what}; was it built for this GPU (compute capability "
        f"{cupy.cuda.Device().compute_capability}), and is there device memory for its first call (about 1 GB)?"
    )
