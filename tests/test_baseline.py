"""bench.py baseline: from recorded transfers and latencies to shares, without vLLM or a GPU."""

import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

import bench
from cuszp_cupy.evaluation import baseline, report, serve

RATE = 40e9  # bytes a second of the link, either way


def canned(case, variant, timeout=None):
    """What a variant's process would write, on a GPU that computes a token in 1 ms and looks one up in 0.01 ms.

    With a cache that does not hold everything, requests are restored at RATE, and nothing hides it.
    """
    groups, rounds = serve.prompts(case), []
    for label, group in groups.items():
        every = sum(len(prompt) + max(case.new_tokens) for some in group for prompt in some)
        fits = case.gpu_tokens >= every
        turns = case.first_in_flight
        passes = [("first", number, turns[number % len(turns)]) for number in range(len(group))]
        passes += [("restored", k, n) for _, n in serve.passes(case, group, variant) for k in range(len(group))]
        for what, number, in_flight in passes:
            tokens = sum(map(len, group[number]))
            nbytes, transfers, offloads = 131072 * tokens, [], variant == "raw"
            seconds = 1e-3 * tokens if what == "first" or not offloads else 1e-5 * tokens
            if offloads and what == "first":
                transfers = [["store", nbytes, nbytes / RATE]]
            elif offloads and not fits:
                transfers = [["load", nbytes, nbytes / RATE]]
                seconds += nbytes / RATE
            rounds.append({
                "prompt_tokens": label, "new_tokens": 1, "what": what, "in_flight": in_flight, "set": number,
                "requests": len(group[number]), "seconds": seconds, "transfers": transfers,
                "host_s": None,
                "first_token_ms": [1.0], "end_to_end_ms": [1e3 * seconds / 2, 1e3 * seconds],
                "cached_share": [0.0 if what == "first" else 1.0],
            })  # fmt: skip
    transfers = [one for round in rounds for one in round["transfers"]]
    return {
        "rounds": rounds, "restored": {"100/0/0": {"tokens": [1], "first": {}}}, "stats": [], "beside": None,
        "transfers": serve.speeds(transfers), "vllm": "0.33.0", "start_s": 30.0,
        "host_bytes": [10**9],
    }  # fmt: skip


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(serve, "missing", lambda: None)
    monkeypatch.setattr(serve, "_run", canned)


def case(tmp_path, **options):
    options = {"prompt_tokens": ((100, 100),), "prompts": 4, "in_flight": (1, 2, 4)} | options
    return serve.Case(serve.write_shape(tmp_path / "model"), dummy=True, **options)


def test_sizes_are_parts_of_a_set_and_one_that_holds_all(tmp_path):
    found = baseline.sizes(case(tmp_path), (0.5, 1.125))
    assert found[:2] == [(0.5, 208), (1.125, 464)]  # of 4 x 101 tokens, in blocks of 16
    number, tokens = found[2]
    assert (
        number is None and tokens % 16 == 0 and 8 * 7 * 16 <= tokens <= 1000
    )  # 8 prompts of 7 blocks, and a few


def test_shares_follow_from_transfers_and_latencies(present, tmp_path):
    steps = []
    result = baseline.measure(case(tmp_path), (0.5, 1.125), steps.append)
    assert [(one["gpu_sets"], one["gpu_tokens"]) for one in result["sizes"]] == baseline.sizes(case(tmp_path))
    rows = {(row["gpu_sets"], row["variant"], row["what"], row["in_flight"]): row for row in result["rows"]}
    load, look_up = 131072 * 100 / RATE, 1e-3  # seconds a request: 0.33 ms and 1 ms
    for sets in (0.5, 1.125):
        for n in (1, 2, 4):
            row = rows[sets, "raw", "restored", n]
            assert row["h2d_share"] == pytest.approx(load / (load + look_up))
            assert row["added_share"] == pytest.approx(row["h2d_share"])  # nothing else is added here
            assert row["h2d_gbps"] == pytest.approx(40) and row["h2d_ms"] == pytest.approx(1e3 * load)
            assert row["over_recompute"] == pytest.approx(0.1 / (load + look_up))
            assert row["end_to_end_ms_p50"] == pytest.approx(1e3 * 0.75 * 4 * (load + look_up))
            assert row["d2h_share"] == 0 and row["d2h_gbps"] is None
    first = rows[1.125, "raw", "first", 4]
    assert first["d2h_share"] == pytest.approx(load / 0.1) and first["added_share"] is None
    assert (1.125, "raw", "first", 1) in rows  # the second set is computed one by one
    resident = rows[None, "raw", "resident", 4]
    assert resident["h2d_share"] == 0 and resident["added_share"] is None and resident["over_recompute"] is None
    recomputed = [key for key in rows if key[1:3] == ("recompute", "restored")]
    assert recomputed == [(0.5, "recompute", "restored", 4)]  # once is enough, for all in flight
    assert steps[0] == "a GPU cache of 0.5 sets, 208 tokens: vLLM, recompute"


@pytest.mark.parametrize(("new", "expected"), [(1, [3, 6]), (16, [None, 6])])
def test_longer_answers_are_compared_with_computing_as_many_at_once_alone(new, expected):
    one = {"what": "restored", "prompt_tokens": "100", "new_tokens": new, "variant": "raw"}
    rows = [one | {"in_flight": n, "requests_per_s": rate} for n, rate in ((1, 3), (4, 6))]
    again = one | {"variant": "recompute", "in_flight": 4, "requests_per_s": 1}
    found = baseline.rows_of([(1.125, 464, [again, *rows])])
    assert [row["over_recompute"] for row in found] == [None, *expected]


def test_the_link_decides_where_it_takes_half_of_the_time():
    row = {
        "variant": "raw", "what": "restored", "h2d_share": 0.5, "prompt_tokens": "8000", "new_tokens": 1,
        "in_flight": 16, "gpu_sets": 0.5,
    }  # fmt: skip
    others = [row | {"h2d_share": 0.49}, row | {"what": "resident"}, row | {"variant": "recompute"}]
    assert baseline.decided_by_link([*others, row]) == [row]
    (line, problem) = report.baseline_lines({"rows": [*others, row], "notes": [], "problems": ["no memory"]})
    assert line == (
        "H2D takes 50% or more of the time of restored requests: 50% (8000 + 1 tokens, 16 in flight, a cache of "
        "0.5 sets)"
    )
    assert problem == "PROBLEM: no memory"
    (line,) = report.baseline_lines({"rows": others, "notes": [], "problems": []})
    assert line.startswith("At none of these loads")


def test_a_size_that_fails_is_a_problem_and_the_others_go_on(present, monkeypatch, tmp_path):
    def run(case, variant, timeout):
        if case.gpu_tokens > 500:
            raise RuntimeError("serve raw failed (1):\nin /home/somebody\nout of memory")
        return canned(case, variant)

    monkeypatch.setattr(serve, "_run", run)
    result = baseline.measure(case(tmp_path), (1.125,))
    (problem,) = result["problems"]
    assert "a GPU cache of all sets" in problem and problem.endswith("serve raw failed (1): out of memory")
    assert {row["gpu_sets"] for row in result["rows"]} == {1.125}
    assert {row["added_share"] for row in result["rows"]} == {None}
    monkeypatch.setattr(serve, "_run", lambda *_: run(case(tmp_path, gpu_tokens=999), "raw", 0))
    with pytest.raises(RuntimeError, match="0.5 sets.*out of memory\n.*all sets"):
        baseline.measure(case(tmp_path), (0.5,))


def test_the_command_writes_numbers_and_a_table(present, tmp_path, capsys):
    out = tmp_path / "baseline.json"
    load = "--prompt-tokens 100 --prompts 4 --in-flight 1,4"
    arguments = ["baseline", "--shape", "llama-8b", *load.split()]
    assert bench.main([*arguments, "--gpu-sets", "1.5", "--json", str(out)]) == 0
    text = out.read_text()
    result = json.loads(text)
    assert result["parameters"] == {"quick": False, "gpu_sets": [1.5]} and result["case"]["model"] == "llama-8b"
    assert str(tmp_path) not in text and "/tmp" not in text
    shown = capsys.readouterr()
    assert "vLLM 0.33.0, llama-8b, KV offloaded uncompressed" in shown.out and "Dummy weights" in shown.out
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    with console.file:
        console.print(report.baseline_table(result["rows"], "the title"))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "1.5 100 restored raw 1 1 753.19 4.0 5.3 5.3 0.0 0% 0.3 40.0 25% 25% 75.32" in lines
    assert any(line.startswith("all 100 resident raw 1 1 1000.00") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model's folder or --shape, one of them"),
        (["--shape", "llama-1b", "--gpu-sets", "1,0"], "expected a positive number, got 0"),
        (["--shape", "llama-1b", "--gpu-sets", "2.5"], "nothing would be restored"),
        (["--shape", "llama-1b", "--gpu-sets", "0.01"], "the longest prompt has 8000"),
        (["--shape", "llama-1b", "--beside=3"], "unrecognized arguments: --beside=3"),  # serve's alone
    ],
)
def test_wrong_arguments_are_named(present, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["baseline", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serve, "missing", lambda: "there is no vLLM")
    assert bench.main(["baseline", "--shape", "llama-8b"]) == 1
    assert capsys.readouterr().err == "bench.py baseline: there is no vLLM\n"


def test_the_page_on_nsight_names_the_ranges_that_there_are():
    root = Path(bench.__file__).parent
    page = (root / "docs" / "nsight.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    sources = [(root / "cuszp_cupy" / name).read_text("utf-8") for name in ("pipeline.py", "evaluation/serve.py")]
    used = {name for text in sources for name in re.findall(r'(?:Stage\(\w+, |nvtx_range\()"([^"]+)"', text)}
    used |= {"load call"} if 'else "load call"' in sources[1] else set()
    assert used - named == set() and len(used) == 6
    rounds = named - used
    assert {name.split(":")[0] for name in rounds} == {"first", "restored"}
    pattern = re.search(r'nvtx_range\(f"\{what\}(: .*?)"\)', sources[1])[1]
    of_rounds = re.sub(r"\\\{\w+\\\}", r"\\S+", re.escape(pattern))
    assert all(re.fullmatch(r"\w+" + of_rounds, name) for name in rounds)
    commands = re.findall(r"python (bench\.py baseline .*)", page)
    assert commands
    for command in commands:
        bench.baseline_parser().parse_args(command.split()[2:])
