"""Heads: a light dense decoder with skips, and a pooled head for one vector per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def _conv_bn(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


STRIDE = 4  # of what a dense head gives


class SeparableBlock(nn.Module):
    """Depth-wise 3x3, then point-wise 1x1, each with batch norm and ReLU6."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = _conv_bn(inputs, inputs, kernel=3, groups=inputs)
        self.pointwise = _conv_bn(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


class DenseHead(nn.Module):
    """Decode a pyramid, coarse to fine, into a map at ``output_stride``.

    Each step upsamples bilinearly, concatenates the next finer feature (reduced by a 1x1
    convolution) and mixes with a separable block. The map is left at its own stride: whoever
    needs it larger (the loss, the metric, the runner) resizes it, because a full-resolution
    resize of the logits inside the network is a fixed cost that no pruning can remove.

    Shapes: features [(N, C_i, H/r_i, W/r_i)] finest first -> (N, channels, H/stride, W/stride).
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        reductions: Sequence[int],
        channels: int,
        width: int = 64,
    ) -> None:
        super().__init__()
        coarse_first = list(feature_channels)[::-1]
        self.laterals = nn.ModuleList(_conv_bn(c, width) for c in coarse_first)
        self.mixers = nn.ModuleList(SeparableBlock(2 * width, width) for _ in coarse_first[1:])
        finest = reductions[0]
        doublings = max(0, (finest // STRIDE).bit_length() - 1)
        self.upsamplers = nn.ModuleList(SeparableBlock(width, width) for _ in range(doublings))
        self.predict = nn.Conv2d(width, channels, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        coarse_first = features[::-1]
        x: Tensor = self.laterals[0](coarse_first[0])
        for step, mixer in enumerate(self.mixers, start=1):
            skip = self.laterals[step](coarse_first[step])
            x = functional.interpolate(x, size=skip.shape[-2:], mode="bilinear")
            x = mixer(torch.cat([x, skip], dim=1))
        for upsampler in self.upsamplers:
            x = upsampler(functional.interpolate(x, scale_factor=2.0, mode="bilinear"))
        y: Tensor = self.predict(x)
        return y


class PooledHead(nn.Module):
    """Global average of the coarsest feature, one hidden layer, one vector per image.

    Shapes: features [(N, C_i, H_i, W_i)] -> (N, channels).
    """

    def __init__(self, feature_channels: Sequence[int], channels: int, width: int = 64) -> None:
        super().__init__()
        self.reduce = _conv_bn(feature_channels[-1], width)
        self.predict = nn.Linear(width, channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.reduce(features[-1]).mean(dim=(2, 3))  # (N, width)
        y: Tensor = self.predict(x)
        return y
