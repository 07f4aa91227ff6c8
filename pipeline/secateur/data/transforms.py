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
from secateur.data.labels import DENSE, check_classes, check_dense, check_shape, check_values
from secateur.data.sample import Array, Sample


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
        DataError: the sample lacks the label, or it holds what its kind cannot.
    """
    view = view or View()
    if task.label not in sample.labels:
        raise DataError(
            f"sample {sample.id} has no label '{task.label}' for task '{task.name}'; "
            f"it has {', '.join(sorted(sample.labels)) or 'none'}",
            hint="set tasks.<name>.label to one of these, or choose another reader",
        )
    label = sample.labels[task.label]
    check_shape(label, task, sample)
    if task.kind in DENSE:
        label = _dense_label(label, task, sample, spec, view)
    check_values(label, task, sample.id)
    if task.kind in ("segmentation", "classification"):
        check_classes(label, task, sample.id)
        return torch.from_numpy(np.array(label, dtype=np.int64, order="C"))
    values = np.array(label, dtype=np.float32)
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
            labels[task.label] = _dense_label(sample.labels[task.label], task, sample, spec, whole)
    image = _window(sample.image, whole, spec, cv2.INTER_LINEAR)
    return Sample(sample.id, cast("NDArray[np.uint8]", image), labels)


def _dense_label(label: Array, task: Task, sample: Sample, spec: ModelInput, view: View) -> Array:
    """Return the window of a label with one value, or vector, per pixel."""
    check_dense(label, task, sample)
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
