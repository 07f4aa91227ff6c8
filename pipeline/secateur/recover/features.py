"""Feature distillation without projections: attention maps of layers that both networks have."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel


@contextmanager
def captured(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the tensors that modules return in the block, in order of completion.

    ``names`` are the modules to watch, all by default. A module called twice counts as last seen.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            seen.pop(name, None)
            seen[name] = output

    wanted = [name for name, _ in model.named_modules() if name] if names is None else names
    with ExitStack() as hooks:
        for name in wanted:
            module = model.get_submodule(name)
            hook = module.register_forward_hook(lambda _m, _i, out, n=name: keep(n, out))
            hooks.callback(hook.remove)
        yield seen


def attention_points(
    model: MultiTaskModel, parent: MultiTaskModel, example: Tensor
) -> tuple[str, ...]:
    """Choose the modules whose maps are compared: the last one of each spatial size.

    Candidates have the same name and the same positions in both networks, more than one position,
    and stand at the end of a stage: none lies inside a module that gives another size, as the
    first half of a strided block does. Of these, only those that most of the parent's tasks
    depend on count, which is the trunk wherever tasks share one.

    Raises:
        ModelError: the two networks have no such module.
    """
    mine, _ = _record(model, example)
    theirs, tasks = _record(parent, example)
    shared = [
        name
        for name, tensor in theirs.items()
        if name in mine
        and math.prod(_places(tensor)) > 1
        and _places(tensor) == _places(mine[name])
        and all(_places(theirs[outer]) == _places(tensor) for outer in _around(name, theirs))
    ]
    most = max((tasks[name] for name in shared), default=0)
    if not most:
        raise ModelError(
            "the parent and the network have no layer in common whose maps could be compared",
            hint="set recover.feature_distill to 0",
        )
    last = {_places(theirs[name]): name for name in shared if tasks[name] == most}
    return tuple(last.values())


def _around(name: str, seen: Collection[str]) -> list[str]:
    """Return those of ``seen`` that contain the module ``name``."""
    return [outer for outer in seen if name.startswith(f"{outer}.")]


def attention_distance(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over modules and images of ``||q - q'||^2``, in 0..2.

    ``q`` is the attention map scaled to length 1 (Zagoruyko & Komodakis, ICLR 2017, arXiv
    1612.03928, eq. 1 with p = 2, and eq. 2): it needs no equal number of channels.
    """
    distances = [
        (_attention(tensor) - _attention(theirs[name])).square().sum(1).mean()
        for name, tensor in mine.items()
    ]
    return torch.stack(distances).mean()


def _attention(tensor: Tensor) -> Tensor:
    """(N, C, H, W) maps or (N, L, C) tokens -> (N, positions), each of length 1."""
    energy = tensor.float().square().mean(1 if tensor.dim() == 4 else 2)
    return functional.normalize(energy.flatten(1), dim=1)


def _places(tensor: Tensor) -> tuple[int, ...]:
    """Return the sizes along which positions are laid out; () where there are none."""
    shape = tuple(tensor.shape)
    return {4: shape[2:], 3: shape[1:2]}.get(len(shape), ())


def _record(model: MultiTaskModel, example: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return each module's output on ``example``, and how many tasks depend on it."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Frozen layers count too, so the gradient starts at the image.
    images = example.detach().to(device).requires_grad_()
    with captured(model) as seen, torch.enable_grad():
        outputs = model(images)
    model.train(was_training)
    counts = dict.fromkeys(seen, 0)
    # A grid of coordinates, say, depends on no image: no task depends on it.
    moving = {name: tensor for name, tensor in seen.items() if tensor.requires_grad}
    for output in outputs.values():
        found = torch.autograd.grad(
            output.sum(), list(moving.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(moving, found, strict=True):
            counts[name] += gradient is not None
    return {name: tensor.detach() for name, tensor in seen.items()}, counts
