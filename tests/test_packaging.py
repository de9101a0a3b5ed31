"""The wheel holds what the checkout holds, imports need no GPU, and README.md says what is true."""

from __future__ import annotations

import ast
import doctest
import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cuszp_cupy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_blocks(language: str) -> list[str]:
    """Return the fenced code blocks of README.md in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


# --- the wheel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, bytes]:
    """Build the wheel of a copy of the checkout, as pip would but with no download; return its files."""
    copy, out = tmp_path_factory.mktemp("wheel") / "copy", tmp_path_factory.mktemp("out")
    # Without build/ and *.egg-info: setuptools would pick up files that are no longer in the checkout.
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def dist_info(name: str) -> str:
    return f"cuszp_cupy-{cuszp_cupy.__version__}.dist-info/{name}"


def test_wheel_holds_every_file_of_the_package_every_module_and_nothing_else(wheel):
    package = [path for path in (ROOT / "cuszp_cupy").rglob("*") if "__pycache__" not in path.parts]
    files = [path for path in package if path.is_file()] + list(ROOT.glob("*.py"))
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    # What setuptools leaves out without a word unless it is told: kernels, data, modules beside the package.
    for needed in (r"cuszp_cupy/raw/\w+\.cu", r"cuszp_cupy/raw/\w+\.cuh", r"cuszp_cupy/data/.+", r"bench\.py"):
        assert any(re.fullmatch(needed, name) for name in wheel), needed


def test_wheel_metadata(wheel):
    metadata = email.message_from_bytes(wheel[dist_info("METADATA")])
    assert metadata["Version"] == cuszp_cupy.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel[dist_info("licenses/LICENSE")] == (ROOT / "LICENSE").read_bytes()
    # A plain install has no CuPy: which one depends on the driver, so it comes with an extra.
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in required} == {"ml_dtypes", "numpy", "rich"}


def test_wheel_registers_the_vllm_plugin_if_there_is_one(wheel):
    entry_points = wheel.get(dist_info("entry_points.txt"), b"").decode()
    assert ("[vllm.general_plugins]" in entry_points) == (ROOT / "vllm_patch.py").exists()


def test_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(cuszp_cupy.__version__)}\b", changelog, re.MULTILINE)


# --- imports -----------------------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, pkgutil, sys

class Refuse:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cupy", "matplotlib", "torch", "vllm"):
            self.asked.append(name)
            raise ImportError(f"{name} is not for this test")

sys.meta_path.insert(0, Refuse())
import cuszp_cupy
names = [module.name for module in pkgutil.walk_packages(cuszp_cupy.__path__, "cuszp_cupy.")]
for name in [*names, "bench"]:
    importlib.import_module(name)
print(*names)
sys.exit(f"asked for {Refuse.asked}" if Refuse.asked else 0)
"""


def test_no_module_imports_cupy_before_it_is_used():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"cuszp_cupy.codec", "cuszp_cupy.raw.kv", "cuszp_cupy.evaluation"} <= set(done.stdout.split())


# --- README.md ---------------------------------------------------------------------------------------------


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    quick, test = readme_blocks("bash")[0].splitlines()
    assert re.fullmatch(r"pip install -e '\.\[cuda13\]' && python bench\.py", quick)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r'command=\$\(grep -x "(.*)" README.md\)\n.*\neval "\$command"', script)[1]
    assert re.findall(f"^{pattern}$", README, re.MULTILINE) == [test]


def test_readme_extras_exist(wheel):
    extras = set(email.message_from_bytes(wheel[dist_info("METADATA")]).get_all("Provides-Extra"))
    named = set(re.findall(r"\.\[(\w+)\]", README))
    assert {"cuda12", "cuda13", "test"} <= named <= extras


def test_readme_doctests():
    for block in (blocks := [block for block in readme_blocks("python") if block.startswith(">>>")]):
        test = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
        results = doctest.DocTestRunner(optionflags=doctest.REPORT_UDIFF).run(test)
        assert results.attempted and not results.failed
    assert blocks


def gpu_examples() -> list[str]:
    return [block for block in readme_blocks("python") if not block.startswith(">>>")]


def test_readme_gpu_examples_use_the_public_names():
    for block in gpu_examples():
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "cuszp_cupy"
        }
        assert used
        assert used <= set(cuszp_cupy.__all__)


@pytest.mark.gpu
@pytest.mark.parametrize("block", gpu_examples())
def test_readme_gpu_examples_run(block):
    exec(block, {})


def test_readme_names_files_that_exist():
    named = re.findall(r"`([\w./-]+\.(?:py|cu|cuh|md))`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_guarantees_name_tests_and_files_that_exist():
    """And mark those that need a GPU."""
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    nodes = [node for path in ROOT.glob("tests/test_*.py") for node in ast.parse(path.read_text("utf-8")).body]
    tests = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    named = re.findall(r"`(test_\w+)`(\*?)", text)
    assert len(named) > 25 and [name for name, _ in named if name not in tests] == []
    for name, star in named:
        marks = [ast.unparse(decorator) for decorator in tests[name].decorator_list]
        assert ("pytest.mark.gpu" in marks) == bool(star), name
    names = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if hasattr(target, "id")
    }
    assert {"TestTransfers", "TestCalls"} <= set(re.findall(r"`(Test\w+)`", text)) <= names
    files = re.findall(r"(?<![\w/])((?:tests|docs|cuszp_cupy)/[\w/-]+(?:\.\w+)?|bench\.py)", text)
    assert files and [name for name in files if not (ROOT / name).exists()] == []
