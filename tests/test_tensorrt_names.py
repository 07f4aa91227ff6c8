"""Every TensorRT name, argument and enum member that travels is in the wheels it must run with.

The inventories under ``tensorrt_names/`` and ``cuda_names/`` are made by ``inventory.py`` there.
"""

from __future__ import annotations

import ast
import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from secateur.bundle import build_engine, engine_cuda, runner
from secateur.bundle.write import stand_alone
from tensorrt_fake import INVENTORIES, fits

SOURCES = {"build_engine": stand_alone(build_engine), "run": stand_alone(runner)}
BOTH = "\n".join(SOURCES.values())
CUDA = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "cuda_names").glob("*.json"))
}
# In the travelling files a variable of one of these names holds that TensorRT object, no other:
CLASS_OF = {
    "builder": "Builder", "cache": "ITimingCache", "config": "IBuilderConfig",
    "context": "IExecutionContext", "fault": "ParserError", "inspector": "EngineInspector",
    "layer": "ILayer", "network": "INetworkDefinition", "opened": "ICudaEngine",
    "parser": "OnnxParser", "profile": "IOptimizationProfile", "runtime": "Runtime",
    "tensor": "ITensor",
}  # fmt: skip
# Of paths, hashes, arrays …
PYTHONS_OWN = {"__name__", "__members__", "name", "type", "logger", "update", "dtype", "nbytes"}
ARRAYS_OWN = {"shape"}  # only the runner has arrays
VERSIONED = "Differences"  # the one class where names may be missing in some versions


class Uses(ast.NodeVisitor):
    """Collects what a text uses of TensorRT: (variable, chain of names, node, class it is in)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, list[str], ast.Attribute, str]] = []
        self.strays: list[str] = []
        self.calls: dict[int, ast.Call] = {}
        self.place = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.place = self.place, node.name
        self.generic_visit(node)
        self.place = before

    def visit_Call(self, node: ast.Call) -> None:
        self.calls[id(node.func)] = node
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            names.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name) and base.id in {"trt", *CLASS_OF}:
            if isinstance(node.value, ast.Name) or base.id == "trt":
                self.found.append((base.id, names, node, self.place))
        elif node.attr in tensorrt_members() - PYTHONS_OWN:
            self.strays.append(ast.unparse(node))
        self.generic_visit(node)


def tensorrt_members() -> set[str]:
    return {name for inventory in INVENTORIES.values() for kind in inventory["classes"].values()
            for name in kind}  # fmt: skip


def uses(source: str) -> Uses:
    visitor = Uses()
    visitor.visit(ast.parse(source))
    return visitor


def problems(source: str, inventory: dict[str, Any]) -> Iterator[str]:
    """Names, arguments and enum members that ``source`` uses and ``inventory`` lacks."""
    visitor = uses(source)
    for variable, names, node, place in visitor.found:
        if place == VERSIONED:
            continue
        text = ast.unparse(node)
        if variable == "trt":
            if not in_module(names, inventory):
                yield text
            continue
        entry = inventory["classes"][CLASS_OF[variable]].get(names[0])
        call = visitor.calls.get(id(node))
        if entry is None:
            yield text
        elif isinstance(node.ctx, ast.Store):
            if entry != "read write":
                yield f"{text} cannot be set"
        elif isinstance(entry, list) != (call is not None):
            yield f"{text} is {'a method' if isinstance(entry, list) else 'no method'}"
        elif call and not any(isinstance(argument, ast.Starred) for argument in call.args):
            keywords = {str(keyword.arg) for keyword in call.keywords}
            if not fits(entry, len(call.args), keywords):
                yield f"{ast.unparse(call)} does not fit {entry}"


def in_module(names: list[str], inventory: dict[str, Any]) -> bool:
    """Whether ``trt.A.B`` exists: A in the module, B in the class or the enum."""
    if names[0] in PYTHONS_OWN:
        return True
    if names[0] not in inventory["module"]:
        return False
    inside = {**inventory["classes"], **inventory["enums"]}[names[0]] if names[1:] else {}
    return not names[1:] or names[1] in inside or names[1] in PYTHONS_OWN


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", sorted(INVENTORIES))
def test_every_name_and_argument_exists(name: str, source: str) -> None:
    assert list(problems(SOURCES[source], INVENTORIES[name])) == []


def test_the_check_sees_enough_to_mean_something() -> None:
    assert uses(SOURCES["build_engine"]).strays == []
    strays = uses(SOURCES["run"]).strays
    assert {text.rsplit(".")[-1] for text in strays} == ARRAYS_OWN
    found = uses(BOTH).found
    assert {variable for variable, *_ in found} == {"trt", *CLASS_OF}
    assert len(found) > 80


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_names_of_inlined_files_do_not_hide_each_other(source: str) -> None:
    names = [node.name for node in ast.parse(source).body
             if isinstance(node, ast.FunctionDef | ast.ClassDef)]  # fmt: skip
    names += [target.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
              for target in ast.walk(node.targets[0]) if isinstance(target, ast.Name)]  # fmt: skip
    assert sorted(names) == sorted(set(names))
    assert "from secateur" not in source


def test_names_that_differ_by_version_are_each_in_one_version_at_least() -> None:
    for variable, names, _, place in uses(BOTH).found:
        if place == VERSIONED:
            kind = CLASS_OF.get(variable)
            assert any(
                names[0] in inventory["classes"][kind] if kind else in_module(names, inventory)
                for inventory in INVENTORIES.values()
            ), names


@pytest.mark.parametrize(
    ("code", "version", "said"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "tensorrt_11.4", "trt.BuilderFlag.FP16"),
        ("config.int8_calibrator = None", "tensorrt_11.4", "config.int8_calibrator"),
        ("builder.build_cuda_engine(network)", "tensorrt_10.3", "builder.build_cuda_engine"),
        ("config.set_timing_cache(cache)", "tensorrt_10.3", "does not fit"),
        ("config.set_timing_cache(cache, ignore=True)", "tensorrt_10.3", "does not fit"),
        ("network.num_layers()", "tensorrt_10.3", "is no method"),
        ("network.num_layers = 3", "tensorrt_10.3", "cannot be set"),
        ("trt.nptype2", "tensorrt_10.16", "trt.nptype2"),
        ("config.num_compute_capabilities", "tensorrt_10.16", "num_compute_capabilities"),
    ],
)
def test_the_check_catches_what_a_version_lacks(code: str, version: str, said: str) -> None:
    (found,) = problems(code, INVENTORIES[version])
    assert said in found
    assert list(problems("config.set_timing_cache(cache, False)", INVENTORIES[version])) == []


def test_a_tensorrt_call_on_a_variable_of_another_name_is_a_stray() -> None:
    assert uses("thing.set_memory_pool_limit(1, 2)").strays == ["thing.set_memory_pool_limit"]


def test_words_that_are_compared_with_enum_members_exist() -> None:
    for inventory in INVENTORIES.values():
        severities = inventory["enums"]["ILogger.Severity"]
        assert {"WARNING", "ERROR", "INTERNAL_ERROR"} <= set(severities)
        codes = inventory["enums"]["ErrorCode"]
        assert {"MODEL_DESERIALIZE_FAILED", "UNSUPPORTED_NODE"} <= set(codes)


def test_the_strongly_typed_flag_is_not_the_same_number_everywhere() -> None:
    numbers = {
        name: inventory["enums"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
        for name, inventory in INVENTORIES.items()
    }
    assert numbers == {
        "tensorrt_10.3": 1, "tensorrt_10.13": 1, "tensorrt_10.16": 1,
        "tensorrt_11.4": 0, "tensorrt_rtx_1.7": 0,
    }  # fmt: skip


# -- CUDA

C_TYPES = {  # a handle is a pointer to something nobody looks into
    "void *": engine_cuda.HANDLE, "const void *": engine_cuda.HANDLE, "size_t": engine_cuda.SIZE,
    "cudaStream_t": engine_cuda.HANDLE, "cudaGraph_t": engine_cuda.HANDLE,
    "cudaGraphExec_t": engine_cuda.HANDLE, "enum cudaMemcpyKind": engine_cuda.NUMBER,
    "enum cudaStreamCaptureMode": engine_cuda.NUMBER, "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong, "void **": engine_cuda.OUT,
    "cudaStream_t *": engine_cuda.OUT, "cudaGraph_t *": engine_cuda.OUT,
    "cudaGraphExec_t *": engine_cuda.OUT, "cudaEvent_t": engine_cuda.HANDLE,
    "cudaEvent_t *": engine_cuda.OUT, "float *": engine_cuda.REAL,
}  # fmt: skip


def inputs_of(types: Sequence[object]) -> list[object]:
    """Of a function's arguments those that are not for what it gives back."""
    return [kind for kind in types if kind not in (engine_cuda.OUT, engine_cuda.REAL)]


@pytest.mark.parametrize("name", sorted(CUDA))
def test_every_cuda_function_has_the_types_of_the_header_and_of_cuda_python(name: str) -> None:
    for function, types in engine_cuda.FUNCTIONS.items():
        assert [C_TYPES[text] for text in CUDA[name]["c"][function]] == list(types), function
        assert len(CUDA[name]["python"][function]) == len(inputs_of(types)), function
    for function, (place, kind) in engine_cuda.ENUMS.items():
        assert f"enum {kind}" == CUDA[name]["c"][function][place]
    members = {name: number for kind in CUDA[name]["enums"].values()
               for name, number in kind.items()}  # fmt: skip
    assert members["cudaMemcpyHostToDevice"] == engine_cuda.HOST_TO_DEVICE
    assert members["cudaMemcpyDeviceToHost"] == engine_cuda.DEVICE_TO_HOST
    assert members["cudaStreamCaptureModeThreadLocal"] == engine_cuda.THREAD_LOCAL
    assert members["cudaErrorMemoryAllocation"] == engine_cuda.OUT_OF_MEMORY
    no_driver = ("InitializationError", "InsufficientDriver", "DevicesUnavailable", "NoDevice",
                 "InvalidDevice", "Unknown")  # fmt: skip
    assert {members[f"cudaError{word}"] for word in no_driver} == set(engine_cuda.NO_DRIVER)


def test_every_cuda_call_names_a_known_function_with_all_of_its_inputs() -> None:
    calls = [node for node in ast.walk(ast.parse(SOURCES["run"])) if isinstance(node, ast.Call)
             and ast.unparse(node.func) in ("cuda", "self.cuda")
             and isinstance(node.args[0], ast.Constant)]  # fmt: skip
    calls += [node for node in ast.walk(ast.parse(SOURCES["run"])) if isinstance(node, ast.Tuple)
              and str(getattr(node.elts[0] if node.elts else None, "value", "")).startswith("cuda")
              and isinstance(node.ctx, ast.Load) and len(node.elts) == 2
              and not isinstance(node.elts[1], ast.Constant)]  # fmt: skip
    words = [node.args if isinstance(node, ast.Call) else node.elts for node in calls]
    for name, *inputs in words:
        types = engine_cuda.FUNCTIONS[name.value]
        assert len(inputs) == len(inputs_of(types))
    assert {name.value for name, *_ in words} == set(engine_cuda.FUNCTIONS)
