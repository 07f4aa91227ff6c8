"""Find what is added to a layer's output, so that a refit can mend the sum and not only itself.

In ``y = shortcut + norm(layer(h))`` the shortcut of a cut network already carries an error. Asking
the layer for ``parent's y - cut's shortcut`` instead of ``parent's norm(layer(h))`` lets it take
back as much of that error as its inputs can express.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
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
    made: dict[int, list[Place]] = {}  # tensor id -> where it appears, in order of time
    ends: dict[int, str] = {}  # id of a layer's normalised output -> the layer
    starts: dict[str, int] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
    candidates: dict[str, list[Place]] = {}
    visits: Counter[Place] = Counter()
    clock = [0]
    times: dict[int, int] = {}
    after_norm = {id(norm): layer for layer, norm in norms.items()}

    def see(tensor: Any, place: Place) -> None:
        if isinstance(tensor, Tensor):
            clock[0] += 1
            alive.append(tensor)
            visits[place] += 1
            times.setdefault(id(tensor), clock[0])
            made.setdefault(id(tensor), []).append(place)

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                see(args[0], ("in", name))
            if name in layers:
                starts[name] = clock[0]

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            see(output, ("out", name))
            if id(module) in after_norm:
                ends[id(output)] = after_norm[id(module)]
            elif name in layers and name not in norms:
                ends[id(output)] = name

        return hook

    def added(left: Any, right: Any) -> None:
        for own, other in ((left, right), (right, left)):
            layer = ends.get(id(own))
            if layer is None or not isinstance(other, Tensor) or other.shape != own.shape:
                continue
            if id(other) in made and times[id(other)] <= starts[layer]:
                candidates[layer] = list(made[id(other)])

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(before(name)))
        hooks.append(module.register_forward_hook(after(name)))
    try:
        with evaluating(model), _Adds(added):
            model(image)
    finally:
        for handle in hooks:
            handle.remove()
    # at a place that is passed twice, as one ReLU for all of a block is, another tensor may be next
    once = {layer: [place for place in places if visits[place] == 1]
            for layer, places in candidates.items()}  # fmt: skip
    return {layer: places[0] for layer, places in once.items() if places}


class _Adds(TorchFunctionMode):
    """Calls ``tell(left, right)`` at every sum of two tensors."""

    def __init__(self, tell: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDS and len(args) == 2:
            self._tell(*args)
        return func(*args, **(kwargs or {}))
