"""Oxford-IIIT Pet subset (Parkhi et al., CVPR 2012): breed, species, trimap and head box.

Reads ``pets3.zip``: image/NAME.jpg, trimap/NAME.png and labels.csv.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from secateur.core.errors import DataError
from secateur.core.files import value_digest
from secateur.data.archive import ImageArchive
from secateur.data.sample import Array, Reader, Sample

BREEDS = ("Abyssinian", "Bengal", "american_bulldog")
SPECIES = ("cat", "dog")
TRIMAP = ("pet", "background", "border")
CLASS_NAMES = {"breed": BREEDS, "species": SPECIES, "trimap": TRIMAP}
HOLD_OUT = 6  # one training image of so many is held out
HEAD_BOX = ("head_xmin", "head_ymin", "head_xmax", "head_ymax")


def create(root: Path, split: str) -> Reader:
    """Open the pets at ``root``, a folder with ``pets3.zip`` or the unpacked files.

    Besides ``train`` (300) and ``test`` (298) there are ``fit`` (250) and ``val`` (50): the
    training images without, and only, every ``HOLD_OUT``-th. Choose settings on ``val``.
    """
    return Pets(root, split)


class Pets:
    """Labels: breed, species (classes), trimap (segmentation: 0 pet, 1 background, 2 border),
    head (2 corner keypoints in 0..1, NaN where the data set gives none)."""

    def __init__(self, root: Path, split: str) -> None:
        path = root / "pets3.zip"
        self._archive = ImageArchive(path if path.exists() else root)
        text = self._archive.read("labels.csv").decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        missing = {"name", "split", "breed", "species", *HEAD_BOX} - set(rows[0] if rows else ())
        if missing:
            raise DataError(
                f"labels.csv in {self._archive.path} lacks column '{sorted(missing)[0]}'",
                hint="expected name, split, breed, species and the head box",
            )
        self._rows = _part(rows, split)
        names = [row["name"] for row in self._rows]
        self.fingerprint = value_digest(["pets", names, self._archive.fingerprint])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def label_names(self) -> frozenset[str]:
        return frozenset({"breed", "species", "trimap", "head"})

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        box = [float(row[key] or "nan") for key in HEAD_BOX]
        labels: dict[str, Array] = {
            "breed": np.array(int(row["breed"])),
            "species": np.array(int(row["species"])),
            "trimap": self._archive.raw(f"trimap/{row['name']}.png"),
            "head": np.array(box, np.float32).reshape(2, 2),
        }
        return Sample(row["name"], self._archive.rgb(f"image/{row['name']}.jpg"), labels)


def _part(rows: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    if split not in ("fit", "val"):
        return [row for row in rows if row["split"] == split]
    train = [row for row in rows if row["split"] == "train"]
    held_out = [i % HOLD_OUT == HOLD_OUT - 1 for i in range(len(train))]
    return [row for row, held in zip(train, held_out, strict=True) if held == (split == "val")]
