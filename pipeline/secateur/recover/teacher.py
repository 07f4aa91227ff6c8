"""The parent as a teacher: what it says of an image it has seen before is not computed again."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from secateur.core.model import MultiTaskModel

MAX_BYTES = 2 << 30  # two flips of 795 images at 96x128 with three dense tasks take 1.3 GB


class RememberedOutputs:
    """A network's outputs image by image, the first ``max_bytes`` of them kept in memory.

    A recovery shows each image in two flips many times over, and at a tenth of the MACs the
    parent's forward pass is the dearest part of a step. Images are known by their bytes.
    """

    def __init__(self, parent: MultiTaskModel, max_bytes: int = MAX_BYTES) -> None:
        self.parent = parent
        self._room = max_bytes
        self._known: dict[bytes, dict[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return each task's output for (N, C, H, W) images."""
        keys = [hashlib.blake2b(i.numpy(force=True).tobytes()).digest() for i in images]
        new = [number for number, key in enumerate(keys) if key not in self._known]
        fresh: dict[bytes, dict[str, Tensor]] = {}
        if new:
            outputs = self.parent(images[new])
            for place, number in enumerate(new):
                fresh[keys[number]] = {name: o[place].clone() for name, o in outputs.items()}
            self._keep(fresh)
        rows = [self._known.get(key) or fresh[key] for key in keys]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _keep(self, fresh: dict[bytes, dict[str, Tensor]]) -> None:
        for key, row in fresh.items():
            size = sum(output.nbytes for output in row.values())
            if size <= self._room:
                self._room -= size
                self._known[key] = row
