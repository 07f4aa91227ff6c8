"""2:4 sparsity after the channel cut: which weights go, by the tasks' fused importance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.compensate import RefitSettings, refit_sparse
from secateur.core.errors import RecipeError
from secateur.core.files import atomic_path, value_digest, write_json
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.devices.target import Target
from secateur.flow.channel_scores import score_stream
from secateur.flow.inherited import best_start
from secateur.flow.job import Job
from secateur.flow.refit import refit_images
from secateur.flow.scoring import meaning
from secateur.flow.stages import begin_cut
from secateur.flow.warm_start import Planned
from secateur.fusion.scores import NEEDS_AGREEMENT, fuse
from secateur.importance.bank import task_data
from secateur.importance.single_weights import score_weights
from secateur.prune import SparsityPlan, apply_sparsity, plan_sparsity, without_masks

AMPERE = 8.0  # the compute capability of the first GPUs that skip such zeros
# Rules that see more than scores: they know of channels, not of weights.
CHANNELS_ONLY = NEEDS_AGREEMENT | {"guarded"}


def check_sparse_target(job: Job, target: Target) -> None:
    """Raise when the target's GPU cannot skip the zeros that the recipe asks for.

    Raises:
        RecipeError: it has none, or is older than Ampere.
    """
    if job.recipe.prune.sparsity is None:
        return
    capabilities = target.gpu.compute_capabilities if target.gpu else ()
    if target.engine_runtime is None or not any(float(each) >= AMPERE for each in capabilities):
        raise RecipeError(
            f"prune.sparsity: {target.name} has nothing that runs 2:4 sparse weights faster",
            hint="leave it out, or choose a target with a GPU since Ampere",
        )


def plan_zeros(
    job: Job, plan: PrunePlan, begun: MultiTaskModel, origin: str
) -> SparsityPlan | None:
    """Choose the weights of the cut network that become zero; None where the recipe wants none.

    ``origin`` names where its weights are from, if not from the parent.
    """
    if job.recipe.prune.sparsity is None:
        return None
    wanted = job.recipe.prune
    key = (job.parent_key, asdict(plan)["cuts"], str(job.recipe.compensate), wanted.axes,
           job.basis, plan.removed,
           job.train.fingerprint, asdict(job.spec), wanted.images, wanted.fusion, origin,
           [(meaning(task), task.weight) for task in job.tasks])  # fmt: skip
    folder = job.cache.folder("sparsity", *key)
    try:
        table = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        return SparsityPlan.from_json(table, load_file(folder / "masks.safetensors"))
    except (OSError, ValueError, SafetensorError):
        made = _planned(job, begun)
    with atomic_path(folder / "masks.safetensors") as temporary:
        save_file(dict(made.masks), temporary)
    write_json(folder / "plan.json", made.to_json())
    return made


def planned_zeros(job: Job, planned: Planned) -> SparsityPlan | None:
    """Return the zeros of a plan that is only looked at: its cut is made and compensated first."""
    if job.recipe.prune.sparsity is None:
        return None
    begun = begin_cut(job, planned.scored.groups, planned.plan)
    begun, _, origin = best_start(job, planned, begun)
    return plan_zeros(job, planned.plan, begun, origin)


def with_zeros(
    job: Job, begun: MultiTaskModel, zeros: SparsityPlan | None, origin: str
) -> tuple[MultiTaskModel, str]:
    """Return the network with its zeros held, and a name of its origin that tells of them.

    The weights that stay make up for the zeros where the recipe compensates. Without a plan nothing
    changes.
    """
    if zeros is None:
        return begun, origin
    sparse, wanted = without_masks(apply_sparsity(begun, zeros)), job.recipe.compensate
    if wanted is not False:
        settings = RefitSettings(ridge=wanted.ridge)
        sparse = refit_sparse(begun, sparse, zeros.masks, refit_images(job), settings)
    return apply_sparsity(sparse, zeros), value_digest([origin, zeros.to_json(), "refitted"])


def _planned(job: Job, begun: MultiTaskModel) -> SparsityPlan:
    names = [weight.name for weight in plan_sparsity(begun).weights]
    data = task_data(begun, job.tasks, *score_stream(job, job.tasks))
    per_task = score_weights(begun, names, data)
    weights = {task.name: task.weight for task in job.tasks}
    return plan_sparsity(begun, fused_weights(per_task, weights, job.recipe.prune.fusion), per_task)


def fused_weights(
    per_task: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], rule: str
) -> dict[str, Tensor]:
    """Fuse the tasks' scores of single weights by a rule for channels, each weight as one.

    Rules that need more than scores give way to ``mean``.
    """
    flat = {
        task: {name: np.asarray(scores.cpu().double()).ravel() for name, scores in found.items()}
        for task, found in per_task.items()
    }
    shapes = {name: scores.shape for name, scores in next(iter(per_task.values())).items()}
    fused = fuse(flat, weights, "mean" if rule in CHANNELS_ONLY else rule)
    return {name: torch.from_numpy(fused[name]).reshape(shape) for name, shape in shapes.items()}
