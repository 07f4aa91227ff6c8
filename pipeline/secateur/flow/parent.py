"""Get the user's parent: call the factory, load the checkpoint, say what does not fit."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, check_outputs
from secateur.flow.recipe import Recipe


def load_parent(recipe: Recipe) -> MultiTaskModel:
    """Return the recipe's model with its weights, in eval mode, checked on one noise image.

    Raises:
        ModelError: the factory fails, the checkpoint does not fit, an output is missing or not
            finite.
    """
    network = _call_factory(recipe)
    if recipe.model.checkpoint is not None:
        _load_checkpoint(network, recipe.find_file(recipe.model.checkpoint))
    model = MultiTaskModel(network, recipe.all_tasks()).eval()
    example = recipe.model.input.model_input().example()
    try:
        check_outputs(model, example)
    except RuntimeError as error:
        raise ModelError(
            f"forward fails on an input of shape {tuple(example.shape)}: {error}",
            hint="check model.input.shape (channels, height, width)",
        ) from error
    return model


def _call_factory(recipe: Recipe) -> nn.Module:
    module_name, function_name = recipe.model.factory.split(":")
    folder = str(recipe.path.parent.resolve())
    if folder not in sys.path:  # the user's own model file lies beside the recipe
        sys.path.insert(0, folder)
    try:
        factory: Callable[..., nn.Module] = getattr(
            importlib.import_module(module_name), function_name
        )
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"model.factory: cannot import '{recipe.model.factory}': {error}",
            hint="write it as module:function, importable from the recipe's folder",
        ) from error
    try:
        network = factory(**recipe.model.arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(
            f"model.factory: {recipe.model.factory} failed: {error}",
            hint="call it yourself with model.arguments",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"model.factory: {recipe.model.factory} returned {type(network).__name__}",
            hint="it must return an nn.Module",
        )
    return network


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
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}",
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


def _load_checkpoint(network: nn.Module, path: Path) -> None:
    given = {key.removeprefix("module."): value for key, value in read_checkpoint(path).items()}
    wanted = network.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing = sorted(wanted.keys() - given.keys() - counters)
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
