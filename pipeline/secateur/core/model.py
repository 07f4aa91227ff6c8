"""The multi-task model: any ``nn.Module`` seen as images in, one tensor per task out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.core.errors import ModelError
from secateur.core.source import source_files
from secateur.core.task import Task


@dataclass(frozen=True)
class ModelInput:
    """What the network expects: RGB (or BGR) images scaled to 0..1, then ``(x - mean) / std``."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str = "RGB"

    def example(self, batch: int = 1, *, seed: int = 0) -> Tensor:
        """Return a (batch, C, H, W) tensor of standard normal noise."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, self.channels, self.height, self.width, generator=generator)


class MultiTaskModel(nn.Module):
    """Wraps a module that returns a dict or a tuple; ``forward`` gives ``{task name: tensor}``.

    For a tuple, a task's ``output`` is its position (``"0"``, ``"1"``, …).

    Raises:
        ModelError: ``forward`` gives neither a dict nor a tuple, or lacks a task's output.
    """

    def __init__(self, network: nn.Module, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.network = network
        self.tasks = tuple(tasks)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return one tensor per task for (N, C, H, W) images."""
        outputs = named_outputs(self.network(images))
        missing = [task for task in self.tasks if task.output not in outputs]
        if missing:
            raise ModelError(
                f"task '{missing[0].name}' reads output '{missing[0].output}', "
                f"which forward does not return; it returns {', '.join(sorted(outputs))}",
                hint="set tasks.<name>.output to one of the names above",
            )
        return {task.name: outputs[task.output] for task in self.tasks}


def named_outputs(raw: object) -> Mapping[str, Tensor]:
    """Return ``forward``'s result as a mapping; a tuple's entries are named by position.

    Raises:
        ModelError: it is neither a dict nor a tuple or list nor a tensor.
    """
    if isinstance(raw, Mapping):
        return raw
    if isinstance(raw, tuple | list):
        return {str(position): tensor for position, tensor in enumerate(raw)}
    if isinstance(raw, Tensor):
        return {"0": raw}
    raise ModelError(
        f"forward returned {type(raw).__name__}, expected a dict[str, Tensor] or a tuple",
        hint="wrap the model so that forward returns one tensor per task",
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode without gradients for a block, then restore its mode.

    Attention runs in its parts: torch's fused path of nn.MultiheadAttention hides its layers from
    hooks and its products from counters.
    """
    was_training, fused = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), attributes_kept(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        model.train(was_training)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward stores of its tensors on its modules (``self.features = x``).

    A copy of the model shall not hold a graph of autograd, nor its fingerprint depend on the images
    that it saw last.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, known in before:
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value is not known.get(name):
                    if name in known:
                        setattr(module, name, known[name])
                    else:
                        delattr(module, name)


def check_outputs(model: MultiTaskModel, example: Tensor) -> dict[str, Tensor]:
    """Run ``model`` once and return its outputs.

    Raises:
        ModelError: an output holds NaN or infinity.
    """
    with evaluating(model):
        outputs: dict[str, Tensor] = model(example)
    for name, tensor in outputs.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ModelError(
                f"the parent's output for task '{name}' has {bad} NaN or infinite values "
                f"of {tensor.numel()} on a plain noise image",
                hint="check the checkpoint and the model's input mean and std",
            )
    return outputs


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the architecture, the code and attributes of its modules, and all weights.

    Code and attributes count because two models of the same layers may differ in ``forward``, in
    what that calls, or in a factor that it reads alone; where the code is installed does not.
    """
    digest = hashlib.sha256(repr(model).encode())
    for code in sorted(file.read_bytes() for file in source_files(model)):
        digest.update(code)
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            digest.update(module.code.encode())  # its class has no file
        for name, value in sorted(vars(module).items()):
            if name not in _OF_EVERY_MODULE:
                _note_attribute(f"{path}.{name}", value, tensors, digest.update)
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()[:20]


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # ``training``, and what torch keeps there


def _note_attribute(
    path: str, value: object, tensors: dict[str, Tensor], note: Callable[[bytes], None]
) -> None:
    """Note what of an attribute is the same in every process: numbers, text, arrays, functions."""
    if isinstance(value, Tensor):
        tensors[path] = value
    elif isinstance(value, np.ndarray):
        note(f"{path}={value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (tuple, list)):
        note(f"{path}:{len(value)}".encode())
        for number, each in enumerate(value):
            _note_attribute(f"{path}.{number}", each, tensors, note)
    elif isinstance(value, dict):
        for key, each in value.items():
            _note_attribute(f"{path}.{key}", each, tensors, note)
    elif isinstance(value, partial):
        parts = {"function": value.func, "inputs": value.args, "named": value.keywords}
        _note_attribute(path, parts, tensors, note)
    elif value is None or isinstance(value, (bool, int, float, str)):
        note(f"{path}={value!r}".encode())
    elif callable(value) and not isinstance(value, nn.Module):
        known = [getattr(value, part, "") for part in ("__module__", "__qualname__")]
        note(f"{path}={known}".encode())


def output_difference(
    model: MultiTaskModel,
    other: MultiTaskModel,
    images: Tensor,
    layers: Mapping[str, Sequence[int] | None] = MappingProxyType({}),
) -> float:
    """Return how far any output of ``other`` is off, as a share of that output's largest value.

    Outputs of ``layers``, convolutions and linear ones by name, are compared as well: what follows
    may hide a difference, as a ReLU does that gives nothing but zeros. To each the channels are
    told that ``other`` still has, or None where it has all.
    """
    wanted = _outputs(model, images, layers)
    given = _outputs(other, images, dict.fromkeys(layers))
    off = [
        (wanted[name] - given[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-30)
        for name in wanted
        if wanted[name].numel()
    ]
    return float(torch.stack(off).max())  # NaN where any is


def _outputs(
    model: MultiTaskModel, images: Tensor, layers: Mapping[str, Sequence[int] | None]
) -> dict[str, Tensor]:
    """Return the outputs by task, and of each call of a layer those of the channels told."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        axis, channels = 1 if isinstance(module, nn.Conv2d) else -1, layers[name]
        stay = range(output.shape[axis]) if channels is None else channels
        # a copy: an activation may follow in place
        kept = output.index_select(axis, torch.tensor(stay, device=output.device))
        found[f"{name}, call {len(found)}"] = kept

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, _, output, name=name: note(name, module, output)
        )
        for name in layers
    ]
    try:
        with evaluating(model):
            outputs: dict[str, Tensor] = model(images)
        return outputs | found
    finally:
        for hook in hooks:
            hook.remove()


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable and frozen parameters (buffers not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())
