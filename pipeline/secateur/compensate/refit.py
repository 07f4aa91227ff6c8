"""Refit every convolution and linear layer after a cut, in execution order, without training.

For one layer with the cut network's own inputs ``X``, the parent's outputs ``Y`` of the kept
channels and the kept weights ``W``, ridge least squares *towards the kept weights*::

    W' = W + (Y - W X) X^T (X X^T + ridge * mean(diag(X X^T)) * I)^-1

with means taken out of both sides and put back as a bias (into the following batch norm's mean
where there is one). Layers are refitted while one forward pass of the images goes through the
cut network, so each sees the inputs that the layers before it, already refitted, really give.
Depth-wise convolutions are many such problems of kernel size, solved together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan, dropped_indices
from secateur.core.progress import track

Layer = nn.Conv2d | nn.Linear
SAMPLES = 16_384  # output positions, over all images, that one layer is fitted on
PARENT_BATCH = 16


def refit(
    parent: MultiTaskModel,
    cut: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    images: Tensor,
    *,
    ridge: float = 0.3,
) -> MultiTaskModel:
    """Return a copy of ``cut`` with refitted weights.

    ``images``: (N, C, H, W) network inputs, no labels needed; see ``views`` for what is made of
    them.
    ``parent`` is the model that ``plan`` was applied to.
    """
    images = views(images)
    fitted = copy.deepcopy(cut)
    layers = {name: m for name, m in fitted.named_modules() if _is_plain(m)}
    norms = _following_norms(fitted, images[:1])
    positions, wanted = _parent_outputs(parent, set(layers), images)
    dropped = dropped_indices(groups, plan)

    def before(name: str, layer: Layer, inputs: Tensor) -> None:
        if name not in wanted:
            return
        gone = dropped.get((name, "out"), set())
        kept = [i for i in range(wanted[name].shape[0]) if i not in gone]
        target = wanted.pop(name)[kept]  # (c_out, S)
        offset = _fit(layer, _patches(layer, inputs, positions[name]), target, ridge)
        _shift(layer, norms.get(name), offset)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: before(name, layer, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(fitted):
            fitted(images)
    finally:
        for hook in hooks:
            hook.remove()
    return fitted


def _is_plain(module: nn.Module) -> TypeGuard[Layer]:
    """Say whether a layer computes just what its class says.

    Subclasses that pad or standardise their weights in ``forward``, and padding other than zeros,
    are left as the cut made them.
    """
    if type(module).forward is nn.Linear.forward:
        return True
    return type(module).forward is nn.Conv2d.forward and module.padding_mode == "zeros"


def views(images: Tensor) -> Tensor:
    """Return (3N, C, H, W): the images, mirrored, and their middle enlarged 1.3 times.

    Coarse layers see few positions per image, so a handful of images leaves their least squares
    short of equations; other views of the same images supply more without more data.
    """
    height, width = images.shape[2:]
    top, left = int(0.115 * height), int(0.115 * width)
    middle = images[:, :, top : height - top, left : width - left]
    near = functional.interpolate(middle, size=(height, width), mode="bilinear")
    return torch.cat([images, images.flip(3), near])


def _parent_outputs(
    parent: MultiTaskModel, names: set[str], images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the compared positions and the parent's outputs (c_out, S) there, per layer."""
    positions: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    per_image = max(1, SAMPLES // len(images))
    generator = torch.Generator().manual_seed(0)

    def after(name: str, layer: Layer, output: Tensor) -> None:
        flat = _positions_last(layer, output)  # (N, c_out, P)
        if name not in positions:
            order = torch.randperm(flat.shape[2], generator=generator)
            positions[name] = order[:per_image].sort().values
        chosen = flat.index_select(2, positions[name])
        parts.setdefault(name, []).append(chosen.transpose(0, 1).flatten(1))

    hooks = [
        module.register_forward_hook(lambda layer, _, out, name=name: after(name, layer, out))
        for name, module in parent.named_modules()
        if name in names
    ]
    try:
        with evaluating(parent):
            chunks = torch.split(images, PARENT_BATCH)
            for chunk in track(chunks, "reading the parent", len(chunks)):
                parent(chunk)
    finally:
        for hook in hooks:
            hook.remove()
    # A layer called more than once per pass has no single target; it keeps its weights.
    calls = len(chunks)
    return positions, {name: torch.cat(p, 1) for name, p in parts.items() if len(p) == calls}


def _positions_last(layer: Layer, tensor: Tensor) -> Tensor:
    """Return (N, C, positions) of a convolution's (N, C, H, W) or a linear layer's (N, ..., C)."""
    if isinstance(layer, nn.Conv2d):
        return tensor.flatten(2)
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]).transpose(1, 2)


def _patches(layer: Layer, inputs: Tensor, positions: Tensor) -> Tensor:
    """Return the layer's inputs at output ``positions`` as (groups, c_in/groups * kernel, S).

    Only the patches that are asked for are gathered; a whole unfolded map would be kernel times
    larger than the feature map itself.
    """
    if isinstance(layer, nn.Linear):
        chosen = _positions_last(layer, inputs).index_select(2, positions)
        return chosen.transpose(0, 1).flatten(1)[None]
    padding = _padding(layer)
    padded = functional.pad(inputs, padding) if any(padding) else inputs
    flat, width = padded.flatten(2), padded.shape[3]
    (kernel_h, kernel_w), (step_h, step_w) = layer.kernel_size, layer.dilation
    out_width = (width - step_w * (kernel_w - 1) - 1) // layer.stride[1] + 1
    rows = positions // out_width * layer.stride[0]
    columns = positions % out_width * layer.stride[1]
    taps = [
        flat.index_select(2, (rows + y * step_h) * width + columns + x * step_w)  # (N, c_in, P)
        for y in range(kernel_h)
        for x in range(kernel_w)
    ]
    stacked = torch.stack(taps, dim=2)  # (N, c_in, kernel, P)
    return stacked.permute(1, 2, 0, 3).reshape(layer.groups, -1, len(inputs) * len(positions))


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) as the layer itself pads."""
    if isinstance(layer.padding, tuple):
        vertical, horizontal = (int(side) for side in layer.padding)
        return horizontal, horizontal, vertical, vertical
    if layer.padding == "valid":
        return 0, 0, 0, 0
    height, width = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return width // 2, width - width // 2, height // 2, height - height // 2


def _fit(layer: Layer, inputs: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Refit ``layer.weight`` in place and return the offset (c_out,) its outputs still lack.

    Shapes: inputs (G, D, S), target (c_out, S); the weight is seen as (G, c_out/G, D).
    """
    groups, depth, samples = inputs.shape
    weight = layer.weight.detach().reshape(groups, -1, depth).double()
    wanted = target.reshape(groups, -1, samples)
    mean_in = inputs.mean(2, keepdim=True)
    mean_out = wanted.mean(2, keepdim=True)
    x = inputs - mean_in
    error = (wanted - mean_out) - weight.float() @ x
    gram = (x @ x.transpose(1, 2)).double() / samples  # (G, D, D)
    cross = (error @ x.transpose(1, 2)).double() / samples  # (G, c_out/G, D)
    level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram += torch.eye(depth, dtype=gram.dtype) * (ridge * level)[:, None, None]
    weight = weight + torch.linalg.solve(gram, cross.transpose(1, 2)).transpose(1, 2)
    layer.weight.data.copy_(weight.reshape(layer.weight.shape))
    fitted_mean = weight @ mean_in.double()
    offset: Tensor = (mean_out.double() - fitted_mean).flatten().float()
    return offset if layer.bias is None else offset - layer.bias.detach()


def _shift(layer: Layer, norm: nn.Module | None, offset: Tensor) -> None:
    """Add ``offset`` to the layer's outputs: as bias, or by moving the next batch norm's mean."""
    if layer.bias is not None:
        layer.bias.data += offset
    elif norm is not None and isinstance(norm.running_mean, Tensor):
        norm.running_mean -= offset
    else:
        layer.bias = nn.Parameter(offset.clone())


def _following_norms(model: MultiTaskModel, image: Tensor) -> dict[str, nn.Module]:
    """Return, per layer, the batch norm that reads its output tensor directly."""
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
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(lambda m, args: before(m, args[0])))
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found
