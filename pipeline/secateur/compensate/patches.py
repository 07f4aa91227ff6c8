"""A layer's inputs and outputs at chosen output positions, as the columns of a least squares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.layers import Layer, pick, positions_last


def draw(layer: Layer, output: Tensor, count: int) -> Tensor:
    """Return ``count`` output positions (or all) to compare, the same in every image."""
    total = positions_last(layer, output[:1]).shape[2]
    generator = torch.Generator().manual_seed(total)
    return torch.randperm(total, generator=generator)[:count].sort().values


def patches(layer: Layer, inputs: Tensor, positions: Tensor) -> Tensor:
    """Return the layer's inputs at output ``positions`` as (groups, c_in/groups * kernel, S).

    Only the patches that are asked for are gathered; a whole unfolded map would be kernel times
    larger than the feature map itself.
    """
    if isinstance(layer, nn.Linear):
        chosen = pick(positions_last(layer, inputs), positions)
        return chosen.transpose(0, 1).flatten(1)[None]
    padding = _padding(layer)
    padded = functional.pad(inputs, padding) if any(padding) else inputs
    flat, width = padded.flatten(2), padded.shape[3]
    (kernel_h, kernel_w), (step_h, step_w) = layer.kernel_size, layer.dilation
    out_width = (width - step_w * (kernel_w - 1) - 1) // layer.stride[1] + 1
    rows = positions // out_width * layer.stride[0]
    columns = positions % out_width * layer.stride[1]
    taps = [
        pick(flat, (rows + y * step_h) * width + columns + x * step_w)  # (N, c_in, P)
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
