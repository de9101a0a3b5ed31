"""The whole study: the commands of bench.py one after the other, taken up again where it was interrupted.

Each step is a process of its own. It writes ``FOLDER/NAME.json``, and what it prints goes to ``FOLDER/NAME.log``;
``FOLDER/study.json`` says which command made which file, when it ended and how.

Ablations: D2H alone, H2D alone and both, fused and staged (``swap-*``: rows, and ``ablation`` with the codec in
one direction only); groups of tokens and of channels (``codec``); fixed and entropy (all); bounds of K and of V
(``serve-variants``, ``accuracy``).

Minutes of ``baseline`` and ``serve-*`` follow from runs of Llama-8B's shape on an H100: a process takes half a
minute to start (the first one a minute more, its files being cold), then for each range of lengths 14 s to
compute two sets of 128,000 tokens, and 3 s a pass and repeat.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import accuracy, machine, serve

BENCH = Path(__file__).parents[2] / "bench.py"
SHAPE = "llama-8b"
#: At a load of many requests; the others are of coding fixed and vllm_patch's own transport, staged.
VARIANTS = (
    "rms:0.05", "rms:0.2", "rms:0.05/rms:0.1", "rms:0.05 entropy", "rms:0.05 fused", "rms:0.05 ring=256",
)  # fmt: skip
QUICK = ("codec", "swap-fixed", "baseline", "serve-load", "accuracy")


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        arguments: of bench.py, besides ``--json``.    minutes: that it takes, about, on an H100.
        what: that it varies.    needs: names of what must be there, see ``lacking``.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    what: str
    needs: tuple[str, ...] = ()

    @property
    def parameters(self) -> list[str]:
        """Its arguments, files by their names alone: a result of other ones is none of this step."""
        return [Path(word).name if Path(word).is_absolute() else word for word in self.arguments]


def steps(
    model: Path | None = None, text: Path | None = None, shape: str = SHAPE, quick: bool = False
) -> list[Step]:
    """Return the steps in their order; some of them need ``model`` (a folder) and ``text`` (a file)."""
    model, text = (str(path.resolve()) if path else None for path in (model, text))
    load = ("serve", "--shape", shape, "--fill")
    full = (*load, "--no-recompute", "--in-flight", "16")
    gpu, vllm = ("gpu",), ("vllm",)
    every = [
        Step("codec", (), 1, "page sizes, types, bounds, codings, groups of tokens or channels; the link"),
        Step("swap-fixed", ("swap",), 3, "page sizes, slots, directions, transports; tax, overlap", gpu),
        Step("swap-entropy", ("swap", "--quick", "--coding", "entropy"), 1, "64 KiB, coding entropy", gpu),
        *(
            Step(f"swap-{a}", ("swap", "--quick", "--bound", f"rms:{a}"), 1, f"pages of 64 KiB at rms:{a}", gpu)
            for a in (0.02, 0.2)
        ),
        Step(
            "baseline",
            ("baseline", "--shape", shape, *(f"--prompt-tokens={n}" for n in (2000, 8000)), "--repeats", "2",
             "--no-recompute"),
            5, "unpatched: lengths, requests at once, GPU cache sizes", vllm,
        ),
        Step(
            "serve-load",
            (*load, *(f"--prompt-tokens={n}" for n in (1000, 8000, 16000)), "--in-flight", "1,4,16",
             "--prompts", "8", "--repeats", "2"),
            6, "lengths, requests at once; recompute, raw, rms:0.05", vllm,
        ),
        Step(
            "serve-variants", (*full, "--prompt-tokens=8000", *(f"--bound={one}" for one in VARIANTS)), 7,
            "bounds, K and V apart too; coding entropy, transport fused, a smaller ring", vllm,
        ),
        Step(
            "serve-decode", (*full, "--new-tokens", "1,32", "--beside", "10"), 3.5,
            "longer answers; decoding beside restores", vllm,
        ),
        Step(
            "serve-model", ("serve", model or "MODEL", "--in-flight", "16"), 5, "a real model", (*vllm, "model")
        ),
        Step(
            "accuracy", ("accuracy", model or "MODEL", text or "TEXT"), 8,
            "bounds of K and V, codings; beside FP8, NVFP4, int4", ("gpu", "torch", "model", "text"),
        ),
    ]  # fmt: skip
    if not quick:
        return every
    return [
        Step(one.name, (*one.arguments, "--quick"), round(one.minutes / 3, 1), one.what, one.needs)
        for one in every if one.name in QUICK
    ]  # fmt: skip


def lacking(model: Path | None, text: Path | None) -> dict[str, str]:
    """Return name -> what to do, of what steps may need and is not here."""
    found = {
        "gpu": machine.gpu_missing(), "vllm": serve.missing(), "torch": accuracy.missing(),
        "model": None if model else "no model is named: --model FOLDER",
        "text": None if text else "no text is named: --text FILE",
    }  # fmt: skip
    return {name: why for name, why in found.items() if why}


def folder_of(described: dict) -> Path:
    """Return where the results of a machine go by default: ``results/`` and the GPU's name.

    >>> folder_of({"gpu": {"name": "NVIDIA H100 80GB HBM3"}}).as_posix()
    'results/nvidia-h100-80gb-hbm3'
    """
    name = described["gpu"]["name"] if described["gpu"] else "no-gpu"
    return Path("results") / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Study:
    """Steps and the folder of their results.

    Args:
        folder: made when the first step runs.    gpu: its name, or None.
        absent: what is not here, see ``lacking``.    bench: bench.py.

    Raises:
        ValueError: the folder holds the study of another GPU.
    """

    def __init__(
        self, steps: list[Step], folder: Path, gpu: str | None, absent: dict[str, str], bench: Path | None = None
    ):
        self.steps, self.folder, self.absent, self.bench = steps, folder, absent, bench or BENCH
        self.record = {"gpu": gpu, "steps": {}} | (_read(folder / "study.json") or {})
        if self.record["gpu"] != gpu:
            raise ValueError(
                f"{folder}: holds the study of {self.record['gpu']}, this is {gpu}: name another folder"
            )

    def state(self, one: Step) -> tuple[str, str | None]:
        """Return ``finished``, ``left out`` or ``to do``, and why it is left out."""
        known = self.record["steps"].get(one.name, {})
        same = (known.get("arguments"), known.get("exit")) == (one.parameters, 0)
        if same and _read(self._file(one, "json")):
            return "finished", None
        reasons = [self.absent[name] for name in one.needs if name in self.absent]
        return ("left out", reasons[0]) if reasons else ("to do", None)

    def run(self, say=lambda text: None, minutes: float = float("inf")) -> list[dict]:
        """Run what is to do; a step that fails stops none of the others.

        Args:
            say: called with a line on what is being done.
            minutes: start no step that is expected to end later than that from now.

        Returns:
            a dict for each step: ``name``, ``state`` (as from ``state``, or ``failed``), ``why`` (and where its
            log is), ``minutes`` that it took if it ran.
        """
        began, results = time.monotonic(), []
        for number, one in enumerate(self.steps, 1):
            (state, why), taken = self.state(one), None
            if state == "to do":
                spent = (time.monotonic() - began) / 60
                if spent + one.minutes > minutes:
                    why = f"takes {one.minutes:g} minutes or so, {minutes - spent:.1f} are left"
                else:
                    where = f"{number} of {len(self.steps)}, {one.name} (about {one.minutes:g} min)"
                    state, why, taken = self._execute(one, lambda text, where=where: say(f"{where}: {text}"))
            results.append({"name": one.name, "state": state, "why": why, "minutes": taken})
        return results

    def _execute(self, one: Step, say) -> tuple[str, str | None, float]:
        self.folder.mkdir(parents=True, exist_ok=True)
        result, began = self._file(one, "json"), time.monotonic()
        result.unlink(missing_ok=True)  # of other parameters, or half written
        command = [sys.executable, str(self.bench), *one.arguments, "--json", str(result)]
        say("starts")
        with (
            self._file(one, "log").open("w", encoding="utf-8") as log,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.PIPE, text=True, errors="replace"
            ) as process,
        ):
            for line in process.stderr:  # where bench.py tells how far it is
                log.write(line)
                log.flush()
                if line.strip():
                    say(line.strip())
        taken = (time.monotonic() - began) / 60
        self.record["steps"][one.name] = {
            "arguments": one.parameters, "exit": process.returncode, "minutes": round(taken, 2),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        partial = self.folder / "study.json.part"
        partial.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / "study.json")
        wrong = "" if _read(result) else ", no valid result"
        if process.returncode or wrong:
            return "failed", f"exit code {process.returncode}{wrong}; see {self._file(one, 'log')}", taken
        return "finished", None, taken

    def _file(self, one: Step, ending: str) -> Path:
        return self.folder / f"{one.name}.{ending}"


def _read(path: Path) -> dict | None:
    """Return the JSON object in a file; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
