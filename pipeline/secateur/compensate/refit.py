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

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan, dropped_indices
from secateur.core.progress import track

Layer = nn.Conv2d | nn.Linear
SAMPLES = 32_768  # positions over all images that one layer is fitted on
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

    ``images``: (N, C, H, W) network inputs, no labels needed. ``parent`` is the model that
    ``plan`` was applied to.
    """
    fitted = copy.deepcopy(cut)
    layers = {n: m for n, m in fitted.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
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
        chosen = flat[:, :, positions[name]]
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
    """Return the layer's inputs at ``positions`` as (groups, c_in/groups * kernel, S)."""
    if isinstance(layer, nn.Linear):
        chosen = _positions_last(layer, inputs)[:, :, positions]
        return chosen.transpose(0, 1).flatten(1)[None]
    pointwise = layer.kernel_size == (1, 1) and layer.stride == (1, 1)
    columns = []
    for image in torch.split(inputs, 1):  # image by image: an unfolded map is kernel times larger
        if pointwise:
            columns.append(image[0].flatten(1)[:, positions])
            continue
        padded, padding = _padded(layer, image)
        unfolded = functional.unfold(
            padded, layer.kernel_size, layer.dilation, padding, layer.stride
        )
        columns.append(unfolded[0][:, positions])
    stacked = torch.cat(columns, 1)  # (c_in * kernel, S)
    return stacked.reshape(layer.groups, -1, stacked.shape[1])


def _padded(layer: nn.Conv2d, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the image and the padding ``unfold`` must add, as the layer itself would pad."""
    if isinstance(layer.padding, tuple):
        return image, (int(layer.padding[0]), int(layer.padding[1]))
    extra = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        return image, (0, 0)
    (top, bottom), (left, right) = ((e // 2, e - e // 2) for e in extra)
    return functional.pad(image, (left, right, top, bottom)), (0, 0)


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
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
    found: dict[str, nn.Module] = {}

    def after(name: str, output: Tensor) -> None:
        made[id(output)] = name
        alive.append(output)

    def before(norm: nn.Module, tensor: Tensor) -> None:
        if id(tensor) in made:
            found[made[id(tensor)]] = norm

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
