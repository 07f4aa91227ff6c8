"""NVIDIA's modelopt: prune by FastNAS, then fine-tune, export and quantise as in ``by_hand``.

    SECATEUR_DATA=... python benchmarks/peers/fastnas.py 0.5 OUT --steps 686   # own environment

Two things are rewritten first, into equal functions: FastNAS does not know timm's batch norm with
activation (it finds nothing to prune in the backbone), and stops with "Missing symbols!" where a
concatenation feeds a depth-wise convolution, as in the heads; so each part gets its own.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.prune as prune
import torch
from modelopt.torch.prune.fastnas import FastNASConfig
from secateur.data.loading import batches
from secateur.zoo.compose import ComposedModel
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench
from peers.by_hand import export, fine_tune, quantise

GRID = 8
SCORING, CALIBRATION = 64, 64  # validation images to a score, training images for batch norms


class Plain(nn.Sequential):
    """timm's BatchNormAct2d as two modules."""

    def __init__(self, norm: BatchNormAct2d) -> None:
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        plain.load_state_dict(norm.state_dict())
        super().__init__(plain, norm.act)


class SplitHead(nn.Module):
    """A dense head whose depth-wise convolutions come before the concatenations."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.laterals, self.upsamplers, self.predict = head.laterals, head.upsamplers, head.predict
        self.coarse = nn.ModuleList(_part(m.depthwise, 0) for m in head.mixers)
        self.skip = nn.ModuleList(_part(m.depthwise, 1) for m in head.mixers)
        self.mix = nn.ModuleList(m.pointwise for m in head.mixers)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.laterals[0](features[-1])
        for i, mix in enumerate(self.mix):
            skip = self.laterals[i + 1](features[-2 - i])
            x = functional.interpolate(x, scale_factor=2.0, mode="bilinear")
            x = mix(torch.cat([self.coarse[i](x), self.skip[i](skip)], dim=1))
        for up in self.upsamplers:
            x = up(functional.interpolate(x, scale_factor=2.0, mode="bilinear"))
        y: Tensor = self.predict(x)
        return y


def _part(block: Any, which: int) -> nn.Sequential:
    """Return the first or second half of a depth-wise convolution and its batch norm."""
    half = block[0].in_channels // 2
    conv = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
    part = nn.Sequential(conv, nn.BatchNorm2d(half), nn.ReLU6(inplace=True))
    rows = slice(which * half, (which + 1) * half)
    state = {n: v[rows] if v.dim() else v for n, v in block.state_dict().items()}
    part.load_state_dict(state)
    return part


def rewritten(parent: ComposedModel) -> ComposedModel:
    """Return the parent in modules that FastNAS can follow; its outputs are the same."""
    network = copy.deepcopy(parent)
    for module in list(network.backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNormAct2d):
                setattr(module, name, Plain(child))
    network.heads = nn.ModuleDict({n: SplitHead(h) for n, h in network.heads.items()})
    return network.eval()


def search(bench: Bench, network: ComposedModel, keep: float, out: Path) -> Any:
    """Let FastNAS choose the widths: the tasks' summed loss on validation images judges them.

    What a width of each layer costs is measured once and kept for other budgets, as modelopt does.
    """
    judged = next(batches(bench.val, bench.parent.tasks, bench.spec, SCORING))

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(sum(bench.losses(model(judged.images), judged.targets).values()))

    images = torch.split(bench.images(CALIBRATION), 8)
    rules = FastNASConfig().model_dump()
    for kind in ("nn.Conv2d", "nn.BatchNorm2d"):  # the same grid as everyone's, not of 32
        for rule in rules[kind].values():
            rule.update({name: GRID for name in rule if name.endswith("divisor")})
    config = {"data_loader": images, "collect_func": lambda batch: batch, "score_func": score,
              "checkpoint": str(out.parent / "fastnas.pth")}  # fmt: skip
    budget = {"flops": f"{100 * keep:g}%"}
    found, _ = prune.prune(network, mode=[("fastnas", rules)], constraints=budget,
                           dummy_input=bench.example[:1], config=config)  # fmt: skip
    return found


def parent_network(bench: Bench) -> ComposedModel:
    network = bench.parent.network
    assert isinstance(network, ComposedModel)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keep", type=float, help="share of the parent's MACs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    bench = Bench(PARENT)
    found = search(bench, rewritten(parent_network(bench)), options.keep, options.out)
    export(bench, fine_tune(bench, found, options.steps), options.out)
    quantise(bench, options.out)


if __name__ == "__main__":
    main()
