"""A network as a torch.fx graph that computes some of its outputs and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from secateur.core.errors import ModelError, first_line
from secateur.tasks.concats import narrow_concats

CHECKS = {torch._assert, getattr(torch, "_assert_async", torch._assert)}
IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
}  # fmt: skip


def trace_outputs(network: nn.Module, example: Tensor | None) -> tuple[fx.GraphModule, bool]:
    """Return ``network`` as a graph that returns ``{output name: tensor}``.

    The graph shares the network's modules. With an ``example`` (N, C, H, W) the sizes are known,
    so that a part of a concat is read from where it came (`narrow_concats`); the second value
    says whether there was such a part.

    Raises:
        ModelError: torch.fx cannot follow ``forward``, or it returns one opaque value.
    """
    try:
        graph = fx.GraphModule(network, _Tracer().trace(network))
        _thread_writes(graph)
        if example is not None:
            _Sizes(graph).run(example)
        _name_outputs(graph)
    except ModelError:
        raise
    except Exception as error:  # the user's own code meets proxies and may raise anything
        raise ModelError(
            f"the model cannot be traced to drop unwanted tasks: {first_line(error)}",
            hint="give it a method select_outputs(names) that returns the smaller module, "
            "or keep all its tasks",
        ) from error
    narrowed = example is not None and narrow_concats(graph.graph)
    graph.recompile()
    return graph, narrowed


def eliminate(network: nn.Module, names: Collection[str], example: Tensor | None) -> fx.GraphModule:
    """Return a graph of ``network`` that computes the outputs ``names`` only.

    It holds exactly the modules and parameters that these read, and shares them.

    Raises:
        ModelError: as `trace_outputs`.
    """
    was_training = network.training
    graph, _ = trace_outputs(network.eval(), example)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = ({name: output.args[0][name] for name in names},)
    graph.graph.eliminate_dead_code(
        is_impure_node=lambda node: node.is_impure() and node.target not in CHECKS
    )
    for node in graph.graph.nodes:
        node.meta.pop("value", None)
    return fx.GraphModule(graph, graph.graph).train(was_training)  # copies what is read only


LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm,
          nn.GroupNorm)  # fmt: skip


class _Tracer(fx.Tracer):
    """Keeps layers of other libraries that derive from torch's, such as timm's, whole.

    torch.fx would take them apart into functions of bare parameters, which no later stage knows as
    layers. One that holds more than a weight and a bias may be of a task, and is taken apart. What
    asks whether it is in training, as stochastic depth does, would be traced in one of its ways.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        plain = {name for name, _ in m.named_parameters()} <= {"weight", "bias"}
        whole = (isinstance(m, LAYERS) and plain) or _differs_in_training(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _differs_in_training(module: nn.Module) -> bool:
    """Say whether a module without weights, children or buffers asks whether it is in training."""
    code = getattr(type(module).forward, "__code__", None)
    held = (module._parameters, module._buffers, module._modules)
    return code is not None and "training" in code.co_names and not any(held)


class _Sizes(fx.Interpreter):
    """Runs a graph and notes each value: a tensor by its shape, all else as it is."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["value"] = tree_map(_shape, result)
        return result


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _thread_writes(graph: fx.GraphModule) -> None:
    """Let what is read after an in-place operation read that operation's result.

    It is the same tensor, and dead code elimination then sees that the write is needed.
    """
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if not _writes(node, modules) or not isinstance(node.args[0], fx.Node):
            continue
        later = _after(node)
        for user in [user for user in node.args[0].users if user in later]:
            user.replace_input_with(node.args[0], node)


def _writes(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if not node.args:
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    return node.op == "call_function" and (
        node.target in IN_PLACE or node.kwargs.get("inplace") is True
    )


def _after(node: fx.Node) -> set[fx.Node]:
    later, following = set(), node.next
    while following.op != "root":
        later.add(following)
        following = following.next
    return later


def _name_outputs(graph: fx.GraphModule) -> None:
    """Make the graph return a dict, whatever ``forward`` returned."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    result = output.args[0]
    if isinstance(result, fx.Node):
        value = result.meta.get("value")
        keys: Iterable[Any]
        if isinstance(value, Mapping):
            keys = value
        elif isinstance(value, list | tuple) and all(isinstance(v, list | tuple) for v in value):
            keys = range(len(value))
        else:
            raise ModelError(
                "forward returns its outputs as one opaque value, so none can be left out",
                hint="return a dict or a tuple literal with one entry per task",
            )
        with graph.graph.inserting_before(output):
            result = {
                key: graph.graph.call_function(operator.getitem, (result, key)) for key in keys
            }
    elif not isinstance(result, Mapping):
        result = dict(enumerate(result))
    output.args = ({str(name): value for name, value in result.items()},)
