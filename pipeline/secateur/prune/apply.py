"""Carry out a plan on a copy of the model."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.prune.blocks import without_blocks
from secateur.prune.narrow import drop_channels


def apply_plan(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], plan: PrunePlan
) -> MultiTaskModel:
    """Return a copy of ``model`` without the channels and the blocks that ``plan`` drops.

    ``groups`` are those of the model without ``plan.removed``.

    Raises:
        PlanError: the plan was made for a model with other groups.
    """
    planned = {cut.name: cut for cut in plan.cuts}
    if {group.name: group.width for group in groups} != {c.name: c.width for c in plan.cuts}:
        raise PlanError(
            "the plan was made for another model: its groups differ",
            hint="plan again for this recipe",
        )
    pruned = without_blocks(model, plan.removed)
    dropped = {
        name: [channel for channel in range(cut.width) if channel not in set(cut.kept)]
        for name, cut in planned.items()
    }
    drop_channels(pruned, groups, dropped)
    return pruned.eval()
