"""Trials with activations that are flat nowhere, so that the noise of a trial hides nothing.

On noise a ReLU may give nothing but zeros, or let all through; a clamp may never be reached. In a
trial two networks are compared, both with another function in the activation's place, which bends
everywhere and keeps signs and sizes about as they are: what holds then holds whatever comes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.core.model import MultiTaskModel, output_difference

FLAT_SOMEWHERE = frozenset({
    functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_,
    functional.relu6, functional.hardtanh, functional.hardtanh_, functional.hardswish,
    functional.threshold, functional.leaky_relu, functional.leaky_relu_,
    functional.elu, functional.elu_, functional.gelu, functional.silu, functional.mish,
    torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_max, torch.clip,
    Tensor.clamp, Tensor.clamp_, Tensor.clamp_min, Tensor.clamp_max, Tensor.clip, Tensor.clip_,
})  # fmt: skip


class Bent(TorchFunctionMode):
    """Replaces activations and clamps of floating-point tensors, in place where they were."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else kwargs.get("input")
        if func not in FLAT_SOMEWHERE or not isinstance(source, Tensor):
            return func(*args, **kwargs)
        if not source.is_floating_point():
            return func(*args, **kwargs)
        # a kink for numbers around 0, however small, and waves for those beyond it
        bent = 0.6 * torch.where(source > 0, source, source / 3) + 0.3 * torch.sin(source)
        in_place = kwargs.get("inplace") is True or any(each is True for each in args[1:])
        return source.copy_(bent) if in_place or func.__name__.endswith("_") else bent


def bent_difference(
    model: MultiTaskModel,
    other: MultiTaskModel,
    images: Tensor,
    layers: Mapping[str, Sequence[int] | None],
) -> float:
    """Return ``output_difference`` with bent activations.

    Where numbers are none then, as a logarithm's may be, activations stay what they are.
    """
    with Bent():
        found = output_difference(model, other, images, layers)
    return output_difference(model, other, images, layers) if math.isnan(found) else found
