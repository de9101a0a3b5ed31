"""What a number was measured on: goes into every JSON file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "cuszp_cupy", "numpy", "ml_dtypes", "nvidia-nvcomp-cu12", "nvidia-nvcomp-cu13", "torch", "transformers",
    "vllm",
)  # fmt: skip


def gpu_missing() -> str | None:
    """Return why there is no GPU to work with and what to do, in one sentence; None if there is one."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): install the extra cuda12 or cuda13"
    try:
        if cupy.cuda.runtime.getDeviceCount():
            return None
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no device it can use ({error}): needs an NVIDIA GPU and its driver"
    return "CUDA finds no device: needs an NVIDIA GPU, visible to this process (CUDA_VISIBLE_DEVICES)"


def describe() -> dict:
    """Return the machine, the current GPU and the software as plain values; entries that do not apply are None.

    The GPU's entry is None without one; ``gpu_missing`` then says why.
    """
    missing = gpu_missing()
    return {
        "gpu": None if missing else _gpu(),
        "gpu_missing": missing,
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor() or None,
        "num_cpus": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }


def title(machine: dict) -> str:
    """Return ``describe()``'s result in one line, for a table's title."""
    gpu, versions = machine["gpu"], machine["versions"]
    if gpu is None:
        where = f"no GPU, {machine['num_cpus']} CPU cores"
    else:
        where = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda_runtime']}, CuPy {gpu['cupy']}"
    return f"cuszp_cupy {versions['cuszp_cupy']} · {where}, Python {machine['python']}"


def resident() -> int:
    """Return the bytes of host memory that this process has in use (Linux)."""
    return int(_first_value("/proc/self/status", "VmRSS").split()[0]) << 10


def _gpu() -> dict:
    import cupy

    runtime = cupy.cuda.runtime
    device = cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "num_sms": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "num_devices": runtime.getDeviceCount(),
        "driver": _driver(),
        "cuda_driver": _cuda_version(runtime.driverGetVersion()),
        "cuda_runtime": _cuda_version(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str | None:
    """Return the display driver's version such as 580.95.05; None where the system does not tell."""
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        words = path.read_text().split()
        return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)
    return None


def _first_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _version(name: str) -> str | None:
    if name == "cuszp_cupy":
        from cuszp_cupy import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout this file lies in, ``+`` behind it if tracked files differ; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or refuses this checkout
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
