"""Compensation as the recipe wants it: which images the kept weights are fitted on, and how."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from secateur.compensate import RefitSettings, refit, views
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.data.loading import image_batch, spread
from secateur.flow.job import Job

# Memory of the refit goes with pixels, and so does the number of equations: large inputs need
# fewer images for as much of both (128 images at 192x256).
REFIT_PIXELS = 6_300_000
# Least squares want positions, of which a small image has few: at 32x32 the refit is clearly
# better of a thousand images than of 256.
USUAL_IMAGES, USUAL_PIXELS = 256, 1_600_000
FEW_IMAGES = 96  # fewer than these are also shown mirrored and enlarged


def compensated(
    job: Job,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    pruned: MultiTaskModel,
    *,
    only: Collection[str] | None = None,
) -> MultiTaskModel:
    """Return ``pruned``, cut from ``job.selected``, refitted if the recipe says so.

    ``only`` are the layers to refit, by name; all where it is None.
    """
    wanted = job.recipe.compensate
    if wanted is False:
        return pruned
    images, settings = refit_images(job), refit_settings(job)
    return refit(job.selected, pruned, groups, plan, images, settings, only=only)


def refit_settings(job: Job) -> RefitSettings:
    """Return how the recipe wants layers fitted; as usual where it has nothing to say."""
    wanted = job.recipe.compensate
    return RefitSettings(ridge=wanted.ridge) if wanted else RefitSettings()


def refit_images(job: Job) -> Tensor:
    """Return the (N, C, H, W) training images that compensation is fitted on."""
    images = image_batch(job.train, refit_indices(job), job.spec)
    return views(images) if len(images) < FEW_IMAGES else images


def refit_indices(job: Job) -> list[int]:
    """Return which training images compensation is fitted on; none where there is no such step."""
    wanted = job.recipe.compensate
    if wanted is False:
        return []
    pixels = job.spec.height * job.spec.width
    most = 3 * len(job.train) // 4  # the others are to judge by
    usual = max(USUAL_IMAGES, min(USUAL_PIXELS // pixels, most))
    count = min(wanted.images or usual, REFIT_PIXELS // pixels)
    if job.recipe.prune.warm_start == "library":  # starts are compared
        count = min(count, most)
    return spread(job.train, max(count, 2))
