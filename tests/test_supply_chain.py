"""What is imported, opened and required: no pickle, no network, and a reason for every minimum version."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "cuszp_cupy").rglob("*.py"), *ROOT.glob("*.py")])
#: All that may be imported. None of these opens a socket or runs what a file says by itself, but for those below.
ALLOWED = {
    "__future__", "argparse", "ast", "bisect", "collections", "contextlib", "ctypes", "dataclasses",
    "functools", "hashlib", "importlib", "inspect", "io", "itertools", "json", "logging", "math", "mmap",
    "numbers", "os", "pathlib", "platform", "re", "shutil", "statistics", "struct", "sys", "tempfile",
    "threading", "time", "typing", "warnings", "zipfile", "zlib",
    "PIL", "cupy", "cuszp_cupy", "bench", "matplotlib", "ml_dtypes", "numpy", "nvidia", "rich", "torch",
    "transformers", "vllm", "vllm_patch",
}  # fmt: skip
#: The only ones that start other programs: git for the version, and a process for each variant of a benchmark and
#: for each step of the study.
SUBPROCESS = {f"cuszp_cupy/evaluation/{name}.py" for name in ("machine", "serve", "study")}


def complaints(name: str, text: str) -> list[str]:
    """Return what is wrong with a source: imports, calls that run text, loaders that may unpickle or download."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            if module.partition(".")[0] not in ALLOWED | ({"subprocess"} if name in SUBPROCESS else set()):
                found.append(f"line {node.lineno}: imports {module}")
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called in (
            "eval",
            "exec",
            "compile",
            "os.system",
            "os.popen",
            "torch.load",
            "torch.hub.load",
        ):
            found.append(f"line {node.lineno}: calls {called}")
        if "allow_pickle" in keywords and keywords["allow_pickle"] != "False":
            found.append(f"line {node.lineno}: allow_pickle")
        if called.endswith(".from_pretrained") and keywords.get("local_files_only") != "True":
            found.append(f"line {node.lineno}: {called} without local_files_only=True")
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(f"line {node.lineno}: trust_remote_code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sources_import_no_pickle_and_open_no_connection(path):
    assert complaints(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import socket", "import urllib.request", "import requests",
        "def f():\n    import http.client", "import subprocess", "from multiprocessing import shared_memory",
        "eval('1')", "exec('pass')", "numpy.load(f, allow_pickle=True)", "torch.load(f)",
        "AutoModel.from_pretrained(f)",
        "AutoModel.from_pretrained(f, local_files_only=True, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_complaints_are_made(text):
    assert len(complaints("cuszp_cupy/codec.py", text)) == 1


WATCHED = """
import sys
seen = []
def hook(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http", "pickle", "ftplib", "smtplib", "subprocess"):
        seen.append((event, arguments))
sys.addaudithook(hook)

import tempfile, pathlib
import numpy as np
import bench, cuszp_cupy
from cuszp_cupy import reference
from cuszp_cupy.evaluation import data
from cuszp_cupy.tables import Tables

pages = data.kv_pages()["K"][:4]
with tempfile.TemporaryDirectory() as folder:
    reference.calibrate(pages).save(pathlib.Path(folder) / "tables.npz")
    tables = Tables.load(pathlib.Path(folder) / "tables.npz")
for coding in ("raw", "fixed", "entropy"):
    reference.decode_page(reference.encode_page(pages[0], coding=coding, tables=tables), tables=tables)
x = np.arange(100, dtype=np.float32)
reference.decompress(reference.compress(x, 0.1), 100, "float32", 0.1)
sys.exit(f"asked for {seen}" if seen else 0)
"""


def test_nothing_is_unpickled_or_connected_to_at_run_time():
    """As Python's audit hooks see it: package, tables, data, both formats, and the imports of bench.py."""
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken = WATCHED.replace("x = np.arange", "import pickle; pickle.loads(pickle.dumps(hook))\nx = np.arange")
    done = subprocess.run([sys.executable, "-c", broken], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "pickle.find_class" in done.stderr, "the hook sees nothing"


def test_every_minimum_version_has_a_reason():
    """A comment behind it, or above the line; and everything has a minimum, but what the user's server brings."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    begin, end = lines.index("dependencies = ["), lines.index('[project.entry-points."vllm.general_plugins"]')
    found = 0
    for before, line in zip(lines[begin - 1 :], lines[begin:end], strict=False):
        names = re.findall(r'"([\w.\[\]-]+)((?:>=|==)[\d.*]+)?(?:;[^"]*)?"', line.partition("#")[0])
        for name, version in names:
            found += 1
            assert version or name in ("vllm", "jupyter", "nbclient"), f"{name}: no minimum version"
            assert "#" in line or before.startswith("#"), f"{name}: no reason"
    assert found > 12
