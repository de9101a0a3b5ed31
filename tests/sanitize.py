"""compute-sanitizer over the GPU tests, at small sizes: four tools, a process a tool and file. Needs a GPU.

``python -m tests.sanitize [--jobs N] [--tools ...] [--files ...]`` prints a line each; exit status 1 if a tool
reports anything in a kernel or a test fails. Counted apart: what initcheck says of copies, and memory that a test
asks too much of. A tile of the ring is copied with the gaps between its payloads, which nobody wrote and nobody
reads (kv_publish moves what the copy left); copy_quad's last copy takes fewer bytes than the 16 that initcheck
looks at.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 500  # for one process
COPIES = "kv_publish", "copy_quad"  # a kernel, and what is compiled into one
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FILES = ("codec", "cuszp", "edges", "entropy", "fuzz", "pipeline", "faults", "offload")
#: all bit patterns, many pages; tests of time, of memory that runs out, and of other processes
LEFT_OUT = (
    "pattern", "many_descriptors", "many_tiles", "at_once", "runs_out", "killed", "not_compile",
    "refused_at_construction", "no_device_memory", "without_memory", "inside_the_launch", "measures_and_explains",
)  # fmt: skip
#: under initcheck a launch waits for kernels before it, and nothing runs beside a stream that is held up
LEFT_OUT_OF_INITCHECK = "order_on_the_callers_stream", "full_arena", "room_that_a_load_still_reads"
CASES = 500  # of mutated pages


def check(tool: str, file: str) -> tuple[bool, str]:
    """Run the GPU tests of a file under a tool; return whether all is clean, and a line on it."""
    began = time.monotonic()
    names = LEFT_OUT + LEFT_OUT_OF_INITCHECK * (tool == "initcheck")
    command = [
        "compute-sanitizer", "--tool", tool, "--print-limit", "1000000", "--show-backtrace", "no",
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--require-gpu",
        "-k", f"not ({' or '.join(names)})", f"tests/test_{file}.py",
    ]  # fmt: skip
    env = os.environ | {"CUSZP_FUZZ_CASES": str(CASES)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"{tool} {file}: did not end in {SECONDS} s"
    clean, said = verdict(tool, done.stdout)
    return clean, f"{tool} {file}: {said} ({time.monotonic() - began:.0f} s)"


def verdict(tool: str, text: str) -> tuple[bool, str]:
    """Return whether all is clean, and what there was, from what a process printed."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", text)
    # not from the start of a line: pytest's dots may be before it
    places = re.findall(r"={9} +(\w.*)\n={9} +at (\w+)(?:.* in (\S+:\d+))?", text)
    gaps = [place for place in places if place[0].startswith("Uninitialized") and place[1] in COPIES]
    copies = len(gaps) + len(re.findall(r"Uninitialized access to \S+ on access by cu\w+ source", text))
    refused = len(re.findall(r"Program hit cudaErrorMemoryAllocation", text))
    said = re.findall(r"^\d+ (?:passed|failed|error).* in [\d.]+s.*$", text, re.MULTILINE)
    if not summary or not said:
        return False, f"ended early: {text[-300:]}"
    errors, passed = int(summary[0]) - copies - refused, not re.search("failed|error", said[-1])
    also = f", {copies} in copies" * (copies > 0) + f", {refused} of memory refused" * (refused > 0)
    told = Counter(place for place in places if place not in gaps)
    found = "".join(f"\n  {number} x {' at '.join(filter(None, place))}" for place, number in told.items())
    clean = passed and errors == 0 and (tool == "initcheck" or not copies)
    return clean, f"{errors} errors{also}; {said[-1]}{found}"


def main(arguments: list[str] | None = None) -> int:
    """Print a line a tool and file; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--jobs", metavar="N", type=int, default=4, help="processes at a time (default: 4)")
    options = parser.parse_args(arguments)
    tasks = [(tool, file) for file in options.files for tool in options.tools]
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for clean, line in pool.map(lambda task: check(*task), tasks):
            wrong += not clean
            print(line, flush=True)
    print(f"{len(tasks)} runs, {wrong} not clean")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
