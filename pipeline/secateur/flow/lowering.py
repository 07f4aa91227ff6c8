"""One cut in a lower precision for one target: calibrate, plan, let the guard search, write.

The guard judges with the session that ships and each task's own metrics on the evaluation images,
which calibration never sees.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.core.files import file_sha256
from secateur.core.progress import track
from secateur.data.loading import image_batch
from secateur.devices.target import Target
from secateur.flow.job import Job
from secateur.flow.stages import Cut, change, exported, session_accuracy, too_low, torch_accuracy
from secateur.flow.trials import Trials, dialect_of
from secateur.lower.quant import (
    ActivationStatistics,
    CalibrationSettings,
    CalibrationTable,
    Dialect,
    Guarded,
    Precision,
    QuantPlan,
    Unit,
    emit,
    find_units,
    guard,
    macs_share,
    node_modules,
    observe,
    plan_assigned,
    resolve_pins,
    table_of,
)
from secateur.metrics.delta import Delta
from secateur.runtimes.base import runtime_of

READ_AT_ONCE = 8
DISTANCE_IMAGES = 4  # that sensitivities are measured on


@dataclass(frozen=True)
class Quantised:
    """What a lower precision adds to a bundle; ``report`` is for its manifest."""

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
    """What is lowered: every node's precision, the float type between, the ranges to go by."""

    precisions: Mapping[str, Precision]
    carrier: Literal["fp32", "fp16"]
    table: CalibrationTable


@dataclass(frozen=True)
class _Found:
    """A plan and the guard's searches that led to it."""

    plan: QuantPlan
    searches: tuple[Guarded, ...] = ()


class Lowering:
    """Makes the forms of one cut for one target; what they share is made once.

    Raises:
        RecipeError: a pin names nothing in the model.
        CalibrationError: the training images cannot be calibrated on.
    """

    def __init__(self, job: Job, cut: Cut, target: Target) -> None:
        self.job, self.wanted = job, job.recipe.precision
        self.model = exported(job, cut.recovered, cut.key)
        self.on_gpu = target.accelerator == "gpu"
        self.pins = resolve_pins(self.model, self.wanted.pin)
        self.trials = Trials(
            self.model, dialect_of(target), runtime_of(target.runtime), target.threads
        )
        self.parent = torch_accuracy(job, job.selected, "accuracy of the parent")
        self.fp32 = Lowered("fp32", self.model, self.model, self._change(self.model, "fp32"))
        # No precision mends what the cut itself lost.
        self.hopeless = too_low(job, self.fp32.change)
        self.limits = {t.name: t.max_drop for t in job.tasks
                       if t.max_drop is not None and t.name not in self.hopeless}  # fmt: skip

    def to(self, precision: Precision) -> Lowered:
        """Return the cut in ``precision``, guarded if the recipe says so."""
        if precision == "fp32":
            return self.fp32
        start = time.monotonic()
        found = self._to_fp16() if precision == "fp16" else self._to_int8()
        seconds = round(time.monotonic() - start, 1)
        plan, dialect = found.plan, self.trials.dialect
        path = self.job.cache.folder("lowered", plan.to_json(), dialect.mark()) / "model.onnx"
        if not path.exists():
            emit(self.model, plan, dialect, path)
        report = {**self._report(found), "seconds": seconds}
        return Lowered(precision, path, self.model, self._change(path, precision),
                       Quantised(plan, dialect, report))  # fmt: skip

    def _change(self, path: Path, title: str) -> Delta:
        """Return what a form changes in each task, against the parent, on its own runtime."""
        session = self.trials.runtime.open_session(path, self.trials.threads)
        metrics = session_accuracy(self.job, session, path, f"accuracy, {title}")
        return change(self.job, self.parent, metrics)

    def _to_fp16(self) -> _Found:
        # CPUs run int8 among fp32 alone, and a pin may ask for int8 here, too.
        mixed = "int8" in self.pins.values() and not self.on_gpu
        # Not the calibrator's ranges: a peak that int8 may clip overflows in fp16.
        table = table_of(self._statistics, "minmax")
        return self._lower("fp16", _Base(self._all_fp32, "fp32" if mixed else "fp16", table))

    def _to_int8(self) -> _Found:
        table = table_of(self._statistics, self.wanted.calibrator)
        if self.on_gpu:
            half = self._to_fp16()
            if all(search.passed for search in half.searches):
                found = self._lower("int8", _Base(half.plan.precisions, "fp16", table))
                return _Found(found.plan, (*half.searches, *found.searches))
        return self._lower("int8", _Base(self._all_fp32, "fp32", table))

    def _lower(self, low: Precision, base: _Base) -> _Found:
        """Take to ``low`` what can be taken there and need not stay as it is in ``base``."""
        lowest = self._plan(dict.fromkeys(base.precisions, low), base)
        kept = {name for name, p in base.precisions.items() if base.carrier == "fp16" != p}
        # The end of a head is safe in fp16; int8 takes its resolution.
        units = tuple(
            replace(unit, ends_head=unit.ends_head and low == "int8")
            for unit in find_units(self.model, lowest)
            if lowest.precisions[unit.name] == low and unit.name not in self.pins
            and not (low == "int8" and unit.name in kept)  # what fp16 hurts, int8 hurts more
        )  # fmt: skip
        if not self.wanted.guard:
            return _Found(self._plan(dict.fromkeys((unit.name for unit in units), low), base))
        numbers = count(1)

        def judge(assignment: Mapping[str, Precision]) -> Mapping[str, float]:
            with self.trials.written(self._plan(assignment, base)) as path:
                return self._change(path, f"{low}, guard's trial {next(numbers)}").per_task

        guarded = guard(
            units, self.limits, judge, lambda: self._sensitivity(low, base, units),
            low=low, high=lambda name: base.precisions[name],
        )  # fmt: skip
        return _Found(self._plan(guarded.assignment, base), (guarded,))

    def _plan(self, precisions: Mapping[str, Precision], base: _Base) -> QuantPlan:
        named = {**base.precisions, **precisions}
        return plan_assigned(self.model, base.table, named, self.pins, base.carrier)

    def _sensitivity(
        self, low: Precision, base: _Base, units: tuple[Unit, ...]
    ) -> dict[str, dict[str, float]]:
        """Return, per task and unit, the error's power when that unit alone is lowered."""

        def measured() -> dict[str, dict[str, float]]:
            images = image_batch(self.job.train, self._chosen[:DISTANCE_IMAGES], self.job.spec)
            reference = self.trials.reference(images.numpy())
            found: dict[str, dict[str, float]] = {task: {} for task in reference.outputs}
            for unit in track(units, f"sensitivity to {low}", len(units)):
                plan = self._plan({unit.name: low}, base)
                for task, noise in self.trials.noise(plan, reference).items():
                    found[task][unit.name] = noise
            return found

        key = (self.trials.dialect.mark(), low, asdict(base), self.pins,
               [unit.name for unit in units])  # fmt: skip
        sensitivity: dict[str, dict[str, float]] = self.job.cache.json("sensitivity", key, measured)
        return sensitivity

    @cached_property
    def _all_fp32(self) -> dict[str, Precision]:
        return dict.fromkeys(node_modules(self.model), "fp32")

    @cached_property
    def _chosen(self) -> tuple[int, ...]:
        """The training images that are calibrated on."""
        images = min(self.wanted.images, len(self.job.train))
        return CalibrationSettings(images).choose(len(self.job.train))

    @cached_property
    def _statistics(self) -> ActivationStatistics:
        """What activations were seen; a calibration that was stopped goes on."""
        job, chosen = self.job, self._chosen

        def read() -> Iterator[NDArray[np.float32]]:
            starts = range(0, len(chosen), READ_AT_ONCE)
            for start in track(starts, "calibrating", len(starts)):
                indices = chosen[start : start + READ_AT_ONCE]
                yield image_batch(job.train, indices, job.spec).numpy()

        key = (file_sha256(self.model), job.train.fingerprint, asdict(job.spec), chosen)
        state = job.cache.folder("calibration", *key) / "statistics.npz"
        return observe(self.model, read, state=state)

    def _report(self, found: _Found) -> dict[str, Any]:
        """Say what became of every node, and what to pin to get the same again."""
        plan, why = found.plan, {n: w for s in found.searches for n, w in s.why.items()}
        kept = {name: plan.precisions[name] for name in why}
        modules = node_modules(self.model)
        return {
            "dialect": self.trials.dialect.name,
            "calibrator": plan.calibrator,
            "images": self._statistics.images,
            "images_digest": self._statistics.images_digest,
            "carrier": plan.carrier,
            "nodes": dict(Counter(plan.precisions.values())),
            "macs_share": macs_share(self.model, plan),
            "kept": [
                {"node": name, "module": modules[name], "precision": precision, "why": why[name]}
                for name, precision in kept.items()
            ],
            "pin": {**self.wanted.pin, **kept},
            "guard": {
                "passed": all(search.passed for search in found.searches),
                "evaluations": sum(search.evaluations for search in found.searches),
                "limits": self.limits,
                "change_percent": dict(found.searches[-1].change),
                "too_low_in_fp32": list(self.hopeless),
            } if found.searches else None,
        }  # fmt: skip
