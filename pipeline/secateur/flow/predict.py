"""A runtime's session as evaluation wants it: torch tensors in, torch tensors out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.bench.accuracy import Predict
from secateur.runtimes.base import Session


def predictor(session: Session) -> Predict:
    """Return ``session`` as a function from (N, C, H, W) images to one tensor per task."""

    def predict(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        outputs = session.run(images.numpy())
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    return predict
