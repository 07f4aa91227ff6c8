"""Your own images: a folder of them, with or without labels beside it.

::

    root/train/image/0001.jpg            any format OpenCV reads
    root/train/segmentation/0001.png     a dense label: same stem; 8- or 16-bit PNG
    root/train/depth/0001.png            16-bit: millimetres, or set depth_scale
    root/train/normals/0001.png          RGB = (n + 1) * 127.5
    root/train/labels.csv                name,<label>,...: one number per image and label

With ``split: .`` the root itself is the split; without ``image/``, the images lie in
the split's folder. Images alone are enough for calibration, compensation and label-free recovery.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from secateur.core.errors import DataError
from secateur.core.files import value_digest
from secateur.data.archive import ImageArchive
from secateur.data.nyuv2 import unit_normals
from secateur.data.sample import Array, Reader, Sample

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def create(root: Path, split: str, depth_scale: float = 0.001) -> Reader:
    """Open ``root/split``. ``depth_scale`` turns stored depth into metres."""
    path = root / split
    if not path.is_dir() and split not in ("", "."):
        hint = "give an existing split, or '.' for the root itself"
        if not root.is_dir():
            hint = f"there is no {root} either: set data.*.root, relative to the recipe"
        raise DataError(f"there is no folder {path}", hint=hint)
    return Folder(path, depth_scale)


def twice_named(path: Path, one: str, other: str) -> DataError:
    """Return the error of two files that only their ends tell apart."""
    return DataError(
        f"{one} and {other} in {path} have one name but for their ends, so a label could be of "
        "either",
        hint="give one of them another name, and its labels, too",
    )


class Folder:
    """Dense labels are the other sub-folders; scalar labels are the columns of labels.csv.

    ``misnamed``: sub-folders of pictures called like no image, each with its first one's name;
    ``twice``: those where two files have one name, with these.
    """

    def __init__(self, path: Path, depth_scale: float) -> None:
        self._archive = ImageArchive(path)
        self._depth_scale = float(depth_scale)
        folders: dict[str, dict[str, str]] = {}
        twice: dict[str, tuple[str, str]] = {}  # by folder, two files of one name
        for name in self._archive.names:
            file = Path(name)
            hidden = any(part.startswith((".", "__")) for part in file.parts)
            if file.suffix.lower() in SUFFIXES and len(file.parts) <= 2 and not hidden:
                files = folders.setdefault(file.parent.as_posix(), {})
                if file.stem in files:
                    twice.setdefault(file.parent.as_posix(), (files[file.stem], name))
                files[file.stem] = name
        own, beside = folders.pop("image", {}), folders.pop(".", {})
        self._images = own or beside
        self.twice = twice
        if (used := "image" if own else ".") in twice:
            raise twice_named(path, *twice[used])
        self._dense = {
            label: files for label, files in folders.items() if self._images.keys() & files.keys()
        }
        self.misnamed = {label: min(files) for label, files in folders.items()
                         if label not in self._dense}  # fmt: skip
        self._scalar = self._read_csv() if "labels.csv" in self._archive.names else {}
        self._stems = sorted(self._images)
        self.checksums = {
            self._archive.checksums[name]: name for name in self._images.values()
        }  # of images alone: a label may well be that of another image, too
        self._check_complete()
        self.fingerprint = value_digest(["folder", depth_scale, self._archive.fingerprint])

    def __len__(self) -> int:
        return len(self._stems)

    @property
    def label_names(self) -> frozenset[str]:
        columns = next(iter(self._scalar.values()), {})
        return frozenset(self._dense) | frozenset(columns)

    def __getitem__(self, index: int) -> Sample:
        stem = self._stems[index]
        labels: dict[str, Array] = {
            label: self._read_dense(label, files[stem]) for label, files in self._dense.items()
        }
        labels.update(self._scalar.get(stem, {}))
        return Sample(stem, self._archive.rgb(self._images[stem]), labels)

    def _read_dense(self, label: str, name: str) -> Array:
        stored = self._archive.raw(name)
        if label == "depth":
            return np.asarray(stored * np.float32(self._depth_scale), np.float32)
        return unit_normals(stored) if label == "normals" else stored

    def _read_csv(self) -> dict[str, dict[str, Array]]:
        text = self._archive.read("labels.csv").decode("utf-8-sig", errors="replace")
        rows = csv.DictReader(io.StringIO(text))
        result: dict[str, dict[str, Array]] = {}
        if "name" not in (rows.fieldnames or ()):
            raise DataError(
                f"labels.csv in {self._archive.path} has no column 'name'; its first line is "
                f"'{','.join(rows.fieldnames or ())}'",
                hint="write name,<label>,... there, and below a line per image: its file's name, "
                "and one number per label",
            )
        for number, row in enumerate(rows, start=2):
            try:
                stem = Path(row.pop("name")).stem
                if stem in result:
                    raise ValueError(f"a second line for image '{stem}'")
                result[stem] = {key: np.array(float(value)) for key, value in row.items()}
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"labels.csv in {self._archive.path}, line {number}: {error}",
                    hint="the columns are name,<label>,... with one number per label",
                ) from error
        return result

    def _check_complete(self) -> None:
        labelled = {label: set(files) for label, files in self._dense.items()}
        if self._scalar:
            labelled["labels.csv"] = set(self._scalar)
        for label, stems in labelled.items():
            lacking = self._images.keys() - stems
            if lacking:
                raise DataError(
                    f"label '{label}' in {self._archive.path} lacks {len(lacking)} of "
                    f"{len(self._images)} images, first '{min(lacking)}'",
                    hint="give every image this label, or take away the "
                    + ("file" if label == "labels.csv" else "folder"),
                )
