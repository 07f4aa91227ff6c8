"""One cut in a lower precision for one target: calibrate, plan, let the guard search, write.

The guard judges with the session that ships and each task's own metrics on the evaluation images,
which calibration never sees.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

from secateur.core.errors import BuildError, ModelError
from secateur.core.progress import track
from secateur.devices.target import Target
from secateur.flow.distilling import distilled
from secateur.flow.job import Job
from secateur.flow.sources import Source, equalised, fresh_source, noise_ratio
from secateur.flow.stages import Cut, change, exported, session_accuracy, too_low, torch_accuracy
from secateur.flow.trials import Trials, dialect_of
from secateur.lower.quant import (
    CalibrationTable,
    Dialect,
    Guarded,
    Precision,
    QuantPlan,
    Unit,
    bias_shifts,
    emit,
    find_units,
    guard,
    macs_share,
    node_modules,
    plan_assigned,
    resolve_pins,
)
from secateur.metrics.delta import Delta
from secateur.runtimes.base import runtime_of

MORE = 1.0  # percent that a task may lose beyond fp32's loss, where that is too much already


@dataclass(frozen=True)
class Quantised:
    """What a lower precision adds to a bundle; ``report`` is for its manifest.

    ``model`` is the fp32 file that ``plan`` is for: the exported cut, or that with weights that
    were equalised or distilled for int8.
    """

    model: Path
    plan: QuantPlan
    dialect: Dialect
    report: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what `diagnose` needs to write the file again."""
        return {"dialect": self.dialect.mark(), "plan": self.plan.to_json()}


@dataclass(frozen=True)
class Lowered:
    """The cut in the precision that ships, made from the file ``fp32`` (itself in fp32).

    ``change`` is against the parent. ``choice`` says why ``auto`` took this precision. ``ncnn``
    has the .param files of this precision and of fp32, where ncnn is the runtime, and
    ``ncnn_report`` what the manifest tells of its int8.
    """

    precision: Precision
    onnx: Path
    fp32: Path
    change: Delta
    quantised: Quantised | None = None
    choice: Mapping[str, Any] | None = None
    ncnn: tuple[Path, Path] | None = None
    ncnn_report: Mapping[str, Any] | None = None

    @property
    def opened(self) -> Path:
        """The file that the target's runtime opens."""
        return self.ncnn[0] if self.ncnn else self.onnx

    @property
    def opened_fp32(self) -> Path:
        """The same in fp32."""
        return self.ncnn[1] if self.ncnn else self.fp32


@dataclass(frozen=True)
class _Base:
    """What is lowered: every node's precision, the float type between, the ranges to go by.

    ``shifts`` correct the biases of nodes in int8.
    """

    source: Source
    precisions: Mapping[str, Precision]
    carrier: Literal["fp32", "fp16"]
    table: CalibrationTable
    shifts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """A plan for a source, the guard's searches that led to it, and what distillation did."""

    source: Source
    plan: QuantPlan
    searches: tuple[Guarded, ...] = ()
    distilled: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return all(search.passed for search in self.searches)

    @property
    def share(self) -> float:
        """The share of the MACs that is computed in int8."""
        return macs_share(self.source.model, self.plan)["int8"]


def drop_limits(job: Job, exact: Delta) -> dict[str, float]:
    """Return the most percent that each guarded task may lose against the parent.

    It is its ``max_drop``; and MORE than what it lost in fp32, the ``exact`` change, where that is
    too much already.
    """
    hopeless = too_low(job, exact)
    return {t.name: MORE - exact.per_task[t.name] if t.name in hopeless else t.max_drop
            for t in job.tasks if t.max_drop is not None}  # fmt: skip


class Lowering:
    """Makes the forms of one cut for one target; what they share is made once.

    Raises:
        RecipeError: a pin names nothing in the model.
        CalibrationError: the training images cannot be calibrated on.
    """

    def __init__(self, job: Job, cut: Cut, target: Target) -> None:
        self.job, self.cut, self.wanted = job, cut, job.recipe.precision
        self.model = exported(job, cut.recovered, cut.key)
        self.on_gpu = target.accelerator == "gpu"
        self.pins = resolve_pins(self.model, self.wanted.pin)
        self.trials = Trials(
            self.model, dialect_of(target), runtime_of(target.runtime), target.threads
        )
        self.parent = torch_accuracy(job, job.selected, "accuracy of the parent")
        self.fp32 = Lowered("fp32", self.model, self.model, self._change(self.model, "fp32"))
        # No precision mends what the cut itself lost, but none need lose much more.
        self.hopeless = too_low(job, self.fp32.change)
        self.limits = drop_limits(job, self.fp32.change)

    def to(self, precision: Precision) -> Lowered:
        """Return the cut in ``precision``, guarded if the recipe says so."""
        if precision == "fp32":
            return self.fp32
        start = time.monotonic()
        found = self._to_fp16(self._plain) if precision == "fp16" else self._best_int8()
        seconds = round(time.monotonic() - start, 1)
        plan, dialect, model = found.plan, self.trials.dialect, found.source.model
        path = self.job.cache.folder("lowered", plan.to_json(), dialect.mark()) / "model.onnx"
        if not path.exists():
            emit(model, plan, dialect, path)
        report = {**self._report(found), "seconds": seconds}
        return Lowered(precision, path, self.model, self._change(path, precision),
                       Quantised(model, plan, dialect, report))  # fmt: skip

    def _change(self, path: Path, title: str) -> Delta:
        """Return what a form changes in each task, against the parent, on its own runtime."""
        session = self.trials.runtime.open_session(path, self.trials.threads)
        metrics = session_accuracy(self.job, session, path, f"accuracy, {title}")
        return change(self.job, self.parent, metrics)

    @cached_property
    def _plain(self) -> Source:
        """The exported cut."""
        return fresh_source(self.job, self.trials)

    def _best_int8(self) -> _Found:
        """Return the cut in int8, distilled where the guard leaves too little of it there.

        The last layers of heads and pins are no part of that share.
        """
        found = self._to_int8(equalised(self.job, self._plain))
        wanted = self.wanted.distill
        if wanted is False:
            return found
        table = found.source.table(self.wanted.calibrator)
        base = self._with_shifts("int8", _Base(found.source, self._all_fp32, "fp32", table))
        guarded = self.wanted.guard
        low = [u.name for u in self._units("int8", base) if not (guarded and u.ends_head)]
        taught = self._plan(dict.fromkeys(low, "int8"), base)
        most = macs_share(found.source.model, taught)["int8"]
        if guarded and found.passed and found.share >= wanted.share * most:
            return found
        try:
            source = distilled(self.job, self.cut, found.source, taught, wanted)
        except (BuildError, ModelError) as error:  # what was found without it stands
            return replace(found, distilled={"steps": 0, "taken": False, "failed": error.message})
        second = self._to_int8(source, correct=False)
        if guarded:
            better = (second.passed, second.share) > (found.passed, found.share)
        else:
            better = noise_ratio(found.source, found.plan, source, second.plan) < 1
        told = {"steps": wanted.steps, "taken": better, "int8_before": round(found.share, 4),
                "int8_after": round(second.share, 4)}  # fmt: skip
        return replace(second if better else found, distilled=told)

    def _to_fp16(self, source: Source) -> _Found:
        # CPUs run int8 among fp32 alone, and a pin may ask for int8 here, too.
        mixed = "int8" in self.pins.values() and not self.on_gpu
        # Not the calibrator's ranges: a peak that int8 may clip overflows in fp16.
        table = source.table("minmax")
        return self._lower(
            "fp16", _Base(source, self._all_fp32, "fp32" if mixed else "fp16", table)
        )

    def _to_int8(self, source: Source, *, correct: bool = True) -> _Found:
        """``correct``: biases may be shifted (those of a distilled source have learned it)."""
        table = source.table(self.wanted.calibrator)
        if self.on_gpu:
            half = self._to_fp16(source)
            if half.passed:
                base = _Base(source, half.plan.precisions, "fp16", table)
                found = self._lower("int8", base, correct=correct)
                return replace(found, searches=(*half.searches, *found.searches))
        base = _Base(source, self._all_fp32, "fp32", table)
        return self._lower("int8", base, correct=correct)

    def _with_shifts(self, low: Precision, base: _Base) -> _Base:
        if low != "int8" or not self.wanted.correct_bias:
            return base
        lowest = self._plan(dict.fromkeys(base.precisions, low), base)
        source = base.source
        return replace(base, shifts=bias_shifts(
            source.model, lowest, self.trials.dialect, source.few_images))  # fmt: skip

    def _units(self, low: Precision, base: _Base) -> tuple[Unit, ...]:
        """Return what can be taken to ``low`` and is not pinned."""
        lowest = self._plan(dict.fromkeys(base.precisions, low), base)
        kept = {name for name, p in base.precisions.items() if base.carrier == "fp16" != p}
        # The end of a head is safe in fp16; int8 takes its resolution.
        return tuple(
            replace(unit, ends_head=unit.ends_head and low == "int8")
            for unit in find_units(base.source.model, lowest)
            if lowest.precisions[unit.name] == low and unit.name not in self.pins
            and not (low == "int8" and unit.name in kept)  # what fp16 hurts, int8 hurts more
        )  # fmt: skip

    def _lower(self, low: Precision, base: _Base, *, correct: bool = True) -> _Found:
        """Take to ``low`` what can be taken there and need not stay as it is in ``base``."""
        base = self._with_shifts(low, base) if correct else base
        source = base.source
        units = self._units(low, base)
        if not self.wanted.guard:
            all_low = self._plan(dict.fromkeys((unit.name for unit in units), low), base)
            return _Found(source, all_low)
        numbers = count(1)

        def judge(assignment: Mapping[str, Precision]) -> Mapping[str, float]:
            with source.trials.written(self._plan(assignment, base)) as path:
                return self._change(path, f"{low}, guard's trial {next(numbers)}").per_task

        guarded = guard(
            units, self.limits, judge, lambda: self._sensitivity(low, base, units),
            low=low, high=lambda name: base.precisions[name],
        )  # fmt: skip
        return _Found(source, self._plan(guarded.assignment, base), (guarded,))

    def _plan(self, precisions: Mapping[str, Precision], base: _Base) -> QuantPlan:
        named = {**base.precisions, **precisions}
        plan = plan_assigned(base.source.model, base.table, named, self.pins, base.carrier)
        return replace(plan, shifts={name: values for name, values in base.shifts.items()
                                     if plan.precisions[name] == "int8"})  # fmt: skip

    def _sensitivity(
        self, low: Precision, base: _Base, units: tuple[Unit, ...]
    ) -> dict[str, dict[str, float]]:
        """Return, per task and unit, the error's power when that unit alone is lowered."""
        trials = base.source.trials

        def measured() -> dict[str, dict[str, float]]:
            reference = trials.reference(base.source.distance_images)
            found: dict[str, dict[str, float]] = {task: {} for task in reference.outputs}
            for unit in track(units, f"sensitivity to {low}", len(units)):
                plan = self._plan({unit.name: low}, base)
                for task, noise in trials.noise(plan, reference).items():
                    found[task][unit.name] = noise
            return found

        key = (trials.runtime.version(), trials.dialect.mark(), low, base.precisions,
               base.carrier, asdict(base.table), base.shifts, self.pins,
               [unit.name for unit in units])  # fmt: skip
        sensitivity: dict[str, dict[str, float]] = self.job.cache.json("sensitivity", key, measured)
        return sensitivity

    @cached_property
    def _all_fp32(self) -> dict[str, Precision]:
        return dict.fromkeys(node_modules(self.model), "fp32")

    def _report(self, found: _Found) -> dict[str, Any]:
        """Say what became of every node, and what to pin to get the same again."""
        plan, why = found.plan, {n: w for s in found.searches for n, w in s.why.items()}
        kept = {name: plan.precisions[name] for name in why}
        modules = node_modules(self.model)
        return {
            "dialect": self.trials.dialect.name,
            "calibrator": plan.calibrator,
            "images": found.source.statistics.images,
            "images_digest": found.source.statistics.images_digest,
            "carrier": plan.carrier,
            "nodes": dict(Counter(plan.precisions.values())),
            "macs_share": macs_share(found.source.model, plan),
            "equalised_channels": found.source.equalised_channels,
            "corrected_biases": len(plan.shifts),
            "distilled": found.distilled,
            "kept": [
                {"node": name, "module": modules[name], "precision": precision, "why": why[name]}
                for name, precision in kept.items()
            ],
            "pin": {**self.wanted.pin, **kept},
            "guard": {
                "passed": found.passed,
                "evaluations": sum(search.evaluations for search in found.searches),
                "limits": self.limits,
                "change_percent": dict(found.searches[-1].change),
                "too_low_in_fp32": list(self.hopeless),
            } if found.searches else None,
        }  # fmt: skip
