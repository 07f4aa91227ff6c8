"""Images in a folder or inside a zip, read by name without unpacking."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DataError
from secateur.core.files import value_digest


class ImageArchive:
    """Files below a folder, or members of a zip file; nothing is ever extracted.

    ``checksums`` are the CRC-32 of each one's bytes, by name.

    Raises:
        DataError: the path is absent or is a damaged zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            self.names = sorted(
                file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()
            )
            try:
                marks = [(name, _crc32(path / name)) for name in self.names]
            except OSError as error:
                raise DataError(
                    f"cannot read {error.filename}: {error.strerror}",
                    hint="check that the data set is complete, and that you may read it",
                ) from error
        elif path.is_file():
            try:
                self._zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise DataError(f"{path} is not a zip file", hint="download it again") from error
            infos = [info for info in self._zip.infolist() if not info.is_dir()]
            self.names = sorted(info.filename for info in infos)
            marks = [(info.filename, info.CRC) for info in infos]
        else:
            raise DataError(
                f"no data at {path}",
                hint="set data.<split>.root in the recipe, or SECATEUR_DATA if the recipe uses it",
            )
        self.checksums = dict(marks)
        self.fingerprint = value_digest(marks)

    def read(self, name: str) -> bytes:
        """Return a member's bytes."""
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except (KeyError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            # RuntimeError: encrypted, or compressed in a way that Python cannot
            raise DataError(
                f"cannot read {name} in {self.path}: {error}",
                hint="check that the data set is complete",
            ) from error

    def stems(self, folder: str) -> list[str]:
        """Return the sorted file stems directly inside ``folder``."""
        return [Path(name).stem for name in self.names if Path(name).parent.as_posix() == folder]

    def rgb(self, name: str) -> NDArray[np.uint8]:
        """Return an image as (H, W, 3) uint8 RGB."""
        return self._decode(name, cv2.IMREAD_COLOR_RGB)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return an image as stored, channels in RGB order where there are three."""
        image = self._decode(name, cv2.IMREAD_UNCHANGED)
        if image.ndim == 3 and image.shape[2] == 3:
            image = image[:, :, ::-1]
        return image

    def _decode(self, name: str, flags: int) -> NDArray[np.uint8]:
        stored = np.frombuffer(self.read(name), np.uint8)
        try:
            image = cv2.imdecode(stored, flags) if stored.size else None
        except cv2.error:  # more pixels than it takes
            image = None
        if image is None:
            raise DataError(
                f"cannot decode image {name} in {self.path}",
                hint="the file is damaged or not an image OpenCV reads; replace or remove it",
            )
        return np.asarray(image)


def _crc32(path: Path) -> int:
    """Return the checksum of a file's bytes, as a zip's directory already holds it."""
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
