"""Read a part of a concat from where it came, so that heads joined and split come apart again."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

CONCATS = {torch.cat, torch.concat, torch.concatenate}
SPLITS = {torch.split, torch.chunk, torch.tensor_split, "split", "chunk", "tensor_split"}
NARROWS = {torch.narrow, "narrow"}
# What acts on each channel by itself, so that a part of its result is its result on that part.
PER_CHANNEL = {
    torch.relu, torch.sigmoid, torch.tanh, torch.exp, functional.relu, functional.relu6,
    functional.silu, functional.gelu, functional.softplus,
    "relu", "sigmoid", "tanh", "exp", "contiguous", "float", "clamp",
}  # fmt: skip
PER_CHANNEL_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout,
    nn.Hardswish, nn.Upsample,
)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """``node`` is channels ``start`` to ``stop`` of ``source`` along ``dim``.

    ``index`` are the entries of its getitem, or None where it is the whole of those channels.
    """

    source: fx.Node
    dim: int
    start: int
    stop: int
    index: tuple[Any, ...] | None


def narrow_concats(graph: fx.Graph) -> bool:
    """Rewrite parts of concats in place; return whether there were any.

    A slice, or an item of split, chunk or narrow, that lies within some of a concat's inputs
    becomes (a slice of) these inputs, also through activations and resizes. Each node's
    ``meta["value"]`` must hold its shape. What is then unused is left to dead code elimination.
    """
    changed = False
    again = True
    while again:
        again = False
        for node in list(graph.nodes):
            part = _part_of(node)
            found = None if part is None else _narrowed(graph, node, part)
            if part is None or found is None:
                continue
            narrow, offset = found
            with graph.inserting_before(node):
                new = _take(graph, narrow, part, offset)
            if "value" not in new.meta:
                new.meta["value"] = node.meta["value"]
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            changed = again = True
    return changed


def _part_of(node: fx.Node) -> _Part | None:
    """Return which channels of which tensor ``node`` is, if it is that."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source, *rest = node.args
    if not isinstance(source, fx.Node):
        return None
    if node.target in NARROWS:
        given = (*rest, *(node.kwargs.get(k) for k in ("dim", "start", "length")[len(rest) :]))
        if not all(isinstance(value, int) for value in given):
            return None
        dim, start, length = (int(value) for value in given)  # type: ignore[arg-type]
        size = _size(source)
        start += size[dim] if start < 0 else 0
        return _Part(source, dim % len(size), start, start + length, None)
    if node.target is not operator.getitem:
        return None
    if source.target in SPLITS and isinstance(rest[0], int):
        return _split_part(source, rest[0])
    size = _size(source)
    index = _entries(rest[0], len(size)) if size else None
    return _sliced(source, index, size) if index else None


def _split_part(split: fx.Node, item: int) -> _Part | None:
    source, pieces = split.args[0], split.meta["value"]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or not _size(source):
        return None
    dim %= len(_size(source))
    ends = list(itertools.accumulate((piece[dim] for piece in pieces), initial=0))
    item %= len(pieces)
    return _Part(source, dim, ends[item], ends[item + 1], None)


def _entries(index: Any, rank: int) -> tuple[Any, ...] | None:
    """Return an index with one entry per dimension, or None if it is more than slices and ints."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(entry is Ellipsis for entry in entries):
        at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
        fill = (slice(None),) * (rank - len(entries) + 1)
        entries = (*entries[:at], *fill, *entries[at + 1 :])
    entries += (slice(None),) * (rank - len(entries))
    plain = (int, type(None))
    for entry in entries:
        bounds = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,)
        if isinstance(entry, bool) or entry is None:
            return None
        if not all(isinstance(bound, plain) for bound in bounds):
            return None
    return entries if len(entries) == rank else None


def _sliced(source: fx.Node, index: tuple[Any, ...], size: Sequence[int]) -> _Part | None:
    """Return the part a getitem takes along the dimension its source was joined."""
    joined = _concat_behind(source)
    if joined is None:
        return None
    dim = _dim(joined.concat)
    entry = index[dim]
    if isinstance(entry, slice):
        start, stop, step = entry.indices(size[dim])
        return _Part(source, dim, start, stop, index) if step == 1 else None
    start = entry % size[dim]
    return _Part(source, dim, start, start + 1, index)


@dataclass(frozen=True)
class _Joined:
    """A concat, the per-channel operations between it and a node (last first), and the channel of
    the concat where that node starts."""

    concat: fx.Node
    after: tuple[fx.Node, ...]
    start: int


def _concat_behind(node: fx.Node) -> _Joined | None:
    """Return the concat that ``node`` is, or a run of channels of, through activations."""
    after: list[fx.Node] = []
    start, dims = 0, set()
    while node.target not in CONCATS:
        part = _part_of(node)
        if part is not None and _is_run(part):
            start, node = start + part.start, part.source
            dims.add(part.dim)
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _per_channel(node):
            return None
        if len(_size(source)) < 2 or len(_size(source)) != len(_size(node)):
            return None
        after.append(node)
        dims.add(1)
        node = source
    inputs = node.args[0] if node.args else None
    listed = isinstance(inputs, list | tuple) and all(isinstance(i, fx.Node) for i in inputs)
    if not listed or not isinstance(_dim_argument(node), int) or dims - {_dim(node)}:
        return None
    return _Joined(node, tuple(after), start)


def _is_run(part: _Part) -> bool:
    """Say whether ``part`` keeps all of the other dimensions, and its own as one."""
    return part.index is None or all(
        isinstance(entry, slice) and (entry == slice(None) or dim == part.dim)
        for dim, entry in enumerate(part.index)
    )


def _per_channel(node: fx.Node) -> bool:
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = owner and owner.get_submodule(str(node.target))
        in_place = getattr(module, "inplace", False)  # it would now write into the input
        return isinstance(module, PER_CHANNEL_MODULES) and not in_place
    if node.target is functional.interpolate:
        return True
    others = (*node.args[1:], *node.kwargs.values())  # a bound may be a tensor of its own
    plain = not any(isinstance(value, fx.Node) for value in others)
    return node.target in PER_CHANNEL and plain and node.kwargs.get("inplace") is not True


def _narrowed(graph: fx.Graph, node: fx.Node, part: _Part) -> tuple[fx.Node, int] | None:
    """Return a node with only those inputs of the concat that ``part`` touches, and the channel of
    ``part.source`` where it starts; None where there is no concat or all of it is touched."""
    joined = _concat_behind(part.source)
    if joined is None or _dim(joined.concat) != part.dim or part.start >= part.stop:
        return None
    concat = joined.concat
    start, stop = joined.start + part.start, joined.start + part.stop
    inputs = [value for value in concat.args[0] if isinstance(value, fx.Node)]  # type: ignore[union-attr]
    ends = list(itertools.accumulate((_size(i)[part.dim] for i in inputs), initial=0))
    touched = [at for at in range(len(inputs)) if ends[at] < stop and ends[at + 1] > start]
    if len(touched) == len(inputs):
        return None
    chosen, offset = [inputs[at] for at in touched], ends[touched[0]]
    width = ends[touched[-1] + 1] - offset
    with graph.inserting_before(node):
        source = chosen[0]
        if len(chosen) > 1:
            source = graph.call_function(torch.cat, (chosen, part.dim))
            source.meta["value"] = _resized(_size(concat), part.dim, width)
        for operation in reversed(joined.after):
            source = graph.create_node(
                operation.op, operation.target, (source, *operation.args[1:]), operation.kwargs
            )
            source.meta["value"] = _resized(_size(operation), part.dim, width)
    return source, offset - joined.start


def _take(graph: fx.Graph, source: fx.Node, part: _Part, offset: int) -> fx.Node:
    """Return the node that reads ``part`` from ``source``, which starts at channel ``offset``."""
    start, stop = part.start - offset, part.stop - offset
    whole = (start, stop) == (0, _size(source)[part.dim])
    index = list(part.index or (slice(None),) * (part.dim + 1))
    if isinstance(index[part.dim], slice):
        index[part.dim] = slice(None) if whole else slice(start, stop)
    else:
        index[part.dim] = start
    if all(entry == slice(None) for entry in index):
        return source
    return graph.call_function(operator.getitem, (source, tuple(index)))


def _size(node: fx.Node) -> tuple[int, ...]:
    """Return a tensor's shape; empty for anything else."""
    value = node.meta.get("value", ())
    plain = isinstance(value, tuple) and all(isinstance(size, int) for size in value)
    return value if plain else ()


def _resized(size: tuple[int, ...], dim: int, width: int) -> tuple[int, ...]:
    return (*size[:dim], width, *size[dim + 1 :])


def _dim_argument(concat: fx.Node) -> Any:
    if len(concat.args) > 1:
        return concat.args[1]
    return concat.kwargs.get("dim", concat.kwargs.get("axis", 0))


def _dim(concat: fx.Node) -> int:
    return int(_dim_argument(concat)) % len(_size(concat))
