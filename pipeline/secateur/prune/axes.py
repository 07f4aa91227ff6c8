"""Rewrite linear channel groups in the axes in which they are best cut; outputs stay the same.

Between a layer whose output passes no activation and the layers that read it (the residual stream
of inverted residuals, a linear bottleneck) channels are a choice of coordinates: for any invertible
``A``, makers ``A W`` and readers ``W A^-1`` compute the same network. In trained coordinates every
channel carries a little of everything, so dropping one costs more than it needs to. In *balanced*
coordinates, those of balanced truncation (Moore, IEEE TAC 1981; rotations alone: SliceGPT, arXiv
2401.15024), the covariance ``C`` of the activations and the sensitivity ``G`` of the losses are
both diagonal, with each channel's share of either in one order: what little is read goes last.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.bent import bent_difference
from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel
from secateur.core.norms import following_norms, is_affine_norm, norm_parts, settle_norms
from secateur.prune.layer_norms import is_normalised, is_plain_norm, kept_ones, read_by

Matrix = NDArray[np.float64]
Dense = nn.Conv2d | nn.Linear
ACTIVITY_FLOOR, SENSITIVITY_FLOOR = 1e-4, 1e-2  # of the mean diagonal: keeps A well conditioned
TOLERANCE = 1e-3  # of an output's largest value; where there is an activation, turning is far off


def linear_groups(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> tuple[ChannelGroup, ...]:
    """Return the groups whose channels may be mixed: by any invertible matrix or, where layer norms
    stand before readers, by rotations that keep the all-ones vector (``layer_norms``).

    Tried, not guessed: a random rotation of the group must leave every output as it was, and what
    each reader of the group makes of it.
    """
    after = _norm_after(model, example[:1])
    found = []
    for group in groups:
        if not _has_plain_members(model, group, after):
            continue
        turned = copy.deepcopy(model)
        _turn(turned, group, after, _rotation(model, group))
        if bent_difference(model, turned, example, read_by(group)) <= TOLERANCE:
            found.append(group)
    return tuple(found)


def balanced_axes(activity: Matrix, sensitivity: Matrix) -> Matrix:
    """Return the (W, W) ``A`` that balances covariance ``C`` and sensitivity ``G``, both (W, W).

    ``A C A^T`` and ``A^-T G A^-1`` are diagonal and their products fall along the diagonal (up to
    the floors that keep directions without activity or importance from being blown up). The scale
    of a channel is free: here all have variance 1, which trains and quantises best.
    """
    activity = _floored(activity, ACTIVITY_FLOOR)
    sensitivity = _floored(sensitivity, SENSITIVITY_FLOOR)
    of_activity, of_sensitivity = np.linalg.cholesky(activity), np.linalg.cholesky(sensitivity)
    left, values, _ = np.linalg.svd(of_sensitivity.T @ of_activity)
    axes: Matrix = (left / values).T @ of_sensitivity.T
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
    for group in groups:
        _turn(turned, group, after, axes[group.name])
    settle_norms(turned, images)
    return turned.eval()


def _norm_after(model: MultiTaskModel, image: Tensor) -> dict[str, str]:
    """Return, by layer, the name of the batch norm that follows it."""
    names = {id(module): name for name, module in model.named_modules()}
    return {layer: names[id(norm)] for layer, norm in following_norms(model, image).items()}


def _has_plain_members(
    model: MultiTaskModel, group: ChannelGroup, after: Mapping[str, str]
) -> bool:
    """Say whether convolutions and linear layers make and read the group, with norms between.

    A batch norm must follow such a layer directly, since it is folded into it on the way; a layer
    norm may stand anywhere, if it neither scales nor shifts.
    """
    makers = _makers(model, group)
    between = {after[m.layer] for m in makers if m.layer in after}
    readers = [m for m in group.members if m.axis == "in"]
    others = {m.layer for m in group.members if m.axis == "out"} - {m.layer for m in makers}
    others = {name for name in others if not is_plain_norm(model.get_submodule(name))}
    return (
        bool(makers and readers)
        and others <= between
        and all(_is_dense(model.get_submodule(m.layer)) for m in readers)
        and all(len(m.indices[0]) == 1 for m in makers)
        and all(is_affine_norm(model.get_submodule(name)) for name in between)
    )


def _is_dense(module: nn.Module) -> TypeGuard[Dense]:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


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
    for name in group.parameters:
        _mix(model.get_parameter(name).movedim(-1, 0), list(group.channels), forward)
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
    weight, bias, mean, variance, eps = norm_parts(norm)
    scale = weight / (variance + eps).sqrt()
    layer.weight.data[at] *= scale.view(-1, *[1] * (layer.weight.dim() - 1))[at]
    inner = -mean if layer.bias is None else layer.bias - mean
    bias.data[at] += (inner * scale)[at]
    if layer.bias is not None:
        layer.bias.data[at] = 0
    weight.data[at], mean[at], variance[at] = 1, 0, 1 - eps
    return bias


def _mix(tensor: Tensor, at: list[int], matrix: Tensor) -> None:
    """Replace the entries ``at`` of axis 0 by ``matrix`` times them."""
    rows = tensor.data[at].double()
    tensor.data[at] = torch.tensordot(matrix.to(rows.device), rows, 1).to(tensor.dtype)


def _rotation(model: nn.Module, group: ChannelGroup) -> Matrix:
    """Return a random rotation, where layer norms read the group one that keeps all ones."""
    noise = np.random.default_rng(0).standard_normal((group.width, group.width))
    normalised = is_normalised(model, group)
    if normalised:
        noise[:, 0] = 1  # the mean comes first
    rotation, upper = np.linalg.qr(noise)
    turned: Matrix = rotation * np.sign(upper[0, 0])
    return kept_ones(turned) if normalised else turned


def _floored(matrix: Matrix, share: float) -> Matrix:
    """Return the matrix, of mean diagonal 1, plus ``share`` of the identity."""
    width = len(matrix)
    mean = float(np.trace(matrix)) / width
    scaled = matrix / mean if mean > 0 else np.zeros_like(matrix)
    return scaled + share * np.eye(width)
