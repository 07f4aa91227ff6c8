"""Open a bundle and check that it is whole."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from secateur.bundle.manifest import SCHEMA_VERSION, Manifest
from secateur.bundle.ncnn_run import NCNN_FILES
from secateur.core.errors import BundleError, VerifyError, first_problem
from secateur.core.files import file_sha256

REQUIRED_FILES = {"model.onnx", "run.py", "check.npz", "plan.json", "recipe.yaml"}


def read_bundle(folder: Path) -> Manifest:
    """Return the manifest of a bundle.

    Raises:
        BundleError: there is none, it is not valid, or a newer version wrote it.
    """
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: {path.name} cannot be read ({error.strerror})",
            hint="give the folder that `secateur build` named, out/<device>/<precision>",
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}", hint="build the bundle again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this Secateur reads {SCHEMA_VERSION}",
            hint="use the Secateur that built it, or build it again",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise BundleError(
            f"{path}: {first_problem(error)}", hint="build the bundle again"
        ) from error


def model_files(manifest: Manifest) -> tuple[str, ...]:
    """Return the files of the model that the bundle's runtime opens; the last has the weights."""
    return NCNN_FILES if manifest.runtime == "ncnn" else ("model.onnx",)


def weights_sha256(manifest: Manifest) -> str:
    """Return the digest of the file that has the weights: which model a measurement is of."""
    return manifest.files[model_files(manifest)[-1]].sha256


def run_files(manifest: Manifest) -> tuple[str, ...]:
    """Return what has to be on a device to run there."""
    return ("run.py", "manifest.json", *model_files(manifest))


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its digest in the manifest.

    Raises:
        VerifyError: a file is missing or its bytes changed, or a name leaves the folder.
    """
    unlisted = (REQUIRED_FILES | {*model_files(manifest)}) - manifest.files.keys()
    if unlisted:
        raise VerifyError(
            f"the manifest of {folder} does not list {min(unlisted)}", hint="build it again"
        )
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = (folder / name).resolve()
        if not path.is_relative_to(root):
            raise VerifyError(
                f"the manifest names a file outside the bundle: {name}",
                hint="do not use this bundle",
            )
        if not path.is_file():
            raise VerifyError(f"{name} is missing from {folder}", hint="copy the bundle again")
        digest = file_sha256(path)
        if digest != record.sha256:
            raise VerifyError(
                f"{name} was altered: sha256 {digest[:12]}…, the manifest says "
                f"{record.sha256[:12]}…",
                hint="copy the bundle again from where it was built",
            )
