"""What is lowered: an fp32 ONNX file with its statistics, perhaps made ready for int8 first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.core.files import file_sha256
from secateur.core.progress import track
from secateur.data.loading import image_batch, spread
from secateur.flow.job import Job
from secateur.flow.trials import Trials
from secateur.lower.quant import (
    ActivationStatistics,
    CalibrationSettings,
    CalibrationTable,
    Precision,
    QuantPlan,
    apply_equalisation,
    find_units,
    node_modules,
    observe,
    plan_assigned,
    plan_equalisation,
    plan_quant,
    table_of,
)
from secateur.lower.quant.calibrators import Calibrator

READ_AT_ONCE = 8
FEW_IMAGES = 16  # that channels are equalised and biases corrected on
DISTANCE_IMAGES = 4  # that sensitivities are measured on
LESS_NOISE = 0.95  # of the error's power: what equalisation has to bring it down to

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """The model of ``trials``, and the training images ``chosen`` to calibrate it on.

    ``given`` are its statistics, where they are not to be made from those images.
    ``equalised_channels`` were scaled, its function unchanged.
    """

    job: Job
    trials: Trials
    chosen: tuple[int, ...]
    given: ActivationStatistics | None = None
    equalised_channels: int = 0

    @property
    def model(self) -> Path:
        """The fp32 ONNX file."""
        return self.trials.model

    @cached_property
    def statistics(self) -> ActivationStatistics:
        """What activations were seen; a calibration that was stopped goes on."""
        if self.given is not None:
            return self.given
        job, chosen = self.job, self.chosen

        def read() -> Iterator[Images]:
            starts = range(0, len(chosen), READ_AT_ONCE)
            for start in track(starts, "calibrating", len(starts)):
                indices = chosen[start : start + READ_AT_ONCE]
                yield image_batch(job.train, indices, job.spec).numpy()

        key = (file_sha256(self.model), job.train.fingerprint, asdict(job.spec), chosen)
        state = job.cache.folder("calibration", *key) / "statistics.npz"
        return observe(self.model, read, state=state, called=self._called)

    def _called(self, position: int) -> str:
        return f"training image '{self.job.train[self.chosen[position]].id}'"

    def table(self, calibrator: Calibrator) -> CalibrationTable:
        """Return the ranges that ``calibrator`` makes of the statistics."""
        return table_of(self.statistics, calibrator)

    @cached_property
    def few_images(self) -> Images:
        """Some of the chosen images, (N, C, H, W), from all over the data set: it may be sorted."""
        few = [self.chosen[place] for place in spread(self.chosen, FEW_IMAGES)]
        return image_batch(self.job.train, few, self.job.spec).numpy()

    @property
    def distance_images(self) -> Images:
        """Some of them, which distances from fp32 are measured on."""
        return self.few_images[spread(self.few_images, DISTANCE_IMAGES)]

    def with_model(self, model: Path) -> Source:
        """Return the same for other weights in the same graph, under the same ranges."""
        given = self.statistics.for_model(file_sha256(model))
        return replace(self, trials=replace(self.trials, model=model), given=given)


def fresh_source(job: Job, trials: Trials) -> Source:
    """Return the model of ``trials`` as it is."""
    images = min(job.recipe.precision.images, len(job.train))
    return Source(job, trials, CalibrationSettings(images).choose(len(job.train)))


def equalised(job: Job, source: Source) -> Source:
    """Return ``source`` with like channels, if the recipe says so.

    ``auto`` does it where int8 then disturbs the tasks less on a few training images.
    """
    wanted = job.recipe.precision.equalise
    plan = plan_equalisation(source.model, source.few_images) if wanted else None
    if plan is None or not plan.channels:
        return source
    digest = {name: scales.tolist() for name, scales in plan.scales.items()}
    path = job.cache.folder("equalised", file_sha256(source.model), digest) / "model.onnx"
    if not path.exists():
        apply_equalisation(source.model, plan, path)
    made = replace(source, trials=replace(source.trials, model=path),
                   equalised_channels=plan.channels)  # fmt: skip
    if wanted == "auto" and _noise_ratio(source, made) > LESS_NOISE:
        return source
    return made


def _noise_ratio(source: Source, other: Source) -> float:
    """Return the noise that int8 makes in ``other`` over that in ``source``, tasks alike.

    Both calibrated on the few images only, all but the ends of heads in int8.
    """
    reference = source.trials.reference(source.distance_images)
    return _ratio(*(each.trials.noise(_plain(each), reference) for each in (source, other)))


def noise_ratio(source: Source, plan: QuantPlan, other: Source, plan_of_other: QuantPlan) -> float:
    """Return the distance of ``other`` under its plan from ``source`` in fp32, over its own.

    It is the power of the error, the geometric mean over tasks, on a few training images.
    """
    reference = source.trials.reference(source.few_images)
    return _ratio(source.trials.noise(plan, reference),
                  other.trials.noise(plan_of_other, reference))  # fmt: skip


def _ratio(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    ratios = [max(after[task], 1e-12) / max(before[task], 1e-12) for task in before]
    return float(np.exp(np.mean(np.log(ratios))))


def _plain(source: Source) -> QuantPlan:
    """Return all but the ends of heads in int8, calibrated on the few images."""
    seen = observe(source.model, lambda: [source.few_images])
    table = table_of(seen, source.job.recipe.precision.calibrator)
    units = find_units(source.model, plan_quant(source.model, table, {}))
    named: dict[str, Precision] = dict.fromkeys(node_modules(source.model), "fp32")
    named.update((unit.name, "int8") for unit in units if not unit.ends_head)
    return plan_assigned(source.model, table, named, {}, "fp32")
