"""One forward pass, recorded: every operation, what it reads, and the tasks that need it.

Below autograd, at the level of torch's own operators (``TorchDispatchMode``). Autograd's graph
would lose what passes through ``detach``, ``no_grad``, a comparison or an argmax, and whatever is
frozen; here an output depends on all that was read to compute it, whatever the values are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten

from secateur.core.errors import ModelError
from secateur.core.flops import flop_registry
from secateur.core.model import MultiTaskModel, evaluating

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Shape:
    """A tensor's sizes and type."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One call of a submodule.

    ``key`` stands for its inputs (see `call_key`), ``batch`` is the first input's first size,
    ``leaves`` and ``spec`` are its outputs flattened, each tensor as a `Shape`. ``writers`` are
    the operations that made those outputs (None for one this pass did not make), ``operations``
    all that ran inside, ``task`` the module's attribute of that name.
    """

    module: str
    key: tuple[Any, ...]
    batch: int | None
    leaves: tuple[Any, ...]
    spec: TreeSpec
    writers: tuple[int | None, ...]
    operations: range
    task: str | None


@dataclass(frozen=True)
class Recording:
    """Operations are numbered in execution order; the parameters come first.

    ``users[i]``: the tasks whose outputs are computed from operation ``i``. ``macs[i]`` are its
    multiply-accumulates and ``layers[i]`` the innermost submodule it ran in. ``parameters`` gives
    each parameter's number, ``read`` the numbers that some other operation reads.
    """

    users: Sequence[frozenset[str]]
    macs: Sequence[int]
    layers: Sequence[str]
    parameters: Mapping[str, int]
    read: frozenset[int]
    calls: Sequence[Call]

    def needed(self, call: Call, keep: Iterable[str]) -> bool:
        """Say whether a task of ``keep`` is computed from anything that ``call`` did or gave."""
        wanted = set(keep)
        made = [number for number in call.writers if number is not None]
        return any(self.users[number] & wanted for number in (*call.operations, *made))


def record(model: MultiTaskModel, example: Tensor) -> Recording:
    """Run ``model`` once on ``example`` (N, C, H, W), in eval mode, and return what happened.

    No weight, flag or mode of the model is changed. Memory: all activations of one pass.

    Raises:
        ModelError: a part of the model is TorchScript, which cannot be watched.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"'{name}' is TorchScript, so what it computes from what cannot be seen",
                hint="build the model from its Python code and load the weights into that",
            )
    tape = _Tape()
    parameters = {name: tape.source(parameter) for name, parameter in model.named_parameters()}
    with evaluating(model), _watched(model, tape), tape:
        outputs: dict[str, Tensor] = model(example)
    masks = [0] * len(tape.reads)
    for bit, output in enumerate(outputs.values()):
        number = tape.writer(output)
        if number is not None:
            masks[number] |= 1 << bit
    for number in range(len(masks) - 1, -1, -1):
        for source in tape.reads[number]:
            masks[source] |= masks[number]
    names = {
        mask: frozenset(task for bit, task in enumerate(outputs) if mask >> bit & 1)
        for mask in set(masks)
    }
    return Recording(
        users=[names[mask] for mask in masks],
        macs=tape.macs,
        layers=tape.layers,
        parameters=parameters,
        read=frozenset().union(*tape.reads),
        calls=tape.calls,
    )


def call_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells calls of one module apart: its inputs' sizes without the batch."""
    leaves, _ = tree_flatten((args, dict(kwargs)))
    return tuple(
        tuple(leaf.shape[1:]) if isinstance(leaf, Tensor)
        else leaf if isinstance(leaf, PLAIN) else type(leaf).__name__
        for leaf in leaves
    )  # fmt: skip


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among a call's inputs."""
    return next(iter(_tensors((args, dict(kwargs)))), None)


def active_task(module: nn.Module) -> str | None:
    """Return the task a re-parametrised layer is set to, or peft's one active adapter."""
    task = getattr(module, "task", None)
    adapters = getattr(module, "active_adapters", None)
    if task is None and isinstance(adapters, list | tuple) and len(adapters) == 1:
        task = adapters[0]
    return task if isinstance(task, str) else None


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers operations, and remembers by storage which of them wrote a tensor last.

    Storages, not tensors, because views and in-place writes share them; they are held until the
    end so that no address is used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: list[frozenset[int]] = []
        self.macs: list[int] = []
        self.layers: list[str] = []
        self.calls: list[Call] = []
        self.inside = [""]
        self._writers: dict[int, int] = {}
        self._held: list[torch.UntypedStorage] = []

    def source(self, tensor: Tensor) -> int:
        """Number a parameter; those that share one storage share the number."""
        known = self.writer(tensor)
        return self._add([tensor], frozenset(), 0) if known is None else known

    def writer(self, tensor: Tensor) -> int | None:
        """Return the operation that wrote ``tensor`` last."""
        return self._writers.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:  # what is only a name for other operations is counted as those
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        sources = frozenset(
            number
            for tensor in _tensors((args, kwargs))
            if not _shape_only(packet) and (number := self.writer(tensor)) is not None
        )
        result = func(*args, **kwargs)
        written = [tensor for tensor in _tensors(result) if self.writer(tensor) is None]
        written += _overwritten(func, args, kwargs)
        if written:
            count = flop_registry.get(packet)
            macs = int(count(*args, **kwargs, out_val=result)) // 2 if count else 0
            self._add(written, sources, macs)
        return result

    def _add(self, written: Iterable[Tensor], sources: frozenset[int], macs: int) -> int:
        number = len(self.reads)
        self.reads.append(sources)
        self.macs.append(macs)
        self.layers.append(self.inside[-1])
        for tensor in written:
            storage = tensor.untyped_storage()
            self._writers[storage._cdata] = number
            self._held.append(storage)
        return number


@contextmanager
def _watched(model: nn.Module, tape: _Tape) -> Iterator[None]:
    """Note on ``tape`` which submodule runs, and each of its calls."""
    starts: list[int] = []

    def enter(name: str) -> None:
        tape.inside.append(name)
        starts.append(len(tape.reads))

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tape.inside.pop()
        leaves, spec = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        opaque = any(not isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
        first = first_tensor(args, kwargs)
        tape.calls.append(
            Call(
                module=name,
                key=call_key(args, kwargs),
                batch=first.shape[0] if first is not None and first.dim() else None,
                leaves=tuple(
                    Shape(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
                    for leaf in leaves
                ),
                spec=spec,
                writers=(*(tape.writer(tensor) for tensor in tensors), *([None] * opaque)),
                operations=range(starts.pop(), len(tape.reads)),
                task=active_task(module),
            )
        )

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(
            module.register_forward_hook(
                lambda m, args, kwargs, out, name=name: leave(name, m, args, kwargs, out),
                with_kwargs=True,
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def _shape_only(packet: Any) -> bool:
    """Say whether an operator reads its input's shape but none of its values."""
    name = packet.__name__
    return bool(name.endswith("_like") or name.startswith("new_"))


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the inputs an operator writes into."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    given |= kwargs
    return _tensors(
        [
            given[argument.name]
            for argument in func._schema.arguments
            if argument.name in given and argument.alias_info and argument.alias_info.is_write
        ]
    )
