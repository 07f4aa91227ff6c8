"""What can be told before any work: what a recipe, its data and a target do not allow."""

from __future__ import annotations

import re
from pathlib import Path

from secateur.devices.target import Target
from secateur.flow.cache import StageCache
from secateur.flow.engine import check_options
from secateur.flow.job import Job, open_job
from secateur.flow.limits import load_table_of, tabled_budget
from secateur.flow.precision import check_precision
from secateur.flow.recipe import Recipe
from secateur.flow.recovery import check_recovery
from secateur.flow.sparsity import check_sparse_target
from secateur.flow.stages import check_evaluable, exported
from secateur.fusion.scores import rule_of
from secateur.importance.criterion import criterion_of
from secateur.lower.quant.units import resolve_pins
from secateur.vote.similarity.measure import measure_of

NODE = re.compile(r"node_|n\d")  # as the exporter calls nodes, which the cut may have others of


def open_checked(
    recipe: Recipe, target: Target, cache: StageCache, table: Path | None = None
) -> Job:
    """Open a recipe for a plan or a build; ``table`` is what either is given.

    Raises:
        SecateurError: whatever is wrong, before anything is scored, trained or written.
    """
    wanted = recipe.prune
    criterion_of(wanted.criterion)
    rule_of(wanted.fusion)
    measure_of(wanted.similarity)
    job = open_job(recipe, cache)
    check_evaluable(job)
    check_recovery(job)
    check_precision(job, target)
    check_sparse_target(job, target)
    check_options(recipe, target)
    tabled_budget(job)
    if table is not None:
        load_table_of(job, target, table)
    modules = {pin: kind for pin, kind in recipe.precision.pin.items() if not NODE.match(pin)}
    if modules:
        resolve_pins(exported(job, job.selected, job.selected_key), modules)
    return job
