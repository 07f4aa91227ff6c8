"""2:4 sparsity: of each four consecutive input weights the two most important stay.

GPUs since Ampere skip the zeros of such weights (Mishra et al., arXiv 2104.08378). TensorRT asks
that "for each output channel and for each spatial pixel in the kernel weights, every four input
channels must have at least two zeros", for convolutions and fully connected layers whose input
channels are a multiple of 4 (Developer Guide, "Sparsity"). Grouped convolutions stay dense: nothing
says that TensorRT has sparse kernels for them. Which of the eligible layers run faster is for the
builder to find out: it times both kinds of kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.errors import PlanError

Model = TypeVar("Model", bound=nn.Module)
WeightScores = Mapping[str, Tensor]
"""Importance >= 0 of single weights, shaped like them, by the parameter's name."""

OF, KEPT = 4, 2


@dataclass(frozen=True)
class SparseWeight:
    """One weight that becomes 2:4; ``lost`` is the share of its importance that goes (0..1)."""

    name: str
    shape: tuple[int, ...]
    lost: float


@dataclass(frozen=True)
class SparsityPlan:
    """Which weights become zero, and what that costs.

    ``lost`` is, per task, the share of the importance of the network's eligible weights that goes.
    ``dense`` names the weights of convolutions and linear layers that are not eligible. ``masks``
    hold, for each sparse weight, a boolean tensor of its shape: True stays.
    """

    weights: tuple[SparseWeight, ...]
    dense: tuple[str, ...]
    lost: Mapping[str, float]
    masks: Mapping[str, Tensor] = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return all but the masks as JSON-like data."""
        return {
            "weights": [asdict(weight) for weight in self.weights],
            "dense": list(self.dense),
            "lost": dict(self.lost),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], masks: Mapping[str, Tensor]) -> SparsityPlan:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: it is no plan, or not that of the masks.
        """
        try:
            rows = tuple(
                SparseWeight(row["name"], tuple(row["shape"]), row["lost"])
                for row in data["weights"]
            )
            plan = SparsityPlan(rows, tuple(data["dense"]), dict(data["lost"]), masks)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no sparsity plan: {error!r}") from error
        if {row.name: row.shape for row in rows} != {n: tuple(m.shape) for n, m in masks.items()}:
            raise ValueError("these masks are of another sparsity plan")
        return plan


def plan_sparsity(
    model: nn.Module,
    scores: WeightScores | None = None,
    per_task: Mapping[str, WeightScores] | None = None,
) -> SparsityPlan:
    """Choose the zeros of every eligible weight; changes nothing.

    ``scores`` are the tasks' fused importance (of weight times gradient, say) and ``per_task`` each
    task's own, from which its ``lost`` is read. A weight without scores goes by magnitude, which
    also decides between equal scores.

    Raises:
        PlanError: scores have another shape than their weight, or none is eligible.
    """
    masks, rows, dense = {}, [], []
    for name, weight, eligible in _weights(model):
        if not eligible:
            dense.append(name)
            continue
        magnitude = weight.detach().abs()
        importance = _of_weight(scores or {}, name, weight)
        masks[name] = _best_two(magnitude if importance is None else importance, magnitude)
        lost = _lost(magnitude if importance is None else importance, masks[name])
        rows.append(SparseWeight(name, tuple(weight.shape), lost[0] / lost[1] if lost[1] else 0.0))
    if not masks:
        raise PlanError(
            "no layer of the model can be 2:4 sparse: none is an ungrouped convolution or a linear "
            f"layer whose input channels are a multiple of {OF}",
            hint="leave sparsity out, or use a grid that is a multiple of 4",
        )
    costs = {task: _task_lost(model, own, masks) for task, own in (per_task or {}).items()}
    return SparsityPlan(tuple(rows), tuple(dense), costs, masks)


def apply_sparsity(model: Model, plan: SparsityPlan) -> Model:
    """Return a copy of ``model`` whose zeros hold: no training step, average or copy fills them.

    A mask is a parametrisation (``torch.nn.utils.parametrize``) of its weight, so the parameter
    that trains is called ``<layer>.parametrizations.weight.original``. Before export, see
    ``without_masks``.

    Raises:
        PlanError: the plan was made for another model.
    """
    sparse = copy.deepcopy(model)
    shapes = {name: tuple(weight.shape) for name, weight, eligible in _weights(sparse) if eligible}
    if shapes != {weight.name: weight.shape for weight in plan.weights}:
        raise PlanError(
            "the sparsity plan was made for another model: its eligible weights differ",
            hint="plan again for this model",
        )
    for name, mask in plan.masks.items():
        path, _, parameter = name.rpartition(".")
        layer = sparse.get_submodule(path)
        weight = layer.get_parameter(parameter)
        held = mask.to(weight.device)
        with torch.no_grad():
            weight.mul_(held)
        parametrize.register_parametrization(layer, parameter, _Mask(held))
    return sparse


def without_masks(model: Model) -> Model:
    """Return a copy of a model from ``apply_sparsity`` with ordinary weights, zeros among them."""
    plain = copy.deepcopy(model)
    for layer in list(plain.modules()):
        transforms = getattr(layer, "parametrizations", {})
        for parameter in [name for name in transforms if isinstance(transforms[name][0], _Mask)]:
            # torch gives a parametrised layer a class of its own, which all its copies share, and
            # takes the property off that class: the copies would lose it too
            kind = type(layer)
            layer.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            parametrize.remove_parametrizations(layer, parameter)
    return plain


class _Mask(nn.Module):
    """Multiplies a weight by a mask: what is masked is zero and gets no gradient."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield each weight that multiplies input channels along axis 1, and whether it may be 2:4."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            parameter = "weight"
        elif isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            parameter = "in_proj_weight"
        else:
            continue
        weight: Tensor = getattr(layer, parameter)
        eligible = (
            weight.shape[1] % OF == 0
            and getattr(layer, "groups", 1) == 1
            and not parametrize.is_parametrized(layer, parameter)  # it is made of other weights
        )
        yield f"{path}.{parameter}".removeprefix("."), weight, eligible


def _of_weight(scores: WeightScores, name: str, weight: Tensor) -> Tensor | None:
    found = scores.get(name)
    if found is not None and found.shape != weight.shape:
        raise PlanError(
            f"the scores of '{name}' have shape {tuple(found.shape)}, the weight has "
            f"{tuple(weight.shape)}",
            hint="score the model that is made sparse, after its channels were cut",
        )
    return found


def _best_two(importance: Tensor, magnitude: Tensor) -> Tensor:
    """Return a mask of the two most important of each four along axis 1, magnitude breaking ties.

    Both are (c_out, c_in, ...) with c_in a multiple of 4.
    """
    fours = [
        values.double().cpu().reshape(len(values), -1, OF, *values.shape[2:]).movedim(2, -1)
        for values in (importance, magnitude)
    ]
    by_size = fours[1].argsort(dim=-1, descending=True, stable=True)
    order = fours[0].gather(-1, by_size).argsort(dim=-1, descending=True, stable=True)
    best = by_size.gather(-1, order)[..., :KEPT]
    mask = torch.zeros(fours[0].shape, dtype=torch.bool).scatter_(-1, best, True)
    return mask.movedim(-1, 2).flatten(1, 2).contiguous()


def _lost(importance: Tensor, mask: Tensor) -> tuple[float, float]:
    """Return the importance that goes, and all of it."""
    values = importance.double().cpu()
    return float(values[~mask].sum()), float(values.sum())


def _task_lost(model: nn.Module, scores: WeightScores, masks: Mapping[str, Tensor]) -> float:
    gone = total = 0.0
    for name, weight, _ in _weights(model):
        found = _of_weight(scores, name, weight)
        if name in masks and found is not None:
            lost, whole = _lost(found, masks[name])
            gone, total = gone + lost, total + whole
    return gone / total if total else 0.0
