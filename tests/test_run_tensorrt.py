"""run.py on TensorRT: what it refuses and what it computes, without a GPU.

TensorRT's and CUDA's own libraries are used where they are installed; a whole inference needs a
GPU, so it is checked on strict fakes that work in the host's memory.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import SPEC, tiny_model
from cuda_host import HostCuda
from secateur.bundle import build_engine, engine_cuda, engine_run, runner
from secateur.bundle.engine_cuda import LibraryCuda, PythonCuda, load_cuda
from secateur.bundle.engine_errors import EngineProblem
from secateur.bundle.engine_options import DEFAULTS
from secateur.bundle.engine_run import EngineSession
from secateur.bundle.runner import BundleMismatch, Runner
from secateur.bundle.write import stand_alone, write_runner
from secateur.lower.export import export_onnx
from tensorrt_fake import INVENTORIES, FakeTensorRT

FACTS = {
    "runtime": "tensorrt", "tensorrt": "10.3.0", "cuda": "12.6", "compute_capability": "8.7",
    "gpu": "Orin", "multiprocessors": 8, "module": "p3767-0005", "l4t": "36.4.3",
    "power_mode": {"id": 2, "name": "MAXN_SUPER"}, "clocks_mhz": {"gpu_max": 1020.0},
}  # fmt: skip
TENSORS = {
    "image": ("INPUT", "FLOAT", (-1, 3, 4, 6)),
    "depth": ("OUTPUT", "FLOAT", (-1, 1, 4, 6)),
    "room": ("OUTPUT", "HALF", (-1, 3)),
}  # fmt: skip
TYPES = {"FLOAT": np.float32, "HALF": np.float16}
PLAN = b"a serialised engine"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_bundle(folder: Path, **changes: Any) -> Path:
    """model.onnx, its manifest, model.engine and its engine.json."""
    onnx, tasks = b"an onnx file", [{"name": name, "kind": "depth"} for name in ("depth", "room")]
    contract = {"name": "image", "height": 4, "width": 6, "mean": [0.0] * 3, "std": [1.0] * 3,
                "layout": "RGB"}  # fmt: skip
    manifest = {"schema_version": 1, "threads": 1, "input": contract, "tasks": tasks,
                "files": {"model.onnx": {"sha256": digest(onnx)}}}  # fmt: skip
    engine = {"schema_version": 1, "device": FACTS, "options": {"dla": None},
              "files": {"model.onnx": digest(onnx), "model.engine": digest(PLAN)}}  # fmt: skip
    (folder / "model.onnx").write_bytes(onnx)
    (folder / "model.engine").write_bytes(PLAN)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "engine.json").write_text(json.dumps({**engine, **changes}))
    return folder


def change(folder: Path, table: str, field: str, value: Any) -> None:
    """Change one field of engine.json; ``table`` is "" for one of the outermost."""
    path = folder / "engine.json"
    engine = json.loads(path.read_text())
    (engine[table] if table else engine)[field] = value
    path.write_text(json.dumps(engine))


def array_at(name: str, address: int) -> np.ndarray:
    """The array of a tensor of TENSORS, for a batch of one, in the "device's" memory."""
    _, kind, shape = TENSORS[name]
    size = int(np.prod(shape[1:])) * np.dtype(TYPES[kind]).itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(memory, TYPES[kind]).reshape(1, *shape[1:])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand on the device of FACTS: a function that gives (TensorRT, CUDA) to run with."""

    def arrive(version: str = "tensorrt_10.3", **options: Any) -> tuple[FakeTensorRT, HostCuda]:
        cuda = HostCuda(captures=options.pop("captures", True), room=options.pop("room", 1 << 30))

        def infer(addresses: dict[str, int], stream: int) -> bool:
            def work() -> None:
                image = array_at("image", addresses["image"])
                array_at("depth", addresses["depth"])[:] = image.sum(1, keepdims=True)
                array_at("room", addresses["room"])[:] = image.mean((2, 3))

            cuda.enqueue(work)
            return True

        options = {"tensors": TENSORS, "execute": infer, **options}
        trt = FakeTensorRT(INVENTORIES[version], **options)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        facts = {**FACTS, "tensorrt": trt.__version__}
        monkeypatch.setattr(engine_run, "device_facts", lambda module: facts)
        monkeypatch.setattr(engine_run, "load_cuda", lambda: PythonCuda(cuda))
        return trt, cuda

    return arrive


# -- the file that travels


def test_one_file_travels_and_old_pythons_read_it(tmp_path: Path) -> None:
    write_runner(tmp_path)
    source = (tmp_path / "run.py").read_text()
    assert source == stand_alone(runner) and source.startswith("#!/usr/bin/env python3\n")
    tree = ast.parse(source, feature_version=(3, 8))
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names}  # fmt: skip
    imports |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in imports} - sys.stdlib_module_names
    assert others == {"cv2", "ncnn", "numpy", "onnxruntime"}


# -- refused before the engine is deserialised


def refusal(folder: Path, trt: FakeTensorRT) -> str:
    with pytest.raises(EngineProblem) as stop:
        EngineSession(folder)
    assert trt.calls["deserialize_cuda_engine"] == [] and "\n" not in str(stop.value)
    return str(stop.value)


MUST_MATCH = [name for name in FACTS if name not in ("power_mode", "clocks_mhz")]


@pytest.mark.parametrize(
    ("table", "field"),
    [("", "schema_version"), *(("device", name) for name in MUST_MATCH),
     ("files", "model.onnx"), ("files", "model.engine")],
)  # fmt: skip
@pytest.mark.parametrize("value", ["another", None])
def test_each_field_that_differs_is_named(
    device: Any, tmp_path: Path, table: str, field: str, value: str | None
) -> None:
    trt, _ = device()
    change(write_bundle(tmp_path), table, field, value)
    said = refusal(tmp_path, trt)
    expected = {**FACTS, "schema_version": 1}.get(field)
    assert f"{field} is {value or 'unknown'} in engine.json, " in said
    assert expected is None or f", {expected} here" in said
    assert said.endswith("`python3 build_engine.py`") and said.count(" in engine.json") == 1


ODD = [None, "another", [], {}, -1, 3.5, True, [["x"]], "x" * 9999]
UNREAD = {"bytes", "layers", "layers_of", "seconds", "created"}  # told by the builder, for people


def fields(engine: dict[str, Any]) -> list[tuple[str, ...]]:
    """The path of every field of engine.json, tables among them."""
    inner = [(table, name) for table in ("device", "files", "options") for name in engine[table]]
    return [*((name,) for name in engine), *inner]


def full_engine_json(folder: Path) -> dict[str, Any]:
    """engine.json as build_engine.py writes it."""
    write_bundle(folder)
    engine = json.loads((folder / "engine.json").read_text())
    engine["files"]["timing.cache"] = None
    told = {"bytes": len(PLAN), "layers": 3, "layers_of": "engine", "created": "now",
            "seconds": {"parse": 0.1, "build": 1.0}}  # fmt: skip
    return {**engine, **told, "options": dict(DEFAULTS)}


def test_whatever_a_field_of_engine_json_holds_it_is_named_or_harmless(
    device: Any, tmp_path: Path
) -> None:
    trt, _ = device()
    engine = full_engine_json(tmp_path)
    binding = {("schema_version",), ("device",), ("files",), ("options",),
               *(("device", name) for name in MUST_MATCH),
               ("files", "model.onnx"), ("files", "model.engine")}  # fmt: skip
    for path in fields(engine):
        for value in ODD:
            if value == {} and len(path) == 1:  # of an empty table each missing field is named
                continue
            changed = json.loads(json.dumps(engine))
            (changed if len(path) == 1 else changed[path[0]])[path[-1]] = value
            (tmp_path / "engine.json").write_text(json.dumps(changed))
            if path in binding and changed != engine:
                assert path[-1] in refusal(tmp_path, trt), (path, value)
                continue
            try:
                EngineSession(tmp_path)
            except EngineProblem as problem:
                assert path[0] not in UNREAD and "\n" not in str(problem)
            trt.calls["deserialize_cuda_engine"].clear()


def test_a_slower_power_mode_is_noted_not_refused(device: Any, tmp_path: Path) -> None:
    device()
    change(write_bundle(tmp_path), "device", "power_mode", {"id": 0, "name": "15W"})
    (note,) = EngineSession(tmp_path).notes
    assert "power_mode is {'id': 0, 'name': '15W'} in engine.json" in note


@pytest.mark.parametrize(
    "damage", [lambda plan: plan[:-5], lambda plan: b"", lambda plan: bytes(range(256)) * 9]
)
def test_a_truncated_or_random_engine_never_reaches_tensorrt(
    device: Any, tmp_path: Path, damage: Any
) -> None:
    trt, _ = device()
    (write_bundle(tmp_path) / "model.engine").write_bytes(damage(PLAN))
    assert "model.engine is " in refusal(tmp_path, trt)


@pytest.mark.parametrize("name", ["model.engine", "engine.json"])
def test_a_missing_half_is_one_sentence(device: Any, tmp_path: Path, name: str) -> None:
    trt, _ = device()
    (write_bundle(tmp_path) / name).unlink()
    assert name in refusal(tmp_path, trt) and "No such file" in refusal(tmp_path, trt)
    with pytest.raises(EngineProblem, match="there is no engine"):
        Runner(tmp_path)  # half an engine is no reason to run something else


@pytest.mark.parametrize("text", ['{"dev', "[]", "null", '{"device": 3}', "\xff\xfe"])
def test_a_damaged_engine_json_is_one_sentence(device: Any, tmp_path: Path, text: str) -> None:
    trt, _ = device()
    (write_bundle(tmp_path) / "engine.json").write_bytes(text.encode("latin-1"))
    assert "engine.json" in refusal(tmp_path, trt)


def test_another_model_onnx_is_refused_by_the_manifest_first(device: Any, tmp_path: Path) -> None:
    device()
    (write_bundle(tmp_path) / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleMismatch, match="not the file of this manifest"):
        Runner(tmp_path)


# -- refused by TensorRT or CUDA: one sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opens": False, "logs": [("WARNING", "slow"), ("ERROR", "Magic tag\n does not match.")]},
         "TensorRT 10.3.0 cannot open model.engine: Magic tag does not match"),
        ({"opens": False}, "cannot open model.engine: it gave no reason"),
        ({"execute": lambda addresses, stream: False}, "cannot run model.engine"),
        ({"room": 10}, "no memory left for this engine: close what else runs"),
        ({"tensors": {**TENSORS, "image": ("INPUT", "FLOAT", (4, 3, 4, 6))}}, "with --batch 1"),
        ({"tensors": {**TENSORS, "mask": ("INPUT", "FLOAT", (1, 4))}}, "reads ['image', 'mask']"),
        ({"tensors": {**TENSORS, "image": ("INPUT", "UINT8", (1, 3, 4, 6))}}, "reads uint8"),
        ({"tensors": {**TENSORS, "room": ("OUTPUT", "BF16", (1, 3))}}, "room is BF16"),
        ({"tensors": {**TENSORS, "room": ("OUTPUT", "INT32", (1, -1))}}, "of shape (1, -1)"),
    ],
)  # fmt: skip
def test_failures_are_sentences_and_give_everything_back(
    device: Any, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    _, cuda = device(**options)
    with pytest.raises(EngineProblem) as stop:
        EngineSession(write_bundle(tmp_path))
    assert said in str(stop.value) and "\n" not in str(stop.value)
    del stop
    gc.collect()
    assert cuda.alive == {}


def test_no_cuda_runtime_at_all_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cuda, "PYTHON_MODULES", ("no_such_cuda_python",))
    monkeypatch.setattr(engine_cuda, "library_paths", lambda: ["libcudart.so.none"])
    with pytest.raises(
        EngineProblem, match="there is no CUDA runtime here: install the CUDA toolkit"
    ):
        load_cuda()


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists()


@pytest.mark.skipif(has_gpu(), reason="for a machine without a GPU")
@pytest.mark.parametrize("way", [PythonCuda, LibraryCuda])
def test_the_real_cuda_runtime_without_a_gpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, way: type
) -> None:
    if way is LibraryCuda:
        monkeypatch.setattr(engine_cuda, "PYTHON_MODULES", ())
    try:
        cuda = load_cuda()
    except EngineProblem:
        pytest.skip("no CUDA runtime: pip install cuda-bindings, or nvidia-cuda-runtime")
    if not isinstance(cuda, way):
        pytest.skip("no cuda-python: pip install cuda-bindings")
    with pytest.raises(EngineProblem, match=r"CUDA does not work here \(.+\): check the driver"):
        cuda("cudaStreamCreateWithFlags", 1)


# -- what it computes


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("version", [name for name in INVENTORIES if "rtx" not in name])
def test_it_runs_like_the_onnxruntime_runner(
    device: Any, tmp_path: Path, version: str, captures: bool
) -> None:
    trt, cuda = device(version, captures=captures)
    found = Runner(write_bundle(tmp_path, device={**FACTS, "tensorrt": trt.__version__}))
    assert trt.calls["deserialize_cuda_engine"] == [(PLAN,)]
    assert trt.calls["set_input_shape"] == [("image", (1, 3, 4, 6))]
    notes = found.session.notes
    assert notes == [] if captures else "without a CUDA graph: cudaStreamEndCapture" in notes[0]
    generator, before = np.random.default_rng(0), None
    for _ in range(2):
        image = generator.integers(0, 256, (4, 6, 3), np.uint8)
        cuda.calls.clear()
        outputs = found.predict(image)
        assert list(outputs) == ["depth", "room"] and outputs["room"].dtype == np.float16
        assert np.allclose(outputs["depth"][0, 0], image.sum(2) / 255, atol=1e-6)
        assert np.allclose(outputs["room"][0], image.mean((0, 1)) / 255, atol=1e-3)
        launched = ["cudaGraphLaunch"] if captures else ["cudaMemcpyAsync"] * 3
        assert cuda.calls == [*launched, "cudaStreamSynchronize"]
        assert before is None or not np.shares_memory(before, outputs["depth"])
        before = outputs["depth"]
    del found
    gc.collect()
    assert cuda.alive == {}


def test_a_dla_engine_is_opened_on_its_core(device: Any, tmp_path: Path) -> None:
    trt, _ = device()
    EngineSession(write_bundle(tmp_path, options={"dla": 1}))
    assert trt.properties["DLA_core"] == 1


def test_outputs_that_are_not_the_manifests_are_refused(device: Any, tmp_path: Path) -> None:
    device()
    manifest = json.loads((write_bundle(tmp_path) / "manifest.json").read_text())
    manifest["tasks"].pop()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleMismatch, match=r"gives \['depth', 'room'\], the manifest says"):
        Runner(tmp_path)


# -- TensorRT-RTX, for real: a real engine of a small model, on this machine


@pytest.fixture(scope="module")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rtx = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    folder = tmp_path_factory.mktemp("rtx")
    export_onnx(tiny_model(), SPEC.example(2), folder / "model.onnx")
    build_engine.build(folder, None, rtx)
    tasks = [{"name": name, "kind": "depth"} for name in ("segmentation", "depth", "room")]
    contract = {"name": "image", "height": SPEC.height, "width": SPEC.width, "mean": SPEC.mean,
                "std": SPEC.std, "layout": "RGB"}  # fmt: skip
    sha256 = digest((folder / "model.onnx").read_bytes())
    manifest = {"schema_version": 1, "threads": 1, "input": contract, "tasks": tasks,
                "files": {"model.onnx": {"sha256": sha256}}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_runner(folder)
    cv2.imwrite(str(folder / "image.png"), np.zeros((40, 60, 3), np.uint8))
    return folder


def run_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bundle's run.py in a process of its own, without Secateur."""
    paths = [path for path in sys.path if path and not path.endswith("pipeline")]
    command = [sys.executable, "-P", folder / "run.py", folder / "image.png", "--out", folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.skipif(has_gpu(), reason="for a machine without a GPU")
def test_a_real_engine_without_a_gpu_ends_in_one_sentence(real_bundle: Path) -> None:
    result = run_alone(real_bundle)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("error: ") and "CUDA" in result.stderr
    assert run_alone(real_bundle, "--runtime", "onnxruntime").returncode == 0


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [("device", "tensorrt", "1.0.0"), ("device", "runtime", "tensorrt"),
     ("options", "compute_capabilities", ["8.6"]), ("files", "model.engine", "0" * 64)],
)  # fmt: skip
def test_a_real_engine_is_refused_by_field(
    real_bundle: Path, table: str, field: str, value: Any
) -> None:
    if field == "compute_capabilities" and not has_gpu():
        pytest.skip("without a GPU no capability can differ")
    before = (real_bundle / "engine.json").read_text()
    try:
        change(real_bundle, table, field, value)
        result = run_alone(real_bundle)
    finally:
        (real_bundle / "engine.json").write_text(before)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert field.replace("capabilities", "capability") + " is " in result.stderr


@pytest.mark.parametrize(
    "damage", [lambda plan: plan[: len(plan) // 2], lambda plan: os.urandom(5000), lambda plan: b""]
)
def test_a_real_run_ends_in_one_sentence_whatever_the_engines_bytes(
    real_bundle: Path, tmp_path: Path, damage: Any
) -> None:
    """The digest in engine.json is the damaged file's, so that it reaches TensorRT."""
    folder = shutil.copytree(real_bundle, tmp_path / "bundle")
    plan = damage((folder / "model.engine").read_bytes())
    (folder / "model.engine").write_bytes(plan)
    change(folder, "files", "model.engine", digest(plan))
    result = run_alone(folder)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "damage", [lambda plan: plan[: len(plan) // 2], lambda plan: os.urandom(5000), lambda plan: b""]
)
def test_a_real_runtime_survives_a_damaged_engine_with_the_right_digest(
    real_bundle: Path, tmp_path: Path, damage: Any
) -> None:
    import tensorrt_rtx

    plan = damage((real_bundle / "model.engine").read_bytes())
    session = EngineSession.__new__(EngineSession)
    session.trt = tensorrt_rtx
    session.logger = engine_run.process_logger(tensorrt_rtx)
    with pytest.raises(EngineProblem, match=r"cannot open model\.engine: .+"):
        session._open(plan, None)
