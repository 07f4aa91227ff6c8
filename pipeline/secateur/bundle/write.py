"""Write a bundle: every file first, the manifest with their digests last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.bundle import runner
from secateur.bundle.manifest import FileRecord, Manifest
from secateur.bundle.read import REQUIRED_FILES
from secateur.core.files import atomic_path, file_sha256, not_writable, write_json

CHECK_FILE = "check.npz"
PICTURES = "pictures/*.png"


def write_check(
    folder: Path, image: NDArray[np.uint8], outputs: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write one image (H, W, 3) at the input's size and the torch model's outputs for it."""
    arrays: dict[str, NDArray[np.generic]] = {"image": image}
    arrays.update({f"output/{task}": array for task, array in outputs.items()})
    with atomic_path(folder / CHECK_FILE) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def write_runner(folder: Path) -> None:
    """Copy the stand-alone runner into the bundle as ``run.py``."""
    with atomic_path(folder / "run.py") as temporary:
        shutil.copyfile(runner.__file__, temporary)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Return the digest and size of every file of the bundle, whatever else lies beside them."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            sha256=file_sha256(path), bytes=path.stat().st_size
        )
        for path in sorted([*(folder / name for name in REQUIRED_FILES), *folder.glob(PICTURES)])
    }


def write_bundle(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; the other files must already be there."""
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


def prepare_folder(folder: Path) -> None:
    """Make the bundle's folder.

    Raises:
        BundleError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".secateur-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(folder, error) from error
