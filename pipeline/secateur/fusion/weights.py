"""Many tasks' copies of a layer into one: value fusion.

Experts are fine-tuned copies of one pre-trained network, one per task. What several experts own
under the same name becomes one shared weight; what one expert owns alone is taken over. Some rules
see weights only (``merge_rules``), ``regmean`` and ``cut`` see unlabelled images as well
(``regression``).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import ModelError, RecipeError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.fusion.layers import Norm
from secateur.fusion.linearised import Linearised
from secateur.fusion.merge_rules import MERGES, Copies, State
from secateur.fusion.regression import fit_to_experts, regmean
from secateur.fusion.sensitivity import diagonal_fisher, output_sensitivity

RULES = (*MERGES, "regmean", "cut")
STATISTICS = ("running_mean", "running_var")
TRACED = "_tensor_constant"  # torch.fx's name, with a number behind
NORM_BATCH = 64  # images that batch norms are estimated anew on at once


@dataclass(frozen=True)
class MergeSettings:
    """The rule and its knobs; each rule reads its own.

    ``strength``: lambda of task arithmetic and TIES (None: the papers' value); ``top_share``: what
    TIES keeps of a task vector; ``off_diagonal``: RegMean's alpha; ``ridge`` and ``damping``: see
    ``fit_to_experts``. ``reestimate``: take batch norms' statistics anew from the images (after
    ``cut`` they already are those of the merged network).
    """

    rule: str = "cut"
    strength: float | None = None
    top_share: float = 0.2
    off_diagonal: float = 0.9
    ridge: float = 0.3
    damping: float = 0.3
    reestimate: bool = True


def merge_state(
    pretrained: State,
    experts: Mapping[str, State],
    rule: str,
    *,
    importance: Mapping[str, State] | None = None,
    weights: Mapping[str, float] | None = None,
    strength: float | None = None,
    top_share: float = 0.2,
    buffers: Collection[str] = (),
) -> dict[str, Tensor]:
    """Merge the experts' state dicts by a rule that needs weights only.

    Args:
        pretrained: the state that all experts started from (task vectors count from it).
        experts: per task its state dict; the result's keys are the union of theirs.
        rule: one of ``MERGES``.
        importance: per task a tensor >= 0 per shared weight (``fisher`` needs it).
        weights: the user's weight per task; one where none is given.
        strength, top_share: see ``MergeSettings``.

        buffers: names of what is no weight.

    A key of one expert alone is copied. Buffers, batch norms' running statistics among them, are
    averaged under every rule (a sum of task vectors could make a variance negative); counters are
    the first owner's.

    Raises:
        RecipeError: there is no such rule.
        ModelError: no experts; copies of different shapes; a rule's own needs.
    """
    if rule not in MERGES:
        raise RecipeError(
            f"'{rule}' does not merge state dicts", hint=f"rules that do: {', '.join(MERGES)}"
        )
    shares = _mean_one(experts, weights)
    merged = {k: v.clone() for state in reversed(list(experts.values())) for k, v in state.items()}
    shared = _shared_keys(experts)
    statistics = {k for k in shared if k in buffers or k.rpartition(".")[2] in STATISTICS}
    for keys, apply in ((statistics, MERGES["average"]), (shared - statistics, MERGES[rule])):
        copies = Copies(
            _some(pretrained, keys),
            {task: _some(state, keys) for task, state in experts.items()},
            shares,
            {task: _some(values, keys) for task, values in (importance or {}).items()},
            strength,
            top_share,
        )
        if keys:
            merged |= {key: value.to(merged[key].dtype) for key, value in apply(copies).items()}
    return merged


def measure_importance(
    experts: Mapping[str, MultiTaskModel], images: Tensor, rule: str
) -> dict[str, dict[str, Tensor]]:
    """Return what ``rule`` wants to know of each expert, from unlabelled (N, C, H, W) images."""
    if rule == "fisher":
        return {task: diagonal_fisher(expert, images) for task, expert in experts.items()}
    if rule == "cut":
        return {task: output_sensitivity(expert, images) for task, expert in experts.items()}
    return {}


def merge_networks(
    network: MultiTaskModel,
    pretrained: State,
    experts: Mapping[str, MultiTaskModel],
    images: Tensor,
    settings: MergeSettings,
    *,
    weights: Mapping[str, float] | None = None,
    importance: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> MultiTaskModel:
    """Return a copy of ``network`` that holds the merged weights.

    ``network`` has the layers of all experts under the experts' names (its weights do not matter);
    ``pretrained`` is a state with the experts' names of what they share; ``images`` (N, C, H, W)
    need no labels. ``importance``: what ``measure_importance`` returned for the rule, when it
    is at hand.

    Raises:
        RecipeError: there is no such rule.
        ModelError: the network has other names or shapes than the experts; see ``merge_state``.
    """
    rule = settings.rule
    if rule not in RULES:
        raise RecipeError(f"'{rule}' merges no networks", hint=f"rules: {', '.join(RULES)}")
    shares = _mean_one(experts, weights)
    known = measure_importance(experts, images, rule) if importance is None else importance
    state = merge_state(
        pretrained,
        {task: _weights(expert) for task, expert in experts.items()},
        rule if rule in MERGES else "average",
        importance=known if rule in MERGES else None,
        weights=shares,
        strength=settings.strength,
        top_share=settings.top_share,
        buffers={name for expert in experts.values() for name, _ in expert.named_buffers()},
    )
    merged = copy.deepcopy(network).eval()
    own = merged.state_dict().keys() - _weights(merged).keys()
    try:
        merged.load_state_dict(state | {name: merged.state_dict()[name] for name in own})
    except RuntimeError as error:
        raise ModelError(
            f"the merged weights do not fit the network: {error}",
            hint="the network needs every layer of every expert, under the expert's names",
        ) from error
    if rule == "cut":
        return fit_to_experts(merged, experts, images, known, weights=shares,
                              ridge=settings.ridge, damping=settings.damping)  # fmt: skip
    if rule == "regmean":
        merged = regmean(
            merged, experts, images, weights=shares, off_diagonal=settings.off_diagonal
        )
    if settings.reestimate:
        reestimate_norms(merged, images)
    return merged


def reestimate_norms(model: torch.nn.Module, images: Tensor) -> None:
    """Replace batch norms' running statistics, in place, by those of ``images`` (N, C, H, W).

    Batches are of about the same size, NORM_BATCH at most: each counts the same, and none is of one
    image unless there is no other.
    Those of a linearised network stay: they belong to the point it is expanded at.
    """
    fixed = {id(m) for part in model.modules() if isinstance(part, Linearised) for m in
             part.modules()}  # fmt: skip
    norms = [m for m in model.modules() if isinstance(m, Norm) and m.track_running_stats
             and id(m) not in fixed]  # fmt: skip
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        for part in torch.tensor_split(images, -(-len(images) // NORM_BATCH)):
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _weights(model: MultiTaskModel) -> dict[str, Tensor]:
    """Return the state without constants of ``forward``, which torch.fx numbers in each trace."""
    return {name: value for name, value in model.state_dict().items()
            if not name.rpartition(".")[2].startswith(TRACED)}  # fmt: skip


def _mean_one(
    experts: Mapping[str, object], weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the tasks' weights, scaled to mean one."""
    if not experts:
        raise ModelError("there are no experts to merge", hint="give one state per task")
    given = {task: 1.0 if weights is None else weights.get(task, 1.0) for task in experts}
    total = sum(given.values())
    if min(given.values()) < 0 or total <= 0:
        raise ModelError(f"weights {given} do not share anything out", hint="give weights > 0")
    return {task: value * len(given) / total for task, value in given.items()}


def _shared_keys(experts: Mapping[str, State]) -> set[str]:
    """Return the keys of float tensors that at least two experts own.

    Raises:
        ModelError: their shapes differ.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    shared = set()
    for task, state in experts.items():
        for key, value in state.items():
            if not value.is_floating_point():
                continue
            if key in found and found[key][1].shape != value.shape:
                raise ModelError(
                    f"'{key}' has shape {tuple(value.shape)} in the expert of '{task}' and "
                    f"{tuple(found[key][1].shape)} in that of '{found[key][0]}'",
                    hint="rename what the experts do not share",
                )
            if key in found:
                shared.add(key)
            found.setdefault(key, (task, value))
    return shared


def _some(state: State, keys: set[str]) -> dict[str, Tensor]:
    return {key: value.detach().double() for key, value in state.items() if key in keys}
