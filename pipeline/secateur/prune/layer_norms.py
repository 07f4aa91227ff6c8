"""Layer norms on the way from a residual stream to its readers: their affine part, their symmetry.

A layer norm subtracts a token's mean over channels and divides by its deviation. Both commute with
every rotation of the channels that leaves the all-ones vector where it is; scale and shift per
channel do not, so they are moved into the layers that read (SliceGPT, arXiv 2401.15024, section 3,
moves the mean's subtraction as well and then needs another norm; here the norm stays what it is).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.bent import Bent, bent_difference
from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel, evaluating

Matrix = NDArray[np.float64]
TOLERANCE = 1e-3  # of an output's largest value


def fold_layer_norms(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> MultiTaskModel:
    """Return the model with scale 1 and shift 0 in the layer norms of ``groups`` where exact.

    Where it is not (a padded convolution reads the norm, or something without weights), a group's
    norms stay. The model itself is returned if it has none.
    """
    for group in groups:
        norms = [n for n in _layer_norms(model, group) if not is_plain_norm(model.get_submodule(n))]
        if not norms:
            continue
        folded = copy.deepcopy(model)
        for norm in norms:
            _fold(folded, norm, _readers(model, norm, group, example))
        if bent_difference(model, folded, example, read_by(group)) <= TOLERANCE:
            model = folded
    return model


def read_by(group: ChannelGroup) -> dict[str, None]:
    """Return the layers that read a group, as ``output_difference`` takes them."""
    return {member.layer: None for member in group.members if member.axis == "in"}


def is_normalised(model: nn.Module, group: ChannelGroup) -> bool:
    """Say whether layer norms stand before readers of the group."""
    return bool(_layer_norms(model, group))


def is_plain_norm(module: nn.Module) -> bool:
    """Say whether a module is a layer norm that neither scales nor shifts."""
    if not isinstance(module, nn.LayerNorm):
        return False
    scale, shift = (getattr(module, part, None) for part in ("weight", "bias"))
    return (scale is None or bool((scale == 1).all())) and (
        shift is None or bool((shift == 0).all())
    )


def rotated_axes(activity: Matrix, sensitivity: Matrix) -> Matrix:
    """Return the rotation (W, W) that keeps the all-ones vector and sorts directions by worth.

    Rows are eigenvectors of the geometric mean of covariance and sensitivity (both (W, W)), for
    which a direction is worth the root of the product of both; most first. Every channel carries
    the mean of all, which no layer norm lets through.
    """
    width = len(activity)
    first: Matrix = np.full((width, 1), width**-0.5)
    across: Matrix = np.linalg.qr(np.hstack([first, np.eye(width)[:, 1:]]))[0][:, 1:]  # of the mean
    inside = [across.T @ matrix @ across for matrix in (activity, sensitivity)]
    worth, vectors = np.linalg.eigh(_geometric_mean(*inside))  # reads one triangle
    directions: Matrix = np.hstack([first, across @ vectors[:, np.argsort(-worth)]])
    return kept_ones(directions)


def kept_ones(directions: Matrix) -> Matrix:
    """Return the rotation of (W, W) orthonormal columns, the mean first, onto nearly unit vectors.

    Nearly, since the all-ones vector stays: a reflection of the unit vectors that sends the first
    there sends the others no further than ``1/sqrt(W)`` away.
    """
    width = len(directions)
    mirror = np.full(width, -(width**-0.5))
    mirror[0] += 1
    length = float(mirror @ mirror)
    places = np.eye(width) - (2 / length * np.outer(mirror, mirror) if length else 0)
    rotation: Matrix = places @ directions.T
    return rotation


def _geometric_mean(first: Matrix, second: Matrix) -> Matrix:
    """Return the matrix geometric mean of two positive semi-definite matrices, slightly lifted."""
    lifted = [m / max(float(np.trace(m)) / len(m), 1e-30) + 1e-4 * np.eye(len(m))
              for m in (first, second)]  # fmt: skip
    root = _power(lifted[0], 0.5)
    inverse = _power(lifted[0], -0.5)
    mean: Matrix = root @ _power(inverse @ lifted[1] @ inverse, 0.5) @ root
    return mean


def _power(matrix: Matrix, exponent: float) -> Matrix:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    powered: Matrix = (vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T
    return powered


def _layer_norms(model: nn.Module, group: ChannelGroup) -> list[str]:
    return [
        member.layer
        for member in group.members
        if isinstance(norm := model.get_submodule(member.layer), nn.LayerNorm)
        and norm.normalized_shape == (len(member.indices),)
    ]


def _readers(
    model: MultiTaskModel, norm: str, group: ChannelGroup, example: Tensor
) -> list[Member]:
    """Return the members that read ``norm``'s output: without it they read nothing but zeros."""
    members = {member.layer: member for member in group.members if member.axis == "in"}
    silent: dict[str, bool] = {}

    def note(name: str, tensor: Tensor) -> None:
        silent[name] = silent.get(name, True) and not bool(tensor.any())

    hooks = [model.get_submodule(norm).register_forward_hook(lambda _m, _i, o: torch.zeros_like(o))]
    hooks += [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: note(name, args[0])
        )
        for name in members
    ]
    try:
        with evaluating(model), Bent():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [members[name] for name, zeros in silent.items() if zeros]


@torch.no_grad()
def _fold(model: nn.Module, norm: str, readers: Sequence[Member]) -> None:
    """Move the scale and shift of ``norm`` into ``readers``, in place."""
    module: Any = model.get_submodule(norm)
    scale = module.weight.clone()
    shift = torch.zeros_like(scale) if module.bias is None else module.bias.clone()
    for member in readers:
        reader: Any = model.get_submodule(member.layer)
        columns = reader.weight.transpose(0, 1)
        added = torch.zeros(columns.shape[1], device=columns.device)
        for channel, places in enumerate(member.indices):
            for place in places:
                added += shift[channel] * columns[place].reshape(len(added), -1).sum(1)
                columns[place] *= scale[channel]
        if reader.bias is None:
            reader.bias = nn.Parameter(added)
        else:
            reader.bias.add_(added)
    module.weight.fill_(1.0)
    if module.bias is not None:
        module.bias.zero_()
