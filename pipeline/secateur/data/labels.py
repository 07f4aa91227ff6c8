"""What labels have to be: checks of one label, and of many where one alone says too little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DataError
from secateur.core.task import Task
from secateur.data.sample import Array, Reader, Sample

DENSE = frozenset({"segmentation", "depth", "normals", "edges"})
ASPECT_SLACK = 0.1  # of a label's width over height against its image's
LENGTH_SLACK = 0.01  # of a normal
UNKNOWN_EDGE = 255
TOLD_APART = frozenset({"segmentation", "classification", "edges"})  # kinds of classes
LEAST_LOOKED_AT, LOOKED_AT, MOST_LOOKED_AT = 8, 32, 512  # images


def check_shape(label: Array, task: Task, sample: Sample) -> None:
    """Raise DataError where a label has not its kind's shape (``data.sample``)."""
    if not _fits(label, task):
        raise DataError(
            f"label '{task.label}' of sample {sample.id} has shape {np.shape(label)}, which is no "
            f"{task.kind} ('{task.name}')",
            hint="set the task's kind, classes or label to what the data holds",
        )


def check_dense(label: Array, task: Task, sample: Sample) -> None:
    """Raise DataError where a label cannot lie on its image; a smaller one may be rounded."""
    if label.ndim != (3 if task.kind == "normals" else 2):
        raise DataError(
            f"label '{task.label}' of sample {sample.id} has shape {label.shape}, expected "
            + ("(h, w, 3)" if task.kind == "normals" else "(h, w)"),
            hint="store one channel per pixel: class indices, not colours",
        )
    (height, width), (h, w) = sample.image.shape[:2], label.shape[:2]
    if abs(h * width / (w * height) - 1) > ASPECT_SLACK:
        raise DataError(
            f"label '{task.label}' of sample {sample.id} is {w}x{h}, its image {width}x{height}: "
            "they are not of the same picture",
            hint="give labels the shape of their images; another size alone is fine",
        )


def check_classes(label: Array, task: Task, sample_id: str) -> None:
    """Raise DataError where a value is no class of the task."""
    if not np.equal(label, np.floor(label)).all():
        raise DataError(
            f"label '{task.label}' of sample {sample_id} has the class "
            f"{np.ravel(label)[np.ravel(label) != np.floor(np.ravel(label))][0]:g} (task "
            f"'{task.name}')",
            hint="a class is a whole number",
        )
    values = np.asarray(label, dtype=np.int64)
    wrong = (values != task.ignore_index) & ((values < 0) | (values >= (task.classes or 0)))
    if wrong.any():
        raise DataError(
            f"label {int(values[wrong].flat[0])} in sample {sample_id} is out of range for task "
            f"'{task.name}', which has classes 0..{(task.classes or 0) - 1} "
            f"(ignore_index {task.ignore_index})",
            hint="set tasks.<name>.classes or ignore_index to what the data holds",
        )


def check_values(label: Array, task: Task, sample_id: str) -> None:
    """Raise DataError where a depth, normal, edge or multilabel holds what its kind cannot."""
    stored = label.dtype.kind in "iub"
    if task.kind in ("depth", "normals") and stored:
        unit = "metres" if task.kind == "depth" else "unit vectors"
        raise DataError(
            f"label '{task.label}' of sample {sample_id} holds {label.dtype}, expected {unit} as "
            f"floating point (task '{task.name}')",
            hint=f"the folder that reader 'folder' decodes is called '{task.kind}'; another reader "
            "has to decode what is stored",
        )
    if task.kind == "normals":
        wrong = _first(label, np.abs(label) > 1 + LENGTH_SLACK)
        _raise_value(wrong, "components of unit vectors, -1..1", "n = stored / 127.5 - 1", task,
                     sample_id)  # fmt: skip
    elif task.kind == "edges":
        values = np.asarray(label, np.float32)
        wrong = _first(label, (values != UNKNOWN_EDGE) & ~((values >= 0) & (values <= 1)))
        _raise_value(wrong, "1 on edges, 0 elsewhere and 255 where unknown",
                     "divide a picture of edges that is 0 and 255 by 255", task,
                     sample_id)  # fmt: skip
    elif task.kind == "multilabel":
        values = np.asarray(label, np.float32)
        _raise_value(_first(label, ~((values >= 0) & (values <= 1))), "1 or 0 per class",
                     "labels of 1 and -1 become (label + 1) / 2", task, sample_id)  # fmt: skip


def check_known(reader: Reader, tasks: Sequence[Task]) -> None:
    """Raise DataError where what a task should learn is stored as what is unknown.

    A mask of 0 and 255 has one class and pixels that nobody judges, when it was meant to have two.
    One image may be like that rightly; all of many are not.
    """
    for task in tasks:
        unknown = UNKNOWN_EDGE if task.kind == "edges" else task.ignore_index
        told = task.label in reader.label_names and task.kind in TOLD_APART
        if told and unknown == 255 and _known_values(reader, task.label, unknown) == {0}:
            raise DataError(
                f"label '{task.label}' has no value but 0 and 255, which stands for unknown: task "
                f"'{task.name}' has nothing to tell apart",
                hint="divide masks of 0 and 255 by 255"
                + ("" if task.kind == "edges" else f", or set tasks.{task.name}.ignore_index"),
            )


def _known_values(reader: Reader, label: str, unknown: int) -> set[float]:
    """Return what a label holds beside ``unknown``; nothing where that says too little.

    Once two are found, no further image is looked at; nor where the first ones show no unknown.
    """
    found: set[float] = set()
    places = [int(i) for i in np.linspace(0, len(reader) - 1, min(len(reader), MOST_LOOKED_AT))]
    order = np.random.default_rng(0).permutation(len(places))
    for number, place in enumerate(order):
        if number == LOOKED_AT and unknown not in found:
            return set()
        found |= {
            float(value) for value in np.unique(reader[places[place]].labels.get(label, unknown))
        }
        if len(found - {unknown}) > 1:
            break
    return found - {unknown} if unknown in found and len(places) >= LEAST_LOOKED_AT else set()


def _fits(label: Array, task: Task) -> bool:
    shape = np.shape(label)
    if task.kind == "classification":
        return shape == ()
    if task.kind == "multilabel":
        return shape == (task.classes,) or (task.classes is None and len(shape) == 1)
    return task.kind != "keypoints" or (len(shape) == 2 and shape[1] == 2)


def _first(label: Array, wrong: NDArray[np.bool_]) -> Any:
    return np.asarray(label)[wrong][0] if wrong.any() else None


def _raise_value(wrong: Any, expected: str, hint: str, task: Task, sample_id: str) -> None:
    if wrong is not None:
        raise DataError(
            f"label '{task.label}' of sample {sample_id} has the value {wrong:g}, expected "
            f"{expected} (task '{task.name}')",
            hint=hint,
        )
