"""Counters: sums, quotients, and nothing divided by zero."""

import pytest

from cuszp_cupy.stats import Counters, Direction, TransferStats


def transfer(**changes):
    values = dict(
        transport="staged", pages=10, raw_bytes=4_000_000, payload_bytes=1_000_000, link_bytes=1_100_000,
        elapsed_ms=0.5, stage_ms=None,
    )  # fmt: skip
    return TransferStats(**{**values, **changes})


def test_one_transfer():
    stats = transfer(stage_ms=0.75)
    assert stats.ratio == 4 and stats.gbps == pytest.approx(8) and stats.overlap == 1.5
    assert transfer().overlap is None
    nothing = transfer(pages=0, raw_bytes=0, payload_bytes=0, link_bytes=0, elapsed_ms=0.0)
    assert nothing.ratio == 1 and nothing.gbps == 0 and nothing.overlap is None


def test_sums():
    sums = Direction()
    assert sums.ratio == 1 and sums.gbps == 0 and sums.overlap is None and "0 calls" in str(sums)
    sums.add(transfer())
    sums.add(transfer(transport="fused", pages=5, payload_bytes=3_000_000, stage_ms=0.75))
    assert (sums.calls, sums.pages, sums.raw_bytes, sums.link_bytes) == (2, 15, 8_000_000, 2_200_000)
    assert sums.ratio == 2 and sums.gbps == pytest.approx(8)
    assert sums.overlap == 1.5, "only transfers that were measured by stage count"
    assert sums.transports == {"staged": 10, "fused": 5}


def test_text_names_every_counter():
    counters = Counters(raw_pages=11, unsupported_pages=12, mispredicted=13, failed_pages=14, failed_calls=15)
    counters.store.add(transfer(stage_ms=0.75))
    text = str(counters)
    for part in ("10 pages", "4.0 MB raw", "1.0 MB encoded", "ratio 4.00", "1.1 MB", "8.0 GB/s", "overlap 1.50"):
        assert part in text.splitlines()[0]
    for number in (11, 12, 13, 14, 15):
        assert str(number) in text.splitlines()[2]


def test_counters_are_their_own():
    a, b = Counters(), Counters()
    a.store.add(transfer())
    assert b.store.calls == 0 and a.load.calls == 0
