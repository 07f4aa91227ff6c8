"""Compensation's last step where no recovery follows: all layers are refitted together.

Layer by layer, least squares ask each layer for what the parent has at that place; what a cut layer
cannot give, others could make up for. A few passes of gradient steps over the same images, towards
the parent's outputs, let them. No label is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.data.loading import Subset
from secateur.flow.job import Job
from secateur.flow.recipe import RecoverSpec
from secateur.flow.recovery import made_worse, recovered
from secateur.flow.refit import refit_indices

PASSES = 4
RATE = 1e-3  # chosen on validation images of NYUv2: .3 and 3 times as much are worse


@dataclass(frozen=True)
class Joint:
    """The network after the refit of all layers together, and what became of that.

    ``told`` is empty where nobody wanted it, else says how often the images were passed, or why the
    network is as it was.
    """

    model: MultiTaskModel
    told: str = ""


def refit_jointly(job: Job, plan: PrunePlan, begun: MultiTaskModel, origin: str = "") -> Joint:
    """Fit all weights of ``begun`` to the parent's outputs, if that is wanted and does no harm.

    It is wanted where no recovery follows, unless the recipe says ``compensate: false`` or
    ``joint: 0``; it does harm where the tasks are farther from the parent on training images then.
    ``origin``: see ``recovered``.
    """
    wanted = job.recipe.compensate
    passes = 0 if wanted is False else PASSES if wanted.joint is None else wanted.joint
    if job.recipe.recover != "none" or not passes:
        return Joint(begun)
    asked = replace(job, recipe=job.recipe.model_copy(update={"recover": joint_spec(passes)}))
    some = replace(asked, train=Subset(job.train, refit_indices(job)))
    try:
        fitted, _ = recovered(some, plan, begun, f"joint {origin}", title="refitting together",
                              as_deployed=True)  # fmt: skip
    except ModelError as error:  # what is optional stops no build
        return Joint(begun, f"undone: {error.message}")
    if made_worse(asked, begun, fitted):
        return Joint(begun, "undone: it left the tasks farther from the parent")
    return Joint(fitted, f"{passes} passes over {len(some.train)} images")


def joint_spec(passes: int) -> RecoverSpec:
    """Return it as a recovery: without labels, norms as the refit left them, images as they are."""
    return RecoverSpec(epochs=passes, learning_rate=RATE, labels=False, augment="none",
                       freeze_norms=0.0)  # fmt: skip
