"""int8 for ncnn: calibrated on the training images, and layers kept in fp32 until tasks pass."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.files import file_sha256, value_digest
from secateur.core.progress import track
from secateur.data.loading import image_batch
from secateur.flow.job import Job
from secateur.flow.trials import noise_power
from secateur.lower.ncnn_int8 import (
    ending_layers,
    layer_macs,
    observe_inputs,
    read_scales,
    write_int8,
)
from secateur.lower.quant import CalibrationSettings
from secateur.metrics.delta import Delta
from secateur.runtimes import ncnn

DISTANCE_IMAGES = 4  # that a layer's error is measured on
AT_ONCE = 8

Judge = Callable[[Path], Delta]
"""What a file changes in each task, against the parent."""


@dataclass(frozen=True)
class NcnnInt8:
    """The .param file, what it changes, and the manifest's report of it."""

    path: Path
    change: Delta
    report: Mapping[str, Any]


def to_int8(job: Job, exact: Path, judge: Judge, limits: Mapping[str, float]) -> NcnnInt8:
    """Return fp32 ``exact`` in int8, with as many layers in fp32 as the ``limits`` ask for.

    ``limits`` gives the most percent that a task may lose. The end of each head stays in fp32;
    where that is not enough, one, two, four … layers whose own error is the largest do.

    Raises:
        BuildError, CalibrationError: see ``lower.ncnn_int8``.
    """
    wanted = job.recipe.precision
    chosen = CalibrationSettings(min(wanted.images, len(job.train))).choose(len(job.train))
    scales = _scales(job, exact, chosen)
    ends = ending_layers(exact, [task.name for task in job.tasks])
    macs = layer_macs(exact, job.example[0].numpy())
    trials = _Trials(job, exact, scales, ends)
    found, kept, evaluations = trials.write(ends), frozenset(ends), 1
    change = judge(found)
    order: Sequence[str] | None = None
    more = 1
    while wanted.guard and not _within(change, limits) and len(kept) < len(macs):
        order = trials.by_error(sorted(set(macs) - ends)) if order is None else order
        kept = ends | frozenset(order[:more])
        found, more, evaluations = trials.write(kept), 2 * more, evaluations + 1
        change = judge(found)
    total = sum(macs.values())
    high = sum(count for name, count in macs.items() if name in kept)
    report = {
        "dialect": "ncnn", "calibrator": wanted.calibrator, "images": len(chosen),
        "carrier": "fp32", "nodes": {"int8": len(macs) - len(kept), "fp32": len(kept)},
        "macs_share": {"int8": 1 - high / total, "fp32": high / total},
        "kept": [{"node": name, "module": "", "precision": "fp32",
                  "why": "head" if name in ends else "its own error"}
                 for name in sorted(kept)],
        "pin": {},
        "guard": {
            "passed": _within(change, limits), "evaluations": evaluations,
            "limits": dict(limits), "change_percent": dict(change.per_task),
        } if wanted.guard else None,
    }  # fmt: skip
    return NcnnInt8(found, change, report)


def _within(change: Delta, limits: Mapping[str, float]) -> bool:
    return all(change.per_task[task] >= -most for task, most in limits.items())


def _scales(job: Job, exact: Path, chosen: Sequence[int]) -> dict[str, float]:
    def read() -> Iterator[NDArray[np.float32]]:
        starts = range(0, len(chosen), AT_ONCE)
        for start in track(starts, "calibrating for ncnn", len(starts)):
            yield image_batch(job.train, chosen[start : start + AT_ONCE], job.spec).numpy()

    def called(position: int) -> str:
        return f"training image '{job.train[chosen[position]].id}'"

    calibrator = job.recipe.precision.calibrator

    def made() -> dict[str, float]:
        return read_scales(observe_inputs(exact, read, called=called), calibrator)

    key = (_digest(exact), job.train.fingerprint, asdict(job.spec), list(chosen), calibrator,
           ncnn.version())  # fmt: skip
    found: dict[str, float] = job.cache.json("ncnn_scales", key, made)
    return found


def _digest(model: Path) -> str:
    return value_digest([file_sha256(model), file_sha256(model.with_suffix(".bin"))])


class _Trials:
    """Writes one model with some layers in int8, and runs it."""

    def __init__(
        self, job: Job, exact: Path, scales: Mapping[str, float], ends: frozenset[str]
    ) -> None:
        self._job, self._exact, self._scales, self._ends = job, exact, scales, ends

    def write(self, kept: frozenset[str]) -> Path:
        """Return the file with the layers of ``kept`` in fp32, made now or found."""
        key = (_digest(self._exact), sorted(self._scales.items()), sorted(kept))
        path = self._job.cache.folder("ncnn_int8", *key) / "model.ncnn.param"
        if not path.exists():
            write_int8(self._exact, self._scales, path, kept)
        return path

    def by_error(self, names: Sequence[str]) -> list[str]:
        """Return the layers, those first that harm some output most when they alone are int8."""
        chosen = list(range(min(DISTANCE_IMAGES, len(self._job.train))))
        images = image_batch(self._job.train, chosen, self._job.spec).numpy()
        wanted = ncnn.open_session(self._exact, 1).run(images)
        worst = {}
        with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
            alone = Path(scratch) / "model.ncnn.param"
            for name in track(names, "sensitivity to int8", len(names)):
                kept = self._ends | frozenset(names) - {name}
                write_int8(self._exact, self._scales, alone, kept)
                got = ncnn.open_session(alone, 1).run(images)
                worst[name] = max(noise_power(wanted[task], got[task]) for task in wanted)
        return sorted(names, key=lambda name: -worst[name])
