"""Whether channels can go is tried, not guessed.

A dependency graph knows layers; a model may also reshape by numbers it was built with, split,
shuffle or multiply channels. So channels of every group are removed for trial: the network must
still run, and compute what it computes when nobody reads them: its outputs, and what each layer
makes that reads a group, since what follows may hide a difference. Single ones first: two might
come from two heads of attention and leave them equally wide by chance. Groups that do not pass stay
whole.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.bent import bent_difference
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.progress import track
from secateur.prune.narrow import drop_channels

TOLERANCE = 1e-4  # of an output's largest value


def removable(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> tuple[ChannelGroup, ...]:
    """Return the groups whose channels can go, all of them together.

    Norms that measure over channels are left out of the comparison: what they measure changes with
    any cut. One trial if all pass, else groups that do not are found by halving.
    """
    scales = _norm_scales(model, example)
    if _passes(model, groups, example, scales):
        return tuple(groups)
    known: list[ChannelGroup] = []
    undecided = [list(groups)]

    def decided() -> Iterator[ChannelGroup]:
        while undecided:
            more = undecided.pop()
            if _passes(model, [*known, *more], example, scales):
                known.extend(more)
                yield from more
            elif len(more) == 1:
                yield from more
            else:
                half = len(more) // 2
                undecided.extend([more[half:], more[:half]])

    for _ in track(decided(), "trying what can go", len(groups)):
        pass
    return tuple(known)


def _passes(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    example: Tensor,
    scales: Mapping[str, float],
) -> bool:
    """Try to remove every group's first channel, then its last, then some at random.

    The numbers drawn differ, and so find groups that only go together, equally many of each.
    """
    wide = [group for group in groups if group.width > 1]
    rng = np.random.default_rng(0)
    drawn = {g.name: rng.permutation(g.width)[: rng.integers(1, g.width)].tolist() for g in wide}
    tries: tuple[dict[str, list[int]], ...] = (
        {group.name: [0] for group in wide},
        {group.name: [group.width - 1] for group in wide},
        drawn,
    )
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints what fails in a network it traced
            return all(_can_go(model, groups, gone, example, scales) for gone in tries)
    except Exception:  # whatever the user's forward raises, the answer is no
        return False


def _can_go(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    gone: Mapping[str, list[int]],
    example: Tensor,
    scales: Mapping[str, float],
) -> bool:
    unread, cut = copy.deepcopy(model), copy.deepcopy(model)
    drop_channels(cut, groups, gone)
    with evaluating(cut):
        cut(example)
    for group in groups:
        for member in group.members:
            if member.axis == "in":
                weight = unread.get_submodule(member.layer).get_parameter("weight")
                for channel in gone.get(group.name, ()):
                    weight.data[:, list(member.indices[channel])] = 0
    for other in (unread, cut):
        _without_norms(other, scales)
    return bent_difference(unread, cut, example, _compared(model, groups, gone)) <= TOLERANCE


def _compared(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], gone: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Return, by each layer that reads one of the groups, which of its outputs stay."""
    out: dict[str, set[int]] = {}
    for group in groups:
        for member in group.members:
            places = [member.indices[channel] for channel in gone.get(group.name, ())]
            if member.axis == "out":
                out.setdefault(member.layer, set()).update(*places)
    found = {}
    for name in {m.layer for group in groups for m in group.members if m.axis == "in"}:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            width = len(layer.weight)
            found[name] = [i for i in range(width) if i not in out.get(name, set())]
    return found


def _is_norm(module: nn.Module) -> bool:
    """Say whether a module may measure over channels: its only parameters are one per channel."""
    own = list(module.parameters(recurse=False))
    counted = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    leaf = not any(True for _ in module.children())
    return leaf and bool(own) and all(p.dim() == 1 for p in own) and not isinstance(module, counted)


def _norm_scales(model: MultiTaskModel, example: Tensor) -> dict[str, float]:
    """Return by how much each norm scales its input as a whole."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, inputs: tuple[object, ...], output: object) -> None:
        first = inputs[0] if inputs else None
        if isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape:
            seen[name] = first.clone(), output.clone()

    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: note(name, x, y))
        for name, module in model.named_modules()
        if _is_norm(module)
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: float(_size(made) / _size(given).clamp(min=1e-12))
        for name, (given, made) in seen.items()
        if _treats_channels_alike(model.get_submodule(name), given, made)
    }


def _size(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def _treats_channels_alike(module: nn.Module, given: Tensor, made: Tensor) -> bool:
    """Say whether shuffled channels, with their parameters, come out shuffled and else the same.

    A norm's do; one with groups of channels, or a module that moves channels about, is no such
    norm, and is tried as it is. Channels are those of an axis with a parameter for each; of a
    module whose parameters are single numbers, those of both axes that may hold any.
    """
    own = {len(p) for p in module.parameters(recurse=False)}
    axes = {1, given.dim() - 1} & {*range(given.dim())}
    fitting = {axis for axis in axes if own == {given.shape[axis]}}

    def alike(axis: int) -> bool:
        order = torch.from_numpy(np.random.default_rng(0).permutation(given.shape[axis]))
        shuffled = copy.deepcopy(module)
        if axis in fitting:
            for parameter in shuffled.parameters(recurse=False):
                parameter.data = parameter.data[order]
        try:
            with torch.no_grad():
                off = shuffled(given.index_select(axis, order)) - made.index_select(axis, order)
        except Exception:  # it may want more than one input
            return False
        return float(off.abs().max()) <= TOLERANCE * float(made.abs().max())

    return any(map(alike, fitting)) if fitting else all(map(alike, axes))


def _without_norms(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Let every norm scale by a constant, so that the network's size of numbers stays."""
    for name, scale in scales.items():
        model.get_submodule(name).forward = lambda x, *_, scale=scale: x * scale
