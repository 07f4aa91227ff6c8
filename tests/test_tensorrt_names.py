"""Every TensorRT name, argument and enum member that travels is in the wheels it must run with.

The inventories under ``tensorrt_names/`` are made by ``inventory.py`` there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest
from secateur.bundle import build_engine
from secateur.bundle.write import stand_alone
from tensorrt_fake import INVENTORIES, fits

SOURCE = stand_alone(build_engine)
# In the travelling files a variable of one of these names holds that TensorRT object, no other:
CLASS_OF = {
    "builder": "Builder", "cache": "ITimingCache", "config": "IBuilderConfig",
    "fault": "ParserError", "inspector": "EngineInspector", "layer": "ILayer",
    "network": "INetworkDefinition", "opened": "ICudaEngine", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "tensor": "ITensor",
}  # fmt: skip
PYTHONS_OWN = {"__name__", "__members__", "name", "type", "logger", "update"}  # of paths, hashes …
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


@pytest.mark.parametrize("name", sorted(INVENTORIES))
def test_every_name_and_argument_exists(name: str) -> None:
    assert list(problems(SOURCE, INVENTORIES[name])) == []


def test_the_check_sees_enough_to_mean_something() -> None:
    visitor = uses(SOURCE)
    assert visitor.strays == []
    assert {variable for variable, *_ in visitor.found} == {"trt", *CLASS_OF}
    assert len(visitor.found) > 50


def test_names_that_differ_by_version_are_each_in_one_version_at_least() -> None:
    for variable, names, _, place in uses(SOURCE).found:
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
