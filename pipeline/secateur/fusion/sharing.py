"""Which layers tasks share and which they own: up to the watershed, from there on.

In DiSparse (Sun et al., arXiv 2206.04662) the weights that single tasks would keep agree almost
fully in early layers and hardly at all in late ones. Layers are shared until that overlap falls
below a threshold; from there on each task has a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.errors import ModelError, PlanError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.fusion.scores import GroupScores, normalise


@dataclass(frozen=True)
class SharingPlan:
    """``overlap``: (group, mean IoU of the tasks' kept channels, 0..1) in execution order.

    ``split``: the first group that is private, or None when everything is shared.
    """

    overlap: tuple[tuple[str, float], ...]
    split: str | None

    def is_shared(self, group: str) -> bool:
        """Say whether ``group`` comes before the split."""
        names = [name for name, _ in self.overlap]
        return self.split is None or names.index(group) < names.index(self.split)


def plan_sharing(
    scores: Mapping[str, GroupScores], keep_share: float = 0.5, threshold: float = 0.4
) -> SharingPlan:
    """Find the watershed from per-task scores whose groups are in execution order.

    As in DiSparse, each task keeps its ``keep_share`` best channels over all groups together. The
    overlap of more than two tasks is the mean over pairs; groups that fewer than two tasks use
    (heads) do not count. Two equal scores at the limit are both kept.

    Raises:
        PlanError: fewer than two tasks, or a share outside (0, 1].
    """
    if len(scores) < 2 or not 0 < keep_share <= 1:
        raise PlanError(
            f"no sharing to plan for {len(scores)} task(s) and keep_share {keep_share}",
            hint="give scores of two tasks or more and a share in (0, 1]",
        )
    masks = {task: _kept(groups, keep_share) for task, groups in scores.items()}
    overlap = []
    for group in next(iter(scores.values())):
        users = [task for task in scores if scores[task][group].any()]
        if len(users) > 1:
            pairs = combinations(users, 2)
            ious = [_iou(masks[one][group], masks[other][group]) for one, other in pairs]
            overlap.append((group, sum(ious) / len(ious)))
    split = next((group for group, value in overlap if value < threshold), None)
    return SharingPlan(tuple(overlap), split)


def _kept(scores: GroupScores, keep_share: float) -> dict[str, NDArray[np.bool_]]:
    shares = normalise(scores)
    values = np.concatenate(list(shares.values()))
    least = np.sort(values)[-max(1, round(keep_share * len(values)))]
    return {group: (part >= least) & (part > 0) for group, part in shares.items()}


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return |both| / |either|; 1 where neither keeps anything, since then they agree."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


class Chain(nn.Module):
    """Modules in a row; ``forward`` gives the last output and those after the ``taps``."""

    def __init__(self, units: Sequence[nn.Module], taps: Collection[int]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.taps = frozenset(taps)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return (last output, tapped features in order)."""
        features = []
        for number, unit in enumerate(self.units):
            x = unit(x)
            if number in self.taps:
                features.append(x)
        return x, features


class Branched(nn.Module):
    """A shared trunk, then one branch and one head per task; ``forward`` gives ``{name: tensor}``.

    A head reads the trunk's features followed by its branch's own, finest first.
    """

    def __init__(
        self, trunk: Chain, branches: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.branches = nn.ModuleDict(branches)
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return one tensor per head."""
        x, early = self.trunk(images)
        return {
            name: head([*early, *self.branches[name](x)[1]]) for name, head in self.heads.items()
        }

    def select_outputs(self, names: Collection[str]) -> Branched:
        """Return a copy that holds and computes only the branches and heads in ``names``."""
        kept = [name for name in self.heads if name in names]
        return copy.deepcopy(
            Branched(
                self.trunk,
                {name: self.branches[name] for name in kept},
                {name: self.heads[name] for name in kept},
            )
        )


def apply_sharing(model: MultiTaskModel, plan: SharingPlan, example: Tensor) -> MultiTaskModel:
    """Return a copy of ``model`` whose tasks own copies of the backbone from the split on.

    It computes the same; branches differ once they are trained, or once experts branched at the
    same plan are merged into it (``merge_networks``): names of trunk and branches agree. Applies
    to networks with ``heads`` and a ``backbone`` that is a timm ``features_only`` network made of
    ``conv_stem``, ``bn1`` and ``blocks`` (EfficientNet, MobileNet V2 and V3, MNASNet).
    ``example``: (N, C, H, W) network inputs.

    Raises:
        ModelError: the network is none of these.
    """
    backbone = getattr(model.network, "backbone", None)
    heads = getattr(model.network, "heads", None)
    if not isinstance(backbone, nn.Module) or not isinstance(heads, nn.ModuleDict):
        raise _not_a_chain(type(model.network).__name__, "it has no backbone and heads")
    units, taps = _chain(backbone)
    cut = _unit_of(plan.split, list(units))
    trunk = Chain(list(units.values())[:cut], {tap for tap in taps if tap < cut})
    late = {tap - cut for tap in taps if tap >= cut}
    branches = {name: Chain(list(units.values())[cut:], late) for name in heads}
    # Each branch is copied on its own: within one deepcopy they would go on sharing weights.
    network = Branched(
        copy.deepcopy(trunk),
        {name: copy.deepcopy(branch) for name, branch in branches.items()},
        {name: copy.deepcopy(head) for name, head in heads.items()},
    )
    branched = MultiTaskModel(network, model.tasks).train(model.training)
    with evaluating(model), evaluating(branched):
        before, after = model(example), branched(example)
    if not all(torch.allclose(before[name], after[name], atol=1e-5) for name in before):
        raise _not_a_chain(type(backbone).__name__, "its units in a row compute something else")
    return branched


def _chain(backbone: nn.Module) -> tuple[dict[str, nn.Module], set[int]]:
    """Return the backbone's units by name, in order, and the positions features come from."""
    stages = getattr(backbone, "blocks", None)
    tapped = getattr(backbone, "_stage_out_idx", None)
    if not isinstance(stages, nn.Sequential) or tapped is None:
        raise _not_a_chain(type(backbone).__name__, "it is not made of sequential blocks")
    units: dict[str, nn.Module] = {}
    ends = [0]
    for name in ("conv_stem", "bn1"):
        units[f"backbone.{name}"] = backbone.get_submodule(name)
    ends[0] = len(units) - 1
    for number, stage in enumerate(stages):
        for position, block in enumerate(stage.children()):
            units[f"backbone.blocks.{number}.{position}"] = block
        ends.append(len(units) - 1)
    return units, {ends[stage] for stage in tapped}


def _unit_of(split: str | None, units: Sequence[str]) -> int:
    """Return the position of the unit that holds the group ``split``: where branches begin."""
    if split is None:
        return len(units)
    layer = split.removeprefix("network.").partition("#")[0] + "."
    for number, unit in enumerate(units):
        if layer.startswith(f"{unit}."):
            return number
    raise ModelError(
        f"the split '{split}' is no layer of the backbone",
        hint=f"it must lie in one of {units[0]} .. {units[-1]}",
    )


def _not_a_chain(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} cannot be branched: {why}",
        hint="only timm features_only backbones with conv_stem, bn1 and blocks can",
    )
