"""``import vllm_patch`` before vLLM starts: its KV offloading then moves compressed pages over the link.

Nothing else changes: vLLM plans the transfers, this module carries them out. What is no whole page of float16 or
bfloat16 attention KV goes to vLLM's own copy function, untouched, and is counted by reason (``stats``).

- Importing installs the patch here and, by ``CUSZP_VLLM=1`` and the plugin ``cuszp_cupy``, in the processes that
  vLLM starts. ``vllm serve``: set ``CUSZP_VLLM=1`` yourself.
- ``configure`` or ``CUSZP_*`` variables set it up, before the engine starts.
- Pages lie in vLLM's own pinned CPU cache, each chunk's packed from its start. The link carries fewer bytes;
  the cache holds no more pages than before.
- A stream's work reaches the GPU through one of 8 queues, where it holds up what other streams put behind it:
  with a dozen restores in flight, the model's kernels would wait for nearly all of them. Importing sets
  ``CUDA_DEVICE_MAX_CONNECTIONS=32``, the most there are, if you have not set it.
- A page that comes back damaged stops the engine: its scheduler cannot be told to forget a chunk, so a
  recomputed request would meet the same page again.

Nothing here imports vLLM, torch or CuPy, or touches CUDA, until a vLLM worker registers its KV cache.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import inspect
import logging
import mmap
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from cuszp_cupy import offload
from cuszp_cupy.offload import Settings, Swap, configure
from cuszp_cupy.pipeline import SwapPipeline

__all__ = ["configure", "install", "stats", "uninstall"]

SWITCH = "CUSZP_VLLM"
PLUGIN = "cuszp_cupy"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"  # CUDA reads it when a process starts to use the GPU
FIRST, LAST = (0, 26), (0, 33)  # versions of vLLM that the patch knows

_log = logging.getLogger("vllm.cuszp_cupy")  # below "vllm", so that vLLM's handlers show it


# --- what of vLLM is relied on ----------------------------------------------------------------------------
GPU_WORKER = "vllm.v1.kv_offload.cpu.gpu_worker"
CPU_SPEC = "vllm.v1.kv_offload.cpu.spec"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker"
OTHERS = {  # offloading that does not pass here: module -> its connector
    "vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector": "SimpleCPUOffloadConnector",
    "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector": "LMCacheConnectorV1",
    "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector": "LMCacheMPConnector",
}
#: module -> function -> its parameters, in the versions that are known
SIGNATURES = {
    GPU_WORKER: {
        "_select_swap_blocks_fn": (
            "kv_cache_groups_data_refs gpu_to_cpu",
            "layer_refs_per_group gpu_to_cpu",
            "layer_refs_per_group gpu_to_cpu host_memory_is_pinned",
        ),
        "pin_mmap_region": ("region", "region worker_slot_only"),
        "CPUOffloadingWorker.__init__": (
            "self kv_caches blocks_per_chunk num_cpu_blocks mmap_region",
            "self kv_caches blocks_per_chunk num_cpu_blocks mmap_region canonical_layout",
            "self kv_caches blocks_per_chunk num_cpu_chunks mmap_region canonical_layout",
        ),
        "CPUOffloadingWorker.get_finished": ("self",),
        "CPUOffloadingWorker.wait": ("self job_ids",),
        "CPUOffloadingWorker.shutdown": ("self",),
        "SingleDirectionOffloadingHandler.transfer_async": ("self job_id src_spec dst_spec",),
    },
    CPU_SPEC: {"CPUOffloadingSpec.create_worker": ("self kv_caches",)},
    CONNECTOR: {"OffloadingConnectorWorker.register_kv_caches": ("self kv_caches",)},
}
#: module -> class -> attributes that it sets on itself
ATTRIBUTES = {
    GPU_WORKER: {
        "CPUOffloadingWorker": {"_store_handler", "_load_handler"},
        "SingleDirectionOffloadingHandler": {"src_tensors", "dst_tensors", "gpu_to_cpu", "_swap_blocks_batch"},
    },
    CONNECTOR: {"OffloadingConnectorWorker": {"spec", "kv_cache_config", "worker"}},
}
SWAP_CALL = "self._swap_blocks_batch(src, dst, sizes, is_src_access_order_any=is_src_access_order_any)"


def check_sources(folder: Path) -> list[str]:
    """Return what the vLLM in ``folder`` (its package) lacks of what the patch relies on; imports nothing."""
    lacking = []
    for module in SIGNATURES:
        path = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError) as error:
            lacking.append(f"{module} ({error})")
            continue
        functions = {
            node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for name, node in classes.items():
            functions.update({f"{name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)})
        for name, known in SIGNATURES[module].items():
            if name not in functions:
                lacking.append(f"{module}.{name}")
            elif (found := _parameters(functions[name].args)) not in known:
                lacking.append(f"{module}.{name}({' or '.join(known)}), it takes ({found})")
        for name, wanted in ATTRIBUTES.get(module, {}).items():
            stored = {
                node.attr
                for node in ast.walk(classes.get(name, ast.Pass()))
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            }
            lacking += [f"{module}.{name}().{attribute}" for attribute in sorted(wanted - stored)]
        if module == GPU_WORKER:
            calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            if SWAP_CALL not in calls:
                lacking.append(f"{module}: the call {SWAP_CALL}")
    return lacking


def _parameters(args: ast.arguments) -> str:
    names = [arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]]
    names += [f"*{arg.arg}" for arg in (args.vararg, args.kwarg) if arg]
    return " ".join(names)


def _check_vllm() -> str:
    """Return vLLM's version; raise ImportError if it is none that the patch knows. Imports nothing of it."""
    supported = f"vllm_patch knows vLLM {_dotted(FIRST)} to {_dotted(LAST)}"
    try:
        version = importlib.metadata.version("vllm")
        folder = importlib.util.find_spec("vllm").submodule_search_locations[0]
    except (importlib.metadata.PackageNotFoundError, AttributeError, ValueError):
        raise ImportError(f"vLLM is not installed; {supported}", name="vllm") from None
    number = re.match(r"(\d+)\.(\d+)", version)
    if not number or not FIRST <= tuple(map(int, number.groups())) <= LAST:
        raise ImportError(f"this is vLLM {version}; {supported}", name="vllm")
    lacking = check_sources(Path(folder))
    if lacking:
        raise ImportError(f"vLLM {version} lacks {'; '.join(lacking)}. {supported}, unmodified", name="vllm")
    return version


def _dotted(version) -> str:
    return ".".join(map(str, version))


# --- install ----------------------------------------------------------------------------------------------
_installed: str | None = None  # the version of vLLM
_restore: list[tuple[object, str, object]] = []  # owner, name, original
_variables: dict[str, str] = {}  # that are set while it is installed
_workers: list[offload.Worker] = []


def install() -> None:
    """Patch vLLM in this process, and have it patched in those that it starts; again: nothing.

    Modules of vLLM that are there already are patched now, the others when they are imported: importing them
    here would take seconds and read vLLM's variables before the user has set them.

    Raises:
        ImportError: no vLLM, or one that the patch does not know; nothing is patched then.
    """
    global _installed
    if _installed:
        return
    version = _check_vllm()
    Settings.read()  # a wrong variable is better refused here than by a worker
    _check_plugin()
    for name in _PATCHES:
        if name in sys.modules:
            _PATCHES[name](sys.modules[name])
    sys.meta_path.insert(0, _finder)
    _variables.update({SWITCH: "1"} | ({} if CONNECTIONS in os.environ else {CONNECTIONS: "32"}))
    os.environ.update(_variables)
    _installed = version


def _check_plugin() -> None:
    """Say so if processes that vLLM spawns will not find the patch: they would offload uncompressed."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        _log.warning("VLLM_PLUGINS=%s: processes that vLLM spawns stay unpatched; add %s to it", allowed, PLUGIN)
    elif PLUGIN not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        _log.warning("cuszp_cupy is not installed (pip install): processes that vLLM spawns stay unpatched")


def uninstall() -> None:
    """Take the patch back. Workers that run on with it store uncompressed from now on, and still decode."""
    global _installed
    if not _installed:
        return
    sys.meta_path.remove(_finder)
    while _restore:
        owner, name, original = _restore.pop()
        setattr(owner, name, original)
    for worker in _workers:
        worker.storing = False
    while _variables:
        os.environ.pop(_variables.popitem()[0], None)
    _installed = None


def stats() -> list[dict]:
    """Return what the workers of this process have done; for workers elsewhere see ``configure(stats_dir=...)``.

    A dict a worker: ``settings``; ``pipelines``, each with its layers and, for ``store`` and ``load``, pages,
    bytes (raw, payload, over the link), milliseconds of the GPU's clock, ratio and GB/s of raw bytes;
    ``passed_through``: reason -> descriptors and bytes that vLLM's own function moved.
    """
    return [worker.stats() for worker in _workers]


class _Finder:
    """Patches modules as they are imported."""

    def find_spec(self, name, path=None, target=None):
        if name not in _PATCHES:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if _installed:
                    _PATCHES[name](module)

            spec.loader.exec_module = exec_module
        return spec


_finder = _Finder()


def _replace(owner, name: str, make) -> None:
    original = getattr(owner, name)
    _restore.append((owner, name, original))
    setattr(owner, name, functools.wraps(original)(make(original)))


def _patch_gpu_worker(module) -> None:
    def make(original):
        signature = inspect.signature(original)

        def select(*args, **kwargs):
            to_cpu = signature.bind(*args, **kwargs).arguments["gpu_to_cpu"]
            return Swap(original(*args, **kwargs), to_cpu)

        return select

    _replace(module, "_select_swap_blocks_fn", make)


def _patch_connector(module) -> None:
    def make(original):
        def register_kv_caches(self, kv_caches):
            kinds = offload.layer_kinds(self.kv_cache_config, kv_caches)
            # read by create_worker, which is called within
            self.spec._cuszp_rows = any(isinstance(kind, offload.Kind) for _, _, kind in kinds)
            original(self, kv_caches)
            _bind(self, kinds)

        return register_kv_caches

    def make_cross(original):
        def register_cross_layers_kv_cache(self, *args, **kwargs):
            original(self, *args, **kwargs)
            _leave_raw(self.worker, "pages that hold all layers: one bound over all would be too wide for some")

        return register_cross_layers_kv_cache

    _replace(module.OffloadingConnectorWorker, "register_kv_caches", make)
    if hasattr(module.OffloadingConnectorWorker, "register_cross_layers_kv_cache"):
        _replace(module.OffloadingConnectorWorker, "register_cross_layers_kv_cache", make_cross)


def _patch_spec(module) -> None:
    """Versions without rows (0.26): give the worker a region that has them, as later versions do."""
    if hasattr(module, "SharedOffloadRegion"):
        return

    def make(original):
        def create_worker(self, kv_caches):
            if not (getattr(self, "_cuszp_rows", False) and self.num_blocks):
                return original(self, kv_caches)
            row_bytes = sum(tensor.page_size_bytes for tensor in kv_caches.tensors) * self.blocks_per_chunk
            region = Rows(self.num_blocks, row_bytes)
            try:
                return module.CPUOffloadingWorker(
                    kv_caches=kv_caches,
                    blocks_per_chunk=self.blocks_per_chunk,
                    num_cpu_blocks=self.num_blocks,
                    mmap_region=region,
                )
            except BaseException:
                region.cleanup()
                raise

        return create_worker

    _replace(module.CPUOffloadingSpec, "create_worker", make)


def _patch_other(module) -> None:
    """Say that a connector stays as it is, when one is made."""
    name = OTHERS[module.__name__]

    def make(original):
        def __init__(self, *args, **kwargs):
            _log.warning("cuszp_cupy: KV pages stay uncompressed: %s copies them on its own", name)
            original(self, *args, **kwargs)

        return __init__

    if hasattr(module, name):
        _replace(getattr(module, name), "__init__", make)


_PATCHES = {
    GPU_WORKER: _patch_gpu_worker, CPU_SPEC: _patch_spec, CONNECTOR: _patch_connector,
    **dict.fromkeys(OTHERS, _patch_other),
}  # fmt: skip


class Rows:
    """Memory for vLLM 0.26's CPU cache, as its ``SharedOffloadRegion`` but of this process alone.

    A row holds a chunk of all tensors side by side, where 0.26 would allocate each tensor apart: so a chunk's
    pages can be packed, and one copy moves many. As many bytes in all. vLLM pins and frees it.
    """

    rank = 0

    def __init__(self, num_rows: int, row_bytes: int):
        import torch

        self.num_rows, self.row_bytes = num_rows, row_bytes
        self.total_size_bytes, self.is_pinned = num_rows * row_bytes, False
        self._memory = mmap.mmap(-1, self.total_size_bytes)
        self._base = torch.frombuffer(self._memory, dtype=torch.int8)
        self._used = 0

    def create_next_view(self, tensor_page_size: int):
        """Return (rows, bytes) of the next tensor."""
        start, self._used = self._used, self._used + tensor_page_size
        assert self._used <= self.row_bytes, (self._used, self.row_bytes)
        return self._base.as_strided((self.num_rows, tensor_page_size), (self.row_bytes, 1), start)

    def cleanup(self) -> None:
        """Unpin the memory; it goes with the last tensor on it."""
        if self.is_pinned:
            import torch

            torch.cuda.cudart().cudaHostUnregister(self._base.data_ptr())
            self.is_pinned = False
        self._base = self._memory = None


# --- in the worker ----------------------------------------------------------------------------------------
def _handlers(worker) -> list:
    names = "_store_handler", "_load_handler", "_expedited_load_handler"
    return [getattr(worker, name) for name in names if hasattr(worker, name)]


def _leave_raw(worker, swaps: list[Swap], settings: Settings, raw: Counter) -> None:
    """Say that this worker's pages stay uncompressed, and why; count what it moves."""
    _log.warning("cuszp_cupy: KV pages stay uncompressed: %s", "; ".join(raw))
    if swaps:
        _use(worker, swaps, offload.Worker([], settings, lambda: None, raw_tensors=raw, version=_installed or ""))


def _why_raw(connector) -> str:
    """Return why nothing of a worker can be compressed, or ""."""
    spec, worker = connector.spec, connector.worker
    if type(spec).__name__ != "CPUOffloadingSpec":
        return (
            f"{type(spec).__name__}: other tiers or processes read the CPU memory, and know no compressed pages"
        )
    if getattr(spec, "replicated_layout", False):
        return "replicated layout: other processes read what this one writes"
    if getattr(getattr(spec, "config", None), "canonical_layout", False):
        return "canonical layout: pages lie in pieces"
    handlers = _handlers(worker)
    if not handlers or not all(isinstance(handler._swap_blocks_batch, Swap) for handler in handlers):
        return f"{type(worker).__name__} is none of vLLM's, or was made before vllm_patch was imported"
    if not all(tensor.is_pinned() for tensor in handlers[0].dst_tensors):
        return "the CPU memory is not pinned"
    return ""


def _bind(connector, kinds) -> None:
    """After vLLM has registered its KV caches: make the pipelines and let the handlers use them."""
    worker, settings = connector.worker, Settings.read()
    handlers = _handlers(worker)
    swaps = [getattr(handler, "_swap_blocks_batch", None) for handler in handlers]
    swaps = [swap for swap in swaps if isinstance(swap, Swap)]
    if any(swap.worker for swap in swaps):
        return  # registered again: vLLM keeps its worker and its memory, and so do we
    if reason := _why_raw(connector):
        _leave_raw(worker, swaps, settings, Counter([reason]))
        return
    tensors = offload.tensors_of(handlers[0], kinds, settings)
    runs, raw = offload.plan(tensors, settings.ring_mb << 20, settings.coding)
    if not runs:
        _leave_raw(worker, swaps, settings, raw)
        return
    import torch

    from cuszp_cupy.codec import _cupy

    cupy = _cupy()  # says what to install where there is none
    region = getattr(worker, "_mmap_region", None)
    device = functools.partial(cupy.cuda.Device, handlers[0].src_tensors[0].device.index)
    ours = offload.Worker(
        runs, settings, torch.cuda.current_stream, device, raw_tensors=raw, version=_installed or ""
    )
    separate = len(getattr(region, "pinned_addresses", None) or ()) > 1  # vLLM pinned each row by itself
    with device():
        for run in runs:
            try:
                run.pipeline = SwapPipeline(
                    run.kind.geometry, run.kind.dtype, run.bound, settings.coding, num_slots=run.num_slots,
                    transport=settings.transport, host=replace(run.host, separate=separate),
                    ring_bytes=(settings.ring_mb << 20) // len(runs),
                )  # fmt: skip
            except MemoryError as error:
                raise MemoryError(
                    f"{error} (ring_bytes are those of CUSZP_RING_MB={settings.ring_mb}; the device has what "
                    "vLLM's gpu_memory_utilization leaves)"
                ) from None
            run.warm()
            if settings.verify:
                run.verifier = offload.Verifier(run, settings.coding, settings.verify)
    _log.info(
        "cuszp_cupy in vLLM %s: %s; coding %s, transport %s, ring %d MiB%s%s",
        _installed, " | ".join(run.describe() for run in runs), settings.coding,
        settings.transport + (" (rows pinned one by one)" if separate else ""), settings.ring_mb,
        ", verify" if settings.verify else "",
        "".join(f"; {number} tensors left raw: {reason}" for reason, number in raw.items()),
    )  # fmt: skip
    for handler in handlers:
        handler._swap_blocks_batch.urgent = handler is getattr(worker, "_expedited_load_handler", None)
    _use(worker, swaps, ours)


def _use(worker, swaps: list[Swap], ours: offload.Worker) -> None:
    """Let ours do what vLLM's worker calls ``swaps`` for, until that one shuts down."""
    for swap in swaps:
        swap.worker = ours
    ours.swaps.extend(swaps)
    _workers.append(ours)
    _watch(worker, ours)


def _watch(worker, ours: offload.Worker) -> None:
    """Let vLLM's worker check for damage before it reports or waits, and close ours when it shuts down."""
    get_finished, wait, shutdown = worker.get_finished, worker.wait, worker.shutdown

    def checked_get_finished():
        results = get_finished()
        ours.check()  # of each result, the transfer has finished: not one goes unchecked
        ours.report()
        return results

    def checked_wait(job_ids):
        wait(job_ids)
        ours.check()

    def closing_shutdown():
        try:
            ours.close()  # before vLLM unpins the memory
        finally:
            if ours in _workers:
                _workers.remove(ours)
            shutdown()

    worker.get_finished, worker.wait, worker.shutdown = checked_get_finished, checked_wait, closing_shutdown


install()
