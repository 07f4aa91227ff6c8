"""Find where a layer's output is clipped, so that a refit need not care about what is cut off.

Under a ReLU all negative values are alike. Zhang et al. (arXiv 1505.06798, section 2.3) fit the
response *after* the non-linearity for that reason; here the target follows the prediction wherever
both lie beyond the same edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
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


@dataclass(frozen=True)
class Readers:
    """``clips`` are what alone reads a layer's output, perhaps through a batch norm.

    ``single`` are the layers whose output one operator reads.
    """

    clips: Mapping[str, Clip]
    single: frozenset[str]


def find_readers(model: MultiTaskModel, layers: Collection[str], image: Tensor) -> Readers:
    """Return what reads the layers' outputs; ``image``: (1, C, H, W)."""
    watch = _Watch()
    hooks = [
        module.register_forward_hook(lambda m, _i, out, name=name: watch.made(name, m, out))
        for name, module in model.named_modules()
        if name in layers
    ]
    try:
        with evaluating(model), watch:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.readers()


class _Watch(TorchFunctionMode):
    """Follows layer outputs through batch norms into clipping functions, and counts who reads."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, Clip] = {}
        self._open: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}
        self._first: dict[str, tuple[int, int]] = {}  # the layer's own output
        self._reads: Counter[tuple[int, int]] = Counter()
        self._alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique

    def made(self, name: str, layer: nn.Module, output: Tensor) -> None:
        channels = len(next(layer.parameters()))
        self._first[name] = id(output), output._version
        self._follow(output, (name, torch.ones(channels), torch.zeros(channels)))

    def readers(self) -> Readers:
        shared = {self._open[key][0] for key, count in self._reads.items() if count > 1}
        clips = {name: clip for name, clip in self._found.items() if name not in shared}
        single = {name for name, key in self._first.items() if self._reads[key] == 1}
        return Readers(clips, frozenset(single))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        known = self._open.get((id(source), source._version)) if source is not None else None
        if known is not None:
            edges = _edges(func, args, kwargs)
            if edges is not None:
                self._found[known[0]] = Clip(known[1], known[2], *edges)
        read = [(id(t), t._version) for t in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        if any(True for _ in _tensors(result)):  # not a question for its shape
            self._reads.update(key for key in set(read) if key in self._open)
        if known is not None and func is functional.batch_norm:
            line = _affine(*args[1:5], **kwargs)
            if line is not None:
                self._follow(result, (known[0], *line))
        return result

    def _follow(self, tensor: Tensor, what: tuple[str, Tensor, Tensor]) -> None:
        self._open[id(tensor), tensor._version] = what
        self._alive.append(tensor)


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


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
) -> tuple[Tensor, Tensor] | None:
    """Return the (C,) gain and shift of ``functional.batch_norm`` in eval mode.

    None for one that takes the batch's own statistics: that is no fixed line.
    """
    if mean is None or variance is None:
        return None
    weight = options.get("weight", weight)
    bias = options.get("bias", bias)
    gain = (variance + options.get("eps", 1e-5)).rsqrt()
    gain = gain if weight is None else gain * weight.detach()
    shift = -mean * gain if bias is None else bias.detach() - mean * gain
    return gain, shift
