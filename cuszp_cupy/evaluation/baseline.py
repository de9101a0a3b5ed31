"""vLLM as it is, its KV offloaded uncompressed: how much of its requests' time the transfers take, at which load.

The rounds of ``serve``, variant ``raw`` (and once ``recompute``), with GPU caches of several sizes. The last one
holds all prompts, so that nothing has to come back: what the others are compared with.
"""

from __future__ import annotations

import math
from dataclasses import replace

from . import serve

GPU_SETS = (0.5, 1.125)  # sizes of the GPU's cache, in sets of prompts; fewer requests fit into the first at once
RESIDENT = "resident"  # what a round is called whose prompts were still in the GPU's cache
LINK_DECIDES = 0.5  # share of the time that transfers to the GPU take, from which on the link is said to decide


def sizes(case: serve.Case, gpu_sets=GPU_SETS) -> list[tuple[float | None, int]]:
    """Return (sets of prompts, None for all, and tokens, in blocks of 16) of each size of the GPU's cache."""
    new, sets = max(case.new_tokens), serve.prompts(case)
    largest = max(sum(len(prompt) + new for prompt in some) for group in sets.values() for some in group)
    every = max(
        sum(math.ceil((len(prompt) + new) / 16) for some in group for prompt in some) for group in sets.values()
    )
    found = [(number, math.ceil(number * largest / 16) * 16) for number in gpu_sets]
    return [*found, (None, 16 * math.ceil(1.02 * every + 2))]


def measure(case: serve.Case, gpu_sets=GPU_SETS, step=lambda text: None, timeout: float = 1800) -> dict:
    """Serve ``case`` with each GPU cache; a size that fails is a problem, and the others go on.

    Returns:
        ``case``; ``sizes``: dicts of ``gpu_sets`` (None: all), ``gpu_tokens``, ``cpu_gb``, ``start_s``, ``vllm``
        and ``transfers`` (``serve.speeds``); ``rows``: see ``rows_of``; ``notes``, ``problems``.

    Raises:
        ValueError: as from ``serve.sized``.    RuntimeError: all sizes failed.
    """
    asked = replace(case, in_flight=tuple(case.in_flight), first_in_flight=_in_turn(case.in_flight))
    cases = [(n, serve.sized(replace(asked, gpu_tokens=t), n is None)) for n, t in sizes(asked, gpu_sets)]
    results, notes, problems = [], [], []
    for number, one in cases:
        what = f"a GPU cache of {'all' if number is None else number} sets, {one.gpu_tokens} tokens"
        recompute = one.recompute and number is not None and not results  # the cache is of no use: once
        try:
            result = serve.serve(
                replace(one, recompute=recompute), (), lambda text, what=what: step(f"{what}: {text}"), timeout,
                number is None,
            )  # fmt: skip
        except RuntimeError as error:
            lines = str(error).splitlines()
            step(str(error))
            problems.append(f"{what}: {lines[0]} {lines[-1]}")  # between them may be paths of this machine
            continue
        results.append((number, one, result))
        notes = result["notes"]
    if not results:
        raise RuntimeError("\n".join(problems))
    return {
        "case": serve.described(asked),
        "sizes": [
            {"gpu_sets": number, "gpu_tokens": one.gpu_tokens, "cpu_gb": one.cpu_gb}
            | {key: result["variants"]["raw"][key] for key in ("start_s", "vllm", "transfers")}
            for number, one, result in results
        ],
        "rows": rows_of([(number, one.gpu_tokens, result["rows"]) for number, one, result in results]),
        "notes": notes, "problems": problems,
    }  # fmt: skip


def _in_turn(in_flight) -> tuple[int, ...]:
    """Return how many are computed at once, set after set: the most, then the fewest, then those between."""
    return (in_flight[-1], *in_flight[:-1])


def rows_of(results) -> list[dict]:
    """Return the rows of all sizes, from (sets, tokens, rows of ``serve.summary``) of each.

    Returns:
        those rows, with ``gpu_sets``, ``gpu_tokens`` and, of restored requests, ``added_share``: the part of
        their time that they would not take if they were still in the GPU's cache; ``over_recompute``: times the
        requests/s of computing again, for one new token with the most in flight, for more with as many (answers
        are computed together). None where there is nothing to compare with.
    """
    rows = []
    for number, tokens, some in results:
        for row in some:
            what = RESIDENT if number is None and row["what"] == "restored" else row["what"]
            rows.append({"gpu_sets": number, "gpu_tokens": tokens} | row | {"what": what})

    def rates(variant: str, what: str) -> dict:
        some = (row for row in rows if (row["variant"], row["what"]) == (variant, what))
        return {tuple(row[key] for key in serve.PASS): row["requests_per_s"] for row in some}

    resident, computed = rates("raw", RESIDENT), rates("recompute", "restored")
    computed |= {at[:2]: rate for at, rate in computed.items() if at[1] == 1}  # stands for any number in flight
    for row in rows:
        restored = (row["variant"], row["what"]) == ("raw", "restored")
        at, rate = tuple(row[key] for key in serve.PASS), row["requests_per_s"]
        row["added_share"] = 1 - rate / resident[at] if restored and at in resident else None
        again = computed.get(at, computed.get(at[:2]))
        row["over_recompute"] = rate / again if restored and again else None
    return rows


def decided_by_link(rows: list[dict]) -> list[dict]:
    """Return the rows of restored requests of whose time transfers to the GPU take LINK_DECIDES or more."""
    restored = (row for row in rows if (row["variant"], row["what"]) == ("raw", "restored"))
    return [row for row in restored if row["h2d_share"] >= LINK_DECIDES]
