"""What 2:4 sparsity costs on top of a cut: python benchmarks/sparsity/run.py

The fusion suite's cut to half the MACs (NYUv2, 96x128), then two of each four input weights zero,
by the tasks' fused importance, the others refitted, and recovered as the dense cut was (its row
comes from that suite). Beside it the choice by magnitude, before recovery. Then every eligible
layer of the exported files is looked at, and tensorrt-rtx builds them with the flag for sparse
weights, and without. A recovery that ended is found again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engines import FORMS, built, plans, tensorrt_version, write_form
from fusion.bench import PARENT, Bench
from fusion.ours import BATCH, CUT, REFIT_IMAGES, SCORING_IMAGES
from fusion.run import CELLS as FUSION_CELLS
from fusion.run import Cell, freeze_norms, measure, recover
from secateur.compensate import refit_sparse
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.progress import shown
from secateur.flow.cache import StageCache, load_weights, save_weights
from secateur.flow.sparsity import fused_weights
from secateur.importance.bank import task_data
from secateur.importance.single_weights import score_weights
from secateur.lower import export_onnx
from secateur.prune import (
    SparsityPlan,
    apply_sparsity,
    plan_sparsity,
    without_masks,
)
from secateur.prune.sparsity_check import sparse_layers
from suite import Show, exit_status, read_rows, write_suite

KEEP, RECOVERY, SEED = 0.5, 0.15, 0
CALIBRATION = 32
CACHE = StageCache(Path(__file__).resolve().parents[2] / "out" / "sparsity")
FUSED = "cut, 2:4 by fused importance"
DELTA_TARGET, WORST_TARGET = -2.0, -3.0  # %, set before anything was measured


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    version = tensorrt_version()
    with shown():
        bench = Bench(PARENT)
        cut = CUT.cut(bench, KEEP, SEED)
        plans_of = choices(bench, cut)
        rows = [dense_row(), *(zeros_row(bench, cut, *item) for item in plans_of.items())]
        model = recovered(bench, sparse(bench, cut, plans_of[FUSED]))
        rows[1]["after"] = measure(bench, model)
        exported = {**export_row(bench, without_masks(model)), "tensorrt-rtx": version}
    shows = claims(rows, exported)
    command = "python benchmarks/sparsity/run.py"
    write_suite("sparsity", command, [SEED], [*rows, exported], shows)
    exit_status(shows)


def choices(bench: Bench, cut: MultiTaskModel) -> dict[str, SparsityPlan]:
    """Choose the zeros by the tasks' fused importance, as a build does, and by magnitude."""
    stream = partial(bench.stream, SCORING_IMAGES, SEED, BATCH)
    data = task_data(cut, cut.tasks, stream, SCORING_IMAGES // BATCH)
    plain = plan_sparsity(cut)
    per_task = score_weights(cut, [weight.name for weight in plain.weights], data)
    fused = fused_weights(per_task, {task.name: 1.0 for task in cut.tasks}, CUT.rule)
    return {
        FUSED: plan_sparsity(cut, fused, per_task),
        "cut, 2:4 by magnitude": plan_sparsity(cut, None, per_task),
    }


def sparse(bench: Bench, cut: MultiTaskModel, zeros: SparsityPlan) -> MultiTaskModel:
    """Return the cut with its zeros held, the other weights refitted to make up for them."""
    model = without_masks(apply_sparsity(cut, zeros))
    refitted = refit_sparse(cut, model, zeros.masks, bench.images(REFIT_IMAGES, SEED))
    return apply_sparsity(refitted, zeros)


def dense_row() -> dict[str, Any]:
    """Return what the fusion suite found of the same cut without zeros."""
    cell = {"parent": PARENT, "method": "cut", "keep": KEEP, "recovery": RECOVERY, "seed": SEED}
    (row,) = (row for row in read_rows(FUSION_CELLS) if cell.items() <= row.items())
    return {"method": "cut", "before": row["before"], "after": row["after"]}


def zeros_row(
    bench: Bench, cut: MultiTaskModel, method: str, zeros: SparsityPlan
) -> dict[str, Any]:
    return {
        "method": method,
        "layers": len(zeros.weights),
        "dense": list(zeros.dense),
        "importance_lost": {task: round(lost, 4) for task, lost in zeros.lost.items()},
        "before": measure(bench, sparse(bench, cut, zeros)),
    }


def recovered(bench: Bench, begun: MultiTaskModel) -> MultiTaskModel:
    """Recover as the fusion suite recovers the dense cut; a finished recovery is found again."""
    steps = round(RECOVERY * bench.parent_steps)
    path = CACHE.folder("recovered", model_fingerprint(begun), steps) / "weights.safetensors"
    found = copy.deepcopy(begun)
    if not load_weights(path, found):
        cell = Cell(PARENT, "cut", KEEP, RECOVERY, SEED)
        found = recover(bench, begun, steps, SEED, freeze=freeze_norms(bench, cell, steps))
        save_weights(path, found)
    return found


def export_row(bench: Bench, model: MultiTaskModel) -> dict[str, Any]:
    """Write every precision; look for weights that are not 2:4; build with the flag and without."""
    row: dict[str, Any] = {"method": "exported"}
    with tempfile.TemporaryDirectory() as scratch:
        fp32 = Path(scratch) / "fp32" / "model.onnx"
        fp32.parent.mkdir()
        export_onnx(model, bench.example, fp32)
        for form, plan in plans(fp32, bench.images(CALIBRATION)).items():
            path = write_form(fp32, form, plan)
            layers = sparse_layers(path)
            row[form] = {
                "eligible": len(layers),
                "not_2_to_4": sum(layer.dense_fours > 0 for layer in layers),
                "zeros": min(layer.zeros for layer in layers),
                "with_flag": built(path, {"sparse": True}),
                "without": built(path),
            }
    return row


def claims(rows: list[dict[str, Any]], exported: dict[str, Any]) -> list[Show]:
    after = rows[1]["after"]
    missing = sum(
        exported[form]["not_2_to_4"] + abs(exported[form]["eligible"] - rows[1]["layers"])
        for form in FORMS
    )
    works = sum("bytes" in exported[form]["with_flag"] for form in FORMS)
    what = f"{PARENT}, {1 - KEEP:.0%} of MACs removed and 2:4, recovery {RECOVERY:.0%}, 1 seed"
    return [
        Show(f"delta T %, {what}", DELTA_TARGET, round(after["delta_t"], 2), ">="),
        Show(f"worst task %, {what}", WORST_TARGET, round(after["worst"], 2), ">="),
        Show("... layers of its files (fp32, fp16, int8) that are not 2:4 and could be", 0,
             missing, "<="),
        Show("... files that TensorRT-RTX builds with the flag, of 3", 3, works, ">="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
