"""``docs/report.md``: tables and figures of the JSON files under ``results/``, one file a machine and run.

What a file holds is seen by its keys (``KINDS``). The same files give the same bytes. Measures nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cuszp_cupy.evaluation import advice, figures, machine, report

INTRODUCTION = """\
# Measured

`python bench.py report` writes this page and its figures from the files in `results/`; nothing here is typed by
hand. Above each table and figure stands the file that it is from, and on what it was measured.

GB/s are 1e9 *raw* (uncompressed) bytes a second, also where fewer bytes moved, unless a column says link. D2H is
to the host, H2D from it. Ratio and bits a value count all metadata. ± is half the interquartile range in per
cent, where nothing else is said. A bound `rms:A` limits the error of every single value to A x the root mean
square of its page's K or V.
"""
SAMPLE = "Data: the packaged sample (`cuszp_cupy/data`: SmolLM2-135M, 4 of 30 layers, 512 tokens of WikiText-2)"


@dataclass(frozen=True)
class Kind:
    """A kind of result file: its heading, the keys by which it is known, what writes it, what describes it."""

    title: str
    keys: tuple[str, ...]
    command: str
    describe: Callable


class Page:
    """The text of one result file, as it grows; figures are noted and drawn later.

    Args:
        name: of the file, without ``.json``.    figures: takes what ``text`` returns.
    """

    def __init__(self, name: str, result: dict, figures: dict):
        self.name, self.result, self.figures, self.parts = name, result, figures, []
        self.add(f"### {name}\n")

    def add(self, *parts: str) -> None:
        """Add paragraphs; lines that begin with ``-`` are a list."""
        self.parts += [part if part.endswith("\n") else f"{part}\n" for part in parts]

    def origin(self, what: str) -> None:
        """Say which file what follows is from, where that was measured, and on ``what``."""
        link = f"From [results/{self.name}.json](../results/{self.name}.json)"
        what += " A quick run." * bool(self.result.get("parameters", {}).get("quick"))
        if len(self.parts) > 1:
            self.add(f"{link}, machine and versions as above. {what}")
            return
        where, versions = machine.title(self.result["machine"]), self.result["machine"]["versions"]
        where += "".join(f", {name} {versions[name]}" for name in ("torch", "vllm") if versions.get(name))
        if commit := self.result["machine"]["git_commit"]:
            where += f", commit {commit[:9]}{'+' * commit.endswith('+')}"
        self.add(f"{link}: {where}. {what}")

    def figure(self, what: str, title: str, limits: str, draw: Callable, *arguments) -> None:
        """Show the figure that ``draw(*arguments, path)`` makes, and say what it does not show."""
        file = f"{self.name}-{what}.png".replace("/", "-")
        self.figures[file] = f"{self.name}.json", partial(draw, *arguments)
        self.add(f"![{title}](figures/{file})", f"*{title}. Not shown: {limits}.*")

    def table(self, table, fill: int = 0, without: tuple[str, ...] = ()) -> None:
        """Show a rich table and its caption: see ``markdown``."""
        caption = [
            sentence
            for sentence in (table.caption or "").rstrip(".").split(". ")
            if sentence and not sentence.startswith(tuple(f"{name}:" for name in without))
        ]
        self.add(markdown(table, fill, without), *([". ".join(caption) + "."] if caption else []))

    def notes(self, lines: list[str]) -> None:
        """Show lines as a list."""
        if lines:
            self.add("\n".join(f"- {line}" for line in lines))


def markdown(table, fill: int = 0, without: tuple[str, ...] = ()) -> str:
    """Return a rich table as Markdown.

    Args:
        fill: so many first columns repeat the cell above where they are empty.
        without: names of columns to leave out: those that are no numbers of the result, but quotients.
    """
    columns = {}
    for i, column in enumerate(table.columns):
        cells = [str(cell).replace("|", "\\|") for cell in column.cells]
        for n in range(1, len(cells)):
            if i < fill and not cells[n]:
                cells[n] = cells[n - 1]
        name = str(column.header).replace("-\n", "").replace("\n/s", "/s").replace("\n", " ")
        if name not in without:
            columns[i] = [name, "---:" if column.justify == "right" else "---", *cells]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)) + "\n"


# --- a kind each --------------------------------------------------------------------------------------------
def _bench(page: Page) -> None:
    result = page.result
    page.origin(f"{SAMPLE}, repeated with other signs to the size in the table.")
    rows, bound = link_figure_rows(result)
    if rows:
        page.figure(
            "link", f"What a link of any speed gives at {bound}: the slower of codec and ratio x link",
            "launches, which count for single small pages; other work on the GPU; a GPU other than this one",
            figures.link_speeds, rows, result["link"],
        )  # fmt: skip
        page.add(
            "Left of its cross a coding is faster than raw copies on such a link; from the bend on the codec is "
            "the limit, not the link. The cross is at the codec's own speed (columns compress and decompress)."
        )
    page.table(report.codec_table(result["rows"], ""), fill=2)
    if result["link"]:
        page.origin("Kernels that write to and read from pinned host memory, beside a copy.")
        page.table(report.link_table(result["link"], ""))
    page.notes(result["notes"])


def link_figure_rows(result: dict) -> tuple[list[dict], str | None]:
    """Return the rows of both codings of the first kind of pages at the middle bound; none without speeds."""
    timed = [row for row in result["rows"] if row["codec"].startswith("kv ") and row["compress_gbps"]]
    if not timed or not result["link"]:
        return [], None
    own = [row for row in timed if row["data"] == timed[0]["data"]]
    bounds = list(dict.fromkeys(row["bound"] for row in own))
    bound = "rms:0.05" if "rms:0.05" in bounds else bounds[0]
    return [row for row in own if row["bound"] == bound], bound


def _swap(page: Page) -> None:
    result, given = page.result, page.result["parameters"]
    coding = given.get("coding", "fixed")
    data = f"{SAMPLE}, as pages of each size; kv {coding}, {given['bound']}."
    page.origin(data)
    sizes = list(dict.fromkeys(row["page_kib"] for row in result["rows"]))
    if len(sizes) > 1:
        page.figure(
            "pages", "Effective bandwidth against page size, the link, and the raw copies to break even with",
            "both directions at once; single batches, which are slower (`alone_gbps` in the file)",
            figures.page_sizes, result["rows"],
        )  # fmt: skip
    page.table(_by_page_size(result["rows"]))
    raw_ms = {
        direction: given["batch_bytes"] / gbps / 1e6
        for direction, way in (("store", "D2H"), ("load", "H2D"))
        for gbps in [_speed(result["rows"], way, "large copy")]
    }
    page.origin(f"A batch of {given['batch_bytes'] / 1e6:.0f} MB, by itself; times of events.")
    page.figure(
        "timeline", "One overlapped transfer each way, and a raw copy of as many bytes",
        "batches before and after it, whose codec fills the gaps before the first and after the last copy",
        figures.timeline, result["timeline"], raw_ms,
    )  # fmt: skip
    page.origin("One direction compressed, or both, or none.")
    page.table(report.ablation_table(result["ablation"]))
    page.origin("Other work on the GPU, while pages of 64 KiB are swapped without a pause.")
    page.figure(
        "tax", "The tax: time of the work beside a swap over its time alone; 1 is none",
        "how much each of them moved meanwhile, which is in the table: the slower it is, the less it taxes",
        figures.tax, result["tax"],
    )  # fmt: skip
    page.table(report.tax_table(result["tax"]), fill=1)
    page.origin("Calls with many descriptors.")
    page.table(report.descriptor_table(result["descriptors"]))
    page.notes(result["notes"])


def _speed(rows: list[dict], way: str, transport: str) -> float:
    return max(row["gbps"] for row in rows if (row["direction"], row["transport"]) == (way, transport))


def _by_page_size(rows: list[dict]):
    """GB/s of each transport beside each other."""
    names = list(dict.fromkeys(row["transport"] for row in rows))
    caption = (
        "GB/s of batches one after the other. Arena: the pipeline's own memory; rows: slots of some pages next "
        "to each other; scattered: each page anywhere. raw copy: one batched call, or a few 2-D ones."
    )
    table = report.new_table("", caption, ("page KiB",), ("slots", "way"), (*names, "ratio"))
    cases = {}
    for row in rows:
        cases.setdefault((row["page_kib"], row["slots"], row["direction"]), {})[row["transport"]] = row
    for (kib, slots, way), found in cases.items():
        cells = [f"{found[name]['gbps']:.1f}" if name in found else "" for name in names]
        table.add_row(str(kib), slots, way, *cells, f"{found['staged']['ratio']:.2f}")
    return table


def _soak(page: Page) -> None:
    given = page.result["parameters"]
    page.origin(
        "Random stores, loads and drops on four streams, every page that came back compared with what the "
        f"reference decodes; {given['bound']}, kv {given.get('coding', 'fixed')}."
    )
    page.notes(report.soak_lines(page.result["soak"]))


def _accuracy(page: Page) -> None:
    result, given = page.result, page.result["parameters"]
    what = f"{given['model']}, {given['tokens']} tokens of {given['text']}"
    page.origin(
        f"Data: {what}, windows of {given['context']} (model's config {given['config_sha256'][:12]}, text "
        f"{given['text_sha256'][:12]})."
    )
    page.figure(
        "rate", "Rate against accuracy: KL divergence over bits a value, beside FP8, NVFP4 and int4",
        "other models and tasks; errors that build up while a model writes on from what was restored",
        report.plot_accuracy, result["rows"], what,
    )  # fmt: skip
    page.notes(report.equal_kl_lines(result["equal_kl"]))
    page.table(report.accuracy_table(result["rows"], ""), fill=1)
    page.notes(result["notes"])


def _layers(page: Page) -> None:
    page.origin(f"{SAMPLE}, as pages of 16 tokens x 192 channels of K or of V alone, through the reference.")
    rows = page.result["layer_bits"]
    page.figure(
        "layers", "Bits a value of each layer's K and V at each bound",
        "the other layers; larger pages, whose metadata weighs less; how much error each layer bears",
        figures.layer_bits, rows,
    )  # fmt: skip
    bounds = list(dict.fromkeys(row["bound"] for row in rows))
    table = report.new_table("", "", ("layer",), ("part", "coding"), bounds)
    cases = {}
    for row in rows:
        case = cases.setdefault((row["layer"], row["part"], row["coding"]), {})
        case[row["bound"]] = f"{row['bits_per_value']:.2f}"
    for (layer, part, coding), found in cases.items():
        table.add_row(str(layer), part, coding, *(found[bound] for bound in bounds))
    page.table(table)


def _serve(page: Page) -> None:
    result, case = page.result, page.result["case"]
    if (case["settings"] or {}).get("verify"):
        page.origin(f"{_load(case)} Each loaded page checked, so without speeds.")
        for table in report.serve_tables(result, ""):
            if table.title in ("what moved", "agreement"):
                page.table(table, without=("worker",))
        return
    page.origin(_load(case))
    passes = {}
    for row in result["rows"]:
        if row["what"] == "restored":
            passes.setdefault((row["prompt_tokens"], row["new_tokens"]), []).append(row)
    for (prompt, new), rows in passes.items():
        what = f"prompts of {prompt} tokens, {new} new"
        if len({row["in_flight"] for row in rows}) > 1:
            page.figure(
                f"{prompt}-{new}", f"Throughput and time to first token against concurrency, {what}",
                "requests that arrive one by one: all in flight are submitted at once",
                report.plot_serve, {"rows": rows}, f"{case['model']}, restored requests",
            )  # fmt: skip
        page.figure(
            f"{prompt}-{new}-first", f"Time to first token, raw and patched, {what}",
            "requests that are computed for the first time; the slowest of a hundred (p99: table)",
            figures.first_token, rows,
        )  # fmt: skip
    page.notes(report.serve_lines(result))
    for i, table in enumerate(report.serve_tables(result, "")):
        if i:
            page.origin(f"{str(table.title).capitalize()}.")
        page.table(table, without=("x raw", "of alone", "worker"))


def _baseline(page: Page) -> None:
    page.origin(_load(page.result["case"]))
    page.notes(report.baseline_lines(page.result))
    page.table(report.baseline_table(page.result["rows"], ""))


def _load(case: dict) -> str:
    ranges = ", ".join("-".join(map(str, dict.fromkeys(some))) for some in case["prompt_tokens"])
    weights = "dummy weights" if case["dummy"] else "its weights"
    more = "; of shorter ones as many more as make as many tokens" if len(case["prompt_tokens"]) > 1 else ""
    prompts = f"prompts of {case['prompt_file']}" if case["prompt_file"] else f"random tokens, {ranges} a prompt"
    return f"Model: {case['model']}, {weights}; {prompts}, {case['sets']} sets of {case['prompts']}{more}."


KINDS = {
    "bench": Kind("The codec, and what a link gives", ("rows", "link"), "python bench.py --json", _bench),
    "swap": Kind(
        "Pages to host memory and back", ("rows", "ablation", "tax", "timeline"), "python bench.py swap --json",
        _swap,
    ),
    "soak": Kind("Under load", ("soak",), "python bench.py swap --soak 60 --json", _soak),
    "accuracy": Kind(
        "Rate and accuracy", ("rows", "equal_kl"), "python bench.py accuracy MODEL TEXT --json", _accuracy
    ),
    "layers": Kind("Bits of each layer", ("layer_bits",), "python bench.py report --layers", _layers),
    "baseline": Kind(
        "vLLM without compression", ("case", "sizes", "rows"), "python bench.py baseline MODEL --json", _baseline
    ),
    "serve": Kind("vLLM", ("case", "variants", "over_raw"), "python bench.py serve MODEL --json", _serve),
}  # fmt: skip


# --- all of it ----------------------------------------------------------------------------------------------
def kind_of(result: dict) -> str:
    """Return the key of KINDS that ``result`` is of; raise ValueError with what was expected."""
    keys = set(result) if isinstance(result, dict) else set()
    found = [name for name, kind in KINDS.items() if {"machine", *kind.keys} <= keys]
    if len(found) != 1:
        expected = "; ".join(f"{name}: machine, {', '.join(kind.keys)}" for name, kind in KINDS.items())
        raise ValueError(f"expected the keys of one kind of result ({expected}), got {', '.join(sorted(keys))}")
    return found[0]


def load(folder: Path) -> dict[str, dict[str, dict]]:
    """Return kind -> name -> result of the files under ``folder``; a name is its path there, without ``.json``.

    ``study.json`` is left out: it says how a study came by its files, and has no results.

    Raises:
        ValueError: a file that is no result, by its name.
    """
    results = {name: {} for name in KINDS}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if path.name == "study.json":
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            results[kind_of(result)][name] = result
        except ValueError as error:  # bad JSON as well
            raise ValueError(f"{name}.json: {error}") from None
    return results


def text(results: dict[str, dict[str, dict]]) -> tuple[str, dict[str, Callable]]:
    """Return the report of what ``load`` returned, and figure -> (result file, function that draws to a path)."""
    parts, drawn = [INTRODUCTION, "## Does it pay?\n"], {}
    origin, *answers = advice.committed(results["bench"], results["swap"])
    parts += [f"{origin}\n", *(f"- {line}" for line in answers), ""]
    for name, kind in KINDS.items():
        parts.append(f"## {kind.title}\n")
        for file, result in results[name].items():
            page = Page(file, result, drawn)
            kind.describe(page)
            parts += page.parts
        if not results[name]:
            parts.append(f"No results yet: `{kind.command} results/{name}-<machine>.json` makes them.\n")
    return "\n".join(parts).rstrip("\n") + "\n", drawn


def write(root: Path, step=lambda text: None) -> Path:
    """Write ``docs/report.md`` and ``docs/figures/`` from ``results/``, all in ``root``; return the page's path.

    A figure of an earlier report that this one does not have is removed.

    Raises:
        ValueError: a file that is no result.    ImportError: matplotlib is missing.
    """
    report.pyplot()
    written, drawn = text(load(root / "results"))
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        if path.name not in drawn:
            path.unlink()
    for file, (source, draw) in drawn.items():
        step(file)
        draw(folder / file)
        _stamp(folder / file, f"{source} {digest(root / 'results' / source)}")
    path = root / "docs" / "report.md"
    path.write_text(written, encoding="utf-8")
    return path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stamp(path: Path, source: str) -> None:
    """Write the picture at ``path`` anew: smaller, and with its source in place of versions."""
    from PIL import Image, PngImagePlugin  # matplotlib brings it

    information = PngImagePlugin.PngInfo()
    information.add_text("Source", source)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, pnginfo=information, optimize=True)
