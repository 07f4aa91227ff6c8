"""Every bundle below a folder, gathered for one page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from secateur.bench.bundle_view import Entry, Picture
from secateur.bench.charts import Layer
from secateur.bench.record import BenchRecord, read_bench
from secateur.bench.report import render
from secateur.bundle.layers import layer_tasks
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, read_bundle, weights_sha256
from secateur.core.errors import BundleError, PlanError, VerifyError
from secateur.core.files import write_text
from secateur.core.plan import PrunePlan

WIDEST_PICTURE = 2400  # pixels
PICTURE_QUALITY = 86
DRAWN_BY_THE_PAGE = "pictures/savings.png"
FLOAT_MODELS = ("fp32.onnx", "model.onnx")  # the first that there is has the layers' own names


@dataclass(frozen=True)
class ReportResult:
    """Where the page is, the bundles on it, and what is wrong with some."""

    page: Path
    bundles: tuple[str, ...]
    problems: tuple[str, ...]


def report(folder: Path, page: Path | None = None) -> ReportResult:
    """Write one page about all bundles below ``folder``, as ``report.html`` there or ``page``.

    Raises:
        BundleError: there is none that can be read, or the page cannot be written.
    """
    page = page or folder / "report.html"
    entries, problems = [], []
    for path in sorted(folder.rglob("manifest.json")):
        name = path.parent.relative_to(folder).as_posix()
        try:
            entries.append(_entry(path.parent, name))
        except BundleError as error:
            problems.append(f"{name}: {error.message}")
    if not entries:
        raise BundleError(
            f"there is no bundle below {folder}" + "".join(f"; {p}" for p in problems),
            hint="give the folder that `secateur build --out` wrote to",
        )
    write_text(page, render(entries, folder.resolve().name, tuple(problems)))
    problems += [f"{entry.path}: {problem}" for entry in entries for problem in entry.problems]
    return ReportResult(page, tuple(entry.path for entry in entries), tuple(problems))


def _entry(folder: Path, name: str) -> Entry:
    manifest = read_bundle(folder)
    layers: tuple[Layer, ...] = ()
    pictures: tuple[Picture, ...] = ()
    bench, problems = None, list[str]()
    try:
        check_files(folder, manifest)  # nothing of a damaged bundle but its manifest is shown
        layers = _layers(folder)
        pictures = _pictures(folder, manifest)
        bench = _bench(folder, manifest)
    except (BundleError, PlanError, VerifyError) as error:
        problems.append(error.message)
    return Entry(name, manifest.model_dump(), layers, pictures, bench, tuple(problems))


def _layers(folder: Path) -> tuple[Layer, ...]:
    """Return the plan's groups in the order their layers run, each with the tasks using it."""
    try:
        plan = PrunePlan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise BundleError(f"plan.json is not JSON: {error}", hint="build it again") from error
    model = next(name for name in FLOAT_MODELS if (folder / name).is_file())
    tasks = layer_tasks(folder / model)
    order = {layer: position for position, layer in enumerate(tasks)}
    found = [
        Layer(cut.name, cut.width, len(cut.kept), tasks.get(cut.name.split("#")[0], ()))
        for cut in plan.cuts
    ]
    return tuple(sorted(found, key=lambda layer: order.get(layer.name.split("#")[0], len(order))))


def _pictures(folder: Path, manifest: Manifest) -> tuple[Picture, ...]:
    """Return the bundle's pictures as WebP: a fifth of the size, and surely pictures."""
    names = [name for name in manifest.files if Path(name).match("pictures/*.png")]
    found = []
    for name in sorted(set(names) - {DRAWN_BY_THE_PAGE}):
        pixels = cv2.imdecode(np.fromfile(folder / name, np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise BundleError(f"{name} is not a picture", hint="build the bundle again")
        height, width = pixels.shape[:2]
        if width > WIDEST_PICTURE:
            size = (WIDEST_PICTURE, round(height * WIDEST_PICTURE / width))
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, PICTURE_QUALITY])
        height, width = pixels.shape[:2]
        found.append(Picture(Path(name).stem.replace("_", " "), data.tobytes(), width, height))
    return tuple(found)


def _bench(folder: Path, manifest: Manifest) -> BenchRecord | None:
    path = folder / "bench.json"
    if not path.is_file():
        return None
    bench = read_bench(path)
    if bench.model_sha256 != weights_sha256(manifest):
        raise BundleError("its bench.json was measured on another model", hint="bench it again")
    return bench
