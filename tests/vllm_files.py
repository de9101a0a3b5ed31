"""vLLM's own Python files, and a torch made of NumPy to run its offloading on a machine without a GPU.

``python tests/vllm_files.py`` fetches the files: it downloads vLLM's wheels (0.3 GB each) from the index that pip
is set up for and keeps what the offloading needs (3 MB each) in ``$CUSZP_VLLM_FILES`` or the user's cache. Tests
do the same where that variable is set; else they do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import logging
import mmap
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

#: The first and the last that the patch knows; CUSZP_VLLM_VERSIONS=0.27.1,0.28.0 tests others.
VERSIONS = tuple(os.environ.get("CUSZP_VLLM_VERSIONS", "0.26.0,0.33.0").split(","))
KEEP = (
    "vllm/v1/kv_offload/", "vllm/v1/kv_cache_", "vllm/v1/kv_hints.py", "vllm/v1/metrics/cache_hit_source.py",
    "vllm/distributed/kv_transfer/kv_connector/", "vllm/plugins/__init__.py", "vllm/utils/math_utils.py",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64")


# --- the files ----------------------------------------------------------------------------------------------
def fetch(version: str, download: bool | None = None) -> Path:
    """Return a folder with vLLM's package and its metadata; download them if they are not there yet.

    Raises:
        FileNotFoundError: they are not there, and not to be downloaded.    OSError: they cannot be.
    """
    wanted = os.environ.get("CUSZP_VLLM_FILES")
    folder = Path(wanted or Path.home() / ".cache" / "cuszp_cupy" / "vllm") / version
    if folder.exists():
        return folder
    if not (wanted or download):
        raise FileNotFoundError("vLLM's files are not here; python tests/vllm_files.py fetches them")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", work]
        command += ["--python-version", "3.12", "--implementation", "cp"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        done = subprocess.run([*command, f"vllm=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"cannot download vLLM {version}: {done.stderr.strip()[-500:]}")
        (wheel,) = Path(work).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                metadata = name.endswith(".dist-info/METADATA")
                if metadata or (name.endswith(".py") and name.startswith(KEEP)):
                    archive.extract(name, Path(work) / "files")
        (Path(work) / "files").rename(folder)  # there as a whole or not at all
    return folder


# --- a torch made of NumPy ----------------------------------------------------------------------------------
class DType:
    def __init__(self, name: str, numpy):
        self.name, self.numpy = name, np.dtype(numpy)

    def __repr__(self):
        return f"torch.{self.name}"


DTYPES = {
    name: DType(name, numpy)
    for name, numpy in {
        "int8": np.int8, "uint8": np.uint8, "int64": np.int64, "uint64": np.uint64, "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16, "float32": np.float32,
    }.items()
}  # fmt: skip


class Tensor:
    """Strided memory, on a "cuda" or "cpu" that both are this process's."""

    is_xpu = False

    def __init__(self, memory: np.ndarray, dtype: DType, shape, strides=None, offset: int = 0, device="cpu"):
        self.memory, self.dtype, self.offset = memory, dtype, offset  # bytes; uint8, one dimension
        self.shape = tuple(int(n) for n in shape)
        dense = np.cumprod([1, *self.shape[:0:-1]])[::-1]
        self.strides = tuple(int(n) for n in (dense if strides is None else strides))
        self.device = types.SimpleNamespace(type=device, index=0 if device == "cuda" else None)
        self.pinned = True

    ndim = property(lambda self: len(self.shape))
    is_cuda = property(lambda self: self.device.type == "cuda")

    def _new(self, dtype, shape, strides=None, offset=None) -> Tensor:
        offset = self.offset if offset is None else offset
        tensor = Tensor(self.memory, dtype, shape, strides, offset, self.device.type)
        tensor.pinned = self.pinned
        return tensor

    def data_ptr(self) -> int:
        return self.memory.ctypes.data + self.offset

    def stride(self, dim=None):
        return self.strides if dim is None else self.strides[dim]

    def element_size(self) -> int:
        return self.dtype.numpy.itemsize

    def storage_offset(self) -> int:
        return self.offset // self.element_size()

    def untyped_storage(self) -> Tensor:
        return self

    def is_pinned(self) -> bool:
        return self.pinned

    def numel(self) -> int:
        return int(np.prod(self.shape))

    def set_(self, storage: Tensor, offset=0, size=None, stride=None) -> Tensor:
        size = [storage.memory.size] if size is None else size
        return Tensor(storage.memory, self.dtype, size, stride, offset * self.element_size(), storage.device.type)

    def view(self, *shape):
        if isinstance(shape[0], DType):
            assert shape[0].numpy.itemsize == self.element_size()
            return self._new(shape[0], self.shape, self.strides)
        shape = list(shape[0] if isinstance(shape[0], tuple) else shape)
        if -1 in shape:
            shape[shape.index(-1)] = self.numel() // -int(np.prod(shape))
        return self._new(self.dtype, shape)

    def as_strided(self, size, stride, storage_offset=0) -> Tensor:
        return self._new(self.dtype, size, stride, storage_offset * self.element_size())

    def numpy(self) -> np.ndarray:
        array = self.memory[self.offset :].view(self.dtype.numpy)
        return np.lib.stride_tricks.as_strided(
            array, self.shape, [n * self.element_size() for n in self.strides]
        )  # fmt: skip

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        some = self.numpy()[index]
        if isinstance(index, slice):
            offset = some.ctypes.data - self.memory.ctypes.data if some.size else self.offset
            return self._new(self.dtype, some.shape, offset=offset)
        return Tensor(some.view(np.uint8), self.dtype, some.shape)


class Event:
    """Everything has happened as soon as it is enqueued."""

    def __init__(self, *args, **kwargs): ...
    def record(self, stream=None): ...
    def synchronize(self): ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 1.0


class Stream:
    cuda_stream = 1

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, stream): ...
    def wait_event(self, event): ...
    def synchronize(self): ...


class _Named(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Anything(metaclass=_Named):
    """A name of a module that is not there; to write down, not to use."""

    def __init__(self, *args, **kwargs): ...
    def __class_getitem__(cls, item):
        return cls


class Module(types.ModuleType):
    """A module that is not there."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        module = sys.modules.get(f"{self.__name__}.{name}")
        return module or type(name, (Anything,), {"__module__": self.__name__})


def _dense(shape, dtype, device="cpu", pin_memory=False) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else shape
    tensor = Tensor(
        np.zeros(int(np.prod(shape)) * dtype.numpy.itemsize, np.uint8), dtype, shape, device=str(device)
    )
    tensor.pinned = pin_memory
    return tensor


def _torch() -> Module:
    torch = Module("torch")
    torch.__dict__.update(DTYPES, Tensor=Tensor, Event=Event, empty=_dense, zeros=_dense)
    torch.dtype, torch.float8_e4m3fn = DType, DType("float8_e4m3fn", np.uint8)
    torch.tensor = lambda data, dtype, device="cpu": _dense(len(data), dtype, device)
    torch.frombuffer = lambda buffer, dtype: Tensor(np.frombuffer(buffer, np.uint8), dtype, [len(buffer)])
    torch.as_strided = lambda tensor, size, stride, storage_offset=0: tensor.as_strided(
        size, stride, storage_offset
    )
    result = types.SimpleNamespace(value=0)
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *a: result, cudaHostUnregister=lambda *a: result)
    torch.cuda = types.SimpleNamespace(Stream=Stream, current_stream=Stream, cudart=lambda: runtime)
    torch.accelerator = types.SimpleNamespace(current_device_index=lambda: 0, synchronize=lambda: None)
    return torch


def _copy(src_ptrs, dst_ptrs, sizes, is_src_access_order_any=False) -> None:
    """What vLLM's function does."""
    for src, dst, size in zip(np.asarray(src_ptrs), np.asarray(dst_ptrs), np.asarray(sizes), strict=True):
        ctypes.memmove(int(dst), int(src), int(size))


def _cupy() -> Module:
    """What ``vllm_patch`` itself asks CuPy for."""
    cupy = Module("cupy")

    def asarray(array):
        return types.SimpleNamespace(data=types.SimpleNamespace(ptr=array.ctypes.data), array=array)

    cupy.asarray = asarray
    cupy.cuda = Module("cupy.cuda")
    cupy.cuda.runtime = types.SimpleNamespace(getDevice=lambda: 0)
    cupy.cuda.Device, cupy.cuda.get_current_stream = contextlib.nullcontext, Stream
    return cupy


@contextlib.contextmanager
def offloading(version: str):
    """With vLLM's real offloading files importable, on the torch above; what else they import is not there.

    Yields (folder, the module ``vllm._custom_ops``, whose ``swap_blocks_batch`` copies and may be replaced).
    """
    folder, real = fetch(version), ("vllm.v1.kv_offload", "vllm.v1.kv_cache_", "vllm.v1.kv_hints")
    real += ("vllm.v1.metrics.cache_hit_source", "vllm.utils.math_utils", "vllm.plugins")
    connectors = "vllm.distributed.kv_transfer.kv_connector.v1."
    real += (f"{connectors}offloading.worker", f"{connectors}simple_cpu_offload_connector")

    class Missing:
        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            if name == "vllm" or (top == "vllm" and name.startswith(real)):
                file = folder.joinpath(*name.split("."))
                source = file / "__init__.py" if name == "vllm.plugins" else file.with_suffix(".py")
                if name != "vllm" and source.exists():
                    return importlib.util.spec_from_file_location(name, source)
                spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
                spec.submodule_search_locations = [str(file)]
                return spec
            if top in ("vllm", "torch", "triton", "typing_extensions"):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec):
            return Module(spec.name)

        def exec_module(self, module): ...

    finder, before, path = Missing(), dict(sys.modules), list(sys.path)
    made = {name: Module(name) for name in ("vllm._custom_ops", "vllm.platforms", "vllm.triton_utils")}
    ops, platforms, triton = made.values()
    ops.swap_blocks_batch = _copy
    platforms.current_platform = types.SimpleNamespace(
        is_cuda_alike=lambda: True, is_rocm=lambda: False, is_xpu=lambda: False, device_name="none",
        current_stream=Stream, Stream=Stream, stream=lambda stream: contextlib.nullcontext(),
    )  # fmt: skip
    triton.HAS_TRITON = True
    triton.triton = types.SimpleNamespace(jit=lambda f: f, next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    utils, logger, shm = Module("vllm.utils.torch_utils"), Module("vllm.logger"), Module("vllm.shm")
    utils.PIN_MEMORY, utils.get_dtype_size = True, lambda dtype: dtype.numpy.itemsize
    logger.init_logger = logging.getLogger
    shm.check_shm_free_space = lambda *args, **kwargs: None
    register = Module("register")
    register.host_register, register.host_unregister = (lambda *args: True), (lambda *args: True)
    cuda_wrapper = Module("cuda_wrapper")
    cuda_wrapper.CudaRTLibrary = lambda: types.SimpleNamespace(cudaHostRegister=lambda *args: 0)
    extensions = Module("typing_extensions")
    extensions.override, extensions.Self = (lambda f: f), object
    made |= {
        "torch": _torch(), "cupy": _cupy(), "vllm.utils.torch_utils": utils, "vllm.logger": logger,
        "vllm.distributed.device_communicators.shm_broadcast": shm,
        "vllm.distributed.device_communicators.cuda_wrapper": cuda_wrapper,
        "vllm.v1.kv_offload.cpu.host_register": register, "typing_extensions": extensions,
    }  # fmt: skip
    try:
        for name in [
            name for name in sys.modules if name.partition(".")[0] in ("vllm", "vllm_patch", "torch", "cupy")
        ]:
            del sys.modules[name]
        sys.modules |= made
        sys.meta_path.insert(0, finder)
        sys.path.insert(0, str(folder))  # where importlib.metadata looks
        yield folder, ops
    finally:
        if "vllm_patch" in sys.modules:
            sys.modules["vllm_patch"].uninstall()
        sys.meta_path.remove(finder)
        sys.path[:] = path
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def anonymous(nbytes: int) -> np.ndarray:
    """Return page-aligned memory: what GPUs and pinned memory have."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


if __name__ == "__main__":
    for one in VERSIONS:
        print(fetch(one, download=True))
