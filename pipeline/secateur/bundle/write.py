"""Write a bundle: every file first, the manifest with their digests last."""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from secateur.bundle import build_engine, runner
from secateur.bundle.engine_options import OPTIONS
from secateur.bundle.manifest import FileRecord, Manifest
from secateur.bundle.ncnn_run import NCNN_FILES
from secateur.bundle.read import REQUIRED_FILES
from secateur.core.files import atomic_path, file_sha256, not_writable, write_json, write_text

CHECK_FILE = "check.npz"
CUT_FILE, SURGERY = "cut.safetensors", "surgery"  # the torch network's weights, and what made them
PARENT_FILE = "parent_images.npz"
PICTURES = "pictures/*.png"
FP32_FILE, QUANT_FILE = ORIGIN_FILES = ("fp32.onnx", "quant.json")  # of lower precisions
OF_ONE_MODEL = ("model.engine", "engine.json", "layers.json", "bench.json")
BUILDER_FILES = ("build_engine.py", "nodes.json", OPTIONS)  # of targets with a GPU


def write_check(
    folder: Path, image: NDArray[np.uint8], outputs: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write one image (H, W, 3) at the input's size and the torch model's outputs for it."""
    arrays: dict[str, NDArray[np.generic]] = {"image": image}
    arrays.update({f"output/{task}": array for task, array in outputs.items()})
    with atomic_path(folder / CHECK_FILE) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def write_parent(folder: Path, sums: Mapping[str, NDArray[np.float64]]) -> None:
    """Write each image's part in the parent's accuracy, so that `verify` draws both alike."""
    with atomic_path(folder / PARENT_FILE) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **sums)  # type: ignore[arg-type]


def write_cut(folder: Path, state: Mapping[str, Tensor], surgery: Mapping[str, Any]) -> None:
    """Write the cut network's weights and what to take out of its parent for them to fit."""
    own = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}  # none shared
    with atomic_path(folder / CUT_FILE) as temporary:
        save_file(own, temporary, {SURGERY: json.dumps(surgery)})


def write_runner(folder: Path) -> None:
    """Write the stand-alone runner into the bundle as ``run.py``."""
    write_text(folder / "run.py", stand_alone(runner))


def write_origin(folder: Path, fp32: Path, plan: Mapping[str, Any] | None) -> None:
    """Write what a lower precision was made from, for `diagnose`; the runner reads none of it.

    Without a ``plan`` the model is in fp32, and files of an earlier build are taken away.
    """
    if plan is None:
        for name in ORIGIN_FILES:
            (folder / name).unlink(missing_ok=True)
        return
    with atomic_path(folder / FP32_FILE) as temporary:
        temporary.write_bytes(fp32.read_bytes())
    write_json(folder / QUANT_FILE, plan)


def write_ncnn(folder: Path, files: Sequence[Path] | None) -> None:
    """Copy the ncnn form of the model; without one, files of an earlier build are taken away."""
    for name, source in zip(NCNN_FILES, files or (None, None), strict=True):
        if source is None:
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(source.read_bytes())


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Return the digest and size of every file of the bundle, whatever else lies beside them."""
    wanted = [folder / name for name in REQUIRED_FILES]
    optional = (CUT_FILE, PARENT_FILE, *BUILDER_FILES, *ORIGIN_FILES, *NCNN_FILES)
    wanted += [folder / name for name in optional if (folder / name).exists()]
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            sha256=file_sha256(path), bytes=path.stat().st_size
        )
        for path in sorted([*wanted, *folder.glob(PICTURES)])
    }


def write_bundle(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; the other files must already be there."""
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the folder, and hold it; the kernel frees what dies."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def drop_outdated(folder: Path, model: Path) -> None:
    """Remove what was made of or measured on another model than the one that is to be written."""
    before = folder / "model.onnx"
    if before.exists() and file_sha256(before) != file_sha256(model):
        for name in OF_ONE_MODEL:
            (folder / name).unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """Make the bundle's folder.

    Raises:
        BundleError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):  # a name of its own: two may try at once
            pass
    except OSError as error:
        raise not_writable(folder, error) from error


def node_tasks(onnx_file: Path) -> dict[str, list[str]]:
    """Return, for each ONNX node, the outputs (one per task) that it is needed for.

    A node without a name has the one that TensorRT's parser gives it, ``node_of_<first output>``.
    """
    graph = onnx.load(onnx_file, load_external_data=False).graph
    maker = {output: node for node in graph.node for output in node.output}
    needed: dict[str, set[str]] = {}
    for task in (output.name for output in graph.output):
        waiting, seen = [task], set()
        while waiting:
            node = maker.get(waiting.pop())
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            needed.setdefault(node.name or f"node_of_{node.output[0]}", set()).add(task)
            waiting += node.input
    return {name: sorted(tasks) for name, tasks in sorted(needed.items())}


def stand_alone(module: ModuleType) -> str:
    """Return a module's source with those of this room that it imports put in their place, once."""
    here, placed = Path(__file__).parent, set[str]()
    pattern = re.compile(
        r"^from secateur\.bundle\.(\w+) import (?:\([^)]*\)|[^\n]*)\n", re.MULTILINE
    )

    def text_of(match: re.Match[str]) -> str:
        if match[1] in placed:
            return ""
        placed.add(match[1])
        source = (here / f"{match[1]}.py").read_text(encoding="utf-8")
        return pattern.sub(text_of, source) + "\n\n"

    return pattern.sub(text_of, Path(str(module.__file__)).read_text(encoding="utf-8"))


def write_builder(folder: Path, options: Mapping[str, Any] | None = None) -> None:
    """Write ``build_engine.py``, what it is to do, and which task needs which node.

    ``options`` are changes to the builder's defaults (``engine_options.DEFAULTS``).
    """
    write_json(folder / OPTIONS, dict(options or {}))
    write_text(folder / "build_engine.py", stand_alone(build_engine))
    write_json(folder / "nodes.json", {"nodes": node_tasks(folder / "model.onnx")})
