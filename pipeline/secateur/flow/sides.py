"""The models of a demonstration: a bundle, and its parent or whatever else it is shown beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from secateur.bench.wording import count, megabytes
from secateur.bundle.engine_errors import EngineProblem
from secateur.bundle.engine_run import EngineSession
from secateur.bundle.manifest import Cost, Manifest
from secateur.bundle.ncnn_run import NcnnProblem
from secateur.bundle.read import check_files, read_bundle
from secateur.bundle.runner import BundleMismatch, Runner
from secateur.core.errors import BundleError, SecateurError
from secateur.core.model import model_fingerprint
from secateur.flow.cache import StageCache
from secateur.flow.job import keep_tasks
from secateur.flow.parent import load_parent
from secateur.flow.recipe import Recipe, load_recipe, parse_recipe
from secateur.flow.stages import onnx_file
from secateur.runtimes.base import runtime_of

Run = Callable[[NDArray[np.float32]], Mapping[str, NDArray[np.float32]]]
RECIPES = {".yaml", ".yml"}
OURS = "secateur.zoo:"


@dataclass(frozen=True)
class Model:
    """Something that runs: ``run`` takes (1, C, H, W); ``contract`` says how pixels become that.

    ``kinds``: the kind and number of classes of each task it has.
    """

    title: str
    detail: str
    runtime: str
    contract: Mapping[str, Any]
    kinds: Mapping[str, tuple[str, int | None]]
    run: Run


def open_pair(
    folder: Path, against: Path | None, cache: StageCache
) -> tuple[Manifest, list[Model], list[str]]:
    """Return a bundle's manifest, what runs (the other one first), and what has to be said.

    ``against``: another bundle's folder, an ONNX file, or the parent's recipe. Without it, the
    parent of the bundle's own recipe; where that cannot be had, the bundle is alone.

    Raises:
        BundleError, VerifyError: a bundle is not whole, or the two have no task in common.
        SecateurError: what ``against`` names cannot be used.
    """
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    title = "cut" if manifest.precision == "fp32" else f"cut, {manifest.precision}"
    cut, notes = _bundle(folder, manifest, title), list[str]()
    if against is not None:
        other, found = _named(against, manifest, cache)
        _check_common(other, cut, against)
        notes += found
    else:
        try:
            recipe = parse_recipe(manifest.recipe, folder / "recipe.yaml")
            _check_ours(recipe)
            other, found = _parent(recipe, manifest, cache)
            notes += found
        except SecateurError as error:
            notes.append(
                f"the parent is not shown: {error.message}; give its recipe with --against"
            )
            return manifest, [cut], notes
    if other.runtime != cut.runtime:
        notes.append(f"two runtimes: {other.title} {other.runtime}, {cut.title} {cut.runtime}")
    return manifest, [other, cut], notes


def _check_ours(recipe: Recipe) -> None:
    """Raise unless a bundle's own recipe names a factory of ours: a bundle may be anybody's.

    Raises:
        BundleError: it would have any function of this machine called, with any arguments.
    """
    if not recipe.model.factory.startswith(OURS):
        raise BundleError(
            f"no bundle may say which code is run here, and its parent is made by "
            f"{recipe.model.factory}",
            hint="give a recipe of yours",
        )


def _named(against: Path, manifest: Manifest, cache: StageCache) -> tuple[Model, list[str]]:
    if against.is_dir():
        other = read_bundle(against)
        check_files(against, other)
        return _bundle(against, other, "/".join(against.resolve().parts[-2:])), []
    if not against.is_file():
        raise BundleError(
            f"there is no {against} to show the bundle beside",
            hint="give another bundle's folder, an ONNX file, or the parent's recipe",
        )
    if against.suffix in RECIPES:
        return _parent(load_recipe(against), manifest, cache)
    return _onnx(against, manifest, against.name, megabytes(against.stat().st_size)), []


def _bundle(folder: Path, manifest: Manifest, title: str) -> Model:
    try:
        session = Runner(folder, manifest.threads).session
    except EngineProblem as problem:
        raise BundleError(
            f"the engine in {folder} cannot run here: {problem}",
            hint="build it here with build_engine.py, or delete model.engine",
        ) from problem
    except (BundleMismatch, NcnnProblem) as problem:
        raise BundleError(
            f"{folder} cannot run here: {problem}",
            hint="its run.py says the same; install what it needs, or build the bundle again",
        ) from problem
    on_engine = isinstance(session, EngineSession)
    return Model(
        title=title,
        detail=_detail(manifest.cost),
        runtime="TensorRT" if on_engine else runtime_of(manifest.runtime).version(),
        contract=manifest.input.model_dump(),
        kinds={task.name: (task.kind, task.classes) for task in manifest.tasks},
        run=session.run,
    )


def _parent(recipe: Recipe, manifest: Manifest, cache: StageCache) -> tuple[Model, list[str]]:
    """Return the parent with the recipe's kept tasks, exported; and whether it may be another."""
    whole = load_parent(recipe)
    key, notes = model_fingerprint(whole), list[str]()
    selected, _ = keep_tasks(recipe, whole)
    path = onnx_file(selected, recipe.model.input.model_input(), cache, key)
    same = key == manifest.parent["fingerprint"]
    if not same:
        notes.append("the parent's weights or code are not those that the bundle was cut from")
    detail = _detail(manifest.cost_parent) if same else megabytes(path.stat().st_size)
    return _onnx(path, manifest, "parent", detail), notes


def _onnx(path: Path, manifest: Manifest, title: str, detail: str) -> Model:
    """Open an ONNX file of the bundle's own input, in the bundle's own runtime."""
    wanted = {task.name: task for task in manifest.tasks}
    image, outputs = _contract_of(path)
    shape = (manifest.input.channels, manifest.input.height, manifest.input.width)
    if image != shape:
        raise BundleError(
            f"{path} reads images of shape {image}, the bundle {shape}",
            hint="give a model of the same input, or a bundle, which brings its own preprocessing",
        )
    for name in outputs.keys() & wanted.keys():
        if outputs[name] != wanted[name].shape:
            raise BundleError(
                f"output '{name}' of {path} has shape {outputs[name]}, the bundle's has "
                f"{wanted[name].shape}",
                hint="give a model with the same outputs",
            )
    runtime = runtime_of(manifest.runtime)
    return Model(
        title=title,
        detail=detail,
        runtime=runtime.version(),
        contract=manifest.input.model_dump(),
        kinds={n: (wanted[n].kind, wanted[n].classes) for n in outputs if n in wanted},
        run=runtime.open_session(path, manifest.threads).run,
    )


def _contract_of(path: Path) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Return the shapes, without the batch, of an ONNX file's image and of its outputs."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's decoding errors share no base with onnx's own
        raise BundleError(
            f"{path} is no ONNX file", hint="give model.onnx, a bundle's folder or a recipe"
        ) from error
    constants = {tensor.name for tensor in graph.initializer}
    images = [_shape(value) for value in graph.input if value.name not in constants]
    if len(images) != 1:
        raise BundleError(
            f"{path} has {len(images)} inputs, expected one image",
            hint="export it with one input of shape (batch, channels, height, width)",
        )
    return images[0], {value.name: _shape(value) for value in graph.output}


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(int(d.dim_value) for d in value.type.tensor_type.shape.dim)[1:]


def _check_common(other: Model, cut: Model, against: Path) -> None:
    common = other.kinds.keys() & cut.kinds.keys()
    if not common:
        raise BundleError(
            f"{against} has none of the bundle's tasks: {', '.join(cut.kinds)}",
            hint="give a model that has at least one of them, its output named like the task",
        )
    for task in sorted(common):
        if other.kinds[task] != cut.kinds[task]:
            raise BundleError(
                f"task '{task}' is {_kind(other.kinds[task])} in {against}, "
                f"{_kind(cut.kinds[task])} in the bundle",
                hint="give a model of the same tasks",
            )


def _kind(kind: tuple[str, int | None]) -> str:
    return kind[0] if kind[1] is None else f"{kind[0]} of {kind[1]} classes"


def _detail(cost: Cost) -> str:
    return f"{count(cost.macs)} MACs, {megabytes(cost.onnx_bytes)}"
