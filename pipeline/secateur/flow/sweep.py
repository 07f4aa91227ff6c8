"""What each of several budgets costs the tasks, so that one can be chosen before a long build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from secateur.bench.latency import Protocol, measure
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel, model_fingerprint, parameter_count
from secateur.core.progress import hidden, track
from secateur.data.loading import image_batch
from secateur.devices.target import Target
from secateur.flow.axes import turn_axes
from secateur.flow.budgets import plan_within
from secateur.flow.cache import StageCache
from secateur.flow.cutting import cut_planned
from secateur.flow.job import Job
from secateur.flow.ncnn import runnable, target_of
from secateur.flow.preflight import open_checked
from secateur.flow.recipe import BudgetSpec, Recipe
from secateur.flow.stages import Metrics, change, too_low, torch_accuracy
from secateur.prune import count_macs
from secateur.runtimes.base import runtime_of

SHARES = (0.8, 0.6, 0.4, 0.2)


@dataclass(frozen=True)
class Point:
    """One network, fp32: the parent with the kept tasks, or its cut to ``share`` of the MACs.

    ``latency_ms`` is a median on the target's runtime, None where this machine is not of its kind.
    ``too_low`` are the tasks that lost more than their ``max_drop``.
    """

    share: float
    macs: int
    params: int
    metrics: Metrics
    change_percent: Mapping[str, float]
    delta_t: float
    too_low: tuple[str, ...]
    recovery_steps: int
    latency_ms: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The parent first, then its cuts by falling share; ``missed`` says why others have none."""

    target: str
    threads: int
    points: tuple[Point, ...]
    missed: Mapping[float, str]

    def to_json(self) -> dict[str, Any]:
        """Return the sweep as JSON-like data."""
        return asdict(self)

    @property
    def least(self) -> Point | None:
        """The cheapest cut that keeps every task within its ``max_drop``."""
        within = [point for point in self.points[1:] if not point.too_low]
        return min(within, key=lambda point: point.macs, default=None)


def sweep(
    recipe: Recipe,
    target_name: str,
    shares: Sequence[float] = SHARES,
    *,
    cache: StageCache | None = None,
    protocol: Protocol | None = None,
    recover: bool = False,
) -> Sweep:
    """Cut the recipe's parent to each share (0..1) of its MACs and judge every cut.

    Without ``recover`` each is ranked and compensated, neither searched nor trained: a build loses
    less. Budgets of the recipe are passed over; the rest of it counts. Finished shares are found
    again.

    Raises:
        SecateurError: whatever is wrong with the recipe, before any work.
    """
    target = target_of(recipe, target_name)
    wanted = sorted({*shares}, reverse=True)
    opened = open_checked(_at(recipe, wanted[0], recover), target, cache or StageCache())
    of_library = recipe.prune.warm_start == "library"  # earlier cuts to about a share bring axes
    turned = opened if of_library else turn_axes(opened)
    models: dict[float, MultiTaskModel] = {1.0: opened.selected}
    points, missed = [_point(opened, 1.0, opened.selected, 0)], dict[float, str]()
    for share in track(wanted, "cutting to each budget", len(wanted)):
        with hidden():
            job = replace(turned, recipe=_at(recipe, share, recover), kept_share=share)
            try:
                job = turn_axes(job) if of_library else job
                cut = cut_planned(job, plan_within(job, target, protocol)).cut
            except PlanError as error:
                missed[share] = error.message
                continue
            models[share] = cut.recovered
            points.append(_point(opened, share, cut.recovered, cut.steps))
    times = _latencies(opened, target, models, protocol)
    timed = tuple(replace(point, latency_ms=times.get(point.share)) for point in points)
    return Sweep(target.name, target.threads, timed, missed)


def _at(recipe: Recipe, share: float, recover: bool) -> Recipe:
    """Return the recipe with that budget alone, and without what takes long unless it is wanted."""
    budget = BudgetSpec(macs=share)
    if recover:
        return recipe.model_copy(
            update={"prune": recipe.prune.model_copy(update={"budget": budget})}
        )
    prune = recipe.prune.model_copy(update={"budget": budget, "search": False})
    return recipe.model_copy(update={"prune": prune, "recover": "none"})


def _point(job: Job, share: float, model: MultiTaskModel, steps: int) -> Point:
    parent = torch_accuracy(job, job.selected, "accuracy of the parent")
    metrics = torch_accuracy(job, model, f"accuracy at {share:.0%}")
    result = change(job, parent, metrics)
    return Point(share, count_macs(model, job.example), parameter_count(model), metrics,
                 dict(result.per_task), result.mean, too_low(job, result), steps)  # fmt: skip


def _latencies(
    job: Job, target: Target, models: Mapping[float, MultiTaskModel], protocol: Protocol | None
) -> dict[float, float]:
    """Return the median milliseconds of each network, taking turns."""
    if not target.is_this_machine():
        return {}
    runtime = runtime_of(target.runtime)
    image = image_batch(job.eval, [0], job.spec).numpy()
    calls = {}
    for share, model in models.items():
        file = runnable(job, model, model_fingerprint(model), target.runtime)
        session = runtime.open_session(file, target.threads)
        calls[str(share)] = lambda session=session: session.run(image)
    found = measure(calls, protocol)
    return {share: found[str(share)].median_ms for share in models}
