"""CIFAR-100 as many five-way tasks: those of the library, and new ones of classes never seen."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from secateur.data.cifar100 import Cifar100
from torch import Tensor
from torch.nn import functional
from train_parent import PARENTS, SEEN, UNSEEN

WAYS = 5
BANK, NEW = 40, 12
SPEC = PARENTS["cifar_resnet"].spec
SHIFT = 4  # pixels


@dataclass(frozen=True)
class FiveWay:
    """A task: which fine classes (0..99) are told apart."""

    name: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """(N, 3, 32, 32) normalised images and (N,) labels."""

    images: Tensor
    labels: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        """Return the images in parts that fit a forward pass."""
        return torch.split(self.images, 250)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw a batch, shifted by up to SHIFT pixels and mirrored at random."""
        chosen = torch.from_numpy(rng.integers(0, len(self.labels), size))
        images = functional.pad(self.images[chosen], (SHIFT,) * 4, mode="reflect")
        moved = []
        for image, (down, right), mirrored in zip(
            images, rng.integers(0, 2 * SHIFT + 1, (size, 2)).tolist(), rng.random(size) < 0.5,
            strict=True,
        ):  # fmt: skip
            view = image[:, down : down + 32, right : right + 32]
            moved.append(view.flip(2) if mirrored else view)
        return torch.stack(moved), self.labels[chosen]


class Cifar:
    """All classes in memory; ``root`` as ``data.cifar100`` reads it."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or Path(os.environ["SECATEUR_DATA"]) / "cifar100_sub"
        self._known: dict[tuple[str, int], Tensor] = {}

    def classes_of(self, coarse: int) -> tuple[int, ...]:
        """Return the fine classes of a coarse one."""
        return self._coarse[coarse]

    @cached_property
    def _coarse(self) -> dict[int, tuple[int, ...]]:
        """The fine classes of each coarse one."""
        return {coarse: Cifar100(self._root, "test", coarse=[coarse]).classes
                for coarse in range(20)}  # fmt: skip

    def images(self, classes: tuple[int, ...], split: str) -> Images:
        """Return the images of some fine classes; labels count them from 0."""
        parts = [self._of_class(fine, split) for fine in classes]
        labels = [torch.full((len(part),), number) for number, part in enumerate(parts)]
        return Images(torch.cat(parts), torch.cat(labels))

    def bank_tasks(self) -> list[FiveWay]:
        """Return the tasks of the library: each seen coarse class, and draws across them."""
        return self._tasks(SEEN, BANK, "bank", seed=0)

    def new_tasks(self) -> list[FiveWay]:
        """Return the tasks that nothing was chosen on: of the unseen classes alone."""
        return self._tasks(UNSEEN, NEW, "new", seed=1)

    def _tasks(self, coarse: Sequence[int], count: int, name: str, seed: int) -> list[FiveWay]:
        rng = np.random.default_rng(seed)
        sets = [self._coarse[one] for one in coarse]
        classes = [fine for one in coarse for fine in self._coarse[one]]
        while len(sets) < count:
            drawn = tuple(sorted(rng.choice(classes, WAYS, replace=False).tolist()))
            if drawn not in sets:
                sets.append(drawn)
        return [FiveWay(f"{name}{number:02d}", own) for number, own in enumerate(sets)]

    def _of_class(self, fine: int, split: str) -> Tensor:
        key = split, fine
        if key not in self._known:
            reader = Cifar100(self._root, split, [fine])
            pixels = np.stack([reader[index].image for index in range(len(reader))])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            mean, std = (torch.tensor(own).view(3, 1, 1) for own in (SPEC.mean, SPEC.std))
            self._known[key] = (images - mean) / std
        return self._known[key]


def described(tasks: list[FiveWay]) -> str:
    """Return the tasks as JSON, for the record."""
    return json.dumps({task.name: task.classes for task in tasks})
