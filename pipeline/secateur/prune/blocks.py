"""Whole residual blocks: which there are, and the network without some of them.

A block adds what it computes to what it was given. So the network runs without it, one kernel
launch and one pass over the activations less for each of its layers, which no cut of its channels
saves. In a network of modules it is a module that, with all its parameters zero, gives back its
input; in one that torch.fx traced, where modules are not called as such, it is a sum.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from secateur.core.model import MultiTaskModel, evaluating

ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
NETWORK = "network."


def find_blocks(model: MultiTaskModel, example: Tensor) -> tuple[str, ...]:
    """Return the names of the residual blocks, the smallest ones, in order of execution.

    ``example``: (N, C, H, W). A module that is called more than once, or with anything beside one
    tensor, is none.
    """
    if isinstance(model.network, fx.GraphModule):
        return tuple(_sums(model.network))
    inputs = _inputs(model, example)
    found = [name for name, given in inputs.items() if _adds(model.get_submodule(name), given)]
    return tuple(n for n in found if not any(other.startswith(f"{n}.") for other in found))


def without_blocks(model: MultiTaskModel, blocks: Collection[str]) -> MultiTaskModel:
    """Return a copy of ``model`` whose ``blocks`` hand on what they are given."""
    shorter = copy.deepcopy(model).eval()
    network = shorter.network
    if blocks and isinstance(network, fx.GraphModule):
        sums = _sums(network)
        for name in (n for n in reversed(sums) if n in blocks):  # a later one may read an earlier
            sums[name].node.replace_all_uses_with(sums[name].given)
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
        network.recompile()
    else:
        for name in blocks:
            shorter.set_submodule(name, nn.Identity())
    return shorter


@dataclass(frozen=True)
class _Sum:
    """``node`` adds what ``branch`` computes from ``given``, and from that alone, to ``given``."""

    node: fx.Node
    given: fx.Node
    branch: frozenset[fx.Node]


def _sums(network: fx.GraphModule) -> dict[str, _Sum]:
    """Return the smallest residual sums, each named by what its modules' names begin with."""
    found: list[tuple[str, _Sum]] = []
    for node in network.graph.nodes:
        nodes = [given for given in node.args if isinstance(given, fx.Node)]
        if node.target not in ADDS or len(nodes) != 2:
            continue
        for given, made in (nodes, nodes[::-1]):
            branch = _branch(made, given, node)
            layers = _layers(network, branch)
            if layers and not any(other.node in branch for _, other in found):
                name = _common(layers) or node.name
                found.append((f"{NETWORK}{name}", _Sum(node, given, branch)))
    names = [name for name, _ in found]
    return {name: own for name, own in found if names.count(name) == 1}  # else it runs twice


def _branch(made: fx.Node, given: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """Return the nodes that make ``made`` of ``given`` for ``end`` alone; empty if there are more.

    Going back from ``made`` must end in ``given`` everywhere, or in constants.
    """
    branch: set[fx.Node] = set()
    todo = [made]
    while todo:
        node = todo.pop()
        if node is given or node in branch:
            continue
        if node.op == "placeholder":
            return frozenset()
        branch.add(node)
        todo += node.all_input_nodes
    inside = {*branch, end}
    return frozenset(branch if all(inside >= {*node.users} for node in branch) else ())


def _layers(network: fx.GraphModule, branch: Collection[fx.Node]) -> list[str]:
    """Return the names of the branch's modules that have parameters."""
    return [
        str(node.target)
        for node in branch
        if node.op == "call_module"
        and any(True for _ in network.get_submodule(str(node.target)).parameters())
    ]


def _common(layers: Collection[str]) -> str:
    """Return the module that holds all these layers, or "" where it is the network."""
    parts = zip(*(layer.split(".") for layer in layers), strict=False)
    same = [of_all[0] for of_all in parts if len({*of_all}) == 1]
    return ".".join(same)


def _inputs(model: MultiTaskModel, example: Tensor) -> dict[str, Tensor]:
    """Return what each module that may be a block was given, by name in order of execution."""
    inputs: dict[str, Tensor] = {}
    others: set[str] = set()
    hooks = []

    def before(name: str, given: tuple[object, ...], options: dict[str, object]) -> None:
        first = given[0] if len(given) == 1 and not options else None
        if isinstance(first, Tensor) and name not in inputs:
            inputs[name] = first.clone()  # the module may change it in place
        else:
            others.add(name)

    def after(name: str, made: object) -> None:
        if name in inputs and not (isinstance(made, Tensor) and made.shape == inputs[name].shape):
            others.add(name)

    for name, module in model.named_modules():
        own = any(True for _ in module.children()) and any(True for _ in module.parameters())
        if name and own:
            hooks += [
                module.register_forward_pre_hook(
                    lambda _, given, options, name=name: before(name, given, options),
                    with_kwargs=True,
                ),
                module.register_forward_hook(lambda _, __, made, name=name: after(name, made)),
            ]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: given for name, given in inputs.items() if name not in others}


def _adds(module: nn.Module, given: Tensor) -> bool:
    """Say whether the module gives back its input when all its parameters are zero."""
    empty = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
        try:
            return bool(given.any()) and torch.equal(empty(given.clone()), given)
        except Exception:  # what a module makes of zeros is its own; then it is no block
            return False
