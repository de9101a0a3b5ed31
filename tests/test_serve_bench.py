"""What of ``bench.py serve`` needs neither vLLM nor a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import bench
from cuszp_cupy import reference
from cuszp_cupy.evaluation import data, machine, report, serve
from cuszp_cupy.format import Geometry


def output(tokens, latency=0.01, cached=8, first=None):
    logprobs = [{t: types.SimpleNamespace(logprob=math.log(p)) for t, p in first.items()}] if first else None
    metrics = types.SimpleNamespace(first_token_latency=latency, first_token_ts=7.0, last_token_ts=7.25)
    return types.SimpleNamespace(
        prompt_token_ids=[0] * 10, num_cached_tokens=cached, metrics=metrics,
        outputs=[types.SimpleNamespace(token_ids=tokens, logprobs=logprobs)],
    )  # fmt: skip


# --- prompts and sizes ------------------------------------------------------------------------------------
def test_prompts_are_the_same_every_time_and_of_the_lengths_asked_for(tmp_path):
    model = serve.write_shape(tmp_path / "model")
    case = serve.Case(model, prompt_tokens=((5, 9), (20, 20)), prompts=40, sets=2)
    groups = serve.prompts(case)
    assert groups == serve.prompts(case) and list(groups) == ["5-9", "20"]
    assert [len(some) for some in groups["20"]] == [40, 40]
    assert [len(some) for some in groups["5-9"]] == [114, 114]  # 40 x 20 tokens are 114 x 7
    assert {len(prompt) for some in groups["5-9"] for prompt in some} == set(range(5, 10))
    assert max(max(p) for some in groups["20"] for p in some) < serve.LLAMA_8B["vocab_size"]


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps([[1, 2], [3], [4, 5, 6]]))
    case = serve.Case("", prompts=1, sets=2, prompt_file=str(tmp_path / "prompts.json"))
    assert serve.prompts(case) == {"1-2": [[[1, 2]], [[3]]]}
    case.prompts = 2
    with pytest.raises(ValueError, match="expected 4 prompts, got 3"):
        serve.prompts(case)


def test_caches_are_sized_by_the_prompts(tmp_path):
    model = serve.write_shape(tmp_path / "model")
    case = serve.sized(serve.Case(model))
    assert case.gpu_tokens == 144_032  # 9/8 of 16 x 8001, in blocks of 16
    assert 1.1 * 32 * 8001 * 131072 / 2**30 <= case.cpu_gb <= 36
    assert serve.sized(case) == case
    with pytest.raises(
        ValueError, match="holds 300000 tokens, and all sets of a range only 256032: nothing would"
    ):
        serve.sized(serve.Case(model, gpu_tokens=300_000))
    with pytest.raises(ValueError, match="cache of 4000 tokens: the longest prompt has 8000"):
        serve.sized(serve.Case(model, gpu_tokens=4000))
    serve.write_shape(tmp_path / "model", {"vocab_size": 100})
    with pytest.raises(ValueError, match="config.json has no 'num_attention_heads'"):
        serve.sized(serve.Case(model))
    assert serve.sized(serve.Case(model, cpu_gb=5)).cpu_gb == 5


def test_a_cache_that_holds_all_is_taken_where_it_is_asked_for(tmp_path):
    case = serve.Case(serve.write_shape(tmp_path / "model"), gpu_tokens=300_000)
    assert serve.sized(case, resident=True).gpu_tokens == 300_000


def test_no_more_are_in_flight_than_a_set_has():
    case = serve.Case("", in_flight=(1, 4, 16), new_tokens=(1, 32))
    assert serve.passes(case, [[[1]] * 4] * 2) == [(1, 1), (1, 4), (32, 1), (32, 4)]
    assert len(serve.passes(case, [[[1]] * 40] * 2)) == 6
    assert serve.passes(case, [[[1]] * 4] * 2, "recompute") == [(1, 4), (32, 4)]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("rms:0.05", {}),
        ("as-fp8 fused", {"transport": "fused"}),
        ("rms:0.05/rms:0.1 entropy", {"coding": "entropy"}),
        ("rms:0.05 ring=512 entropy", {"coding": "entropy", "ring_mb": 512}),
        ("  abs:1   raw  fixed ", {"coding": "fixed", "transport": "raw"}),
    ],
)
def test_a_variant_names_a_bound_and_settings_in_any_order(variant, expected):
    assert serve.settings_of(variant) == {"bound": variant.split()[0]} | expected


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("rms:0.05 stagged", "expected one coding of fixed, entropy; one transport of auto, .* got 'stagged'"),
        ("rms:0.05 fixed fused entropy", "'rms:0.05 fixed fused entropy': .* got 'entropy'"),
        ("rms:0.05 raw auto", "at most after the bound, got 'auto'"),
        ("rms:0.05 ring=0", "one ring=MIB, at most after the bound, got 'ring=0'"),
        ("rms:0.05 ring=1 ring=2", "got 'ring=2'"),
        ("entropy rms:0.05", "bound: expected text like .* got 'entropy'"),
        ("raw", "bound: expected"),  # the names of the variants that are not patched are no bounds
        ("  ", "bound: expected .* got ''"),
    ],
)
def test_a_variant_of_other_words_is_refused(variant, message):
    with pytest.raises(ValueError, match=message):
        serve.settings_of(variant)


def test_kv_bytes_follow_the_config():
    assert serve.kv_bytes(serve.LLAMA_1B) == 32768
    small = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "num_hidden_layers": 30}
    assert serve.kv_bytes({"text_config": small}) == 23040


# --- dummy weights that compress as real KV ------------------------------------------------------------------
def test_scaled_gaussian_pages_compress_about_as_real_ones():
    geometry, rng = Geometry(16, 2048, parts=(128, 128)), np.random.default_rng(0)

    def ratio(pages):
        sizes = [len(reference.encode_page(page, "rms:0.05", geometry=geometry)) for page in pages]
        return sum(page.nbytes for page in pages) / sum(sizes)

    gaussian, scaled = [], []
    for layer in range(8):  # two rounds of the sample's layers, an octave of levels
        x = rng.standard_normal((16, 8, 2, 128))
        factors = serve.kv_scales(layer, 8, 8, 128).transpose(1, 0, 2)
        gaussian.append(x.reshape(16, 2048).astype(ml_dtypes.bfloat16))
        scaled.append((x * factors).reshape(16, 2048).astype(ml_dtypes.bfloat16))
    real = ratio(data.packed_pages(8, 128))
    assert ratio(gaussian) < 2.6 <= ratio(scaled) == pytest.approx(real, rel=0.03)


def test_fill_scales_rows_of_k_and_v_alone():
    torch = pytest.importorskip("torch")
    weight = torch.ones(4 * 8 + 2 * 16, 5, dtype=torch.bfloat16)  # 4 heads of queries, 2 of K and of V
    layer = types.SimpleNamespace(qkv_proj=types.SimpleNamespace(weight=weight), kv_size=16, head_dim=8)
    serve.fill_kv(types.SimpleNamespace(modules=lambda: [object(), layer]))
    assert (weight[:32] == 1).all()
    expected = torch.tensor(serve.kv_scales(0, 1, 2, 8).reshape(-1, 1)).to(torch.bfloat16).expand(32, 5)
    assert torch.equal(weight[32:], expected) and not torch.equal(weight[32:48], weight[48:])
    with pytest.raises(ValueError, match="no qkv_proj"):
        serve.fill_kv(types.SimpleNamespace(modules=lambda: [object()]))


# --- one variant ----------------------------------------------------------------------------------------------
def test_a_round_times_batches_of_the_asked_size():
    calls = []

    def generate(requests, params, use_tqdm):
        calls.append(len(requests))
        return [output([1], latency=0.02) for _ in requests]

    llm = types.SimpleNamespace(generate=generate)
    one, outputs = serve._round(llm, None, [[1] * 10] * 5, 2, "restored", 0)
    assert calls == [2, 2, 1] and len(outputs) == 5 and one["first_token_ms"] == [20.0] * 5
    assert one["cached_share"] == [0.8] * 5 and one["seconds"] > 0
    assert one["end_to_end_ms"] == pytest.approx([270.0] * 5)


class LLM:
    """Answers with the numbers of the prompts' first tokens, and on from there by how many are in flight."""

    def __init__(self, **arguments):
        self.arguments, self.core = arguments, types.SimpleNamespace()
        self.core.scheduler = types.SimpleNamespace(schedule=None, update_from_output=None)
        self.core.model_executor = types.SimpleNamespace(execute_model=list, sample_tokens=None)
        client = types.SimpleNamespace(engine_core=self.core)
        self.llm_engine = types.SimpleNamespace(add_request=None, engine_core=client)

    def generate(self, requests, params, use_tqdm):
        self.core.model_executor.execute_model()
        prompts = [request["prompt_token_ids"] for request in requests]
        assert max(map(len, prompts)) + params["max_tokens"] <= self.arguments["max_model_len"], "refused"
        return [output([prompt[0] + i * len(prompts) for i in range(params["max_tokens"])]) for prompt in prompts]

    def apply_model(self, function):
        LLM.applied = function.__module__, function.__name__


@pytest.mark.parametrize("processes", ["one", "spawn"])
@pytest.mark.parametrize("variant", ["recompute", "raw", "rms:0.05", "rms:0.05 fused fixed"])
def test_a_variant_measures_each_pass_and_records_the_longest_answers(tmp_path, monkeypatch, variant, processes):
    vllm = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options, __version__="0.33.0")
    configured, watched, stats = [], [], {"pipelines": ["a pipeline"]}
    patch = types.SimpleNamespace(stats=lambda: [stats], configure=lambda **settings: configured.append(settings))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    ours = variant not in ("recompute", "raw")
    if ours:
        monkeypatch.setitem(sys.modules, "vllm_patch", patch)
        (tmp_path / "cuszp-7.json").write_text(json.dumps(stats))
    else:
        monkeypatch.delitem(sys.modules, "vllm_patch", raising=False)
    monkeypatch.setattr(serve, "_watch", lambda transfers, spent: watched.append(spent))
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: None)
    case = serve.sized(serve.Case(
        serve.write_shape(tmp_path / "model"), dummy=True, fill=True, prompt_tokens=((30, 30), (50, 50)),
        prompts=3, new_tokens=(2, 1), in_flight=(1, 3), repeats=2, processes=processes,
        settings={"coding": "entropy"},
    ))  # fmt: skip
    arguments = {"case": serve.asdict(case), "variant": variant, "stats_dir": str(tmp_path)}
    (tmp_path / "case.json").write_text(json.dumps(arguments))
    serve.main(str(tmp_path / "case.json"), str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    rows = serve.summary(result)
    repeats, flights = (1, (3,)) if variant == "recompute" else (2, (1, 3))
    assert [
        (row["prompt_tokens"], row["new_tokens"], row["in_flight"]) for row in rows if row["what"] == "restored"
    ] == [(tokens, new, n) for tokens in ("30", "50") for new in (2, 1) for n in flights]
    assert {row["requests"] for row in rows if row["what"] == "restored"} == {10 * repeats, 6 * repeats}
    first = serve.prompts(case)["50"][1][2][0]
    assert result["restored"]["50/1/2"]["tokens"] == [first, first + 3] and len(result["restored"]) == 16
    assert LLM.applied == ("cuszp_cupy.evaluation.serve", "fill_kv")
    assert len(watched) == (processes == "one" and variant != "recompute")
    for row in rows:
        assert set(row["host_ms"] or ()) == ({"model", "other"} if processes == "one" else set())
    assert result["stats"] == [stats] * ours and result["vllm"] == "0.33.0"
    expected = {"bound": "rms:0.05", "stats_dir": str(tmp_path), "coding": "entropy"}
    named = {"coding": "fixed", "transport": "fused"} if " " in variant else {}
    assert configured == [expected | named] * ours


def test_decoding_runs_beside_the_longest_prompts_while_the_cpu_has_them(tmp_path, monkeypatch):
    """The next range's sets evict them from its cache."""
    done = []

    class Counting(LLM):
        def generate(self, requests, params, use_tqdm):
            done.append(len(requests[0]["prompt_token_ids"]))
            return super().generate(requests, params, use_tqdm)

    def beside(llm, sets, case):
        return {"prompt": len(sets[0][0]), "before": sorted(set(done[1:]))}

    vllm = types.SimpleNamespace(LLM=Counting, SamplingParams=lambda **options: options, __version__="0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.delitem(sys.modules, "vllm_patch", raising=False)
    monkeypatch.setattr(serve, "_watch", lambda transfers, spent: None)
    monkeypatch.setattr(serve, "_beside", beside)
    ranges = ((30, 30), (50, 50), (20, 20))
    case = serve.sized(serve.Case(
        serve.write_shape(tmp_path / "model"), prompt_tokens=ranges, prompts=2, in_flight=(2,), beside=1.0
    ))  # fmt: skip
    arguments = {"case": serve.asdict(case), "variant": "raw", "stats_dir": str(tmp_path)}
    (tmp_path / "case.json").write_text(json.dumps(arguments))
    serve.main(str(tmp_path / "case.json"), str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["beside"] == {"prompt": 50, "before": [30, 50]}


def test_what_warms_up_is_no_longer_than_short_prompts(tmp_path, monkeypatch):
    vllm = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options, __version__="0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    model = serve.write_shape(tmp_path / "model")
    case = serve.sized(serve.Case(model, prompt_tokens=((20, 30),), prompts=100, in_flight=(16,), repeats=1))
    assert case.gpu_tokens // 16 > 30
    arguments = {"case": serve.asdict(case), "variant": "recompute", "stats_dir": str(tmp_path)}
    (tmp_path / "case.json").write_text(json.dumps(arguments))
    serve.main(str(tmp_path / "case.json"), str(tmp_path / "result.json"))
    assert len(json.loads((tmp_path / "result.json").read_text())["restored"]) >= 100


def test_transfers_are_of_the_round_in_which_vllm_notices_them(tmp_path, monkeypatch):
    """And sets are computed with as many in flight as was asked for, in turn."""
    moved, ranges = [], []

    class Moving(LLM):
        def generate(self, requests, params, use_tqdm):
            moved[0].extend(("load", 1000 * len(requests), 0.5) for _ in requests)
            return super().generate(requests, params, use_tqdm)

    vllm = types.SimpleNamespace(LLM=Moving, SamplingParams=lambda **options: options, __version__="0.33.0")
    cuda = types.SimpleNamespace(is_available=lambda: True)
    cuda.nvtx = types.SimpleNamespace(range=lambda name: ranges.append(name) or contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.delitem(sys.modules, "vllm_patch", raising=False)
    monkeypatch.setattr(serve, "_watch", lambda transfers, spent: moved.append(transfers))
    case = serve.sized(serve.Case(
        serve.write_shape(tmp_path / "model"), prompt_tokens=((30, 30),), prompts=4, in_flight=(2,), repeats=1,
        sets=3, first_in_flight=(4, 1),
    ))  # fmt: skip
    arguments = {"case": serve.asdict(case), "variant": "raw", "stats_dir": str(tmp_path)}
    (tmp_path / "case.json").write_text(json.dumps(arguments))
    serve.main(str(tmp_path / "case.json"), str(tmp_path / "result.json"))
    rows = serve.summary(json.loads((tmp_path / "result.json").read_text()))
    found = {(row["what"], row["in_flight"]): (row["requests"], row["h2d_bytes"]) for row in rows}
    assert found == {("first", 4): (8, 32_000), ("first", 1): (4, 4000), ("restored", 2): (12, 24_000)}
    assert [row["h2d_ms"] for row in rows] == [500.0] * 3 and len(moved[0]) == 36  # 12 of rounds not timed
    assert ranges[1] == "first: prompts of 30, 1 new, 1 in flight" and len(ranges) == 6


def test_calls_that_start_transfers_are_ranges_and_their_ends_are_recorded(monkeypatch):
    class Handler:
        gpu_to_cpu = True

        def transfer_async(self, job_id, src_spec, dst_spec):
            clock.now += 1.0
            return job_id, src_spec, dst_spec

        def get_finished(self):
            return [types.SimpleNamespace(transfer_size=10, transfer_time=0.5)]

    worker, ranges, transfers = types.ModuleType("gpu_worker"), [], []
    worker.SingleDirectionOffloadingHandler = Handler
    package = types.ModuleType("vllm.v1.kv_offload.cpu")
    package.gpu_worker = worker
    for name in ("vllm", "vllm.v1", "vllm.v1.kv_offload"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(serve, "nvtx_range", lambda name: ranges.append(name) or contextlib.nullcontext())
    clock = Clock(monkeypatch)
    spent = serve.Spent()
    serve._watch(transfers, spent)
    handler = Handler()
    assert handler.transfer_async(7, src_spec="a", dst_spec="b") == (7, "a", "b")
    assert len(handler.get_finished()) == 1
    handler.gpu_to_cpu = False
    handler.transfer_async(8, "a", "b")
    handler.get_finished()
    assert ranges == ["store call", "load call"]
    assert spent.seconds == {"store calls": 1.0, "load calls": 1.0}
    assert transfers == [("store", 10, 0.5), ("load", 10, 0.5)]


class Clock:
    """A clock that goes when ``now`` is set."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(serve.time, "perf_counter", lambda: self.now)


class Engine:
    """Decodes a token a step for each request, and finishes a restored one in its second step."""

    def __init__(self, clock):
        self.model_config, self.clock = types.SimpleNamespace(max_model_len=1000), clock
        self.steps, self.most, self.aborted = {}, 0, []

    def add_request(self, name, prompt, params):
        self.steps[name] = 0

    def step(self):
        self.clock.now += 0.01
        self.most = max(self.most, sum(name.startswith("restore") for name in self.steps))
        outputs = []
        for name in list(self.steps):
            self.steps[name] += 1
            done = name.startswith("restore") and self.steps[name] == 2
            made = [types.SimpleNamespace(token_ids=[0] * self.steps[name])]
            cached = {"num_cached_tokens": 75, "prompt_token_ids": [1] * 100}
            outputs.append(types.SimpleNamespace(request_id=name, finished=done, outputs=made, **cached))
            if done:
                del self.steps[name]
        return outputs

    def abort_request(self, names):
        self.aborted = names
        for name in names:
            del self.steps[name]

    def has_unfinished_requests(self):
        return bool(self.steps)


@pytest.mark.parametrize(("rate", "expected", "most"), [(None, 100, 2), (5, 5, 1)])
def test_decoding_is_timed_alone_and_beside_restores(monkeypatch, rate, expected, most):
    clock = Clock(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=lambda **options: options))
    engine = Engine(clock)
    case = serve.Case("", beside=1.0, beside_rate=rate)
    found = serve._beside(types.SimpleNamespace(llm_engine=engine), [[[1] * 100] * 8], case)
    assert found["decoded_tokens_per_s_alone"] == pytest.approx(400)  # 4 requests, 100 steps a second
    assert found["decoded_tokens_per_s"] == pytest.approx(400)
    assert found["restored_requests_per_s"] == pytest.approx(expected, abs=2) and found["cached_share"] == 0.75
    assert engine.most == most and len(engine.aborted) == serve.DECODERS and not engine.steps


def test_summary_counts_requests_a_second_and_percentiles():
    one = {
        "prompt_tokens": "8", "new_tokens": 1, "what": "restored", "in_flight": 4, "requests": 4,
        "end_to_end_ms": [9.0] * 4, "transfers": [], "host_s": {},
    }  # fmt: skip
    rounds = [
        one | {"seconds": 2.0, "first_token_ms": [1, 2, 3, 4], "cached_share": [1, 1, 1, 0]},
        one | {"seconds": 1.0, "first_token_ms": [5, 6, 7, 8], "cached_share": [1] * 4},
        one | {"prompt_tokens": "9", "seconds": 1.0, "first_token_ms": [5], "cached_share": [1]},
    ]
    row, other = serve.summary({"rounds": rounds})
    assert row["requests_per_s"] == pytest.approx(8 / 3) and row["first_token_ms_p50"] == 4.5
    assert row["first_token_ms_percentiles"][::10] == [1, 4.5, 8] and len(serve.PERCENTILES) == 21
    assert row["spread_percent"] == 16.7 and row["cached_share"] == 0.875  # rates 2 and 4: quartiles 2.5 and 3.5
    assert other["spread_percent"] is None and other["prompt_tokens"] == "9"


def test_summary_tells_what_transfers_take_of_a_round():
    one = {
        "prompt_tokens": "8", "new_tokens": 1, "what": "restored", "in_flight": 2, "requests": 2, "seconds": 0.5,
        "first_token_ms": [5, 6], "end_to_end_ms": [10, 30], "cached_share": [1, 1], "host_s": None,
    }  # fmt: skip
    loads = [("load", 4 * 10**9, 0.08), ("load", 6 * 10**9, 0.12), ("store", 10**9, 0.04)]
    (row,) = serve.summary({"rounds": [one | {"transfers": loads}, one | {"transfers": loads[:1]}]})
    assert row["seconds"] == 1.0 and row["requests"] == 4
    assert (row["h2d_calls"], row["h2d_bytes"]) == (3, 14 * 10**9)
    assert row["h2d_seconds"] == pytest.approx(0.28) and row["h2d_share"] == pytest.approx(0.28)
    assert row["h2d_gbps"] == pytest.approx(50) and row["h2d_ms"] == pytest.approx(70)
    assert row["d2h_share"] == pytest.approx(0.04) and row["d2h_gbps"] == pytest.approx(25)
    assert (row["end_to_end_ms_p50"], row["end_to_end_ms_p99"]) == (20, 30)
    (row,) = serve.summary({"rounds": [one | {"transfers": []}]})  # nothing moved: a share, but no speed
    assert row["h2d_share"] == 0 and row["h2d_gbps"] is None
    (row,) = serve.summary({"rounds": [one | {"transfers": None}]})  # not timed
    assert {row[key] for key in row if key.startswith(("h2d_", "d2h_"))} == {None}


def test_the_host_s_time_is_told_apart(monkeypatch):
    """Calls within the model's are theirs alone; what is in no part is other."""
    clock, spent = Clock(monkeypatch), serve.Spent()

    def takes(seconds, inner=None):
        def call(*arguments, **options):
            clock.now += seconds
            return (inner or list)(*arguments, **options)

        return call

    def swap(*arguments, **options):
        with spent.part("load calls"):
            clock.now += 0.25
        return arguments

    scheduler = types.SimpleNamespace(schedule=takes(2.0), update_from_output=takes(1.0))
    executor = types.SimpleNamespace(execute_model=takes(0.5, swap), sample_tokens=takes(0.5))
    core = types.SimpleNamespace(scheduler=scheduler, model_executor=executor)
    engine = types.SimpleNamespace(add_request=takes(4.0), engine_core=types.SimpleNamespace(engine_core=core))
    serve._watch_engine(types.SimpleNamespace(llm_engine=engine), spent)
    engine.add_request()
    scheduler.schedule()
    assert executor.execute_model("what") == ("what",)
    executor.sample_tokens()
    scheduler.update_from_output()
    assert spent.seconds == {"adding": 4.0, "scheduling": 3.0, "model": 1.0, "load calls": 0.25}
    found = serve._host_ms([spent.seconds, {"adding": 1.0}], 10, 12.0)
    assert found == {"adding": 500.0, "scheduling": 300.0, "model": 100.0, "load calls": 25.0, "other": 275.0}
    assert serve._host_ms([None], 10, 12.0) is None


def test_compare_finds_where_tokens_and_distributions_part():
    raw = {"restored": {"0/0": serve._record(output([1, 2, 3, 4], first={1: 0.5, 2: 0.5}))}}
    same = serve.compare(raw, raw)
    assert same == {"requests": 1, "same_all": 1.0, "same_tokens": 1.0, "same_first": 1.0, "first_kl": 0.0}
    other = {"restored": {"0/0": serve._record(output([1, 2, 9, 4], first={1: 0.25, 2: 0.75}))}}
    found = serve.compare(raw, other)
    assert (found["same_all"], found["same_tokens"], found["same_first"]) == (0, 0.5, 1.0)
    assert found["first_kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_speeds_are_of_each_direction_and_of_large_transfers():
    found = serve.speeds([
        ("load", 200_000_000, 0.004), ("load", 100_000_000, 0.0025), ("load", 1000, 0.001), ("store", 10, 0.0)
    ])  # fmt: skip
    assert found["load"]["gbps"] == pytest.approx(300_001_000 / 7.5e6)
    assert found["load"]["large_gbps"] == pytest.approx(45) and found["load"]["large_calls"] == 2
    assert found["load"]["large_bytes"] == 200_000_000
    assert found["store"]["gbps"] is None and found["store"]["large_gbps"] is None


def test_variants_differ_in_their_connector_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUSZP_BOUND", "rms:9")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    case = serve.Case("model", engine={"seed": 3}, gpu_tokens=160, cpu_gb=36)
    recompute, raw = (serve.llm_arguments(case, variant, 100) for variant in ("recompute", "raw"))
    assert serve.llm_arguments(case, "rms:0.05", 100) == raw and raw["seed"] == 3
    assert raw.pop("kv_transfer_config")["kv_connector_extra_config"] == {"cpu_bytes_to_use": 36 << 30}
    assert raw == recompute and raw["num_gpu_blocks_override"] == 10 and raw["max_model_len"] == 117
    for processes, expected in (("one", ("0", None)), ("spawn", ("1", "spawn"))):
        case.processes = processes
        found = serve.environment(case)
        names = "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"
        assert tuple(found.get(name, os.environ.get(name)) for name in names) == expected
        assert "CUSZP_BOUND" not in found
        root, rest = found["PYTHONPATH"].split(os.pathsep)
        assert os.path.samefile(root, os.path.dirname(bench.__file__)) and rest == "elsewhere"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_failed_variant_says_what_it_printed(tmp_path):
    case = serve.Case(str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"serve raw failed \(1\):[\s\S]*No module named 'vllm'"):
        serve._run(case, "raw", 60)


# --- all variants, canned -------------------------------------------------------------------------------------
SPEED = {  # times those of recompute
    "recompute": 1.0, "raw": 4.0, "rms:0.05": 8.0, "rms:0.05/rms:0.1": 9.0, "rms:0.05 entropy fused": 6.0,
}  # fmt: skip


def direction(pages):
    names = "calls", "pages", "raw_bytes", "payload_bytes", "link_bytes", "elapsed_ms", "ratio", "gbps"
    return dict(
        zip(names, (1, pages, pages * 65536, pages * 24576, pages * 26000, 9.0, 2.65, 130.0), strict=True)
    )


def canned(case, variant, timeout=None):
    """What the process of ``variant`` would write."""
    groups, speed, rounds, restored = serve.prompts(case), SPEED[variant], [], {}
    for label, group in groups.items():
        for number, some in enumerate(group):
            passes = [("first", len(some), case.new_tokens[0])]
            passes += [("restored", n, new) for new, n in serve.passes(case, group, variant)]
            for what, n, new in passes:
                rounds.append({
                    "prompt_tokens": label, "new_tokens": new, "what": what, "in_flight": n, "set": number,
                    "requests": len(some), "seconds": new * len(some) / speed / n**0.5,
                    "first_token_ms": [100 / speed * n**0.5 * (1 + i / 20) for i in range(len(some))],
                    "cached_share": [0.99 if what == "restored" else 0.0] * len(some),
                    "end_to_end_ms": [200 / speed * n**0.5] * len(some), "transfers": [],
                    "host_s": {"adding": 0.1 / speed, "load calls": 0.2 / speed},
                })  # fmt: skip
            for i in range(len(some)):
                tokens = [1, 2, 3 if variant in ("recompute", "raw") else 4]
                restored[f"{label}/{number}/{i}"] = {
                    "tokens": tokens,
                    "first": {"1": -0.1, "2": -2.4 - speed / 100},
                }
    sizes = [] if variant == "recompute" else [10**9, 2 * 10**9, 10**6]
    timed = [(way, size, size / (12e9 * speed)) for way in ("store", "load") for size in sizes]
    verified = {"kept": 3000, "checked": 9000, "compared_with_reference": 90, "largest_error_over_bound": 0.998}
    pipeline = {
        "layers": "32 layers", "store": direction(3000), "load": direction(9000), "raw_pages": 2,
        "failed_pages": 0, "mispredicted": 1, "verified": verified,
    }  # fmt: skip
    stats = {
        "pid": 1, "vllm": "0.33.0", "settings": {"bound": variant, "stats_dir": "/tmp/somewhere"},
        "pipelines": [pipeline],
        "passed_through": {"no whole page": {"descriptors": 7, "bytes": 7_000_000}},
    }  # fmt: skip
    beside = {
        "seconds": 5.0, "decoded_tokens_per_s_alone": 400.0, "decoded_tokens_per_s": 390.0 - speed,
        "restored_requests_per_s": speed, "cached_share": 0.0 if variant == "recompute" else 0.98,
    }  # fmt: skip
    return {
        "rounds": rounds, "restored": restored, "transfers": serve.speeds(timed), "vllm": "0.33.0",
        "start_s": 40.0, "stats": [] if variant in ("recompute", "raw") else [stats],
        "beside": beside if case.beside else None,
        "host_bytes": [10**9 * (n + 10) for n in range(len(rounds))] if case.processes == "one" else None,
    }  # fmt: skip


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(serve, "missing", lambda: None)
    monkeypatch.setattr(serve, "_run", canned)


ARGUMENTS = ["serve", "--shape", "llama-1b", "--prompts", "2", "--in-flight", "1,2"]


def test_the_command_shows_what_the_comparison_is_for(present, capsys):
    more = [
        "--prompt-tokens",
        "40",
        "--prompt-tokens",
        "10,30",
        "--bound",
        "rms:0.05",
        "--bound",
        "rms:0.05/rms:0.1",
    ]
    assert (
        bench.main([*ARGUMENTS, *more, "--beside", "5", "--fill", "--coding", "entropy", "--new-tokens", "1,4"])
        == 0
    )
    shown = capsys.readouterr()
    assert "vLLM, rms:0.05/rms:0.1" in shown.err and "vLLM 0.33.0, llama-1b, entropy" in shown.out
    text = " ".join(shown.out.split())
    over = (
        "2.00 (40 + 1 tokens, 1 in flight), 2.00 (40 + 1 tokens, 2 in flight), 2.00 (40 + 4 tokens, 1 in flight)"
    )
    assert f"rms:0.05, times raw: restored requests/s {over}" in text
    assert "2.00 (10-30 + 4 tokens, 2 in flight)" in text
    assert "; loads 2.00; stores 2.00; decoded tokens/s 0.99" in text
    assert "passed through: 7 descriptors, 7.0 MB: no whole page" in shown.out
    assert "not representative of a trained model; K and V are scaled by channel" in shown.out
    assert "rms:0.05: 20.00 GB of host memory after half of the rounds, 29.00 at the end" in text
    assert "PROBLEM" not in shown.out and "verify" not in shown.out


def test_variants_of_one_bound_stand_side_by_side(present, tmp_path, capsys):
    out, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    bounds = ["--bound", "rms:0.05", "--bound", " rms:0.05  entropy fused", "--bound", "rms:0.05 entropy fused"]
    arguments = [*ARGUMENTS, "--prompt-tokens", "40", *bounds, "--json", str(out), "--plot", str(plot)]
    assert bench.main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "llama-1b, fixed where none is named" in shown
    assert "rms:0.05 entropy fused, times raw: restored requests/s 1.50 (40 + 1 tokens, 1 in flight)" in shown
    result = json.loads(out.read_text())
    names = ["recompute", "raw", "rms:0.05", "rms:0.05 entropy fused"]
    assert list(result["variants"]) == names and result["parameters"]["bounds"] == names[2:]
    assert {one["variant"] for one in result["agreement"]} == set(names[1:]) and plot.stat().st_size
    restored = [(row["variant"], row["in_flight"]) for row in result["rows"] if row["what"] == "restored"]
    assert restored == [("recompute", 2), *((name, n) for name in names[1:] for n in (1, 2))]


def test_tables_hold_the_numbers_of_the_result(tmp_path):
    model = serve.write_shape(tmp_path / "model")
    case = serve.sized(
        serve.Case(model, dummy=True, prompts=2, prompt_tokens=((40, 40),), beside=5, in_flight=(2,))
    )
    result = serve.result_of(case, {name: canned(case, name) for name in SPEED})
    console = Console(width=180, record=True, file=open(os.devnull, "w"))
    with console.file:
        for table in report.serve_tables(result, "the title"):
            console.print(table)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "40 restored rms:0.05 1 2 4 11.31 0.0 2.00 18.1 18.6 18.6 99% 0.0 0%" in lines  # 8 x sqrt 2 requests/s
    assert "load raw 3 3.0 48.0 1.00 2 2000 48.0 0.0 1.00" in lines
    assert "load rms:0.05 3 3.0 96.0 2.00 2 2000 96.0 0.0 2.00" in lines
    assert "rms:0.05 0 3000 9000 0.20 0.08 0.59 0.23 2.65 2 1 0 9000 90 0.9980" in lines
    firsts = [canned(case, name)["restored"]["40/0/0"]["first"] for name in ("recompute", "raw", "rms:0.05")]
    assert f"raw recompute 4 1.0000 1.0000 1.0000 {serve.kl(*firsts[:2]):.5f}" in lines
    assert f"rms:0.05 raw 4 0.0000 0.6667 1.0000 {serve.kl(*firsts[1:]):.5f}" in lines
    assert "rms:0.05 400.0 382.0 96% 0.99 8.0" in lines
    assert any("K and V are Gaussian" in note for note in result["notes"])


@pytest.mark.parametrize("share", [0.0, None])
def test_decoding_beside_prompts_that_were_computed_is_a_problem_and_not_shown(tmp_path, share):
    model = serve.write_shape(tmp_path / "model")
    case = serve.sized(
        serve.Case(model, dummy=True, prompts=2, prompt_tokens=((40, 40),), beside=5, in_flight=(2,))
    )
    variants = {name: canned(case, name) for name in ("raw", "rms:0.05")}
    variants["rms:0.05"]["beside"]["cached_share"] = share
    result = serve.result_of(case, variants)
    assert result["problems"] == ["rms:0.05: the prompts that decoding ran beside were computed, not restored"]
    assert result["over_raw"]["rms:0.05"]["decoded_tokens"] is None
    (table,) = (table for table in report.serve_tables(result, "") if table.title == "decoding beside restores")
    assert table.row_count == 1, "raw alone"
    result["over_raw"]["rms:0.05"]["decoded_tokens"] = 1.05  # as results of old say
    assert not any("decoded" in line for line in report.serve_lines(result)[:1])


def test_json_holds_no_path_of_the_machine(present, tmp_path):
    model = serve.write_shape(tmp_path / "small", serve.LLAMA_1B)
    (tmp_path / "prompts.json").write_text(json.dumps([[n] * 20 for n in range(4)]))
    out, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    files = ["--prompt-file", str(tmp_path / "prompts.json"), "--json", str(out), "--plot", str(plot)]
    assert bench.main(["serve", model, "--prompts", "2", *files]) == 0
    text = out.read_text()
    result = json.loads(text)
    assert result["case"]["model"] == "small" and result["case"]["prompt_file"] == "prompts.json"
    assert str(tmp_path) not in text and "/tmp" not in text and os.getcwd() not in text
    assert result["variants"]["raw"]["vllm"] == "0.33.0" and "vllm" in result["machine"]["versions"]
    assert result["parameters"] == {"quick": False, "bounds": ["rms:0.05"], "coding": "fixed"}
    assert {row["variant"] for row in result["rows"]} == {"recompute", "raw", "rms:0.05"}
    assert {(row["variant"], row["against"]) for row in result["agreement"]} == {
        ("raw", "recompute"), ("rms:0.05", "recompute"), ("rms:0.05", "raw")
    }  # fmt: skip
    assert bench.main(["serve", model, "--prompts", "2", "--no-recompute", *files]) == 0
    result = json.loads(out.read_text())
    assert list(result["variants"]) == ["raw", "rms:0.05"] and len(result["agreement"]) == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("stats", "problem"),
    [
        (lambda one: [], "0 of 1 workers say that they are patched; is cuszp_cupy installed?"),
        (
            lambda one: one["pipelines"].clear() or [one],
            "no load was compressed; passed through: {'no whole page'",
        ),
        (lambda one: one["pipelines"][0].update(failed_pages=3) or [one], "3 pages came back damaged"),
        (lambda one: one["pipelines"][0].pop("verified") and [one], "pages were not verified"),
    ],
)
def test_numbers_of_something_else_are_a_problem(present, monkeypatch, capsys, stats, problem):
    def run(case, variant, timeout):
        result = canned(case, variant)
        return result | {"stats": stats(result["stats"][0]) if result["stats"] else []}

    monkeypatch.setattr(serve, "_run", run)
    assert bench.main([*ARGUMENTS, "--prompt-tokens", "40", "--verify"]) == 1
    shown = capsys.readouterr().out.replace("\n", " ")
    assert f"PROBLEM: rms:0.05: {problem}" in shown and "Speeds with verify mean nothing" in shown


# --- the command line -----------------------------------------------------------------------------------------
def case_of(tmp_path, *arguments):
    return bench.serve_case(bench.serve_parser().parse_args(arguments), tmp_path)


def test_defaults_are_of_the_shape_or_of_a_small_model(tmp_path):
    shape = case_of(tmp_path, "--shape", "llama-8b")
    assert shape.dummy and not shape.logprobs and shape.processes == "one"
    assert (shape.prompt_tokens, shape.prompts, shape.new_tokens) == (((8000, 8000),), 16, (1,))
    assert (shape.in_flight, shape.repeats, shape.settings) == ((1, 4, 16), 3, {"coding": "fixed"})
    quick = case_of(tmp_path, "--shape", "llama-8b", "--quick", "--layers", "4", "--verify", "--in-flight", "8")
    assert (quick.prompts, quick.repeats, quick.in_flight) == (4, 1, (8,)) and quick.settings["verify"] == 0.01
    assert os.path.basename(quick.model) == "llama-8b-4-layers"
    model = serve.write_shape(tmp_path / "model", serve.LLAMA_1B)
    real = case_of(tmp_path, model, "--tensor-parallel", "2", "--transport", "fused", "--engine", '{"seed": 7}')
    assert shape.engine is None and serve.llm_arguments(serve.sized(real), "raw", 4096)["seed"] == 7
    assert (
        not real.dummy and real.logprobs and real.processes == "spawn" and real.settings["transport"] == "fused"
    )
    assert (real.prompt_tokens, real.prompts, real.new_tokens) == (((512, 4096),), 100, (16,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model's folder or --shape, one of them"),
        (["here", "--shape", "llama-1b"], "a model's folder or --shape, one of them"),
        (["here", "--layers", "2"], "--layers and --fill are for a --shape"),
        (["here", "--fill"], "--layers and --fill are for a --shape"),
        (["nowhere"], "there is no config.json in it"),
        (["--shape", "llama-1b", "--bound", "rms:0.1/rms:0.1/rms:0.1"], "argument --bound"),
        (["--shape", "llama-1b", "--bound", "rms:x"], "argument --bound"),
        (["--shape", "llama-1b", "--bound", "rms:0.05 zip"], "at most after the bound, got 'zip'"),
        (["--shape", "llama-1b", "--prompt-tokens", "9,5"], "expected a number or two as LOW,HIGH, got 9,5"),
        (["--shape", "llama-1b", "--in-flight", "4,0"], "expected at least 1, got 0"),
        (["--shape", "llama-1b", "--engine", "[7]"], "expected a JSON object, got [7]"),
        (["--shape", "llama-1b", "--engine", "{seed: 7}"], "expected a JSON object, got {seed: 7}: "),
        (["--shape", "llama-1b", "--verify", "2"], "expected a share above 0, at most 1, got 2"),
        (["--shape", "llama-1b", "--prompt-file", "here/config.json", "--prompt-tokens", "5"], "does not go"),
        (["--shape", "llama-1b", "--tensor-parallel", "2", "--processes", "one"], "takes more processes"),
        (["--shape", "llama-1b", "--sets", "1"], "nothing would be restored"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(present, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    serve.write_shape(tmp_path / "here", serve.LLAMA_1B)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["serve", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_missing_is_named(monkeypatch, capsys):
    installed = set()
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name in installed or None)
    assert bench.main(["serve", "--shape", "llama-8b"]) == 1
    assert "bench.py serve: torch is not installed: install vLLM" in capsys.readouterr().err
    installed.add("torch")
    assert serve.missing().startswith("vllm is not installed")
    installed.add("vllm")
    monkeypatch.setattr(machine, "gpu_missing", lambda: "no device")
    assert serve.missing() == "vLLM runs on a GPU here: no device"
    monkeypatch.setattr(machine, "gpu_missing", lambda: None)
    monkeypatch.setitem(sys.modules, "vllm_patch", None)  # as an import that fails
    assert "vllm_patch" in serve.missing()
    calls = []
    monkeypatch.setitem(sys.modules, "vllm_patch", types.SimpleNamespace(uninstall=lambda: calls.append(1)))
    assert serve.missing() is None and calls == [1]
