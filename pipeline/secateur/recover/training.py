"""One training loop for recovery and for parents: balanced losses, distillation, resumable."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.core.errors import ModelError
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.progress import track
from secateur.data.loading import Batch, batches, has_labels
from secateur.data.sample import Reader
from secateur.data.transforms import Augment
from secateur.recover.balance import BALANCES
from secateur.recover.checkpoint import Progress, Stateful, load_checkpoint, save_checkpoint
from secateur.recover.objective import Objective
from secateur.recover.settings import TrainResult, TrainSettings, steps_per_epoch
from secateur.recover.teacher import RememberedOutputs

# Log variances move by about one rate per step; a recovery is too short for the network's rate.
BALANCE_RATE = 10.0


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
    validate: Callable[[MultiTaskModel], float] | None = None,
    title: str = "training",
    remembered: RememberedOutputs | None = None,
) -> TrainResult:
    """Train a copy of ``model`` on ``reader`` and return it.

    With ``checkpoint``, the state after each epoch is kept there (written whole or not at all),
    and a later call with the same arguments goes on from it. ``validate`` scores the network after
    each epoch, higher is better: the best epoch's weights are returned, and ``settings.patience``
    ends the training early. Both callbacks see the weights that would be returned (the averaged
    ones with ``settings.ema``), on the device and in training mode. ``remembered``: what this very
    ``parent`` said in other trainings, for many networks that learn from one (on the CPU, and where
    no features are distilled; else it is asked each time).

    Raises:
        DataError: the data carry no labels, or features are to be distilled, without a parent.
        ModelError: the loss became NaN or infinite, or no features can be compared.
    """
    started = time.monotonic()
    labelled = [task for task in model.tasks if settings.labels and has_labels(reader, [task])]
    accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no")
    run = _Run(model, settings, accelerator)
    objective = Objective(
        run.model, parent, labelled, spec, settings, accelerator,
        repeats=augment is None or augment.repeats, remembered=remembered,
    )  # fmt: skip
    progress = load_checkpoint(checkpoint, run.parts())
    run.prepare()
    per_epoch = steps_per_epoch(len(reader), settings.batch_size)
    total = settings.total_steps(len(reader))
    epochs = -(-total // per_epoch)
    for epoch in range(len(progress.losses), epochs):
        if 0 < settings.patience <= progress.stale():
            break
        seed = settings.seed * 10_000 + epoch
        stream = batches(
            reader, labelled, spec, settings.batch_size, augment=augment, shuffle_seed=seed
        )
        steps = min(per_epoch, total - epoch * per_epoch)
        bar = track(islice(stream, steps), f"{title} epoch {epoch + 1}/{epochs}", steps)
        torch.manual_seed(seed)  # dropout resumes as it would have gone on
        done = [(epoch + step / per_epoch) / (total / per_epoch) for step in range(steps)]
        progress.losses.append(run.epoch(objective, bar, done))
        if validate is not None:
            _judge(run.result(), validate, progress)
        save_checkpoint(checkpoint, run.parts(), progress)
        if after_epoch is not None:
            after_epoch(epoch + 1, run.result(), progress.losses[-1])
    trained = run.finish(progress)
    taken = min(total, len(progress.losses) * per_epoch)
    seconds = time.monotonic() - started
    return TrainResult(trained, taken, tuple(progress.losses), seconds, tuple(progress.scores))


class _Run:
    """The network in training and all that moves with it."""

    def __init__(
        self, model: MultiTaskModel, settings: TrainSettings, accelerator: Accelerator
    ) -> None:
        self.model = copy.deepcopy(model)
        self.model.to(memory_format=torch.channels_last)  # 1.7x faster on CPUs
        for parameter in self.model.parameters():  # those that the user froze are cut ones now, too
            parameter.requires_grad_(parameter.is_floating_point())
        self.balance = BALANCES[settings.balance]({task.name: task.weight for task in model.tasks})
        self.balance.to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate,
            weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        learned = list(self.balance.parameters())
        if learned:
            group = {"params": learned, "weight_decay": 0.0, "rate": BALANCE_RATE}
            self.optimizer.add_param_group(group)
        self.average: AveragedModel | None = None
        if settings.ema:
            rule = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=rule, use_buffers=True)
        self.accelerator = accelerator
        self.settings = settings
        self.network: nn.Module = self.model

    def parts(self) -> dict[str, Stateful]:
        """Return what a checkpoint has to hold; parts without a state are left out."""
        parts: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer}
        if self.balance.state_dict():
            parts["balance"] = self.balance
        if self.average is not None:
            parts["average"] = self.average
        return parts

    def prepare(self) -> None:
        """Move everything to the device."""
        self.network, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.average is not None:
            self.average.to(self.accelerator.device)

    def epoch(self, objective: Objective, stream: Iterable[Batch], done: Sequence[float]) -> float:
        """Take one step per batch and return the mean loss, tasks added by their fixed weights.

        ``done``: the share of the whole schedule that each step finds behind it.
        """
        self.network.train(not self.settings.as_deployed)
        parameters = list(self.network.parameters())
        sums = [0.0] * (len(self.balance.names) + 1)
        for batch, share in zip(stream, done, strict=True):
            rate = self.settings.learning_rate * _schedule(share, self.settings.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
            if share >= self.settings.freeze_norms:
                _freeze_statistics(self.network)
            losses = self._step(objective, batch, parameters)
            sums = [a + b for a, b in zip(sums, losses, strict=True)]
        means = [value / len(done) for value in sums]
        self.balance.end_epoch(dict(zip(self.balance.names, means[:-1], strict=True)))
        return sum(means)

    def _step(
        self, objective: Objective, batch: Batch, parameters: Sequence[nn.Parameter]
    ) -> list[float]:
        """Take one optimiser step and return each task's loss before it, then the features'."""
        losses, shared = objective(self.network, batch)
        extra = shared if shared is not None else torch.zeros(())
        values = [float(loss.detach()) for loss in (*losses.values(), extra)]
        if not math.isfinite(sum(values)):
            raise ModelError(
                f"the training loss became {sum(values)}",
                hint="lower the learning rate: recover.learning_rate, or precision.distill's",
            )
        self.optimizer.zero_grad()
        self.balance.backward(losses, shared, parameters, self.accelerator.backward)
        self.accelerator.clip_grad_norm_(parameters, 5.0)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
            _copy_indices(self.average.module, self.model)
        return values

    def result(self) -> MultiTaskModel:
        """Return the weights as they would be delivered now, on the device."""
        if self.average is None:
            return self.model
        return cast(MultiTaskModel, self.average.module)

    def finish(self, progress: Progress) -> MultiTaskModel:
        """Return the network, of the best epoch if any was judged, on the CPU in eval mode."""
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        model = self.result()
        if progress.best:
            model.load_state_dict(progress.best)
        return model.cpu().to(memory_format=torch.contiguous_format).eval()


def _judge(
    model: MultiTaskModel, validate: Callable[[MultiTaskModel], float], progress: Progress
) -> None:
    """Note the score of ``model``, and its weights when it is the best so far."""
    score = float(validate(model))
    score = -math.inf if math.isnan(score) else score  # else nothing would be better
    if score > max(progress.scores, default=-math.inf):
        state = model.state_dict()
        progress.best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    progress.scores.append(score)


def _copy_indices(average: nn.Module, network: nn.Module) -> None:
    """Give the average the network's whole numbers: a mean of such is rounded down."""
    for own, other in zip(average.buffers(), network.buffers(), strict=True):
        if not own.is_floating_point():
            own.copy_(other)


def _freeze_statistics(network: nn.Module) -> None:
    """Let batch norms use their running statistics and leave them as they are; the rest trains."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _schedule(done: float, warmup: float) -> float:
    """Return the learning rate's factor after the share ``done`` of all steps."""
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
