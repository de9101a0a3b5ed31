"""Kernel sources and their loader. Nothing here decides anything; importing it needs neither CuPy nor a GPU."""

from __future__ import annotations

import functools
from importlib import resources

#: dtype name -> what the .cu files call T. The only place a dtype is spelled twice.
CTYPES = {"float32": "float", "float64": "double", "float16": "float16", "bfloat16": "bfloat16"}

#: Part of the format: contraction changes which bin a value falls in.
OPTIONS = ("-std=c++17", "--fmad=false", "-lineinfo")


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


@functools.cache
def kernel(name: str, expression: str):
    """Return the CuPy kernel ``expression`` (such as ``"kv_encode<bfloat16>"``) from ``raw/<name>.cu``.

    Compiled at first use for the current device and cached. Launch it through the function beside its
    source (``raw/kv.py``, ``raw/cuszp.py``): CuPy checks no argument.
    """
    import cupy

    return _module(name, cupy.cuda.Device().compute_capability, expression).get_function(expression)


@functools.cache
def _module(name: str, capability: str, expression: str):
    import cupy

    return cupy.RawModule(code=source(name), options=OPTIONS, name_expressions=(expression,))
