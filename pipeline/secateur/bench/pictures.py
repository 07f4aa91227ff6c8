"""Pictures: a contact sheet (input, truth, parent, cut per task) and a chart of what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.bench.colours import (
    Picture,
    class_picture,
    depth_picture,
    edges_picture,
    normals_picture,
    unit_bytes,
)
from secateur.core.files import atomic_path
from secateur.core.model import ModelInput
from secateur.core.task import Task
from secateur.data.labels import DENSE
from secateur.data.sample import Reader
from secateur.data.transforms import image_tensor, target_tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Outputs = Mapping[str, Tensor]
CHANNELS = 128


def contact_sheet(
    path: Path,
    reader: Reader,
    indices: Sequence[int],
    tasks: Sequence[Task],
    spec: ModelInput,
    models: Mapping[str, Sequence[Outputs]],
) -> None:
    """Write a PNG with one row per image: the input, then truth and each model for every task.

    ``models``: by title, the outputs (1, ...) for each of ``indices``.
    """
    titles = ["truth", *models]
    columns = 1 + len(tasks) * len(titles)
    figure, axes = plt.subplots(
        len(indices), columns, figsize=(1.75 * columns, 1.42 * len(indices) + 0.35), squeeze=False
    )
    for row, index in enumerate(indices):
        sample = reader[index]
        plain = ModelInput(3, spec.height, spec.width, (0, 0, 0), (1, 1, 1))
        _show(
            axes[row][0], unit_bytes(image_tensor(sample.image, plain).numpy().transpose(1, 2, 0))
        )
        column = 1
        for task in tasks:
            truth = target_tensor(sample, task, spec).numpy()
            answers = [outputs[row][task.name][0].float().numpy() for outputs in models.values()]
            for picture in _pictures(task, truth, answers, (spec.height, spec.width)):
                if isinstance(picture, str):
                    axes[row][column].text(0.5, 0.5, picture, ha="center", va="center", fontsize=11)
                    axes[row][column].axis("off")
                else:
                    _show(axes[row][column], picture)
                column += 1
    headings = ["input", *(f"{task.name}\n{title}" for task in tasks for title in titles)]
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=9)
    figure.tight_layout(pad=0.3)
    _save(figure, path)


def savings_chart(path: Path, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Write a bar chart of each measure as a share of the parent's; values are printed on bars."""
    figure, axis = plt.subplots(figsize=(6.4, 0.62 * len(before) + 1.0))
    rows = np.arange(len(before))[::-1]
    shares = [100 * after[name] / before[name] for name in before]
    axis.barh(rows + 0.19, [100] * len(rows), 0.36, color="#b8c4d0", label="parent")
    axis.barh(rows - 0.19, shares, 0.36, color="#2a7f62", label="cut")
    for row, name, share in zip(rows, before, shares, strict=True):
        axis.text(99, row + 0.19, f"{before[name]:,.4g}", va="center", ha="right", fontsize=8)
        axis.text(share + 1, row - 0.19, f"{after[name]:,.4g}  ({share:.0f} %)", va="center",
                  fontsize=8)  # fmt: skip
    axis.set_yticks(rows, list(before))
    axis.set_xlabel("% of the parent (kept tasks only)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def tradeoff_chart(
    path: Path,
    cost_percent: Sequence[float],
    change_percent: Sequence[Mapping[str, float]],
    latency_ms: Sequence[float | None],
) -> None:
    """Write each task's change (%) over what is left of the MACs (%), and the time if it is known.

    The first of each is the parent's.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    axis.axhline(0, color="#b8c4d0", linewidth=1)
    for task in change_percent[0]:
        axis.plot(cost_percent, [change[task] for change in change_percent], marker="o", label=task)
    axis.set_xlabel("% of the parent's MACs (kept tasks only)")
    axis.set_ylabel("change against the parent, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#eef1f4")
    for cost, milliseconds in zip(cost_percent, latency_ms, strict=True):
        if milliseconds is not None:
            axis.annotate(f"{milliseconds:.3g} ms", (cost, 1), xycoords=("data", "axes fraction"),
                          ha="center", va="bottom", fontsize=8, color="#5b6b7a")  # fmt: skip
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    _save(figure, path)


def _pictures(
    task: Task,
    truth: NDArray[np.generic],
    answers: Sequence[NDArray[np.float32]],
    size: tuple[int, int],
) -> list[Picture | str]:
    """Return the truth's picture and one per answer."""
    if task.kind in DENSE:
        answers = [_resize(answer, size) for answer in answers]  # (H, W, C)
    if task.kind == "segmentation":
        maps = [truth, *(answer.argmax(axis=2) for answer in answers)]
        return [class_picture(m, task.classes or 1, task.ignore_index) for m in maps]
    if task.kind == "depth":
        metres = np.asarray(truth, np.float32)
        known = metres[metres > 0]
        low, high = (known.min(), np.percentile(known, 98)) if known.size else (0.0, 10.0)
        maps = [truth, *(answer[:, :, 0] for answer in answers)]
        return [depth_picture(m, float(low), float(high)) for m in maps]
    if task.kind == "normals":
        vectors = [truth.transpose(1, 2, 0), *answers]
        return [normals_picture(np.asarray(v, np.float32)) for v in vectors]
    if task.kind == "edges":
        maps = [truth, *(1 / (1 + np.exp(-answer[:, :, 0])) for answer in answers)]
        return [edges_picture(m) for m in maps]
    if task.kind == "classification":
        return [f"class {int(truth)}", *(f"class {int(answer.argmax())}" for answer in answers)]
    return [_numbers(truth), *(_numbers(answer) for answer in answers)]


def _resize(answer: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    parts = np.array_split(answer, -(-len(answer) // CHANNELS))  # what OpenCV 5 takes at a time
    maps = [
        cv2.resize(np.ascontiguousarray(part.transpose(1, 2, 0)), size[::-1]).reshape(*size, -1)
        for part in parts
    ]
    return np.concatenate(maps, axis=2, dtype=np.float32)


def _numbers(values: NDArray[np.generic]) -> str:
    return "\n".join(f"{float(v):.3g}" for v in np.ravel(values)[:4])


def _show(axis: plt.Axes, picture: Picture) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.axis("off")


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
