"""Which cut networks ncnn runs, and how exactly: python benchmarks/ncnn/run.py

Ten backbones with three heads (a map of classes, a depth map, a vector), random weights with batch
norms that have seen data, cut at random by this pipeline's own plan. Each is converted in fp32 and
fp16 and compared with torch, task by task; beside it, what pnnx makes of the exported ONNX file
instead. Random weights say nothing of accuracy: this is about conversion. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_cuts import SEED, Case, random_cut
from secateur.core.errors import SecateurError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.progress import shown, track
from secateur.devices.host import library_versions
from secateur.lower import compare_outputs, export_onnx
from secateur.lower.ncnn import export_ncnn, find_pnnx, weights_file
from secateur.prune import count_macs
from secateur.runtimes.base import runtime_of
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite

CELLS = RESULTS / "ncnn.cells.jsonl"
IMAGES = 4  # compared
FP32_TARGET, FP16_TARGET = 1e-3, 1e-2  # of each output's range
Outputs = dict[str, NDArray[np.float32]]


CASES = (
    Case("resnet18"),
    Case("resnet50"),
    Case("mobilenetv2_100"),
    Case("mobilenetv3_large_100"),
    Case("mobilenetv4_conv_small"),
    Case("efficientnet_lite0"),
    Case("efficientnet_b0"),
    Case("repvgg_b0"),
    Case("convnext_atto"),
    Case("vit_tiny_patch16_224", macs=0.7),  # its attention keeps its widths
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two backbones only")
    options = parser.parse_args()
    versions = {name: library_versions().get(name) for name in ("torch", "timm", "ncnn", "pnnx")}
    cases = CASES[:2] if options.quick else CASES
    done = {row["backbone"]: row for row in read_rows(CELLS) if row["versions"] == versions}
    missing = [case for case in cases if case.backbone not in done]
    with shown():
        for case in track(missing, "converting to ncnn", len(missing)):
            done[case.backbone] = {**row_of(case), "versions": versions}
            append_row(CELLS, done[case.backbone])
    rows = [done[case.backbone] for case in cases]
    if options.quick:
        print(json.dumps(rows, indent=2))
        return
    shows = claims(rows)
    write_suite("ncnn", "python benchmarks/ncnn/run.py", [SEED], rows, shows)
    exit_status(shows)


def row_of(case: Case) -> dict[str, Any]:
    """Cut a network and say how far each way to ncnn is from torch."""
    parent, images = case.network(), case.images(IMAGES)
    cut = random_cut(parent, case, images[:1])
    with evaluating(cut):
        wanted = {name: tensor.numpy() for name, tensor in cut(images).items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return {
            "backbone": case.backbone,
            "size": case.size,
            "share_of_macs": count_macs(cut, images[:1]) / count_macs(parent, images[:1]),
            "fp32": converted(cut, images, wanted, folder / "fp32.param"),
            "fp16": converted(cut, images, wanted, folder / "fp16.param"),
            "from_onnx": from_onnx(cut, images, wanted, folder),
        }


def converted(model: MultiTaskModel, images: Tensor, wanted: Outputs, path: Path) -> dict[str, Any]:
    """Convert as a build does; ``path``'s stem is the precision."""
    start = time.monotonic()
    try:
        export_ncnn(model, images[:1], path, "fp16" if path.stem == "fp16" else "fp32")
        seconds = round(time.monotonic() - start, 1)
        got = runtime_of("ncnn").open_session(path, 1).run(images.numpy())
        return {
            "of_range": parity(wanted, dict(got)),
            "weights_bytes": weights_file(path).stat().st_size,
            "seconds": seconds,
        }
    except SecateurError as error:
        return {"fails": error.message.replace(f"{path.parent}/", "")}


def from_onnx(
    model: MultiTaskModel, images: Tensor, wanted: Outputs, folder: Path
) -> dict[str, Any]:
    """Convert the exported ONNX file instead, and run it with ncnn's own options.

    These round weights to fp16 where the CPU's kernels can, and a build's files forbid it.
    """
    start = time.monotonic()
    try:
        export_onnx(model, images[:1], folder / "model.onnx")
        shape = ",".join(map(str, (1, *images.shape[1:])))
        subprocess.run([find_pnnx(), "model.onnx", f"inputshape=[{shape}]", "fp16=0"],
                       cwd=folder, capture_output=True, check=True)  # fmt: skip
        seconds = round(time.monotonic() - start, 1)
        session = runtime_of("ncnn").open_session(folder / "model.ncnn.param", 1)
        got = session.run(images.numpy())
        named = {task: got[f"out{place}"] for place, task in enumerate(wanted)}
        return {"of_range": parity(wanted, named), "seconds": seconds}
    except (SecateurError, subprocess.CalledProcessError, KeyError) as error:
        return {"fails": str(error).replace(f"{folder}/", "")}


def parity(wanted: Outputs, got: Outputs) -> dict[str, float]:
    return {task: found.relative for task, found in compare_outputs(wanted, got).items()}


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    def worst(form: str) -> float:
        found: list[float] = [
            value for row in rows for value in row[form].get("of_range", {}).values()
        ]
        return max(found, default=float("inf"))

    def works(form: str) -> int:
        return sum("of_range" in row[form] for row in rows)

    count = len(CASES)
    return [
        Show(f"cut backbones of {count} that convert and run in fp32", count, works("fp32"), ">="),
        Show(f"... and in fp16, of {count}", count, works("fp16"), ">="),
        Show("ncnn fp32 against torch, any task, largest difference / range", FP32_TARGET,
             worst("fp32"), "<="),
        Show("ncnn fp16 against torch, any task, largest difference / range", FP16_TARGET,
             worst("fp16"), "<="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
