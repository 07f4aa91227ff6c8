"""Win back what a cut lost: fine-tuning on labels, distillation from the parent, or both."""

from secateur.recover.reinit import reinitialised
from secateur.recover.settings import (
    TrainResult,
    TrainSettings,
    freeze_after,
    steps_per_epoch,
    usual_rate,
)
from secateur.recover.teacher import RememberedOutputs
from secateur.recover.training import train

__all__ = [
    "RememberedOutputs",
    "TrainResult",
    "TrainSettings",
    "freeze_after",
    "reinitialised",
    "steps_per_epoch",
    "train",
    "usual_rate",
]
