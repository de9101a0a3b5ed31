"""bench.py accuracy: its formats, pages and statistics by literals; with torch a tiny model, end to end."""

import io
import json
import math

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import bench
from cuszp_cupy import Geometry, reference
from cuszp_cupy.evaluation import accuracy, emulated, report
from cuszp_cupy.evaluation.accuracy import Variant

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (2, 3, 32, 64)  # two windows, heads that are no power of two, two pages a window, channels of SmolLM2


def cache(seed: int, shape=SHAPE) -> np.ndarray:
    """Return bfloat16 values whose channels differ 100-fold in scale, as those of K do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32) * np.geomspace(0.1, 10, shape[3], dtype=np.float32)
    return x.astype(BFLOAT16)


# --- emulated formats -------------------------------------------------------------------------------------
def finite_bfloat16() -> np.ndarray:
    x = np.arange(2**16, dtype=np.uint16).view(BFLOAT16).astype(np.float32)
    return x[np.isfinite(x)]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (448, 448), (464, 448), (1e30, 448), (-500, -448),  # saturates: there is no infinity
        (17, 16), (19, 20), (18, 18), (25, 24), (27, 28),  # ties to even
        (2**-6, 2**-6), (2**-9, 2**-9), (2**-10, 0), (1.5 * 2**-9, 2**-8), (2.5 * 2**-9, 2**-8),  # subnormal
        (0.1, 0.1015625), (0, 0),
    ],
)  # fmt: skip
def test_e4m3_values(x, expected):
    assert emulated.e4m3(np.float32([x]))[0] == expected


@pytest.mark.parametrize(
    ("function", "dtype", "largest"),
    [(emulated.e4m3, ml_dtypes.float8_e4m3fn, 448), (emulated.e2m1, ml_dtypes.float4_e2m1fn, 6)],
)
def test_small_floats_are_those_of_ml_dtypes(function, dtype, largest):
    x = finite_bfloat16()
    expected = np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(function(x), expected)


def test_e2m1_has_these_values_and_no_others():
    found = emulated.e2m1(np.linspace(-10, 10, 4001, dtype=np.float32))
    assert np.unique(np.abs(found)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_nvfp4_scales_are_rounded_to_e4m3():
    x = np.zeros((1, 1, 1, 32), np.float32)
    x[0, 0, 0, :3] = 2688, -1344, 100  # 2688 = 448 x 6: the tensor's scale is 1, this block's 448
    x[0, 0, 0, 16:19] = 6.6, 3.3, 0.5  # 6.6 / 6 = 1.1 becomes 1.125
    y, bits = emulated.nvfp4(x)
    assert y[0, 0, 0, :3].tolist() == [2688, -1344, 0]
    # 6.6 / 1.125 = 5.87 -> 6;  3.3 / 1.125 = 2.93 -> 3;  0.5 / 1.125 = 0.44 -> 0.5
    assert y[0, 0, 0, 16:19].tolist() == [6 * 1.125, 3 * 1.125, 0.5 * 1.125]
    assert bits == 32 * 4 + 2 * 8 + 32


def test_nvfp4_of_zeros_and_of_a_block_below_all_scales():
    x = np.zeros((2, 1, 1, 32), np.float32)
    x[1, 0, 0, 0], x[1, 0, 0, 16] = 2688, 1e-4  # its scale, 1e-4 / 6, rounds to 0
    y, _ = emulated.nvfp4(x)
    assert not y[0].any() and y[1, 0, 0, 0] == 2688 and y[1, 0, 0, 16] == 0
    halved, _ = emulated.nvfp4(x[1:] / 2)
    np.testing.assert_array_equal(halved, y[1:] / 2)  # each window has its own scale


def test_int4_groups_lie_along_channels_or_tokens():
    x = np.zeros((1, 2, 16, 16), np.float32)
    x[0, 0, 3], x[0, 1, 3] = np.arange(16), np.arange(16)  # a token's 32 channels are those of both heads
    y, bits = emulated.int4_by_token(x)
    np.testing.assert_array_equal(y, x)  # 0..15 with scale 1
    assert bits == x.size * 5
    x = np.zeros((1, 1, 32, 2), np.float32)
    x[0, 0, :16, 1], x[0, 0, 16:, 1] = np.arange(16), 100 * np.arange(16) - 700
    y, bits = emulated.int4_by_channel(x)
    np.testing.assert_array_equal(y, x)  # the two groups of 16 tokens have scales of their own
    assert bits == x.size * 6


def test_int4_scale_and_zero_are_float16():
    x = np.zeros((1, 1, 1, 32), np.float32)
    x[..., :3] = 2049, 2050.9, 2064  # the zero, 0, and the scale, 2064 / 15 = 137.6, which float16 has as 137.625
    y, _ = emulated.int4_by_token(x)
    assert y[0, 0, 0, :4].tolist() == [15 * 137.625, 15 * 137.625, 15 * 137.625, 0]
    x[...] = 2049  # constant: the zero is the nearest float16, nothing else is left
    assert np.unique(emulated.int4_by_token(x)[0]).tolist() == [2048]


@pytest.mark.parametrize("name", emulated.FORMATS)
def test_error_of_every_format_is_that_of_its_bits(name):
    x = cache(0).astype(np.float32)
    for code in emulated.FORMATS[name]:
        y, _ = code(x)
        assert y.shape == x.shape and y.dtype == np.float32
        relative = math.sqrt(((x - y) ** 2).mean() / (x**2).mean())
        assert 0.01 < relative < (0.04 if "FP8" in name else 0.15)


def test_shapes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="multiple of 32 channels, got 1 x 48"):
        emulated.int4_by_token(np.zeros((1, 1, 1, 48), np.float32))
    with pytest.raises(ValueError, match="multiple of 16 tokens, got 8"):
        emulated.int4_by_channel(np.zeros((1, 1, 8, 32), np.float32))


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    x = np.random.default_rng(0).standard_normal((4, 999), np.float32)
    x[0, :4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, np.finfo(np.float32).tiny / 2  # ties, zero, denormal
    np.testing.assert_array_equal(accuracy.to_bfloat16(x).view(np.uint16), x.astype(BFLOAT16).view(np.uint16))


# --- pages ------------------------------------------------------------------------------------------------
def test_pages_alternate_k_and_v_by_head():
    k, v = cache(1), cache(2, (2, 3, 32, 32))  # V may be narrower
    pages = accuracy.to_pages(k, v)
    assert pages.shape == (4, 16, 3 * 96) and pages.dtype == BFLOAT16 and pages.flags.c_contiguous
    # page 3 is window 1, tokens 16..31; head 2 begins at channel 192: 64 of K, 32 of V
    np.testing.assert_array_equal(pages[3][5, 192:256], k[1, 2, 21])
    np.testing.assert_array_equal(pages[3][5, 256:288], v[1, 2, 21])
    back = accuracy.from_pages(pages, k.shape, v.shape)
    for x, y in zip((k, v), back, strict=True):
        np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16))
        assert y.flags.c_contiguous
    np.testing.assert_array_equal(accuracy.one_part(k)[3][5, 128:192], k[1, 2, 21])


def test_a_coding_is_applied_to_k_and_v_with_their_bounds():
    k, v = cache(1), cache(2)
    k2, v2, [(bits, k_bits, v_bits)], error = accuracy.replaced([Variant("fixed", "rms:0.02/rms:0.2")], k, v)
    assert 0.9 < error <= 1 + 2**-16
    for x, y, bound in ((k, k2, 0.02), (v, v2, 0.2)):
        x, y = (a.astype(np.float32).transpose(0, 2, 1, 3).reshape(4, -1) for a in (x, y))
        used = abs(x - y).max(axis=1) / np.sqrt((x**2).mean(axis=1))
        assert (used <= bound * (1 + 2**-16)).all() and (used > bound / 2).all()
    # a finer step costs 3.3 bits a value; both together save the second page's metadata, 16 bytes
    assert 3 < (k_bits - v_bits) / k.size < 3.6
    assert abs(bits - (k_bits + v_bits - 4 * 128)) < 0.01 * bits
    assert bits == sum(len(blob) * 8 - 128 for blob in reference_blobs(k, v, ("rms:0.02", "rms:0.2")))


def reference_blobs(k, v, bounds):
    geometry = Geometry(16, 384, parts=(64, 64))  # a blob has 16 bytes more of metadata than a row of a table
    return [reference.encode_page(page, bounds, geometry=geometry) for page in accuracy.to_pages(k, v)]


def test_raw_pages_are_lossless_and_cost_their_metadata():
    k, v = cache(1), cache(2)
    k2, v2, [bits], error = accuracy.replaced([Variant("raw", "rms:1")], k, v)
    assert (k2 == k).all() and (v2 == v).all() and error == 0
    assert bits == (4 * (16 * 16 * 384 + 128), *[4 * (16 * 16 * 192 + 128)] * 2)


def test_a_codec_that_breaks_its_bound_stops_the_measurement(monkeypatch):
    real = accuracy.reference.decode_page
    spoilt = lambda blob, **options: (real(blob, **options) * 1.1).astype(BFLOAT16)  # noqa: E731
    monkeypatch.setattr(accuracy.reference, "decode_page", spoilt)
    with pytest.raises(AssertionError, match="kv fixed, rms:0.02: the bound is broken"):
        accuracy.replaced([Variant("fixed", "rms:0.02")], cache(1), cache(2))


def test_variants_are_the_formats_and_ours_at_each_bound():
    found = accuracy.variants(["rms:0.1", "rms:0.2/rms:0.3"])
    names = ["kv fixed", "kv entropy", "kv entropy, calibrated"]
    assert [v.name for v in found] == [*emulated.FORMATS, *(name for name in names for _ in range(2))]
    assert [v.bound for v in found if v.bound] == ["rms:0.1", "rms:0.2/rms:0.3"] * 3
    bounds = accuracy.default_bounds()
    assert len(set(bounds)) == len(bounds) <= 20 and len(accuracy.default_bounds(quick=True)) == 3


def tables_for(k, v, bound):
    """Return tables made from other values of the same channels."""
    pages = accuracy.to_pages(cache(3, k.shape), cache(4, v.shape))
    geometry = Geometry(*pages.shape[1:], parts=(k.shape[3], v.shape[3]))
    return accuracy.layer_tables(pages, geometry, bound)


@pytest.mark.parametrize("bound", ["rms:0.05", "rms:0.04/rms:0.3"])
def test_codings_share_their_values_and_have_bits_of_their_own(bound):
    k, v = cache(1, (2, 3, 64, 64)), cache(2, (2, 3, 64, 32))
    v[0, 0, 0, :5] = 0, -0.0, 1e-3, -1e-3, 0
    tables = tables_for(k, v, bound)
    ours = [Variant(codec, bound) for codec in accuracy.OURS]
    *together, bits, error = accuracy.replaced(ours, k, v, tables=tables)
    for variant, expected in zip(ours, bits, strict=True):
        *alone, [own], own_error = accuracy.replaced([variant], k, v, tables=tables)
        assert own == expected and own_error == error <= 1 + 2**-16
        assert all(map(accuracy.same_numbers, alone, together))
    for fixed, entropy, calibrated in zip(*bits, strict=True):  # of both, of K alone, of V alone
        assert fixed > entropy > calibrated
    for both, k_bits, v_bits in bits:
        assert both == pytest.approx(k_bits + v_bits, rel=0.03)


def test_a_coding_that_brings_back_other_values_stops_the_measurement():
    pair = [Variant("fixed", "rms:0.1"), Variant("raw", "rms:0.1")]
    with pytest.raises(AssertionError, match="kv raw, rms:0.1: other values than kv fixed"):
        accuracy.replaced(pair, cache(1), cache(2))


# --- statistics -------------------------------------------------------------------------------------------
def test_comparison_is_that_of_probabilities_written_out():
    # positions: the same; 3/4 against 1/4; another scale of the same; vocabulary of 2
    expected = np.log(np.float32([[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]]))
    logits = np.log(np.float32([[0.5, 0.5], [0.25, 0.75], [9, 1]]))
    kl, same, nll, changed = accuracy.compare(expected, logits, np.array([1, 1, 0]))
    assert kl == pytest.approx((0 + 0.5 * math.log(3) + 0) / 3, abs=1e-7)
    assert same == pytest.approx(2 / 3)
    assert nll == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)  # of tokens 1 and 0, at positions 0 and 1
    assert changed == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2)


@pytest.mark.parametrize("values", [1, 64, 100, 1 << 24])  # one position at a time, two, three and a rest, all
def test_comparison_does_not_depend_on_its_slices(values, monkeypatch):
    rng = np.random.default_rng(0)
    x = (8 * rng.standard_normal((16, 32))).astype(BFLOAT16)
    y = (x.astype(np.float32) + 0.3 * rng.standard_normal((16, 32))).astype(BFLOAT16)
    tokens = rng.integers(0, 32, 16)
    p, q = (a.astype(np.float64) - np.log(np.exp(a.astype(np.float64)).sum(1, keepdims=True)) for a in (x, y))
    at = np.arange(15), tokens[1:]
    expected = [
        (np.exp(p) * (p - q)).sum(1).mean(),
        (x.argmax(1) == y.argmax(1)).mean(),
        *(-a[at].mean() for a in (p, q)),
    ]
    monkeypatch.setattr(accuracy, "SLICE_VALUES", values)
    np.testing.assert_allclose(accuracy.compare(x, y, tokens), expected, rtol=1e-5)
    same = accuracy.compare(x, x, tokens)
    assert same[0] == 0 and same[1] == 1 and same[2] == same[3]


def test_errors_are_paired_and_over_windows():
    nll = np.array([1.0, 3.0, 5.0])  # windows differ far more than the variant changes them
    windows = np.stack([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7], nll, nll + [0.1, 0.1, 0.4]], axis=1)
    row = accuracy.row(Variant("fixed", "rms:0.1"), windows, (600, 200, 400), (100, 50, 50), 0.99)
    assert row["kl"] == pytest.approx(0.2) and row["kl_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert row["top1"] == pytest.approx(0.8) and row["top1_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert row["nll_difference"] == pytest.approx(0.2) and row["nll_difference_error"] == pytest.approx(0.1)
    assert row["ppl"] == pytest.approx(math.exp(3.2))
    rates = [row[f"{part}bits_per_value"] for part in ("", "k_", "v_")]
    assert rates == [6, 4, 8] and row["ratio"] == 16 / 6
    with pytest.raises(ValueError, match="at least 2 windows, got 1"):
        accuracy.mean_and_error([0.5])


def canned_rows() -> list[dict]:
    """Return rows of two peers and one coding: bits fall by one as KL grows fourfold."""
    blank = dict.fromkeys(accuracy.ROW)
    rows = [blank | {"variant": "bf16", "bits_per_value": 16.0, "ratio": 1.0, "ppl": 17.9}]
    cells = [("FP8 e4m3", None, 8.0, 0.01), ("NVFP4", None, 4.5, 0.08), ("int4", None, 5.0, 0.04)]
    cells += [("kv fixed", f"rms:{0.02 * 2**i}", 7.0 - i, 0.0025 * 4**i) for i in range(4)]
    cells += [("kv fixed", "rms:0.05/rms:0.1", 5.0, 0.01)]
    for variant, bound, bits, kl in cells:
        rows.append(
            blank
            | {"variant": variant, "bound": bound, "bits_per_value": bits, "ratio": 16 / bits, "kl": kl}
            | {"kl_error": kl / 10, "top1": 0.9, "top1_error": 0.002, "ppl": 18.0, "nll_difference": 0.01}
            | {"nll_difference_error": 0.003}
        )
    return rows


def test_bits_at_equal_kl_are_read_between_neighbours():
    fp8, nvfp4 = accuracy.at_equal_kl(canned_rows())
    assert fp8 == {
        "peer": "FP8 e4m3", "kl": 0.01, "peer_bits": 8.0, "variant": "kv fixed", "bits": 6.0, "bits_apart": 5.0,
    }  # fmt: skip
    # 0.08 is half-way from 0.04 at 5 bits to 0.16 at 4; with the pair, a quarter of the way from 4 to 0.01 at 5
    assert nvfp4["bits"] == pytest.approx(4.5) and nvfp4["bits_apart"] == pytest.approx(4.25)
    assert accuracy.bits_at(canned_rows()[4:8], 1.0) is None and accuracy.bits_at([], 0.1) is None
    rows = canned_rows()
    rows[-1] |= {"bits_per_value": 4.9, "kl": 0.07}  # above the line from 0.04 at 5 bits to 0.16 at 4
    assert accuracy.bits_at(rows[4:], 0.08) > 4.7
    assert accuracy.at_equal_kl(rows)[1]["bits_apart"] == pytest.approx(4.5)
    lines = report.equal_kl_lines([fp8, nvfp4 | {"bits": None, "bits_apart": None}])
    assert lines[0] == (
        "At the KL of FP8 e4m3 (0.0100, 8.00 bits/value, 2.00x): kv fixed 6.00 bits/value (2.67x) with one "
        "bound, 5.00 bits/value (3.20x) with K and V apart"
    )
    assert lines[1].endswith("kv fixed is not to be read off, the bounds lie all to one side of it")


def test_table_shows_the_rows():
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(report.accuracy_table(canned_rows(), "t"))
    shown = " ".join(console.export_text().split())
    assert "bf16 16.00 1.00 17.900 FP8 e4m3 8.00 2.00 0.0100 0.0010 0.900 0.002 18.000 +0.0100 0.0030" in shown
    assert "kv fixed rms:0.02 7.00 2.29 0.0025 0.0003" in shown


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    report.plot_accuracy(canned_rows(), "tiny", path := tmp_path / "accuracy.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# --- the command line -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: model, text"),
        (["no/model", __file__], "no/model: expected a model's folder, there is no config.json in it"),
        (["{model}", "no/text"], "no/text: there is no such file"),
        (["{model}", __file__, "--bound", "rms:0.1/rms"], "expected text like 'abs:1e-3'"),
        (["{model}", __file__, "--bound", "rms:0.1/rms:1/rms:1"], "the page has 2 part(s), got 3 bounds"),
        (["{model}", __file__, "--json", "no/such/folder/x"], "the folder no/such/folder does not exist"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        bench.main(["accuracy", *(argument.format(model=tmp_path) for argument in arguments)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_what_has_to_be_installed_is_said_in_one_line(name, monkeypatch, tmp_path, capsys):
    import sys
    import types

    for package in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None if package == name else types.ModuleType(package))
    (tmp_path / "config.json").write_text("{}")
    assert bench.main(["accuracy", str(tmp_path), __file__]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bench.py accuracy: {name} cannot be imported") and not captured.out
    assert captured.err.endswith("install the extra, cuszp_cupy[accuracy]\n")


# --- with torch -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of two layers with its tokenizer, which has a token a letter, as a folder."""
    why = "the extra `accuracy` is not installed: no model can be run"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    import tokenizers

    path = tmp_path_factory.mktemp("tiny-llama")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    vocabulary = {chr(ord("0") + i): i for i in range(63)} | {"?": 63}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}'
    )
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("".join(chr(ord("0") + i) for i in np.random.default_rng(0).integers(0, 63, 400)))
    return path


needs_torch = pytest.mark.filterwarnings("default")  # whatever torch and transformers have to say


@needs_torch
def test_a_tiny_model_end_to_end(folder, text, monkeypatch):
    monkeypatch.setattr(accuracy, "BATCH", 2)  # the last batch is a smaller one
    notes = []
    model, windows, held_out = accuracy.load(folder, text, context=64, tokens=300, notes=notes)
    assert windows.shape == (5, 64) and held_out.shape == (1, 64)
    letters = text.read_text().replace("o", "?")  # the token of what the tokenizer does not know
    assert letters.endswith("".join(map(chr, held_out[0] + ord("0"))).replace("o", "?"))
    tiny, coarse = Variant("fixed", "rms:0.002"), Variant("fixed", "rms:0.3")
    measured = [Variant("raw", "rms:1"), tiny, coarse, *map(Variant, emulated.FORMATS)]
    untouched, *rows = accuracy.measure(model, windows, measured)
    found = {(row["variant"], row["bound"]): row for row in rows}
    raw = found["kv raw", "rms:1"]
    assert raw["kl"] == raw["kl_error"] == raw["nll_difference"] == 0 and raw["top1"] == 1
    assert raw["ppl"] == untouched["ppl"] > 1
    # pages of 16 tokens x 2 heads x (16 + 16) channels, of bfloat16, and 16 bytes
    assert raw["bits_per_value"] == 16 + 128 / 1024
    kl = [found[key]["kl"] for key in (("kv fixed", "rms:0.002"), ("FP8 e4m3", None), ("kv fixed", "rms:0.3"))]
    assert 0 <= kl[0] < kl[1] / 4 and 4 * kl[1] < kl[2]
    assert found["kv fixed", "rms:0.3"]["top1"] < found["kv fixed", "rms:0.002"]["top1"] <= 1
    assert [found[name, None]["bits_per_value"] for name in emulated.FORMATS] == [8, 4.5 + 32 / 2048, 5, 5.5]


@needs_torch
def test_the_replaced_cache_is_what_attention_sees(folder, text):
    """Zeros for V leave nothing of attention, and K does not matter then."""
    import torch

    model, windows, _ = accuracy.load(folder, text, context=32, tokens=64, notes=[])
    ids = torch.from_numpy(windows).to(model.device)
    shapes = []

    def zero_v(k, v, layer):
        shapes.append((layer, *k.shape))
        return k, v * 0

    plain = accuracy.forward(model, ids, lambda k, v, layer: (k, v))
    other_k = accuracy.forward(model, ids, lambda k, v, layer: (k * 0, v))
    without = accuracy.forward(model, ids, zero_v)
    assert shapes == [(layer, 2, 2, 32, 16) for layer in range(2)]  # then windows, heads, tokens, channels
    assert (plain != other_k).any() and (plain != without).any()
    assert (without == accuracy.forward(model, ids, lambda k, v, layer: (k * 0, v * 0))).all()
    # the first position sees itself alone: its K does not matter, its V does
    assert (plain[:, 0] == other_k[:, 0]).all() and (plain[:, 0] != without[:, 0]).any()


@needs_torch
def test_the_command_line_writes_what_it_shows(folder, text, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--context", "64", "--tokens", "192", "--bound", "rms:0.01", "--bound", "rms:0.1/rms:0.3"]
    assert (
        bench.main(["accuracy", str(folder), str(text), *arguments, "--json", str(out), "--plot", str(plot)]) == 0
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = out.read_text()
    assert str(tmp_path) not in content and str(folder) not in content
    result = json.loads(content)
    parameters = result["parameters"]
    assert parameters["model"] == folder.name and parameters["text"] == "letters.txt"
    assert parameters["tokens"] == 192 and parameters["windows"] == 3 and len(parameters["config_sha256"]) == 64
    assert result["machine"]["versions"]["torch"] and result["machine"]["versions"]["transformers"]
    assert {row["bound"] for row in result["rows"]} == {None, "rms:0.01", "rms:0.1/rms:0.3"}
    kl = {}
    for row in result["rows"]:
        kl.setdefault(row["bound"], []).append((row["variant"], row["kl"]))
    for own in (kl["rms:0.01"], kl["rms:0.1/rms:0.3"]):
        assert [name for name, _ in own] == ["kv fixed", "kv entropy", "kv entropy, calibrated"]
        assert len({value for _, value in own}) == 1
    (note,) = (note for note in result["notes"] if "calibrated" in note)
    assert "from 4 of its pages of the text's last 64 tokens" in note
    shown = capsys.readouterr().out
    assert (
        note in " ".join(shown.split())
        and "At the KL of NVFP4" in shown
        and f"{result['rows'][0]['ppl']:.3f}" in shown
    )


@needs_torch
@pytest.mark.parametrize(
    ("context", "tokens", "message"),
    [
        (40, 80, "context: expected a multiple of 16 tokens"),
        (128, 256, "context: the model has 64 positions at most, got 128"),
        (64, 384, "6 windows of 64 tokens, and one to calibrate with, take 448, the text has 400"),
    ],
)
def test_what_cannot_be_measured_is_named(context, tokens, message, folder, text, capsys):
    with pytest.raises(ValueError, match=message):
        accuracy.load(folder, text, context=context, tokens=tokens, notes=[])
    arguments = ["--context", str(context), "--tokens", str(tokens)]
    with pytest.raises(SystemExit, match="2"):
        bench.main(["accuracy", str(folder), str(text), *arguments])
    assert message in capsys.readouterr().err


# --- on a GPU ---------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_arithmetic_on_the_gpu_is_that_of_numpy():
    import cupy

    x = cache(3)
    device = cupy.asarray(x.view(np.uint16)).view(BFLOAT16)
    values = finite_bfloat16()
    for function in (emulated.e4m3, emulated.e2m1):
        np.testing.assert_array_equal(cupy.asnumpy(function(cupy.asarray(values), cupy)), function(values))
    for variant in map(Variant, emulated.FORMATS):
        k, v, bits, _ = accuracy.replaced([variant], x, x)
        on_device = accuracy.replaced([variant], device, device, cupy)
        assert on_device[2] == bits
        for expected, y in zip((k, v), on_device, strict=False):
            np.testing.assert_array_equal(cupy.asnumpy(y.view(np.uint16)), expected.view(np.uint16))
    logits, other = cache(4, (1, 1, 64, 500))[0, 0], cache(5, (1, 1, 64, 500))[0, 0]
    tokens = np.random.default_rng(0).integers(0, 500, 64)
    on_device = [cupy.asarray(a.view(np.uint16)).view(BFLOAT16) for a in (logits, other)]
    found = accuracy.compare(*on_device, cupy.asarray(tokens), cupy)
    np.testing.assert_allclose(found, accuracy.compare(logits, other, tokens), rtol=1e-5)


@pytest.mark.gpu
def test_codings_on_the_gpu_bring_back_what_the_reference_does():
    import cupy

    k, v, bound = cache(6), cache(7), "rms:0.05/rms:0.1"
    on_device = [cupy.asarray(x.view(np.uint16)).view(BFLOAT16) for x in (k, v)]
    tables = tables_for(k, v, bound)
    for variants in ([Variant("raw", "rms:1")], [Variant(codec, bound) for codec in accuracy.OURS]):
        expected = accuracy.replaced(variants, k, v, np, tables)
        found = accuracy.replaced(variants, *on_device, cupy, tables)
        for x, y in zip(expected[:2], found, strict=False):
            np.testing.assert_array_equal(cupy.asnumpy(y.view(np.uint16)), x.view(np.uint16))
        assert found[2] == expected[2] and found[3] == pytest.approx(expected[3], rel=1e-6)


@pytest.mark.gpu
@needs_torch
def test_a_tiny_model_on_the_gpu(folder, text):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    model, windows, held_out = accuracy.load(folder, text, context=64, tokens=300, notes=(notes := []))
    assert model.device.type == "cuda" and not notes
    ours = [Variant(codec, "rms:0.05") for codec in accuracy.OURS]
    tables = accuracy.calibrate(model, held_out, ["rms:0.05"], notes)
    measured = [Variant("raw", "rms:1"), *ours, Variant("NVFP4")]
    _, raw, fixed, entropy, calibrated, nvfp4 = accuracy.measure(model, windows, measured, tables)
    assert raw["kl"] == 0 and raw["top1"] == 1
    assert fixed["kl"] == entropy["kl"] == calibrated["kl"]
    assert fixed["bits_per_value"] > entropy["bits_per_value"] > calibrated["bits_per_value"]
    assert 0 < fixed["kl"] < nvfp4["kl"] and fixed["max_error_over_eb"] <= 1 + 2**-16
