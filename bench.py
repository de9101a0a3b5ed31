"""Quick numbers on this machine: ``python bench.py``. Ratio, error and speed on real KV pages, within a minute.

With a GPU: verifies, then times the kernels beside a device copy and, where they can be loaded, libcuSZp and
nvCOMP; then the link to the host. Without one: ratio and error of the same pages through the NumPy reference.

``python bench.py swap`` measures ``SwapPipeline`` instead, and what it costs the work beside it; needs a GPU.
``python bench.py accuracy MODEL TEXT`` measures what a compressed cache costs a language model; needs torch.
``python bench.py serve MODEL`` serves it with vLLM, KV offloaded raw and compressed; needs vLLM and a GPU.
``python bench.py baseline MODEL`` measures how much of the time its uncompressed offloading takes; the same.
``python bench.py study`` runs all of them, one after the other, into a folder; again: what is missing there.
``python bench.py report`` writes docs/report.md from results/; ``--advise`` says what pays on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from cuszp_cupy.bound import parse_parts
from cuszp_cupy.evaluation import (
    accuracy,
    advice,
    baseline,
    codec,
    document,
    machine,
    report,
    serve,
    soak,
    speed,
    study,
    swap,
)
from cuszp_cupy.pipeline import TRANSPORTS


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(prog="bench.py", description=__doc__.partition("\n")[0])
    _add_shared(result, quick="fewer rows, in a few seconds", plot="rate against error")
    _add_device(result)
    return result


def _add_shared(result, quick: str, plot: str | None) -> None:
    add = result.add_argument
    add("--quick", action="store_true", help=quick)
    add("--json", metavar="FILE", type=_output, help="write the numbers, with machine and versions")
    if plot:
        add("--plot", metavar="FILE", type=_output, help=f"draw {plot} (needs matplotlib)")


def _add_device(result) -> None:
    result.add_argument("--device", metavar="N", type=int, help="which GPU (default: the current one, 0)")


def swap_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py swap``."""
    result = argparse.ArgumentParser(
        prog="bench.py swap",
        description="Pages to pinned host memory and back: speed, and the tax on other work.",
    )
    _add_shared(result, quick="pages of 64 KiB only, within a minute", plot="speed against page size")
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
    _add_device(result)
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
        type=_bound,
        action="append",
        help="instead of the usual ones: rms:0.05, or rms:0.05/rms:0.1 for K and V; can be repeated",
    )
    quick = f"{accuracy.QUICK_WINDOWS} windows and fewer bounds, unless they are given"
    _add_shared(result, quick=quick, plot="KL against bits a value")
    _add_device(result)
    return result


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py serve``."""
    result = argparse.ArgumentParser(
        prog="bench.py serve",
        description="vLLM, offline: requests whose KV comes back from CPU memory, raw and compressed in turn.",
    )
    _add_load(result)
    add = result.add_argument
    add("--fill", action="store_true", help="scale the shape's K and V by channel as real KV is")
    add("--bound", metavar="B", type=_variant, action="append",
        help="rms:0.05 (default), or rms:0.05/rms:0.1 for K and V; with a coding, a transport and a ring in MiB "
             "of its own: 'rms:0.05 entropy fused ring=512'; can be repeated")  # fmt: skip
    add("--coding", choices=codec.KV_CODINGS, default="fixed",
        help="where a bound names none (default: %(default)s)")  # fmt: skip
    add("--transport", choices=TRANSPORTS, help="where a bound names none (default: that of vllm_patch)")
    add(
        "--gpu-tokens", metavar="N", type=_count, help="size of the GPU's KV cache (default: a set and an eighth)"
    )
    add("--beside", metavar="SECONDS", type=_positive, default=0.0, help="decode alone, then beside restores")
    add("--beside-rate", metavar="R", type=_positive, help="restores a second (default: two at any time)")
    add("--verify", metavar="SHARE", type=_share, nargs="?", const=0.01,
        help="check each loaded page; SHARE of them against the reference too (default: 0.01). Slow")  # fmt: skip
    add("--processes", choices=("one", "fork", "spawn"),
        help="all in one, which times transfers (default), or as vLLM starts its own")  # fmt: skip
    add("--tensor-parallel", metavar="N", type=_count, default=1, help="GPUs (default: 1)")
    _add_shared(
        result, quick="one repeat, and a quarter of the prompts", plot="requests/s and time to first token"
    )
    return result


def _add_load(result) -> None:
    """Add what is served, for ``serve`` and ``baseline``."""
    add = result.add_argument
    add("model", type=_model, nargs="?", help="a causal LM, the folder that save_pretrained writes")
    add("--shape", choices=serve.SHAPES, help="instead of a model: its shape, with dummy weights")
    add("--layers", metavar="N", type=_count, help="of the shape (default: all)")
    add("--prompt-tokens", metavar="LOW[,HIGH]", type=_range, action="append",
        help="can be repeated (default: 8000 for a shape, else 512,4096)")  # fmt: skip
    add("--prompts", metavar="N", type=_count, help="a set (default: 16 for a shape, else 100)")
    add("--sets", metavar="N", type=_count, default=2, help="of prompts, that evict each other (default: 2)")
    add("--prompt-file", metavar="FILE", type=_text, help="prompts as a JSON list of lists of token ids")
    add("--new-tokens", metavar="N,N", type=_counts,
        help="a request, a pass for each (default: 1 for a shape, else 16)")  # fmt: skip
    add("--in-flight", metavar="N,N", type=_counts, default=(1, 4, 16),
        help="requests submitted at once, a pass for each (default: 1,4,16)")  # fmt: skip
    add("--repeats", metavar="N", type=_count, help="of each pass (default: 3, quick: 1)")
    add("--no-recompute", action="store_true", help="leave out the run without offloading")
    add(
        "--cpu-gb",
        metavar="G",
        type=_positive,
        help="of the CPU's cache, in GiB (default: what all prompts need)",
    )
    add("--engine", metavar="JSON", type=_object, help="more arguments of vllm.LLM; on a GPU with other users: "
        """'{"gpu_memory_utilization": 0.5}'""")  # fmt: skip


def baseline_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py baseline``."""
    result = argparse.ArgumentParser(
        prog="bench.py baseline",
        description="vLLM, offline and unpatched: the share of requests' time that transfers take.",
    )
    _add_load(result)
    result.add_argument(
        "--gpu-sets", metavar="X,X", type=_positives, default=baseline.GPU_SETS,
        help="sizes of the GPU's KV cache, in sets of prompts, beside one that holds all (default: 0.5,1.125)",
    )  # fmt: skip
    result.set_defaults(  # what else serve_case asks for
        fill=False, coding="fixed", transport=None, verify=None, gpu_tokens=None, beside=0.0, beside_rate=None,
        processes="one", tensor_parallel=1,
    )  # fmt: skip
    _add_shared(result, quick="one repeat, and a quarter of the prompts", plot=None)
    return result


def study_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py study``."""
    result = argparse.ArgumentParser(
        prog="bench.py study",
        description="Every measurement, a step after the other; what is finished in FOLDER is not done again.",
    )
    add = result.add_argument
    add("folder", metavar="FOLDER", type=Path, nargs="?", help="of the results (default: results/GPU)")
    add("--model", type=_model, help="a causal LM, the folder that save_pretrained writes, for two of the steps")
    add("--text", type=_text, help="a UTF-8 text, for the accuracy of the model")
    add("--shape", choices=serve.SHAPES, default=study.SHAPE, help="that vLLM serves (default: %(default)s)")
    add("--quick", action="store_true", help="fewer steps, each with --quick")
    add("--only", metavar="NAME", action="append", help="this step alone; can be repeated")
    add("--minutes", metavar="M", type=_positive, default=float("inf"),
        help="start nothing that is expected to take longer than what is left of them")  # fmt: skip
    add("--list", action="store_true", help="show the steps, measure nothing")
    return result


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench.py report``."""
    result = argparse.ArgumentParser(
        prog="bench.py report", description="docs/report.md and its figures, from the JSON files in results/."
    )
    add = result.add_argument
    add("--root", metavar="FOLDER", type=_root, default=Path(__file__).parent,
        help="that holds results/, and gets docs/ (default: where bench.py lies)")  # fmt: skip
    add(
        "--advise",
        action="store_true",
        help="only say what pays: measured here, in about a minute, or from results/",
    )
    add("--layers", metavar="FILE", type=_output, help="only measure bits a value of each layer, for the report")
    _add_device(result)
    return result


def _root(text: str) -> Path:
    if not (Path(text) / "results").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder results in it")
    return Path(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(number) for number in text.split(","))


def _positives(text: str) -> tuple[float, ...]:
    return tuple(_positive(number) for number in text.split(","))


def _range(text: str) -> tuple[int, int]:
    numbers = _counts(text)
    if len(numbers) > 2 or numbers[0] > numbers[-1]:
        raise argparse.ArgumentTypeError(f"expected a number or two as LOW,HIGH, got {text}")
    return numbers[0], numbers[-1]


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0, at most 1, got {text}")
    return value


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def _model(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text}: expected a model's folder, there is no config.json in it")
    return Path(text)


def _text(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    return Path(text)


def _bound(text: str) -> str:
    try:
        parse_parts(text, 2)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _variant(text: str) -> str:
    text = " ".join(text.split())
    try:
        serve.settings_of(text)
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
    commands = {
        "swap": swap_main, "accuracy": accuracy_main, "serve": serve_main, "baseline": baseline_main,
        "study": study_main, "report": report_main,
    }  # fmt: skip
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    command_line = parser()
    options = command_line.parse_args(arguments)
    missing = machine.gpu_missing()
    if options.plot:
        report.pyplot()  # raises now, not after a minute of work
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

    title, notes = report.with_library(machine.title(described), result["notes"])
    shown = [report.codec_table(result["rows"], title)]
    if result["link"]:
        shown.append(report.link_table(result["link"], "the link: device to host, host to device"))
    show(*shown, *notes, width=130)
    return 0


def swap_main(arguments: list[str]) -> int:
    """Run ``bench.py swap``; return the exit status: 1 without a GPU or if ``--soak`` found a wrong page."""
    command_line = swap_parser()
    options = command_line.parse_args(arguments)
    missing = machine.gpu_missing()
    if missing:
        print(f"bench.py swap needs a GPU: {missing}", file=sys.stderr)
        return 1
    if options.plot:
        report.pyplot()  # raises now, not after minutes of work
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
        show(machine.title(described), *report.soak_lines(result["soak"]))
        return int(bool(result["soak"]["mismatches"] or result["soak"]["damaged"]))
    if options.plot:
        report.plot_swap(result, options.plot)
    title = f"{machine.title(described)}, {options.coding}, {options.bound}"
    title, notes = report.with_library(title, result["notes"])
    show(
        report.swap_table(result["rows"], title, swap.BATCH_BYTES), report.ablation_table(result["ablation"]),
        report.tax_table(result["tax"]), report.descriptor_table(result["descriptors"]), *notes,
    )  # fmt: skip
    return 0


def accuracy_main(arguments: list[str]) -> int:
    """Run ``bench.py accuracy``; return the exit status: 1 where torch or transformers is missing."""
    command_line = accuracy_parser()
    options = command_line.parse_args(arguments)
    missing = accuracy.missing()
    if missing:
        print(f"bench.py accuracy: {missing}", file=sys.stderr)
        return 1
    if options.plot:
        report.pyplot()  # raises now, not after minutes of work
    _use_device(command_line, options.device)
    tokens = options.tokens or (accuracy.QUICK_WINDOWS * options.context if options.quick else accuracy.TOKENS)
    bounds = list(dict.fromkeys(options.bound or accuracy.default_bounds(options.quick)))
    described, notes = machine.describe(), []
    with progress() as step:
        step(f"the model {options.model.resolve().name}, the text {options.text.name}")
        try:
            model, windows, held_out = accuracy.load(
                options.model, options.text, context=options.context, tokens=tokens, notes=notes
            )
        except ValueError as error:
            command_line.error(str(error))
        for note in notes:
            step(note)
        parameters = accuracy.describe(options.model, options.text, model, windows)
        tables = accuracy.calibrate(model, held_out, bounds, notes, step)
        rows = accuracy.measure(model, windows, accuracy.variants(bounds), tables, step)
    result = {
        "machine": described, "parameters": parameters | {"quick": options.quick, "bounds": bounds},
        "rows": rows, "equal_kl": accuracy.at_equal_kl(rows), "notes": notes,
    }  # fmt: skip
    if options.json:
        report.write_json(result, options.json)
    what = f"{parameters['model']}, {parameters['tokens']} tokens of {parameters['text']}"
    if options.plot:
        report.plot_accuracy(rows, what, options.plot)
    table = report.accuracy_table(rows, f"{machine.title(described)}\n{what}")
    show(table, *report.equal_kl_lines(result["equal_kl"]), *notes)
    return 0


def serve_main(arguments: list[str]) -> int:
    """Run ``bench.py serve``; return the exit status: 1 if something is missing or the numbers have a problem."""
    command_line = serve_parser()
    options = command_line.parse_args(arguments)
    _check_load(command_line, options)
    if options.processes == "one" and options.tensor_parallel > 1:
        command_line.error("--tensor-parallel takes more processes than one: fork or spawn")
    if missing := serve.missing():
        print(f"bench.py serve: {missing}", file=sys.stderr)
        return 1
    if options.plot:
        report.pyplot()  # raises now, not after minutes of work
    bounds = list(dict.fromkeys(options.bound or ["rms:0.05"]))
    described = machine.describe()
    with tempfile.TemporaryDirectory() as folder, progress() as step:
        try:
            case = serve.sized(serve_case(options, Path(folder)))
        except ValueError as error:
            command_line.error(str(error))
        result = {"machine": described} | serve.serve(case, bounds, step)
    result["parameters"] = {"quick": options.quick, "bounds": bounds, "coding": options.coding}
    if options.json:
        report.write_json(result, options.json)
    case, version = result["case"], result["variants"]["raw"]["vllm"]
    title = f"vLLM {version}, {case['model']}, {options.coding}"
    title += " where none is named" if any(" " in bound for bound in bounds) else ""
    if options.plot:
        report.plot_serve(result, title, options.plot)
    tables = report.serve_tables(result, f"{machine.title(described)}\n{title}")
    show(*tables, *report.serve_lines(result))
    return int(bool(result["problems"]))


def _check_load(command_line: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.model is None) == (options.shape is None):
        command_line.error("expected a model's folder or --shape, one of them")
    if options.model and (options.layers or options.fill):
        command_line.error("--layers and --fill are for a --shape")
    if options.prompt_file and options.prompt_tokens:
        command_line.error("--prompt-tokens does not go with --prompt-file, whose prompts have a length")


def baseline_main(arguments: list[str]) -> int:
    """Run ``bench.py baseline``; return the exit status: 1 if something is missing or a cache size failed."""
    command_line = baseline_parser()
    options = command_line.parse_args(arguments)
    _check_load(command_line, options)
    if missing := serve.missing():
        print(f"bench.py baseline: {missing}", file=sys.stderr)
        return 1
    described = machine.describe()
    with tempfile.TemporaryDirectory() as folder, progress() as step:
        try:
            case = serve_case(options, Path(folder))
            result = {"machine": described} | baseline.measure(case, options.gpu_sets, step)
        except ValueError as error:
            command_line.error(str(error))
    result["parameters"] = {"quick": options.quick, "gpu_sets": options.gpu_sets}
    if options.json:
        report.write_json(result, options.json)
    what = f"vLLM {result['sizes'][0]['vllm']}, {result['case']['model']}, KV offloaded uncompressed"
    table = report.baseline_table(result["rows"], f"{machine.title(described)}\n{what}")
    show(table, *report.baseline_lines(result))
    return int(bool(result["problems"]))


def study_main(arguments: list[str]) -> int:
    """Run ``bench.py study``; return the exit status: 1 if a step failed."""
    command_line = study_parser()
    options = command_line.parse_args(arguments)
    steps = study.steps(options.model, options.text, options.shape, options.quick)
    unknown = set(options.only or ()) - {one.name for one in steps}
    if unknown:
        command_line.error(f"--only: no step {', '.join(sorted(unknown))}; --list shows them")
    steps = [one for one in steps if not options.only or one.name in options.only]
    described = machine.describe()
    folder, gpu = options.folder or study.folder_of(described), described["gpu"] and described["gpu"]["name"]
    try:
        whole = study.Study(steps, folder, gpu, study.lacking(options.model, options.text))
    except ValueError as error:
        command_line.error(str(error))
    if options.list:
        states = {one.name: whole.state(one) for one in steps}
        results = [{"name": n, "state": state, "why": why, "minutes": None} for n, (state, why) in states.items()]
    else:
        with progress() as step:
            results = whole.run(step, options.minutes)
    table = report.study_table(steps, results, f"{machine.title(described)}\n{folder}")
    show(table, *report.study_lines(results))
    return int(any(result["state"] == "failed" for result in results))


def report_main(arguments: list[str]) -> int:
    """Run ``bench.py report``; return the exit status: 1 if a file in results/ is none."""
    command_line = report_parser()
    options = command_line.parse_args(arguments)
    missing = machine.gpu_missing()
    _use_device(command_line, options.device)
    try:
        with progress() as step:
            if options.layers:
                result = {"machine": machine.describe(), "layer_bits": codec.layer_bits(step)}
                report.write_json(result, options.layers)
                return 0
            if not options.advise:
                print(document.write(options.root, step))
                return 0
            if missing:
                results = document.load(options.root / "results")
                lines = [f"Not of this machine. {missing}", *advice.committed(results["bench"], results["swap"])]
            else:
                lines = advice.lines(*advice.measure(step))
    except ValueError as error:
        print(f"bench.py report: {error}", file=sys.stderr)
        return 1
    show(*lines, width=80)
    return 0


def serve_case(options: argparse.Namespace, folder: Path) -> serve.Case:
    """Return what ``options`` ask for; the folder of a shape is written into ``folder``."""
    shape = options.shape is not None
    if shape:
        config = serve.SHAPES[options.shape]
        layers = options.layers or config["num_hidden_layers"]
        name = f"{options.shape}-{layers}-layers" if options.layers else options.shape
        model = serve.write_shape(folder / name, config | {"num_hidden_layers": layers})
    else:
        model = str(options.model)
    prompts = options.prompts or (16 if shape else 100)
    settings = {"coding": options.coding, "transport": options.transport, "verify": options.verify}
    return serve.Case(
        model=model, dummy=shape, fill=options.fill,
        prompt_tokens=tuple(options.prompt_tokens or [(8000, 8000) if shape else (512, 4096)]),
        prompts=max(1, prompts // 4) if options.quick else prompts, sets=options.sets,
        prompt_file=str(options.prompt_file) if options.prompt_file else None,
        new_tokens=options.new_tokens or ((1,) if shape else (16,)),
        in_flight=options.in_flight, recompute=not options.no_recompute,
        repeats=options.repeats or (1 if options.quick else 3), gpu_tokens=options.gpu_tokens,
        cpu_gb=options.cpu_gb, beside=options.beside, beside_rate=options.beside_rate, logprobs=not shape,
        tensor_parallel=options.tensor_parallel,
        processes=options.processes or ("one" if options.tensor_parallel == 1 else "spawn"),
        settings={name: value for name, value in settings.items() if value is not None}, engine=options.engine,
    )  # fmt: skip


def show(*what, width: int = 150) -> None:
    """Print tables and lines, as wide as the terminal, or ``width`` where stdout is none."""
    console = Console(width=None if sys.stdout.isatty() else width)
    for one in what:
        console.print(one, highlight=False, markup=False)


@contextlib.contextmanager
def progress():
    """Yield a function that says on stderr what is being done: in place on a terminal, else line by line."""
    console, begin = Console(stderr=True), time.perf_counter()
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield lambda text: print(f"{time.perf_counter() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)


def _use_device(command_line: argparse.ArgumentParser, device: int | None) -> None:
    """Make ``device`` the current GPU; None leaves it."""
    if device is None:
        return
    if missing := machine.gpu_missing():
        command_line.error(f"--device {device}: {missing}")
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if not 0 <= device < count:
        command_line.error(f"--device {device}: this machine has {count} device(s), 0 to {count - 1}")
    cupy.cuda.Device(device).use()


if __name__ == "__main__":
    sys.exit(main())
