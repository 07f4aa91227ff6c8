"""Win back what a cut lost: fine-tuning on labels, distillation from the parent, or both."""

from secateur.recover.training import TrainResult, TrainSettings, train

__all__ = ["TrainResult", "TrainSettings", "train"]
