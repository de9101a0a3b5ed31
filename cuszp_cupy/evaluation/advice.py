"""``bench.py report --advise``: does compression pay, with which coding and transport, from where on?

effective = min(codec, ratio x link), each way; it pays where that is more than raw copies of such pages give.
"""

from __future__ import annotations

from cuszp_cupy.evaluation import machine

WAYS = (("compress", "to_host", "D2H", "to the host"), ("decompress", "from_host", "H2D", "from the host"))
ADVICE_KIB, SECONDS = (4, 16, 64, 256), 0.3
OURS = ("staged", "fused")
LARGE, RAW, LOOP = "large copy", "raw copy", "one call a page"


def measure(step=lambda text: None) -> tuple[dict, dict]:
    """Measure on the current GPU, in about a minute; return (codec and link, swap) as result files have them."""
    from cuszp_cupy.codec import pinned
    from cuszp_cupy.evaluation import speed, swap

    described = machine.describe()
    bench = {"machine": described} | speed.gpu_rows(quick=True, step=step)
    host, rows = pinned(2 * swap.NUM_BATCHES * swap.BATCH_BYTES), []
    for kib in ADVICE_KIB:
        for kind in ("arena", "scattered"):
            step(f"swapping pages of {kib} KiB, {kind}")
            case = swap.Case(swap.page_set(kib), kind, host, "rms:0.05", "fixed")
            rows += swap.case_rows(case, SECONDS)
            case.swap.close()
    return bench, {"machine": described, "parameters": {"bound": "rms:0.05"}, "rows": rows}


def committed(bench: dict[str, dict], swap: dict[str, dict]) -> list[str]:
    """Return the advice of result files, by name: of the first with speeds, and the swap of most page sizes."""
    benches = {name: result for name, result in bench.items() if result["link"]}
    if not benches:
        return ["Not known: no speeds yet; `python bench.py --json results/bench-<machine>.json` measures them."]
    name, result = next(iter(benches.items()))
    gpu = result["machine"]["gpu"]["name"]
    swaps = {one: other for one, other in swap.items() if other["machine"]["gpu"]["name"] == gpu}
    swap_name = max(swaps, key=lambda one: len({row["page_kib"] for row in swaps[one]["rows"]}), default=None)
    files = ", ".join(f"results/{one}.json" for one in (name, swap_name) if one)
    return [f"Measured on {gpu} ({files}).", *lines(result, swaps.get(swap_name))]


def lines(bench: dict, swap: dict | None) -> list[str]:
    """Return the answers, a line each, from what was measured on one machine.

    Args:
        bench: with ``rows`` and ``link``.    swap: with ``rows``, and ``tax`` if it was measured; None: unknown.
    """
    (copy,) = (row for row in bench["link"] if row["what"] == "copy")
    link = {where: copy[f"{where}_raw_gbps"] for _, where, _, _ in WAYS}
    found = [
        "The link, in one large copy: {to_host:.1f} GB/s to the host, {from_host:.1f} from it.".format(**link)
    ]
    timed = [row for row in bench["rows"] if row["codec"].startswith("kv ") and row["compress_gbps"]]
    pays = False
    for bound in dict.fromkeys(row["bound"] for row in timed):
        best = max(
            (row for row in timed if row["bound"] == bound and row["data"] == timed[0]["data"]),
            key=lambda row: sum(effective(row, coder, link[where]) for coder, where, _, _ in WAYS),
        )
        each = [effective(best, coder, link[where]) for coder, where, _, _ in WAYS]
        times = [gbps / link[where] for gbps, (_, where, _, _) in zip(each, WAYS, strict=True)]
        limit = min(best[f"{coder}_gbps"] for coder, *_ in WAYS)
        pays |= min(times) > 1
        found.append(
            f"{bound}: {best['codec']}, ratio {best['ratio']:.2f}: up to {each[0]:.0f} GB/s to the host, "
            f"{each[1]:.0f} from it, {times[0]:.2f} and {times[1]:.2f} times the link. A link gives the whole "
            f"ratio up to {limit / best['ratio']:.0f} GB/s; from {limit:.0f} on raw copies are faster."
        )
    verdict = (
        "It pays where a server waits for the link (`python bench.py baseline MODEL` tells whether it does)."
    )
    found.insert(0, verdict if pays else "It does not pay on this link: the codec is slower.")
    if swap is None:
        return [*found, "Page sizes and transports: not measured (`python bench.py swap --json` does)."]
    for slots, raws in (("arena", (LARGE,)), ("scattered", (RAW, LOOP))):
        for *_, way, text in WAYS:
            found += _pages(slots, way, text, raws, swap["rows"])
    taxes = [(name, [row["slowdown"] for row in swap.get("tax", ()) if row["swap"] == name]) for name in OURS]
    if all(slowdowns for _, slowdowns in taxes):
        shown = ", ".join(f"{name} {max(slowdowns):.2f} times" for name, slowdowns in taxes)
        found.append(f"Work beside it takes at most: {shown} as long.")
    return found


def effective(row: dict, coder: str, link_gbps: float) -> float:
    """Return the raw GB/s to expect of a coding on a link.

    >>> effective({"compress_gbps": 100.0, "ratio": 3.0}, "compress", 25.0)
    75.0
    """
    return min(row[f"{coder}_gbps"], row["ratio"] * link_gbps)


def _pages(slots: str, way: str, text: str, raws: tuple[str, ...], rows: list[dict]) -> list[str]:
    """A line: the fastest transport, and from which page size on it beats raw copies."""
    speeds = {}
    for row in rows:
        if (row["slots"], row["direction"]) == (slots, way):
            speeds.setdefault(row["transport"], {})[row["page_kib"]] = row["gbps"]
    if not all(name in speeds for name in (*OURS, *raws)):
        return []
    best = {kib: max(OURS, key=lambda name: speeds[name][kib]) for kib in speeds[OURS[0]]}
    ours = {kib: speeds[name][kib] for kib, name in best.items()}
    shown = ", ".join(f"{kib} KiB {best[kib]} {gbps:.0f}" for kib, gbps in sorted(ours.items()))
    than = "; ".join(f"than {name} {pays_from(ours, speeds[name])}" for name in raws)
    return [
        f"Pages {'in the arena' if slots == 'arena' else slots}, {text}: faster {than}. The best, GB/s: {shown}."
    ]


def pays_from(ours: dict[int, float], raw: dict[int, float]) -> str:
    """Say from which page size (KiB -> GB/s) on ``ours`` is faster than ``raw``, at all larger ones too.

    >>> pays_from({4: 10.0, 16: 30.0, 64: 90.0}, {4: 20.0, 16: 20.0, 64: 50.0})
    'from 16 KiB on'
    """
    slower = [kib for kib in ours if ours[kib] <= raw[kib]]
    faster = [kib for kib in ours if kib > max(slower, default=0)]
    if not faster:
        return f"at no size up to {max(ours)} KiB"
    return f"from {min(faster)} KiB on" if slower else f"at every size measured, {min(ours)} to {max(ours)} KiB"
