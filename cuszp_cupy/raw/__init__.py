"""Kernel sources and their loader. Nothing here decides anything; importing it needs neither CuPy nor a GPU."""

from __future__ import annotations

import functools
import struct
import threading
from importlib import resources

import numpy as np

#: dtype name -> what the .cu files call T, where it is another name.
CTYPES = {"float32": "float", "float64": "double"}

#: Part of the format: contraction changes which bin a value falls in.
OPTIONS = ("-std=c++17", "--fmad=false", "-lineinfo")

MOST_ARGUMENTS = 32
MOST_SHARED = (
    64 << 10
) + 16  # bytes of dynamic shared memory of a block: what the kv kernels take for 512 threads


def source(name: str) -> str:
    """Return the text of ``raw/<name>.cu``, its ``#include "x.cuh"`` lines replaced by those files.

    Compiler messages point at the files (``#line``), and one text is all that NVRTC needs.
    """
    return _text(f"{name}.cu")


def _text(filename: str) -> str:
    path = resources.files(__package__) / filename
    lines = [f'#line 1 "{path}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith('#include "'):
            lines += [_text(line.split('"')[1]), f'#line {number + 1} "{path}"']
        else:
            lines.append(line)
    return "\n".join(lines)


def launch(
    name: str, expression: str, grid: int, threads: int, types: str, arguments: tuple, shared_mem: int = 0
) -> None:
    """Launch ``expression`` (such as ``"kv_encode<bfloat16>"``) from ``raw/<name>.cu`` on CuPy's current stream.

    Compiled at first use on a device. Call it through the function beside the source (``raw/kv.py``, ...): no
    argument is checked.

    Args:
        types: a letter an argument, as in ``struct``: Q or q for an integer of any size, f, d.
        shared_mem: bytes of dynamic shared memory; MOST_SHARED at most.

    Through the driver, from arguments packed by one call: CuPy's own launch looks at each one's type.
    """
    import cupy

    if not _cells.ready:  # the driver wants a context, which the runtime makes current in this thread
        cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())
        _cells.ready = True
    function = _function(name, expression, shared_mem > 0, cupy.cuda.runtime.getDevice())
    _layout(types).pack_into(_cells.values, 0, *arguments)  # copied by the launch
    cupy.cuda.driver.launchKernel(
        function, grid, 1, 1, threads, 1, 1, shared_mem, cupy.cuda.get_current_stream().ptr, _cells.address, 0
    )


class _Cells(threading.local):
    """Room for a thread's arguments, 8 bytes each, and what the driver is told: where each one lies."""

    def __init__(self):
        self.values, self.ready = np.zeros(MOST_ARGUMENTS, np.uint64), False
        self._pointers = self.values.ctypes.data + 8 * np.arange(MOST_ARGUMENTS, dtype=np.uint64)
        self.address = self._pointers.ctypes.data


_cells = _Cells()


@functools.cache
def _layout(types: str) -> struct.Struct:
    assert len(types) <= MOST_ARGUMENTS
    return struct.Struct("<" + types.replace("f", "f4x"))


@functools.cache
def _function(name: str, expression: str, dynamic: bool, device: int) -> int:
    """Return the driver's handle of a kernel for the current device; ``dynamic``: it takes shared memory."""
    import cupy

    module = cupy.RawModule(code=source(name), options=OPTIONS, name_expressions=(expression,))
    function = module.get_function(expression)
    if dynamic:
        function.max_dynamic_shared_size_bytes = MOST_SHARED
    _functions.append(function)  # the handle lives as long as this does
    return function.kernel.ptr


_functions: list = []
