"""Find where a layer's output is clipped, so that a refit need not care about what is cut off.

Under a ReLU all negative values are alike. Zhang et al. (arXiv 1505.06798, section 2.3) fit the
response *after* the non-linearity for that reason; here the target follows the prediction wherever
both lie beyond the same edge.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.core.model import MultiTaskModel, evaluating

RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


@dataclass(frozen=True)
class Clip:
    """The layer's output ``y`` is read as ``clamp(gain * y + shift, low, high)``, per channel."""

    gain: Tensor
    shift: Tensor
    low: float
    high: float

    def bend(self, target: Tensor, predicted: Tensor) -> Tensor:
        """Return the target (C, S), moved to the prediction where clipping hides the gap."""
        gain = torch.where(self.gain.abs() < 1e-6, 1e-6, self.gain)[:, None]
        wanted = gain * target + self.shift[:, None]
        given = gain * predicted + self.shift[:, None]
        bent = torch.where(wanted <= self.low, given.clamp(max=self.low), wanted)
        if self.high < inf:
            bent = torch.where(wanted >= self.high, given.clamp(min=self.high), bent)
        return (bent - self.shift[:, None]) / gain


def find_clips(model: MultiTaskModel, layers: Collection[str], image: Tensor) -> dict[str, Clip]:
    """Return the clip that reads each layer's output, alone or through a batch norm."""
    watch = _Watch()
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: watch.made(name, out))
        for name, module in model.named_modules()
        if name in layers
    ]
    try:
        with evaluating(model), watch:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.found


class _Watch(TorchFunctionMode):
    """Follows layer outputs through batch norms into clipping functions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Clip] = {}
        self._open: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}
        self._alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique

    def made(self, name: str, output: Tensor) -> None:
        channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
        self._follow(output, (name, torch.ones(channels), torch.zeros(channels)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        known = self._open.get((id(source), source._version)) if source is not None else None
        if known is not None:
            edges = _edges(func, args, kwargs)
            if edges is not None:
                self.found[known[0]] = Clip(known[1], known[2], *edges)
        result = func(*args, **kwargs)
        if known is not None and func is functional.batch_norm:
            self._follow(result, (known[0], *_affine(*args[1:5], **kwargs)))
        return result

    def _follow(self, tensor: Tensor, what: tuple[str, Tensor, Tensor]) -> None:
        self._open[id(tensor), tensor._version] = what
        self._alive.append(tensor)


def _edges(func: Any, args: Any, kwargs: Any) -> tuple[float, float] | None:
    if func in RELUS:
        return 0.0, inf
    if func is functional.relu6:
        return 0.0, 6.0
    if func in (functional.hardtanh, functional.hardtanh_):
        low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
        high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
        return float(low), float(high)
    return None


def _affine(
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the (C,) gain and shift of ``functional.batch_norm`` in eval mode."""
    if mean is None or variance is None:  # statistics of the batch: no fixed line
        nothing = torch.full((1,), torch.nan)
        return nothing, nothing
    weight = options.get("weight", weight)
    bias = options.get("bias", bias)
    gain = (variance + options.get("eps", 1e-5)).rsqrt()
    gain = gain if weight is None else gain * weight.detach()
    shift = -mean * gain if bias is None else bias.detach() - mean * gain
    return gain, shift
