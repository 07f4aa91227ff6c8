"""Batch norms: which layer each follows, and what they remember of their inputs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from secateur.core.model import evaluating

CHUNK = 32  # images per forward pass


def following_norms(model: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """Return, per layer, the batch norm that reads its output tensor directly.

    One that takes each batch's own statistics is no line, and is left out.
    """
    made: dict[tuple[int, int], str] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
    found: dict[str, nn.Module] = {}

    def after(name: str, output: Tensor) -> None:
        made[id(output), output._version] = name
        alive.append(output)

    def before(norm: nn.Module, tensor: Tensor) -> None:
        key = id(tensor), tensor._version  # an in-place activation between raises the version
        if key in made:
            found[made[key]] = norm

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: after(name, out))
            )
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(lambda m, args: before(m, args[0])))
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def settle_norms(model: nn.Module, images: Tensor) -> None:
    """Give every batch norm, in place, the statistics of what it reads; outputs do not change.

    A layer whose weights were changed leaves the next norm with statistics of another tensor. In
    eval mode that may be meant, but training uses each batch's own: the network would not start
    from the function it was. So scale and shift take over what the statistics did. ``images`` are
    (N, C, H, W) network inputs.
    """
    norms = {name: module for name, module in model.named_modules() if is_affine_norm(module)}
    totals: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        values = inputs.transpose(0, 1).flatten(1).double()
        ones = torch.full((len(values),), values.shape[1], dtype=values.dtype)
        sums = torch.stack([ones.to(values.device), values.sum(1), values.square().sum(1)])
        totals[name] = totals[name] + sums if name in totals else sums

    hooks = [
        norm.register_forward_pre_hook(lambda _m, args, name=name: note(name, args[0]))
        for name, norm in norms.items()
    ]
    try:
        with evaluating(model):
            for chunk in torch.split(images, CHUNK):
                model(chunk)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (count, first, second) in totals.items():
        mean = first / count
        _retell(norms[name], mean, (second / count - mean.square()).clamp(min=0))


def _retell(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Exchange a norm's statistics for ``mean`` and ``variance`` (C,), its function unchanged."""
    weight, bias, old_mean, old_variance, eps = norm_parts(norm)
    slope = weight.double() / (old_variance.double() + eps).sqrt()
    bias.data = (bias.double() + (mean - old_mean.double()) * slope).to(bias.dtype)
    weight.data = (slope * (variance + eps).sqrt()).to(weight.dtype)
    old_mean.copy_(mean)
    old_variance.copy_(variance)


def is_affine_norm(module: nn.Module) -> bool:
    """Say whether a module is a batch norm with scale, shift and running statistics."""
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.affine
        and module.running_mean is not None
    )


def norm_parts(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return a batch norm's weight, bias, running mean, running variance and epsilon."""
    weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    eps = cast(float, norm.eps)
    return weight, bias, norm.get_buffer("running_mean"), norm.get_buffer("running_var"), eps
