"""Real vLLM, offline: requests whose KV comes back from CPU memory, uncompressed and by way of ``vllm_patch``.

Two or more sets of prompts evict each other from a GPU cache too small for all; from the second round on, each
prompt's KV is restored. Every variant runs in a process of its own, all with the same prompts:
``recompute`` (no offloading), ``raw`` (vLLM's own) and one a bound.

``python -m cuszp_cupy.evaluation.serve CASE.json RESULT.json`` is what each of those processes runs.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

LLAMA_8B = {  # the shape alone: 32 layers, 8 KV heads of 128; to be filled with dummy weights
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
FIRST_LOGPROBS = 100  # most likely first tokens that distributions are compared on


@dataclass
class Case:
    """What is served, and how; one variant of it is one process.

    Args:
        model: a folder.    dummy: random weights (the folder needs config.json alone).
        prompt_tokens: shortest and longest prompt.    prompts: in a set.    sets: that evict each other.
        prompt_file: JSON list of prompts as token ids, at least sets x prompts; random tokens when None.
        new_tokens: of each request.    in_flight: requests submitted at once; each in a pass of its own.
        repeats: restored rounds for each.    gpu_tokens: size of the GPU's cache.    cpu_gb: of the CPU's, GiB.
        beside: seconds of restores beside decoding requests; 0: none.
        processes: ``one``, or how vLLM starts its own: ``fork``, ``spawn``.
        settings: of ``vllm_patch.configure``, besides the bound.    engine: more arguments of ``vllm.LLM``.
    """

    model: str
    dummy: bool = False
    prompt_tokens: tuple[int, int] = (8000, 8000)
    prompts: int = 16
    sets: int = 2
    prompt_file: str | None = None
    new_tokens: int = 1
    in_flight: tuple[int, ...] = (1, 4, 16)
    repeats: int = 3
    gpu_tokens: int = 144_000
    cpu_gb: float = 36.0
    beside: float = 0.0
    logprobs: bool = False
    tensor_parallel: int = 1
    processes: str = "one"
    settings: dict | None = None
    engine: dict | None = None


def write_shape(folder: Path, config: dict = LLAMA_8B) -> str:
    """Write a model folder for ``dummy``; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


# --- in front -----------------------------------------------------------------------------------------------
def serve(case: Case, bounds=("rms:0.05",), step=lambda text: None, timeout: float = 1800) -> dict:
    """Run ``case`` in all variants; return their results, compared.

    Raises:
        RuntimeError: a variant failed; the message ends with what it printed last.
    """
    variants = {}
    for name in ("recompute", "raw", *bounds):
        step(f"serve {name}")
        variants[name] = _run(case, name, timeout)
    rows = [row | {"variant": name} for name, result in variants.items() for row in summary(result)]
    compared = {
        name: compare(variants["raw"], variants[name]) for name in variants if name not in ("raw", "recompute")
    }
    notes = ["dummy weights: the ratio is that of their KV, not of a trained model's"] if case.dummy else []
    kept = ("transfers", "stats", "beside", "vllm", "start_s")
    return {
        "case": asdict(case), "rows": rows, "compared_with_raw": compared, "notes": notes,
        "variants": {name: {key: result[key] for key in kept} for name, result in variants.items()},
    }  # fmt: skip


def _run(case: Case, variant: str, timeout: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        arguments, result = Path(folder) / "case.json", Path(folder) / "result.json"
        arguments.write_text(json.dumps({"case": asdict(case), "variant": variant, "stats_dir": folder}))
        command = [sys.executable, "-m", "cuszp_cupy.evaluation.serve", str(arguments), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(case))
        if done.returncode or not result.exists():
            raise RuntimeError(
                f"serve {variant} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-4000:]}"
            )
        return json.loads(result.read_text(encoding="utf-8"))


def environment(case: Case) -> dict[str, str]:
    """Return the variables of a variant's process: none of ours but what it sets itself."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("CUSZP_")}
    own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if case.processes == "one" else "1"
    if case.processes != "one":
        own["VLLM_WORKER_MULTIPROC_METHOD"] = case.processes
    return own


def summary(result: dict) -> list[dict]:
    """Return a row a kind of round: requests/s, and p50, p90 and p99 of the time to the first token, ms."""
    rows, kinds = [], {}
    for one in result["rounds"]:
        kinds.setdefault((one["what"], one["in_flight"]), []).append(one)
    for (what, in_flight), rounds in kinds.items():
        first = np.concatenate([one["first_token_ms"] for one in rounds])
        requests, seconds = sum(one["requests"] for one in rounds), sum(one["seconds"] for one in rounds)
        percentiles = dict(zip(("p50", "p90", "p99"), np.percentile(first, (50, 90, 99)).tolist(), strict=True))
        rows.append(
            {"what": what, "in_flight": in_flight, "requests": requests, "requests_per_s": requests / seconds}
            | {f"first_token_ms_{name}": value for name, value in percentiles.items()}
            | {"restored_share": float(np.mean([share for one in rounds for share in one["cached_share"]]))}
        )
    return rows


def compare(raw: dict, other: dict) -> dict:
    """Return how restored requests of ``other`` differ from those of ``raw``, prompt by prompt.

    ``same_tokens``: share of equal tokens before the first that differs, of all; ``same_first``: share of equal
    first tokens; ``first_kl``: mean KL divergence of the first token's distribution, nats, None if not recorded.
    """
    pairs = [(raw["restored"][key], other["restored"][key]) for key in sorted(raw["restored"])]
    agreed = [_common(a["tokens"], b["tokens"]) / max(len(a["tokens"]), 1) for a, b in pairs]
    divergences = [kl(a["first"], b["first"]) for a, b in pairs if a["first"] and b["first"]]
    return {
        "requests": len(pairs), "same_tokens": float(np.mean(agreed)),
        "same_first": float(np.mean([a["tokens"][:1] == b["tokens"][:1] for a, b in pairs])),
        "first_kl": float(np.mean(divergences)) if divergences else None,
    }  # fmt: skip


def _common(a: list, b: list) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def kl(p: dict[str, float], q: dict[str, float]) -> float:
    """Return the KL divergence of two distributions, of which the largest log probabilities are known.

    Tokens that only ``p`` lists have at most the smallest probability that ``q`` lists, which is what is taken;
    what neither lists counts as one more token.

    >>> round(kl({"1": math.log(0.5), "2": math.log(0.5)}, {"1": math.log(0.25), "2": math.log(0.75)}), 4)
    0.1438
    """
    lowest = min(q.values())
    other = [q.get(token, lowest) for token in p]
    total = sum(math.exp(x) * (x - y) for x, y in zip(p.values(), other, strict=True))
    rest, other_rest = (max(0.0, 1 - sum(map(math.exp, values))) for values in (p.values(), other))
    if rest > 1e-6 and other_rest > 1e-6:
        total += rest * math.log(rest / other_rest)
    return max(total, 0.0)


# --- in each process ----------------------------------------------------------------------------------------
def main(arguments: str, result: str) -> None:
    """Serve one variant; write its result."""
    given = json.loads(Path(arguments).read_text(encoding="utf-8"))
    case, variant = Case(**given["case"]), given["variant"]
    if variant not in ("recompute", "raw"):
        import vllm_patch

        vllm_patch.configure(bound=variant, stats_dir=given["stats_dir"], **(case.settings or {}))
    transfers: list[tuple[str, int, float]] = []
    if variant != "recompute" and case.processes == "one":
        _watch(transfers)
    from vllm import LLM, SamplingParams, __version__

    began = time.perf_counter()
    llm = LLM(**llm_arguments(case, variant))
    start_s = time.perf_counter() - began
    params = SamplingParams(
        max_tokens=case.new_tokens, temperature=0, detokenize=False, ignore_eos=True,
        logprobs=FIRST_LOGPROBS if case.logprobs else None,
    )  # fmt: skip
    sets = prompts(case)
    rounds, restored = [], {}
    for number, some in enumerate(sets):
        rounds.append(_round(llm, params, some, len(some), "first", number)[0])
    for in_flight in case.in_flight:
        for _ in range(case.repeats):
            for number, some in enumerate(sets):
                one, outputs = _round(llm, params, some, in_flight, "restored", number)
                rounds.append(one)
                for i, output in enumerate(outputs):
                    restored.setdefault(f"{number}/{i}", _record(output))
    beside = _beside(llm, sets, case.beside) if case.beside else None
    written = [json.loads(path.read_text()) for path in sorted(Path(given["stats_dir"]).glob("cuszp-*.json"))]
    if case.processes == "one" and "vllm_patch" in sys.modules:
        written = sys.modules["vllm_patch"].stats()
    Path(result).write_text(
        json.dumps({
            "rounds": rounds, "restored": restored, "transfers": speeds(transfers), "stats": written,
            "beside": beside, "vllm": __version__, "start_s": start_s,
        }),
        encoding="utf-8",
    )  # fmt: skip


def llm_arguments(case: Case, variant: str) -> dict:
    """Return the arguments of ``vllm.LLM``."""
    longest = case.prompt_tokens[1] + case.new_tokens + 16
    arguments = dict(
        model=case.model, load_format="dummy" if case.dummy else "auto", skip_tokenizer_init=True,
        enforce_eager=True, attention_backend="FLASH_ATTN", dtype="bfloat16", max_model_len=longest,
        max_num_batched_tokens=max(8192, longest), num_gpu_blocks_override=case.gpu_tokens // 16,
        disable_log_stats=False, tensor_parallel_size=case.tensor_parallel, seed=0,
        max_logprobs=FIRST_LOGPROBS,
    )  # fmt: skip
    if variant != "recompute":
        arguments["kv_transfer_config"] = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(case.cpu_gb * 2**30)},
        }
    return arguments | (case.engine or {})


def prompts(case: Case) -> list[list[list[int]]]:
    """Return the sets of prompts, as token ids; the same for every variant."""
    if case.prompt_file:
        every = json.loads(Path(case.prompt_file).read_text(encoding="utf-8"))
        if len(every) < case.sets * case.prompts:
            raise ValueError(f"prompt_file: expected {case.sets * case.prompts} prompts, got {len(every)}")
    else:
        config = json.loads((Path(case.model) / "config.json").read_text(encoding="utf-8"))
        rng, (low, high) = np.random.default_rng(0), case.prompt_tokens
        lengths = rng.integers(low, high + 1, case.sets * case.prompts)
        every = [rng.integers(10, config["vocab_size"], n).tolist() for n in lengths]
    return [every[i * case.prompts : (i + 1) * case.prompts] for i in range(case.sets)]


def _round(llm, params, some, in_flight: int, what: str, number: int):
    """Generate for all prompts of a set, ``in_flight`` at once; return (what was measured, outputs)."""
    outputs, seconds = [], 0.0
    for at in range(0, len(some), in_flight):
        requests = [{"prompt_token_ids": prompt} for prompt in some[at : at + in_flight]]
        began = time.perf_counter()
        outputs += llm.generate(requests, params, use_tqdm=False)
        seconds += time.perf_counter() - began
    return {
        "what": what, "set": number, "in_flight": in_flight, "requests": len(outputs), "seconds": seconds,
        "first_token_ms": [1e3 * output.metrics.first_token_latency for output in outputs],
        "cached_share": [(output.num_cached_tokens or 0) / len(output.prompt_token_ids) for output in outputs],
    }, outputs  # fmt: skip


def _record(output) -> dict:
    first = output.outputs[0].logprobs
    known = {str(token): one.logprob for token, one in first[0].items()} if first else {}
    return {"tokens": list(output.outputs[0].token_ids), "first": known}


def _beside(llm, sets, seconds: float, decoders: int = 4) -> dict:
    """Restore prompts for a while beside decoding requests; return tokens and requests a second."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    options = dict(temperature=0, detokenize=False, ignore_eos=True)
    room = engine.model_config.max_model_len
    endless = SamplingParams(max_tokens=room - 80, **options)
    short = SamplingParams(max_tokens=1, **options)
    queue = [prompt for some in sets for prompt in some]
    for i in range(decoders):
        engine.add_request(f"decode-{i}", {"prompt_token_ids": queue[i][:64]}, endless)
    tokens, finished, number, began = {}, 0, 0, None
    while began is None or time.perf_counter() - began < seconds:
        for output in engine.step():
            if output.request_id.startswith("decode"):
                tokens[output.request_id] = len(output.outputs[0].token_ids)
            elif output.finished:
                finished += 1
        waiting = number - finished
        if len(tokens) == decoders and min(tokens.values()) > 16 and began is None:
            began, before, finished_before = time.perf_counter(), sum(tokens.values()), finished
        if began is not None and waiting < 2:
            engine.add_request(f"restore-{number}", {"prompt_token_ids": queue[number % len(queue)]}, short)
            number += 1
        if max(tokens.values(), default=0) > room - 128:
            break  # the decoding requests are full
    elapsed = time.perf_counter() - began
    made, done = sum(tokens.values()) - before, finished - finished_before
    engine.abort_request([f"decode-{i}" for i in range(decoders)])
    while engine.has_unfinished_requests():
        engine.step()
    return {"seconds": elapsed, "decoded_tokens_per_s": made / elapsed, "restored_requests_per_s": done / elapsed}


def _watch(transfers: list) -> None:
    """Record what vLLM's handlers time, by events on their streams: the same for its own copies and for ours."""
    from vllm.v1.kv_offload.cpu import gpu_worker

    handler = gpu_worker.SingleDirectionOffloadingHandler
    original = handler.get_finished

    def get_finished(self):
        results = original(self)
        way = "store" if self.gpu_to_cpu else "load"
        transfers.extend((way, result.transfer_size, result.transfer_time) for result in results)
        return results

    handler.get_finished = get_finished


def speeds(transfers) -> dict:
    """Return, each way, calls, raw bytes, seconds, and GB/s of all and of the large ones (100 MB or more)."""
    found = {}
    for way in ("store", "load"):
        some = [(size, seconds) for direction, size, seconds in transfers if direction == way]
        large = [one for one in some if one[0] >= 100e6]
        found[way] = {
            "calls": len(some), "bytes": sum(size for size, _ in some), "seconds": sum(s for _, s in some),
            "gbps": _gbps(some), "large_calls": len(large), "large_gbps": _gbps(large),
        }  # fmt: skip
    return found


def _gbps(some) -> float | None:
    seconds = sum(s for _, s in some)
    return sum(size for size, _ in some) / seconds / 1e9 if seconds else None


if __name__ == "__main__":
    main(*sys.argv[1:])
