"""Reports of compute-sanitizer are counted, and nothing that went wrong is called clean."""

import subprocess
from types import SimpleNamespace

import pytest
import sanitize

COPY = "=========     Uninitialized access to 0x7f74 on access by cudaMemcpy source\n"
READ = (
    "=========     Uninitialized __global__ memory read of size 4 bytes\n"
    "=========     at write_streams(unsigned int *, const Slot &)+0x3ea0 in kv_entropy_encode.cu:219\n"
)
GAP = READ.replace("write_streams(unsigned int *, const Slot &)", "kv_publish")
CUPY = (  # compiled without its source's lines
    "..=========     Uninitialized __global__ memory read of size 1 bytes\n"
    "=========     at cupy_copy__uint8_uint8+0x90\n"
    "=========     by thread (96,0,0) in block (2,0,0)\n"
)
REFUSED = '========= Program hit cudaErrorMemoryAllocation (error 2) due to "out of memory" on CUDA API call.\n'
PASSED = "12 passed, 3 deselected in 4.00s\n"
CLEAN = f"{PASSED}========= ERROR SUMMARY: 0 errors\n"


def test_the_files_are_there_and_what_is_left_out_names_tests():
    for file in sanitize.FILES:
        assert (sanitize.ROOT / "tests" / f"test_{file}.py").exists()
    text = "".join((sanitize.ROOT / "tests" / f"test_{file}.py").read_text("utf-8") for file in sanitize.FILES)
    tests = [line for line in text.splitlines() if line.startswith(("def test_", "    def test_"))]
    assert all(any(name in test for test in tests) for name in sanitize.LEFT_OUT + sanitize.LEFT_OUT_OF_INITCHECK)


@pytest.mark.parametrize(
    ("tool", "out", "line", "status"),
    [
        ("memcheck", CLEAN, "memcheck edges: 0 errors; 12 passed, 3 deselected in 4.00s", 0),
        ("racecheck", CLEAN.replace("ERROR", "RACECHECK").replace("errors", "hazards"), ": 0 errors; 12", 0),
        ("memcheck", CLEAN.replace("0 errors", "1 error"), ": 1 errors; 12 passed", 1),
        ("initcheck", CLEAN.replace(": 0", ": 2") + 2 * COPY, ": 0 errors, 2 in copies; 12 passed", 0),
        ("initcheck", CLEAN.replace(": 0", ": 3") + 2 * COPY, ": 1 errors, 2 in copies; 12 passed", 1),
        ("initcheck", READ + CLEAN.replace(": 0", ": 1"),
         "\n  1 x Uninitialized __global__ memory read of size 4 bytes at write_streams at kv_entropy_", 1),
        ("initcheck", GAP + COPY + CLEAN.replace(": 0", ": 2"), ": 0 errors, 2 in copies; 12 passed", 0),
        ("initcheck", 2 * CUPY + CLEAN.replace(": 0", ": 2"), "2 x Uninitialized __global__ memory read of", 1),
        ("initcheck", "." + GAP + CLEAN.replace(": 0", ": 1"), ": 0 errors, 1 in copies; 12 passed", 0),
        ("initcheck", GAP + READ + CLEAN.replace(": 0", ": 2"), ": 1 errors, 1 in copies; 12 passed", 1),
        ("memcheck", CLEAN.replace(": 0", ": 2") + 2 * REFUSED, ": 0 errors, 2 of memory refused; 12 passed", 0),
        ("memcheck", CLEAN.replace(": 0", ": 1") + REFUSED.replace("MemoryAllocation", "InvalidValue"),
         ": 1 errors; 12 passed", 1),
        ("memcheck", CLEAN.replace("12 passed", "1 failed, 11 passed"), ": 0 errors; 1 failed, 11 passed", 1),
        ("memcheck", PASSED, "ended early", 1),
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", "ended early", 1),
        ("memcheck", None, f"did not end in {sanitize.SECONDS} s", 1),
    ],
)  # fmt: skip
def test_verdicts(tool, out, line, status, monkeypatch, capsys):
    def run(command, **options):
        assert command[2] == tool and command[-1] == "tests/test_edges.py"
        if out is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return SimpleNamespace(stdout=out)

    monkeypatch.setattr(subprocess, "run", run)
    assert sanitize.main(["--tools", tool, "--files", "edges"]) == status
    shown = capsys.readouterr().out
    assert line in shown and f"1 runs, {status} not clean" in shown
