"""NYUv2, half the MACs, two of three tasks: the whole way, and what each part is worth.

    SECATEUR_DATA=... python benchmarks/nyuv2/run.py

Cuts without training are the suite ``compensation``. Latencies of parent and cut are taken in turns
in one run; every accuracy is on all 654 test images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.bundle.manifest import Manifest
from secateur.core.progress import shown
from secateur.data.loading import open_reader
from secateur.data.transforms import image_tensor
from secateur.flow.build import build
from secateur.flow.recipe import Recipe, load_recipe
from secateur.runtimes.base import runtime_of
from suite import LEFT_OUT, Show, exit_status, read_json, write_suite

ROOT = Path(__file__).resolve().parents[2]
RUNNER_IMAGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "nyuv2")
    options = parser.parse_args()
    recipe = load_recipe(ROOT / "examples" / "nyuv2.yaml")
    with shown():
        result = build(recipe, "x86-64-cpu", options.out, command="benchmarks/nyuv2/run.py")
        manifest = result.manifest
        rows: list[dict[str, Any]] = [
            {"what": "build", **manifest.model_dump(mode="json", exclude=LEFT_OUT)}
        ]
    differing = runner_differences(result.folder, recipe)
    shows = claims(manifest, differing)
    write_suite("nyuv2", "python benchmarks/nyuv2/run.py", [0], rows, shows)
    exit_status(shows)


def claims(manifest: Manifest, differing: int) -> list[Show]:
    parent = read_json(ROOT / "benchmarks" / "parents" / "nyuv2_lite0.json")
    accuracy, latency = manifest.accuracy, manifest.latency_ms
    ratio = manifest.cost.macs / manifest.cost_parent.macs
    parent_steps = parent["steps"]
    return [
        Show("MACs of the cut / parent with the same tasks, never above", 0.5, ratio, "<="),
        Show("... and within 1 % of the budget", 0.495, ratio, ">="),
        Show("recovery steps / the parent's training steps", 0.15,
             manifest.plan["recovery_steps"] / parent_steps, "<="),
        Show("delta T %, 654 test images", -3.0, accuracy.delta_t, ">="),
        Show("worst task %", -4.5, accuracy.change_percent[accuracy.worst_task], ">="),
        Show("delta T % before any recovery", -10.0, accuracy.delta_t_before_recovery, ">="),
        Show("ONNX Runtime p50, 1 thread, cut / parent", 0.60,
             latency["cut"]["median_ms"] / latency["parent"]["median_ms"], "<="),
        Show("ONNX against torch, largest difference / range", 1e-4,
             max(row["of_range"] for row in manifest.parity.values()), "<="),
        Show(f"arrays of run.py that differ from the build's ONNX, {RUNNER_IMAGES} images", 0,
             differing, "<="),
    ]  # fmt: skip


def runner_differences(bundle: Path, recipe: Recipe) -> int:
    """Run run.py in a venv of numpy, onnxruntime and OpenCV only; count arrays that differ."""
    reader = open_reader(recipe.data.eval.reader, recipe.data.eval.root, recipe.data.eval.split)
    spec = recipe.model.input.model_input()
    session = runtime_of("onnxruntime").open_session(bundle / "model.onnx", 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        packages = ["numpy", "onnxruntime", "opencv-python-headless"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        images = []
        for i in range(RUNNER_IMAGES):
            images.append(folder / f"{i}.png")
            cv2.imwrite(str(images[-1]), reader[i].image[:, :, ::-1])
        subprocess.run([python, bundle / "run.py", *images, "--out", folder], check=True)
        differing = 0
        for i in range(RUNNER_IMAGES):
            wanted = session.run(image_tensor(reader[i].image, spec)[None].numpy())
            with np.load(folder / f"{i}.npz") as got:
                differing += sum(not np.array_equal(got[n], array) for n, array in wanted.items())
    return differing


if __name__ == "__main__":
    main()
