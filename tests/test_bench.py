"""bench.py and cuszp_cupy.evaluation: the numbers they report are the ones a caller gets by hand."""

import itertools
import json
import math
import sys

import ml_dtypes
import numpy as np
import pytest

import bench
from cuszp_cupy import reference
from cuszp_cupy.bound import Bound
from cuszp_cupy.evaluation import codec, data, machine, report, speed, timing
from cuszp_cupy.format import HEADER_BYTES


# --- data -------------------------------------------------------------------------------------------------
def test_pages_lie_where_the_sample_says():
    sample, pages = data.kv_sample(), data.kv_pages()
    assert sample.dtype == ml_dtypes.bfloat16 and np.isfinite(sample.astype(np.float32)).all()
    # page 33 is layer 1, tokens 16..31; its second 64 channels are head 1
    np.testing.assert_array_equal(pages["V"][33][:, 64:128], sample[1, 1, 1, 16:32])


@pytest.mark.parametrize(("heads", "head_size", "n"), [(8, 128, 24), (8, 64, 48), (1, 64, 384)])
def test_packed_pages_alternate_k_and_v_by_head(heads, head_size, n):
    sample, pages = data.kv_sample(), data.packed_pages(heads, head_size)
    assert pages.shape == (n, 16, 2 * heads * head_size)
    np.testing.assert_array_equal(pages[0][:, :64], sample[0, 0, 0, :16])  # K of head 0
    np.testing.assert_array_equal(pages[0][:, head_size : head_size + 64], sample[0, 1, 0, :16])  # its V
    # the first page of layer 2, none of whose values come from another layer
    np.testing.assert_array_equal(pages[n // 2][:, :64], sample[2, 0, 0, :16])
    layer_v = np.sort(np.unique(sample[2, 1].view(np.uint16)))
    assert np.isin(pages[n // 2].reshape(16, heads, 2, head_size)[:, :, 1].view(np.uint16), layer_v).all()


def test_bad_page_shapes_and_dtypes_are_named():
    with pytest.raises(ValueError, match="a divisor of 512, got 7"):
        data.kv_pages(tokens=7)
    with pytest.raises(ValueError, match="multiple of 64"):
        data.packed_pages(8, 100)
    with pytest.raises(ValueError, match="fills only 96 x 64"):
        data.packed_pages(64, 128)
    with pytest.raises(ValueError, match="float16 or bfloat16, got 'float32'"):
        data.kv_pages(dtype="float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tiles_differ_but_code_to_the_same_size(dtype):
    pages = data.kv_pages(dtype=dtype)["V"][:8]
    tiles = data.tiled(pages, 3 * pages.nbytes, seed=1)  # three copies: two would allow a plain and a flipped one
    assert tiles.shape == (24, 16, 192) and tiles.dtype == pages.dtype
    assert len({tile.tobytes() for tile in tiles}) == 24
    magnitudes = {abs(page.astype(np.float32)).tobytes() for page in pages}
    assert {abs(tile.astype(np.float32)).tobytes() for tile in tiles} == magnitudes
    sizes = sorted(len(reference.encode_page(page)) for page in pages)
    assert sorted(len(reference.encode_page(tile)) for tile in tiles) == sorted(3 * sizes)
    np.testing.assert_array_equal(tiles, data.tiled(pages, 3 * pages.nbytes, seed=1))
    assert (tiles != data.tiled(pages, 3 * pages.nbytes, seed=2)).any()


def test_tiles_keep_positive_zeros_and_take_part_of_a_copy():
    pages = np.zeros((3, 16, 2), np.float16)
    tiles = data.tiled(pages, 4 * pages[0].nbytes)
    assert tiles.shape == (4, 16, 2) and not np.signbit(tiles).any()
    with pytest.raises(ValueError, match="multiple of a page's 64 bytes, got 100"):
        data.tiled(pages, 100)


# --- timing -----------------------------------------------------------------------------------------------
def test_summary_is_the_median_and_half_the_interquartile_range():
    assert timing.summary([4.0, 1.0, 3.0, 2.0, 100.0]) == timing.Timing(3.0, 33.3, 5)  # quartiles 2 and 4
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        timing.summary([1.0])


def test_samplers_take_turns_and_the_warm_up_does_not_count():
    order, ticks, first = [], itertools.count(), iter([1000.0])

    def sampler(name, ms):
        return lambda: order.append(name) or next(first, ms)  # the very first sample of all is slow

    result = timing.interleaved(
        {"a": sampler("a", 1.0), "b": sampler("b", 2.0)}, 8, warmup_seconds=0, clock=lambda: next(ticks)
    )
    assert "".join(order) == "ab" * (len(order) // 2)
    assert result["a"].ms == 1.0 and result["a"].spread_percent == 0 and result["b"].ms == 2.0
    assert result["a"].num_samples >= 5


# --- measurements -----------------------------------------------------------------------------------------
def test_error_is_measured_against_each_part_and_page():
    # K of RMS 4 and V of RMS 1, errors 1 and 0.5: over the mixture both would look the same
    x = np.tile(np.array([4, 4, 1, 1], np.float16), (2, 16, 1))
    y = x + np.array([1, 0, 0, 0.5], np.float16)
    assert codec.page_error_over_eb(x, y, "rms:0.5", (2, 2)) == pytest.approx(1.0)
    assert codec.page_error_over_eb(x, y, "abs:0.5") == 2.0
    assert codec.page_error_over_eb(x, y, "rel:0.5") == pytest.approx(1 / 1.5)
    y[1, 3, 2] = np.nan
    assert codec.page_error_over_eb(x, y, "rms:0.5", (2, 2)) == math.inf


def test_a_broken_bound_stops_the_measurement():
    assert codec.check_within(1.0, "kv") == 1.0
    for broken in (1.001, math.inf, math.nan):
        with pytest.raises(AssertionError, match="kv: the bound is broken"):
            codec.check_within(broken, "kv")


def test_groups_of_channels_differ_in_their_bits_alone():
    """The ablation of grouping: the same pages, parts and steps, so the same values come back."""
    by_token, *_, by_channel = codec.page_sets()
    assert by_channel.pages is by_token.pages and by_channel.name == "KV 64 KiB, by channel"
    assert by_channel.geometry.flat and not by_token.geometry.flat
    sizes, decoded = [], []
    for pages in (by_token, by_channel):
        blobs = [reference.encode_page(page, "rms:0.05", geometry=pages.geometry) for page in pages.pages[:3]]
        sizes.append(sum(map(len, blobs)))
        decoded.append([reference.decode_page(blob).view(np.uint16).ravel() for blob in blobs])
        row = codec._reference_pages(pages.name, pages.pages[:3], pages.geometry, "fixed", "rms:0.05")
        assert 0.5 < row["max_error_over_eb"] <= 1 + codec.RMS_TOLERANCE
    np.testing.assert_array_equal(*decoded)
    assert sizes[1] > 1.05 * sizes[0]


def test_rate_at_five_percent_is_below_six_bits():
    """Where sqrt(3) RMSE = 0.05 RMS, mean of K and V; a halving of the error costs about a bit."""
    points = codec.rate_error(quick=True)
    bits = []
    for part in data.PARTS:
        curve = sorted((p["rmse"], p["bits_per_value"]) for p in points if p["part"] == part)
        error, rate = np.array(curve).T
        assert error[0] < 0.05 / math.sqrt(3) < error[-1]
        bits.append(np.interp(math.log2(0.05 / math.sqrt(3)), np.log2(error), rate))
    assert np.mean(bits) <= 6.0


def run(arguments, monkeypatch, *, gpu):
    """Run bench.py in this process, with the GPU hidden unless ``gpu``."""
    if not gpu:
        monkeypatch.setattr(machine, "gpu_missing", lambda: "hidden by the test")
    return bench.main(arguments)


def test_quick_without_a_gpu_reports_what_the_reference_gives(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    assert run(["--quick", "--json", str(path)], monkeypatch, gpu=False) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"] is None and result["machine"]["python"] == sys.version.split()[0]
    assert result["machine"]["versions"]["numpy"] == np.__version__

    rows = [row for row in result["rows"] if row["codec"] == "kv fixed"]
    assert [row["bound"] for row in rows] == list(codec.KV_BOUNDS)
    pages = codec.page_sets(quick=True)[0]
    taken = pages.pages[::6]
    for row in rows:
        blobs = [reference.encode_page(page, row["bound"], geometry=pages.geometry) for page in taken]
        nbytes = sum(map(len, blobs)) - len(blobs) * (HEADER_BYTES - 16)
        assert row["bits_per_value"] == 8 * nbytes / taken.size
        assert row["ratio"] == taken.nbytes / nbytes
        assert 0.5 < row["max_error_over_eb"] <= 1 + codec.RMS_TOLERANCE
    assert rows[0]["bits_per_value"] > rows[1]["bits_per_value"] > rows[2]["bits_per_value"]

    x = codec.array_sample()[:1024]
    eb = Bound.parse(codec.ARRAY_BOUND).value * float(x.max() - x.min())
    stream = reference.compress(x, eb, "outlier")
    (row,) = [row for row in result["rows"] if row["codec"] == "cuszp outlier"]
    assert row["bits_per_value"] == 8 * len(stream) / x.size

    shown = capsys.readouterr().out
    assert "hidden by the test" in shown and f"{rows[1]['ratio']:.2f}" in shown and "GB/s" not in shown


def test_plot_writes_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = tmp_path / "rate.png"
    assert run(["--quick", "--plot", str(path)], monkeypatch, gpu=False) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"install the extra, cuszp_cupy\[plot\]"):
        run(["--quick", "--plot", str(tmp_path / "rate.png")], monkeypatch, gpu=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "no/such/folder/x.json"], "the folder no/such/folder does not exist"),
        (["--plot", "."], "this is a folder"),
        (["--device", "one"], "invalid int value: 'one'"),
        (["--device", "0"], "--device 0: hidden by the test"),
        (["--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(arguments, monkeypatch, gpu=False)
    assert message in capsys.readouterr().err


def test_machine_says_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail
    assert "install the extra cuda12 or cuda13" in machine.gpu_missing()
    described = machine.describe()
    assert described["gpu"] is None and described["num_cpus"] >= 1
    assert "no GPU" in machine.title(described)


def test_codec_table_shows_speeds_where_there_are_some():
    rows = [codec.row(data="x", codec="copy", compress_gbps=1300.0, compress_of_copy=1.0)]
    assert "GB/s" in report.codec_table(rows, "t").caption
    assert len(report.codec_table(rows, "t").columns) == 13
    assert len(report.codec_table([codec.row(data="x", codec="kv")], "t").columns) == 7


# --- on a GPU ---------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_tiles_are_the_same_on_the_gpu():
    import cupy

    pages = data.packed_pages(8, 128)
    tiles = data.tiled(pages, 50 * pages[0].nbytes, seed=3, xp=cupy)
    expected = data.tiled(pages, 50 * pages[0].nbytes, seed=3)
    np.testing.assert_array_equal(cupy.asnumpy(tiles.view(cupy.uint16)), expected.view(np.uint16))


@pytest.mark.gpu
def test_events_time_a_copy_in_proportion():
    import cupy

    x = cupy.zeros(256 << 20, cupy.uint8)
    y = cupy.empty_like(x)

    def copy(nbytes):
        return timing.events(lambda i: speed.copy_bytes(y.data.ptr, x.data.ptr, nbytes), 2)

    result = timing.interleaved({"all": copy(x.nbytes), "half": copy(x.nbytes // 2)}, 0.2)
    assert 1.6 < result["all"].ms / result["half"].ms < 2.4  # launch gaps would pull this towards 1
    assert result["all"].ms > 256 * 2**20 * 2 / 10e12 * 1e3  # no memory moves 10 TB/s


@pytest.mark.gpu
def test_quick_on_a_gpu_verifies_and_times(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    assert run(["--quick", "--json", str(path)], monkeypatch, gpu=True) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"]["name"]
    copy, *others = result["rows"]
    assert copy["codec"] == "copy" and copy["compress_of_copy"] == 1
    for row in others:
        if row["codec"] == "kv fixed":
            assert row["ratio"] > 1 and row["compress_gbps"] > 0 and 0 < row["decompress_of_copy"] < 1.5
    assert {row["what"] for row in result["link"]} >= {"copy", "kv fixed"}
    assert "of copy" in capsys.readouterr().out
