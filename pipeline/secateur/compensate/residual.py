"""Find what is added to a layer's output, so that a refit can mend the sum and not only itself.

In ``y = shortcut + norm(layer(h))`` the shortcut of a cut network already carries an error. Asking
the layer for ``parent's y - cut's shortcut`` instead of ``parent's norm(layer(h))`` lets it take
back as much of that error as its inputs can express.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.model import MultiTaskModel, evaluating

Place = tuple[str, str]
"""("in" | "out", module name): a module's input or output tensor."""
ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)


def partners(
    model: MultiTaskModel, layers: Collection[str], norms: Mapping[str, nn.Module], image: Tensor
) -> dict[str, Place]:
    """Return, per layer, where the tensor added to its (normalised) output can be read.

    ``norms`` gives the batch norm that follows a layer. Only partners that exist before the layer
    runs are returned: a projection shortcut computed later is itself such a layer.
    """
    seen = _Recorder(layers, norms)
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(seen.before, name)))
        hooks.append(module.register_forward_hook(partial(seen.after, name)))
    try:
        with evaluating(model), _Adds(seen.added):
            model(image)
    finally:
        for handle in hooks:
            handle.remove()
    return seen.found()


class _Recorder:
    """What one pass shows: where and when each tensor appears, and what is added to what."""

    def __init__(self, layers: Collection[str], norms: Mapping[str, nn.Module]) -> None:
        self._layers, self._norms = layers, norms
        self._normed = {id(norm): layer for layer, norm in norms.items()}
        self._alive: list[Tensor] = []  # so that ids stay unique; its length is the time
        self._places: dict[int, list[Place]] = {}  # by tensor, in order of time
        self._first: dict[int, int] = {}  # when a tensor appeared
        self._starts: dict[str, int] = {}  # when a layer ran
        self._ends: dict[int, str] = {}  # a layer's normalised output -> the layer
        self._visits: Counter[Place] = Counter()
        self._partners: dict[str, list[Place]] = {}

    def before(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """See a module's input."""
        if args:
            self._see(args[0], ("in", name))
        if name in self._layers:
            self._starts[name] = len(self._alive)

    def after(self, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        """See a module's output."""
        self._see(output, ("out", name))
        if id(module) in self._normed:
            self._ends[id(output)] = self._normed[id(module)]
        elif name in self._layers and name not in self._norms:
            self._ends[id(output)] = name

    def added(self, left: Any, right: Any) -> None:
        """See a sum: where one side is a layer's output, the other may be its partner."""
        for own, other in ((left, right), (right, left)):
            layer = self._ends.get(id(own))
            if layer is None or not isinstance(other, Tensor) or other.shape != own.shape:
                continue
            if id(other) in self._places and self._first[id(other)] <= self._starts[layer]:
                self._partners[layer] = list(self._places[id(other)])

    def found(self) -> dict[str, Place]:
        """Return the first place of each layer's partner that is passed once.

        At one that is passed twice, as one ReLU for all of a block is, another tensor may be next.
        """
        once = {layer: [place for place in places if self._visits[place] == 1]
                for layer, places in self._partners.items()}  # fmt: skip
        return {layer: places[0] for layer, places in once.items() if places}

    def _see(self, tensor: Any, place: Place) -> None:
        if isinstance(tensor, Tensor):
            self._alive.append(tensor)
            self._visits[place] += 1
            self._first.setdefault(id(tensor), len(self._alive))
            self._places.setdefault(id(tensor), []).append(place)


class _Adds(TorchFunctionMode):
    """Calls ``tell(left, right)`` at every sum of two tensors."""

    def __init__(self, tell: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDS and len(args) == 2:
            self._tell(*args)
        return func(*args, **(kwargs or {}))
