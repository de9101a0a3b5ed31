"""Quick numbers on this machine: ``python bench.py``. Ratio, error and speed on real KV pages, within a minute.

With a GPU: verifies, then times the kernels beside a device copy and, where they can be loaded, libcuSZp and
nvCOMP; then the link to the host. Without one: ratio and error of the same pages through the NumPy reference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from cuszp_cupy.evaluation import codec, machine, report, speed


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(prog="bench.py", description=__doc__.partition("\n")[0])
    result.add_argument("--quick", action="store_true", help="fewer rows, in a few seconds")
    result.add_argument(
        "--json", metavar="FILE", type=_output, help="write the numbers, with machine and versions"
    )
    result.add_argument("--plot", metavar="FILE", type=_output, help="draw rate against error (needs matplotlib)")
    result.add_argument("--device", metavar="N", type=int, help="which GPU (default: the current one, 0)")
    return result


def _output(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: this is a folder, expected a file to write")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    console, progress = Console(width=None if sys.stdout.isatty() else 130), Console(stderr=True)
    missing = machine.gpu_missing()
    if options.plot:
        report.pyplot()  # raises now, not after a minute of work
    if options.device is not None:
        if missing:
            command_line.error(f"--device {options.device}: {missing}")
        _use_device(command_line, options.device)

    described = machine.describe()
    result = {
        "machine": described,
        "parameters": {
            "quick": options.quick, "kv_bounds": codec.KV_BOUNDS, "array_bound": codec.ARRAY_BOUND,
            "batch_bytes": None if missing else speed.BATCH_BYTES,
        },
        "rows": [], "link": [], "notes": [], "rate_error": [],
    }  # fmt: skip
    with progress.status("starting") as status:
        if missing:
            result["rows"] = codec.reference_rows(quick=options.quick, step=status.update)
            result["notes"].append(f"speeds, libcuSZp, nvCOMP and the link need a GPU. {missing}")
        else:
            result |= speed.gpu_rows(quick=options.quick, step=status.update)
        if options.plot:
            result["rate_error"] = codec.rate_error(quick=options.quick, step=status.update)
            report.plot_rate_error(result["rate_error"], options.plot)
    if options.json:
        report.write_json(result, options.json)

    console.print(report.codec_table(result["rows"], machine.title(described)))
    if result["link"]:
        console.print(report.link_table(result["link"], "the link: device to host, host to device"))
    for note in result["notes"]:
        console.print(note, highlight=False, markup=False)
    return 0


def _use_device(command_line: argparse.ArgumentParser, device: int) -> None:
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if not 0 <= device < count:
        command_line.error(f"--device {device}: this machine has {count} device(s), 0 to {count - 1}")
    cupy.cuda.Device(device).use()


if __name__ == "__main__":
    sys.exit(main())
