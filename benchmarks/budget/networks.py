"""Three multi-task networks, and random cuts of them as files in fp32 and int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from secateur import zoo
from secateur.core.channels import ChannelGroup
from secateur.core.files import atomic_path
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.task import Task
from secateur.devices.operators import Operators
from secateur.devices.target import Precision, load_target
from secateur.flow.trials import dialect_of
from secateur.lower import export_onnx
from secateur.lower.operators import list_operators
from secateur.lower.quant import calibrate, emit, plan_quant
from secateur.prune import apply_plan, find_groups, macs_model, plan_widths
from secateur.prune.costs import layer_widths
from secateur.prune.plan import Budget
from secateur.zoo.compose import HeadSpec, compose
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1]
WORK = BENCHMARKS.parent / "out" / "budget"
TARGET = load_target("x86-64-cpu")
GRID = 8
LEAST, MOST = 0.2, 1.0  # of a group's width
SETTLING = 8  # images that the batch norms of random weights see, three times
CALIBRATION = 4  # images
HEADS = {
    "segmentation": HeadSpec("segmentation", 13),
    "depth": HeadSpec("depth", 1),
    "room": HeadSpec("classification", 10),
}
TASKS = (
    Task("segmentation", "segmentation", "segmentation", "segmentation", classes=13),
    Task("depth", "depth", "depth", "depth"),
    Task("room", "room", "classification", "room", classes=10),
)
DENSE = (*TASKS[:2], Task("normals", "normals", "normals", "normals"))


@dataclass(frozen=True)
class Case:
    """A network, its input's height and width, and whether its batch norms are settled."""

    name: str
    make: Callable[[], nn.Module]
    tasks: tuple[Task, ...]
    height: int
    width: int
    trained: bool = False


def _lite0() -> nn.Module:
    network = zoo.nyuv2_lite0()
    weights = load_file(BENCHMARKS / "parents" / "nyuv2_lite0.safetensors")
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    return network


CASES = (
    Case("nyuv2_lite0", _lite0, DENSE, 192, 256, trained=True),
    Case("resnet50", lambda: compose("resnet50", HEADS), TASKS, 224, 224),
    Case("mobilenetv3_large", lambda: compose("mobilenetv3_large_100", HEADS), TASKS, 224, 224),
)


class Network:
    """One case: its model, its groups, and its cuts as files, each made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.spec = ModelInput(3, case.height, case.width, (0.0,) * 3, (1.0,) * 3)
        self.folder = WORK / case.name

    @cached_property
    def model(self) -> MultiTaskModel:
        torch.manual_seed(0)
        model = MultiTaskModel(self.case.make(), self.case.tasks)
        if not self.case.trained:
            with torch.no_grad():
                for seed in range(3):
                    model.train()(self.spec.example(SETTLING, seed=seed))
        return model.eval()

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return find_groups(self.model, self.spec.example())

    @property
    def full(self) -> list[int]:
        return [group.width for group in self.groups]

    def random_counts(self, seed: int) -> list[int]:
        """Return widths on the grid, each group's share of its width uniformly random."""
        random, counts = np.random.default_rng(seed), []
        for group in self.groups:
            step = min(group.width, group.step(GRID))
            share = random.uniform(LEAST, MOST)
            counts.append(min(group.width, max(1, round(share * group.width / step)) * step))
        return counts

    def file(self, name: str, precision: Precision, counts: Sequence[int] | None = None) -> Path:
        """Return the ONNX file of the parent, or of the cut to ``counts``."""
        fp32 = self.folder / f"{name}.fp32.onnx"
        if not fp32.exists():
            fp32.parent.mkdir(parents=True, exist_ok=True)
            model = self.model if counts is None else self._cut(counts)
            export_onnx(model, self.spec.example(), fp32)
        if precision == "fp32":
            return fp32
        int8 = self.folder / f"{name}.int8.onnx"
        if not int8.exists():
            images = [self.spec.example(CALIBRATION).numpy()]
            plan = plan_quant(fp32, calibrate(fp32, lambda: images, "minmax"), {})
            with atomic_path(int8) as temporary:
                emit(fp32, plan, dialect_of(TARGET), temporary)
        return int8

    def operators(self, precision: Precision) -> Operators:
        """Return the parent's operators with the widths that any cut gives them."""
        return list_operators(self.file("parent", precision), layer_widths(self.model, self.groups))

    def _cut(self, counts: Sequence[int]) -> MultiTaskModel:
        example = self.spec.example()
        scores = {group.name: np.arange(group.width, dtype=float) for group in self.groups}
        plan = plan_widths(
            self.groups, macs_model(self.model, self.groups, example), scores, counts,
            Budget(1.0, GRID), per_task={}, criterion="-", fusion="-",
        )  # fmt: skip
        return apply_plan(self.model, self.groups, plan)
