"""bench.py study: what is run, skipped, left out and reported, with a stand-in for bench.py's other commands."""

import json

import pytest

import bench
from cuszp_cupy.evaluation import accuracy, machine, report, serve, study
from cuszp_cupy.evaluation.study import Step, Study

#: Writes down how it was called, then does what its first argument says.
STAND_IN = """
import json, pathlib, sys
*arguments, option, path = sys.argv[1:]
assert option == "--json"
with open("calls.txt", "a") as file:
    file.write(" ".join(arguments) + "\\n")
print("a table")
print("half way", file=sys.stderr)
what = arguments[0] if arguments else "good"
if what == "bad":
    sys.exit(3)
if what != "silent":
    pathlib.Path(path).write_text("{" if what == "broken" else json.dumps({"arguments": arguments}))
sys.exit(4 if what == "problem" else 0)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return tmp_path / "stand_in.py"


def calls(tmp_path) -> list[str]:
    path = tmp_path / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def states(results) -> dict[str, str]:
    return {result["name"]: result["state"] for result in results}


STEPS = [Step("one", (), 1, ""), Step("two", ("good", "--bound", "rms:0.1/rms:0.2"), 2, "")]


def test_a_study_goes_on_where_it_was_left(tmp_path, stand_in):
    folder, said = tmp_path / "results", []
    assert states(Study(STEPS[:1], folder, "a GPU", {}, stand_in).run(said.append)) == {"one": "finished"}
    assert said == ["1 of 1, one (about 1 min): starts", "1 of 1, one (about 1 min): half way"]
    assert (folder / "one.log").read_text() in ("a table\nhalf way\n", "half way\na table\n")
    results = Study(STEPS, folder, "a GPU", {}, stand_in).run()
    assert states(results) == {"one": "finished", "two": "finished"} and results[0]["minutes"] is None
    assert calls(tmp_path) == ["", "good --bound rms:0.1/rms:0.2"]
    assert json.loads((folder / "two.json").read_text())["arguments"][-1] == "rms:0.1/rms:0.2"
    record = json.loads((folder / "study.json").read_text())
    assert record["gpu"] == "a GPU" and list(record["steps"]) == ["one", "two"]
    assert record["steps"]["two"]["arguments"] == ["good", "--bound", "rms:0.1/rms:0.2"]
    Study(STEPS, folder, "a GPU", {}, stand_in).run()
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage", ["other parameters", "no result", "half a result", "no record", "an odd record"]
)
def test_a_result_that_is_not_this_step_s_is_made_anew(tmp_path, stand_in, damage):
    folder, one = tmp_path / "results", Step("one", ("good", "--bound", "rms:0.1"), 1, "")
    Study([one], folder, None, {}, stand_in).run()
    if damage == "other parameters":
        one = Step("one", ("good", "--bound", "rms:0.2"), 1, "")
    elif damage == "no result":
        (folder / "one.json").unlink()
    elif damage == "half a result":
        (folder / "one.json").write_text('{"rows": [')
    else:
        (folder / "study.json").write_text("[]" if damage == "no record" else "{}")
    again = Study([one], folder, None, {}, stand_in)
    assert again.state(one) == ("to do", None)
    assert states(again.run()) == {"one": "finished"} and len(calls(tmp_path)) == 2
    assert json.loads((folder / "one.json").read_text())["arguments"] == list(one.arguments)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("bad", "exit code 3, no valid result"),
        ("problem", "exit code 4"),  # the numbers are there, and something is wrong with them
        ("broken", "exit code 0, no valid result"),
        ("silent", "exit code 0, no valid result"),
    ],
)
def test_a_step_that_fails_stops_none_and_is_tried_again(tmp_path, stand_in, what, why):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "it.json").write_text("{}")  # of an earlier command: must not be taken for this one's
    steps = [Step("it", (what,), 1, ""), STEPS[1]]
    results = Study(steps, folder, None, {}, stand_in).run()
    assert states(results) == {"it": "failed", "two": "finished"}
    assert results[0]["why"] == f"{why}; see {folder / 'it.log'}" and (folder / "it.log").exists()
    assert report.study_lines(results) == [f"failed: it: {results[0]['why']}"]
    assert Study(steps, folder, None, {}, stand_in).state(steps[0]) == ("to do", None)
    Study(steps, folder, None, {}, stand_in).run()
    assert [call.split()[0] for call in calls(tmp_path)] == [what, "good", what]


def test_steps_that_lack_something_are_left_out_and_said_so(tmp_path, stand_in):
    steps = [Step("swap", (), 1, "", ("gpu",)), *STEPS, Step("model", (), 1, "", ("vllm", "model"))]
    absent = {"gpu": "no device", "model": "no model is named"}
    results = Study(steps, tmp_path / "results", None, absent, stand_in).run()
    assert states(results) == {"swap": "left out", "one": "finished", "two": "finished", "model": "left out"}
    assert report.study_lines(results) == ["left out: swap: no device", "left out: model: no model is named"]
    assert len(calls(tmp_path)) == 2 and not (tmp_path / "results" / "swap.json").exists()


def test_a_result_stays_finished_where_it_could_not_be_made(tmp_path, stand_in):
    one = Step("one", (), 1, "", ("gpu",))
    Study([one], tmp_path / "results", None, {}, stand_in).run()
    assert Study([one], tmp_path / "results", None, {"gpu": "gone"}, stand_in).state(one) == ("finished", None)


def test_nothing_is_started_that_would_take_too_long(tmp_path, stand_in):
    results = Study(STEPS, tmp_path / "results", None, {}, stand_in).run(minutes=1.5)
    assert states(results) == {"one": "finished", "two": "to do"}
    assert results[1]["why"] == "takes 2 minutes or so, 1.5 are left" and len(calls(tmp_path)) == 1


def test_a_folder_of_another_gpu_is_refused(tmp_path, stand_in):
    Study(STEPS, tmp_path / "results", "an H100", {}, stand_in).run()
    with pytest.raises(ValueError, match="holds the study of an H100, this is None: name another folder"):
        Study(STEPS, tmp_path / "results", None, {}, stand_in)


# --- the steps --------------------------------------------------------------------------------------------
PARSERS = {
    "swap": bench.swap_parser, "accuracy": bench.accuracy_parser, "serve": bench.serve_parser,
    "baseline": bench.baseline_parser,
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("a text")
    return tmp_path / "some" / "model", tmp_path / "text.txt"


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_is_a_command_that_bench_takes(files, quick):
    steps = study.steps(*files, quick=quick)
    assert len({one.name for one in steps}) == len(steps)
    used = set()
    for one in steps:
        name = next((word for word in one.arguments[:1] if word in PARSERS), "")
        options = PARSERS.get(name, bench.parser)().parse_args(one.arguments[bool(name) :])
        assert options.quick == quick or one.name in ("swap-entropy", "swap-0.02", "swap-0.2")
        assert not any(str(files[0].parents[1]) in word for word in one.parameters)  # no path of a machine
        used.add(name)
    assert used == {"", *PARSERS}


def test_the_study_sweeps_what_it_is_for():
    steps = {one.name: one for one in study.steps()}
    words = {name: " ".join(one.arguments) for name, one in steps.items()}
    every = " ".join(words.values())
    for part in (
        "--coding entropy", "rms:0.05 entropy", "rms:0.05 fused", "rms:0.05/rms:0.1", "rms:0.02", "rms:0.2",
        "--prompt-tokens=1000 ", "--prompt-tokens=16000", "--in-flight 1,4,16", "--new-tokens 1,32", "--beside",
    ):  # fmt: skip
        assert part in every
    assert "--no-recompute" not in words["serve-load"]
    options = bench.serve_parser().parse_args(steps["serve-variants"].arguments[1:])
    assert tuple(options.bound) == study.VARIANTS and options.in_flight == (16,)
    settings = [serve.settings_of(variant) for variant in study.VARIANTS]
    assert len({tuple(one.items()) for one in settings}) == len(settings) == 6
    assert sum(one.minutes for one in steps.values()) < 50
    assert words["swap-0.2"].endswith("--bound rms:0.2")


def test_what_is_missing_is_named(monkeypatch, files):
    for module, name in ((machine, "gpu_missing"), (serve, "missing"), (accuracy, "missing")):
        monkeypatch.setattr(module, name, lambda: None)
    assert study.lacking(*files) == {}
    assert study.lacking(None, None) == {
        "model": "no model is named: --model FOLDER", "text": "no text is named: --text FILE"
    }  # fmt: skip
    monkeypatch.setattr(machine, "gpu_missing", lambda: "no device")
    assert study.lacking(*files) == {"gpu": "no device"}
    known = {"gpu", "vllm", "torch", "model", "text"}
    assert {need for one in study.steps() for need in one.needs} == known


# --- the command line -------------------------------------------------------------------------------------
@pytest.fixture
def nothing_here(monkeypatch, stand_in):
    for module, name in ((machine, "gpu_missing"), (serve, "missing"), (accuracy, "missing")):
        monkeypatch.setattr(module, name, lambda: "hidden by the test")
    monkeypatch.setattr(study, "BENCH", stand_in)


def test_list_shows_steps_and_starts_none(nothing_here, tmp_path, capsys):
    assert bench.main(["study", "--list"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "results/no-gpu" in shown and "codec page sizes" in shown and "left out: swap-fixed, " in shown
    total = sum(one.minutes for one in study.steps())
    assert f"all {total:g}" in shown and "hidden by the test" in shown
    assert calls(tmp_path) == [] and not (tmp_path / "results").exists()


def test_the_command_runs_what_it_can(nothing_here, tmp_path, capsys):
    assert bench.main(["study", "here", "--quick"]) == 0
    shown = capsys.readouterr()
    assert "1 of 5, codec (about 0.3 min): half way" in shown.err and "a table" not in shown.out
    assert calls(tmp_path) == ["--quick"] and (tmp_path / "here" / "codec.json").exists()
    assert "left out: swap-fixed, baseline, serve-load, accuracy: hidden by the test" in shown.out
    assert bench.main(["study", "here", "--quick", "--only", "codec"]) == 0 and len(calls(tmp_path)) == 1


def test_a_failure_is_the_exit_status(nothing_here, monkeypatch, capsys):
    monkeypatch.setattr(study, "steps", lambda *_: [Step("it", ("bad",), 1, "")])
    assert bench.main(["study", "here"]) == 1
    assert "failed: it: exit code 3, no valid result; see here/it.log" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "codek"], "--only: no step codek; --list shows them"),
        (["--model", "nowhere"], "there is no config.json in it"),
        (["--minutes", "0"], "expected a positive number, got 0"),
        (["here"], "here: holds the study of an H100, this is None"),
    ],
)
def test_wrong_arguments_are_named(nothing_here, tmp_path, capsys, arguments, message):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "study.json").write_text(json.dumps({"gpu": "an H100", "steps": {}}))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["study", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
