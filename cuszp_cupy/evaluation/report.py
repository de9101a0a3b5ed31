"""Shows measurements: rich tables, a JSON file, plots. Measures nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich import box
from rich.table import Table

from cuszp_cupy.evaluation.serve import DECODERS, LARGE, PASS, restores_beside

CODEC_CAPTION = (
    "GB/s: 1e9 raw (uncompressed) bytes a second, ± half the interquartile range. of copy: bytes read and "
    "written a second, as a share of the device copy in the first row of the same data. Device to device, cold "
    "in L2, GPU time of the kernels, variants in turns. Not like for like with that: rows marked (call) are wall "
    "clock of whole blocking calls with their allocations, and nvCOMP is lossless. "
    "kv counts 16 bytes of metadata a page."
)
REFERENCE_CAPTION = (
    "Through the NumPy reference: the kernels' bytes, no speeds. kv counts 16 bytes of metadata a page."
)
LINK_CAPTION = (
    "raw GB/s: 1e9 raw bytes a second, what a swapped cache sees; link GB/s: bytes that crossed the link. The "
    "copy is one transfer by the copy engines; kernels store to and load from mapped pinned memory themselves."
)
SWAP_CAPTION = (
    "GB/s: 1e9 raw (uncompressed) bytes a second, batches of {mbytes:.0f} MB one after the other without a "
    "pause, the first not counted, ± half the interquartile range; alone: the first one, from the call on. x "
    "copy: against the best large copy of that direction in this table; share: that over the ratio, 100 % is "
    "ratio x link. overlap: stage times over elapsed time. host MB: room a batch takes on the host. call ms: "
    "the host's time. missed: lengths mispredicted. Pages lie in order for the arena, at random on the device "
    "for rows and scattered slots. raw copy: one batched call, or a few 2-D ones."
)
TAX_CAPTION = (
    "slowdown: time of the work, on a high-priority stream, over its time alone; GB/s: raw bytes that the swap "
    "moved meanwhile. The copy kernel has 32 blocks of 1024 threads."
)

ACCURACY_CAPTION = (
    "bits / value: everything counted, kv with 16 bytes of metadata a page of 16 tokens; its K and V: as pages "
    "of their own. At one bound every kv brings back the same values. KL: of the next-token distribution from "
    "that of the untouched cache, nats a token. top-1: the same most likely token. ΔNLL: paired, nats a token. "
    "±: one standard error, over windows. PPL moves within its noise: judge by KL and top-1."
)
SERVE_CAPTION = (
    "requests/s: of all rounds, ± half the interquartile range over rounds; to first token: from submission, all "
    "that are in flight submitted at once. first: computed, and stored where there is offloading; restored: "
    "evicted from the GPU since (recompute computes it again). cached: share of the prompt that was in a cache. "
    "H2D: milliseconds of loads a request, and their share of all the time."
)
HOST_CAPTION = (
    "Milliseconds of the host a restored request: adding it, vLLM's scheduler, enqueueing the model's kernels, "
    "the calls that enqueue transfers, each without the others; other: for the most part waiting for the GPU. "
    "Loads go on beside all of it."
)
TRANSFER_CAPTION = (
    "GB/s: 1e9 raw bytes a second, by events on the stream of each transfer; of all, and the median of those of "
    "{large:.0f} MB or more, ± half the interquartile range. x raw: against vLLM's own copies."
)
MOVED_CAPTION = (
    "Raw GB that the pipelines took, and what crossed the link. checked: loaded pages compared with a raw copy; "
    "reference: those also compared with what the reference decodes, bit for bit."
)
AGREEMENT_CAPTION = (
    "Restored requests, prompt by prompt: raw against recompute is the noise of vLLM itself. same tokens: those "
    "before the first that differs, of all; KL: of the first token's distribution, nats."
)
BASELINE_CAPTION = (
    "GPU: the size of its cache, in sets of prompts. first: computed and stored; restored: evicted from the GPU "
    "since; resident: still there. end to end: from submission to the last token, all in flight submitted at "
    "once. D2H, H2D: by events on the transfers' streams: ms a request, GB/s, and the part of the time from "
    "submission to the last answer in which such a transfer was under way. D2H goes on beside the computing. "
    "added: what of the time goes, in whatever way, to not being resident; x comp.: times the requests/s of "
    "computing again."
)
BESIDE_CAPTION = "{decoders} requests decode, alone and beside prompts that are restored for one token each."


def codec_table(rows: list[dict], title: str) -> Table:
    """Return the table of ``evaluation.codec`` rows; columns of speeds only where a row has one."""
    timed = any(row["compress_gbps"] for row in rows)
    table = Table(
        title=title,
        caption=CODEC_CAPTION if timed else REFERENCE_CAPTION,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("data", "MB", "codec", "bound", "ratio", "bits /\nvalue"):
        table.add_column(name, justify="left" if name in ("data", "codec", "bound") else "right")
    if timed:
        for name in ("compress\nGB/s", "± %", "of\ncopy", "decompress\nGB/s", "± %", "of\ncopy"):
            table.add_column(name, justify="right")
    table.add_column("max err\n/ eb", justify="right")
    previous = None
    for row in rows:
        new = row["data"] != previous
        if new and previous is not None:
            table.add_section()
        cells = [
            row["data"] if new else "",
            _show(row["mbytes"], "{:.1f}") if new else "",
            row["codec"],
            row["bound"] or "",
            _show(row["ratio"], "{:.2f}"),
            _show(row["bits_per_value"], "{:.2f}"),
        ]
        if timed:
            for what in ("compress", "decompress"):
                gbps = row[f"{what}_gbps"]
                cells.append(_show(gbps, "{:.1f}" if gbps and gbps < 100 else "{:.0f}"))
                cells.append(_show(row[f"{what}_spread_percent"], "{:.1f}"))
                cells.append(_show(row[f"{what}_of_copy"], "{:.0%}"))
        table.add_row(*cells, _show(row["max_error_over_eb"], "{:.3f}"))
        previous = row["data"]
    return table


def link_table(rows: list[dict], title: str) -> Table:
    """Return the table of ``evaluation.codec.link_rows``."""
    numbers = ("ratio", "to host:\nraw GB/s", "link\nGB/s", "± %", "from host:\nraw GB/s", "link\nGB/s", "± %")
    table = new_table(title, LINK_CAPTION, (), ("data", "what", "bound"), numbers)
    for row in rows:
        cells = [row["data"], row["what"], row["bound"] or "", _show(row["ratio"], "{:.2f}")]
        for where in ("to_host", "from_host"):
            cells += [
                _show(row[f"{where}_{key}"], "{:.1f}") for key in ("raw_gbps", "link_gbps", "spread_percent")
            ]
        table.add_row(*cells)
    return table


def swap_table(rows: list[dict], title: str, batch_bytes: int) -> Table:
    """Return the table of ``evaluation.swap.case_rows``."""
    table = new_table(
        title, SWAP_CAPTION.format(mbytes=batch_bytes / 1e6), ("page\nKiB",), ("slots", "way", "transport"),
        ("GB/s", "± %", "alone\nGB/s", "x\ncopy", "share", "link\nGB/s", "ratio", "over-\nlap", "host\nMB",
         "call\nms", "missed"),
    )  # fmt: skip
    previous = ()
    for row in rows:
        group = row["page_kib"], row["slots"], row["direction"]
        if group[:2] != previous[:2] and previous:
            table.add_section()
        new = ["" if group == previous else str(cell) for cell in group]
        name = row["transport"] + (f" ({row['used']})" if row["transport"] == "auto" else "")
        numbers = (
            ("gbps", "{:.1f}"), ("spread_percent", "{:.1f}"), ("alone_gbps", "{:.1f}"), ("of_copy", "{:.2f}"),
            ("share", "{:.0%}"), ("link_gbps", "{:.1f}"), ("ratio", "{:.2f}"), ("overlap", "{:.2f}"),
        )  # fmt: skip
        cells = [_show(row[key], pattern) for key, pattern in numbers]
        cells += [f"{row['host_bytes'] / 1e6:.0f}", f"{row['host_ms']:.2f}", str(row["mispredicted"] or "")]
        table.add_row(*new, name, *cells)
        previous = group
    return table


def tax_table(rows: list[dict]) -> Table:
    """Return the table of ``evaluation.tax.tax_rows``."""
    table = new_table(
        "the tax", TAX_CAPTION, (), ("work", "beside", "way"), ("ms", "± %", "slowdown", "swap\nGB/s")
    )
    for row in rows:
        alone = row["swap"] is None
        if alone and table.row_count:
            table.add_section()
        table.add_row(
            row["work"] if alone else "", row["swap"] or "nothing", row["direction"] or "",
            f"{row['work_ms']:.3f}", f"{row['spread_percent']:.1f}", f"{row['slowdown']:.2f}",
            _show(row["gbps"], "{:.1f}"),
        )  # fmt: skip
    return table


def ablation_table(rows: list[dict]) -> Table:
    """Return the table of ``evaluation.swap.ablation_rows``."""
    caption = "Both directions at once, raw GB/s of each while both are under way; pages of 64 KiB in the arena."
    numbers = ("store\nGB/s", "load\nGB/s", "both\nGB/s", "± %")
    table = new_table("one direction only", caption, (), ("store", "load"), numbers)
    for row in rows:
        cells = [f"{row[key]:.1f}" for key in ("store_gbps", "load_gbps", "gbps", "spread_percent")]
        table.add_row(row["store"], row["load"], *cells)
    return table


def descriptor_table(rows: list[dict]) -> Table:
    """Return the table of ``evaluation.swap.descriptor_rows``."""
    caption = (
        "One call for all pages of 64 KiB, given by their addresses; rows of 512 KiB. GB/s: from call to done."
    )
    numbers = ("pages", "call\nms", "longest", "GB/s", "growth\nMB")
    table = new_table("many descriptors", caption, (), ("call", "transport"), numbers)
    for row in rows:
        cells = [f"{row[key]:.2f}" for key in ("host_ms", "largest_host_ms")]
        cells += [f"{row['gbps']:.1f}", f"{row['device_growth_bytes'] / 1e6:.1f}"]
        table.add_row(row["direction"], row["transport"], str(row["descriptors"]), *cells)
    return table


def accuracy_table(rows: list[dict], title: str) -> Table:
    """Return the table of ``evaluation.accuracy.measure``."""
    numbers = ("bits /\nvalue", "K", "V", "ratio", "max err\n/ eb", "KL", "±", "top-1", "±", "PPL", "ΔNLL", "±")
    table = new_table(title, ACCURACY_CAPTION, (), ("cache", "bound"), numbers)
    patterns = (
        ("bits_per_value", "{:.2f}"), ("k_bits_per_value", "{:.2f}"), ("v_bits_per_value", "{:.2f}"),
        ("ratio", "{:.2f}"), ("max_error_over_eb", "{:.3f}"), ("kl", "{:.4f}"), ("kl_error", "{:.4f}"),
        ("top1", "{:.3f}"), ("top1_error", "{:.3f}"), ("ppl", "{:.3f}"), ("nll_difference", "{:+.4f}"),
        ("nll_difference_error", "{:.4f}"),
    )  # fmt: skip
    previous = None
    for row in rows:
        new = row["variant"] != previous
        if new and row["bound"]:
            table.add_section()
        cells = [_show(row[key], pattern) for key, pattern in patterns]
        table.add_row(row["variant"] if new else "", row["bound"] or "", *cells)
        previous = row["variant"]
    return table


def equal_kl_lines(results: list[dict]) -> list[str]:
    """Return a line for each of ``evaluation.accuracy.at_equal_kl``."""
    lines = []
    for result in results:
        found = [
            f"{result[key]:.2f} bits/value ({16 / result[key]:.2f}x) with {how}"
            for key, how in (("bits", "one bound"), ("bits_apart", "K and V apart"))
            if result[key] is not None
        ]
        lines.append(
            f"At the KL of {result['peer']} ({result['kl']:.4f}, {result['peer_bits']:.2f} bits/value, "
            f"{16 / result['peer_bits']:.2f}x): {result['variant']} "
            + (", ".join(found) or "is not to be read off, the bounds lie all to one side of it")
        )
    return lines


def serve_tables(result: dict, title: str) -> list[Table]:
    """Return the tables of ``evaluation.serve.serve``, those alone that have rows."""
    tables = [
        _serve_rows(result["rows"], title), _host_parts(result["rows"]), _transfers(result["variants"]),
        _moved(result["variants"]), _agreement(result["agreement"]), _beside(result["variants"]),
    ]  # fmt: skip
    return [table for table in tables if table.row_count]


def _serve_rows(rows: list[dict], title: str) -> Table:
    numbers = ("new\ntokens", "in\nflight", "requests", "requests\n/s", "± %", "x raw", "to first\ntoken p50",
               "p90", "p99\nms", "cached", "H2D\nms", "of the\ntime")  # fmt: skip
    table = new_table(title, SERVE_CAPTION, (), ("prompt\ntokens", "what", "variant"), numbers)

    def case(row):
        return row["what"], *(row[key] for key in PASS)

    raw = {case(row): row["requests_per_s"] for row in rows if row["variant"] == "raw"}
    previous = None
    for one in raw:  # recompute has not all of them, and another order
        if previous is not None:
            table.add_section()
        previous = one
        for row in (row for row in rows if case(row) == one):
            numbers = (
                ("requests_per_s", "{:.2f}"), ("spread_percent", "{:.1f}"), ("x", "{:.2f}"),
                ("first_token_ms_p50", "{:.1f}"), ("first_token_ms_p90", "{:.1f}"),
                ("first_token_ms_p99", "{:.1f}"), ("cached_share", "{:.0%}"), ("h2d_ms", "{:.1f}"),
                ("h2d_share", "{:.0%}"),
            )  # fmt: skip
            values = row | {"x": row["requests_per_s"] / raw[one]}
            cells = [_show(values[key], pattern) for key, pattern in numbers]
            what, prompt_tokens, new_tokens, in_flight = map(str, one)
            table.add_row(
                prompt_tokens, what, row["variant"], new_tokens, in_flight, str(row["requests"]), *cells
            )
    return table


def _host_parts(rows: list[dict]) -> Table:
    rows = [row for row in rows if row["what"] == "restored" and row.get("host_ms")]  # not timed in all results
    parts = list(dict.fromkeys(part for row in rows for part in row["host_ms"]))
    parts.sort(key="other".__eq__)
    table = new_table(
        "where the host's time goes", HOST_CAPTION, ("prompt\ntokens",), ("variant",),
        ("new\ntokens", "in\nflight", *parts),
    )  # fmt: skip
    for row in rows:
        cells = [_show(row["host_ms"].get(part), "{:.1f}") for part in parts]
        table.add_row(row["prompt_tokens"], row["variant"], str(row["new_tokens"]), str(row["in_flight"]), *cells)
    return table


def _transfers(variants: dict) -> Table:
    numbers = ("calls", "GB", "GB/s", "x raw", "large\ncalls", "largest\nMB", "GB/s", "± %", "x raw")
    caption = TRANSFER_CAPTION.format(large=LARGE / 1e6)
    table = new_table("transfers", caption, (), ("way", "variant"), numbers)
    for way in ("store", "load"):
        if table.row_count:
            table.add_section()
        raw = variants["raw"]["transfers"][way]
        for name, result in variants.items():
            row = result["transfers"][way]
            if row["calls"]:
                cells = [str(row["calls"]), f"{row['bytes'] / 1e9:.1f}", _show(row["gbps"], "{:.1f}")]
                cells += [_times(row, raw, "gbps"), str(row["large_calls"]), f"{row['large_bytes'] / 1e6:.0f}"]
                cells += [_show(row["large_gbps"], "{:.1f}"), _show(row["large_spread_percent"], "{:.1f}")]
                table.add_row(way, name, *cells, _times(row, raw, "large_gbps"))
    return table


def _times(row: dict, raw: dict, key: str) -> str:
    return f"{row[key] / raw[key]:.2f}" if row[key] and raw.get(key) else ""


def _moved(variants: dict) -> Table:
    numbers = ("pages\nstored", "loaded", "GB\nstored", "link\nGB", "GB\nloaded", "link\nGB", "ratio",
               "kept\nraw", "missed", "dam-\naged", "checked", "refer-\nence", "max err\n/ eb")  # fmt: skip
    table = new_table("what moved", MOVED_CAPTION, (), ("variant", "worker"), numbers)
    for name, result in variants.items():
        for i, worker in enumerate(result["stats"]):
            for one in worker["pipelines"]:
                store, load, verified = one["store"], one["load"], one.get("verified", {})
                cells = [str(store["pages"]), str(load["pages"])]
                cells += [f"{way[key] / 1e9:.2f}" for way in (store, load) for key in ("raw_bytes", "link_bytes")]
                cells += [f"{store['ratio']:.2f}", str(one["raw_pages"]), str(one["mispredicted"])]
                cells += [str(one["failed_pages"]), _show(verified.get("checked"), "{}")]
                cells += [_show(verified.get("compared_with_reference"), "{}")]
                cells += [_show(verified.get("largest_error_over_bound"), "{:.4f}")]
                table.add_row(name, str(i), *cells)
    return table


def _agreement(rows: list[dict]) -> Table:
    numbers = ("requests", "all tokens\nthe same", "same\ntokens", "same\nfirst", "KL")
    table = new_table("agreement", AGREEMENT_CAPTION, (), ("variant", "against"), numbers)
    for row in rows:
        shares = [f"{row[key]:.4f}" for key in ("same_all", "same_tokens", "same_first")]
        cells = [str(row["requests"]), *shares, _show(row["first_kl"], "{:.5f}")]
        table.add_row(row["variant"], row["against"], *cells)
    return table


def _beside(variants: dict) -> Table:
    caption = BESIDE_CAPTION.format(decoders=DECODERS)
    numbers = ("tokens/s\nalone", "beside", "of\nalone", "x raw", "restored\n/s")
    table = new_table("decoding beside restores", caption, (), ("variant",), numbers)
    raw = variants["raw"]["beside"] if restores_beside(variants["raw"]) else {}
    for name, result in variants.items():
        if restores_beside(result):
            row = result["beside"]
            alone, beside = row["decoded_tokens_per_s_alone"], row["decoded_tokens_per_s"]
            cells = [
                _show(alone, "{:.1f}"),
                _show(beside, "{:.1f}"),
                f"{beside / alone:.0%}" if alone and beside else "",
            ]
            cells += [_times(row, raw, "decoded_tokens_per_s"), _show(row["restored_requests_per_s"], "{:.1f}")]
            table.add_row(name, *cells)
    return table


def serve_lines(result: dict) -> list[str]:
    """Return what of ``evaluation.serve.serve`` is no table: a line a bound against raw, fall-backs, notes."""
    lines = []
    for name, over in result["over_raw"].items():
        requests = ", ".join(
            "{times:.2f} ({prompt_tokens} + {new_tokens} tokens, {in_flight} in flight)".format(**one)
            for one in over["restored_requests"]
        )
        speeds = (("loads", "large_load"), ("stores", "large_store"), ("decoded tokens/s", "decoded_tokens"))
        if not restores_beside(result["variants"][name]):
            speeds = speeds[:2]
        shown = "".join(f"; {what} {over[key]:.2f}" for what, key in speeds if over[key])
        lines.append(f"{name}, times raw: restored requests/s {requests}{shown}")
    for name, variant in result["variants"].items():
        for i, worker in enumerate(variant["stats"]):
            for reason, count in worker["passed_through"].items():
                amount = f"{count['descriptors']} descriptors, {count['bytes'] / 1e6:.1f} MB"
                lines.append(f"{name}, worker {i}, passed through: {amount}: {reason}")
        if held := variant.get("host_bytes"):  # of one process; older results have none
            middle, last = held[len(held) // 2] / 1e9, held[-1] / 1e9
            lines.append(
                f"{name}: {middle:.2f} GB of host memory after half of the rounds, {last:.2f} at the end"
            )
    return [*lines, *result["notes"], *(f"PROBLEM: {problem}" for problem in result["problems"])]


def baseline_table(rows: list[dict], title: str) -> Table:
    """Return the table of ``evaluation.baseline.measure``."""
    numbers = ("new\ntokens", "in\nflight", "requests\n/s", "end to end\np50", "p90", "p99\nms", "D2H\nms",
               "GB/s", "of the\ntime", "H2D\nms", "GB/s", "of the\ntime", "added", "x\ncomp.")  # fmt: skip
    table = new_table(title, BASELINE_CAPTION, (), ("GPU", "prompt\ntokens", "what", "variant"), numbers)
    patterns = (
        ("requests_per_s", "{:.2f}"), ("end_to_end_ms_p50", "{:.1f}"), ("end_to_end_ms_p90", "{:.1f}"),
        ("end_to_end_ms_p99", "{:.1f}"), ("d2h_ms", "{:.1f}"), ("d2h_gbps", "{:.1f}"), ("d2h_share", "{:.0%}"),
        ("h2d_ms", "{:.1f}"), ("h2d_gbps", "{:.1f}"), ("h2d_share", "{:.0%}"), ("added_share", "{:.0%}"),
        ("over_recompute", "{:.2f}"),
    )  # fmt: skip
    previous = None
    for row in rows:
        group = row["gpu_sets"], row["prompt_tokens"], row["what"]
        if group != previous and previous:
            table.add_section()
        cache = "all" if row["gpu_sets"] is None else f"{row['gpu_sets']:g}"
        cells = [cache, *group[1:], row["variant"], str(row["new_tokens"]), str(row["in_flight"])]
        table.add_row(*cells, *(_show(row[key], pattern) for key, pattern in patterns))
        previous = group
    return table


def baseline_lines(result: dict) -> list[str]:
    """Return where the link decides, by ``evaluation.baseline.measure``; its notes and problems."""
    from cuszp_cupy.evaluation.baseline import LINK_DECIDES, decided_by_link

    decided = ", ".join(
        "{h2d_share:.0%} ({prompt_tokens} + {new_tokens} tokens, {in_flight} in flight, a cache of {gpu_sets:g} "
        "sets)".format(**row)
        for row in decided_by_link(result["rows"])
    )
    share = f"{LINK_DECIDES:.0%} or more of the time of restored requests"
    line = f"H2D takes {share}: {decided}" if decided else f"At none of these loads H2D takes {share}."
    return [line, *result["notes"], *(f"PROBLEM: {problem}" for problem in result["problems"])]


def study_table(steps: list, results: list[dict], title: str) -> Table:
    """Return the table of the steps of ``evaluation.study`` and what became of them."""
    table = new_table(title, "minutes: expected on an H100, and taken.", (), ("step", "of"), ("minutes", "taken"))
    table.add_column("state")
    for one, result in zip(steps, results, strict=True):
        taken = _show(result["minutes"], "{:.1f}")
        table.add_row(one.name, one.what, f"{one.minutes:g}", taken, result["state"])
    table.add_section()
    table.add_row("all", "", f"{sum(one.minutes for one in steps):g}", "", "")
    return table


def study_lines(results: list[dict]) -> list[str]:
    """Return why steps of ``evaluation.study`` were not finished, those with the same reason in a line."""
    reasons = {}
    for result in results:
        if result["why"]:
            reasons.setdefault((result["state"], result["why"]), []).append(result["name"])
    return [f"{state}: {', '.join(names)}: {why}" for (state, why), names in reasons.items()]


def with_library(title: str, notes: list[str]) -> tuple[str, list[str]]:
    """Return the title of a table with the note that names libcuSZp's version and path, and the other notes.

    >>> with_library("a machine", ["libcuSZp 3.0.0: /lib/libcuSZp.so", "more"])
    ('a machine\\nlibcuSZp 3.0.0: /lib/libcuSZp.so', ['more'])
    """
    named = [note for note in notes if re.match(r"libcuSZp [\d.]+: ", note)]
    return "\n".join([title, *named]), [note for note in notes if note not in named]


def soak_lines(result: dict) -> list[str]:
    """Return the lines that tell of ``evaluation.soak.soak``."""
    calls = ", ".join(f"{count} x {name}" for name, count in sorted(result["calls"].items()))
    growth = ", ".join(f"{name} {nbytes / 1e6:+.1f} MB" for name, nbytes in result["growth_bytes"].items())
    return [
        f"{result['seconds']:.0f} s: {result['pages_stored']} pages stored, {result['pages_loaded']} loaded",
        f"calls: {calls}",
        f"mismatches: {result['mismatches']}; damaged pages: {result['damaged']}",
        *(f"wrong: {', '.join(f'{k} {v}' for k, v in page.items())}" for page in result.get("wrong", [])),
        f"memory since the warm-up: {growth}; fragmentation of the arena: largest "
        f"{result['fragmentation']['largest']:.2f}, last {result['fragmentation']['last']:.2f}",
    ]


def new_table(title: str, caption: str, *columns) -> Table:
    """Return an empty table with columns (numbers, texts, numbers)."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for names, justify in zip(columns, ("right", "left", "right"), strict=True):
        for name in names:
            table.add_column(name, justify=justify)
    return table


def _show(value, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def write_json(result: dict, path: str | Path) -> None:
    """Write ``result`` as JSON; a value that JSON does not know raises TypeError or ValueError."""
    Path(path).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def pyplot():
    """Return ``matplotlib.pyplot``, drawing to files only; raise ImportError with what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"a plot needs matplotlib ({error}): install the extra, cuszp_cupy[plot]") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_rate_error(points: list[dict], path: str | Path) -> None:
    """Draw the points of ``evaluation.codec.rate_error`` to ``path`` (PNG, SVG, ... by its ending)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for part, colour in (("K", "tab:blue"), ("V", "tab:orange")):
        own = sorted((p for p in points if p["part"] == part), key=lambda p: p["bits_per_value"])
        bits = [p["bits_per_value"] for p in own]
        axes.plot(bits, [p["rmse"] for p in own], "o-", ms=3, color=colour, label=f"{part}: RMSE / RMS")
        axes.plot(
            bits, [p["max_error"] for p in own], "^--", ms=3, color=colour, label=f"{part}: max error / RMS"
        )
    axes.set(xlabel="bits a value (16 uncompressed, metadata counted)", ylabel="error", yscale="log")
    axes.set_title("Rate against error: kv fixed, bfloat16 pages of 16 tokens x 192 channels", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_swap(result: dict, path: str | Path) -> None:
    """Draw GB/s against page size, each way, and the stages of one batch each way, to ``path``."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    curves = (
        ("staged", "arena", "o-"), ("staged", "scattered", "o--"), ("fused", "arena", "s-"),
        ("auto", "arena", "x:"), ("raw copy", "scattered", "^--"), ("one call a page", "scattered", "v--"),
    )  # fmt: skip
    for axis, direction in zip(axes[0], ("D2H", "H2D"), strict=True):
        rows = [row for row in result["rows"] if row["direction"] == direction]
        for transport, slots, style in curves:
            own = [row for row in rows if (row["transport"], row["slots"]) == (transport, slots)]
            if own:
                label = f"{transport}, {slots}"
                axis.plot([r["page_kib"] for r in own], [r["gbps"] for r in own], style, ms=4, label=label)
        link = max(row["gbps"] for row in rows if row["transport"] == "large copy")
        axis.axhline(link, color="black", lw=1, label="large copy")
        ideal = [row for row in rows if (row["transport"], row["slots"]) == ("staged", "arena")]
        axis.plot([r["page_kib"] for r in ideal], [r["ratio"] * link for r in ideal], "k+:", label="ratio x link")
        axis.set(xlabel="page, KiB", ylabel="raw GB/s", ylim=(0, None), title=direction)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes := sorted({row["page_kib"] for row in rows}), map(str, sizes))
        axis.grid(True, alpha=0.3)
    axes[0][0].legend(fontsize=7)
    for axis, direction in zip(axes[1], ("store", "load"), strict=True):
        draw_timeline(axis, result["timeline"], direction)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_timeline(axes, timeline: list[dict], direction: str) -> None:
    """Draw the stages of one staged transfer, ``evaluation.swap.timeline``, on ``axes``."""
    lanes, colours = {"encode": 1, "copy": 0, "decode": 1}, {"encode": "C0", "copy": "C1", "decode": "C2"}
    for stage in (stage for stage in timeline if stage["direction"] == direction):
        span = stage["begin_ms"], stage["end_ms"] - stage["begin_ms"]
        axes.broken_barh([span], (lanes[stage["stage"]] - 0.35, 0.7), color=colours[stage["stage"]], ec="white")
    axes.set_yticks([0, 1], ["copy", "encode" if direction == "store" else "decode"])
    axes.set(xlabel="ms", title=f"one staged {direction}, tile by tile")


def plot_accuracy(rows: list[dict], title: str, path: str | Path) -> None:
    """Draw KL against bits/value, the rows of ``evaluation.accuracy.measure``, to ``path``.

    A coding is a curve over the bounds that are one for K and V, with its other bounds as small crosses.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    rows = [row for row in rows if row["kl"]]  # what changes nothing has no place on a log axis
    names = dict.fromkeys(row["variant"] for row in rows if row["bound"])
    for i, name in enumerate(names):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["bits_per_value"])
        same = [row for row in own if "/" not in row["bound"]]
        apart = [row for row in own if "/" in row["bound"]]
        for some, style, label in ((same, "o-", name), (apart, "x", None)):
            x = [row["bits_per_value"] for row in some]
            axes.plot(x, [row["kl"] for row in some], style, ms=4.5, color=f"C{i}", label=label)
    for row in (row for row in rows if not row["bound"]):
        bar = {"yerr": row["kl_error"]} if row["kl_error"] < row["kl"] else {}
        axes.errorbar(row["bits_per_value"], row["kl"], fmt="s", ms=6, color="black", capsize=2, **bar)
        style = {"fontsize": 9, "weight": "bold", "bbox": {"fc": "white", "ec": "none", "pad": 1}}
        point = row["bits_per_value"], row["kl"]
        axes.annotate(row["variant"], point, (7, 6), textcoords="offset points", **style)
    axes.legend(loc="upper right")
    axes.set(xlabel="bits a value, everything counted (16 uncompressed)", yscale="log")
    axes.set_ylabel("KL divergence from the untouched cache, nats a token")
    axes.set_title(f"{title}. Crosses: K and V apart", fontsize=10)
    axes.set_xlim(right=axes.get_xlim()[1] + 0.2 * max(row["bits_per_value"] for row in rows))  # room for names
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def variant_colours(rows: list[dict]) -> dict[str, str]:
    """Return variant -> colour, in the order of ``rows``: the same in each figure.

    >>> variant_colours([{"variant": name} for name in ("recompute", "raw", "rms:0.05", "raw", "rms:0.2")])
    {'recompute': 'darkgrey', 'raw': 'black', 'rms:0.05': 'C0', 'rms:0.2': 'C1'}
    """
    fixed = {"recompute": "darkgrey", "raw": "black"}
    names = list(dict.fromkeys(row["variant"] for row in rows))
    ours = [name for name in names if name not in fixed]
    return {name: fixed.get(name) or f"C{ours.index(name)}" for name in names}


def plot_serve(result: dict, title: str, path: str | Path) -> None:
    """Draw restored requests/s and their time to the first token, for each length of prompts and answers."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    rows = [row for row in result["rows"] if row["what"] == "restored"]
    lengths = list(dict.fromkeys((row["prompt_tokens"], row["new_tokens"]) for row in rows))
    variants = variant_colours(rows)
    size = (max(7.5, 4.2 * len(lengths)), 7)
    figure, axes = plt.subplots(2, len(lengths), figsize=size, layout="constrained", squeeze=False)
    for (above, below), (prompt, new) in zip(axes.T, lengths, strict=True):
        here = [row for row in rows if (row["prompt_tokens"], row["new_tokens"]) == (prompt, new)]
        flights = sorted({row["in_flight"] for row in here})
        for i, (variant, colour) in enumerate(variants.items()):
            own = {row["in_flight"]: row for row in here if row["variant"] == variant}
            label = variant if variant in ("raw", "recompute") else f"compressed, {variant}"
            places = [place for place, n in enumerate(flights) if n in own]  # recompute has one pass
            own = [own[flights[place]] for place in places]
            above.plot(places, [row["requests_per_s"] for row in own], "o-", ms=4, label=label, color=colour)
            median = [row["first_token_ms_p50"] for row in own]
            late = [max(0.0, row["first_token_ms_p90"] - row["first_token_ms_p50"]) for row in own]
            x = [place + 0.1 * (i - len(variants) / 2) for place in places]  # beside each other
            whiskers = [[0.0] * len(late), late]
            below.errorbar(x, median, yerr=whiskers, fmt="o", ms=5, capsize=3, label=label, color=colour)
        for axis in (above, below):
            axis.set_xticks(range(len(flights)), map(str, flights))
            axis.set(xlabel="requests in flight", xlim=(-0.5, len(flights) - 0.5))
            axis.grid(True, axis="y", alpha=0.3)
        above.set_ylim(0, None)
        below.set_yscale("log")  # computing again takes many times as long
        below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        below.yaxis.set_major_formatter("{x:g}")
        below.yaxis.set_minor_formatter("")
        above.set_title(f"prompts of {prompt} tokens, {new} new", fontsize=10)
    axes[0][0].set_ylabel("restored requests a second")
    axes[1][0].set_ylabel("to the first token, ms: p50, whisker p90")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
