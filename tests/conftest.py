"""What every test gets: the ``gpu`` marker, ``--require-gpu``, and hypothesis profiles.

Hypothesis profile: ``HYPOTHESIS_PROFILE=default | ci | expensive``; where CI is set, ``ci`` unless named.
"""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest

# No deadline anywhere: a first call that loads or compiles something is slow, and says nothing about a bug.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("expensive", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail the tests marked gpu, instead of skipping them, where no kernel can run",
    )


@functools.cache
def why_no_gpu() -> str:
    """Return why kernels cannot run here, or "" if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        cupy.zeros(1).sum().item()  # allocates, compiles and launches
    except Exception as error:  # whatever it is, the reason below carries it
        return f"CuPy {cupy.__version__} cannot run a kernel: {type(error).__name__}: {error}"
    return ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        if item.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu: {reason}", pytrace=False)
        pytest.skip(reason)
