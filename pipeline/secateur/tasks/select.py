"""Drop tasks and whatever only they need; the other outputs stay bit for bit the same."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, evaluating, named_outputs
from secateur.core.task import Task
from secateur.tasks.graph import eliminate
from secateur.tasks.stub import stub_unused

ROUNDING = 1e-5  # of an output's range


@runtime_checkable
class SelectsOutputs(Protocol):
    """A network that can build itself with fewer outputs, faster than we can by tracing."""

    def select_outputs(self, names: Collection[str]) -> nn.Module:
        """Return a copy that computes only these outputs."""
        ...


def select_tasks(
    model: MultiTaskModel, keep: Collection[str], example: Tensor | None = None
) -> MultiTaskModel:
    """Return a copy of ``model`` that computes only the tasks in ``keep``, in the model's order.

    A network with ``select_outputs`` does it itself. Any other is traced with torch.fx, and all
    that no kept output reads is removed, whatever its name. With an ``example`` (N, C, H, W) the
    kept outputs are compared bit for bit on random images (those of a network that selects by
    itself but for rounding, since a narrower layer may be computed by another kernel), and more is
    possible: concats lose the inputs that nobody reads, a network that torch.fx cannot trace has
    its unneeded parts replaced by zeros (`secateur.tasks.stub`). So it is with what no output at
    all is computed from.

    Raises:
        ModelError: the network cannot be traced, or an output changed.
    """
    tasks = tuple(task for task in model.tasks if task.name in keep)
    names = [task.output for task in tasks]
    if isinstance(model.network, SelectsOutputs):
        return _selected_by_itself(model, tasks, example)
    every = len(tasks) == len(model.tasks) and not _has_unnamed(model, names, example)
    if every and not _has_unread(model, example):
        return copy.deepcopy(model)
    try:
        selected = MultiTaskModel(eliminate(copy.deepcopy(model.network), names, example), tasks)
        selected.train(model.training)
        if example is None or _changed_task(model, selected, example) is None:
            return selected
    except ModelError:
        if example is None:
            raise
    if every:  # what nobody reads does no harm
        return copy.deepcopy(model)
    selected = stub_unused(model, keep, example)
    changed = _changed_task(model, selected, example)
    if changed is not None:
        raise ModelError(
            f"the model cannot be reduced to {', '.join(task.name for task in tasks)}: without "
            f"what the other tasks alone seem to use, {changed}",
            hint="give it a method select_outputs(names) that returns the smaller module, "
            "or keep all its tasks",
        )
    return selected


def _selected_by_itself(
    model: MultiTaskModel, tasks: Sequence[Task], example: Tensor | None
) -> MultiTaskModel:
    names, hint = [task.output for task in tasks], "correct its method select_outputs"
    try:
        network: object = cast(SelectsOutputs, model.network).select_outputs(names)
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"select_outputs({names}) failed: {error!r}", hint=hint) from error
    if not isinstance(network, nn.Module):
        returned = type(network).__name__
        raise ModelError(f"select_outputs({names}) returned {returned}, no nn.Module", hint=hint)
    selected = MultiTaskModel(network, tuple(tasks))
    changed = _changed_task(model, selected, example, ROUNDING) if example is not None else None
    if changed is not None:
        raise ModelError(f"after select_outputs({names}), {changed}", hint=hint)
    return selected


def _has_unnamed(model: MultiTaskModel, names: Collection[str], example: Tensor | None) -> bool:
    """Say whether ``forward`` gives outputs beyond ``names``, which no task of the user's reads."""
    if example is None:
        return False
    with evaluating(model):
        return not named_outputs(model.network(example)).keys() <= set(names)


def _has_unread(model: MultiTaskModel, example: Tensor | None) -> bool:
    """Say whether a layer runs that no output depends on, as far as gradients tell.

    One that takes no time, as one that never runs, is not worth a trace of the network; one that
    runs without gradients is the user's to freeze.
    """
    if example is None:
        return False
    ran: set[str] = set()
    layers = {name: module for name, module in model.named_modules()
              if isinstance(weight := getattr(module, "weight", None), Tensor)
              and weight.dim() > 1}  # fmt: skip
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, _i, name=name: ran.add(name) if torch.is_grad_enabled() else None
        )
        for name, module in layers.items()
    ]
    parameters = {name: parameter.detach().requires_grad_(parameter.is_floating_point())
                  for name, parameter in model.named_parameters()}  # fmt: skip
    wanted = [parameter for parameter in parameters.values() if parameter.requires_grad]
    try:
        with evaluating(model), torch.enable_grad():
            outputs = torch.func.functional_call(model, parameters, (example[:1],))
            moving = torch.stack([output.sum() for output in outputs.values()]).sum()
            found = torch.autograd.grad(moving, wanted, allow_unused=True)
    except Exception:  # the user's own code may take offence at other parameters: all stay then
        return False
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    unread = {name for name, gradient in zip(names, found, strict=True) if gradient is None}
    return any(f"{name}.weight" in unread for name in ran)


def _changed_task(
    model: MultiTaskModel, selected: MultiTaskModel, example: Tensor, slack: float = 0.0
) -> str | None:
    """Say how ``selected`` differs from ``model`` on random images; None if it does not.

    ``slack``: a difference, as a share of the output's largest value, that is none.
    """
    with evaluating(model), evaluating(selected):
        for images in _random_images(example):
            before = model(images)
            try:
                after = selected(images)
            except Exception as error:  # the user's own code meets zeros and may raise anything
                return f"forward fails: {error}"
            for name, tensor in after.items():
                if not _alike(tensor, before[name], slack):
                    return f"'{name}' changes"
    return None


def _alike(one: Tensor, other: Tensor, slack: float) -> bool:
    if one.shape != other.shape or not slack:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= slack * other.abs().max())


def _random_images(example: Tensor) -> Iterator[Tensor]:
    """Yield batches of 1, 2 and 4 images of normal noise, plain, dark and bright."""
    generator = torch.Generator().manual_seed(0)
    for batch, mean in ((1, 0.0), (2, -1.0), (4, 1.0)):
        noise = torch.randn((batch, *example.shape[1:]), generator=generator)
        yield (noise + mean).to(example)
