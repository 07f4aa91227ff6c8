"""What every method of the suite is given: one parent, its data, its groups and their cost."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from secateur import zoo
from secateur.bench.accuracy import evaluate_model
from secateur.core.channels import ChannelGroup
from secateur.core.model import ModelInput, MultiTaskModel, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.data.loading import (
    Batch,
    Subset,
    batches,
    image_batch,
    open_reader,
    resized_reader,
    spread,
)
from secateur.data.sample import Reader
from secateur.flow.axes import NORM_IMAGES, plan_axes
from secateur.metrics.kind import kind_of
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.axes import apply_axes, linear_groups
from secateur.prune.layer_norms import fold_layer_norms
from secateur.prune.macs import MacsModel
from secateur.prune.plan import Budget
from secateur.recover import RememberedOutputs
from suite import read_json
from torch import Tensor
from train_parent import PARENTS

PARENT = "nyuv2_lite0_96x128"
SECOND = "nyuv2_mobilenetv2_96x128"
CACHE = Path(__file__).resolve().parents[2] / "out" / "fusion"
PARENT_FILES = Path(__file__).resolve().parents[1] / "parents"
FOLDERS = {"nyuv2": "nyuv2_288x384", "pets": "pets3", "scenes": "."}  # under SECATEUR_DATA
SPLITS = {"scenes": {"fit": "train", "val": "calibration"}}  # where a reader calls them otherwise
GRID = 8
AXES_IMAGES, BATCH = 128, 8
Scores = Mapping[str, NDArray[np.float64]]
Metrics = dict[str, dict[str, float]]


class Bench:
    """One parent and its data. ``fit`` trains, ``val`` chooses settings, ``test`` is told once."""

    def __init__(self, name: str) -> None:
        self.name = name
        known = PARENTS[name]
        network = getattr(zoo, known.factory)()
        weights = load_file(PARENT_FILES / f"{name}.safetensors")
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
        self.parent = MultiTaskModel(network, known.tasks).eval()
        self.spec: ModelInput = known.spec
        self.example = self.spec.example()
        self.parent_steps = int(read_json(PARENT_FILES / f"{name}.json")["steps"])
        self._reader = known.reader
        self._turned: dict[tuple[object, ...], Bench] = {}
        self._parent_metrics: dict[str, Metrics] = {}
        self._measure_groups()

    def _measure_groups(self) -> None:
        self.groups: tuple[ChannelGroup, ...] = find_groups(self.parent, self.example)
        self.cost: MacsModel = macs_model(self.parent, self.groups, self.example)
        self.full_macs = self.cost.macs([group.width for group in self.groups])

    @property
    def folder(self) -> Path:
        """Where what was found of this very parent, in these very axes, is kept."""
        return CACHE / f"{self.name}-{model_fingerprint(self.parent)}"

    def turned(self, *, tasks: Sequence[str] = (), labels: bool = True) -> Bench:
        """Return the same with its parent in balanced axes: equal outputs, better to cut.

        The axes are those of ``tasks``, or of all.
        """
        chosen = [task for task in self.parent.tasks if not tasks or task.name in tasks]
        key = (*(task.name for task in chosen), labels)
        if key not in self._turned:
            parent = fold_layer_norms(self.parent, self.groups, self.example)
            linear = linear_groups(parent, self.groups, self.example)
            stream = partial(self.stream, AXES_IMAGES, batch_size=BATCH, labels=labels)
            axes = plan_axes(parent, linear, chosen, stream, AXES_IMAGES // BATCH)
            other = copy.copy(self)
            own = "-".join(tasks) or "balanced"
            other.name = f"{self.name}-{own}{'' if labels else '-label-free'}"
            other.parent = apply_axes(parent, linear, axes, self.images(NORM_IMAGES))
            other._measure_groups()
            self._turned[key] = other
        return self._turned[key]

    @cached_property
    def teacher(self) -> RememberedOutputs:
        """What the parent says of each training image: found once for all that is recovered."""
        parent = copy.deepcopy(self.parent).to(memory_format=torch.channels_last)
        return RememberedOutputs(parent.eval())

    @cached_property
    def fit(self) -> Reader:
        return self._open("fit")

    @cached_property
    def val(self) -> Reader:
        return self._open("val")

    @cached_property
    def test(self) -> Reader:
        return self._open("test")

    def parent_metrics(self, split: str) -> Metrics:
        """Return the parent's metrics on a split."""
        if split not in self._parent_metrics:
            reader = {"val": self.val, "test": self.test}[split]
            self._parent_metrics[split] = evaluate_model(
                self.parent, reader, self.spec, batch_size=32
            )
        return self._parent_metrics[split]

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Return (count, C, H, W) unlabelled training images: spread evenly, or drawn by seed."""
        return image_batch(self.fit, self._chosen(count, seed), self.spec)

    def some(self, count: int, seed: int = 0) -> Reader:
        """Return the training images that ``images`` is of."""
        return Subset(self.fit, self._chosen(count, seed))

    def stream(
        self, count: int, seed: int = 0, batch_size: int = 8, *, labels: bool = True
    ) -> Iterator[Batch]:
        """Yield training batches, with labels or without: ``count`` images in all."""
        some = self.some(count, seed)
        return batches(some, self.parent.tasks if labels else (), self.spec, batch_size)

    def losses(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return each task's loss times its weight."""
        return {
            task.name: task.weight * kind_of(task).loss(outputs[task.name], targets[task.name])
            for task in self.parent.tasks
        }

    def plan(self, scores: Scores, share: float, floor: float = 0.0) -> PrunePlan:
        """Return the cut to ``share`` of the parent's MACs that global ranking of scores gives."""
        budget = Budget(share, GRID, floor, 0.0)
        return plan_prune(self.groups, self.cost, scores, {}, budget, criterion="-", fusion="-")

    def apply(self, plan: PrunePlan) -> MultiTaskModel:
        """Carry out a plan, without compensation."""
        return apply_plan(self.parent, self.groups, plan)

    def _chosen(self, count: int, seed: int) -> list[int]:
        if seed == 0:
            return spread(self.fit, count)
        order = torch.randperm(len(self.fit), generator=torch.Generator().manual_seed(seed))
        return sorted(int(i) for i in order[:count])

    def _open(self, split: str) -> Reader:
        root = Path(os.environ["SECATEUR_DATA"]) / FOLDERS[self._reader]
        name = SPLITS.get(self._reader, {}).get(split, split)
        return resized_reader(open_reader(self._reader, root, name), self.spec, self.parent.tasks)
