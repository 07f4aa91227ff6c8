"""The whole job, in order. Each line is a stage; the rooms never call one another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from secateur.bench.latency import Protocol
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import read_bundle
from secateur.bundle.write import prepare_folder
from secateur.core.errors import SecateurError
from secateur.flow.axes import turn_axes
from secateur.flow.budgets import plan_within, settle
from secateur.flow.cache import StageCache
from secateur.flow.cutting import cut_planned
from secateur.flow.entry import add_build
from secateur.flow.evidence import gather_evidence
from secateur.flow.job import Job
from secateur.flow.ncnn import NCNN, target_of, with_runtime
from secateur.flow.pack import Made, pack
from secateur.flow.precision import Device, lower_cut
from secateur.flow.preflight import open_checked
from secateur.flow.recipe import Recipe
from secateur.flow.stages import exported, torch_accuracy
from secateur.prune import check_sparsity


@dataclass(frozen=True)
class BuildResult:
    """Where the bundle lies, its manifest, and what became of its entry in the library.

    ``replaced`` says what bundle lay there before, if it was another network's or recipe's.
    """

    folder: Path
    manifest: Manifest
    library: str
    replaced: str = ""


def build(
    recipe: Recipe,
    target_name: str,
    out: Path,
    *,
    cache: StageCache | None = None,
    protocol: Protocol | None = None,
    table: Path | None = None,
    device: Device | None = None,
    command: str = "",
) -> BuildResult:
    """Cut, lower, measure and bundle one recipe for one target, under ``out/<target>/<precision>``.

    ``table``: a latency table of the target, for a budget in milliseconds, or one of instructions.
    ``device``: where ``auto`` chooses precision and runtime; this machine if it is of that kind.

    A task that lost more than its ``max_drop`` and a budget that is missed are no errors here: the
    manifest says so (``accuracy.too_low``, ``budgets[name].met``).

    Raises:
        SecateurError: what is wrong. Unless the disk filled up at the very end, no file of an
            earlier bundle has been touched then.
    """
    clock = _Clock()
    target = target_of(recipe, target_name)
    job = open_checked(recipe, target, cache or StageCache(), table)
    mode = recipe.precision.mode
    prepare_folder(out / target.name / ("" if mode == "auto" else mode))
    clock.lap("load")
    job = turn_axes(job)
    clock.lap("turn_axes")
    # The end needs both; what is wrong with the model or the labels is told before any training.
    exported(job, job.selected, job.selected_key)
    torch_accuracy(job, job.selected, "accuracy of the parent")
    clock.lap("judge_parent")
    planned = plan_within(job, target, protocol, table)
    clock.lap("score_and_plan")
    finished = cut_planned(job, planned)
    cut, zeros = finished.cut, finished.zeros
    clock.lap("cut_compensate_recover")
    lowered = lower_cut(job, cut, target, protocol, device)
    target = with_runtime(target, NCNN) if lowered.ncnn else target
    if zeros:
        check_sparsity(lowered.onnx)
    clock.lap("lower")
    evidence = gather_evidence(job, cut, lowered, target, protocol)
    clock.lap("measure")
    budgets = settle(job, target, planned, evidence, lowered.onnx)
    made = Made(target, planned, finished.origin, cut, lowered, evidence, budgets, clock.seconds,
                command, zeros)  # fmt: skip
    folder = out / target.name / lowered.precision
    replaced = _other_bundle(folder, job)
    manifest = pack(job, made, folder)
    told = add_build(job, target.name, planned, cut, evidence)
    return BuildResult(folder, manifest, told, replaced)


def _other_bundle(folder: Path, job: Job) -> str:
    """Say what else a folder holds the bundle of, "" where that is none or this build's."""
    try:
        before = read_bundle(folder)
    except SecateurError:
        return ""
    if before.parent.get("fingerprint") != job.parent_key:
        return f"the bundle of another network, of {before.created}"
    if before.recipe != job.recipe.source:
        return f"the bundle of another recipe for this network, of {before.created}"
    return ""


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
