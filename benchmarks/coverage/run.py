"""Which of timm's architectures can be cut, how far, and how exactly.

    python benchmarks/coverage/run.py

One small member of each family, with three heads, random weights and batch norms that have seen
data. Random scores choose half of the MACs, or as near to it as whole channels allow; then the cut
network must run, cost what was planned, and equal its own ONNX export. ``least`` is the share of
the MACs that no cut can remove: what reshapes and splits in ``forward`` fix stays whole. A network
that cannot be followed must say so in a sentence. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_cuts import SEED, Case
from secateur.core.errors import SecateurError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.progress import shown, track
from secateur.devices.host import library_versions
from secateur.lower import compare_outputs, export_onnx
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.runtimes.base import runtime_of
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite

CELLS = RESULTS / "coverage.cells.jsonl"
HALF, ROOM = 0.5, 1.15  # share of MACs asked for; or the least times this
PARITY = 1e-4  # ONNX against torch, of an output's range
SMALL = """resnet18 resnext50_32x4d seresnext26d_32x4d regnetx_002 regnety_002 res2net50_26w_4s
resnest14d skresnet18 resnetv2_50 dla34 vgg11 densenet121 hrnet_w18_small selecsls42 cspresnet50
mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mnasnet_small
efficientnet_lite0 efficientnet_b0 mixnet_s lcnet_050 ghostnet_050 repghostnet_050 mobileone_s0
repvgg_a0 repvit_m0_9 hgnetv2_b0 ese_vovnet19b_dw fasternet_t0 starnet_s050 shvit_s1 xception41
convnext_atto convnextv2_atto inception_next_atto mambaout_femto poolformer_s12 edgenext_xx_small
mobilevit_xxs mobilevitv2_050 fastvit_t8 pvt_v2_b0 efficientvit_b0 efficientvit_m0 cs3darknet_s"""
LARGE = "vit_tiny_patch16_224 deit3_small_patch16_224 pit_ti_224 xcit_nano_12_p8_224 levit_128s"
CASES = (
    *(Case(name, size=64) for name in SMALL.split()),
    *(Case(name, size=224) for name in LARGE.split()),
    Case("swin_tiny_patch4_window7_224", size=224),
    Case("inception_v3", size=128),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="these backbones, and no table")
    options = parser.parse_args()
    versions = {name: library_versions().get(name) for name in ("torch", "timm", "torch-pruning")}
    cases = [case for case in CASES if not options.only or case.backbone in options.only]
    done = {row["backbone"]: row for row in read_rows(CELLS) if row["versions"] == versions}
    missing = [case for case in cases if options.only or case.backbone not in done]
    with shown():
        for case in track(missing, "cutting", len(missing)):
            row = {**row_of(case), "versions": versions}
            print(row, flush=True)
            if not options.only:
                append_row(CELLS, row)
                done[case.backbone] = row
    if options.only:
        return
    shows = claims([done[case.backbone] for case in cases])
    write_suite("coverage", "python benchmarks/coverage/run.py", [SEED],
                [done[case.backbone] for case in cases], shows)  # fmt: skip
    exit_status(shows)


def row_of(case: Case) -> dict[str, Any]:
    """Cut one network and check what came of it."""
    row: dict[str, Any] = {"backbone": case.backbone, "size": case.size}
    started = time.monotonic()
    parent = case.network()
    example = case.images(1)
    try:
        groups = find_groups(parent, example)
    except SecateurError as error:
        return {**row, "said": error.message}
    row |= {"groups": len(groups), "group_seconds": round(time.monotonic() - started, 1)}
    cost = macs_model(parent, groups, example)
    full = cost.macs([group.width for group in groups])
    least = cost.macs([1] * len(groups)) / full
    random = np.random.default_rng(SEED)
    scores = {group.name: random.random(group.width) for group in groups}
    budget = Budget(max(HALF, min(1.0, ROOM * least)), grid=4)
    plan = plan_prune(groups, cost, scores, {}, budget, criterion="random", fusion="-")
    cut = apply_plan(parent, groups, plan)
    counted = count_macs(cut, example)
    row |= {"least": round(least, 3), "share_of_macs": counted / full}
    return {**row, "as_planned": counted == plan.macs_after, "onnx": onnx_difference(cut, example)}


def onnx_difference(model: MultiTaskModel, example: torch.Tensor) -> float:
    """Return the largest difference of any output of the export, as a share of its range."""
    with evaluating(model):
        wanted = {name: tensor.numpy() for name, tensor in model(example).items()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        export_onnx(model, example, path)
        got = runtime_of("onnxruntime").open_session(path, 1).run(example.numpy())
    return max(each.relative for each in compare_outputs(wanted, got).values())


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    cut = [row for row in rows if "onnx" in row]
    return [
        Show(f"architectures of {len(rows)} that are cut and run", len(rows), len(cut), ">="),
        Show("... with other MACs than planned", 0, sum(not r["as_planned"] for r in cut), "<="),
        Show("... ONNX against torch, largest difference / range", PARITY,
             max(row["onnx"] for row in cut), "<="),
        Show(f"... and that go down to half of their MACs, of {len(rows)}", 0.9 * len(rows),
             sum(row["least"] <= HALF for row in cut), ">="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
