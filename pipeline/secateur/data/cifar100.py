"""CIFAR-100 (Krizhevsky, 2009): 100 fine and 20 coarse classes at 32x32.

Reads ``cifar100_sub.zip``: one lossless WebP mosaic of 32x32 tiles per class and split
(``train/CC.webp``, ten tiles a row) and labels.json.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DataError
from secateur.core.files import value_digest
from secateur.data.archive import ImageArchive
from secateur.data.sample import Array, Reader, Sample

TILE = 32
PER_ROW = 10


def create(
    root: Path, split: str, fine: list[int] | None = None, coarse: list[int] | None = None
) -> Reader:
    """Open a split at ``root``, of all classes, or of some ``fine`` ones, renumbered 0..

    ``coarse`` restricts it to the fine classes of some coarse ones instead.

    Raises:
        DataError: both are given, or a class is not there.
    """
    return Cifar100(root, split, fine, coarse)


class Cifar100:
    """Labels: fine (0..99, or from 0 without gaps when restricted) and coarse (0..19)."""

    def __init__(
        self,
        root: Path,
        split: str,
        fine: list[int] | None = None,
        coarse: list[int] | None = None,
    ) -> None:
        path = root / "cifar100_sub.zip"
        self._archive = ImageArchive(path if path.exists() else root)
        facts = json.loads(self._archive.read("labels.json"))
        self._coarse = [int(c) for c in facts["fine_to_coarse"]]
        stems = self._archive.stems(split)
        if coarse is not None:
            fine = self._of_coarse(fine, coarse)
        self._classes = list(fine) if fine is not None else [int(stem) for stem in stems]
        unknown = [c for c in self._classes if f"{c:02d}" not in stems]
        if unknown:
            raise DataError(
                f"split '{split}' at {root} has no class {unknown[0]}",
                hint=f"classes there: {len(stems)}",
            )
        self._split = split
        per_class = facts["per_class"]
        self._count = int(per_class[split] if isinstance(per_class, dict) else per_class)
        self.fingerprint = value_digest(["cifar100", split, fine, self._archive.fingerprint])
        self._tiles = lru_cache(maxsize=128)(self._read_tiles)

    def __len__(self) -> int:
        return len(self._classes) * self._count

    @property
    def label_names(self) -> frozenset[str]:
        return frozenset({"fine", "coarse"})

    def __getitem__(self, index: int) -> Sample:
        number, position = divmod(index, self._count)
        original = self._classes[number]
        labels: dict[str, Array] = {
            "fine": np.array(number),
            "coarse": np.array(self._coarse[original]),
        }
        return Sample(f"{original:02d}-{position}", self._tiles(original)[position], labels)

    @property
    def classes(self) -> tuple[int, ...]:
        """The original numbers of the fine classes, in the order of their labels."""
        return tuple(self._classes)

    def _of_coarse(self, fine: list[int] | None, coarse: list[int]) -> list[int]:
        unknown = set(coarse) - set(self._coarse)
        if unknown or fine is not None:
            raise DataError(
                f"there is no coarse class {min(unknown)}" if unknown
                else "fine and coarse are both given",
                hint=f"give fine or coarse classes; coarse ones are 0..{max(self._coarse)}",
            )  # fmt: skip
        return [number for number, own in enumerate(self._coarse) if own in coarse]

    def _read_tiles(self, fine: int) -> NDArray[np.uint8]:
        mosaic = self._archive.rgb(f"{self._split}/{fine:02d}.webp")
        rows = mosaic.shape[0] // TILE
        tiles = mosaic.reshape(rows, TILE, PER_ROW, TILE, 3)  # (row, y, column, x, RGB)
        return np.asarray(tiles.transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 3))
