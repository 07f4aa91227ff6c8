"""A runtime's session as evaluation wants it: torch tensors in, torch tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from secateur.bench.accuracy import Predict
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import model_files
from secateur.runtimes.base import Session, runtime_of


def bundle_session(folder: Path, manifest: Manifest, threads: int | None = None) -> Session:
    """Open a bundle's model with its runtime, by default with the manifest's threads.

    Raises:
        RuntimeMissing: the runtime is not installed.
        BundleError: it cannot run the model.
    """
    model = folder / model_files(manifest)[0]
    return runtime_of(manifest.runtime).open_session(model, threads or manifest.threads)


def predictor(session: Session) -> Predict:
    """Return ``session`` as a function from (N, C, H, W) images to one tensor per task."""

    def predict(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        outputs = session.run(images.numpy())
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    return predict
