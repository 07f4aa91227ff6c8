"""Rewrite linear channel groups in the axes in which they are best cut; outputs stay the same.

Between a layer whose output passes no activation and the layers that read it (the residual stream
of inverted residuals, a linear bottleneck) channels are a choice of coordinates: for any invertible
``A``, makers ``A W`` and readers ``W A^-1`` compute the same network. In trained coordinates every
channel carries a little of everything, so dropping one costs more than it needs to. In *balanced*
coordinates, those of balanced truncation (Moore, IEEE TAC 1981; rotations alone: SliceGPT, arXiv
2401.15024), the covariance ``C`` of the activations and the sensitivity ``G`` of the losses are
the same diagonal matrix: a channel that varies little is one that no task reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.norms import following_norms

Matrix = NDArray[np.float64]
Dense = nn.Conv2d | nn.Linear
ACTIVITY_FLOOR, SENSITIVITY_FLOOR = 1e-6, 1e-2  # of the mean diagonal: keeps A well conditioned
CHUNK = 32  # images per forward pass
TOLERANCE = 1e-3  # of an output's largest value; where there is an activation, turning is far off


def linear_groups(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> tuple[ChannelGroup, ...]:
    """Return the groups whose channels may be mixed by any invertible matrix.

    Tried, not guessed: a random rotation of the group must leave every output as it was.
    """
    after = _norm_after(model, example[:1])
    with evaluating(model):
        wanted = model(example)
    found = []
    for group in groups:
        if not _has_plain_members(model, group, after):
            continue
        turned = copy.deepcopy(model)
        _turn(turned, group, after, _rotation(group.width))
        with evaluating(turned):
            given = turned(example)
        if all(_same(wanted[name], given[name]) for name in wanted):
            found.append(group)
    return tuple(found)


def balanced_axes(activity: Matrix, sensitivity: Matrix) -> Matrix:
    """Return the (W, W) ``A`` that balances covariance ``C`` and sensitivity ``G``, both (W, W).

    ``A C A^T`` and ``A^-T G A^-1`` are the same diagonal matrix, largest first (up to the floors
    that keep directions without activity or importance from being blown up).
    """
    activity = _floored(activity, ACTIVITY_FLOOR)
    sensitivity = _floored(sensitivity, SENSITIVITY_FLOOR)
    of_activity, of_sensitivity = np.linalg.cholesky(activity), np.linalg.cholesky(sensitivity)
    left, values, _ = np.linalg.svd(of_sensitivity.T @ of_activity)
    axes: Matrix = (left / np.sqrt(values)).T @ of_sensitivity.T
    return axes


def apply_axes(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    axes: Mapping[str, Matrix],
    images: Tensor,
) -> MultiTaskModel:
    """Return a copy of ``model`` with each of ``groups`` in its ``axes`` (W, W); same outputs.

    ``images`` (N, C, H, W) tell the batch norms of turned layers what their new channels hold, so
    that the network trains on as before.
    """
    turned = copy.deepcopy(model)
    after = _norm_after(turned, images[:1])
    changed: dict[str, list[int]] = {}
    for group in groups:
        _turn(turned, group, after, axes[group.name])
        for member in _makers(turned, group):
            if member.layer in after:
                at = [places[0] for places in member.indices]
                changed.setdefault(after[member.layer], []).extend(at)
    _renew_norms(turned, changed, images)
    return turned.eval()


def _norm_after(model: MultiTaskModel, image: Tensor) -> dict[str, str]:
    """Return, by layer, the name of the batch norm that follows it."""
    names = {id(module): name for name, module in model.named_modules()}
    return {layer: names[id(norm)] for layer, norm in following_norms(model, image).items()}


def _has_plain_members(
    model: MultiTaskModel, group: ChannelGroup, after: Mapping[str, str]
) -> bool:
    """Say whether convolutions and linear layers make and read the group, with batch norms between.

    A batch norm must follow such a layer directly, since it is folded into it on the way.
    """
    makers = _makers(model, group)
    between = {after[m.layer] for m in makers if m.layer in after}
    readers = [m for m in group.members if m.axis == "in"]
    others = {m.layer for m in group.members if m.axis == "out"} - {m.layer for m in makers}
    return (
        bool(makers and readers)
        and others <= between
        and all(_is_dense(model.get_submodule(m.layer)) for m in readers)
        and all(len(m.indices[0]) == 1 for m in makers)
        and all(_is_affine(model.get_submodule(name)) for name in between)
    )


def _is_dense(module: nn.Module) -> TypeGuard[Dense]:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _is_affine(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.affine
        and module.running_mean is not None
    )


def _makers(model: MultiTaskModel, group: ChannelGroup) -> list[Member]:
    """Return the convolutions and linear layers that make the group's channels."""
    made = [member for member in group.members if member.axis == "out"]
    return [member for member in made if _is_dense(model.get_submodule(member.layer))]


@torch.no_grad()
def _turn(
    model: MultiTaskModel, group: ChannelGroup, after: Mapping[str, str], axes: Matrix
) -> None:
    """Mix the group's channels in place: ``axes`` into its makers, its inverse into its readers."""
    forward, back = torch.from_numpy(axes), torch.from_numpy(np.linalg.inv(axes))
    for member in _makers(model, group):
        layer = cast(Dense, model.get_submodule(member.layer))
        at = [places[0] for places in member.indices]
        norm = model.get_submodule(after[member.layer]) if member.layer in after else None
        bias = _own_bias(layer) if norm is None else _folded(layer, norm, at)
        _mix(layer.weight, at, forward)
        _mix(bias, at, forward)
    for member in group.members:
        if member.axis == "in":
            columns = cast(Dense, model.get_submodule(member.layer)).weight.transpose(0, 1)
            for place in range(len(member.indices[0])):
                _mix(columns, [places[place] for places in member.indices], back.T)


def _own_bias(layer: Dense) -> Tensor:
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight), device=layer.weight.device))
    return layer.bias


def _folded(layer: Dense, norm: nn.Module, at: list[int]) -> Tensor:
    """Make the norm after ``layer`` a mere bias for channels ``at``, and return that bias."""
    weight, bias, mean, variance, eps = _parts(norm)
    scale = weight / (variance + eps).sqrt()
    layer.weight.data[at] *= scale.view(-1, *[1] * (layer.weight.dim() - 1))[at]
    inner = -mean if layer.bias is None else layer.bias - mean
    bias.data[at] += (inner * scale)[at]
    if layer.bias is not None:
        layer.bias.data[at] = 0
    weight.data[at], mean[at], variance[at] = 1, 0, 1 - eps
    return bias


def _parts(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return a batch norm's weight, bias, running mean, running variance and epsilon."""
    weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    eps = cast(float, norm.eps)
    return weight, bias, norm.get_buffer("running_mean"), norm.get_buffer("running_var"), eps


def _mix(tensor: Tensor, at: list[int], matrix: Tensor) -> None:
    """Replace the entries ``at`` of axis 0 by ``matrix`` times them."""
    rows = tensor.data[at].double()
    tensor.data[at] = torch.tensordot(matrix.to(rows.device), rows, 1).to(tensor.dtype)


@torch.no_grad()
def _renew_norms(model: MultiTaskModel, changed: Mapping[str, list[int]], images: Tensor) -> None:
    """Give folded norms the statistics of their new channels, without changing any output.

    Evaluated they do what they did; trained on, they would otherwise rescale every channel.
    """
    count, sums, squares = 0, dict[str, Tensor](), dict[str, Tensor]()
    for chunk in torch.split(images, CHUNK):
        for name, tensor in _inputs_of(model, changed, chunk).items():
            values = tensor.transpose(0, 1).flatten(1)[changed[name]].double()
            sums[name] = sums.get(name, 0) + values.mean(1) * len(chunk)
            squares[name] = squares.get(name, 0) + values.square().mean(1) * len(chunk)
        count += len(chunk)
    for name, at in changed.items():
        weight, bias, mean, variance, eps = _parts(model.get_submodule(name))
        middle = sums[name] / count
        spread = (squares[name] / count - middle.square()).clamp(min=0)
        mean[at], variance[at] = middle.float(), spread.float()
        weight.data[at] = (spread + eps).sqrt().float()
        bias.data[at] += middle.float()


def _inputs_of(
    model: MultiTaskModel, layers: Mapping[str, object], images: Tensor
) -> dict[str, Tensor]:
    """Return what each of ``layers`` reads in one forward pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0])
        )
        for name in layers
    ]
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _rotation(width: int) -> Matrix:
    noise = np.random.default_rng(0).standard_normal((width, width))
    rotation: Matrix = np.linalg.qr(noise)[0]
    return rotation


def _same(wanted: Tensor, given: Tensor) -> bool:
    return bool((wanted - given).abs().max() <= TOLERANCE * wanted.abs().max())


def _floored(matrix: Matrix, share: float) -> Matrix:
    """Return the matrix, of mean diagonal 1, plus ``share`` of the identity."""
    width = len(matrix)
    mean = float(np.trace(matrix)) / width
    scaled = matrix / mean if mean > 0 else np.zeros_like(matrix)
    return scaled + share * np.eye(width)
