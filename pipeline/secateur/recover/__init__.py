"""Win back what a cut lost: fine-tuning on labels, distillation from the parent, or both."""

from secateur.recover.training import TrainResult, TrainSettings, steps_per_epoch, train

__all__ = ["TrainResult", "TrainSettings", "steps_per_epoch", "train"]
