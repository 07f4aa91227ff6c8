"""Leave out what only dropped tasks need in a network that torch.fx cannot trace."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from secateur.core.model import MultiTaskModel
from secateur.tasks.trace import Call, Recording, Shape, call_key, first_tensor, record


@dataclass(frozen=True)
class _Zeros:
    """A tensor of zeros; a size of ``(a, b)`` is ``a`` for each ``b`` images of the input."""

    sizes: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype

    def tensor(self, batch: int, device: torch.device) -> Tensor:
        sizes = [
            size if isinstance(size, int) else batch * size[0] // size[1] for size in self.sizes
        ]
        return torch.zeros(sizes, dtype=self.dtype, device=device)


Answer = tuple[tuple[Any, ...], TreeSpec]


class Stub(nn.Module):
    """Stands where a module stood that no kept task needs: zeros, shaped as it answered.

    The batch may be of any size. For inputs of sizes it has not met (a cut made them narrower)
    it gives what it gave for the most similar ones.
    """

    def __init__(self, answers: Mapping[tuple[Any, ...], Answer]) -> None:
        super().__init__()
        self.answers = dict(answers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros in the structure that the module returned for inputs of these sizes."""
        key = call_key(args, kwargs)
        nearest = max(self.answers, key=lambda known: _likeness(known, key))
        first = first_tensor(args, kwargs)
        batch = first.shape[0] if first is not None and first.dim() else 1
        device = first.device if first is not None else torch.device("cpu")
        leaves, spec = self.answers[nearest]
        filled = [leaf.tensor(batch, device) if isinstance(leaf, _Zeros) else leaf
                  for leaf in leaves]  # fmt: skip
        return tree_unflatten(filled, spec)


def _likeness(one: tuple[Any, ...], two: tuple[Any, ...]) -> int:
    """Count the sizes and values that two calls' inputs have in common."""
    return sum(
        sum(x == y for x, y in zip(a, b, strict=False))
        if isinstance(a, tuple) and isinstance(b, tuple) else a == b
        for a, b in zip(one, two, strict=False)
    )  # fmt: skip


def stub_unused(model: MultiTaskModel, keep: Collection[str], example: Tensor) -> MultiTaskModel:
    """Return a copy of ``model`` without the parameters that only dropped tasks read.

    The largest submodules that no task of ``keep`` is computed from become a `Stub`; a parameter
    of its own in any other module becomes a constant zero, one element expanded. What does not
    run at all is left alone: on another image it may.
    """
    image = example[:1]
    stubbed = copy.deepcopy(model)
    batches = torch.cat([image, -image]), torch.cat([-image, image, 2 * image])
    surgeon = _Surgeon(stubbed, [record(stubbed, batch) for batch in batches], frozenset(keep))
    surgeon.visit(stubbed.network)
    stubbed.tasks = tuple(task for task in model.tasks if task.name in keep)
    return stubbed


class _Surgeon:
    """Walks a network from the outside in and replaces what is not needed.

    ``recordings`` are two, of 2 and of 3 images, so that batch sizes can be told from others.
    """

    def __init__(
        self, model: MultiTaskModel, recordings: Sequence[Recording], keep: frozenset[str]
    ) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.needed: set[int] = set()  # ids of parameters
        self.read: set[int] = set()
        self.busy: set[str] = set()  # submodules with a call that a kept task needs
        self.calls: list[dict[str, list[Call]]] = []
        own = dict(model.named_parameters())
        for recording in recordings:
            for name, number in recording.parameters.items():
                if recording.users[number] & keep:
                    self.needed.add(id(own[name]))
                if number in recording.read:
                    self.read.add(id(own[name]))
            calls: dict[str, list[Call]] = defaultdict(list)
            for call in recording.calls:
                calls[call.module].append(call)
                if None in call.writers or recording.needed(call, keep):
                    self.busy.add(call.module)
            self.calls.append(calls)
        self.stubs: dict[int, Stub] = {}

    def visit(self, module: nn.Module) -> None:
        """Replace what is not needed in ``module``, which itself is."""
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and self._unneeded(parameter):
                del module._parameters[key]
                zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
                module.register_buffer(key, zero.expand(parameter.shape), persistent=False)
        for key, child in list(module._modules.items()):
            if child is None:
                continue
            if id(child) in self.stubs or self._droppable(child):
                module._modules[key] = self._stub(child)
            else:
                self.visit(child)

    def _unneeded(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.read - self.needed

    def _droppable(self, module: nn.Module) -> bool:
        name = self.names[id(module)]
        parameters = list(module.parameters())
        return (
            name not in self.busy
            and all(name in calls for calls in self.calls)
            and any(self._unneeded(parameter) for parameter in parameters)
            and not any(id(parameter) in self.needed for parameter in parameters)
        )

    def _stub(self, module: nn.Module) -> Stub:
        if id(module) not in self.stubs:
            name = self.names[id(module)]
            pairs = zip(*(calls[name] for calls in self.calls), strict=False)
            answers = {one.key: (_answer(one, two), one.spec) for one, two in pairs}
            self.stubs[id(module)] = Stub(answers)
        return self.stubs[id(module)]


def _answer(one: Call, two: Call) -> tuple[Any, ...]:
    """Return a call's outputs with zeros for tensors, their sizes following the batch."""
    return tuple(
        _Zeros(tuple(_size(one, two, a, b) for a, b in zip(x.sizes, y.sizes, strict=False)),
               x.dtype)
        if isinstance(x, Shape) and isinstance(y, Shape) else x
        for x, y in zip(one.leaves, two.leaves, strict=False)
    )  # fmt: skip


def _size(one: Call, two: Call, a: int, b: int) -> int | tuple[int, int]:
    return a if a == b or one.batch is None or one.batch == two.batch else (a, one.batch)
