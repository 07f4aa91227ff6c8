"""Get the user's parent: call the factory, load the checkpoint, say what does not fit."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.core.errors import ModelError, first_line
from secateur.core.model import MultiTaskModel, check_outputs
from secateur.core.task import Task
from secateur.data.labels import DENSE
from secateur.flow.recipe import Recipe

SUMS_TO_ONE = 1e-3  # how far from it the sum of probabilities may be
LFS = b"version https://git-lfs"


def load_parent(recipe: Recipe) -> MultiTaskModel:
    """Return the recipe's model with its weights, in eval mode, checked on one noise image and two.

    Raises:
        ModelError: the factory fails, the checkpoint does not fit, an output is missing or not
            finite.
    """
    network = new_network(recipe)
    if recipe.model.checkpoint is not None:
        load_checkpoint(network, recipe.find_file(recipe.model.checkpoint))
    return checked_model(recipe, network)


def checked_model(recipe: Recipe, network: nn.Module) -> MultiTaskModel:
    """Return the network with the recipe's tasks, in eval mode, tried on noise.

    Raises:
        ModelError: forward fails, or an output is missing, not finite or of a wrong shape.
    """
    model = MultiTaskModel(network, recipe.all_tasks()).eval()
    example = recipe.model.input.model_input().example()
    try:
        outputs = check_outputs(model, example)
        example = torch.cat([example, example])  # training and scoring take several at once
        check_outputs(model, example)
    except ModelError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(
            f"forward fails on an input of shape {tuple(example.shape)}: {error!r}",
            hint="check model.input.shape (channels, height, width), and that forward takes a "
            "batch of any size",
        ) from error
    for task in model.tasks:
        _check_channels(task, outputs[task.name])
        _check_logits(task, outputs[task.name])
    return model


def _check_channels(task: Task, output: Tensor) -> None:
    """Compare an output's channels with what the task's kind and classes need."""
    wanted = {"depth": 1, "normals": 3, "edges": 1}.get(task.kind, task.classes)
    dense = task.kind in DENSE
    right = (output.dim() == 4) == dense and output.dim() >= 2
    if not right or wanted not in (None, output.shape[1]):
        form = "(N, C, h, w)" if dense else "(N, C)"
        raise ModelError(
            f"task '{task.name}' ({task.kind}) has an output of shape {tuple(output.shape)}, "
            f"expected {form} with C = {wanted if wanted is not None else 'any'}",
            hint="correct tasks.<name>.output, kind or classes",
        )


def _check_logits(task: Task, output: Tensor) -> None:
    """Raise where an output of classes or edges is of probabilities: losses are of logits.

    Gradients of a loss that takes them for logits hardly tell channels apart.
    """
    last = {"segmentation": "softmax", "classification": "softmax", "edges": "sigmoid"}
    if task.kind not in last or bool((output < 0).any()):
        return
    if task.kind == "edges":
        probable = bool(((output > 0) & (output < 1)).all())
    else:
        probable = output.shape[1] > 1 and bool(((output.sum(1) - 1).abs() < SUMS_TO_ONE).all())
    if probable:
        raise ModelError(
            f"task '{task.name}' ({task.kind}) has an output of probabilities, expected logits",
            hint=f"leave the last {last[task.kind]} out of forward; run.py --full-size gives "
            "probabilities all the same",
        )


def new_network(recipe: Recipe) -> nn.Module:
    """Call the recipe's factory.

    Raises:
        ModelError: it cannot be imported, fails or returns no module.
    """
    module_name, function_name = recipe.model.factory.split(":")
    try:
        module = _import_factory(module_name, recipe.path.parent.resolve())
        factory: Callable[..., nn.Module] = getattr(module, function_name)
    except Exception as error:  # the user's own module may raise anything
        hint = "write it as module:function, importable from the recipe's folder"
        if isinstance(error, ModuleNotFoundError) and error.name != module_name.partition(".")[0]:
            hint = f"what it imports has to be installed: is '{error.name}'?"
        said = error if isinstance(error, (ImportError, AttributeError)) else repr(error)
        raise ModelError(
            f"model.factory: cannot import '{recipe.model.factory}': {said}", hint=hint
        ) from error
    try:
        network = factory(**recipe.model.arguments)
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(
            f"model.factory: {recipe.model.factory} failed: {error!r}",
            hint="call it yourself with model.arguments",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"model.factory: {recipe.model.factory} returned {type(network).__name__}",
            hint="it must return an nn.Module",
        )
    return network


def _import_factory(name: str, folder: Path) -> ModuleType:
    """Import a module by name; a file of that name beside the recipe comes first, but for ours.

    A recipe out of a bundle may name ours alone, and what lies in a bundle may be anybody's.
    """
    if name.partition(".")[0] == "secateur":
        return importlib.import_module(name)
    if str(folder) not in sys.path:  # what that file imports may lie there too
        sys.path.append(str(folder))
    file = folder / f"{name}.py"
    if not file.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # another recipe's module of the same name is replaced
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file with weights only (no pickle).

    Raises:
        ModelError: the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _check_is_checkpoint(path, error)
        raise ModelError(
            f"cannot read the checkpoint {path}: it holds more than tensors, and objects are never "
            "unpickled",
            hint="save the weights alone where you trained it: torch.save(model.state_dict(), "
            f"'{path.name}')",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError,
            AttributeError) as error:  # fmt: skip
        _check_is_checkpoint(path, error)
        raise ModelError(
            f"cannot read the checkpoint {path}: {first_line(error)}",
            hint="save the state dict with safetensors, or with torch.save(model.state_dict())",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(
            f"{path} holds no state dict", hint="save it with torch.save(model.state_dict())"
        )
    return loaded


def _check_is_checkpoint(path: Path, error: Exception) -> None:
    """Raise ModelError where a file is none that torch or safetensors wrote."""
    try:
        with path.open("rb") as stream:
            first = stream.read(64)
    except OSError:
        return
    torch_file = first.startswith((b"PK\x03\x04", b"\x80"))  # a zip, or an old pickle
    if torch_file or (path.suffix == ".safetensors" and not first.startswith(LFS)):
        return
    hint = "give what torch.save(model.state_dict(), path) or safetensors wrote"
    if first[8:9] == b"{":
        hint = "if safetensors wrote it, let its name end in .safetensors"
    if first.startswith(LFS):
        hint = "it stands for a large file that is not here: get it with `git lfs pull`"
    raise ModelError(
        f"{path} is no checkpoint: it begins with {first[:24]!r}", hint=hint
    ) from error


def _without_prefix(given: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Return weights without what a wrapper (DataParallel, Lightning) put before every name.

    Only where the names then are those that are wanted.
    """
    first = next(iter(given), "")
    for prefix in (first[: dot + 1] for dot, letter in enumerate(first) if letter == "."):
        if all(key.startswith(prefix) for key in given):
            bare = {key.removeprefix(prefix): value for key, value in given.items()}
            if bare.keys() <= {*wanted}:
                return bare
    return given


def load_checkpoint(network: nn.Module, path: Path, others: Collection[str] = ()) -> None:
    """Put a file's weights into ``network``; names in ``others`` may be there too, and are left.

    Raises:
        ModelError: the file cannot be read, or its names or shapes are not the network's.
    """
    wanted = network.state_dict()
    given = _without_prefix(read_checkpoint(path), {*wanted, *others})
    given = {key: value for key, value in given.items() if key in wanted or key not in others}
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    # A traced part holds what forward makes a constant of, under names of the trace's own.
    known = {*others} or {*wanted}
    missing = sorted((wanted.keys() & known) - given.keys() - counters)
    unexpected = sorted(given.keys() - wanted.keys())
    wrong = [key for key in wanted.keys() & given.keys() if wanted[key].shape != given[key].shape]
    if wrong:
        key = min(wrong)
        raise ModelError(
            f"{path.name} is of another architecture: {len(wrong)} weights differ in shape, first "
            f"'{key}' with {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}",
            hint="use the factory and arguments the checkpoint was trained with",
        )
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} keys (first '{keys[0]}')"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ModelError(
            f"{path.name} does not fit the model: {' and '.join(parts)}",
            hint="use the factory and arguments the checkpoint was trained with",
        )
    network.load_state_dict({k: v.to(wanted[k].dtype) for k, v in given.items()}, strict=False)
