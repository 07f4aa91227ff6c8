"""Drop tasks and whatever only they need; the other outputs stay bit for bit the same."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Protocol, runtime_checkable

from torch import fx, nn

from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel


@runtime_checkable
class SelectsOutputs(Protocol):
    """A network that can build itself with fewer outputs, faster than we can by tracing."""

    def select_outputs(self, names: Collection[str]) -> nn.Module:
        """Return a copy that computes only these outputs."""
        ...


def select_tasks(model: MultiTaskModel, keep: Collection[str]) -> MultiTaskModel:
    """Return a copy of ``model`` that computes only the tasks in ``keep``, in the model's order.

    A network with ``select_outputs`` does it itself; any other is traced with torch.fx and all
    that no kept output reads is removed, whatever its name.

    Raises:
        ModelError: the network cannot be traced.
    """
    tasks = tuple(task for task in model.tasks if task.name in keep)
    names = [task.output for task in tasks]
    if isinstance(model.network, SelectsOutputs):
        return MultiTaskModel(model.network.select_outputs(names), tasks)
    if len(tasks) == len(model.tasks):
        return copy.deepcopy(model)
    return MultiTaskModel(_eliminate(model.network, names), tasks)


def _eliminate(network: nn.Module, names: Collection[str]) -> nn.Module:
    was_training = network.training
    try:
        graph = fx.symbolic_trace(copy.deepcopy(network).eval())
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be traced to drop unwanted tasks: {error}",
            hint="give it a method select_outputs(names) that returns the smaller module, "
            "or keep all its tasks",
        ) from error
    output = next(node for node in graph.graph.nodes if node.op == "output")
    result = output.args[0]
    if isinstance(result, fx.Node):
        raise ModelError(
            "forward returns its outputs as one opaque value, so none can be left out",
            hint="return a dict or a tuple literal with one entry per task",
        )
    if not isinstance(result, dict):
        result = {str(i): value for i, value in enumerate(result)}
    output.args = ({name: result[name] for name in names},)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.train(was_training)
