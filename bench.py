"""Quick numbers on this machine: ``python bench.py``. Ratio, error and speed on real KV pages, within a minute.

With a GPU: verifies, then times the kernels beside a device copy and, where they can be loaded, libcuSZp and
nvCOMP; then the link to the host. Without one: ratio and error of the same pages through the NumPy reference.

``python bench.py swap`` measures ``SwapPipeline`` instead, and what it costs the work beside it; needs a GPU.
``python bench.py accuracy MODEL TEXT`` measures what a compressed cache costs a language model; needs torch.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from rich.console import Console

from cuszp_cupy.bound import parse_parts
from cuszp_cupy.evaluation import accuracy, codec, machine, report, soak, speed, swap


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


def swap_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py swap``."""
    result = argparse.ArgumentParser(
        prog="bench.py swap",
        description="Pages to pinned host memory and back: speed, and the tax on other work.",
    )
    result.add_argument("--quick", action="store_true", help="pages of 64 KiB only, within a minute")
    result.add_argument(
        "--json", metavar="FILE", type=_output, help="write the numbers, with machine and versions"
    )
    result.add_argument(
        "--plot", metavar="FILE", type=_output, help="draw speed against page size (needs matplotlib)"
    )
    result.add_argument("--bound", type=_bound, default="rms:0.05", help="error bound (default: %(default)s)")
    result.add_argument("--coding", choices=codec.KV_CODINGS, default="fixed", help="(default: %(default)s)")
    result.add_argument(
        "--seconds",
        metavar="S",
        type=_positive,
        help="of timing, a section of the table (default: 1.5, quick: 0.3)",
    )
    result.add_argument(
        "--soak", metavar="MINUTES", type=_positive, help="only this: random use, every loaded page checked"
    )
    result.add_argument("--device", metavar="N", type=int, help="which GPU (default: the current one, 0)")
    return result


def accuracy_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py accuracy``."""
    result = argparse.ArgumentParser(
        prog="bench.py accuracy",
        description="What a compressed KV cache costs a language model: KL, top-1, NLL and bits a value.",
    )
    result.add_argument("model", type=_model, help="a causal LM, the folder that save_pretrained writes")
    result.add_argument("text", type=_text, help="a UTF-8 text")
    result.add_argument(
        "--context",
        metavar="N",
        type=int,
        default=accuracy.CONTEXT,
        help="tokens a window (default: %(default)s)",
    )
    result.add_argument(
        "--tokens", metavar="N", type=int, help=f"in all, whole windows (default: {accuracy.TOKENS})"
    )
    result.add_argument(
        "--bound",
        metavar="B",
        type=_bounds,
        action="append",
        help="instead of the usual ones: rms:0.05, or rms:0.05/rms:0.1 for K and V; can be repeated",
    )
    result.add_argument(
        "--quick",
        action="store_true",
        help=f"{accuracy.QUICK_WINDOWS} windows and fewer bounds, unless they are given",
    )
    result.add_argument(
        "--json", metavar="FILE", type=_output, help="write the numbers, with machine and versions"
    )
    result.add_argument(
        "--plot", metavar="FILE", type=_output, help="draw KL against bits a value (needs matplotlib)"
    )
    result.add_argument("--device", metavar="N", type=int, help="which GPU (default: the current one, 0)")
    return result


def _model(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text}: expected a model's folder, there is no config.json in it")
    return Path(text)


def _text(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    return Path(text)


def _bounds(text: str) -> str:
    try:
        accuracy.parse_bound(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _bound(text: str) -> str:
    try:
        parse_parts(text, 2)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _output(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: this is a folder, expected a file to write")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["swap"]:
        return swap_main(arguments[1:])
    if arguments[:1] == ["accuracy"]:
        return accuracy_main(arguments[1:])
    command_line = parser()
    options = command_line.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 130)
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
    with progress() as step:
        if missing:
            result["rows"] = codec.reference_rows(quick=options.quick, step=step)
            result["notes"].append(f"speeds, libcuSZp, nvCOMP and the link need a GPU. {missing}")
        else:
            result |= speed.gpu_rows(quick=options.quick, step=step)
        if options.plot:
            result["rate_error"] = codec.rate_error(quick=options.quick, step=step)
            report.plot_rate_error(result["rate_error"], options.plot)
    if options.json:
        report.write_json(result, options.json)

    console.print(report.codec_table(result["rows"], machine.title(described)))
    if result["link"]:
        console.print(report.link_table(result["link"], "the link: device to host, host to device"))
    for note in result["notes"]:
        console.print(note, highlight=False, markup=False)
    return 0


def swap_main(arguments: list[str]) -> int:
    """Run ``bench.py swap``; return the exit status: 1 without a GPU or if ``--soak`` found a wrong page."""
    command_line = swap_parser()
    options = command_line.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    missing = machine.gpu_missing()
    if missing:
        print(f"bench.py swap needs a GPU: {missing}", file=sys.stderr)
        return 1
    if options.plot:
        report.pyplot()  # raises now, not after minutes of work
    if options.device is not None:
        _use_device(command_line, options.device)
    seconds = options.seconds or (0.3 if options.quick else 1.5)
    described = machine.describe()
    result = {
        "machine": described,
        "parameters": {
            "quick": options.quick, "bound": options.bound, "coding": options.coding, "seconds": seconds,
            "soak_minutes": options.soak, "batch_bytes": swap.BATCH_BYTES, "num_batches": swap.NUM_BATCHES,
        },
    }  # fmt: skip
    with progress() as step:
        if options.soak:
            result["soak"] = soak.soak(options.soak, options.bound, options.coding, step=step)
        else:
            result |= swap.gpu_rows(options.quick, options.bound, options.coding, seconds, step=step)
    if options.json:
        report.write_json(result, options.json)
    if options.soak:
        for line in [machine.title(described), *report.soak_lines(result["soak"])]:
            console.print(line, highlight=False, markup=False)
        return int(bool(result["soak"]["mismatches"] or result["soak"]["damaged"]))
    if options.plot:
        report.plot_swap(result, options.plot)
    title = f"{machine.title(described)}, {options.coding}, {options.bound}"
    console.print(report.swap_table(result["rows"], title, swap.BATCH_BYTES))
    console.print(report.ablation_table(result["ablation"]))
    console.print(report.tax_table(result["tax"]))
    console.print(report.descriptor_table(result["descriptors"]))
    for note in result["notes"]:
        console.print(note, highlight=False, markup=False)
    return 0


def accuracy_main(arguments: list[str]) -> int:
    """Run ``bench.py accuracy``; return the exit status: 1 where torch or transformers is missing."""
    command_line = accuracy_parser()
    options = command_line.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    missing = accuracy.missing()
    if missing:
        print(f"bench.py accuracy: {missing}", file=sys.stderr)
        return 1
    if options.plot:
        report.pyplot()  # raises now, not after minutes of work
    if options.device is not None:
        if why := machine.gpu_missing():
            command_line.error(f"--device {options.device}: {why}")
        _use_device(command_line, options.device)
    tokens = options.tokens or (accuracy.QUICK_WINDOWS * options.context if options.quick else accuracy.TOKENS)
    bounds = options.bound or accuracy.default_bounds(options.quick)
    described, notes = machine.describe(), []
    with progress() as step:
        step(f"the model {options.model.resolve().name}, the text {options.text.name}")
        try:
            model, windows = accuracy.load(
                options.model, options.text, context=options.context, tokens=tokens, notes=notes
            )
        except ValueError as error:
            command_line.error(str(error))
        for note in notes:
            step(note)
        parameters = accuracy.describe(options.model, options.text, model, windows)
        measured = accuracy.variants(bounds, accuracy.array_module(model), notes)
        rows = accuracy.measure(model, windows, measured, step)
    result = {
        "machine": described, "parameters": parameters | {"quick": options.quick, "bounds": bounds},
        "rows": rows, "equal_kl": accuracy.at_equal_kl(rows), "notes": notes,
    }  # fmt: skip
    if options.json:
        report.write_json(result, options.json)
    what = f"{parameters['model']}, {parameters['tokens']} tokens of {parameters['text']}"
    if options.plot:
        report.plot_accuracy(rows, what, options.plot)
    console.print(report.accuracy_table(rows, f"{machine.title(described)}\n{what}"))
    for note in [*report.equal_kl_lines(result["equal_kl"]), *notes]:
        console.print(note, highlight=False, markup=False)
    return 0


@contextlib.contextmanager
def progress():
    """Yield a function that says on stderr what is being done: in place on a terminal, else line by line."""
    console, begin = Console(stderr=True), time.perf_counter()
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield lambda text: print(f"{time.perf_counter() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)


def _use_device(command_line: argparse.ArgumentParser, device: int) -> None:
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if not 0 <= device < count:
        command_line.error(f"--device {device}: this machine has {count} device(s), 0 to {count - 1}")
    cupy.cuda.Device(device).use()


if __name__ == "__main__":
    sys.exit(main())
