"""Resize, augment and normalise samples with OpenCV; each label kind keeps its own geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.model import ModelInput
from secateur.core.task import Task
from secateur.data.sample import Array, Sample

DENSE = frozenset({"segmentation", "depth", "normals", "edges"})
ASPECT_SLACK = 0.1  # of a label's width over height against its image's


@dataclass(frozen=True)
class Augment:
    """Random flips, zooming crops (``scale`` = largest zoom) and brightness/contrast jitter."""

    flip: bool = True
    scale: float = 1.5
    jitter: float = 0.2

    @property
    def repeats(self) -> bool:
        """Whether an image comes again just as it was: flips alone give two of each."""
        return self.scale == 1.0 and self.jitter == 0.0


@dataclass(frozen=True)
class View:
    """One drawn augmentation: a crop window in 0..1, a mirror flag, gain and offset."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    mirror: bool = False
    gain: float = 1.0
    offset: float = 0.0


def draw_view(augment: Augment | None, rng: np.random.Generator) -> View:
    """Draw a view; without ``augment``, the identity."""
    if augment is None:
        return View()
    zoom = float(rng.uniform(1.0, augment.scale))
    room = 1.0 - 1.0 / zoom
    return View(
        x=float(rng.uniform(0, room)) if room else 0.0,
        y=float(rng.uniform(0, room)) if room else 0.0,
        zoom=zoom,
        mirror=bool(augment.flip and rng.random() < 0.5),
        gain=float(rng.uniform(1 - augment.jitter, 1 + augment.jitter)),
        offset=float(rng.uniform(-augment.jitter, augment.jitter)) / 2,
    )


def image_tensor(image: NDArray[np.uint8], spec: ModelInput, view: View | None = None) -> Tensor:
    """Return the (C, H, W) float32 network input for an (h, w, 3) uint8 RGB image."""
    view = view or View()
    pixels = _window(image, view, spec, cv2.INTER_LINEAR).astype(np.float32) / 255.0
    if spec.layout == "BGR":
        pixels = pixels[:, :, ::-1]
    if view.gain != 1.0 or view.offset != 0.0:
        pixels = np.clip(pixels * view.gain + view.offset, 0.0, 1.0)
    normal = (pixels - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32))


def target_tensor(sample: Sample, task: Task, spec: ModelInput, view: View | None = None) -> Tensor:
    """Return the training target of ``task`` at the input's size.

    Shapes: segmentation (H, W) int64; depth, edges (H, W); normals (3, H, W); others as stored.

    Raises:
        DataError: the sample lacks the label, or a class index is out of range.
    """
    view = view or View()
    if task.label not in sample.labels:
        raise DataError(
            f"sample {sample.id} has no label '{task.label}' for task '{task.name}'; "
            f"it has {', '.join(sorted(sample.labels)) or 'none'}",
            hint="set tasks.<name>.label to one of these, or choose another reader",
        )
    label = sample.labels[task.label]
    if not _fits(label, task):
        raise DataError(
            f"label '{task.label}' of sample {sample.id} has shape {np.shape(label)}, which is no "
            f"{task.kind} ('{task.name}')",
            hint="set the task's kind, classes or label to what the data holds (docs/recipe.md)",
        )
    if task.kind in DENSE:
        label = _dense_label(label, task, sample, spec, view)
    if task.kind in ("segmentation", "classification"):
        _check_classes(label, task, sample.id)
        return torch.from_numpy(np.array(label, dtype=np.int64, order="C"))
    values = np.array(label, dtype=np.float32)
    if task.kind == "edges":
        _check_edges(values, task, sample.id)
    if task.kind == "depth":
        values = values / view.zoom  # a zoom moves the camera nearer by the same factor
    elif task.kind == "normals":
        values = _turn_normals(values, view)
    elif task.kind == "keypoints":
        values = _move_points(values, view)
    return torch.from_numpy(np.ascontiguousarray(values))


def fit_sample(sample: Sample, spec: ModelInput, tasks: Sequence[Task]) -> Sample:
    """Return ``sample`` with its image and the tasks' dense labels at the input's size.

    What ``image_tensor`` and ``target_tensor`` make of the result is bit-equal to what they make
    of ``sample``, for every view that does not zoom. Labels that no task reads are left out.

    Raises:
        DataError: a dense label has the wrong number of dimensions, or not its image's shape.
    """
    whole = View()
    labels = {t.label: sample.labels[t.label] for t in tasks if t.label in sample.labels}
    for task in tasks:
        if task.kind in DENSE and task.label in labels:
            labels[task.label] = _dense_label(labels[task.label], task, sample, spec, whole)
    image = _window(sample.image, whole, spec, cv2.INTER_LINEAR)
    return Sample(sample.id, cast("NDArray[np.uint8]", image), labels)


def _dense_label(label: Array, task: Task, sample: Sample, spec: ModelInput, view: View) -> Array:
    """Return the window of a label with one value, or vector, per pixel."""
    if label.ndim != (3 if task.kind == "normals" else 2):
        raise DataError(
            f"label '{task.label}' of sample {sample.id} has shape {label.shape}, expected "
            + ("(h, w, 3)" if task.kind == "normals" else "(h, w)"),
            hint="store one channel per pixel: class indices, not colours",
        )
    _check_aspect(label, task, sample)
    if label.dtype == np.int64:  # OpenCV cannot resize 64-bit integers
        label = label.astype(np.int32)
    return _window(label, view, spec, cv2.INTER_NEAREST)


def _window(array: Array, view: View, spec: ModelInput, interpolation: int) -> Array:
    height, width = array.shape[:2]
    h, w = round(height / view.zoom), round(width / view.zoom)
    top, left = int(view.y * height), int(view.x * width)
    part = np.asarray(array)[top : top + h, left : left + w]
    if part.shape[:2] != (spec.height, spec.width):
        shrinking = spec.height < h and interpolation == cv2.INTER_LINEAR
        how = cv2.INTER_AREA if shrinking else interpolation
        part = cv2.resize(part, (spec.width, spec.height), interpolation=how)
    return part[:, ::-1] if view.mirror else part


def _fits(label: Array, task: Task) -> bool:
    """Say whether the label of a whole image has its kind's shape (``data.sample``)."""
    shape = np.shape(label)
    if task.kind == "classification":
        return shape == ()
    if task.kind == "multilabel":
        return shape == (task.classes,) or (task.classes is None and len(shape) == 1)
    return task.kind != "keypoints" or (len(shape) == 2 and shape[1] == 2)


def _check_aspect(label: Array, task: Task, sample: Sample) -> None:
    """Raise where a label cannot lie on its image; a smaller one may be rounded otherwise."""
    (height, width), (h, w) = sample.image.shape[:2], label.shape[:2]
    if abs(h * width / (w * height) - 1) > ASPECT_SLACK:
        raise DataError(
            f"label '{task.label}' of sample {sample.id} is {w}x{h}, its image {width}x{height}: "
            "they are not of the same picture",
            hint="give labels the shape of their images; another size alone is fine",
        )


def _check_edges(values: Array, task: Task, sample_id: str) -> None:
    known = values[values != 255]
    wrong = known[(known < 0) | (known > 1)]
    if wrong.size or (known.size < values.size and not known.any()):
        has = f"the value {wrong[0]:g}" if wrong.size else "no edge, only 0 and 255"
        raise DataError(
            f"label '{task.label}' of sample {sample_id} has {has}, expected 1 on edges, 0 "
            f"elsewhere and 255 where unknown (task '{task.name}')",
            hint="divide a picture of edges that is 0 and 255 by 255",
        )


def _check_classes(label: Array, task: Task, sample_id: str) -> None:
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


def _turn_normals(values: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    vectors = np.array(values.transpose(2, 0, 1))  # (3, H, W), x right, y down, z forward
    if view.mirror:
        vectors[0] *= -1
    return vectors


def _move_points(values: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    points = (values - np.array([view.x, view.y], np.float32)) * view.zoom
    if view.mirror:
        points[:, 0] = 1 - points[:, 0]
    outside = ((points < 0) | (points > 1)).any(axis=1)
    points[outside] = np.nan
    return np.asarray(points, np.float32)
