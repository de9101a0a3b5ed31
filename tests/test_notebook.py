"""notebooks/quickstart.ipynb runs from top to bottom, and is committed without what it showed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `notebook` is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
#: Runs the code cells in order, in one namespace, as a kernel does; a figure has to have been drawn in the end.
RUN = """
import json, sys
import matplotlib
matplotlib.use("Agg")
space = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"<code cell {number}>", "exec"), space)
import matplotlib.pyplot as plt
for number in plt.get_fignums():
    plt.figure(number).savefig(sys.argv[1] + f"/{number}.png")
"""


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(cells: list[str], folder: Path, gpu: bool = False) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, str(folder)], input=json.dumps(cells), env=environment,
        capture_output=True, text=True, cwd=folder, timeout=300,
    )  # fmt: skip


def test_the_notebook_runs_without_a_gpu(tmp_path):
    done = run(code_cells(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No GPU: the reference instead of the kernels" in done.stdout
    assert (
        "Left out without a GPU: SwapPipeline" in done.stdout and "the patch needs a GPU and vLLM" in done.stdout
    )
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.gpu
def test_the_notebook_runs_on_a_gpu(tmp_path):
    done = run(code_cells(), tmp_path, gpu=True)
    assert done.returncode == 0, done.stderr
    assert "No GPU" not in done.stdout and "load: 134 MB of pages" in done.stdout
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    "cell", ["raise ValueError('broken')", "import warnings; warnings.warn('old')", "missing_name"]
)
def test_a_cell_that_raises_or_warns_is_seen(tmp_path, cell):
    done = run([*code_cells()[:1], cell], tmp_path)
    assert done.returncode == 1 and "<code cell 1>" in done.stderr


def test_nothing_that_was_shown_is_committed():
    cells = NOTEBOOK["cells"]
    assert NOTEBOOK["nbformat"] == 4 and {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
        assert cell["metadata"] == {} and cell["source"]
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_it_shows_what_it_is_for():
    text = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    for name in (
        "cuszp_cupy.compress(", "encode_pages(", "SwapPipeline(", "vllm_patch.configure(", ".imshow(", ".hist(",
    ):  # fmt: skip
        assert name in text
    assert text.count("## ") >= 6
