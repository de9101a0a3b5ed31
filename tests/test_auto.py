"""What ``auto`` expects of the transports, from given speeds; test_pipeline measures them on a GPU."""

from types import SimpleNamespace

import pytest

from cuszp_cupy import auto
from cuszp_cupy.stats import Counters, Direction

SPEED = {
    "d2h": 55.0, "h2d": 50.0, "store burst": 1000.0, "load burst": 1000.0, "store fused": 80.0,
    "load fused": 60.0, "ratio": 2.5, "launch_us": 10.0,
}  # fmt: skip


def pipeline(slot_bytes=64 << 10, seen=0, copied=0, **speed):
    """One that has encoded pages to ``seen`` bytes, a quarter, and stored others raw."""
    transports = {"staged": 4 * seen // slot_bytes, "raw": copied // slot_bytes}
    store = Direction(raw_bytes=4 * seen + copied, payload_bytes=seen + copied, transports=transports)
    tiles = {"_store_pages": (32 << 20) // slot_bytes, "_tile_pages": (8 << 20) // slot_bytes}
    sizes = {"_slot_bytes": slot_bytes, "page_bytes": slot_bytes}
    return SimpleNamespace(speed=SPEED | speed, stats=Counters(store=store), **sizes, **tiles)


def test_a_large_batch_goes_staged_at_ratio_times_link_and_a_page_alone_fused():
    nbytes = 4096 * (64 << 10)
    times = auto.expected_us(pipeline(), "store", 4096)
    assert times["staged"] == pytest.approx(40 + (32 << 20) / 1e6 + nbytes / (2.5 * 55e3))
    assert times["raw"] == pytest.approx(20 + nbytes / 55e3)
    loaded = auto.expected_us(pipeline(), "load", 4096)["staged"]
    assert loaded == pytest.approx(40 + (8 << 20) / 1e6 + nbytes / (2.5 * 50e3))
    assert auto.fastest(pipeline(), "store", 4096) == auto.fastest(pipeline(), "load", 4096) == "staged"
    assert auto.fastest(pipeline(), "load", 1) == "fused"


def test_the_ratio_is_that_of_the_pages_once_there_were_some():
    before, after = (auto.expected_us(pipeline(seen=seen), "load", 4096)["staged"] for seen in (0, 1 << 20))
    assert after < before
    for seen, expected in ((0, before), (1 << 20, after)):
        beside = pipeline(seen=seen, copied=1 << 30)
        assert auto.expected_us(beside, "load", 4096)["staged"] == expected, "pages stored raw tell nothing"
    assert "raw" not in auto.expected_us(pipeline(), "load", 4096), "a load takes what was stored"


def test_raw_where_compression_does_not_pay():
    assert auto.fastest(pipeline(ratio=1.0, **{"store fused": 20.0}), "store", 4096) == "raw"


def test_pages_that_lie_apart_cost_a_copy_each_and_go_fused_where_these_are_slow():
    apart = pipeline(16 << 10, copy_us=2.0)
    times = auto.expected_us(apart, "store", 16384)
    assert times["staged"] > 2 * 16384 and times["raw"] > 2 * 16384
    assert auto.fastest(apart, "store", 16384) == auto.fastest(apart, "load", 16384) == "fused"
    assert auto.fastest(pipeline(2 << 20, copy_us=2.0), "store", 128) == "staged", "2 MiB a copy"


def test_staged_where_fused_is_hardly_faster():
    """It takes less of the SMs."""
    apart = pipeline(64 << 10, copy_us=1.3)
    times = auto.expected_us(apart, "store", 4096)
    assert auto.fastest(apart, "store", 4096) == "fused" and times["staged"] > 1.5 * times["fused"]
    apart = pipeline(64 << 10, copy_us=1.3, **{"store fused": 4096 * 65.536 / times["staged"] * 1.05})
    times = auto.expected_us(apart, "store", 4096)
    assert 1.01 < times["staged"] / times["fused"] < 1.1 and auto.fastest(apart, "store", 4096) == "staged"
