"""The engine builder that travels in bundles: with TensorRT-RTX for real, else on strict fakes."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from cli_run import RECIPE
from conftest import SPEC, tiny_model
from onnx import TensorProto, helper
from secateur.bundle import build_engine, engine_device, engine_progress, engine_supervise
from secateur.bundle.build_engine import build
from secateur.bundle.engine_device import check_engine, device_facts
from secateur.bundle.engine_errors import (
    BuildProblem,
    EngineProblem,
    explain,
    explain_parsing,
    room,
)
from secateur.bundle.engine_layers import engine_rows, join_rows, onnx_nodes
from secateur.bundle.engine_options import DEFAULTS, batch_sizes
from secateur.bundle.engine_progress import progress_monitor
from secateur.bundle.write import file_records, node_tasks, stand_alone, write_builder
from secateur.core.errors import DeviceError, RecipeError
from secateur.devices.target import load_target
from secateur.flow.engine import check_dla, check_options
from secateur.flow.recipe import parse_recipe
from secateur.lower.export import export_onnx
from tensorrt_fake import INVENTORIES, FakeTensorRT

SOURCE = stand_alone(build_engine)
WORDS = {"version": "10.3.0", "room": room(2000 << 20, 1000 << 20)}


def small_onnx(folder: Path, operator: str = "Relu", **changes: Any) -> Path:
    """image -> OPERATOR "first" -> Relu "second" -> depth, and -> Relu without a name -> seg."""
    shape = changes.get("shape", ("batch", 3, 4, 4))
    nodes = [
        helper.make_node(operator, ["image"], ["middle"], "first", domain=changes.get("domain")),
        helper.make_node("Relu", ["middle"], ["depth"], "second"),
        helper.make_node("Relu", ["middle"], ["seg"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
              for name in ("image", "depth", "seg")]  # fmt: skip
    graph = helper.make_graph(nodes, "small", values[:1], values[1:])
    domains = [helper.make_opsetid(domain, 20) for domain in ("", changes.get("domain")) if
               domain is not None]  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), folder / "model.onnx")
    return folder


# -- the file that travels


def test_one_file_travels_and_old_pythons_read_it(tmp_path: Path) -> None:
    ast.parse(SOURCE, feature_version=(3, 8))
    tree = ast.parse(SOURCE)
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names}  # fmt: skip
    imports |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imports} <= sys.stdlib_module_names
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    since_3_9 = {"removeprefix", "removesuffix", "is_relative_to", "with_stem", "readlink", "cache"}
    assert not attributes & since_3_9


def run_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bundle's builder with the standard library only."""
    command = [sys.executable, "-I", "-S", folder / "build_engine.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_tensorrt_one_sentence_says_how_to_get_it(tmp_path: Path) -> None:
    write_builder(small_onnx(tmp_path))
    result = run_alone(tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "python3-libnvinfer" in result.stderr and "pip install tensorrt-rtx" in result.stderr
    assert run_alone(tmp_path, "--help").returncode == 0
    files = {"build_engine.py", "engine_options.json", "model.onnx", "nodes.json"}
    assert set(file_names(tmp_path)) == files


def test_files_that_are_not_the_bundles_are_refused_before_anything_else(tmp_path: Path) -> None:
    write_builder(small_onnx(tmp_path))
    (tmp_path / "manifest.json").write_text('{"files": {"model.onnx": {"sha256": "0"}}}')
    assert "not the file of this manifest" in run_alone(tmp_path).stderr
    (tmp_path / "manifest.json").write_text('{"files": {"mod')
    assert "manifest.json is damaged" in run_alone(tmp_path).stderr
    (tmp_path / "manifest.json").write_text('{"files": 3}')
    assert "manifest.json does not name model.onnx" in run_alone(tmp_path).stderr
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "nodes.json").write_text('{"nodes": {"first": 3}}')
    assert "nodes.json is damaged" in run_alone(tmp_path).stderr
    (tmp_path / "model.onnx").unlink()
    assert "there is no" in run_alone(tmp_path).stderr
    assert "no engine to check" in run_alone(tmp_path, "--check").stderr


def file_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(("text", "sizes"), [("4", [4, 4, 4]), ("1:4:16", [1, 4, 16])])
def test_batch_sizes(text: str, sizes: list[int]) -> None:
    assert batch_sizes(text) == sizes


@pytest.mark.parametrize("text", ["4:1:2", "0", "1:2", "x"])
def test_bad_batch_sizes_are_the_users_error(text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        build_engine.main(["--batch", text])
    assert stop.value.code == 2


# -- which task needs which node


def test_nodes_json_says_which_task_needs_which_node(tmp_path: Path) -> None:
    wanted = {"first": ["depth", "seg"], "node_of_seg": ["seg"], "second": ["depth"]}
    assert node_tasks(small_onnx(tmp_path) / "model.onnx") == wanted


INSPECTED = {
    "Layers": [
        {"Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1", "LayerType":
         "Reformat", "Inputs": [{"Name": "image"}],
         "Outputs": [{"Name": "r0", "Format/Datatype": "Channel major FP16 format"}]},
        {"Name": "conv1 + relu1", "LayerType": "CaskConvolution", "Inputs": [{"Name": "r0"}],
         "Outputs": [{"Name": "a", "Datatype": "Half"}], "TacticName": "sm80_xmma_fprop",
         "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]"},
        {"Name": "{ForeignNode[linear...softmax]}", "LayerType": "Myelin", "Inputs": [
            {"Name": "a"}], "Outputs": [{"Name": "room"}]},
        {"Name": "depth_conv", "LayerType": "Conv", "Inputs": [{"Name": "a"}, {"Name": "c"}],
         "Outputs": [{"Name": "d"}], "Metadata": "[ONNX Layer: /head.0/Conv]"},
        {"Name": "copy", "LayerType": "NoOp", "Inputs": [{"Name": "d"}],
         "Outputs": [{"Name": "depth"}]},
    ],
    "Bindings": ["image", "room", "depth"],
}  # fmt: skip
NODES = {"conv1": ["depth", "room"], "relu1": ["depth", "room"], "linear": ["room"],
         "softmax": ["room"], "/head.0/Conv": ["depth"]}  # fmt: skip


def test_layers_of_an_engine_are_joined_to_nodes_and_tasks() -> None:
    rows = join_rows(engine_rows(json.dumps(INSPECTED)), NODES, ["room", "depth"])
    assert [(row["onnx"], row["tasks"]) for row in rows] == [
        (["conv1", "relu1"], ["depth", "room"]),
        (["conv1", "relu1"], ["depth", "room"]),
        (["linear", "softmax"], ["room"]),
        (["/head.0/Conv"], ["depth"]),
        ([], ["depth"]),
    ]
    assert rows[0]["outputs"] == [{"name": "r0", "format": "Channel major FP16 format"}]
    assert rows[1]["tactic"] == "sm80_xmma_fprop" and "metadata" not in rows[1]


def test_without_a_table_of_nodes_tasks_are_read_off_the_engine_itself() -> None:
    rows = join_rows(engine_rows(json.dumps(INSPECTED)), {}, ["room", "depth"])
    assert [row["tasks"] for row in rows] == [
        ["depth", "room"], ["depth", "room"], ["room"], ["depth"], ["depth"],
    ]  # fmt: skip
    names_only = engine_rows('{"Layers": ["conv1 + relu1", "odd"], "I/O Tensors": []}')
    assert [row["onnx"] for row in join_rows(names_only, NODES, [])] == [["conv1", "relu1"], []]


def test_a_layers_metadata_are_believed_before_its_name() -> None:
    assert onnx_nodes("conv1", "[ONNX Layer: a[0]]\x1e[ONNX Layer: b]", NODES) == ["a[0]", "b"]
    assert onnx_nodes("PWN(relu1, softmax)", "", NODES) == ["relu1", "softmax"]


# -- what errors say


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)", "swap"),
        ("Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)", "smaller --workspace"),
        ("Error Code 10: Internal Error (Could not find any implementation for node "
         "{ForeignNode[a.b...c]} due to insufficient workspace. See verbose log.)",
         "for {ForeignNode[a.b...c]} fits into the workspace (2000 MiB free, workspace 1000 MiB)"),
        ("Could not find any implementation for node /m.1/Conv + PWN(/act).)",
         "no kernel for /m.1/Conv + PWN(/act) fits"),
        ("Cannot compile operation 'n' for Turing (SM75): FP32 GEMM is not supported", "as fp16"),
        ("Layer conv1 cannot run on DLA and fallback is not enabled: DLA fallback", "--dla-only"),
        ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version", "driver"),
        ("something never seen", "TensorRT 10.3.0: something never seen"),
        ("", "TensorRT 10.3.0: it gave no reason"),
    ],
)  # fmt: skip
def test_the_builders_errors_say_what_to_change(words: str, change: str) -> None:
    assert change in explain(words, WORDS)


@pytest.mark.parametrize(
    ("code", "words", "change"),
    [
        ("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model.", "copy the bundle again"),
        ("UNSUPPORTED_NODE", "false", "operator Det at node head/det (tasks: depth, room;"),
        ("INVALID_NODE", 'creator && "Plugin not found"', "operator Det at node head/det"),
        ("INVALID_NODE", "shiftIsAllZeros(zeroPoint): … on DLA.", "symmetric int8"),
        ("UNSUPPORTED_NODE", "input has type Int32 but must have type FP8", "quantised biases"),
        ("INVALID_NODE", "bad axis", "TensorRT 10.3.0: node head/det: bad axis"),
    ],
)
def test_the_parsers_errors_name_node_operator_and_tasks(
    code: str, words: str, change: str
) -> None:
    said = explain_parsing(code, words, ("head/det", "Det"), ["depth", "room"], WORDS)
    assert change in said and "\n" not in said


# -- what the device is, and whether an engine is its own


def test_facts_are_read_from_the_devices_own_files(tmp_path: Path) -> None:
    files = {
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit Super\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
        "var/lib/nvpmodel/status": "pmode:0002\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000\n",
        "proc/meminfo": "MemTotal: 7801720 kB\nMemAvailable:    5000000 kB\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    facts = device_facts(FakeTensorRT(INVENTORIES["tensorrt_10.3"]), tmp_path)
    assert (facts["runtime"], facts["tensorrt"]) == ("tensorrt", "10.3.0")
    assert (facts["module"], facts["l4t"]) == ("p3767-0005", "36.4.3")
    assert facts["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}
    assert facts["clocks_mhz"] == {
        "gpu_min": 306.0, "gpu_max": 1020.0, "cpu_min": 729.6, "cpu_max": 1728.0,
    }  # fmt: skip
    assert engine_device.available_memory(tmp_path) == 5000000 * 1024


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    facts = device_facts(FakeTensorRT(INVENTORIES["tensorrt_11.4"]), tmp_path)
    here = {name: facts[name] for name in ("module", "l4t", "power_mode", "clocks_mhz")}
    assert set(here.values()) == {None}
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("garbage")
    assert engine_device.available_memory(tmp_path) is None


FACTS = {
    "runtime": "tensorrt", "tensorrt": "10.3.0", "cuda": "12.6", "compute_capability": "8.7",
    "gpu": "Orin", "multiprocessors": 8, "module": "p3767-0005", "l4t": "36.4.3",
    "power_mode": {"id": 2, "name": "MAXN_SUPER"}, "clocks_mhz": {"gpu_max": 1020.0},
}  # fmt: skip
FILES = {"model.onnx": "a" * 64, "model.engine": "b" * 64}
ENGINE = {"schema_version": 1, "device": FACTS, "files": {**FILES, "timing.cache": "c" * 64},
          "options": dict(DEFAULTS)}  # fmt: skip


def test_an_engine_of_this_very_device_is_opened() -> None:
    assert check_engine(json.loads(json.dumps(ENGINE)), FACTS, FILES) == []


@pytest.mark.parametrize("field", [*FACTS, *FILES])
@pytest.mark.parametrize("value", ["another", None])
def test_each_field_that_differs_is_named(field: str, value: str | None) -> None:
    changed = json.loads(json.dumps(ENGINE))
    changed["device" if field in FACTS else "files"][field] = value
    (found,) = check_engine(changed, FACTS, FILES)
    assert (found.field, found.built) == (field, value)
    assert found.refuse == (field not in {"power_mode", "clocks_mhz"})


@pytest.mark.parametrize(
    "engine",
    [None, [], "x", {}, {"schema_version": 2}, {"schema_version": 1},
     {**ENGINE, "device": None}, {**ENGINE, "files": []}, {**ENGINE, "options": "?"}],
)  # fmt: skip
def test_what_is_no_engine_json_is_refused_not_crashed_on(engine: Any) -> None:
    (found,) = check_engine(engine, FACTS, FILES)
    assert found.refuse and found.field in {"schema_version", "device", "files", "options"}


def test_an_engine_of_tensorrt_rtx_is_bound_to_its_version_and_capabilities() -> None:
    here = {**FACTS, "runtime": "tensorrt_rtx", "tensorrt": "1.7.1"}
    built = {**ENGINE, "device": {**dict.fromkeys(FACTS), "runtime": "tensorrt_rtx",
                                  "tensorrt": "1.7.1"}}  # fmt: skip
    assert check_engine(built, here, FILES) == []
    built["options"] = {"compute_capabilities": ["8.6", "8.9"]}
    assert [row.field for row in check_engine(built, here, FILES)] == ["compute_capability"]
    assert check_engine(built, {**here, "compute_capability": "8.9"}, FILES) == []
    assert "runtime" in {row.field for row in check_engine(built, FACTS, FILES)}
    odd = {**built, "options": {"compute_capabilities": 86}}
    assert [row.field for row in check_engine(odd, here, FILES)] == ["compute_capability"]
    newer = {**here, "tensorrt": "1.8.0", "compute_capability": "8.6"}
    assert [row.field for row in check_engine(built, newer, FILES)] == ["tensorrt"]


# -- TensorRT 10.3 to 11.4, as strict fakes made from the inventories of their wheels


@pytest.mark.parametrize("name", [name for name in INVENTORIES if "rtx" not in name])
def test_a_build_on_every_tensorrt(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build_engine, "cuda_facts", lambda: {"memory_free": 4 << 30})
    write_builder(small_onnx(tmp_path))
    (tmp_path / "timing.cache").write_bytes(b"of an earlier build")
    trt = FakeTensorRT(INVENTORIES[name], inspected=INSPECTED, dla_cores=2)
    engine = build(tmp_path, {"sparse": True, "dla": 1, "tf32": False, "level": 2}, trt)
    flag = INVENTORIES[name]["enums"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    assert trt.calls["create_network"] == [(1 << flag,)]
    assert trt.calls["set_memory_pool_limit"] == [(trt.MemoryPoolType.WORKSPACE, 2 << 30)]
    assert trt.calls["set_shape"] == [("image", *[(1, 3, 32, 48)] * 3)]
    flags = [flag.name for (flag,) in trt.calls["set_flag"]]
    adjust = "ADJUST_FOR_DLA" in INVENTORIES[name]["enums"]["OnnxParserFlag"]
    assert flags == ["ADJUST_FOR_DLA"] * adjust + ["SPARSE_WEIGHTS", "GPU_FALLBACK"]
    assert trt.calls["clear_flag"] == [(trt.BuilderFlag.TF32,)]
    assert trt.calls["create_timing_cache"] == [(b"of an earlier build",)]
    assert trt.properties["profiling_verbosity"] == trt.ProfilingVerbosity.DETAILED
    assert trt.properties["DLA_core"] == 1 and trt.properties["builder_optimization_level"] == 2
    assert json.loads((tmp_path / "engine.json").read_text()) == engine
    assert engine["layers_of"] == "engine" and engine["layers"] == 5
    assert engine["options"]["workspace_mib"] == 2048 and engine["options"]["dla"] == 1
    for file, digest in engine["files"].items():
        assert engine_device.file_digest(tmp_path / file) == digest
    assert (tmp_path / "timing.cache").read_bytes() == b"serialized"


def failed(folder: Path, options: dict[str, Any] | None = None, **fake: Any) -> str:
    """The sentence of a build that must fail, on a fake TensorRT 10.3; no engine.json is left."""
    for name in ("engine.json", "layers.json"):
        (folder / name).write_text("{}")  # of an earlier build
    with pytest.raises(BuildProblem) as stop:
        build(folder, options, FakeTensorRT(INVENTORIES["tensorrt_10.3"], **fake))
    assert not {"engine.json", "layers.json", "model.engine"} & set(file_names(folder))
    return str(stop.value)


def test_failures_of_a_build_are_sentences(tmp_path: Path) -> None:
    write_builder(small_onnx(tmp_path))
    out_of_memory = [("WARNING", "tactic skipped"), ("ERROR", "Cuda Runtime (out of memory)")]
    assert "memory ran out" in failed(tmp_path, logs=out_of_memory)
    fault = ("UNSUPPORTED_NODE", "no", "first", "Det")
    assert "operator Det at node first (tasks: depth, seg" in failed(tmp_path, fault=fault)
    assert "CUDA does not work here" in failed(tmp_path, no_gpu=True)
    assert "no DLA core 0 here" in failed(tmp_path, {"dla": 0})
    assert "a DLA takes one batch size only: give --batch 4" in failed(
        tmp_path, {"dla": 0, "batch": [1, 2, 4]}, dla_cores=1
    )
    assert "only the batch may be dynamic" in failed(tmp_path, shape=(1, 3, -1, -1))
    assert "give --batch 2" in failed(tmp_path, shape=(2, 3, 8, 8))
    assert "cannot build for SM86" in failed(tmp_path, {"compute_capabilities": ["8.6"]})


def test_the_bundles_own_options_are_the_default(tmp_path: Path) -> None:
    own = {"workspace_mib": 256, "batch": [1, 2, 4], "sparse": True}
    write_builder(small_onnx(tmp_path), own)
    trt = FakeTensorRT(INVENTORIES["tensorrt_10.3"], inspected=INSPECTED)
    engine = build(tmp_path, {"level": 2}, trt)
    assert engine["options"] == {**DEFAULTS, **own, "level": 2}
    assert trt.calls["set_memory_pool_limit"] == [(trt.MemoryPoolType.WORKSPACE, 256 << 20)]
    assert trt.calls["set_shape"] == [("image", *((size, 3, 32, 48) for size in (1, 2, 4)))]
    assert [flag.name for (flag,) in trt.calls["set_flag"]] == ["SPARSE_WEIGHTS"]
    engine = build(tmp_path, {"batch": [2, 2, 2]}, trt)  # the command line goes before
    assert engine["options"]["batch"] == [2, 2, 2] and engine["options"]["workspace_mib"] == 256


def test_options_of_another_version_are_one_sentence(tmp_path: Path) -> None:
    write_builder(small_onnx(tmp_path), {"frobnicate": 1})
    result = run_alone(tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "an option frobnicate that this builder does not know" in result.stderr
    (tmp_path / "engine_options.json").write_text("[")
    assert "engine_options.json is damaged" in run_alone(tmp_path).stderr
    (tmp_path / "engine_options.json").write_text("[1]")
    assert "engine_options.json is damaged" in run_alone(tmp_path).stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": "x"}, "batch is 'x', give N, or MIN:OPT:MAX"),
        ({"batch": [4, 1, 1]}, "batch is [4, 1, 1]"),
        ({"workspace_mib": "many"}, "workspace_mib is 'many', give MiB"),
        ({"workspace_mib": -5}, "workspace_mib is -5"),
        ({"dla": -1}, "dla is -1, give the number of a core"),
        ({"dla": True}, "dla is True"),
        ({"dla_only": True}, "dla_only needs a core: give --dla CORE, too"),
        ({"sparse": 1}, "sparse is 1, give true or false"),
        ({"level": 9}, "level is 9, give 0 to 5"),
        ({"compute_capabilities": ["foo"]}, "compute_capabilities is ['foo'], give as 8.6"),
        ({"compute_capabilities": 86}, "compute_capabilities is 86"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    write_builder(small_onnx(tmp_path), options)
    result = run_alone(tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr
    write_builder(tmp_path)
    with pytest.raises(BuildProblem) as stop:
        build(tmp_path, options, FakeTensorRT(INVENTORIES["tensorrt_10.3"], dla_cores=2))
    assert said in str(stop.value)


@pytest.mark.parametrize("words", [("--workspace", "-5"), ("--dla", "-1"), ("--dla-only",)])
def test_so_are_those_of_the_command_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    write_builder(small_onnx(tmp_path))
    result = run_alone(tmp_path, *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "give " in result.stderr


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("engine: {batch: 4}", {"batch": [4, 4, 4]}),
        ("engine: {batch: [1, 4, 16], workspace_mib: 512, tf32: false}",
         {"batch": [1, 4, 16], "workspace_mib": 512, "tf32": False}),
        ("engine: {dla: 1, dla_only: true, level: 5}", {"dla": 1, "dla_only": True, "level": 5}),
        ('engine: {compute_capabilities: ["8.6"]}', {"compute_capabilities": ["8.6"]}),
    ],
)  # fmt: skip
def test_a_recipes_wishes_are_the_builders_options(text: str, options: dict[str, Any]) -> None:
    found = parse_recipe(RECIPE + text, Path("r.yaml")).engine_options()
    assert found == options and set(found) <= set(DEFAULTS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{batch: [4, 1, 16]}", "from small to large"),
        ("{batch: 0}", "engine.batch"),
        ("{dla_only: true}", "dla_only: give dla"),
        ("{dla: 0, batch: [1, 2, 4]}", "a DLA takes one size only"),
        ("{workspace: 5}", "key 'engine.workspace' is not known"),
        ("{level: 6}", "engine.level"),
        ('{compute_capabilities: ["86"]}', "engine.compute_capabilities"),
    ],
)
def test_wishes_that_no_builder_has_are_the_recipes_error(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"{RECIPE}engine: {text}", Path("r.yaml"))


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        ("{dla: 0}", "jetson-orin-nano-8gb", "jetson-orin-nano-8gb has no DLA cores, got core 0"),
        ("{dla: 2}", "jetson-agx-orin-64gb", "has 2 DLA cores, got core 2"),
        ("{dla: 1}", "jetson-agx-orin-64gb", ""),
        ('{compute_capabilities: ["8.7"]}', "rtx-pc", "is for 8.0, 8.6, 8.9, 12.0, 12.1, got 8.7"),
        ('{compute_capabilities: ["8.7"]}', "jetson-orin-nano-8gb", "the very device that builds"),
        ('{compute_capabilities: ["8.6"]}', "rtx-pc", ""),
        ("{dla: 5}", "x86-64-cpu", ""),  # which has no engine
    ],
)
def test_wishes_are_held_against_the_target(text: str, target: str, said: str) -> None:
    recipe = parse_recipe(f"{RECIPE}engine: {text}", Path("r.yaml"))
    if not said:
        check_options(recipe, load_target(target))
        return
    with pytest.raises(RecipeError, match=said):
        check_options(recipe, load_target(target))


@pytest.mark.parametrize(
    ("target", "version", "said"),
    [
        ("jetson-agx-orin-64gb", (10, 3, 0), ""),
        ("jetson-agx-orin-64gb", (10, 13, 3), "TensorRT 10.13.3 has no DLA on a jetson-agx-orin"),
        ("jetson-agx-orin-64gb", (11, 4, 1), ""),
        ("jetson-orin-nx-16gb", (11, 4, 1), "TensorRT 11.4.1 has no DLA on a jetson-orin-nx-16gb"),
        ("jetson-thor-t5000", (10, 13), "TensorRT 10.13 has no DLA on a jetson-thor-t5000"),
        ("jetson-orin-nano-8gb", (10, 3, 0), "has no DLA on a jetson-orin-nano-8gb"),
    ],
)
def test_a_dla_depends_on_module_and_version(
    target: str, version: tuple[int, ...], said: str
) -> None:
    if not said:
        check_dla(load_target(target), version)
        return
    with pytest.raises(DeviceError, match=said):
        check_dla(load_target(target), version)


def test_a_folder_called_tensorrt_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineProblem, match="tensorrt is a folder without TensorRT"):
        build_engine.load_tensorrt()
    del sys.modules["tensorrt"]


def test_a_timing_cache_of_another_device_is_replaced(tmp_path: Path) -> None:
    write_builder(small_onnx(tmp_path))
    (tmp_path / "timing.cache").write_bytes(b"foreign")
    trt = FakeTensorRT(INVENTORIES["tensorrt_10.13"], inspected=INSPECTED, cache_fits=False)
    build(tmp_path, None, trt)
    assert trt.calls["create_timing_cache"] == [(b"foreign",), (b"",)]


def test_a_long_build_tells_its_steps_and_can_be_stopped(monkeypatch, capsys) -> None:
    """As a builder calls it: phases within phases, steps counted from 0."""
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(engine_progress.time, "monotonic", lambda: next(clock))
    monitor = progress_monitor(FakeTensorRT(INVENTORIES["tensorrt_10.3"]))
    monitor.phase_start("Building engine", None, 5)
    monitor.phase_start("Timing tactics", "Building engine", 80)
    assert [monitor.step_complete("Timing tactics", step) for step in range(4)] == [True] * 4
    monitor.phase_finish("Timing tactics")
    said = ["6 s: Timing tactics, step 2 of 80", "12 s: Timing tactics, step 4 of 80"]
    assert capsys.readouterr().err.splitlines() == said

    def interrupted() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_progress.time, "monotonic", interrupted)
    assert monitor.step_complete("Timing tactics", 4) is False and monitor.stopped


@pytest.mark.parametrize("name", INVENTORIES)
def test_what_a_builder_calls_has_its_own_arguments(name: str) -> None:
    monitor = type(progress_monitor(FakeTensorRT(INVENTORIES[name])))
    for method, overloads in INVENTORIES[name]["classes"]["IProgressMonitor"].items():
        assert [list(inspect.signature(getattr(monitor, method)).parameters)[1:]] == overloads


def test_an_old_tensorrt_is_refused_by_version(monkeypatch) -> None:
    old = FakeTensorRT({**INVENTORIES["tensorrt_10.3"], "version": "8.5.2.2"})
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineProblem, match=r"8\.5\.2\.2 is too old"):
        build_engine.load_tensorrt()


# -- TensorRT-RTX, for real


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")


@pytest.fixture(scope="module")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TinyNet with three tasks, in fp32 and in fp16."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("fp32", "fp16")}
    export_onnx(tiny_model(), SPEC.example(2), folders["fp32"] / "model.onnx")
    export_onnx(tiny_model().half(), SPEC.example(2).half(), folders["fp16"] / "model.onnx")
    for folder in folders.values():
        write_builder(folder)
    return folders


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_build(rtx: Any, request, precision: str) -> None:
    folder = request.getfixturevalue("tiny_bundles")[precision]
    engine = build(folder, {"batch": [1, 2, 4], "sparse": True}, rtx)
    table = json.loads((folder / "layers.json").read_text())
    assert engine["bytes"] == (folder / "model.engine").stat().st_size > 50_000
    rows = {row["name"]: row for row in table["layers"]}
    assert len(rows) == engine["layers"] >= 23
    tasks = {"depth", "room", "segmentation"}
    joined = {node for row in rows.values() for node in row["onnx"]}
    assert joined == set(json.loads((folder / "nodes.json").read_text())["nodes"])
    assert all(row["tasks"] and set(row["tasks"]) <= tasks for row in rows.values())
    last = [r for r in rows.values() if {o["name"] for o in r["outputs"]} & tasks]
    assert sorted(row["tasks"] for row in last) == [["depth"], ["room"], ["segmentation"]]
    kind = {"fp32": "FLOAT", "fp16": "HALF"}[precision]
    assert {o["format"] for row in last for o in row["outputs"]} == {kind}
    files = {name: engine["files"][name] for name in ("model.onnx", "model.engine")}
    assert check_engine(engine, device_facts(rtx), files) == []


@pytest.mark.parametrize(
    ("spare_mib", "said"),
    [
        (96, "memory ran out while building"),  # TensorRT reports it
        (12, "as happens when memory|as it may when memory|memory ran out"),  # it aborts, or hangs
    ],
)
def test_a_real_build_that_runs_out_of_memory_is_one_sentence(
    rtx: Any, tiny_bundles: dict[str, Path], tmp_path: Path, spare_mib: int, said: str
) -> None:
    """Memory for the libraries and little more: the builder's own allocations fail."""
    folder = shutil.copytree(tiny_bundles["fp32"], tmp_path / "bundle")
    source = folder / "build_engine.py"
    text = source.read_text().replace("STANDS_STILL = 180.0", "STANDS_STILL = 5.0")
    limit = f"""\
    import resource, tensorrt_rtx
    _now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (_now + ({spare_mib} << 20),) * 2)
"""
    main = 'if __name__ == "__main__":\n'
    assert text.count(main) == 1
    source.write_text(text.replace(main, f'if "--in-this-process" in sys.argv:\n{limit}\n{main}'))
    result = subprocess.run(
        [sys.executable, source], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(rf"error: .*({said})", last), result.stderr
    assert "give a smaller --workspace or --batch, or add swap" in last
    assert not (folder / "engine.json").exists()


STAND_INS = {  # builders, in as many words, and what is said of each
    "import os; os.abort()": "the builder was ended by signal 6, as happens when memory runs out",
    "import os; os.kill(os.getpid(), 9)": "ended by signal 9",
    "import time; time.sleep(99)": "the builder stood still for 1 s, as it may when memory",
    "import sys; sys.exit(3)": "",
    "import time\nend = time.time() + 2\nwhile time.time() < end: pass": "",  # slow, but at work
}


@pytest.mark.parametrize("program", STAND_INS)
def test_a_builder_that_dies_or_hangs_is_one_sentence(
    tmp_path: Path, monkeypatch, program: str
) -> None:
    monkeypatch.setattr(engine_supervise, "STANDS_STILL", 1.0)
    (tmp_path / "program.py").write_text(program)
    if said := STAND_INS[program]:
        with pytest.raises(BuildProblem, match=said):
            engine_supervise.supervised(tmp_path / "program.py", [])
        return
    wanted = 3 if "exit(3)" in program else 0
    assert engine_supervise.supervised(tmp_path / "program.py", []) == wanted


def test_a_real_build_goes_through_the_monitor(
    rtx: Any, tiny_bundles: dict[str, Path], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(engine_progress, "TOLD_EVERY", -1.0)
    build(tiny_bundles["fp32"], None, rtx)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    for line in lines:
        step, most = map(int, line.rpartition("step ")[2].split(" of "))
        assert 1 <= step <= most, line


@pytest.mark.parametrize(
    ("operator", "changes", "said"),
    [
        ("Det", {}, "operator Det at node first (tasks: depth, seg"),
        ("Frobnicate", {"domain": "my.ops"}, "operator Frobnicate at node first"),
        ("Relu", {"shape": ("batch", 3, "height", 4)}, "only the batch may be dynamic"),
        ("Relu", {"shape": (2, 3, 4, 4)}, "fixed batch of 2: give --batch 2"),
    ],
)
def test_real_refusals(rtx: Any, tmp_path: Path, operator: str, changes: Any, said: str) -> None:
    write_builder(small_onnx(tmp_path, operator, **changes))
    with pytest.raises(BuildProblem) as stop:
        build(tmp_path, None, rtx)
    assert said in str(stop.value)


@pytest.mark.parametrize("data", [b"", b"not onnx at all"])
def test_a_real_refusal_of_what_is_no_onnx(rtx: Any, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(BuildProblem, match="not a readable ONNX file"):
        build(tmp_path, None, rtx)


def test_real_compute_capabilities(rtx: Any, tmp_path: Path) -> None:
    small_onnx(tmp_path)
    with pytest.raises(BuildProblem, match=r"cannot build for SM87.*SM86"):
        build(tmp_path, {"compute_capabilities": ["8.7"]}, rtx)
    assert build(tmp_path, {"compute_capabilities": ["8.6", "8.9"]}, rtx)["layers"] == 3


def test_the_builders_files_are_listed_in_the_manifest(tmp_path: Path) -> None:
    write_builder(small_onnx(tmp_path))
    for name in ("run.py", "check.npz", "plan.json", "recipe.yaml"):
        (tmp_path / name).touch()
    assert {"build_engine.py", "nodes.json"} <= set(file_records(tmp_path))
