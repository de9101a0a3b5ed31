"""bench.py swap: its arithmetic and tables, what it says without a GPU; on a GPU the whole of it, once."""

import json
import sys
import types

import numpy as np
import pytest

import bench
from cuszp_cupy import Geometry, reference
from cuszp_cupy.evaluation import data, machine, report, soak, speed, swap, tax, timing
from cuszp_cupy.raw import library


# --- pages ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kib", "tokens"), [(4, 16), (16, 16), (64, 16), (256, 64), (2048, 512)])
def test_pages_have_the_size_asked_for_and_keep_to_one_layer(kib, tokens):
    pages = swap.page_set(kib)
    assert pages.geometry.nbytes == pages.pages[0].nbytes == kib << 10
    assert pages.geometry == Geometry(tokens, pages.pages.shape[2], parts=pages.geometry.parts)
    width = pages.geometry.parts[0]
    values = pages.pages[0].reshape(tokens, -1, 2, width)[:, :, 1].view(np.uint16) & 0x7FFF  # magnitudes of V
    layer_v = data.kv_sample()[0, 1].view(np.uint16) & 0x7FFF
    assert np.isin(values, layer_v).all()


def test_large_pages_shrink_as_small_ones_do():
    ratios = []
    for kib in (64, 256):
        pages = swap.page_set(kib)
        sizes = [len(reference.encode_page(p, "rms:0.05", geometry=pages.geometry)) for p in pages.pages[:4]]
        ratios.append(len(sizes) * pages.geometry.nbytes / sum(sizes))
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)


# --- arithmetic -------------------------------------------------------------------------------------------
def test_the_first_batch_is_not_counted_and_the_slower_flow_decides():
    assert swap.steady_ms([[100.0, 102.0, 104.0]]) == 2.0
    assert swap.steady_ms([[10.0, 11.0, 12.0], [12.0, 14.0, 16.0]]) == 3.0


def test_rate_counts_only_batches_inside_the_window():
    times = [0.0, 2.0, 4.0, 6.0, 60.0]
    assert swap.rate_gbps(times, 1.0, 7.0, 2_000_000) == 1.0
    assert swap.rate_gbps(times, 5.0, 7.0, 2_000_000) is None  # one batch has no rate


def row(**values):
    return dict.fromkeys(swap.ROW) | {
        "page_kib": 64, "slots": "arena", "direction": "D2H", "transport": "staged", "used": "staged",
        "gbps": 100.0, "spread_percent": 1.0, "alone_gbps": 90.0, "link_gbps": 40.0, "ratio": 2.5,
        "host_bytes": 107e6, "host_ms": 0.5, "mispredicted": 0,
    } | values  # fmt: skip


def canned_rows():
    rows = [row(direction=way, overlap=1.8) for way in swap.DIRECTIONS]
    for way, gbps in (("D2H", 50.0), ("D2H", 40.0), ("H2D", 80.0), ("both", 100.0)):
        rows.append(row(direction=way, transport=swap.LARGE, used="", gbps=gbps, ratio=1.0))
    swap.add_shares(rows)
    return rows


def test_shares_are_of_ratio_times_the_best_large_copy_of_that_direction():
    rows = canned_rows()
    assert [r["of_copy"] for r in rows] == [2.0, 1.25, 1.0, 1.0, 0.8, 1.0, 1.0]
    assert [r["share"] for r in rows] == pytest.approx([0.8, 0.5, 0.4, 1.0, 0.8, 1.0, 1.0])


def test_feeder_keeps_batches_in_flight_and_no_more(monkeypatch):
    class Event:
        reached = False

    events = []
    monkeypatch.setattr(timing, "reached", lambda event: event.reached)

    def start(i):
        assert i == len(events)
        events.append(Event())
        return swap.Copy(events[-1])

    feeder = swap.Feeder(start)
    feeder.top_up()
    feeder.top_up()
    assert len(events) == swap.DEPTH
    events[0].reached = events[1].reached = True
    feeder.top_up()
    assert len(events) == swap.DEPTH + 2 and feeder.events == events


# --- soak -------------------------------------------------------------------------------------------------
def test_model_forgets_what_a_packed_row_loses():
    model = soak.Model(8, 4)
    model.store(np.arange(8), np.arange(10, 18), raw=False)  # both rows packed
    model.store(np.array([1]), np.array([5]), raw=False)
    assert model.content.tolist() == [-1, 5, -1, -1, 14, 15, 16, 17]
    model.store(np.array([2]), np.array([6]), raw=False)  # not packed any more: nothing is lost
    assert model.content[:4].tolist() == [-1, 5, 6, -1]
    model.store(np.arange(4, 8), np.arange(4), raw=True)  # raw pages lie at home
    model.store(np.array([4]), np.array([9]), raw=False)
    assert model.content[4:].tolist() == [9, 1, 2, 3]
    assert model.stored().tolist() == [1, 2, 4, 5, 6, 7]


def test_soak_pages_are_of_all_kinds():
    x, decoded, pages = soak.library("rms:0.05", "fixed")
    assert x.shape == decoded.shape == (len(x), pages.geometry.values)
    same = (x == decoded).all(axis=1)
    assert same.any() and not same.all()  # raw ones among others
    assert any(len(np.unique(page)) == 1 and page[0] == 0 for page in x)


def test_slots_of_a_soak_are_distinct():
    rng = np.random.default_rng(0)
    for num in (1, 7, soak.MOST_PAGES):  # one, less than a row, the most
        for _ in range(20):
            slots = soak.some_slots(rng, num)
            assert (
                len(np.unique(slots)) == len(slots) >= num and 0 <= slots.min() and slots.max() < soak.NUM_SLOTS
            )


def test_a_soak_tells_which_pages_came_back_wrong():
    class Found(np.ndarray):
        def get(self, stream):
            return np.asarray(self)

    transfer = types.SimpleNamespace(query=lambda: True, transport="staged", failed={7: "its checksum is wrong"})
    expected = np.arange(12, dtype=np.uint16).reshape(3, 4)
    loaded = expected.copy()
    loaded[1, 1:3], loaded[2, 3] = 99, 99
    slots, addresses = np.array([5, 7, 9]), np.array([1 << 40, 32, 48])
    found = soak.differences(loaded, expected).view(Found)
    wrong = soak.Load(transfer, slots, addresses, np.array([False, False, True]), found, None).wrong(None)
    assert [(p["slot"], p["differ"], p["first"], p["last"], p["raw"], p["reason"]) for p in wrong] == [
        (7, 2, 1, 2, False, "its checksum is wrong"),
        (9, 1, 3, 3, True, None),
    ]
    assert soak.Load(transfer, slots[:1], addresses, slots < 0, found[:, :1], None).wrong(None) == []
    result = {
        "seconds": 1.0, "calls": {}, "growth_bytes": {}, "pages_stored": 0, "pages_loaded": 3, "mismatches": 2,
        "damaged": 1, "wrong": wrong, "fragmentation": {"largest": 0.0, "last": 0.0},
    }  # fmt: skip
    assert "wrong: slot 7, address 32, raw False, transport staged" in "\n".join(report.soak_lines(result))


# --- libcuSZp ---------------------------------------------------------------------------------------------
def test_missing_library_is_noted_once_with_what_to_do(monkeypatch):
    monkeypatch.setenv("CUSZP_LIBRARY", "/nowhere/libcuSZp.so")
    notes = []
    assert not speed.find_library(notes) and not speed.find_library(notes)
    (note,) = notes
    assert note.startswith("libcuSZp is left out: ") and "set CUSZP_LIBRARY=/path/to/libcuSZp.so" in note


def test_library_is_noted_with_version_and_path(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: library.Library("/some/libcuSZp.so", "3.0.0", None))
    notes = ["another"]
    assert speed.find_library(notes) and speed.find_library(notes)
    assert notes == ["another", "libcuSZp 3.0.0: /some/libcuSZp.so"]


def test_missing_nvcomp_is_noted_once_with_what_to_do(monkeypatch):
    monkeypatch.delitem(sys.modules, "nvidia.nvcomp", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    notes = []
    assert speed.find_nvcomp(notes) is speed.find_nvcomp(notes) is None
    (note,) = notes
    assert note.startswith("nvCOMP is left out ") and "install nvidia-nvcomp-cu13" in note


# --- what is shown ----------------------------------------------------------------------------------------
def text(table) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_swap_table_shows_rows_and_its_units():
    shown = text(report.swap_table(canned_rows(), "title", swap.BATCH_BYTES))
    assert "batches of 268 MB" in shown
    (line,) = [line.split() for line in shown.splitlines() if "arena" in line and "D2H" in line][:1]
    assert line == "64 arena D2H staged 100.0 1.0 90.0 2.00 80% 40.0 2.50 1.80 107 0.50".split()


def test_small_tables_show_their_rows():
    tax_rows = [
        {
            "work": "GEMM",
            "swap": s,
            "direction": d,
            "work_ms": ms,
            "spread_percent": 0.1,
            "slowdown": ms,
            "gbps": g,
        }
        for s, d, ms, g in ((None, None, 1.0, None), ("staged", "D2H", 1.25, 140.0))
    ]
    assert "GEMM nothing 1.000 0.1 1.00" in " ".join(text(report.tax_table(tax_rows)).split())
    assert "staged D2H 1.250 0.1 1.25 140.0" in " ".join(text(report.tax_table(tax_rows)).split())
    ablation = {"store": "staged", "load": "raw", "store_gbps": 99.0, "load_gbps": 44.0, "gbps": 143.0}
    shown = text(report.ablation_table([ablation | {"spread_percent": 0.5}]))
    assert "staged raw 99.0 44.0 143.0 0.5" in " ".join(shown.split())
    calls = {"direction": "store", "transport": "staged", "descriptors": 20000, "host_ms": 3.0, "gbps": 120.0}
    shown = text(report.descriptor_table([calls | {"largest_host_ms": 4.0, "device_growth_bytes": 0}]))
    assert "store staged 20000 3.00 4.00 120.0 0.0" in " ".join(shown.split())


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    stages = [("store", "encode"), ("store", "copy"), ("load", "copy"), ("load", "decode")]
    timeline = [{"direction": d, "stage": s, "begin_ms": 0.0, "end_ms": 1.0} for d, s in stages]
    path = tmp_path / "swap.png"
    report.plot_swap({"rows": canned_rows(), "timeline": timeline}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


# --- the command line -------------------------------------------------------------------------------------
def test_without_a_gpu_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "gpu_missing", lambda: "hidden by the test")
    path = tmp_path / "out.json"
    assert bench.main(["swap", "--quick", "--json", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "bench.py swap needs a GPU: hidden by the test\n" and not captured.out
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bound", "rms"], "rms"),
        (["--seconds", "0"], "expected a positive number, got 0"),
        (["--soak", "inf"], "expected a positive number, got inf"),
        (["--soak", "long"], "invalid _positive value: 'long'"),
        (["--json", "no/such/folder/x.json"], "the folder no/such/folder does not exist"),
        (["fast"], "unrecognized arguments: fast"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["swap", *arguments])
    assert message in capsys.readouterr().err


def test_arguments_have_the_documented_defaults():
    options = bench.swap_parser().parse_args([])
    assert vars(options) == {
        "quick": False, "json": None, "plot": None, "bound": "rms:0.05", "coding": "fixed",
        "seconds": None, "soak": None, "device": None,
    }  # fmt: skip


@pytest.mark.parametrize("found", ["mismatches", "damaged"])
def test_a_wrong_page_makes_the_soak_fail(found, monkeypatch, capsys):
    result = {
        "seconds": 1.0, "calls": {"drop": 1}, "pages_stored": 1, "pages_loaded": 1, "mismatches": 0, "damaged": 0,
        "growth_bytes": {"device": 0}, "fragmentation": {"largest": 0.5, "last": 0.0},
    }  # fmt: skip
    monkeypatch.setattr(machine, "gpu_missing", lambda: None)
    described = machine.describe
    monkeypatch.setattr(machine, "_gpu", lambda: None)
    monkeypatch.setattr(machine, "describe", lambda: described() | {"gpu": None})
    monkeypatch.setattr(soak, "soak", lambda minutes, bound, coding, step: result)
    assert bench.main(["swap", "--soak", "1"]) == 0
    result[found] = 1
    assert bench.main(["swap", "--soak", "1"]) == 1
    assert f"{'damaged pages' if found == 'damaged' else found}: 1" in capsys.readouterr().out


# --- on a GPU ---------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # whatever torch has to say when it is imported
def test_quick_on_a_gpu_verifies_and_times(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert bench.main(["swap", "--quick", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"]["name"] and result["parameters"]["bound"] == "rms:0.05"
    by = {(r["slots"], r["direction"], r["transport"]): r for r in result["rows"]}
    for slots in ("arena", "rows 512 KiB"):
        for way in swap.DIRECTIONS:
            staged = by[slots, way, "staged"]
            assert staged["ratio"] > 2 and 0 < staged["share"] < 1.1 and staged["overlap"] > 0
            # with both at once a raw copy may be slower than the link: at most what each direction carries alone
            ways = ("D2H", "H2D") if way == "both" else (way,)
            assert staged["link_gbps"] < 1.1 * sum(by["arena", one, swap.LARGE]["gbps"] for one in ways)
    assert by["arena", "D2H", "staged"]["host_bytes"] < swap.BATCH_BYTES / 2
    if speed.find_library([]):
        for way in ("D2H", "H2D"):
            baseline = by["arena", way, "libcuSZp"]
            assert baseline["used"] == "library" and baseline["ratio"] > 1.5
            assert 0 < baseline["gbps"] < by["arena", way, "staged"]["gbps"]
    else:
        assert any("libcuSZp is left out" in note for note in result["notes"])
    if speed.find_nvcomp([]):
        for way in ("D2H", "H2D"):
            peer = by["arena", way, "nvCOMP ANS"]
            assert 1.2 < peer["ratio"] < 2 and 0 < peer["gbps"] < by["arena", way, "staged"]["gbps"]
    else:
        assert any("nvCOMP is left out" in note for note in result["notes"])
    beside = {None, "raw DMA", "raw copy kernel", "staged", tax.EQUAL, "fused"}
    assert {row["swap"] for row in result["tax"]} == beside
    assert len(result["ablation"]) == 4 and len(result["descriptors"]) == 2
    assert {stage["stage"] for stage in result["timeline"]} == {"encode", "copy", "decode"}
    assert "the tax" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("coding", ["fixed", "entropy"])
def test_a_short_soak_finds_nothing(coding):
    for minutes in (0.05, 0.5):  # a busy machine has time for too few calls in the first
        result = soak.soak(minutes, "rms:0.05", coding)
        assert (result["mismatches"], result["damaged"]) == (0, 0), result
        evicted = coding == "entropy" or "evictions" in result["calls"]  # its pages are smaller, and come slower
        if evicted and result["pages_loaded"] > 100:
            break
    assert result["pages_loaded"] > 100 and evicted
