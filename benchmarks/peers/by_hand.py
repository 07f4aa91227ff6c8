"""What an engineer writes today: torch-pruning, fine-tuning, torch.onnx.export, quantize_static.

    SECATEUR_DATA=... python benchmarks/peers/by_hand.py 0.5 OUT --steps 686

Importance is torch-pruning's GroupTaylor, and the network is cut in small steps with fresh
gradients until the MACs are met, as torch-pruning's own benchmark does. The parent, its data and
its losses are ``fusion.bench``'s: whoever prunes a network has them, so they are not counted.
"""

from __future__ import annotations

import argparse
import copy
import sys
from itertools import count, islice
from pathlib import Path

import onnxruntime.quantization as quantization
import torch
import torch_pruning
from onnxruntime.quantization.shape_inference import quant_pre_process
from secateur.data.loading import batches
from secateur.data.transforms import Augment
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench

BATCH, LEARNING_RATE, WEIGHT_DECAY, CLIP = 8, 3e-3, 1e-4, 5.0  # as the parent, rate as ours
STEP, GRADIENTS, CALIBRATION = 0.02, 128, 128  # share pruned at a time; images


def prune(bench: Bench, keep: float) -> nn.Module:
    """Cut the parent until ``keep`` of its MACs are left."""
    model = copy.deepcopy(bench.parent)
    last = [layer for name, layer in model.named_modules() if name.endswith("predict")]
    pruner = torch_pruning.pruner.BasePruner(
        model, bench.example, importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True, pruning_ratio=0.9, iterative_steps=round(0.9 / STEP),
        round_to=8, ignored_layers=last,
    )  # fmt: skip
    macs = torch_pruning.utils.count_ops_and_params
    full = left = macs(model, bench.example)[0]
    while left > keep * full:
        model.zero_grad()
        for batch in bench.stream(GRADIENTS, batch_size=BATCH):
            losses = bench.losses(model(batch.images), batch.targets)
            torch.autograd.backward(list(losses.values()))
        pruner.step()
        left = macs(model, bench.example)[0]
    return model


def fine_tune(bench: Bench, model: nn.Module, steps: int, seed: int = 0) -> nn.Module:
    """Train as the parent was trained, for ``steps``."""
    torch.manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()
    adam = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, LEARNING_RATE, steps, pct_start=0.05)
    flips = Augment(scale=1.0, jitter=0.0)
    stream = (batch for epoch in count(seed * 10_000) for batch in batches(
        bench.fit, bench.parent.tasks, bench.spec, BATCH, augment=flips, shuffle_seed=epoch
    ))  # fmt: skip
    for batch in islice(stream, steps):
        outputs = model(batch.images.to(memory_format=torch.channels_last))
        adam.zero_grad()
        torch.autograd.backward(list(bench.losses(outputs, batch.targets).values()))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        rate.step()
    return model.to(memory_format=torch.contiguous_format).eval()


def export(bench: Bench, model: nn.Module, out: Path) -> None:
    """Write ``fp32.onnx``."""
    out.mkdir(parents=True, exist_ok=True)
    names = [task.name for task in bench.parent.tasks]
    torch.onnx.export(model, (bench.example[:1],), out / "fp32.onnx", dynamo=True,
                      input_names=["image"], output_names=names, external_data=False)  # fmt: skip


class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Training images, one at a time."""

    def __init__(self, bench: Bench) -> None:
        self.images = iter(bench.images(CALIBRATION))

    def get_next(self) -> dict[str, object] | None:
        return next(({"image": image[None].numpy()} for image in self.images), None)


def quantise(bench: Bench, out: Path) -> None:
    """Write ``int8.onnx`` beside ``fp32.onnx``.

    With signed activations, the default, ONNX Runtime leaves 30 of 81 convolutions in fp32 here.
    """
    quant_pre_process(out / "fp32.onnx", out / "prepared.onnx")
    quantization.quantize_static(
        out / "prepared.onnx", out / "int8.onnx", Images(bench), per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
    )  # fmt: skip
    (out / "prepared.onnx").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keep", type=float, help="share of the parent's MACs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    bench = Bench(PARENT)
    model = fine_tune(bench, prune(bench, options.keep), options.steps)
    export(bench, model, options.out)
    quantise(bench, options.out)


if __name__ == "__main__":
    main()
