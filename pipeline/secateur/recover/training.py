"""One training loop for recovery and for parents: task losses and distillation, resumable."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError
from secateur.core.files import atomic_path
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.progress import track
from secateur.core.task import Task
from secateur.data.loading import Batch, batches, has_labels
from secateur.data.sample import Reader
from secateur.data.transforms import Augment
from secateur.metrics.kind import TaskKind, kind_of


@dataclass(frozen=True)
class TrainSettings:
    """AdamW with a linear warm-up and a cosine decay to zero.

    ``distill`` weighs the distance to the parent's outputs against the task losses (1.0); for a
    task without labels that distance is the whole loss.
    """

    epochs: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    distill: float = 0.0
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class TrainResult:
    """The trained copy, the optimiser steps it took and the mean loss of each epoch."""

    model: MultiTaskModel
    steps: int
    losses: tuple[float, ...]
    seconds: float


def train(
    model: MultiTaskModel,
    reader: Reader,
    spec: ModelInput,
    settings: TrainSettings,
    *,
    parent: MultiTaskModel | None = None,
    augment: Augment | None = None,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int, MultiTaskModel, float], None] | None = None,
    title: str = "training",
) -> TrainResult:
    """Train a copy of ``model`` on ``reader`` and return it.

    With ``checkpoint``, the state after each epoch is kept there (written whole or not at all),
    and a later call with the same arguments goes on from it.

    Raises:
        DataError: the data carry no labels and there is no parent to learn from.
        ModelError: the loss became NaN or infinite.
    """
    labelled = [task for task in model.tasks if has_labels(reader, [task])]
    if len(labelled) < len(model.tasks) and parent is None:
        raise DataError(
            "some task has no labels in the training data, and there is no parent to distil from",
            hint="use a reader with labels",
        )
    started = time.monotonic()
    accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no")
    trained = copy.deepcopy(model).to(memory_format=torch.channels_last)  # 1.7x faster on CPUs
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    losses = _resume(checkpoint, trained, optimizer)
    network, optimizer = accelerator.prepare(trained, optimizer)
    objective = _Objective(trained, parent, labelled, settings.distill, accelerator)
    for epoch in range(len(losses), settings.epochs):
        stream = batches(
            reader,
            labelled,
            spec,
            settings.batch_size,
            augment=augment,
            shuffle_seed=settings.seed * 10_000 + epoch,
        )
        steps = steps_per_epoch(len(reader), settings.batch_size)
        bar = track(stream, f"{title} epoch {epoch + 1}/{settings.epochs}", steps)
        network.train()
        torch.manual_seed(
            settings.seed * 10_000 + epoch
        )  # dropout resumes as it would have gone on
        total = 0.0
        for step, batch in enumerate(bar):
            done = (epoch + step / steps) / settings.epochs
            _set_rate(optimizer, settings.learning_rate * _schedule(done, settings.warmup))
            total += _step(objective, network, optimizer, accelerator, batch)
        losses.append(total / steps)
        _save(checkpoint, trained, optimizer, losses)
        if after_epoch is not None:
            after_epoch(epoch + 1, trained, losses[-1])
    trained = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    trained = trained.cpu().to(memory_format=torch.contiguous_format).eval()
    taken = settings.epochs * steps_per_epoch(len(reader), settings.batch_size)
    return TrainResult(trained, taken, tuple(losses), time.monotonic() - started)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Return the optimiser steps of one epoch; a last batch of one sample is left out."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1 or whole == 0)


def _step(
    objective: _Objective,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    batch: Batch,
) -> float:
    """Take one optimiser step and return the loss before it."""
    loss = objective(network, batch)
    optimizer.zero_grad()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(f"the training loss became {value}", hint="lower recover.learning_rate")
    return value


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class _Objective:
    """Sum over tasks of weight * (task loss + distill * distance to the parent)."""

    def __init__(
        self,
        model: MultiTaskModel,
        parent: MultiTaskModel | None,
        labelled: Sequence[Task],
        distill: float,
        accelerator: Accelerator,
    ) -> None:
        self.tasks = model.tasks
        self.kinds: Mapping[str, TaskKind] = {task.name: kind_of(task) for task in model.tasks}
        # A task without labels learns from the parent alone, at full weight.
        names = {task.name for task in labelled}
        self.distill = {t.name: distill if t.name in names else 1.0 for t in model.tasks}
        self.device = accelerator.device
        self.accelerator = accelerator
        self.parent = None
        if parent is not None and any(self.distill.values()):
            self.parent = copy.deepcopy(parent).to(memory_format=torch.channels_last)
            self.parent = self.parent.to(self.device).eval()

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        images = batch.images.to(self.device).to(memory_format=torch.channels_last)
        outputs = network(images)
        wanted = self._parent_outputs(images)
        loss = images.new_zeros(())
        for task in self.tasks:
            kind, output = self.kinds[task.name], outputs[task.name].float()
            if task.name in batch.targets:
                loss = loss + task.weight * kind.loss(
                    output, batch.targets[task.name].to(self.device)
                )
            if wanted:
                distance = kind.distillation_loss(output, wanted[task.name])
                loss = loss + task.weight * self.distill[task.name] * distance
        return loss

    def _parent_outputs(self, images: Tensor) -> dict[str, Tensor]:
        if self.parent is None:
            return {}
        with torch.no_grad(), self.accelerator.autocast():
            outputs = self.parent(images)
        return {name: tensor.float() for name, tensor in outputs.items()}


def _schedule(done: float, warmup: float) -> float:
    """Return the learning rate's factor after the share ``done`` of all steps."""
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _save(
    folder: Path | None,
    model: MultiTaskModel,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    if folder is None:
        return
    with atomic_path(folder / "state.pt") as temporary:
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses},
            temporary,
        )


def _resume(
    folder: Path | None, model: MultiTaskModel, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Load the last state, if there is one, and return the losses of the epochs done."""
    if folder is None or not (folder / "state.pt").exists():
        return []
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])
