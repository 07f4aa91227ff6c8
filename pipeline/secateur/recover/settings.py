"""What a training is asked for and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel

RATE, GENTLE_RATE = 3e-3, 1e-3
SHORT = 5  # epochs
MILD = 0.4  # of the MACs


@dataclass(frozen=True)
class TrainSettings:
    """AdamW with a linear warm-up and a cosine decay to zero.

    ``epochs`` or ``steps`` (optimiser steps; the last epoch is cut short) says how long, and the
    cosine spans exactly that. ``distill`` weighs the distance to the parent's outputs against the
    task losses (1.0); for a task without labels that distance is the whole loss. ``labels=False``
    reads no label at all. ``feature_distill`` weighs ``features.attention_distance``. ``balance``
    is a rule of ``balance.py``. ``ema`` is the decay per step of the averaged weights that are
    returned (0 is off). ``patience`` epochs without a better validation end the training (0
    never does). ``freeze_norms``: the share of the steps after which batch norms keep their
    statistics (1 is never). From then on the network trains as it will be used; 0 is right only
    where the statistics are the network's own as it starts, as after a refit. ``as_deployed``: in
    eval mode, so that dropout and whatever else a network does in training alone stay out.

    Raises:
        RecipeError: neither ``epochs`` nor ``steps`` is given, or both.
    """

    epochs: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    distill: float = 0.0
    seed: int = 0
    bf16: bool = False
    steps: int | None = None
    balance: Literal["fixed", "uncertainty", "dwa", "pcgrad"] = "fixed"
    feature_distill: float = 0.0
    ema: float = 0.0
    labels: bool = True
    patience: int = 0
    freeze_norms: float = 1.0
    as_deployed: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise RecipeError(
                f"a training takes epochs or steps, got epochs={self.epochs} steps={self.steps}",
                hint="give one of the two",
            )

    def total_steps(self, samples: int) -> int:
        """Return the optimiser steps that are planned on ``samples`` training samples."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * steps_per_epoch(samples, self.batch_size)


def freeze_after(epochs: float, kept: float, *, inherited: bool = False) -> float:
    """Return after which share of a recovery to freeze norms that a refit has settled.

    At once where it is short and the cut, to ``kept`` of the MACs, mild, or where its weights are
    ``inherited`` from recovered ones: it then never leaves the function it was fitted to. Else
    half-way: a batch's own statistics help a network that has far to go. Chosen on the validation
    images of NYUv2.
    """
    return 0.0 if epochs < SHORT and (kept >= MILD or inherited) else 0.5


def usual_rate(epochs: float, *, inherited: bool = False) -> float:
    """Return the learning rate of a recovery that is told none.

    A third of the usual where it is short and its weights are ``inherited`` from recovered ones: a
    high rate undoes what these learnt, and a short run ends before it has learnt that again. Chosen
    on the validation images of NYUv2.
    """
    return GENTLE_RATE if epochs < SHORT and inherited else RATE


@dataclass(frozen=True)
class TrainResult:
    """The trained copy, the optimiser steps taken and the mean loss of each epoch.

    ``losses`` add the tasks by their fixed weights whatever the balance, so that runs compare.
    ``scores`` are the validation's, one per epoch, empty without one; the model is then that of
    the best epoch.
    """

    model: MultiTaskModel
    steps: int
    losses: tuple[float, ...]
    seconds: float
    scores: tuple[float, ...] = ()


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Return the optimiser steps of one epoch; a last batch of one sample is left out."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1 or whole == 0)
