"""The gpu marker: skips with the reason, fails where a GPU is required, runs where a kernel can run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

NO_CUPY = "raise ImportError('libfoo is missing')"
NO_DEVICE = "__version__ = '1.2'\ndef zeros(n): raise RuntimeError('no CUDA-capable device is detected')"
WORKING = """
__version__ = '1.2'
class zeros:
    def __init__(self, n): pass
    def sum(self): return self
    def item(self): return 0.0
"""


@pytest.fixture
def run(pytester):
    """Run one gpu test, which passes, beside a stand-in for the module cupy."""
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = gpu")
    pytester.makepyfile(test_it="import pytest\n@pytest.mark.gpu\ndef test_kernel(): pass")

    def run(cupy: str, *options: str):
        pytester.makepyfile(cupy=cupy)
        return pytester.runpytest_subprocess("-rs", "-p", "no:cacheprovider", *options)

    return run


CASES = [
    (NO_CUPY, "CuPy cannot be imported: libfoo is missing"),
    (NO_DEVICE, "CuPy 1.2 cannot run a kernel: RuntimeError: no CUDA-capable device is detected"),
]


@pytest.mark.parametrize(("cupy", "reason"), CASES)
def test_gpu_tests_skip_with_the_reason(run, cupy, reason):
    result = run(cupy)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(f"SKIPPED *{reason}*")


@pytest.mark.parametrize(("cupy", "reason"), CASES)
def test_gpu_tests_fail_where_a_gpu_is_required(run, cupy, reason):
    result = run(cupy, "--require-gpu")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(f"*--require-gpu: {reason}*")


def test_gpu_tests_run_where_a_kernel_can_run(run):
    run(WORKING, "--require-gpu").assert_outcomes(passed=1)
