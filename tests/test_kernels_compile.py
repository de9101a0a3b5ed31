"""Every kernel compiles without a GPU, by NVRTC with the loader's own options, and keeps out of local memory."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from importlib import metadata, resources

import pytest

from cuszp_cupy import Geometry, raw
from cuszp_cupy.bound import parse_parts
from cuszp_cupy.format import MODES
from cuszp_cupy.raw import copy, cuszp, kv
from cuszp_cupy.tables import BUILT_IN

# A100, H100, B200: the first and the last have instructions, and register pressure, that the middle has not.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = {**copy.KERNELS, **cuszp.KERNELS, **kv.KERNELS}
FOLDER = resources.files(raw)
SOURCES = sorted(path.name.removesuffix(".cu") for path in FOLDER.iterdir() if path.name.endswith(".cu"))


@functools.cache
def load_nvrtc() -> ctypes.CDLL:
    """Load NVRTC from the package nvidia-cuda-nvrtc; skip where it is missing, but fail in CI."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc")
    except metadata.PackageNotFoundError:
        reason = "nvidia-cuda-nvrtc is not installed; pip install -e '.[test]'"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    # The builtins come first: NVRTC looks for them by name only, and would not find them in site-packages.
    libraries = {file.name.split(".")[0]: file.locate() for file in files if "libnvrtc" in file.name}
    ctypes.CDLL(str(libraries["libnvrtc-builtins"]), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(libraries["libnvrtc"]))


def compile_kernel(text: str, expression: str, architecture: str) -> tuple[int, str]:
    """Compile one kernel to machine code; return NVRTC's status (0: success) and its log with ptxas -v."""
    nvrtc, program = load_nvrtc(), ctypes.c_void_p()
    options = [*raw.OPTIONS, "-ftz=true", f"-arch={architecture}", "--ptxas-options=-v"]  # ftz: as CuPy does
    options = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), None, 0, None, None) == 0
    try:
        assert nvrtc.nvrtcAddNameExpression(program, expression.encode()) == 0
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        size = ctypes.c_size_t()
        assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
        log = ctypes.create_string_buffer(size.value)
        assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode()


def assert_registers_suffice(log: str) -> None:
    """Assert that ptxas reports functions, and no stack frame and no spill in any of them."""
    functions = re.findall(r"\d+ bytes stack frame, .*", log)
    assert functions, f"no function in the log of ptxas:\n{log}"
    bad = [function for function in functions if set(re.findall(r"\d+", function)) != {"0"}]
    if bad:
        used = re.findall(r"Used \d+ registers", log)
        raise AssertionError(f"local memory in use: {'; '.join(bad)} ({', '.join(used)})")


def test_assert_registers_suffice_fails_on_stack_spills_and_silence():
    clean = "ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert_registers_suffice(clean)
    for log in ("", clean.replace("0 bytes stack", "8 bytes stack"), f"{clean}\n{clean.replace(' 0 ', ' 16 ')}"):
        with pytest.raises(AssertionError):
            assert_registers_suffice(log)


def test_every_source_is_listed():
    assert sorted(KERNELS) == SOURCES
    assert all(KERNELS.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "expression"), [(name, expression) for name in KERNELS for expression in KERNELS[name]]
)
def test_kernel_compiles(name, expression, architecture):
    status, log = compile_kernel(raw.source(name), expression, architecture)
    assert status == 0, log
    assert "warning" not in log
    assert_registers_suffice(log)


def test_launch_functions_pass_what_the_kernels_declare(monkeypatch):
    """Nothing else looks at them: their number, and integers or pointers apart from floating point."""
    launched = {}

    def launch(name, expression, grid, threads, types, arguments, shared_mem=0):
        assert expression in KERNELS[name] and 1 <= threads <= 1024 and grid >= 1
        assert shared_mem <= raw.MOST_SHARED and len(types) == len(arguments) <= raw.MOST_ARGUMENTS
        kernel, _, rest = expression.partition("<")
        value = {"float": "f", "double": "d"}.get(rest.split(",")[0])
        text = re.search(rf"void[^;{{]*?\b{kernel}\((.*?)\) \{{", raw.source(name), re.DOTALL)[1]
        declared = ""
        for parameter in text.split(","):
            kind = parameter.replace("const", "").split()[0]
            declared += "Q" if "*" in parameter else {"T": value, "double": "d", "float": "f"}.get(kind, "Q")
        assert types.replace("q", "Q") == declared, expression
        raw._layout(types).pack(*arguments)
        launched[kernel] = launched.get(kernel, 0) + 1

    for module in (copy, cuszp, kv):
        monkeypatch.setattr(module, "launch", launch)
    copy.fetch(16, 32, 64)
    copy.publish(16, 16, 16, 5, 16, 16, 16, 16, 2)
    copy.collect(16, 16, 16, 5)
    copy.gather(16, 16, 16, 16, 5, 4096, None)
    for dtype in ("float32", "float64"):
        for mode in MODES:
            cuszp.compress(256, 1000, dtype, 0.25, mode, 512, 1024, 2048)
            cuszp.decompress(512, 4096, 1000, dtype, 0.25, mode, 256, 2048, 1024)
    for dtype in ("float16", "bfloat16"):
        for geometry in (Geometry(16, 64), Geometry(1, 100), Geometry(16, 256, parts=(64, 64))):
            bounds = parse_parts("rms:0.05", len(geometry.part_values))
            kv.encode(16, 16, 16, 3, dtype, geometry, bounds, aligned=True)
            kv.decode(16, 16, 16, 16, 3, dtype, geometry, aligned=True)
            large = Geometry(64, 2048, parts=(128, 128))
            for bound in ("rms:0.05", "rel:0.01", "abs:0.5"):
                bounds = parse_parts(bound, 2)
                kv.encode(16, 16, 16, 3, dtype, large, bounds, aligned=True, exchange_ptr=16, sizes_ptr=16)
            kv.decode(16, 16, 16, 16, 3, dtype, large, aligned=True, exchange_ptr=16, sizes_ptr=16)
            kv.encode_entropy(16, 16, 16, 16, 16, 3, dtype, geometry, BUILT_IN, 16, aligned=True)
            kv.decode_entropy(16, 16, 16, 16, 3, dtype, geometry, BUILT_IN, 16, aligned=True)
    assert launched == {
        "kv_fetch": 1, "kv_publish": 1, "kv_collect": 1, "kv_gather": 1, "cuszp_compress": 6,
        "cuszp_decompress": 6, "kv_encode": 6, "kv_decode": 6, "kv_entropy_analyse": 6,
        "kv_entropy_encode": 6, "kv_entropy_decode": 6,
        "kv_encode_large": 6 * (5 + 4 + 2), "kv_decode_large": 6, "kv_decode_sizes": 6,
    }  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_errors_name_the_source_file_and_line(name):
    text = (FOLDER / f"{name}.cu").read_text(encoding="utf-8")
    included = re.findall(r'^#include "(.*)"', text, re.MULTILINE)
    for filename, line in [(f"{name}.cu", len(text.splitlines()) + 1), *((header, 1) for header in included)]:
        # The mistake is the last line of the .cu file, behind all it includes, or the first line of a header.
        marker = f'#line 1 "{FOLDER / filename}"\n'
        head, found, tail = raw.source(name).partition(marker)
        assert found
        broken = f"{head}{marker}{tail}\nmistake;" if line > 1 else f"{head}{marker}mistake;\n{tail}"
        status, log = compile_kernel(broken, KERNELS[name][0], "sm_90")
        assert status != 0
        assert f"{filename}({line}): error: this declaration has no storage class or type specifier" in log
