"""Whether channels can go is tried, not guessed.

A dependency graph knows layers; a model may also reshape by numbers it was built with, split,
shuffle or multiply channels. So a channel of every group is removed for trial: the network must
still run, and compute what it computes when nobody reads that channel. One channel at a time: two
might come from two heads of attention and leave them equally wide by chance. Groups that do not
pass stay whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel, evaluating, output_difference
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

    def passing(known: list[ChannelGroup], more: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        if not more or _passes(model, [*known, *more], example, scales):
            return [*known, *more]
        if len(more) == 1:
            return known
        half = len(more) // 2
        return passing(passing(known, more[:half]), more[half:])

    return tuple(passing([], groups))


def _passes(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    example: Tensor,
    scales: Mapping[str, float],
) -> bool:
    """Try to remove every group's first channel, then every group's last."""
    ends = ({g.name: [end % g.width] for g in groups if g.width > 1} for end in (0, -1))
    try:
        return all(_can_go(model, groups, one, example, scales) for one in ends)
    except Exception:  # whatever the user's forward raises, the answer is no
        return False


def _can_go(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    gone: Mapping[str, Sequence[int]],
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
    return output_difference(unread, cut, example) <= TOLERANCE


def _is_norm(module: nn.Module) -> bool:
    """Say whether a module may measure over channels: its only parameters are one per channel."""
    own = list(module.parameters(recurse=False))
    counted = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    leaf = not any(True for _ in module.children())
    return leaf and bool(own) and all(p.dim() == 1 for p in own) and not isinstance(module, counted)


def _norm_scales(model: MultiTaskModel, example: Tensor) -> dict[str, float]:
    """Return by how much each norm scales its input as a whole."""
    scales: dict[str, float] = {}

    def note(name: str, inputs: tuple[object, ...], output: object) -> None:
        first = inputs[0] if inputs else None
        if isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape:
            scales[name] = float(output.std() / first.std().clamp(min=1e-12))

    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: note(name, x, y))
        for name, module in model.named_modules()
        if _is_norm(module)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return scales


def _without_norms(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Let every norm scale by a constant, so that the network's size of numbers stays."""
    for name, scale in scales.items():
        model.get_submodule(name).forward = lambda x, *_, scale=scale: x * scale
