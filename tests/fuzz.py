"""Mutated blobs, streams and files of tables against their decoders: an error or a right result, nothing else.

    python -m tests.fuzz --count 100000 --seed 1    # from the checkout's root; about a minute a 100,000
    python -m tests.fuzz --coverage 600 CORPUS      # guided by coverage instead (needs atheris); CORPUS: a folder

Case i of a seed is the same on every machine. What fails is told, and written to --save; the status is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cuszp_cupy import reference
from cuszp_cupy.evaluation import data
from cuszp_cupy.format import (
    BLOCK,
    CODINGS,
    HEADER_BYTES,
    MODES,
    FormatError,
    Geometry,
    PageHeader,
    checksum,
    rate_bytes,
    unpack_word1,
)
from cuszp_cupy.reference import calibrate, compress, decode_page, decompress, encode_page
from cuszp_cupy.tables import BUILT_IN, Tables

CPU_SECONDS = 5  # for one case; the slowest take 0.1
MEASURED = 50  # one case in so many has its memory measured
SPARE_BYTES = 8 << 20  # what a decoder may take whatever it is given
PAGE_MULTIPLE = 160  # of the raw page that a header may speak of; the reference works in int64
BLOB_MULTIPLE = 16  # of what was given, where the header is refused

#: Why each: one group; two, with parts; a tail, flat; flat with parts; width codes in two rows of 16 bytes.
GEOMETRIES = [
    Geometry(16, 2),
    Geometry(16, 4, parts=(2, 2)),
    Geometry(3, 11),
    Geometry(1, 64, parts=(32, 32)),
    Geometry(16, 66),
]
#: What fields and half-words are set to: around 0, limits of groups and types, limits of the format's own fields.
LIMITS = [
    *(0, 1, 2, 4, 15, 16, 17, 31, 32, 33, 64, 112, 113, 255, 256, 511, 512, 513, 912, 913, 1023, 1024),
    *(2**k + d for k in (15, 16, 20, 26, 31) for d in (-1, 0, 1)),
    *(2**32 - d for d in (1, 4, 5, 512)),
]
#: offset and format of each field of a header, and of the three in word 1 that share bytes
FIELDS = [(0, "H"), (2, "B"), (3, "B"), (4, "I"), (8, "I"), (12, "I"), (16, "H"), (18, "H"), (20, "H"), (22, "H"),
          (24, "I"), (28, "I"), (6, "B"), (7, "B")]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Bytes, what their decoder is told beside them, and whether it may take them for valid."""

    kind: str  # kv, cuszp or tables
    data: bytes
    tables: Tables = BUILT_IN
    arguments: tuple = ()  # of cuszp: n, dtype, eb, mode
    sealed: bool = True  # a checksum that fits, or none: what contradicts nothing decodes


# --- valid ones ---------------------------------------------------------------------------------------------
def special_page(geometry: Geometry, dtype: str, rng) -> np.ndarray:
    """Return a page of smooth and noisy values, with -0.0, a denormal, and sometimes NaN or an outlier."""
    x = np.cumsum(rng.standard_normal(geometry.values)) + rng.standard_normal(geometry.values)
    bits = x.astype(np.float32).astype(data.DTYPES[dtype]).view(np.uint16)
    bits[rng.integers(bits.size, size=2)] = 0x8000, 1
    if rng.random() < 0.3:
        bits[rng.integers(bits.size)] = rng.choice([0x7FC0, 0x7BFF, 0xFF80])
    return bits.view(data.DTYPES[dtype]).reshape(geometry.shape)


@functools.cache
def sources() -> tuple[list[Case], list[Case], list[Case]]:
    """Return valid cases: pages of all codings, dtypes and tables; streams of all modes; files of tables."""
    rng, kv = np.random.default_rng(0), []
    for geometry, dtype in itertools.product(GEOMETRIES, data.DTYPES):
        pages = [special_page(geometry, dtype, rng) for _ in range(3)]
        pages[2][...] = 0
        sets = [calibrate(pages[:2], geometry=geometry, hints=hints) for hints in (True, False)]
        for page, bound in itertools.product(pages, ("rms:0.05", "rms:0.4")):
            for coding, tables in [("raw", BUILT_IN), ("fixed", BUILT_IN)] * 2 + [
                ("entropy", tables) for tables in (BUILT_IN, *sets)
            ]:
                blob = encode_page(page, bound, coding, geometry=geometry, tables=tables)
                kv.append(Case("kv", blob, tables))
                if coding == "entropy" and PageHeader.parse(blob).coding == "fixed":
                    kv[-1] = Case("kv", entropy_blob(blob, page, tables), tables)
    x = [
        rng.standard_normal(100) * 10.0 ** rng.integers(-2, 9, 100),
        np.cumsum(rng.standard_normal(70)),
        np.ones(33),
    ]
    cuszp = [
        Case("cuszp", compress(each.astype(dtype), 0.01, mode), arguments=(each.size, dtype, 0.01, mode))
        for each, dtype, mode in itertools.product(x, ("float32", "float64"), MODES)
    ]
    files = []
    for tables in (BUILT_IN, sets[0], sets[1]):
        with tempfile.TemporaryDirectory() as folder:
            tables.save(Path(folder) / "tables.npz")
            files.append(Case("tables", (Path(folder) / "tables.npz").read_bytes()))
    return kv, cuszp, files


@functools.cache
def large_sources() -> list[Case]:
    """Return valid pages of two chunks and three streams, for the kernels; the reference is slow with these."""
    rng, geometry = np.random.default_rng(1), Geometry(16, 2304, parts=(1152, 1152))
    page = special_page(geometry, "bfloat16", rng)
    return [Case("kv", encode_page(page, "rms:0.05", coding, geometry=geometry)) for coding in CODINGS]


def entropy_blob(fixed: bytes, page: np.ndarray, tables: Tables) -> bytes:
    """Return the blob of coding ``entropy`` of ``page``, though ``fixed`` is smaller; or the latter."""
    header = PageHeader.parse(fixed)
    groups = reference._groups(page.view(np.uint16).ravel(), header.geometry)
    payload = reference._encode_entropy(groups, header.dtype, header.geometry, header.steps, tables)
    if payload is None or len(payload) >= header.geometry.nbytes:
        return fixed
    header = replace(header, coding="entropy", tables=tables.id, payload_bytes=len(payload))
    return seal(bytearray(header.pack() + payload), tables)


def seal(blob: bytearray, tables: Tables) -> bytes:
    """Put the checksum in that fits the rest."""
    if len(blob) >= HEADER_BYTES:
        digest = tables.digest if blob[7] else 0
        struct.pack_into("<I", blob, 28, checksum(bytes(blob[:28]), bytes(blob[HEADER_BYTES:]), digest))
    return bytes(blob)


# --- mutations: of a bytearray, in place; ``other`` is another valid one ------------------------------------
def flip(rng, blob, other, start):
    at = rng.randrange(start, len(blob))
    blob[at] ^= 1 << rng.randrange(8)


def set_byte(rng, blob, other, start):
    blob[rng.randrange(start, len(blob))] = rng.choice(
        (0, 1, 0x0F, 0x10, 0x7F, 0x80, 0xF0, 0xFF, rng.randrange(256))
    )


def set_half_word(rng, blob, other, start):
    at = rng.randrange(start, len(blob)) & ~1
    blob[at : at + 2] = (rng.choice(LIMITS) & 0xFFFF).to_bytes(2, "little")


def truncate(rng, blob, other, start):
    del blob[rng.randrange(start, len(blob)) & rng.choice((~0, ~3)) :]


def extend(rng, blob, other, start):
    num = rng.choice((1, 2, 4, 16, 64, rng.randrange(1, 300)))
    blob += rng.choice((bytes(num), rng.randbytes(num), blob[-num:]))


def cut(rng, blob, other, start):
    at = rng.randrange(start, len(blob))
    del blob[at : at + rng.choice((1, 2, 4, 16))]


def repeat(rng, blob, other, start):
    at = rng.randrange(start, len(blob))
    blob[at:at] = blob[at : at + rng.choice((1, 2, 4, 16))]


def splice(rng, blob, other, start):
    at = rng.randrange(start, len(blob))
    blob[at:] = other[at if rng.random() < 0.5 else rng.randrange(len(other)) :]


def shuffle(rng, blob, other, start):
    a, b = (rng.randrange(start, len(blob)) & ~1 for _ in range(2))
    blob[a : a + 2], blob[b : b + 2] = blob[b : b + 2], blob[a : a + 2]


def flip_late(rng, blob, streams: int) -> None:
    """Flip a bit of the last half-words of a stream of coding ``entropy``: wrong for one lane, or few."""
    sizes = struct.unpack_from(f"<{streams}H", blob, HEADER_BYTES + 2)
    which = rng.randrange(streams)
    end = 1 + streams + sum(sizes[: which + 1])
    at = HEADER_BYTES + 2 * (end - 1 - rng.randrange(min(96, sizes[which])))
    blob[at + rng.randrange(2)] ^= 1 << rng.randrange(8)


BYTES = (flip, flip, set_byte, set_half_word, truncate, extend, cut, repeat, splice, shuffle)


def set_field(rng, blob):
    offset, field = rng.choice(FIELDS)
    size = struct.calcsize(field)
    value = rng.choice((rng.choice(LIMITS), rng.randrange(256), rng.getrandbits(32)))
    blob[offset : offset + size] = (value % 256**size).to_bytes(size, "little")


def mutated(seed: int, number: int) -> Case:
    """Return case ``number``: a valid one, changed in one to four ways."""
    rng = random.Random(seed << 40 | number)
    kv, cuszp, files = sources()
    kind = rng.choices((kv, cuszp, files), (80, 18, 2))[0]
    source, other = rng.choice(kind), rng.choice(kind)
    if kind is files:
        return replace(source, data=mutated_file(rng, source.data, other.data))
    if kind is cuszp:
        return stream(rng, source, other)
    blob = bytearray(source.data)
    start = rng.choice((0, HEADER_BYTES, HEADER_BYTES))  # with the header or without
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not start and len(blob) >= HEADER_BYTES and rng.random() < 0.5:
            set_field(rng, blob)
        elif len(blob) > start:
            rng.choice(BYTES)(rng, blob, other.data, start)
    if rng.random() < 0.6:  # as long as before
        blob = (blob + rng.randbytes(len(source.data)))[: len(source.data)]
    tables = source.tables if rng.random() < 0.9 else other.tables
    if rng.random() < 0.75 and len(blob) >= HEADER_BYTES:
        blob[24:28] = (len(blob) - HEADER_BYTES).to_bytes(4, "little")
    if rng.random() < 0.1 and len(blob) > 7:
        blob[7] = tables.id  # of swapped ones
    sealed = rng.random() < 0.8
    return Case("kv", seal(blob, tables) if sealed else bytes(blob), tables, sealed=sealed)


def mutated_stream(seed: int, number: int) -> Case:
    """Return a stream ``cuszp`` with the n that it was made with, else changed as in ``mutated``."""
    rng = random.Random(seed << 40 | number)
    cases = sources()[1]
    source = rng.choice(cases)
    case = stream(rng, source, rng.choice(cases))
    return replace(case, arguments=(source.arguments[0], *case.arguments[1:]))


def stream(rng, source: Case, other: Case) -> Case:
    """Change rate bytes, payloads, their length, or what the decoder is told."""
    blob, (n, dtype, eb, mode) = bytearray(source.data), source.arguments
    area = rate_bytes(n)
    if rng.random() < 0.3:
        mode = rng.choice(MODES)
    for _ in range(rng.choice((1, 1, 2, 4))):
        way = rng.random()
        if way < 0.4:
            at = rng.randrange(-(-n // BLOCK))
            blob[at : at + 1] = bytes(
                [rng.choice((rng.randrange(32), 31, 32, 0x80, 0x9F, 0xFE, rng.randrange(256)))]
            )
        elif way < 0.8 and len(blob) > area:
            rng.choice(BYTES)(rng, blob, other.data, area)
        elif blob:
            rng.choice(BYTES)(rng, blob, other.data, 0)
    if rng.random() < 0.5:  # as long as the rate bytes say, if they were legal
        size = sum((rate >> 5 & 3) + 1 if rate & 0x80 else 0 for rate in blob[: -(-n // BLOCK)])
        size += sum(4 + 4 * (rate & 31) if rate else 0 for rate in blob[: -(-n // BLOCK)])
        blob = (blob + rng.randbytes(size))[: area + size]
    if rng.random() < 0.1:
        n = rng.choice((0, 1, 31, 32, 33, 101, 32768, 32769, 2**31 - 1))
    return replace(source, data=bytes(blob), arguments=(n, rng.choice((dtype, "float64")), eb, mode))


def mutated_slot(seed: int, number: int, cases: list[Case]) -> tuple[list[int], bytes]:
    """Return a table row and the memory of a slot, of one of ``cases`` (of one geometry), changed likewise."""
    rng = random.Random(seed << 40 | number)
    source, other = rng.choice(cases), rng.choice(cases)
    blob, header = bytearray(source.data), PageHeader.parse(source.data)
    geometry, late = header.geometry, header.coding == "entropy" and rng.random() < 0.3
    if late:
        flip_late(rng, blob, len(geometry.streams))
    else:
        for _ in range(rng.choice((1, 1, 2, 4))):
            if len(blob) > HEADER_BYTES:
                rng.choice(BYTES)(rng, blob, other.data, HEADER_BYTES)
    if rng.random() < 0.75:
        blob[24:28] = (len(blob) - HEADER_BYTES).to_bytes(4, "little")
    if not late and rng.random() < 0.3:
        at = rng.choice((4, 4, 24, 28)) + rng.randrange(4)
        blob[at] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    slot_bytes = -(-geometry.nbytes // 16) * 16
    slot = (bytes(blob[HEADER_BYTES:]) + rng.randbytes(slot_bytes))[:slot_bytes]
    size = struct.unpack_from("<I", blob, 24)[0]
    if rng.random() < 0.8 and size <= slot_bytes:
        blob[HEADER_BYTES:] = slot[:size]
        seal(blob, source.tables)
    return row_of(blob), slot


def row_of(blob) -> list[int]:
    """Return the table row of a page: words 1, 6 and 7 of its header, and the place of its payload."""
    return [*struct.unpack_from("<I", blob, 4), *struct.unpack_from("<II", blob, 24), 0]


def blob_of(row, slot: bytes, dtype: str, geometry: Geometry) -> bytes:
    """Return the blob that a row makes of the memory it points to; raise FormatError where it cannot be one."""
    word1, size, check, place = (int(word) for word in row)
    coding, steps = unpack_word1(word1, geometry)
    header = PageHeader(dtype, geometry, coding, steps, size, check, word1 >> 24)
    return header.pack() + slot[16 * place : 16 * place + size]


def mutated_file(rng, file: bytes, other: bytes) -> bytes:
    """Change the file, or arrays in it with checksums that fit."""
    if rng.random() < 0.5:
        blob = bytearray(file)
        for _ in range(rng.choice((1, 1, 2, 4))):
            if blob:
                rng.choice(BYTES)(rng, blob, other, 0)
        return bytes(blob)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    for name in rng.sample(sorted(members), rng.randrange(1, len(members) + 1)):
        for _ in range(rng.choice((1, 1, 4))):
            if members[name]:
                rng.choice(BYTES)(rng, members[name], bytes(members["symbols.npy"]) or b"0", 0)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(content))
    return out.getvalue()


# --- verdicts -----------------------------------------------------------------------------------------------
def check(case: Case) -> str:
    """Return ``refused``, or ``decoded`` for a result of the right shape and dtype; anything else raises."""
    try:
        if case.kind == "kv":
            page = decode_page(case.data, tables=case.tables)
        elif case.kind == "cuszp":
            values = decompress(case.data, *case.arguments)
        else:
            with tempfile.NamedTemporaryFile(suffix=".npz") as file:
                file.write(case.data)
                file.flush()
                tables = Tables.load(file.name)
    except FormatError:
        return "refused"
    if case.kind == "kv":
        header = PageHeader.parse(case.data)
        assert page.shape == header.geometry.shape and page.dtype == data.DTYPES[header.dtype], page
        assert case.sealed or case.data in {source.data for source in sources()[0]}, "damage was not seen"
    elif case.kind == "cuszp":
        assert values.shape == (case.arguments[0],) and values.dtype == case.arguments[1], values
    else:
        assert tables.classes.shape == (2, 40) and tables.symbols.shape == (2, 8, 19), tables
    return "decoded"


def most_bytes(case: Case) -> int:
    """Return the memory that the decoder may take for this case."""
    most = SPARE_BYTES + BLOB_MULTIPLE * len(case.data)
    if case.kind == "cuszp":
        n = case.arguments[0]
        return most + (64 * n if len(case.data) >= rate_bytes(n) else 0)
    try:
        raw = PageHeader.parse(case.data).geometry.nbytes if case.kind == "kv" else 0
    except FormatError:
        return most
    assert raw <= 256 * len(case.data), "a page of more raw bytes than any payload of this size can hold"
    return most + PAGE_MULTIPLE * raw


@contextlib.contextmanager
def cpu_limit(seconds: float):
    """Raise TimeoutError in the block once it has taken so much CPU time."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check_within_limits(case: Case, measure: bool) -> tuple[str, float]:
    """``check`` under the limits of time and, if asked for, memory; also returns the share of the latter used."""
    if not measure:
        with cpu_limit(CPU_SECONDS):
            return check(case), 0.0
    most = most_bytes(case)
    tracemalloc.start()
    try:
        with cpu_limit(4 * CPU_SECONDS):  # measuring costs time too
            verdict = check(case)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most, f"took {peak} bytes for {len(case.data)}, expected at most {most}"
    return verdict, peak / most


def run(seed: int, first: int, count: int, save: Path | None = None, progress=lambda text: None) -> dict:
    """Check cases ``first`` .. ``first + count - 1``; return how many of which verdict, and the failures."""
    verdicts, failures, most, begin = Counter(), [], 0.0, time.monotonic()
    sources()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(first, first + count):
            case = mutated(seed, number)
            try:
                verdict, share = check_within_limits(case, number % MEASURED == 0)
                verdicts[case.kind, verdict], most = verdicts[case.kind, verdict] + 1, max(most, share)
            except Exception:  # whatever it is: this is what is looked for
                failures.append((number, traceback.format_exc()))
                verdicts[case.kind, "failed"] += 1
                if save:
                    save.mkdir(parents=True, exist_ok=True)
                    (save / f"{case.kind}-{seed}-{number}.bin").write_bytes(case.data)
            if number % 10_000 == 9_999:
                progress(
                    f"{number + 1 - first} cases, {time.monotonic() - begin:.0f} s, {len(failures)} failures"
                )
    return {"verdicts": verdicts, "failures": failures, "memory": most, "seconds": time.monotonic() - begin}


# --- guided by coverage -------------------------------------------------------------------------------------
def with_coverage(seconds: int, corpus: Path) -> None:
    """Run atheris on the decoders from valid ones; it ends the process. Failures are written to the folder."""
    import atheris

    from cuszp_cupy import format as format_module

    sets = {tables.id: tables for tables in (source.tables for source in sources()[0])}
    corpus.mkdir(parents=True, exist_ok=True)
    for i, source in enumerate(sources()[0] + sources()[1]):
        (corpus / f"valid-{i}").write_bytes(first_byte(source) + source.data)
    for module in (reference, format_module):
        for function in list(vars(module).values()):
            if getattr(function, "__module__", "") == module.__name__ and hasattr(function, "__code__"):
                atheris.instrument_func(function)
    for method in (PageHeader.parse.__func__, Geometry.__post_init__, Geometry.streams.fget):
        atheris.instrument_func(method)

    def one(content: bytes):
        if not content:
            return
        if content[0] < 128:
            blob = bytearray(content[1:])
            tables = sets.get(blob[7] if len(blob) > 7 else 0, BUILT_IN)
            if content[0] < 112 and len(blob) >= HEADER_BYTES:
                blob[24:28] = (len(blob) - HEADER_BYTES).to_bytes(4, "little")
            check(Case("kv", seal(blob, tables), tables))
        else:
            mode, dtype, n = content[0] % 3, content[0] // 3 % 2, (33, 70, 100)[content[0] // 6 % 3]
            check(Case("cuszp", content[1:], arguments=(n, ("float32", "float64")[dtype], 0.01, MODES[mode])))

    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=4096",
         f"-artifact_prefix={corpus}/failed-", str(corpus)],
        one,
    )  # fmt: skip
    atheris.Fuzz()


def first_byte(source: Case) -> bytes:
    """Return the byte that tells ``with_coverage`` which decoder a file is for."""
    if source.kind == "kv":
        return b"\0"
    n, dtype, _, mode = source.arguments
    wanted = MODES.index(mode), ("float32", "float64").index(dtype), (33, 70, 100).index(n)
    return bytes([next(b for b in range(128, 256) if (b % 3, b // 3 % 2, b // 6 % 3) == wanted)])


def main(arguments=None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where cases that fail are written")
    parser.add_argument("--coverage", nargs=2, metavar=("SECONDS", "CORPUS"), help="run atheris instead")
    options = parser.parse_args(arguments)
    if options.coverage:
        with_coverage(int(options.coverage[0]), Path(options.coverage[1]))
    result = run(options.seed, options.first, options.count, options.save, lambda text: print(text, flush=True))
    for number, text in result["failures"][:10]:
        print(f"case {number}:\n{text}")
    for (kind, verdict), number in sorted(result["verdicts"].items()):
        print(f"{kind:7} {verdict:8} {number}")
    print(
        f"{options.count} cases of seed {options.seed} in {result['seconds']:.0f} s, "
        f"{len(result['failures'])} failures, {100 * result['memory']:.0f} % of the memory allowed"
    )
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
