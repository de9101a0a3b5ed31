"""bench.py report: the page, its figures, advice; whether numbers there and in README.md are in the results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import test_accuracy
import test_baseline
import test_serve_bench
import test_swap_bench

import bench
from cuszp_cupy import reference
from cuszp_cupy.evaluation import (
    accuracy,
    advice,
    baseline,
    codec,
    data,
    document,
    figures,
    machine,
    report,
    serve,
    swap,
)
from cuszp_cupy.format import HEADER_BYTES

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?: ?%)?")
#: of a value, so that it is what is printed: as it is, bytes in kB to GB, seconds in ms
SCALES = (1, 1e-3, 1e-6, 1e-9, 1e3)
RESULT = r"results/[\w./-]+\.json"


# --- are they in the results? -------------------------------------------------------------------------------
def records(result, path=(), around=None) -> list[tuple[frozenset, dict, set]]:
    """Return each dict in ``result``: (texts that say what it is, key -> number, whole numbers that go with it).

    Texts: its own, those of dicts around it, and the keys on the way to it. Numbers that go with it: all of the
    nearest member of a list that it is or is part of. A list of numbers is a dict with places for keys.
    """
    if isinstance(result, list):
        members = [value for value in result if isinstance(value, dict | list)]
        found = [one for value in members for one in records(value, path, whole_numbers(value))]
        own = {f"[{i}]": value for i, value in enumerate(result) if is_number(value)}
        return found + ([(frozenset(path), own, around or whole_numbers(own))] if own else [])
    own = {key: value for key, value in result.items() if is_number(value)}
    path = (*path, *(value for value in result.values() if isinstance(value, str) and value))
    found = [(frozenset(path), own, around or whole_numbers(own))]
    for key, value in result.items():
        if isinstance(value, dict | list) and key != "machine":  # whose versions look like figures
            found += records(value, (*path, key), around)
    return found


def whole_numbers(value) -> set[int]:
    if isinstance(value, dict | list):
        return set().union(*map(whole_numbers, value.values() if isinstance(value, dict) else value))
    return {value} if isinstance(value, int) and not isinstance(value, bool) else set()


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def printed_as(number: str, value: float) -> set[float]:
    """Return the scales at which ``value`` is printed as ``number``."""
    digits = number.replace(",", "").replace("−", "-").rstrip(" %")
    half = 0.5000001 * 10.0 ** -len(digits.partition(".")[2])
    scales = (100, 1) if number.endswith("%") else SCALES
    return {scale for scale in scales if abs(value * scale - float(digits)) <= half}


def split_row(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("\\|", "|").strip() for cell in cells]


def tables(text: str):
    """Yield (names of the result files it is from, header, rows) of each table with numbers in ``text``.

    It is from the files that the last paragraph before it names, of those under the same heading.
    """
    named, paragraph, lines = [], "", [*re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines(), ""]
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append(split_row(line))
            continue
        if table:
            header, _, *rows = table
            if any(re.fullmatch(rf"[±~]?{NUMBER.pattern}", cell) for row in rows for cell in row):
                yield named, header, rows
            table = []
        if line.startswith("#"):
            named, paragraph = [], ""
        paragraph = f"{paragraph} {line}" if line else ""
        found = re.findall(RESULT, paragraph)
        named = list(dict.fromkeys(found)) or named


def wrong_figures(text: str, root: Path) -> list[str]:
    """Return what in the tables and measured sentences of ``text`` is not in the result files that it names.

    A row's labels choose the records that may hold its figures: texts of the results in any of its cells, and
    whole numbers of the results in front of its first figure. A column's name does so too, where it is a text of
    the results. Of records alike, those with further texts are left out (transport ``auto`` that used ``staged``
    is no ``staged``). Then all figures of a column, and of the same place in its cells, must be values of one
    key, at one scale. Numbers in sentences must be somewhere in the file.
    """
    wrong = []
    for named, header, rows in tables(text):
        if not named:
            wrong.append(f"the table {' | '.join(header)} names no results/*.json")
            continue
        known = [one for name in named for one in records(read(root / name))]
        texts = frozenset().union(*(where for where, *_ in known))
        chosen = [[one for one in known if {cell for cell in row if cell in texts} <= one[0]] for row in rows]
        first = 0
        for column in range(len(header)):
            cells = [row[column] for row in rows]
            if not any(is_figure(cell, texts) for cell in cells):
                if any(
                    cell in texts for cell in cells
                ):  # labels: one with a figure must be a text of the results
                    wrong += [
                        f"{', '.join(named)}: nothing there is called {cell}"
                        for cell in cells if cell not in texts and re.search(r"\d", cell)
                    ]  # fmt: skip
                first = column + 1
                continue
            if not all(cell.isdigit() or not cell for cell in cells):
                break
            narrowed = [
                [one for one in some if not cell or int(cell) in one[2]]
                for cell, some in zip(cells, chosen, strict=True)
            ]
            if not all(narrowed):
                break
            chosen, first = narrowed, column + 1
        for row, some in zip(rows, chosen, strict=True):
            if not some:
                wrong.append(f"{', '.join(named)}: nothing there is {' | '.join(row)}")
        for column, name in enumerate(header[first:], first):
            about = {name} & texts or set(name.split(", ")) & texts
            figures = [
                (row, column, [numbers for _, numbers, _ in closest([one for one in some if about <= one[0]])])
                for row, some in zip(rows, chosen, strict=True)
                if some and is_figure(row[column], texts)
            ]
            wrong += [f"{', '.join(named)}: {one}" for one in wrong_in_column(name, figures)]
    for paragraph in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        named = sorted(set(re.findall(RESULT, paragraph)))
        if named and not paragraph.startswith(("|", "From [results")):
            values = [
                value for name in named for _, one, _ in records(read(root / name)) for value in one.values()
            ]
            for number in re.findall(r"(?<![\w.:])\d+\.\d+(?: ?%)?(?![\w.]*\d)", paragraph):
                if not any(printed_as(number, value) for value in values):
                    wrong.append(f"{', '.join(named)}: nothing there is {number}")
    return wrong


def closest(some: list) -> list:
    """Return those of the records whose texts are not those of another one, with the same keys, and more."""
    kinds = {(where, frozenset(numbers)) for where, numbers, _ in some}
    further = {(a, keys) for a, keys in kinds if any(b < a and keys == others for b, others in kinds)}
    return [one for one in some if (one[0], frozenset(one[1])) not in further]


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def is_figure(cell: str, texts: frozenset) -> bool:
    return cell not in texts and bool(re.match(rf"[±~]?{NUMBER.pattern}", cell))


def wrong_in_column(name: str, cells: list) -> list[str]:
    """Return what one key and scale do not give of a column: (row, its number, records it may be from)."""
    wrong = []
    for place in range(max((len(NUMBER.findall(row[column])) for row, column, _ in cells), default=0)):
        ways = []  # of each row: its figure, and each (key, scale) that gives it
        for row, column, some in cells:
            numbers = NUMBER.findall(row[column])
            if place < len(numbers):
                number = numbers[place]
                ways.append((row, number, {
                    (key, scale) for record in some for key, value in record.items()
                    for scale in printed_as(number, value)
                }))  # fmt: skip
        best = max({way for *_, found in ways for way in found}, default=None,
                   key=lambda way: (sum(way in found for *_, found in ways), way))  # fmt: skip
        wrong += [
            f"{number} ({name}) is not there, in the row {' | '.join(row)}"
            for row, number, found in ways
            if best not in found
        ]
    return wrong


def test_figures_in_the_readme_are_in_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [named for named, *_ in tables(text)], "no measured table was found"
    assert wrong_figures(text, ROOT) == []


def test_figures_in_the_report_are_in_the_results():
    assert wrong_figures((ROOT / "docs" / "report.md").read_text(encoding="utf-8"), ROOT) == []


def test_an_altered_figure_of_the_readme_is_found():
    """Each one, by one in its last place: few may be another true value of the same kind of row."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Measured\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    figures = [match for match in re.finditer(r"(?<![\w.:])\d+(?:\.\d+)?(?![\w.:])(?! KiB)", section)]
    figures = [
        match
        for match in figures
        if section.rfind("\n|", 0, match.start()) > section.rfind("\n\n", 0, match.start())
    ]
    assert len(figures) > 20 and wrong_figures(section, ROOT) == []
    for match in figures:
        decimals = len(match[0].partition(".")[2])
        other = f"{float(match[0]) + 3 * 10.0**-decimals:.{decimals}f}"
        doctored = section[: match.start()] + other + section[match.end() :]
        assert wrong_figures(doctored, ROOT), (
            f"{match[0]} -> {other} in {section[match.start() - 60 : match.end()]!r}"
        )


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("| data | ratio |\n|---|---|\n| a | 2.15 |\n", "names no results/*.json"),
        ("results/x.json\n\n| data | ratio |\n|---|---|\n| a | 2.15 |\n", None),
        ("results/x.json\n\n| data | ratio |\n|---|---|\n| a | 2.16 |\n", "2.16 (ratio) is not there"),
        ("results/x.json\n\n| data | ratio |\n|---|---|\n| b | 2.15 |\n", "2.15 (ratio) is not there"),
        ("results/x.json\n\n| data | MB | share |\n|---|---|---|\n| a | 268 | 74 % |\n| b | 1.5 | 7 % |\n", None),
        ("results/x.json\n\n| data | MB |\n|---|---|\n| a | 268 |\n| b | 0.070 |\n", "(MB) is not there"),
        ("results/x.json\n\n| page | speed |\n|---|---|\n| 4 | 1.5 / 2.5 |\n| 16 | 3.5 / 4.5 |\n", None),
        ("results/x.json\n\n| page | speed |\n|---|---|\n| 4 | 3.5 / 2.5 |\n| 16 | 3.5 / 4.5 |\n", "3.5 (speed)"),
        ("results/x.json\n\n| page | speed |\n|---|---|\n| 8 | 1.5 / 2.5 |\n", "8 (page) is not there"),
        ("The ratio is 2.15, by results/x.json.\n", None),
        ("The ratio is 2.25, by results/x.json.\n", "nothing there is 2.25"),
        ("results/x.json\n\n# Next\n\n| data | ratio |\n|---|---|\n| a | 2.15 |\n", "names no results/*.json"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_results_is_found(text, finding, tmp_path):
    rows = [
        {"data": "a", "ratio": 2.147, "nbytes": 268435456, "share": 0.739},
        {"data": "b", "ratio": 3.9, "nbytes": 1500000, "share": 0.07},
        {"kib": 4, "up": 1.5, "down": 2.5}, {"kib": 16, "up": 3.5, "down": 4.5},
    ]  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text(json.dumps({"rows": rows}))
    found = wrong_figures(text, tmp_path)
    assert (finding is None and not found) or any(finding in one for one in found), found


# --- the page ------------------------------------------------------------------------------------------------
def test_the_report_is_that_of_the_results():
    """Whoever adds a result runs ``python bench.py report``."""
    written, drawn = document.text(document.load(ROOT / "results"))
    assert (ROOT / "docs" / "report.md").read_text(encoding="utf-8") == written
    folder = ROOT / "docs" / "figures"
    assert {path.name for path in folder.iterdir()} == set(drawn)
    image = pytest.importorskip("PIL.Image", reason="the extra `plot` is not installed")
    for file, (source, _) in drawn.items():
        with image.open(folder / file) as picture:
            assert picture.text["Source"] == f"{source} {document.digest(ROOT / 'results' / source)}", file
            assert picture.width >= 800


# --- samples of every kind --------------------------------------------------------------------------------------
def swap_result() -> dict:
    """Return a result of pages of three sizes, like that of ``bench.py swap``."""
    rows = []
    for kib, raw, loop in ((4, 10.0, 1.5), (64, 50.0, 20.0), (256, 54.0, 40.0)):
        for slots, way, speeds in (
            (slots, way, {"staged": 4.0 * raw * (slots == "arena") + 9.0, "fused": 2.0 * raw})
            for slots in ("arena", "scattered") for way in ("D2H", "H2D")
        ):  # fmt: skip
            speeds |= {swap.LARGE: 55.0, swap.RAW: raw} | ({swap.LOOP: loop} if slots == "scattered" else {})
            for name, gbps in speeds.items():
                ratio = 1.0 if name in (swap.LARGE, swap.RAW, swap.LOOP) else 2.67
                where = {"page_kib": kib, "slots": slots, "direction": way, "transport": name}
                rows.append(test_swap_bench.row(**where, gbps=gbps, ratio=ratio))
    baseline = {"transport": "libcuSZp", "gbps": 0.75, "ratio": 3.5}  # a ratio that is none of ours
    rows += [test_swap_bench.row(page_kib=64, direction=way, **baseline) for way in ("D2H", "H2D")]
    tax = [
        {"work": work, "swap": name, "direction": way, "work_ms": 1.5, "spread_percent": 0.5,
         "slowdown": slowdown, "gbps": None if name is None else 100.0}
        for work in ("GEMM", "copy")
        for name, way, slowdown in ((None, None, 1.0), ("staged", "D2H", 1.125), ("fused", "H2D", 1.5))
    ]  # fmt: skip
    stages = [("store", "encode"), ("store", "copy"), ("load", "copy"), ("load", "decode")]
    calls = {"direction": "store", "transport": "staged", "descriptors": 20000, "host_ms": 3.25, "gbps": 117.5}
    both = {"store_gbps": 101.5, "load_gbps": 99.25, "gbps": 200.75, "spread_percent": 0.25}
    return {
        "parameters": {"quick": True, "bound": "rms:0.05", "coding": "fixed", "batch_bytes": 268435456},
        "rows": rows, "tax": tax, "ablation": [{"store": "staged", "load": "raw"} | both],
        "descriptors": [calls | {"largest_host_ms": 4.5, "device_growth_bytes": 0}], "notes": ["a note"],
        "timeline": [{"direction": d, "stage": s, "begin_ms": 0.25, "end_ms": 2.5} for d, s in stages],
    }  # fmt: skip


SOAK = {
    "parameters": {"quick": False, "bound": "rms:0.05", "soak_minutes": 1.0},
    "soak": {
        "seconds": 60.0, "calls": {"drop": 3}, "pages_stored": 9, "pages_loaded": 8, "mismatches": 0,
        "damaged": 0, "growth_bytes": {"device": 0}, "fragmentation": {"largest": 0.5, "last": 0.25},
    },
}  # fmt: skip


def accuracy_result() -> dict:
    rows = test_accuracy.canned_rows()
    given = {"model": "tiny", "text": "some.txt", "tokens": 512, "context": 256}
    digests = {"config_sha256": "c" * 64, "text_sha256": "d" * 64}
    return {"parameters": given | digests, "rows": rows, "equal_kl": accuracy.at_equal_kl(rows), "notes": []}


def layers_result() -> dict:
    cells = [
        (c, b, layer, p)
        for c in ("fixed", "entropy")
        for b in ("rms:0.05", "rms:0.2")
        for layer in (0, 7)
        for p in "KV"
    ]
    keys = "coding", "bound", "layer", "part"
    return {
        "layer_bits": [
            dict(zip(keys, one, strict=True)) | {"bits_per_value": 3.13 + i / 7} for i, one in enumerate(cells)
        ]
    }


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Write a folder with a result file of every kind, one of them in a folder of its machine's; return it."""
    model = serve.write_shape(tmp_path / "model")
    monkeypatch.setattr(serve, "_run", test_serve_bench.canned)
    load = serve.Case(model, dummy=True, prompt_tokens=((400, 400), (100, 200)), prompts=4, in_flight=(1, 4))
    served = serve.serve(load, ("rms:0.05",)) | {"parameters": {"quick": False}}
    monkeypatch.setattr(serve, "_run", test_baseline.canned)
    baseline_result = baseline.measure(load, (0.5,))
    bench_result = read(ROOT / "results" / "nvidia-h100-80gb-hbm3" / "codec.json")
    made = {
        "bench-h100": bench_result, "gpu/swap": swap_result(), "soak": SOAK, "accuracy": accuracy_result(),
        "layers": layers_result(), "baseline": baseline_result, "serve": served,
    }  # fmt: skip
    for name, result in made.items():
        path = tmp_path / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write_json({"machine": bench_result["machine"]} | result, path)
    (tmp_path / "results" / "gpu" / "study.json").write_text('{"steps": {}}')
    return tmp_path


def test_every_kind_of_result_has_its_section_tables_and_figures(results):
    loaded = document.load(results / "results")
    assert {kind: list(found) for kind, found in loaded.items()} == {
        "bench": ["bench-h100"], "swap": ["gpu/swap"], "soak": ["soak"], "accuracy": ["accuracy"],
        "layers": ["layers"], "baseline": ["baseline"], "serve": ["serve"],
    }  # fmt: skip
    written, drawn = document.text(loaded)
    assert "No results yet" not in written and wrong_figures(written, results) == []
    assert list(drawn) == [
        "bench-h100-link.png", "gpu-swap-pages.png", "gpu-swap-timeline.png", "gpu-swap-tax.png",
        "accuracy-rate.png", "layers-layers.png", "serve-400-1.png", "serve-400-1-first.png",
        "serve-100-200-1.png", "serve-100-200-1-first.png",
    ]  # fmt: skip
    for file in drawn:
        assert f"](figures/{file})" in written
    assert written.count("Not shown: ") == len(drawn)
    assert "[results/gpu/swap.json](../results/gpu/swap.json): cuszp_cupy 0.1.0 · NVIDIA H100" in written
    assert "rms:0.05. A quick run." in written and "- a note" in written and "mismatches: 0" in written
    assert "| 64 | arena | D2H | 209.0 | 100.0 | 55.0 | 50.0 |  | 0.8 | 2.67 |" in written
    doctored = written.replace("| 101.5 |", "| 102.5 |")
    assert doctored != written and "102.5 (store GB/s) is not there" in wrong_figures(doctored, results)[0]


def test_the_same_results_give_the_same_bytes(results, capsys):
    image = pytest.importorskip("PIL.Image", reason="the extra `plot` is not installed")
    figures = results / "docs" / "figures"
    figures.mkdir(parents=True)
    (figures / "gone.png").write_bytes(b"of a result that is no longer there")
    found = []
    for _ in range(2):
        assert bench.main(["report", "--root", str(results)]) == 0
        assert capsys.readouterr().out.strip() == str(results / "docs" / "report.md")
        found.append({path: path.read_bytes() for path in (results / "docs").rglob("*.*")})
    assert found[0] == found[1] and len(found[0]) == 11
    for path in figures.iterdir():
        with image.open(path) as picture:
            assert picture.width >= 800 and path.stat().st_size < 100_000
            source, digest = picture.text["Source"].split()
            assert document.digest(results / "results" / source) == digest


def test_every_variant_of_the_first_token_is_in_the_legend(tmp_path, monkeypatch):
    """recompute has the pass with the most in flight alone, so the first panel does not have all of them."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    names, at = [], [float(n) for n in range(1, 22)]
    monkeypatch.setattr(figures, "_save", lambda figure, path: names.extend(figure.legends[0].texts))
    rows = [
        {"variant": variant, "in_flight": n, "first_token_ms_percentiles": at}
        for variant, flights in (("recompute", (16,)), ("raw", (1, 16)))
        for n in flights
    ]
    figures.first_token(rows, tmp_path / "x.png")
    assert sorted(name.get_text() for name in names) == ["raw", "recompute"]


def test_a_section_without_results_says_what_makes_them():
    written, drawn = document.text({kind: {} for kind in document.KINDS})
    assert not drawn and written.count("No results yet: `python bench.py") == len(document.KINDS)
    assert "Not known: no speeds yet" in written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"machine": {}, "rows": []}', "new.json: expected the keys of one kind of result (bench: machine,"),
        ("[1]", "new.json: expected the keys of one kind of result"),
        ("{", "new.json: Expecting property name"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_is_named(content, message, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").write_text(content)
    assert bench.main(["report", "--root", str(tmp_path)]) == 1
    assert f"bench.py report: {message}" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_a_report_without_matplotlib_says_what_to_install(monkeypatch, results):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"install the extra, cuszp_cupy\[plot\]"):
        document.write(results)


def test_wrong_folders_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["report", "--root", str(tmp_path)])
    assert "there is no folder results in it" in capsys.readouterr().err


# --- bits of layers ---------------------------------------------------------------------------------------------
def test_bits_of_layers_are_those_of_their_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(codec, "LAYER_BOUNDS", ("rms:0.05",))
    monkeypatch.setattr(codec, "KV_CODINGS", ("fixed",))
    assert bench.main(["report", "--layers", str(path := tmp_path / "layers.json")]) == 0
    result = read(path)
    assert document.kind_of(result) == "layers" and len(result["layer_bits"]) == 8
    (found,) = (row for row in result["layer_bits"] if (row["layer"], row["part"]) == (7, "V"))
    pages = data.kv_pages()["V"][32:64]  # layer 7 is the sample's second; 32 windows of 16 tokens each
    nbytes = sum(len(reference.encode_page(page, "rms:0.05")) - HEADER_BYTES + 16 for page in pages)
    assert found["bits_per_value"] == 8 * nbytes / pages.size


# --- advice -----------------------------------------------------------------------------------------------------
def test_advice_names_coding_transport_page_size_and_link():
    rows = [
        codec.row(
            data="KV", codec=name, bound="rms:0.05", ratio=ratio, compress_gbps=speed, decompress_gbps=speed
        )
        for name, ratio, speed in (("kv fixed", 2.5, 1000.0), ("kv entropy", 3.0, 120.0))
    ]
    link = [{"what": "copy", "to_host_raw_gbps": 50.0, "from_host_raw_gbps": 40.0}]
    lines = advice.lines({"rows": rows, "link": link}, swap_result())
    assert lines[0].startswith("It pays where a server waits for the link")
    assert lines[2] == (  # entropy gives 120 and 120, fixed 125 and 100
        "rms:0.05: kv entropy, ratio 3.00: up to 120 GB/s to the host, 120 from it, 2.40 and 3.00 times the "
        "link. A link gives the whole ratio up to 40 GB/s; from 120 on raw copies are faster."
    )
    assert lines[3] == (
        "Pages in the arena, to the host: faster than large copy from 64 KiB on. The best, GB/s: "
        "4 KiB staged 49, 64 KiB staged 209, 256 KiB staged 225."
    )
    assert lines[5] == (
        "Pages scattered, to the host: faster than raw copy at every size measured, 4 to 256 KiB; than one "
        "call a page at every size measured, 4 to 256 KiB. The best, GB/s: 4 KiB fused 20, 64 KiB fused 100, "
        "256 KiB fused 108."
    )
    assert lines[-1] == "Work beside it takes at most: staged 1.12 times, fused 1.50 times as long."
    link = [{"what": "copy", "to_host_raw_gbps": 2000.0, "from_host_raw_gbps": 2000.0}]
    slow, *_, last = advice.lines({"rows": rows, "link": link}, None)
    assert slow == "It does not pay on this link: the codec is slower." and "not measured" in last
    assert advice.pays_from({4: 1.0, 16: 3.0}, {4: 2.0, 16: 4.0}) == "at no size up to 16 KiB"
    assert advice.pays_from({4: 3.0, 16: 3.0}, {4: 2.0, 16: 4.0}) == "at no size up to 16 KiB"  # not on from 4


def test_without_a_gpu_the_advice_is_that_of_the_results_and_says_so(results, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpu_missing", lambda: "hidden by the test")
    assert bench.main(["report", "--advise", "--root", str(results)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(
        "Not of this machine. hidden by the test Measured on NVIDIA H100 80GB HBM3 (results/bench"
    )
    assert "results/gpu/swap.json" in shown and "rms:0.05: kv entropy, ratio 3.16: up to 174 GB/s to" in shown


def test_on_a_gpu_the_advice_is_measured(monkeypatch, capsys):
    bench_result = read(ROOT / "results" / "nvidia-h100-80gb-hbm3" / "codec.json")
    monkeypatch.setattr(machine, "gpu_missing", lambda: None)
    monkeypatch.setattr(advice, "measure", lambda step: (bench_result, swap_result()))
    assert bench.main(["report", "--advise"]) == 0
    assert capsys.readouterr().out.startswith("It pays where")


@pytest.mark.gpu
def test_the_advice_of_this_gpu(monkeypatch, capsys):
    monkeypatch.setattr(advice, "ADVICE_KIB", (16, 64))  # two sizes show whether one follows the other
    monkeypatch.setattr(advice, "SECONDS", 0.05)
    assert bench.main(["report", "--advise"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for expected in (
        "The link, in one large copy: ",
        "rms:0.05: kv ",
        "Pages in the arena, to the host: faster than ",
    ):
        assert expected in shown
    assert "16 KiB" in shown and "Not of this machine" not in shown
