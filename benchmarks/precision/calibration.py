"""Calibration of 1,000 images at 288x384: memory, and the same table after a kill.

    python benchmarks/precision/calibration.py

EfficientNet-Lite0 with three heads, NYUv2's own images (training, then test; labels unread). One
process calibrates undisturbed. Another is killed (SIGKILL) when it has saved half of the images,
and a third goes on from what it left, reading in batches of another size. Peak memory is the
operating system's figure for the first process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import image_batch, open_reader
from secateur.lower import export_onnx
from secateur.lower.quant import ActivationStatistics, calibrate
from secateur.lower.quant.calibrators import CALIBRATORS
from secateur.zoo import nyuv2_lite0
from suite import Show, exit_status, write_suite

HEIGHT, WIDTH, IMAGES = 288, 384, 1000
MOST_GB = 1.5
ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "calibration"
SPEC = ModelInput(3, HEIGHT, WIDTH, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--child", choices=("whole", "killed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.images)
        return
    WORK.mkdir(parents=True, exist_ok=True)
    model_file()
    for left in (WORK / "killed.npz", WORK / "whole.npz"):
        left.unlink(missing_ok=True)
    start = time.monotonic()
    run_child("whole", options.images)
    seconds = time.monotonic() - start
    after = killed_at_half(options.images)
    run_child("killed", options.images)
    facts = {kind: json.loads((WORK / f"{kind}.json").read_text()) for kind in ("whole", "killed")}
    same = sum(facts["whole"]["tables"][name] == facts["killed"]["tables"][name]
               for name in CALIBRATORS)  # fmt: skip
    peak = facts["whole"]["peak_gb"]
    row = {"images": options.images, "size": [HEIGHT, WIDTH], "peak_gb": peak,
           "killed_after": after, "calibrators_with_the_same_table": same,
           "tensors": facts["whole"]["tensors"],
           "minutes": round(seconds / 60, 1)}  # fmt: skip
    shows = [
        Show(f"GB of memory to calibrate on {options.images} images at {HEIGHT}x{WIDTH}", MOST_GB,
             peak, "<="),
        Show("... calibrators whose table is the same after a kill and a resume, other batches",
             len(CALIBRATORS), same, ">="),
    ]  # fmt: skip
    if options.images == IMAGES:
        write_suite("calibration", "python benchmarks/precision/calibration.py", [0], [row], shows)
    print(json.dumps(row))
    exit_status(shows)


def model_file() -> Path:
    """Return the ONNX file of the committed parent at the larger size, exported once."""
    path = WORK / "lite0.onnx"
    if not path.exists():
        network = nyuv2_lite0()
        weights = load_file(ROOT / "benchmarks" / "parents" / "nyuv2_lite0.safetensors")
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        tasks = [Task(name, name, name, name, classes=13 if name == "segmentation" else None)
                 for name in ("segmentation", "depth", "normals")]  # fmt: skip
        export_onnx(MultiTaskModel(network, tasks).eval(), SPEC.example(), path)
    return path


def child(kind: str, count: int) -> None:
    """Calibrate by every calibrator from one pass, and say what came out."""
    batch = 8 if kind == "whole" else 3
    tables: dict[str, Any] = {}
    for name in CALIBRATORS:
        found = calibrate(model_file(), lambda: images(count, batch), name,
                          state=WORK / f"{kind}.npz")  # fmt: skip
        tables[name] = {tensor: list(limits) for tensor, limits in found.ranges.items()}
    status = Path("/proc/self/status").read_text()  # rusage would carry the parent process's peak
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024 / 1e9
    facts = {"peak_gb": round(peak, 3), "tables": tables, "tensors": len(tables["minmax"])}
    (WORK / f"{kind}.json").write_text(json.dumps(facts))


def images(count: int, batch: int) -> Iterator[NDArray[np.float32]]:
    root = Path(os.environ["SECATEUR_DATA"]) / "nyuv2_288x384"
    train, test = (open_reader("nyuv2", root, split) for split in ("train", "test"))
    for start in range(0, count, batch):
        places = range(start, min(start + batch, count))
        yield np.concatenate([
            image_batch(train, [place], SPEC) if place < len(train)
            else image_batch(test, [place - len(train)], SPEC)
            for place in places
        ])  # fmt: skip


def command(kind: str, count: int) -> list[str]:
    return [sys.executable, __file__, "--child", kind, "--images", str(count)]


def run_child(kind: str, count: int) -> None:
    subprocess.run(command(kind, count), check=True)


def killed_at_half(count: int) -> int:
    """Start a calibration, kill it when half is saved, and return how many images that were."""
    state = WORK / "killed.npz"
    process = subprocess.Popen(command("killed", count))
    while process.poll() is None:
        saved = ActivationStatistics.load(state)
        if saved is not None and saved.images >= count // 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return saved.images
        time.sleep(2)
    sys.exit("the calibration ended before it could be killed: give more --images")


if __name__ == "__main__":
    main()
