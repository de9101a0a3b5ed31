"""The list of broken kernels fits the sources; a broken test run is told from one that sees the mutant."""

import subprocess
import sys
from types import SimpleNamespace

import mutants
import pytest
from conftest import why_no_gpu


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_is_there_once(mutant):
    assert mutant.source() != (mutants.ROOT / mutants.RAW / mutant.file).read_text(encoding="utf-8")


def test_enough_of_them_in_every_kernel():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 20
    kernels = {path.name for path in (mutants.ROOT / mutants.RAW).glob("*.cu")}
    assert kernels <= {mutant.file for mutant in mutants.MUTANTS}


def test_a_line_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected 'no such line' once in kv_rest.cu, got 0"):
        mutants.Mutant("x", "kv_rest.cu", "no such line", "", "").source()


@pytest.mark.parametrize(
    ("status", "out", "expected"),
    [
        (0, "", "SURVIVED"),
        (1, "", "seen"),
        (1, "CompileException", "does not compile"),
        (4, "", "pytest ended with 4"),
    ],
)
def test_verdicts(monkeypatch, status, out, expected):
    done = SimpleNamespace(returncode=status, stdout=out, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert mutants.verdict(mutants.MUTANTS[0], mutants.EQUAL)[0].startswith(expected)


def test_a_survivor_ends_it_with_1(monkeypatch, capsys):
    monkeypatch.setattr(mutants, "verdict", lambda mutant, tests: ("SURVIVED", 1.0))
    assert mutants.main(["room of a payload"]) == 1
    assert "room of a payload: SURVIVED" in capsys.readouterr().out
    monkeypatch.setattr(mutants, "verdict", lambda mutant, tests: ("seen" if mutant else "SURVIVED", 1.0))
    assert mutants.main(["room of a payload"]) == 0


def test_without_a_gpu_nothing_is_called_seen():
    if not why_no_gpu():
        pytest.skip("there is a GPU")
    run = [sys.executable, "-m", "tests.mutants", "place in the table"]
    done = subprocess.run(run, cwd=mutants.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "unbroken, tests/test_pipeline.py" in done.stdout
