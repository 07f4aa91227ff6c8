"""torch-pruning's dependency graph (DepGraph, arXiv 2301.12900), mended for today's torch.

Whatever is still followed wrongly shows in ``trial``.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch_pruning import DependencyGraph, ops
from torch_pruning.dependency import Group, index_mapping, shape_infer

from secateur.core.attached import Attached
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, attributes_kept

ROOT_TYPES = (nn.Conv2d, nn.Linear)
STEPS, LEAST_STEPS = 20, 1000  # from one layer: per operator of the graph, and at least


def dependency_graph(model: MultiTaskModel, example: Tensor) -> DependencyGraph:
    """Trace ``model`` on ``example`` and return torch-pruning's graph of it.

    The trace follows autograd, so a ``detach`` in forward is passed over.

    Raises:
        ModelError: the model cannot be traced.
    """
    model.eval()
    try:
        with warnings.catch_warnings(), _mended(), differentiable(model), Attached():
            warnings.simplefilter("ignore")  # torch-pruning warns of each unwrapped parameter
            graph = DependencyGraph().build_dependency(
                model,
                example_inputs=(example,),  # a bare tensor it would unpack, image by image
                verbose=False,
            )
    except Exception as error:  # torch-pruning and the model may raise anything
        raise ModelError(
            f"the dependency graph of the model cannot be traced: {error}",
            hint="forward must be made of differentiable torch calls on module parameters",
        ) from error
    _map_concats(graph)
    return graph


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter be in autograd's graph for a block; then leave the model as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with attributes_kept(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def coupled_sets(graph: DependencyGraph, protected: Sequence[nn.Module]) -> list[Group]:
    """Return torch-pruning's groups; a layer from which it cannot follow its channels has none."""
    ignored, started = list(protected), list[nn.Module]()
    follow, most = graph.get_pruning_group, max(LEAST_STEPS, STEPS * len(graph.module2node))

    def noted(root: nn.Module, *rest: Any) -> Group:
        started.append(root)
        with _counting(most):
            return follow(root, *rest)

    graph.get_pruning_group = noted
    while True:
        every = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(ROOT_TYPES))
        try:
            return list(every)
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            ignored.append(started[-1])


@contextmanager
def _counting(most: int) -> Iterator[None]:
    """Raise RuntimeError beyond so many steps from one layer.

    torch-pruning 1.6 follows slices of one tensor that meet again round and round.
    """
    add, steps = Group.add_dep, itertools.count()

    def counted(group: Group, *what: Any, **named: Any) -> None:
        if next(steps) > most:
            raise RuntimeError("channels are coupled without end")
        add(group, *what, **named)

    Group.add_dep = counted
    try:
        yield
    finally:
        Group.add_dep = add


@contextmanager
def _mended() -> Iterator[None]:
    """Tell the sizes of splits, and let concats of unknown sizes stay unmapped, as others are.

    torch-pruning 1.6 looks for a split's size under a name that torch has given up, and adds a
    concat's sizes up before it looks whether it knows them.
    """
    shapes, concats = shape_infer.init_shape_information, index_mapping.update_concat_index_mapping

    def with_splits(graph: DependencyGraph) -> None:
        shapes(graph)
        for node in graph.module2node.values():
            size = getattr(node.grad_fn, "_saved_split_size", None)
            if node.type == ops.OPTYPE.SPLIT and isinstance(size, int):
                count = len(node.outputs)
                node.module.split_sizes = [size] * count
                node.module.offsets = [size * place for place in range(count + 1)]

    def tolerant(graph: DependencyGraph, node: Any) -> None:
        with suppress(TypeError):
            concats(graph, node)

    shape_infer.init_shape_information = with_splits
    index_mapping.update_concat_index_mapping = tolerant
    try:
        yield
    finally:
        shape_infer.init_shape_information = shapes
        index_mapping.update_concat_index_mapping = concats


def _map_concats(graph: DependencyGraph) -> None:
    """Give every concat its channel offsets back.

    torch-pruning 1.6 switches them off for each concat downstream of a 3-D parameter (a position
    embedding), although only the concat with the class token needs that.
    """
    bare = (ops.OPTYPE.PARAMETER, ops.OPTYPE.EXPAND)
    switched_off = [
        node
        for node in graph.module2node.values()
        if node.type == ops.OPTYPE.CONCAT
        and not node.enable_index_mapping
        and not any(source.type in bare for source in node.inputs)
    ]
    for node in switched_off:
        node.enable_index_mapping = True
    if switched_off:
        index_mapping.update_index_mapping(graph)
