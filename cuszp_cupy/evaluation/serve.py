"""Real vLLM, offline: requests whose KV comes back from CPU memory, uncompressed and by way of ``vllm_patch``.

Two or more sets of prompts evict each other from a GPU cache too small for all; from the second round on, each
prompt's KV is restored. The first restored round of each range of lengths is not timed. Every variant runs in a
process of its own, all with the same prompts: ``recompute`` (no offloading, one round), ``raw`` (vLLM's own) and
one a bound, which may name a coding and a transport as well: ``rms:0.05 entropy fused``. Computing a prompt
again takes the GPU about as long whatever is in flight: ``recompute`` measures the pass with the most in flight
alone.

``python -m cuszp_cupy.evaluation.serve CASE.json RESULT.json`` is what each of those processes runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cuszp_cupy.bound import parse_parts
from cuszp_cupy.evaluation import codec, data, machine, timing
from cuszp_cupy.pipeline import TRANSPORTS

LLAMA_8B = {  # the shape alone: 32 layers, 8 KV heads of 128; to be filled with dummy weights
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
LLAMA_1B = LLAMA_8B | {  # 16 layers, 8 KV heads of 64
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"llama-8b": LLAMA_8B, "llama-1b": LLAMA_1B}
WORDS = {"coding": codec.KV_CODINGS, "transport": TRANSPORTS}  # that may follow the bound in a variant's name
FIRST_LOGPROBS = 100  # most likely first tokens that distributions are compared on
PASS = ("prompt_tokens", "new_tokens", "in_flight")  # what sets apart passes over the same prompts
PERCENTILES = tuple(range(0, 101, 5))  # of the time to the first token, kept for its distribution
WARM_TOKENS = 4096  # of the prompt that comes before all others, at most
DECODERS = 4  # requests that decode beside restores
RESTORED = 0.9  # share of prompts that came from a cache, from which on it was restored that decoding ran beside
LARGE = 50e6  # bytes of a transfer whose speed is that of the link, not of its start


@dataclass
class Case:
    """What is served, and how; one variant of it is one process.

    Args:
        model: a folder.    dummy: random weights (the folder needs config.json alone).
        fill: scale the dummy weights of K and V, so that pages compress as those of real KV (``kv_scales``).
        prompt_tokens: ranges of the prompts' length, shortest and longest; one after the other, with sets of
            their own.
        prompts: in a set; of shorter ranges as many more as make as many tokens.    sets: that evict each other.
        prompt_file: JSON list of prompts as token ids, at least sets x prompts; random tokens when None.
        new_tokens: of each request.    in_flight: requests submitted at once; each of both in a pass of its own.
        first_in_flight: submitted at once where a set is computed and stored, the sets in turn; None: all of it.
        repeats: restored rounds for each.    recompute: run without offloading too, one round, most in flight.
        gpu_tokens: size of the GPU's cache.    cpu_gb: of the CPU's, GiB. None: as the prompts need (``sized``).
        beside: seconds of decoding alone, then of restores beside it; 0: none.
        beside_rate: restores a second beside it; None: two at any time, so that a faster link does more of them.
        processes: ``one``, or how vLLM starts its own: ``fork``, ``spawn``. Transfers are timed in ``one`` only.
        settings: of ``vllm_patch.configure``, where a variant names none.    engine: more of ``vllm.LLM``.
    """

    model: str
    dummy: bool = False
    fill: bool = False
    prompt_tokens: tuple[tuple[int, int], ...] = ((8000, 8000),)
    prompts: int = 16
    sets: int = 2
    prompt_file: str | None = None
    new_tokens: tuple[int, ...] = (1,)
    in_flight: tuple[int, ...] = (1, 4, 16)
    first_in_flight: tuple[int, ...] | None = None
    repeats: int = 3
    recompute: bool = True
    gpu_tokens: int | None = None
    cpu_gb: float | None = None
    beside: float = 0.0
    beside_rate: float | None = None
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
def missing() -> str | None:
    """Return what stands in the way of ``serve`` and what to do, in a sentence; None if nothing does."""
    for name in ("torch", "vllm"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: install vLLM (pip install vllm), which brings its own torch"
    if (why := machine.gpu_missing()) is not None:
        return f"vLLM runs on a GPU here: {why}"
    try:
        import vllm_patch  # refuses a vLLM that it does not know
    except (ImportError, ValueError) as error:
        return str(error)
    vllm_patch.uninstall()  # the variants' processes patch themselves
    return None


def sized(case: Case, resident: bool = False) -> Case:
    """Return ``case`` with the sizes of the caches: the GPU's holds a set and an eighth, the CPU's all sets.

    ``resident``: a cache of the GPU that holds all sets is right; nothing is restored then.

    Raises:
        ValueError: prompts that evict nothing or do not fit, or a config.json that does not tell the size of KV.
    """
    sets = prompts(case)
    largest = max(_tokens(some, case) for group in sets.values() for some in group)
    most = max(sum(_tokens(some, case) for some in group) for group in sets.values())
    least = min(sum(_tokens(some, case) for some in group) for group in sets.values())
    case = replace(case, gpu_tokens=case.gpu_tokens or math.ceil(largest * 9 / 8 / 16) * 16)
    if _longest(sets) + max(case.new_tokens) > case.gpu_tokens:
        raise ValueError(f"a GPU cache of {case.gpu_tokens} tokens: the longest prompt has {_longest(sets)}")
    if least <= case.gpu_tokens and not resident:
        raise ValueError(
            f"the GPU cache holds {case.gpu_tokens} tokens, and all sets of a range only {least}: nothing would "
            "be restored; take more sets or prompts, or a smaller cache"
        )
    if case.cpu_gb is None:
        config = json.loads((Path(case.model) / "config.json").read_text(encoding="utf-8"))
        case = replace(case, cpu_gb=math.ceil(1.1 * most * kv_bytes(config) / 2**30 * 2) / 2)
    return case


def settings_of(variant: str) -> dict[str, str | int]:
    """Return what a variant's name sets of ``vllm_patch.configure``: a bound, then words of WORDS in any order.

    ``ring=512``: a ring of 512 MiB.

    >>> settings_of("rms:0.05/rms:0.1 staged entropy")
    {'bound': 'rms:0.05/rms:0.1', 'transport': 'staged', 'coding': 'entropy'}

    Raises:
        ValueError: no bound, an unknown word, or two for one setting.
    """
    bound, *words = variant.split() or [""]
    parse_parts(bound, 2)
    found = {"bound": bound}
    for word in words:
        ring = re.fullmatch(r"ring=([1-9]\d*)", word)
        name = "ring_mb" if ring else next((name for name, known in WORDS.items() if word in known), None)
        if name is None or name in found:
            expected = "; ".join(f"one {name} of {', '.join(known)}" for name, known in WORDS.items())
            expected += "; one ring=MIB, at most after the bound"
            raise ValueError(f"{variant!r}: expected {expected}, got {word!r}")
        found[name] = int(ring[1]) if ring else word
    return found


def _tokens(some, case: Case) -> int:
    return sum(len(prompt) + max(case.new_tokens) for prompt in some)


def _longest(sets) -> int:
    return max(len(prompt) for group in sets.values() for some in group for prompt in some)


def kv_bytes(config: dict) -> int:
    """Return the bytes of a token's KV, 16 bits a value, from a model's ``config.json``.

    >>> kv_bytes(LLAMA_8B)
    131072
    """
    config = config.get("text_config", config)
    try:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return 2 * 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    except KeyError as error:
        raise ValueError(f"config.json has no {error}: say how large the CPU's cache is to be") from None


def serve(
    case: Case, bounds=("rms:0.05",), step=lambda text: None, timeout: float = 1800, resident: bool = False
) -> dict:
    """Run ``case`` in all variants; return their results, compared. No path of this machine is in them.

    ``resident``: see ``sized``.

    Raises:
        RuntimeError: a variant failed; the message ends with what it printed last.
        ValueError: as from ``sized``.
    """
    case, variants = sized(case, resident), {}
    for name in (*(["recompute"] if case.recompute else []), "raw", *bounds):
        step(f"vLLM, {name}")
        variants[name] = _run(case, name, timeout)
    return result_of(case, variants)


def result_of(case: Case, variants: dict[str, dict]) -> dict:
    """Return what ``serve`` does, from what the variants' processes wrote."""
    patched = [name for name in variants if name not in ("recompute", "raw")]
    rows = [row | {"variant": name} for name, result in variants.items() for row in summary(result)]
    notes, problems = [], []
    if case.dummy:
        filled = "K and V are scaled by channel as real KV is, and compress about as real pages do"
        plain = "K and V are Gaussian, and compress a little less than real pages do"
        notes.append(
            "Dummy weights: ratio, tokens and KL are not representative of a trained model; "
            f"{filled if case.fill else plain}."
        )
    if case.processes != "one" or case.tensor_parallel > 1:
        notes.append("Transfers were not timed: that takes one process.")
    if (case.settings or {}).get("verify"):
        notes.append("Speeds with verify mean nothing: it waits at each transfer.")
    for name in patched:
        problems += [f"{name}: {problem}" for problem in _problems(case, variants[name]["stats"])]
    for name, variant in variants.items():
        if case.beside and name != "recompute" and not restores_beside(variant):
            problems.append(f"{name}: the prompts that decoding ran beside were computed, not restored")
    kept = ("transfers", "stats", "beside", "vllm", "start_s", "host_bytes")
    result = {
        "case": described(case), "rows": rows,
        "agreement": [
            {"variant": name, "against": against} | compare(variants[against], variants[name])
            for against in ("recompute", "raw") if against in variants
            for name in variants if name not in ("recompute", against)
        ],
        "notes": notes, "problems": problems,
        "variants": {name: {key: result[key] for key in kept} for name, result in variants.items()},
    }  # fmt: skip
    for one in (one for variant in result["variants"].values() for one in variant["stats"]):
        one["settings"] = {key: value for key, value in one["settings"].items() if key != "stats_dir"}
    return result | {"over_raw": {name: over_raw(result, name) for name in patched}}


def described(case: Case) -> dict:
    """Return the case as plain values, folders and files by their names alone."""
    values = asdict(case) | {"model": Path(case.model).resolve().name}
    if case.prompt_file:
        values["prompt_file"] = Path(case.prompt_file).name
    return values


def _problems(case: Case, stats: list[dict]) -> list[str]:
    """Return what makes the numbers of a bound those of something else."""
    if len(stats) != case.tensor_parallel:
        return [
            f"{len(stats)} of {case.tensor_parallel} workers say that they are patched; is cuszp_cupy installed?"
        ]
    found = []
    for one in stats:
        for way in ("store", "load"):
            if not sum(pipeline[way]["pages"] for pipeline in one["pipelines"]):
                found.append(f"no {way} was compressed; passed through: {one['passed_through'] or 'nothing'}")
        failed = sum(pipeline["failed_pages"] for pipeline in one["pipelines"])
        if failed:
            found.append(f"{failed} pages came back damaged")
        if (case.settings or {}).get("verify") and not all(
            "verified" in pipeline for pipeline in one["pipelines"]
        ):
            found.append("pages were not verified")
    return found


def over_raw(result: dict, bound: str) -> dict:
    """Return how many times raw's speeds those of ``bound`` are: what the comparison is made for."""

    def rates(variant):
        restored = (row for row in result["rows"] if row["variant"] == variant and row["what"] == "restored")
        return {tuple(row[key] for key in PASS): row["requests_per_s"] for row in restored}

    ours = rates(bound)
    times = [dict(zip(PASS, one, strict=True)) | {"times": ours[one] / raw} for one, raw in rates("raw").items()]
    found = {"restored_requests": times}
    both = [result["variants"][name] for name in (bound, "raw")]
    for way in ("load", "store"):
        found[way] = _over(*(one["transfers"][way]["gbps"] for one in both))
        found[f"large_{way}"] = _over(*(one["transfers"][way]["large_gbps"] for one in both))
    both = [one["beside"] if restores_beside(one) else {} for one in both]
    found["decoded_tokens"] = _over(*(one.get("decoded_tokens_per_s") for one in both))
    return found


def restores_beside(variant: dict) -> bool:
    """Whether the prompts beside which a variant decoded were restored."""
    return ((variant["beside"] or {}).get("cached_share") or 0) >= RESTORED


def _over(ours: float | None, raw: float | None) -> float | None:
    return ours / raw if ours and raw else None


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
    root = str(Path(__file__).parents[2])  # a checkout need not be installed, unless vLLM spawns
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (root, own.get("PYTHONPATH"))))
    own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if case.processes == "one" else "1"
    if case.fill:
        own["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # fill_kv is sent to vLLM's own processes, none else
    if case.processes != "one":
        own["VLLM_WORKER_MULTIPROC_METHOD"] = case.processes
    return own


def summary(result: dict) -> list[dict]:
    """Return a row a kind of round: requests/s; p50, p90 and p99 of the times to first and last token, ms.

    ``first_token_ms_percentiles``: its whole distribution, at PERCENTILES.
    ``spread_percent``: half the interquartile range of the rounds' requests/s, of their median; None for one.
    ``seconds``: of all rounds. ``d2h_`` and ``h2d_``: what ``speeds`` tells of the transfers whose end vLLM
    noticed in these rounds, ``ms`` of them a request, and ``share``: their seconds over the rounds'.
    ``host_ms``: part -> ms of the host a request (``Spent``), ``other``: the rest. None: not timed.
    """
    rows, kinds = [], {}
    for one in result["rounds"]:
        kinds.setdefault((one["what"], *(one[key] for key in PASS)), []).append(one)
    for (what, *one), rounds in kinds.items():
        first = np.concatenate([one["first_token_ms"] for one in rounds])
        requests, seconds = sum(one["requests"] for one in rounds), sum(one["seconds"] for one in rounds)
        latencies = {"first_token": first, "end_to_end": np.concatenate([one["end_to_end_ms"] for one in rounds])}
        percentiles = {
            f"{what}_ms_p{p}": float(np.percentile(ms, p)) for what, ms in latencies.items() for p in (50, 90, 99)
        }
        rates = [one["requests"] / one["seconds"] for one in rounds]
        spread = timing.summary(rates).spread_percent if len(rates) > 1 else None
        rows.append(
            dict(zip(PASS, one, strict=True))
            | {"what": what, "requests": requests, "seconds": seconds}
            | {"requests_per_s": requests / seconds, "spread_percent": spread}
            | percentiles
            | {"first_token_ms_percentiles": np.percentile(first, PERCENTILES).tolist()}
            | {"cached_share": float(np.mean([share for one in rounds for share in one["cached_share"]]))}
            | {"host_ms": _host_ms([one["host_s"] for one in rounds], requests, seconds)}
            | _moved([one["transfers"] for one in rounds], requests, seconds)
        )
    return rows


def _host_ms(parts: list, requests: int, seconds: float) -> dict[str, float] | None:
    """Return ``host_ms`` of a row: see ``summary``."""
    if None in parts:
        return None
    total = sum(map(Counter, parts), Counter())
    return {part: 1e3 * s / requests for part, s in [*total.items(), ("other", seconds - total.total())]}


def _moved(transfers: list, requests: int, seconds: float) -> dict:
    """Return the entries ``d2h_`` and ``h2d_`` of a row: see ``summary``."""
    keys, timed = ("calls", "bytes", "seconds", "gbps"), None not in transfers
    found = speeds([one for some in transfers for one in some]) if timed else {}
    row = {}
    for name, way in (("d2h", "store"), ("h2d", "load")):
        row |= {f"{name}_{key}": found[way][key] if timed else None for key in keys}
        row[f"{name}_ms"] = 1e3 * found[way]["seconds"] / requests if timed else None
        row[f"{name}_share"] = found[way]["seconds"] / seconds if timed else None
    return row


def compare(one: dict, other: dict) -> dict:
    """Return how restored requests of ``other`` differ from those of ``one``, prompt by prompt; most in flight.

    ``same_all``: share of requests whose tokens are all equal; ``same_tokens``: share of equal tokens before the
    first that differs, of all; ``same_first``: share of equal first tokens; ``first_kl``: mean KL divergence of
    the first token's distribution, nats, None if not recorded.
    """
    pairs = [(one["restored"][key], other["restored"][key]) for key in sorted(one["restored"])]
    agreed = [_common(a["tokens"], b["tokens"]) / max(len(a["tokens"]), 1) for a, b in pairs]
    divergences = [kl(a["first"], b["first"]) for a, b in pairs if a["first"] and b["first"]]
    return {
        "requests": len(pairs), "same_all": float(np.mean([a["tokens"] == b["tokens"] for a, b in pairs])),
        "same_tokens": float(np.mean(agreed)),
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

        vllm_patch.configure(stats_dir=given["stats_dir"], **(case.settings or {}) | settings_of(variant))
    transfers: list[tuple[str, int, float]] = []
    timed, spent = case.processes == "one", Spent()
    if variant != "recompute" and timed:
        _watch(transfers, spent)
    from vllm import LLM, SamplingParams, __version__

    began, sets = time.perf_counter(), prompts(case)
    llm = LLM(**llm_arguments(case, variant, _longest(sets)))
    if case.fill:
        from cuszp_cupy.evaluation import serve  # by its name: __main__ is another module in vLLM's processes

        llm.apply_model(serve.fill_kv)
    start_s = time.perf_counter() - began
    if timed:
        _watch_engine(llm, spent)
    params = {
        n: SamplingParams(
            max_tokens=n, temperature=0, detokenize=False, ignore_eos=True,
            logprobs=FIRST_LOGPROBS if case.logprobs else None,
        ) for n in case.new_tokens
    }  # fmt: skip
    rounds, restored, most, beside, held = [], {}, max(case.new_tokens), None, []
    warm = [7] * min(WARM_TOKENS, case.gpu_tokens // 16, _longest(sets))  # kernels are loaded before timing
    llm.generate([{"prompt_token_ids": warm}], params[most], use_tqdm=False)
    transfers.clear()
    longest = max(sets.values(), key=_mean)
    for label, group in sets.items():

        def measure(what, number, in_flight, new_tokens, group=group, label=label):
            begin, before = len(transfers), spent.seconds.copy()
            with nvtx_range(f"{what}: prompts of {label}, {new_tokens} new, {in_flight} in flight"):
                one, outputs = _round(llm, params[new_tokens], group[number], in_flight, what, number)
            one["transfers"] = transfers[begin:] if timed else None
            one["host_s"] = dict(spent.seconds - before) if timed else None
            held.append(machine.resident())
            rounds.append(one | {"prompt_tokens": label, "new_tokens": new_tokens})
            return outputs

        for number, some in enumerate(group):
            at_once = case.first_in_flight or (len(some),)
            measure("first", number, min(at_once[number % len(at_once)], len(some)), case.new_tokens[0])
        every = passes(case, group, variant)
        recorded = most, max(n for _, n in every)  # the one pass that every variant has
        for some in () if variant == "recompute" else group:  # what restored requests are the first to need
            _round(llm, params[most], some, recorded[1], "warm-up", 0)
        for new_tokens, in_flight in every:
            for _ in range(1 if variant == "recompute" else case.repeats):
                for number in range(len(group)):
                    outputs = measure("restored", number, in_flight, new_tokens)
                    for i, output in enumerate(outputs if (new_tokens, in_flight) == recorded else []):
                        restored.setdefault(f"{label}/{number}/{i}", _record(output))
        if case.beside and group is longest:  # before the next range evicts it from the CPU
            beside = _beside(llm, group, case)
    if case.processes == "one" and case.tensor_parallel == 1:
        written = sys.modules["vllm_patch"].stats() if "vllm_patch" in sys.modules else []
    else:
        time.sleep(1.2)  # workers write once a second, at the end of a step: let one more end
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], params[most], use_tqdm=False)
        written = [json.loads(path.read_text()) for path in sorted(Path(given["stats_dir"]).glob("cuszp-*.json"))]
    Path(result).write_text(
        json.dumps({
            "rounds": rounds, "restored": restored, "transfers": speeds(transfers), "stats": written,
            "beside": beside, "vllm": __version__, "start_s": start_s,
            "host_bytes": held if timed else None,
        }),
        encoding="utf-8",
    )  # fmt: skip


def fill_kv(model) -> None:
    """Scale the rows of a vLLM model's K and V projections by ``kv_scales``, as dummy weights left them."""
    import torch

    layers = [layer for layer in model.modules() if hasattr(layer, "qkv_proj") and hasattr(layer, "kv_size")]
    if not layers:
        raise ValueError("fill: this model has no qkv_proj to scale; shapes of Llama have")
    for i, layer in enumerate(layers):
        both = layer.qkv_proj.weight.data[-2 * layer.kv_size :].split(layer.kv_size)
        scales = kv_scales(i, len(layers), layer.kv_size // layer.head_dim, layer.head_dim)
        for rows, own in zip(both, scales, strict=True):
            with torch.inference_mode():  # which the weights may have been made in
                rows.mul_(rows.new_tensor(own.reshape(-1, 1)))


def kv_scales(layer: int, num_layers: int, heads: int, head_size: int) -> np.ndarray:
    """Return factors ``[K and V, heads, head_size]`` that make K and V of dummy weights compress as real KV.

    Dummy weights make K and V Gaussian, all channels alike. The factors are the channels' RMS in the sample of
    ``cuszp_cupy/data``, relative to their layer's; both halves of a head alike, since RoPE turns them into each
    other; and levels of layers spread over an octave, because a step is a power of two.
    """
    mean_square = (data.kv_sample().astype(np.float64) ** 2).mean(axis=3)  # [layer, K or V, head, channel]
    mean_square = mean_square[layer % len(mean_square)].reshape(2, -1)
    relative = np.sqrt(mean_square / mean_square.mean(axis=1, keepdims=True))
    halves = np.stack([np.resize(part, (heads, head_size // 2)) for part in relative])
    return np.tile(halves, 2) * 2 ** (layer / num_layers)


def llm_arguments(case: Case, variant: str, longest: int) -> dict:
    """Return the arguments of ``vllm.LLM``; ``longest``: tokens of a prompt."""
    longest += max(case.new_tokens) + 16
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


def prompts(case: Case) -> dict[str, list[list[list[int]]]]:
    """Return the sets of prompts of each range of lengths, as token ids; the same for every variant."""
    if case.prompt_file:
        every = json.loads(Path(case.prompt_file).read_text(encoding="utf-8"))
        if len(every) < case.sets * case.prompts:
            raise ValueError(f"prompt_file: expected {case.sets * case.prompts} prompts, got {len(every)}")
        every = every[: case.sets * case.prompts]
        return {_label(min(map(len, every)), max(map(len, every))): _split(every, case.sets)}
    config = json.loads((Path(case.model) / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("text_config", config)["vocab_size"]
    rng, longest, groups = np.random.default_rng(0), max(map(sum, case.prompt_tokens)), {}
    for low, high in case.prompt_tokens:
        lengths = rng.integers(low, high + 1, case.sets * round(case.prompts * longest / (low + high)))
        groups[_label(low, high)] = _split([rng.integers(10, vocabulary, n).tolist() for n in lengths], case.sets)
    return groups


def passes(case: Case, group, variant: str = "raw") -> list[tuple[int, int]]:
    """Return (new tokens, in flight) of each pass over the sets of a range; no more in flight than in a set."""
    at_once = list(dict.fromkeys(min(n, len(group[0])) for n in case.in_flight))
    at_once = [max(at_once)] if variant == "recompute" else at_once
    return [(new_tokens, n) for new_tokens in case.new_tokens for n in at_once]


def _label(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _split(every: list, parts: int) -> list[list]:
    size = len(every) // parts
    return [every[i * size : (i + 1) * size] for i in range(parts)]


def _mean(group) -> float:
    return float(np.mean([len(prompt) for some in group for prompt in some]))


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
        "end_to_end_ms": [1e3 * _latency(output.metrics) for output in outputs],
        "cached_share": [_cached_share(output) for output in outputs],
    }, outputs  # fmt: skip


def _cached_share(output) -> float:
    return (output.num_cached_tokens or 0) / len(output.prompt_token_ids)


def _latency(metrics) -> float:
    """Return the seconds from a request's arrival to its last token, by differences on each of vLLM's clocks."""
    return metrics.first_token_latency + metrics.last_token_ts - metrics.first_token_ts


def _record(output) -> dict:
    first = output.outputs[0].logprobs
    known = {str(token): one.logprob for token, one in first[0].items()} if first else {}
    return {"tokens": list(output.outputs[0].token_ids), "first": known}


def _beside(llm, sets, case: Case) -> dict:
    """Decode for a while alone, then beside prompts that are restored; return tokens and requests a second.

    ``cached_share``: of the prompts that were to be restored, how much came from a cache; None: there were none.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    options = dict(temperature=0, detokenize=False, ignore_eos=True)
    room = engine.model_config.max_model_len
    endless, short = SamplingParams(max_tokens=room - 80, **options), SamplingParams(max_tokens=1, **options)
    queue = [prompt for some in sets for prompt in some]
    for i in range(DECODERS):
        engine.add_request(f"decode-{i}", {"prompt_token_ids": queue[i][:64]}, endless)
    tokens, number, cached = {f"decode-{i}": 0 for i in range(DECODERS)}, 0, []

    def step():
        for output in engine.step():
            if output.request_id in tokens:
                tokens[output.request_id] = len(output.outputs[0].token_ids)
            elif output.finished:
                cached.append(_cached_share(output))

    while min(tokens.values()) < 16:
        step()
    found = {}
    for name, restores in (("decoded_tokens_per_s_alone", False), ("decoded_tokens_per_s", True)):
        began, before, elapsed = time.perf_counter(), sum(tokens.values()), 0.0
        while elapsed < case.beside and max(tokens.values()) < room - 128:  # until the decoding requests are full
            due = case.beside_rate is None or number < case.beside_rate * elapsed
            if restores and due and number - len(cached) < 2:
                engine.add_request(f"restore-{number}", {"prompt_token_ids": queue[number % len(queue)]}, short)
                number += 1
            step()
            elapsed = time.perf_counter() - began
        found[name] = (sum(tokens.values()) - before) / elapsed if elapsed else None
    found |= {"seconds": elapsed, "restored_requests_per_s": len(cached) / elapsed if elapsed else None}
    found["cached_share"] = float(np.mean(cached)) if cached else None
    engine.abort_request(list(tokens))
    while engine.has_unfinished_requests():
        engine.step()
    return found


class Spent:
    """Seconds of the host by part, ``seconds``: each without the parts that ran within it."""

    def __init__(self):
        self.seconds, self._within = Counter(), [0.0]

    @contextlib.contextmanager
    def part(self, name: str):
        self._within.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] += took - self._within.pop()
            self._within[-1] += took


def _watch_engine(llm, spent: Spent) -> None:
    """Record where the engine's host time goes; transfers are enqueued within ``model``."""
    engine = llm.llm_engine
    core = engine.engine_core.engine_core  # of one process
    parts = {
        "adding": [(engine, "add_request")],
        "scheduling": [(core.scheduler, "schedule"), (core.scheduler, "update_from_output")],
        "model": [(core.model_executor, "execute_model"), (core.model_executor, "sample_tokens")],
    }
    for part, calls in parts.items():
        for owner, name in calls:
            setattr(owner, name, _timed(getattr(owner, name), part, spent))


def _timed(call, part: str, spent: Spent):
    def timed(*args, **kwargs):
        with spent.part(part):
            return call(*args, **kwargs)

    return timed


def _watch(transfers: list, spent: Spent) -> None:
    """Record what vLLM's handlers time, by events on their streams: the same for its own copies and for ours.

    An NVTX range, ``store call`` or ``load call``, is around the call that enqueues a transfer; ``spent`` gets
    its time.
    """
    from vllm.v1.kv_offload.cpu import gpu_worker

    handler = gpu_worker.SingleDirectionOffloadingHandler
    original, start = handler.get_finished, handler.transfer_async

    def get_finished(self):
        results = original(self)
        way = "store" if self.gpu_to_cpu else "load"
        transfers.extend((way, result.transfer_size, result.transfer_time) for result in results)
        return results

    def transfer_async(self, *args, **kwargs):
        part = "store calls" if self.gpu_to_cpu else "load calls"
        with nvtx_range("store call" if self.gpu_to_cpu else "load call"), spent.part(part):
            return start(self, *args, **kwargs)

    handler.get_finished, handler.transfer_async = get_finished, transfer_async


def nvtx_range(name: str):
    """Return a context that Nsight Systems shows as ``name``; nothing where torch has no GPU."""
    torch = sys.modules.get("torch")  # vLLM's; not imported for this
    return torch.cuda.nvtx.range(name) if torch and torch.cuda.is_available() else contextlib.nullcontext()


def speeds(transfers) -> dict:
    """Return, each way, calls, raw bytes, seconds and GB/s of all, and the large ones' median and spread."""
    found = {}
    for way in ("store", "load"):
        some = [(size, seconds) for direction, size, seconds in transfers if direction == way and seconds]
        large = [size / seconds / 1e9 for size, seconds in some if size >= LARGE]
        spread = timing.summary(large).spread_percent if len(large) > 1 else None
        found[way] = {
            "calls": len(some), "bytes": sum(size for size, _ in some), "seconds": sum(s for _, s in some),
            "gbps": _gbps(some), "large_calls": len(large), "large_spread_percent": spread,
            "large_bytes": max((size for size, _ in some), default=0),
            "large_gbps": float(np.median(large)) if large else None,
        }  # fmt: skip
    return found


def _gbps(some) -> float | None:
    seconds = sum(s for _, s in some)
    return sum(size for size, _ in some) / seconds / 1e9 if seconds else None


if __name__ == "__main__":
    main(*sys.argv[1:])
