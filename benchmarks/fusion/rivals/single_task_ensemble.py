"""An ensemble of single-task cuts at the cost of one joint cut (after arXiv 2112.05705).

One network per task, each the parent without the other tasks, cut to an equal part of the joint
budget by the gate Taylor of its own task. Departures: channels in place of weights or ranks, cost
in MACs in place of parameters, one-shot scores in place of movement during fine-tuning; an equal
share for each task, from the multi-task parent, where the source takes the best ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusion.bench import Bench
from fusion.rivals.scoring import IMAGES, gate_squares, roots
from fusion.rivals.training import cut_to, opened
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import Batch
from secateur.metrics.kind import kind_of
from secateur.tasks import select_tasks
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Runs one network per task; ``forward`` gives ``{output: tensor}`` as the parent's does."""

    def __init__(self, members: Mapping[str, MultiTaskModel], outputs: Mapping[str, str]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)
        self.outputs = dict(outputs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {self.outputs[name]: net(images)[name] for name, net in self.members.items()}


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the ensemble as one model."""
    tasks = bench.parent.tasks
    members = {task.name: _member(bench, task, share / len(tasks), seed) for task in tasks}
    network = Ensemble(members, {task.name: task.output for task in tasks})
    return MultiTaskModel(network, tasks).eval()


def _member(bench: Bench, task: Task, share: float, seed: int) -> MultiTaskModel:
    stage = opened(bench, select_tasks(bench.parent, [task.name]))

    def own(outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {task.name: kind_of(task).loss(outputs[task.name], batch.targets[task.name])}

    squares = gate_squares(stage.model, stage.groups, bench.stream(IMAGES, seed), own)
    return cut_to(bench, stage, roots(squares[task.name]), share)
