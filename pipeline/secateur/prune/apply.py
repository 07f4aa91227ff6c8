"""Carry out a plan on a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError, first_line
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.core.surgery import Surgery
from secateur.prune.blocks import without_blocks
from secateur.prune.narrow import narrow, plan_surgery


def apply_plan(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], plan: PrunePlan
) -> MultiTaskModel:
    """Return a copy of ``model`` without the channels and the blocks that ``plan`` drops.

    ``groups`` are those of the model without ``plan.removed``.

    Raises:
        PlanError: the plan was made for a model with other groups.
    """
    if {group.name: group.width for group in groups} != {c.name: c.width for c in plan.cuts}:
        raise PlanError(
            "the plan was made for another model: its groups differ",
            hint="plan again for this recipe",
        )
    pruned = without_blocks(model, plan.removed)
    narrow(pruned, surgery_of(groups, plan))
    return pruned.eval()


def surgery_of(groups: Sequence[ChannelGroup], plan: PrunePlan) -> Surgery:
    """Return what ``plan`` takes out of each layer, without the groups it was made in."""
    dropped = {cut.name: sorted({*range(cut.width)} - {*cut.kept}) for cut in plan.cuts}
    return plan_surgery(groups, dropped, plan.removed)


def restore_cut(
    model: MultiTaskModel, surgery: Surgery, state: Mapping[str, Tensor]
) -> MultiTaskModel:
    """Return a copy of ``model`` cut by ``surgery``, with the weights of such a cut.

    A layer gains the bias that compensation gave it.

    Raises:
        PlanError: ``model`` is of another architecture than the network that was cut.
    """
    try:
        cut = without_blocks(model, surgery.blocks)
        narrow(cut, surgery)
        for name in state.keys() - cut.state_dict().keys():
            layer = cut.get_submodule(name.removesuffix(".bias"))
            if getattr(layer, "bias", name) is None:
                layer.bias = nn.Parameter(torch.empty_like(state[name]))
        cut.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(
            f"the cut does not fit this network: {first_line(error)}",
            hint="give the network that was cut, made by the same code and arguments",
        ) from error
    return cut.eval()
