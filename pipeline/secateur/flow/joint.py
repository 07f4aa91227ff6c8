"""Compensation's last step where no recovery follows: all layers are refitted together.

Layer by layer, least squares ask each layer for what the parent has at that place; what a cut layer
cannot give, others could make up for. A few passes of gradient steps over the same images, towards
the parent's outputs, let them. No label is read.
"""

from __future__ import annotations

from dataclasses import replace

from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.data.loading import Subset
from secateur.flow.job import Job
from secateur.flow.recipe import RecoverSpec
from secateur.flow.recovery import made_worse, recovered
from secateur.flow.refit import refit_indices

PASSES = 4
RATE = 1e-3  # chosen on validation images of NYUv2: .3 and 3 times as much are worse


def refit_jointly(
    job: Job, plan: PrunePlan, begun: MultiTaskModel, origin: str = ""
) -> MultiTaskModel:
    """Return ``begun`` with all its weights fitted to the parent's outputs, if that is wanted.

    It is as it was where the recipe recovers or says ``compensate: false`` or ``joint: 0``, or
    where the tasks would have more loss on training images. ``origin``: see ``recovered``.
    """
    wanted = job.recipe.compensate
    passes = 0 if wanted is False else PASSES if wanted.joint is None else wanted.joint
    if job.recipe.recover != "none" or not passes:
        return begun
    spec = joint_spec(passes)
    asked = replace(job, recipe=job.recipe.model_copy(update={"recover": spec}))
    some = replace(asked, train=Subset(job.train, refit_indices(job)))
    fitted, _ = recovered(some, plan, begun, f"joint {origin}", title="refitting together")
    return begun if made_worse(asked, begun, fitted) else fitted


def joint_spec(passes: int) -> RecoverSpec:
    """Return it as a recovery: without labels, norms as the refit left them, images as they are."""
    return RecoverSpec(epochs=passes, learning_rate=RATE, labels=False, augment="none",
                       freeze_norms=0.0)  # fmt: skip
