"""Microsoft's Olive: optimise the parent's ONNX, and quantise it. Nothing is cut or trained.

    SECATEUR_DATA=... python benchmarks/peers/olive_job.py 1 OUT --steps 0   # own environment

Olive has no pass that prunes convolutional networks (0.13), so the parent keeps its MACs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from olive.data.registry import Registry
from olive.workflows import run
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench

CALIBRATION = 128  # training images
OPTIMISE = {"type": "OnnxPeepholeOptimizer"}
QUANTISE = {"type": "OnnxStaticQuantization", "data_config": "training_images",
            "activation_type": "uint8", "per_channel": True}  # fmt: skip


class Images(torch.utils.data.Dataset[tuple[dict[str, Tensor], int]]):
    """Training images with the label that Olive wants, and does not use."""

    def __init__(self) -> None:
        self.images = Bench(PARENT).images(CALIBRATION)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"image": self.images[index]}, 0


@Registry.register_dataset("training_images")  # type: ignore[untyped-decorator]
def training_images(**_: Any) -> Images:
    """Return what Olive calibrates on."""
    return Images()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keep", type=float, choices=[1.0], help="share of the MACs: all")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, choices=[0], required=True)
    out = parser.parse_args().out
    parent = out.parent / "parent" / "fp32.onnx"
    for name, passes in (("fp32", {"o": OPTIMISE}), ("int8", {"o": OPTIMISE, "q": QUANTISE})):
        run({
            "input_model": {"type": "OnnxModel", "model_path": str(parent)},
            "data_configs": [{"name": "training_images", "type": "DataContainer",
                              "load_dataset_config": {"type": "training_images"},
                              "dataloader_config": {"batch_size": 1}}],
            "passes": passes, "log_severity_level": 3,
            "cache_dir": str(out / "cache"), "output_dir": str(out / name),
        })  # fmt: skip
        (made,) = (out / name).rglob("*.onnx")
        shutil.copy(made, out / f"{name}.onnx")


if __name__ == "__main__":
    main()
