"""The whole job, in order. Each line is a stage; the rooms never call one another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from secateur.bench.latency import Protocol
from secateur.bundle.manifest import Manifest
from secateur.bundle.write import prepare_folder
from secateur.devices.target import load_target
from secateur.flow.axes import turn_axes
from secateur.flow.cache import StageCache
from secateur.flow.evidence import gather_evidence
from secateur.flow.job import open_job
from secateur.flow.pack import Made, pack
from secateur.flow.recipe import Recipe
from secateur.flow.recovery import check_recovery
from secateur.flow.stages import check_evaluable, make_cut, make_plan


@dataclass(frozen=True)
class BuildResult:
    """Where the bundle lies, and its manifest."""

    folder: Path
    manifest: Manifest


def build(
    recipe: Recipe,
    target_name: str,
    out: Path,
    *,
    cache: StageCache | None = None,
    protocol: Protocol | None = None,
    command: str = "",
) -> BuildResult:
    """Cut, lower, measure and bundle one recipe for one target, under ``out/<target>/<precision>``.

    Raises:
        SecateurError: what is wrong; no file of the bundle has been written then.
    """
    clock = _Clock()
    target = load_target(target_name)
    job = open_job(recipe, cache or StageCache())
    check_evaluable(job)
    check_recovery(job)
    folder = out / target.name / recipe.precision.mode
    prepare_folder(folder)
    clock.lap("load")
    job = turn_axes(job)
    clock.lap("turn_axes")
    groups, plan = make_plan(job, job.grid(target))
    clock.lap("score_and_plan")
    cut = make_cut(job, groups, plan)
    clock.lap("cut_compensate_recover")
    evidence = gather_evidence(job, cut, target, protocol)
    clock.lap("export_and_measure")
    made = Made(target, plan, cut, evidence, clock.seconds, command)
    return BuildResult(folder, pack(job, made, folder))


class _Clock:
    """Seconds per stage of this very run (a stage found in the cache takes almost none)."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now
