"""The patch against vLLM's own files, without a GPU: real planning, real handlers, a torch made of NumPy."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import FakePipeline
from vllm_files import VERSIONS, DType, Tensor, anonymous, fetch, offloading

from cuszp_cupy import offload

ROOT = Path(__file__).parents[1]
LAYERS, HEADS, HEAD_SIZE, TOKENS, BLOCKS, CHUNKS = 3, 2, 32, 16, 12, 5
NUMBERS = itertools.count()
PAGE = 2 * TOKENS * HEADS * 2 * HEAD_SIZE


@pytest.fixture(params=VERSIONS)
def version(request) -> str:
    if request.param >= "0.33" and sys.version_info < (3, 11):
        pytest.skip("vLLM 0.33 needs Python 3.11")
    try:
        fetch(request.param)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("CUSZP_VLLM", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for variable in offload.VARIABLES.values():
        monkeypatch.setenv(variable, "")


@pytest.fixture
def vllm(version):
    with offloading(version) as (folder, ops):
        yield types.SimpleNamespace(version=version, folder=folder, ops=ops)
    for path in Path("/dev/shm").glob(f"vllm_offload_test{os.getpid()}_*"):  # some versions leave it to a worker
        path.unlink()


def modules():
    """Return (gpu_worker, spec, connector, kv_cache_interface), imported now."""
    import vllm_patch

    names = vllm_patch.GPU_WORKER, vllm_patch.CPU_SPEC, vllm_patch.CONNECTOR, "vllm.v1.kv_cache_interface"
    return [importlib.import_module(name) for name in names]


# --- what is relied on ------------------------------------------------------------------------------------
def test_sources_have_all_that_is_relied_on(vllm):
    import vllm_patch

    assert vllm_patch.check_sources(vllm.folder / "vllm") == []


GPU_WORKER, SPEC = "v1/kv_offload/cpu/gpu_worker.py", "v1/kv_offload/cpu/spec.py"
CONNECTOR = "distributed/kv_transfer/kv_connector/v1/offloading/worker.py"


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "missing"),
    [
        (GPU_WORKER, "_select_swap_blocks_fn", "_choose_swap_blocks_fn", r"gpu_worker\._select_swap_blocks_fn"),
        (
            GPU_WORKER,
            r"gpu_to_cpu: bool,\n(.*\n)?\):\n    \"\"\"Res",
            r"up: bool):" "\n" r'    """Res',
            "it takes ",
        ),
        (GPU_WORKER, r"self\._store_handler =", "self._handler =", r"CPUOffloadingWorker\(\)\._store_handler"),
        (GPU_WORKER, "is_src_access_order_any=is_src", "access_order=is_src", "the call self._swap_blocks_batch"),
        (GPU_WORKER, r"def wait\(self, job_ids: set\[int\]\)", "def wait(self)", "CPUOffloadingWorker.wait"),
        (SPEC, "def create_worker", "def make_worker", r"CPUOffloadingSpec\.create_worker"),
        (
            CONNECTOR,
            "def register_kv_caches",
            "async def register",
            "OffloadingConnectorWorker.register_kv_caches",
        ),
        (CONNECTOR, r"self\.spec = spec", "self._spec = spec", r"OffloadingConnectorWorker\(\)\.spec"),
        (CONNECTOR, r"\A", "def broken(:\n", "invalid syntax"),
    ],
)
def test_a_vllm_that_lacks_something_is_refused_and_left_alone(
    version, tmp_path, file, pattern, replacement, missing
):
    shutil.copytree(fetch(version), tmp_path / "site")
    path = tmp_path / "site" / "vllm" / file
    text, times = re.subn(pattern, replacement, path.read_text())
    assert times
    path.write_text(text)
    assert refusal(tmp_path / "site") == ""  # the process ends as it began
    message = refusal(tmp_path / "site", show=True)
    assert re.search(missing, message) and f"vLLM {version} lacks" in message
    assert "knows vLLM 0.26 to 0.33" in message


REFUSAL = """
import os, sys
before = list(sys.meta_path), dict(os.environ)
try:
    import vllm_patch
except ImportError as error:
    print(error if {show} else "", end="")
    assert (sys.meta_path, dict(os.environ)) == before
    assert not [name for name in sys.modules if name.partition(".")[0] in ("vllm", "torch", "cupy")]
"""


def refusal(site: Path, show: bool = False) -> str:
    """Return what importing vllm_patch says with the vLLM in ``site``, in a process of its own."""
    code = REFUSAL.format(show=show)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=site, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("other", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused(version, tmp_path, other):
    shutil.copytree(fetch(version), tmp_path / "site")
    (metadata,) = (tmp_path / "site").glob("vllm-*.dist-info/METADATA")
    metadata.write_text(re.sub(r"(?m)^Version: .*", f"Version: {other}", metadata.read_text()))
    metadata.parent.rename(metadata.parent.with_name(f"vllm-{other}.dist-info"))
    expected = f"this is vLLM {other}; vllm_patch knows vLLM 0.26 to 0.33"
    assert refusal(tmp_path / "site", show=True) == expected


def test_no_vllm_is_refused(tmp_path):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    assert refusal(tmp_path, show=True) == "vLLM is not installed; vllm_patch knows vLLM 0.26 to 0.33"


def test_a_wrong_variable_is_refused_at_import(vllm, monkeypatch):
    monkeypatch.setenv("CUSZP_BOUND", "much")
    with pytest.raises(ValueError, match="CUSZP_BOUND='much'"):
        import vllm_patch  # noqa: F401


# --- install ----------------------------------------------------------------------------------------------
QUIET_IMPORT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "torch", "cupy") and name != "vllm":
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
import os
os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
import vllm_patch
vllm_patch.install()
assert os.environ["CUSZP_VLLM"] == "1" and vllm_patch.stats() == []
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
assert not [name for name in sys.modules if name.partition(".")[0] in ("vllm", "torch", "cupy")]
vllm_patch.uninstall()
assert "CUSZP_VLLM" not in os.environ and "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "4"  # the user's own
vllm_patch.install()
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "4" and os.environ["CUSZP_VLLM"] == "1"
vllm_patch.uninstall()
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "4" and "CUSZP_VLLM" not in os.environ
"""


def test_import_touches_neither_vllm_nor_cuda(version):
    path = os.pathsep.join([str(fetch(version)), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", QUIET_IMPORT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def select(gpu_worker, page_bytes: int, gpu_to_cpu: bool):
    """Ask as a handler does."""
    ref = types.SimpleNamespace(page_size_bytes=page_bytes)
    return gpu_worker._select_swap_blocks_fn([[ref]], gpu_to_cpu)


@pytest.mark.parametrize("first", ["patch", "vllm"])
def test_the_hook_is_chosen_for_stores_small_and_large_loads_and_restored(vllm, first):
    names = "vllm.v1.kv_offload.cpu.gpu_worker", "vllm.v1.kv_offload.cpu.spec"
    operator = vllm.ops.swap_blocks_batch
    if first == "vllm":
        before = [importlib.import_module(name) for name in names]
        originals = before[0]._select_swap_blocks_fn, before[1].CPUOffloadingSpec.create_worker
    import vllm_patch

    gpu_worker, spec, connector, _ = modules()
    if first == "vllm":
        assert originals == (
            gpu_worker._select_swap_blocks_fn.__wrapped__,
            getattr(spec.CPUOffloadingSpec.create_worker, "__wrapped__", originals[1]),
        )
    for page_bytes, gpu_to_cpu, partial in [(65536, True, False), (65536, False, False), (8192, False, True)]:
        swap = select(gpu_worker, page_bytes, gpu_to_cpu)
        assert isinstance(swap, offload.Swap) and swap.to_cpu == gpu_to_cpu
        assert isinstance(swap.original, functools.partial) == partial
        assert partial or swap.original is vllm.ops.swap_blocks_batch
    patched = gpu_worker._select_swap_blocks_fn, connector.OffloadingConnectorWorker.register_kv_caches
    vllm_patch.install()  # again: nothing
    assert patched == (gpu_worker._select_swap_blocks_fn, connector.OffloadingConnectorWorker.register_kv_caches)
    vllm_patch.uninstall()
    assert gpu_worker._select_swap_blocks_fn is patched[0].__wrapped__
    assert connector.OffloadingConnectorWorker.register_kv_caches is patched[1].__wrapped__
    assert not hasattr(spec.CPUOffloadingSpec.create_worker, "__wrapped__")
    assert select(gpu_worker, 65536, True) is vllm.ops.swap_blocks_batch
    vllm_patch.install()
    assert isinstance(select(gpu_worker, 65536, True), offload.Swap)
    assert vllm.ops.swap_blocks_batch is operator  # which the encoder cache and HiSparse call: they pass by
    vllm_patch.uninstall()


def test_vllm_loads_the_plugin_and_the_variable_switches_it_on(vllm, tmp_path, monkeypatch):
    """By vLLM's own loader, from metadata as pip would write it from pyproject.toml."""
    entry_point = re.search(r'\[project.entry-points."(.+)"\]\n(.+)', (ROOT / "pyproject.toml").read_text())
    folder = tmp_path / "cuszp_cupy-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: cuszp_cupy\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(f"[{entry_point[1]}]\n{entry_point[2].replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    envs = types.ModuleType("vllm.envs")
    envs.VLLM_PLUGINS = None
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    importlib.import_module("vllm").envs = envs
    plugins = importlib.import_module("vllm.plugins")
    assert Path(plugins.__file__).is_relative_to(vllm.folder)
    (register,) = plugins.load_plugins_by_group("vllm.general_plugins").values()
    register()
    assert "vllm_patch" not in sys.modules  # installed, but not switched on
    monkeypatch.setenv("CUSZP_VLLM", "1")
    plugins.load_general_plugins()
    assert sys.modules["vllm_patch"]._installed == vllm.version
    monkeypatch.setattr(sys.modules["vllm_patch"], "_installed", None)


def test_children_that_will_not_be_patched_are_announced(vllm, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with caplog.at_level(logging.WARNING):
        import vllm_patch  # noqa: F401
    assert "VLLM_PLUGINS=other: processes that vLLM spawns stay unpatched; add cuszp_cupy to it" in caplog.text


@pytest.mark.parametrize("name", ["simple_cpu_offload_connector", "lmcache_connector", "lmcache_mp_connector"])
def test_offloading_that_does_not_pass_here_is_announced_when_it_is_used(vllm, name, caplog):
    import vllm_patch

    module = types.ModuleType(f"vllm.distributed.kv_transfer.kv_connector.v1.{name}")
    connector = vllm_patch.OTHERS[module.__name__]
    source = (vllm.folder / "/".join(module.__name__.split("."))).with_suffix(".py").read_text()
    assert re.search(rf"(?m)^(class )?{connector}\b", source)
    setattr(module, connector, type(connector, (), {}))
    with caplog.at_level(logging.WARNING):
        vllm_patch._PATCHES[module.__name__](module)
        assert connector not in caplog.text
        getattr(module, connector)()
    assert f"KV pages stay uncompressed: {connector} copies them on its own" in caplog.text


# --- a whole worker -----------------------------------------------------------------------------------------
class Engine:
    """A vLLM worker's offloading: its real connector, spec, worker and handlers, on KV caches in host memory.

    Args:
        specs: fields of layers' specs that differ, by layer.    spec: attributes of the offloading spec.
        tokens_first: the order in a page, else heads first; each version's own by default.
    """

    def __init__(self, vllm, monkeypatch, blocks_per_chunk=2, specs=None, spec=None, tokens_first=None):
        import vllm_patch

        torch = sys.modules["torch"]
        monkeypatch.setattr(vllm_patch, "SwapPipeline", FakePipeline)
        gpu_worker, cpu_spec, connector, interface = modules()
        self.patch, self.base = vllm_patch, importlib.import_module("vllm.v1.kv_offload.base")
        self.cpu_load_store = importlib.import_module("vllm.v1.kv_offload.cpu.common").CPULoadStoreSpec
        monkeypatch.setattr(cpu_spec, "_all_workers_barrier", lambda: None, raising=False)
        for name, value in (
            ("derive_canonical_mappings", lambda *_: {}), ("is_kv_cache_tensor_packed", lambda _: False),
            ("get_offloading_group_ids", lambda config: range(len(config.kv_cache_groups))),
        ):  # fmt: skip
            monkeypatch.setattr(connector, name, value, raising=False)

        names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
        tokens_first = vllm.version >= "0.33" if tokens_first is None else tokens_first
        self.memory = anonymous(LAYERS * BLOCKS * PAGE)
        self.memory[:] = np.random.default_rng(0).integers(0, 256, self.memory.size)
        self.gpu = self.memory.reshape(LAYERS, BLOCKS, PAGE)
        width, caches, groups = 2 * HEAD_SIZE, {}, []
        order = (PAGE // 2, width, HEADS * width, 1) if tokens_first else (PAGE // 2, TOKENS * width, width, 1)
        for i, name in enumerate(names):
            fields = dict(block_size=TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)
            fields |= (specs or {}).get(i, {})
            shape = (BLOCKS, HEADS, TOKENS, PAGE // (TOKENS * HEADS * fields["dtype"].numpy.itemsize))
            strides = order if shape[3] == width else (int(np.prod(shape[1:])), shape[3], HEADS * shape[3], 1)
            offset = i * BLOCKS * PAGE
            caches[name] = Tensor(self.memory, fields["dtype"], shape, strides, offset, device="cuda")
            kv_cache_spec = interface.FullAttentionSpec(**fields, head_size_v=fields["head_size"])
            groups.append((kv_cache_spec, name))
        kinds = {kv_cache_spec for kv_cache_spec, _ in groups}
        self.groups = [
            types.SimpleNamespace(
                kv_cache_spec=kind, layer_names=[n for k, n in groups if k == kind], host_resident=False
            )
            for kind in sorted(kinds, key=str)
        ]
        config = types.SimpleNamespace(
            num_blocks=BLOCKS, kv_cache_groups=self.groups, hisparse_host_num_blocks=None,
            kv_cache_tensors=[types.SimpleNamespace(shared_by=[name]) for name in names],
        )  # fmt: skip
        self.spec = cpu_spec.CPUOffloadingSpec.__new__(cpu_spec.CPUOffloadingSpec)
        parallel = types.SimpleNamespace(world_size=1, rank=0)
        engine_id = f"test{os.getpid()}_{next(NUMBERS)}"
        row = LAYERS * PAGE * blocks_per_chunk
        attributes = dict(
            config=types.SimpleNamespace(engine_id=engine_id, parallel=parallel, canonical_layout=False),
            num_blocks=CHUNKS, num_chunks=CHUNKS, blocks_per_chunk=blocks_per_chunk, replicated_layout=False,
            kv_bytes_per_chunk=-(-row // 4096) * 4096, cpu_page_size_per_worker=row, _worker=None,
        )  # fmt: skip
        self.spec.__dict__.update(attributes | (spec or {}))
        self.connector = connector.OffloadingConnectorWorker.__new__(connector.OffloadingConnectorWorker)
        self.connector.__dict__.update(
            spec=self.spec, kv_cache_config=config, vllm_config=None, worker=None, _load_jobs={},
            _unsubmitted_store_jobs=[], _connector_worker_meta=types.SimpleNamespace(),
        )  # fmt: skip
        self.caches = caches
        self.connector.register_kv_caches(caches)
        self.worker = self.connector.worker

    def swap(self, way: str, blocks, chunks, first: int = 0, **options) -> None:
        """Store or load ``blocks`` of every group, from page ``first`` of the first of ``chunks`` on."""
        num = len(self.groups)
        gpu = self.base.GPULoadStoreSpec(list(blocks) * num, [len(blocks)] * num, [first] * num)
        cpu = self.cpu_load_store(list(chunks) * num)
        self.job = getattr(self, "job", 0) + 1
        specs = (gpu, cpu) if way == "store" else (cpu, gpu)
        assert getattr(self.worker, f"submit_{way}")(self.job, *specs, **options)

    def finish(self) -> list:
        return [(result.job_id, result.success) for result in self.worker.get_finished()]

    @property
    def pipelines(self):
        return [run.pipeline for worker in self.patch._workers for run in worker.runs]


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3])
def test_pages_go_to_the_pipeline_and_come_back(vllm, monkeypatch, blocks_per_chunk, caplog):
    with caplog.at_level(logging.INFO, "vllm.cuszp_cupy"):
        engine = Engine(vllm, monkeypatch, blocks_per_chunk)
    (pipeline,) = engine.pipelines
    tokens_first = vllm.version >= "0.33"
    geometry = pipeline.geometry
    expected = (1, 16, 128) if tokens_first else (2, 16, 64)
    assert (geometry.outer, geometry.tokens, geometry.channels, geometry.parts) == (*expected, (32, 32))
    assert (pipeline.dtype, pipeline.bound, pipeline.transport) == (
        "bfloat16",
        ("rms:0.05", "rms:0.05"),
        "staged",
    )
    assert pipeline.host.pages_per_row == LAYERS * blocks_per_chunk  # rows in 0.26, too
    assert f"cuszp_cupy in vLLM {vllm.version}: 3 KV tensors of bfloat16 pages of 4096 bytes" in caplog.text

    monkeypatch.setattr(vllm.ops, "swap_blocks_batch", None)
    for handler in ("_store_handler", "_load_handler"):
        getattr(engine.worker, handler)._swap_blocks_batch.original = None  # would be noticed
    before, num = engine.gpu.copy(), 2 * blocks_per_chunk
    engine.swap("store", range(1, 1 + num), [3, 0])
    assert engine.finish() == [(1, True)]
    assert len(pipeline.pages) == LAYERS * num
    engine.gpu[:] = 0
    target = [10, 2, 7, 4, 9, 3][:num]
    engine.swap("load", target, [3, 0])
    assert engine.finish() == [(2, True)]
    np.testing.assert_array_equal(engine.gpu[:, target], before[:, 1 : 1 + num])
    assert (np.delete(engine.gpu, target, axis=1) == 0).all()
    if blocks_per_chunk > 1:  # a load from within a chunk
        engine.gpu[:] = 0
        engine.swap("load", [5], [0], first=1)
        np.testing.assert_array_equal(engine.gpu[:, 5], before[:, 2 + blocks_per_chunk])
    (stats,) = engine.patch.stats()
    assert stats["pipelines"][0]["store"]["pages"] == LAYERS * num and stats["passed_through"] == {}


def test_a_ring_that_finds_no_memory_says_which_setting_to_lower(vllm, monkeypatch):
    def refuse(*args, ring_bytes, **options):
        raise MemoryError(f"no {ring_bytes} bytes of device memory")

    monkeypatch.setattr(FakePipeline, "__init__", refuse)
    monkeypatch.setenv("CUSZP_RING_MB", "96")
    with pytest.raises(MemoryError, match="no 100663296 bytes of .*CUSZP_RING_MB=96.* gpu_memory_utilization"):
        Engine(vllm, monkeypatch)


def test_registering_again_keeps_what_is_stored(vllm, monkeypatch):
    engine = Engine(vllm, monkeypatch)
    before = engine.gpu.copy()
    engine.swap("store", [1, 2], [3])
    engine.connector.register_kv_caches(engine.caches)
    engine.gpu[:] = 0
    engine.swap("load", [6, 7], [3])
    np.testing.assert_array_equal(engine.gpu[:, 6:8], before[:, 1:3])
    assert len(engine.pipelines) == 1


def test_expedited_loads_are_urgent(vllm, monkeypatch):
    engine = Engine(vllm, monkeypatch)
    engine.pipelines[0].calls.clear()
    engine.swap("store", [1, 2], [3])
    engine.swap("load", [4, 5], [3])
    if vllm.version >= "0.33":
        engine.swap("load", [4, 5], [3], expedited=True)
    transports = [call[2] for call in engine.pipelines[0].calls]
    assert transports == ([None, None, "fused"] if vllm.version >= "0.33" else [None, None])


@pytest.mark.parametrize("tokens_first", [False, True])
def test_both_orders_in_a_page_are_told_apart(vllm, monkeypatch, tokens_first):
    engine = Engine(vllm, monkeypatch, tokens_first=tokens_first)
    assert engine.pipelines[0].geometry.outer == (1 if tokens_first else HEADS)


def test_fp8_pages_beside_others_pass_through_bit_exact(vllm, monkeypatch):
    fp8 = dict(dtype=sys.modules["torch"].uint8, head_size=2 * HEAD_SIZE)
    engine = Engine(vllm, monkeypatch, specs={2: fp8})
    before = engine.gpu.copy()
    engine.swap("store", [1, 2], [3])
    engine.gpu[:] = 0
    engine.swap("load", [6, 7], [3])
    np.testing.assert_array_equal(engine.gpu[:, 6:8], before[:, 1:3])
    assert sum(len(pipeline.pages) for pipeline in engine.pipelines) == 4  # of layers 0 and 1
    passed = engine.patch.stats()[0]["passed_through"]
    assert passed == {"KV cache of uint8, quantised already": {"descriptors": 4, "bytes": 4 * PAGE}}


@pytest.mark.parametrize(
    ("spec", "specs", "reason"),
    [
        ({"replicated_layout": True}, {}, "replicated layout"),
        ({}, dict.fromkeys(range(3), {"dtype": "uint8", "head_size": 2 * HEAD_SIZE}), "KV cache of uint8"),
        ({}, dict.fromkeys(range(3), {"dtype": "float32", "head_size": HEAD_SIZE // 2}), "KV cache of float32"),
        ({"canonical_layout": True}, {}, "canonical layout"),
        ({"tiering": True}, {}, "TieringOffloadingSpec: other tiers"),
        ({"unpinned": True}, {}, "the CPU memory is not pinned"),
    ],
)
def test_what_cannot_be_compressed_stays_raw_and_is_said_once(vllm, monkeypatch, caplog, spec, specs, reason):
    torch, spec = sys.modules["torch"], dict(spec)
    specs = {i: {**fields, "dtype": getattr(torch, fields["dtype"])} for i, fields in specs.items()}
    import vllm_patch

    if spec.pop("canonical_layout", False):
        parallel = types.SimpleNamespace(world_size=1, rank=0)
        spec["config"] = types.SimpleNamespace(
            canonical_layout=True, parallel=parallel, engine_id=f"test{os.getpid()}_{next(NUMBERS)}"
        )
    if spec.pop("tiering", False):
        cpu_spec = modules()[1]
        tiering = type("TieringOffloadingSpec", (cpu_spec.CPUOffloadingSpec,), {})
        monkeypatch.setattr(cpu_spec, "CPUOffloadingSpec", tiering)
    if spec.pop("unpinned", False):
        monkeypatch.setattr(Tensor, "is_pinned", lambda self: False)
    with caplog.at_level(logging.WARNING, "vllm.cuszp_cupy"):
        caplog.clear()
        engine = Engine(vllm, monkeypatch, spec=spec, specs=specs)
    (record,) = (r for r in caplog.records if "stay uncompressed" in r.getMessage())
    assert record.levelno == logging.WARNING and reason in record.getMessage()
    assert not engine.pipelines
    before = engine.gpu.copy()
    engine.swap("store", [1, 2], [3])
    engine.gpu[:] = 0
    engine.swap("load", [6, 7], [3])
    np.testing.assert_array_equal(engine.gpu[:, 6:8], before[:, 1:3])
    (counted,) = vllm_patch.stats()
    ((why, moved),) = counted["passed_through"].items()
    assert reason in why and not counted["pipelines"]
    assert moved["bytes"] == 2 * 2 * before[:, 0].nbytes and moved["descriptors"] > 0
    engine.worker.shutdown()
    assert vllm_patch.stats() == []


def test_a_damaged_page_is_never_reported_as_loaded(vllm, monkeypatch):
    engine = Engine(vllm, monkeypatch)
    engine.swap("store", [1, 2], [3])
    engine.pipelines[0].damaged = {3 * 6 + 4: "checksum differs"}
    for report in (engine.finish, lambda: engine.worker.wait({engine.job})):
        engine.swap("load", [6, 7], [3])
        with pytest.raises(RuntimeError, match=r"layers\.2\.self_attn\.attn, chunk 3: checksum differs"):
            report()


def test_shutdown_closes_the_pipelines_before_the_memory_goes(vllm, monkeypatch, caplog):
    engine = Engine(vllm, monkeypatch)
    (pipeline,) = engine.pipelines
    engine.swap("store", [1, 2], [3])
    order = []
    pipeline.close = lambda: order.append("pipeline")
    region = getattr(engine.worker, "_mmap_region", None) or engine.worker._store_handler._mmap_region
    cleanup = region.cleanup
    monkeypatch.setattr(region, "cleanup", lambda: (order.append("memory"), cleanup()))
    with caplog.at_level(logging.INFO, "vllm.cuszp_cupy"):
        engine.worker.shutdown()
    assert order == ["pipeline", "memory"] and engine.patch.stats() == []
    assert "cuszp_cupy store: 1 calls, 6 pages" in caplog.text and "passed through: nothing" in caplog.text


def test_a_pipeline_that_cannot_be_closed_does_not_keep_vllms_memory(vllm, monkeypatch):
    engine, cleaned = Engine(vllm, monkeypatch), []
    (pipeline,) = engine.pipelines

    def close():
        raise RuntimeError("the device is lost")

    pipeline.close = close
    region = getattr(engine.worker, "_mmap_region", None) or engine.worker._store_handler._mmap_region
    cleanup = region.cleanup
    monkeypatch.setattr(region, "cleanup", lambda: (cleaned.append(True), cleanup()))
    with pytest.raises(RuntimeError, match="the device is lost"):
        engine.worker.shutdown()
    assert cleaned and engine.patch.stats() == []


def test_uninstall_leaves_a_running_worker_able_to_load(vllm, monkeypatch):
    engine = Engine(vllm, monkeypatch)
    before = engine.gpu.copy()
    engine.swap("store", [1, 2], [3])
    engine.patch.uninstall()
    engine.swap("store", [3, 4], [1])
    engine.gpu[:] = 0
    engine.swap("load", [5, 6, 7, 8], [3, 1])
    np.testing.assert_array_equal(engine.gpu[:, 5:9], before[:, 1:5])
    assert engine.patch.stats()[0]["passed_through"] == {
        "uninstalled": {"descriptors": 6, "bytes": 6 * PAGE},
        "stored uncompressed": {"descriptors": 6, "bytes": 6 * PAGE},
    }  # fmt: skip


# --- single pages -------------------------------------------------------------------------------------------
def attention_spec(name="FullAttentionSpec", **fields):
    fields = dict(
        block_size=16, num_kv_heads=8, head_size=128, dtype=DType("float16", np.float16), kv_quant_mode=0,
        page_size_bytes=65536,
    ) | fields  # fmt: skip
    return type(name, (), fields)()


def view(shape, strides):
    return Tensor(np.zeros(1, np.uint8), DType("float16", np.float16), shape, strides)


TOKENS_FIRST = view((9, 8, 16, 256), (32768, 256, 2048, 1))


@pytest.mark.parametrize(
    ("spec", "cache", "expected"),
    [
        ({}, TOKENS_FIRST, (16, 2048, 1, (128, 128))),
        ({}, view((9, 8, 16, 256), (32768, 4096, 256, 1)), (16, 256, 8, (128, 128))),
        # a page of two of the backend's blocks
        ({"block_size": 32, "page_size_bytes": 131072}, TOKENS_FIRST, (32, 2048, 1, (128, 128))),
        (
            {"block_size": 32, "page_size_bytes": 131072}, view((9, 8, 16, 256), (32768, 4096, 256, 1)),
            (16, 256, 16, (128, 128)),
        ),
        ({"head_size": 192, "head_size_v": 64}, TOKENS_FIRST, (16, 2048, 1, (192, 64))),
        ({"name": "SlidingWindowSpec"}, TOKENS_FIRST, (16, 2048, 1, (128, 128))),
        ({"name": "MLAAttentionSpec"}, TOKENS_FIRST, "MLAAttentionSpec, no K and V"),
        ({"name": "MambaSpec"}, TOKENS_FIRST, "MambaSpec, no K and V"),
        ({"kv_quant_mode": 1}, TOKENS_FIRST, "quantised already"),
        ({"state_content_bytes": 512}, TOKENS_FIRST, "packed by the attention backend"),
        ({"tokens_per_state": 4}, TOKENS_FIRST, "packed by the attention backend"),
        ({"page_size_bytes": 69632}, TOKENS_FIRST, "pages of 69632 bytes, 65536 of them used"),
        ({}, view((9, 2, 16, 8, 128), (32768, 16384, 1024, 128, 1)), r"shape \(9, 2, 16, 8, 128\), not \[blocks"),
        ({}, view((9, 8, 16, 256), (65536, 256, 2048, 1)), "neither tokens nor heads outermost"),
        (
            {"block_size": 8, "head_size": 80, "page_size_bytes": 20480},
            view((9, 8, 8, 160), (10240, 160, 1280, 1)), "page shape not supported",
        ),
    ],
)  # fmt: skip
def test_page_kind(spec, cache, expected):
    found = offload.page_kind(attention_spec(**spec), cache)
    if isinstance(expected, str):
        assert isinstance(found, str) and re.search(expected, found)
    else:
        geometry = found.geometry
        assert (geometry.tokens, geometry.channels, geometry.outer, geometry.parts) == expected
        assert found.dtype == "float16" and geometry.nbytes == attention_spec(**spec).page_size_bytes
