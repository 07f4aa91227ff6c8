"""NYUv2 (Silberman et al., ECCV 2012): segmentation, depth and normals of indoor rooms.

Reads either the zip layout (``train.zip`` and ``test.zip`` with image/ depth/ seg13/ seg40/
normal/) or the official ``nyu_depth_v2_labeled.mat``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DataError, RuntimeMissing
from secateur.core.files import value_digest
from secateur.data.archive import ImageArchive
from secateur.data.sample import Array, Reader, Sample

DEPTH_METRES_PER_STEP = 9.99547 / 255  # the zip's depth is 8 bit; README of the data set
BLOCK = 20  # consecutive images that are held out together
MAT_CLASSES = 40  # of the official .mat: its most frequent names
CLASSES_13 = [
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "picture",
    "sofa",
    "table",
    "tv",
    "wall",
    "window",
]
CLASS_NAMES = {"segmentation": CLASSES_13}


def create(root: Path, split: str, **options: Any) -> Reader:
    """Open NYUv2 at ``root``: a folder with ``<split>.zip``, or the official ``.mat`` file.

    Besides ``train`` (795) and ``test`` (654) there are ``fit`` and ``val``: the training images
    without, and only, every eighth block of ``BLOCK`` images. Choose settings on ``val``; whole
    blocks are held out because neighbouring images show the same room.

    Options: ``classes`` (13 or 40; the zip's 40 is really 39 classes), ``indices`` (for the
    ``.mat``: the 1-based image numbers of the split, since the file itself carries none).
    """
    if root.suffix == ".mat":
        if "indices" not in options:
            raise DataError(
                f"{root.name} does not say which images are the '{split}' split",
                hint="give options: {indices: [...]}, the 1-based image numbers of the split",
            )
        return NyuMat(root, **options)
    return NyuZip(root, split, **options)


class NyuZip:
    """The zip layout: (H, W) labels as PNG, normals re-normalised to unit length."""

    def __init__(self, root: Path, split: str, classes: int = 13) -> None:
        stored = "train" if split in ("fit", "val") else split
        path = root / f"{stored}.zip"
        self._archive = ImageArchive(path if path.exists() else root / stored)
        if classes not in (13, 40):
            raise DataError(f"NYUv2 has no {classes}-class labels", hint="classes: 13 or 40")
        self._segmentation = f"seg{classes}"
        self._ids = _part(self._archive.stems("image"), split)
        self.fingerprint = value_digest(["nyuv2", classes, self._archive.fingerprint, self._ids])

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def label_names(self) -> frozenset[str]:
        return frozenset({"segmentation", "depth", "normals"})

    def __getitem__(self, index: int) -> Sample:
        name = self._ids[index]
        labels: dict[str, Array] = {
            "segmentation": self._archive.raw(f"{self._segmentation}/{name}.png"),
            "depth": self._archive.raw(f"depth/{name}.png") * np.float32(DEPTH_METRES_PER_STEP),
            "normals": unit_normals(self._archive.raw(f"normal/{name}.png")),
        }
        return Sample(name, self._archive.rgb(f"image/{name}.jpg"), labels)


def _part(ids: list[str], split: str) -> list[str]:
    """Return the images of ``fit`` or ``val`` among the training images; of others, all."""
    if split not in ("fit", "val"):
        return ids
    held_out = [(i // BLOCK) % 8 == 7 for i in range(len(ids))]
    return [name for name, held in zip(ids, held_out, strict=True) if held == (split == "val")]


def unit_normals(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (h, w, 3) unit vectors from ``RGB = (n + 1) * 127.5``, 0 where there is none.

    None is stored as grey, which is zero, or black, which is no unit vector.

    Raises:
        DataError: it is no picture of three channels of 8 bits.
    """
    if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype != np.uint8:
        raise DataError(
            f"normals are {stored.dtype} of shape {stored.shape}, expected uint8 (h, w, 3)",
            hint="write RGB = (n + 1) * 127.5 as an 8-bit PNG",
        )
    vectors = stored.astype(np.float32) / np.float32(127.5) - 1
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    known = (length > 0.5) & stored.any(axis=2, keepdims=True)
    unit: NDArray[np.float32] = np.where(known, vectors / np.maximum(length, 1e-6), 0)
    return unit.astype(np.float32)


class NyuMat:
    """The official MATLAB v7.3 file: images, in-painted depths and raw 894-class labels.

    The labels are mapped to the 40 most frequent classes of the file, 0..39, the rest ignored
    (the official 13- and 40-class maps are separate downloads); there are no normals.
    """

    def __init__(self, path: Path, indices: list[int]) -> None:
        try:
            import h5py
        except ImportError as error:
            raise RuntimeMissing(
                "reading nyu_depth_v2_labeled.mat needs h5py", hint="pip install 'secateur[mat]'"
            ) from error
        try:
            self._file = h5py.File(path, "r")
            count = self._file["images"].shape[0]
        except (OSError, KeyError) as error:
            raise DataError(
                f"{path} is not nyu_depth_v2_labeled.mat: {error}",
                hint="it must be the MATLAB v7.3 file with images, depths and labels",
            ) from error
        wrong = [i for i in indices if not 1 <= i <= count]
        if wrong:
            raise DataError(
                f"{path} has images 1..{count}, got index {wrong[0]}", hint="indices are 1-based"
            )
        self._indices = [i - 1 for i in indices]
        self._lookup = self._frequent_classes()
        self.fingerprint = value_digest(["nyuv2-mat", path.stat().st_size, self._indices])

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def label_names(self) -> frozenset[str]:
        return frozenset({"segmentation", "depth"})

    def __getitem__(self, index: int) -> Sample:
        i = self._indices[index]
        # MATLAB stores column-major, so HDF5 shows (3, W, H) and (W, H).
        image = np.ascontiguousarray(self._file["images"][i].transpose(2, 1, 0))
        raw = np.asarray(self._file["labels"][i]).T
        labels: dict[str, Array] = {
            "segmentation": self._lookup[raw],
            "depth": np.asarray(self._file["depths"][i]).T.astype(np.float32),
        }
        return Sample(f"{i + 1:04d}", image, labels)

    def _frequent_classes(self) -> NDArray[np.uint8]:
        names = self._file["labels"]
        counts = np.zeros(int(np.iinfo(np.uint16).max) + 1, np.int64)
        for i in range(0, names.shape[0], 8):  # every eighth image is enough to rank the classes
            counts += np.bincount(np.asarray(names[i]).ravel(), minlength=counts.size)
        counts[0] = 0  # 0 is "unlabelled"
        ranked = np.argsort(-counts, kind="stable")[:MAT_CLASSES]
        lookup = np.full(counts.size, 255, np.uint8)
        ranked = ranked[counts[ranked] > 0]
        lookup[ranked] = np.arange(ranked.size)
        return lookup
