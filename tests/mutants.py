"""Kernels broken on purpose, one line at a time: which tests see it? Needs a GPU.

``python -m tests.mutants [--jobs N] [NAME ...]`` runs each mutant's tests on a copy; exit status 1 if one of them
passes all, or does not compile. ``tests/test_mutants.py`` holds the list to the sources.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAW = Path("cuszp_cupy/raw")
SECONDS = 300  # for the tests of one mutant; a kernel that hangs is one that is seen
EQUAL, EDGES = "tests/test_codec.py -k equal_reference", "tests/test_edges.py -k kernels_on_edge_pages"
DAMAGE = "tests/test_codec.py tests/test_fuzz.py -k damage_is_reported or hostile or kernels_on_mutated_pages"
ENTROPY = "tests/test_entropy.py -k kernels"
STREAMS = "tests/test_cuszp.py -k kernels"
PIPELINE = "tests/test_pipeline.py -k round_trip or geometries or mispredicted or cuda_graph or coding_entropy"


@dataclass(frozen=True)
class Mutant:
    """A line of a kernel, what is put in its place, and the tests that ought to see it."""

    name: str
    file: str
    before: str
    after: str
    tests: str

    def source(self, root: Path = ROOT) -> str:
        """Return the broken source; raise ValueError unless the line is there once."""
        text = (root / RAW / self.file).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: expected {self.before!r} once in {self.file}, got {text.count(self.before)}"
            )
        return text.replace(self.before, self.after)


MUTANTS = [
    Mutant(
        "values beyond the largest",
        "kv_common.cuh",
        "!(__fadd_rn(x, step) <= Storage<T>::largest)",
        "false",
        EDGES,
    ),
    Mutant(
        "magnitudes too large", "kv_common.cuh", "(*this)(x) & ~(MAGIC_BITS | MAGNITUDE_MASK)", "false", EDGES
    ),
    Mutant(
        "weight of the checksum", "kv_common.cuh", "(index + 1) * 0x9E3779B1u", "(index + 2) * 0x9E3779B1u", EQUAL
    ),
    Mutant(
        "threshold of a step",
        "kv_encode.cuh",
        "(1.25 + 0.25 * i) * (1 + 1.0 / 65536)",
        "(1.25 + 0.25 * i)",
        EQUAL,
    ),
    Mutant(
        "smallest step",
        "kv_encode.cuh",
        "s = s < Storage<T>::lowest_step ? NO_STEP : min(s, STEP_LIMIT);",
        "s = min(s, STEP_LIMIT);",
        EDGES,
    ),
    Mutant(
        "denormals are no zeros",
        "kv_encode.cuh",
        "return t == 0 && nonzero ? __uint_as_float(1) : t;",
        "return t;",
        EDGES,
    ),
    Mutant(
        "no negative zeros",
        "kv_encode.cuh",
        "code |= (v & 0xffffu) == 0x8000u || v >> 16 == 0x8000u;",
        ";",
        EDGES,
    ),
    Mutant("sums of both parts in one", "kv_encode.cuh", "sum[0] += one ? 0 : term;", "sum[0] += term;", EQUAL),
    Mutant(
        "pages seen before", "kv_encode.cuh", "if (!all_on && !escaped) fits &= ~(1u << (9 * p + d));", ";", EQUAL
    ),
    Mutant(
        "raw where it is no larger",
        "kv_encode.cu",
        "raw = 4 * (first_word + words) >= 2 * values;",
        "raw = 4 * (first_word + words) > 2 * values;",
        f"{EQUAL} or random_pages or edge",
    ),
    Mutant("one slope too far", "kv_common.cuh", "#define LOW_CODE 6u", "#define LOW_CODE 7u", EQUAL),
    Mutant("room of a payload", "kv_common.cuh", "(bytes + 15) / 16) : 0;", "bytes / 16) : 0;", PIPELINE),
    Mutant(
        "chunks before",
        "kv_encode_large.cu",
        "first_word + shared.sum[0], chunk_words",
        "first_word, chunk_words",
        EQUAL,
    ),
    Mutant(
        "extremes of all chunks",
        "kv_encode_large.cu",
        "atomicMax(&x.top[tid], shared.top[tid]);",
        "x.top[tid] = shared.top[tid];",
        EQUAL,
    ),
    Mutant(
        "words of other chunks",
        "kv_decode_large.cu",
        "words += sizes[index * chunks + i];",
        "words += sizes[i];",
        EQUAL,
    ),
    Mutant("exchange left as it is", "kv_encode_large.cu", "x = Exchange{};", ";", PIPELINE),
    Mutant("rows with any step", "kv_decode.cuh", "abs(s0) <= STEP_LIMIT && ", "", DAMAGE),
    Mutant(
        "checksum of a page", "kv_decode.cu", "if (residue(check) != row.z) bad |= BAD_CHECKSUM;", ";", DAMAGE
    ),
    Mutant(
        "checksum of a large page",
        "kv_decode_large.cu",
        "if (residue(__ldcg(&x.check)) != row.z) bad |= BAD_CHECKSUM;",
        ";",
        DAMAGE,
    ),
    Mutant(
        "words that codes ask for",
        "kv_decode.cu",
        "if (first_word + words_before + (sums >> 16) != all_words) {",
        "if (first_word + words_before + (sums >> 16) > all_words) {",
        DAMAGE,
    ),
    Mutant(
        "prediction",
        "kv_entropy_decode.cu",
        "const int q0 = v0 + (a0 >> 4 & predicted)",
        "const int q0 = v0 + (a0 >> 4)",
        ENTROPY,
    ),
    Mutant(
        "ring of half-words",
        "kv_entropy_decode.cu",
        "ahead = word(++chunk + 4);",
        "ahead = word(++chunk + 3);",
        ENTROPY,
    ),
    Mutant("signs at the end", "kv_entropy_decode.cu", "(last && decoder.x >> 16 != 1)", "false", ENTROPY),
    Mutant(
        "lanes that part",
        "kv_entropy_decode.cu",
        "bad = __reduce_or_sync(FULL, bad);   // lanes",
        "// lanes",
        "tests/test_fuzz.py -k kernels_on_golden_errors",
    ),
    Mutant(
        "other tables", "kv_entropy_decode.cu", "if (!row_good || id != tables_id) {", "if (!row_good) {", ENTROPY
    ),
    Mutant(
        "no larger than fixed",
        "kv_entropy_encode.cu",
        "entropy = entropy && bytes_now < fixed.y;",
        ";",
        "tests/test_entropy.py tests/test_codec.py -k kernels or coding_entropy or equal_reference",
    ),
    Mutant(
        "base of classes",
        "kv_entropy_encode.cu",
        "(2 * (u32)max(shared_sum[tid], 0) + n) / (2 * max(n, 1u))",
        "(u32)max(shared_sum[tid], 0) / max(n, 1u)",
        ENTROPY,
    ),
    Mutant(
        "division of the coder",
        "kv_entropy_encode.cu",
        "__funnelshift_r(__umulhi(x, entry.x), 0, entry.w)",
        "__umulhi(x, entry.x)",
        ENTROPY,
    ),
    Mutant(
        "rest of a region",
        "kv_rest.cu",
        "u32 word = copied[region] + task % parts",
        "u32 word = copied[region] + 1 + task % parts",
        PIPELINE,
    ),
    Mutant("place in the table", "kv_rest.cu", "table[slots[i]] = rows[i];", "table[i] = rows[i];", PIPELINE),
    Mutant("padding of a block", "cuszp_compress.cu", "if (i >= num_values) word[bit_of(i)] = 0;", ";", STREAMS),
    Mutant(
        "first values apart",
        "cuszp_compress.cu",
        "if (bytes > 4 + 4 * k2 + ob) {",
        "if (bytes >= 4 + 4 * k2 + ob) {",
        STREAMS,
    ),
    Mutant(
        "damaged rates",
        "cuszp_decompress.cu",
        "if (!rate.legal || payload_start",
        "if (payload_start",
        f"{STREAMS} or mutated",
    ),
]


def verdict(mutant: Mutant | None, tests: str) -> tuple[str, float]:
    """Run ``tests`` on a copy with ``mutant`` (None: as it is).

    Returns:
        ``seen``, ``SURVIVED`` or what went wrong; and the seconds that it took.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cuszp_cupy", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "bench.py", "vllm_patch.py", "README.md"):
            shutil.copy(ROOT / name, folder)
        if mutant:
            (Path(folder) / RAW / mutant.file).write_text(mutant.source(), encoding="utf-8")
        files, _, which = tests.partition(" -k ")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
            "--require-gpu",
        ]
        try:
            done = subprocess.run(
                [*command, *files.split(), "-k", which],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, f"{folder}/tests"])},
            )
        except subprocess.TimeoutExpired:
            return "seen", time.monotonic() - began
    said = {0: "SURVIVED", 1: "seen"}.get(
        done.returncode, f"pytest ended with {done.returncode}: {done.stdout[-300:]}"
    )
    if "CompileException" in done.stdout or " error" in done.stderr:
        said = f"does not compile: {done.stdout[-300:]}"
    return said, time.monotonic() - began


def main(arguments: list[str] | None = None) -> int:
    """Print a line a mutant; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants (default: all)")
    parser.add_argument("--jobs", metavar="N", type=int, default=4, help="mutants at a time (default: 4)")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    tasks = [(None, tests) for tests in dict.fromkeys(mutant.tests for mutant in chosen)]
    tasks += [(mutant, mutant.tests) for mutant in chosen]
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (mutant, tests), (said, seconds) in zip(
            tasks, pool.map(lambda task: verdict(*task), tasks), strict=True
        ):
            expected = "seen" if mutant else "SURVIVED"
            wrong += said != expected
            if mutant is None:
                said = {"SURVIVED": "passes", "seen": "FAILS as it is"}.get(said, said)
            print(f"{mutant.name if mutant else f'unbroken, {tests}'}: {said} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} mutants, {wrong} not as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
