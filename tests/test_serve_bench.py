"""What of ``evaluation.serve`` needs neither vLLM nor a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import types

import pytest

from cuszp_cupy.evaluation import serve


def output(tokens, latency=0.01, cached=8, first=None):
    logprobs = [{t: types.SimpleNamespace(logprob=math.log(p)) for t, p in first.items()}] if first else None
    metrics = types.SimpleNamespace(first_token_latency=latency)
    return types.SimpleNamespace(
        prompt_token_ids=[0] * 10, num_cached_tokens=cached, metrics=metrics,
        outputs=[types.SimpleNamespace(token_ids=tokens, logprobs=logprobs)],
    )  # fmt: skip


def test_prompts_are_the_same_every_time_and_of_the_lengths_asked_for(tmp_path):
    case = serve.Case(serve.write_shape(tmp_path / "model"), prompt_tokens=(5, 9), prompts=40, sets=2)
    sets = serve.prompts(case)
    assert sets == serve.prompts(case) and [len(some) for some in sets] == [40, 40]
    assert {len(prompt) for some in sets for prompt in some} == set(range(5, 10))
    assert max(max(prompt) for some in sets for prompt in some) < serve.LLAMA_8B["vocab_size"]
    (tmp_path / "prompts.json").write_text(json.dumps([[1, 2], [3]]))
    case = serve.Case("", prompts=1, sets=2, prompt_file=str(tmp_path / "prompts.json"))
    assert serve.prompts(case) == [[[1, 2]], [[3]]]
    case.prompts = 2
    with pytest.raises(ValueError, match="expected 4 prompts, got 2"):
        serve.prompts(case)


def test_a_round_times_batches_of_the_asked_size():
    calls = []

    def generate(requests, params, use_tqdm):
        calls.append(len(requests))
        return [output([1], latency=0.02) for _ in requests]

    llm = types.SimpleNamespace(generate=generate)
    one, outputs = serve._round(llm, None, [[1] * 10] * 5, 2, "restored", 0)
    assert calls == [2, 2, 1] and len(outputs) == 5 and one["first_token_ms"] == [20.0] * 5
    assert one["cached_share"] == [0.8] * 5 and one["seconds"] > 0


def test_summary_counts_requests_a_second_and_percentiles():
    rounds = [
        {"what": "restored", "in_flight": 4, "requests": 4, "seconds": 2.0, "first_token_ms": [1, 2, 3, 4],
         "cached_share": [1, 1, 1, 0]},
        {"what": "restored", "in_flight": 4, "requests": 4, "seconds": 2.0, "first_token_ms": [5, 6, 7, 8],
         "cached_share": [1] * 4},
    ]  # fmt: skip
    (row,) = serve.summary({"rounds": rounds})
    assert row["requests_per_s"] == 2 and row["first_token_ms_p50"] == 4.5 and row["restored_share"] == 0.875


def test_compare_finds_where_tokens_and_distributions_part():
    raw = {"restored": {"0/0": serve._record(output([1, 2, 3, 4], first={1: 0.5, 2: 0.5}))}}
    same = serve.compare(raw, raw)
    assert same == {"requests": 1, "same_tokens": 1.0, "same_first": 1.0, "first_kl": 0.0}
    other = {"restored": {"0/0": serve._record(output([1, 2, 9, 4], first={1: 0.25, 2: 0.75}))}}
    found = serve.compare(raw, other)
    assert (found["same_tokens"], found["same_first"]) == (0.5, 1.0)
    assert found["first_kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_speeds_are_of_each_direction_and_of_large_transfers():
    found = serve.speeds([("load", 200_000_000, 0.004), ("load", 1000, 0.001), ("store", 10, 0.0)])
    assert found["load"]["gbps"] == pytest.approx(200_001_000 / 5e6)
    assert found["load"]["large_gbps"] == pytest.approx(50) and found["load"]["large_calls"] == 1
    assert found["store"]["gbps"] is None and found["store"]["large_gbps"] is None


def test_variants_differ_in_their_connector_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUSZP_BOUND", "rms:9")
    case = serve.Case("model", engine={"seed": 3})
    recompute, raw = (serve.llm_arguments(case, variant) for variant in ("recompute", "raw"))
    assert serve.llm_arguments(case, "rms:0.05") == raw and raw["seed"] == 3
    assert raw.pop("kv_transfer_config")["kv_connector_extra_config"] == {"cpu_bytes_to_use": 36 << 30}
    assert raw == recompute
    for processes, expected in (("one", ("0", None)), ("spawn", ("1", "spawn"))):
        case.processes = processes
        found = serve.environment(case)
        names = "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"
        assert tuple(found.get(name, os.environ.get(name)) for name in names) == expected
        assert "CUSZP_BOUND" not in found


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_failed_variant_says_what_it_printed(tmp_path):
    case = serve.Case(str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"serve raw failed \(1\):[\s\S]*No module named 'vllm'"):
        serve._run(case, "raw", 60)
