"""What is mutated, damaged or hostile is refused by FormatError, or gives a right result; kernels included.

``CUSZP_FUZZ_CASES``: mutated cases for the reference and for the kernels, instead of the few of an ordinary run;
``CUSZP_FUZZ_SEED``: others for the kernels, so that processes can share the work.
"""

from __future__ import annotations

import atexit
import os
import re
import struct
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import fuzz
import numpy as np
import pytest
from test_cuszp import CASES, GUARD, Device, payload_bytes

from cuszp_cupy.evaluation import data
from cuszp_cupy.format import (
    HEADER_BYTES,
    MAX_PAGE_VALUES,
    FormatError,
    Geometry,
    PageHeader,
    rate_bytes,
)
from cuszp_cupy.raw import kv
from cuszp_cupy.reference import decode_page, decompress
from cuszp_cupy.tables import BUILT_IN, MOST_FILE_BYTES, Tables

GOLDEN_ERRORS = Path(__file__).parent / "golden-errors"
SEED = int(os.environ.get("CUSZP_FUZZ_SEED", 0))


# --- mutated ----------------------------------------------------------------------------------------------
def test_mutated_cases_are_refused_or_decode():
    """Some thousands; a million: python -m tests.fuzz --count 1000000."""
    result = fuzz.run(seed=1, first=0, count=CASES or 6000)
    assert not result["failures"], result["failures"][0][1]
    verdicts = result["verdicts"]
    for kind in ("kv", "cuszp", "tables"):
        assert verdicts[kind, "decoded"] and verdicts[kind, "refused"], (
            "one of them would mean that nothing is tried"
        )
    assert 0.01 < result["memory"] <= 1


def test_the_sources_have_every_coding():
    kv, cuszp, files = fuzz.sources()
    headers = [PageHeader.parse(case.data) for case in kv]
    kinds = {(h.coding, h.dtype, h.geometry.flat, h.geometry.parts is None, bool(h.tables)) for h in headers}
    for coding in ("raw", "fixed", "entropy"):
        for dtype in data.DTYPES:
            assert {kind[2:4] for kind in kinds if kind[:2] == (coding, dtype)} == {
                (flat, alone) for flat in (False, True) for alone in (False, True)
            }
    assert {h.tables for h in headers if h.coding == "entropy"} > {0}
    assert len(cuszp) == 18 and len(files) == 3
    assert all(fuzz.check(case) == "decoded" for case in kv + cuszp + files)


def spin():
    end = time.process_time() + 3
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (lambda blob, **_: {}[1], KeyError),
        (lambda blob, **_: decode_page(blob, **_)[:1], AssertionError),
        (lambda blob, **_: decode_page(blob, **_).astype(np.float32), AssertionError),
        (lambda blob, **_: decode_page(blob, **_) if bytearray(1 << 26) else None, AssertionError),
        (lambda blob, **_: spin(), TimeoutError),
    ],
    ids=["another error", "another shape", "another dtype", "too much memory", "a hang"],
)
def test_the_fuzzer_finds(broken, error, monkeypatch):
    monkeypatch.setattr(fuzz, "decode_page", broken)
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.1)
    with pytest.raises(error):
        fuzz.check_within_limits(fuzz.sources()[0][0], measure=True)


def test_the_fuzzer_finds_damage_that_is_not_seen(monkeypatch):
    case = fuzz.sources()[0][0]
    blob = bytearray(case.data)
    blob[40] ^= 1
    damaged = replace(case, data=bytes(blob), sealed=False)
    assert fuzz.check(damaged) == "refused"
    monkeypatch.setattr(fuzz, "decode_page", lambda blob, **_: decode_page(case.data))
    with pytest.raises(AssertionError, match="damage was not seen"):
        fuzz.check(damaged)


def test_cases_are_the_same_every_time():
    assert [fuzz.mutated(3, i).data for i in range(50)] == [fuzz.mutated(3, i).data for i in range(50)]
    assert len({fuzz.mutated(3, i).data for i in range(50)}) > 40


# --- found before -----------------------------------------------------------------------------------------
def golden_errors() -> list[tuple[str, str]]:
    lines = (GOLDEN_ERRORS / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [re.fullmatch(r"\| `(\S+)` \| .* \| `(.+)` \|", line) for line in lines if line.startswith("| `")]
    return [row.groups() for row in rows]


def test_every_golden_error_has_a_line():
    assert {name for name, _ in golden_errors()} == {path.name for path in GOLDEN_ERRORS.iterdir()} - {
        "README.md"
    }


@pytest.mark.parametrize(("name", "message"), golden_errors())
def test_golden_errors(name, message):
    load = {"tables": Tables.load, "kv": lambda path: decode_page(path.read_bytes())}[name.partition("-")[0]]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=re.escape(message)):
            load(GOLDEN_ERRORS / name)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_files_of_tables_have_a_largest_size(tmp_path):
    """The hints of the widest page fit; a file of more bytes is not even read to its end."""
    widest = MAX_PAGE_VALUES // 16 // 2
    hints = np.zeros((widest, 2), np.int8)
    hints[:, 0] = np.arange(widest) % 39 - 19
    np.savez(tmp_path / "wide.npz", classes=BUILT_IN.classes, symbols=BUILT_IN.symbols, hints=hints)
    np.testing.assert_array_equal(Tables.load(tmp_path / "wide.npz").hints, hints)
    (tmp_path / "long.npz").write_bytes((tmp_path / "wide.npz").read_bytes() + bytes(8192))
    with pytest.raises(FormatError, match=f"more than {MOST_FILE_BYTES} bytes"):
        Tables.load(tmp_path / "long.npz")


def test_a_header_cannot_claim_more_than_its_payload_can_hold():
    """A header alone, for the largest page of each coding: refused before anything of that size is allocated."""
    for coding in (0, 1, 2):
        for tokens, channels in ((16, MAX_PAGE_VALUES // 16), (1, MAX_PAGE_VALUES), (MAX_PAGE_VALUES, 1)):
            for payload in (0, 4, 2**31, 2**32 - 4):
                word1 = 512 | 512 << 10 | coding << 20
                header = struct.pack(
                    "<2sBBIIIHHHHII", b"kv", 1, 0, word1, tokens, channels, 0, 0, 1, 0, payload, 0
                )
                tracemalloc.start()
                try:
                    with pytest.raises(FormatError, match="payload bytes|payload"):
                        decode_page(header)
                    assert tracemalloc.get_traced_memory()[1] < 1 << 20
                finally:
                    tracemalloc.stop()


def test_a_stream_cannot_claim_more_than_its_rate_bytes():
    tracemalloc.start()
    try:
        for n in (32769, 2**31 - 1):
            with pytest.raises(
                FormatError, match=f"the rate area of {n} values has {rate_bytes(n)} bytes, got 1024"
            ):
                decompress(bytes(1024), n, "float64", 0.1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- every single bit -------------------------------------------------------------------------------------
def small_blobs() -> dict[str, tuple[bytes, Tables]]:
    """The smallest blob of each coding, dtype and sort of groups, with calibrated tables and without."""
    found = {}
    for case in sorted(fuzz.sources()[0], key=lambda case: len(case.data)):
        h = PageHeader.parse(case.data)
        groups = "flat" if h.geometry.flat else "tokens"
        name = f"{h.coding}-{h.dtype}-{groups}-{len(h.geometry.part_values)}" + (
            "-calibrated" if h.tables else ""
        )
        if any(case.data[HEADER_BYTES:]) and name not in found:
            found[name] = case.data, case.tables
    return found


@pytest.mark.parametrize("name", small_blobs())
def test_every_flipped_bit_of_a_stored_page_is_found(name):
    """Of the 32 bytes of metadata and of the payload, whatever the coding."""
    blob, tables = small_blobs()[name]
    decode_page(blob, tables=tables)
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_page(damaged, tables=tables)


@pytest.mark.parametrize("name", small_blobs())
def test_every_flipped_bit_of_a_table_row_is_found(name):
    """Also of the place: what lies elsewhere in the memory is not this page's payload."""
    blob, tables = small_blobs()[name]
    header = PageHeader.parse(blob)
    others = np.random.default_rng(0).bytes(4096)
    memory, row = blob[HEADER_BYTES:] + others, fuzz.row_of(blob)
    assert fuzz.blob_of(row, memory, header.dtype, header.geometry) == blob
    for bit in range(128):
        damaged = row.copy()
        damaged[bit // 32] ^= 1 << bit % 32
        with pytest.raises(FormatError):
            decode_page(fuzz.blob_of(damaged, memory, header.dtype, header.geometry), tables=tables)


# --- kernels ----------------------------------------------------------------------------------------------
def verdict(row, slot: bytes, dtype: str, geometry: Geometry, tables: Tables) -> np.ndarray | None:
    """The reference's page, or None; also for pages of other tables: the kernels know one set at a time."""
    try:
        blob = fuzz.blob_of(row, slot, dtype, geometry)
        header = PageHeader.parse(blob)
        if header.coding == "entropy" and header.tables != tables.id:
            return None
        return decode_page(blob, tables=tables)
    except FormatError:
        return None


SECONDS = 120  # for kernels that take milliseconds, under a sanitizer seconds
ONE_CHUNK = 64 * 1024  # bytes of a page that one thread block decodes: it checks all before it writes


def compare(verdicts, pages, status, rows) -> None:
    """Assert that the kernels gave ``verdicts``; small refused pages are as before, but for ``entropy``."""
    wrong = [i for i, page in enumerate(verdicts) if (page is None) != (status[i] != 0)]
    assert not wrong, f"pages {wrong[:8]}: status {status[wrong[:8]]}, rows {rows[wrong[:8]]}"
    for i, page in enumerate(verdicts):
        if page is not None:
            same = pages[i].tobytes() == page.tobytes()  # not in the assert: with CI set, pytest would diff them
            assert same, f"page {i}: row {rows[i]}"
        elif rows[i][0] >> 20 & 15 != 2 and pages[i].size <= ONE_CHUNK:
            assert (pages[i] == GUARD).all(), f"page {i} was refused, but written to: row {rows[i]}"


def batches(seed: int, count: int):
    """Yield (rows, slots, dtype, geometry, tables) of ``count`` mutated slots in all, about."""
    sorts = {}
    for case in fuzz.sources()[0] + fuzz.large_sources():
        header = PageHeader.parse(case.data)
        sorts.setdefault((header.dtype, header.geometry), []).append(case)
    for which, ((dtype, geometry), cases) in enumerate(sorts.items()):
        for tables in dict.fromkeys(case.tables for case in cases):
            mine = [case for case in cases if case.tables in (BUILT_IN, tables)]
            share = -(-count // (3 * len(sorts) if geometry.groups < 1024 else 100))
            for first in range(0, share, 5000):
                numbers = range(first, min(first + 5000, share))
                found = [fuzz.mutated_slot(100 * seed + which, i, mine) for i in numbers]
                slots = np.stack([np.frombuffer(slot, np.uint8) for _, slot in found])
                yield np.array([row for row, _ in found], np.uint32), slots, dtype, geometry, tables


class OnGpu:
    """Decodes slots by the kernels' launch functions, every buffer between guards."""

    def __init__(self):
        self.device = Device(70_000)

    def decode(self, rows, slots, dtype, geometry, tables, shift) -> tuple[np.ndarray, np.ndarray]:
        """Return (bytes of the pages, status); ``shift``: from a multiple of 16, of the pages' addresses."""
        device, num, apart = self.device, len(rows), -(-geometry.nbytes // 16) * 16 + 32
        blank, inputs = np.full((num, apart), GUARD, np.uint8), (slots, rows, kv.entropy_tables(tables))
        with device.stream:
            pages_memory, pages = device.guarded(blank)
            status_memory, status = device.guarded(np.full(num, 77, np.uint32))
            exchange_memory, exchange = device.guarded(np.zeros(num * kv.EXCHANGE_BYTES, np.uint8))
            num_sizes = num * kv.num_chunks(geometry)
            sizes_memory, sizes = device.guarded(np.full(num_sizes, 0xFFFFFFFF, np.uint32))
            scratch = {"exchange_ptr": exchange.data.ptr, "sizes_ptr": sizes.data.ptr}
            memory = [device.guarded(each) for each in inputs]
            slots_ptr, rows_ptr, tables_ptr = (view.data.ptr for _, view in memory)
            starts = np.array([[slots_ptr], [pages.data.ptr + shift]], np.uint64)
            steps = np.array([[slots.shape[1]], [apart]], np.uint64)
            addresses = device.cupy.asarray(starts + np.arange(num, dtype=np.uint64) * steps)
            arguments = (
                addresses[0].data.ptr,
                rows_ptr,
                addresses[1].data.ptr,
                status.data.ptr,
                num,
                dtype,
                geometry,
            )
            options = {"aligned": shift % 4 == 0, "blocks": 64}  # so that each block takes several pages
            for _ in range(2):  # what damaged pages leave in the exchange must not disturb the next launch
                kv.decode(*arguments, **scratch, **options)
            kv.decode_entropy(*arguments, tables, tables_ptr, **options)
            end, done = time.monotonic() + SECONDS, device.stream.record()
            while not done.done:
                if time.monotonic() > end:  # nothing that comes after would end either, nor would the process
                    atexit.register(lambda: (sys.stdout.flush(), os._exit(1)))
                    pytest.exit(f"the kernels hang: {num} pages of {geometry}, {SECONDS} s", returncode=1)
                time.sleep(1e-4)
            device.unguarded(exchange_memory, num * kv.EXCHANGE_BYTES)
            device.unguarded(sizes_memory, 4 * num_sizes)
            for (buffer, _), each in zip(memory, inputs, strict=True):
                assert device.unguarded(buffer, each.nbytes).tobytes() == each.tobytes(), "an input was changed"
            after = device.unguarded(pages_memory, blank.nbytes).reshape(blank.shape)
            inside = np.zeros(apart, bool)
            inside[shift : shift + geometry.nbytes] = True
            assert (after[:, ~inside] == GUARD).all(), "bytes written between pages"
            return after[:, inside], device.unguarded(status_memory, 4 * num).view(np.uint32)


def test_the_comparison_with_kernels_fails():
    """A decoder that is the reference passes; one wrong status, value or byte written does not."""
    verdicts = []
    for rows, slots, dtype, geometry, tables in batches(seed=0, count=600):
        verdicts = [
            verdict(row, slot.tobytes(), dtype, geometry, tables) for row, slot in zip(rows, slots, strict=True)
        ]
        pages = np.full((len(rows), geometry.nbytes), GUARD, np.uint8)
        for page, right in zip(pages, verdicts, strict=True):
            page[:] = GUARD if right is None else right.view(np.uint8).ravel()
        status = np.array([page is None for page in verdicts], np.uint32)
        compare(verdicts, pages, status, rows)
        refused = [i for i in np.flatnonzero(status) if rows[i, 0] >> 20 & 15 != 2]
        untouched = (pages, status) if geometry.nbytes <= ONE_CHUNK else (status,)
        for i, changes in ((np.flatnonzero(status == 0)[0], (pages, status)), (refused[0], untouched)):
            for array in changes:
                array[i] ^= 1
                with pytest.raises(AssertionError):
                    compare(verdicts, pages, status, rows)
                array[i] ^= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, _ in golden_errors() if name.startswith("kv-")])
def test_kernels_on_golden_errors(name):
    """Among good pages; one of them made the GPU wait for ever."""
    blob = (GOLDEN_ERRORS / name).read_bytes()
    header = PageHeader.parse(blob)
    good = next(case.data for case in fuzz.large_sources() if PageHeader.parse(case.data).coding == header.coding)
    assert PageHeader.parse(good).geometry == header.geometry, "say here what is a good page beside it"
    blobs = [good, blob, good]
    rows = np.array([fuzz.row_of(bytearray(each)) for each in blobs], np.uint32)
    slots = [each[HEADER_BYTES:].ljust(header.geometry.nbytes, b"\0") for each in blobs]
    slots = np.stack([np.frombuffer(slot, np.uint8) for slot in slots])
    pages, status = OnGpu().decode(rows, slots, header.dtype, header.geometry, BUILT_IN, shift=0)
    expected = decode_page(good).tobytes()
    assert [page.tobytes() == expected for page in pages[::2]] == [True, True]
    assert (status != 0).tolist() == [False, True, False]


@pytest.mark.gpu
def test_kernels_on_mutated_pages():
    """About 10,000 rows and payloads, or CUSZP_FUZZ_CASES: the reference's verdict, and not a byte elsewhere."""
    gpu, seen = OnGpu(), np.zeros(2, int)
    for i, (rows, slots, dtype, geometry, tables) in enumerate(batches(seed=1 + SEED, count=CASES or 10_000)):
        pages, status = gpu.decode(rows, slots, dtype, geometry, tables, shift=2 * (i % 2))
        verdicts = [
            verdict(row, slot.tobytes(), dtype, geometry, tables) for row, slot in zip(rows, slots, strict=True)
        ]
        compare(verdicts, pages, status, rows)
        seen += (status == 0).sum(), (status != 0).sum()
    print(f"{seen.sum()} pages: {seen[0]} decoded, {seen[1]} refused")
    assert seen.min() > seen.sum() / 20


@pytest.mark.gpu
def test_kernels_on_mutated_streams():
    """2,000 streams, or a fifth of CUSZP_FUZZ_CASES: status or the reference's values; guards hold."""
    device, seen = Device(70_000), np.zeros(2, int)
    for number in range(CASES // 5 or 2000):
        case = fuzz.mutated_stream(2 + SEED, number)
        n, dtype, eb, mode = case.arguments
        values, status = device.decompress(case.data, n, dtype, eb, mode)
        area = case.data[: rate_bytes(n)]
        sizes = [payload_bytes(mode, rate) for rate in area[: -(-n // 32)]]
        legal = len(area) == rate_bytes(n) and None not in sizes and not any(area[-(-n // 32) :])
        size = len(area) + sum(sizes) if legal else 0
        assert (status == 0) == (legal and size <= len(case.data)), f"stream {number}"
        if status == 0:  # the kernel is given a capacity, the reference a stream
            assert values.tobytes() == decompress(case.data[:size], n, dtype, eb, mode).tobytes(), (
                f"stream {number}"
            )
        seen[status] += 1
    print(f"{seen.sum()} streams: {seen[0]} decoded, {seen[1]} refused")
    assert seen.min() > seen.sum() / 20
