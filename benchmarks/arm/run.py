"""Bundles on emulated Arm CPUs: SECATEUR_DATA=... python benchmarks/arm/run.py [--part verify]

``verify``: the EfficientNet-Lite0 parent of NYUv2 (96x128) cut to half its MACs, in fp32 and int8,
run by its own ``run.py`` on seventeen images under four CPU models, against this machine.
``counts``: instructions of one inference of that parent and of a ResNet-18 (random weights), whole
and at 50 and 25 % of the MACs, per runtime and precision, on the Cortex-A76 of a Raspberry Pi 5.
``table``: the cut of each which the table of its operators' instructions chooses, at half of the
parent's instructions (ONNX Runtime, fp32).
``report``: no work, the results of what is there.

Emulation tells no latency. A stopped run goes on. Needs apt's qemu-user, and ``.[ncnn]``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arm.networks import nyuv2_resnet18
from secateur.core.progress import shown
from secateur.flow.build import build
from secateur.flow.cache import StageCache
from secateur.flow.emulated import compare_emulated
from secateur.flow.emulated_bench import bench_emulated
from secateur.flow.recipe import parse_recipe
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "arm"
CELLS = RESULTS / "arm.cells.jsonl"
TARGET, COUNTED_ON = "raspberry-pi-5", "cortex-a76"
CPUS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")
IMAGES = 16  # of the data, beside the bundle's own
SHARES = (1.0, 0.5, 0.25)
BY_TABLE = 0.5  # of the parent's instructions
FORMS = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("ncnn", "fp32"), ("ncnn", "fp16"),
         ("ncnn", "int8"))  # fmt: skip
NETWORKS = ("efficientnet_lite0", "resnet18")
FP32_TARGET, SAME_CLASS, SPREAD, REALISED = 1e-4, 0.99, 0.01, 0.9
RECIPE = """
model:
  factory: {factory}
  checkpoint: {checkpoint}
  input: {{shape: [3, 96, 128], mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
tasks:
  segmentation: {{output: segmentation, kind: segmentation, classes: 13}}
  depth: {{output: depth, kind: depth}}
  normals: {{output: normals, kind: normals}}
data:
  train: {{reader: nyuv2, root: {data}/nyuv2_mini, split: train}}
  eval: {{reader: nyuv2, root: {data}/nyuv2_mini, split: test}}
prune: {{budget: {{{budget}: {share}}}, search: false}}
precision: {{mode: {precision}, guard: false}}
runtime: {runtime}
library: {{add: false}}
"""
Row = dict[str, Any]


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("verify", "counts", "table", "report"))
    parser.add_argument("--quick", action="store_true", help="one CPU, one count; writes nothing")
    options = parser.parse_args()
    if options.quick:
        folder = bundle(NETWORKS[0], 0.5, *FORMS[0])
        print(json.dumps([verified("fp32", folder, CPUS[2:3], 1), counted(folder)], indent=2))
        return
    done = {key_of(row) for row in read_rows(CELLS)}
    with shown():
        for precision in ("fp32", "int8"):
            if options.part in (None, "verify") and ("verify", precision) not in done:
                folder = bundle(NETWORKS[0], 0.5, "onnxruntime", precision)
                append_row(CELLS, verified(precision, folder))
        for network in NETWORKS:
            for runtime, precision in FORMS:
                for share in SHARES:
                    key = ("counts", network, runtime, precision, share)
                    if options.part in (None, "counts") and key not in done:
                        row = counted(bundle(network, share, runtime, precision))
                        append_row(CELLS, {**dict(zip(KEYS, key, strict=True)), **row})
        for network in NETWORKS:
            key = ("table", network, *FORMS[0], BY_TABLE)
            if options.part in (None, "table") and key not in done:
                row = counted(bundle(network, BY_TABLE, *FORMS[0], budget="instructions"))
                append_row(CELLS, {**dict(zip(KEYS, key, strict=True)), **row})
    rows = read_rows(CELLS)
    shows = claims(rows)
    write_suite("arm", "python benchmarks/arm/run.py", [0], rows, shows)
    exit_status(shows)


KEYS = ("part", "network", "runtime", "precision", "share")


def key_of(row: Row) -> tuple[Any, ...]:
    """Return which cell a row is of."""
    return tuple(row[key] for key in KEYS if key in row)


def bundle(network: str, share: float, runtime: str, precision: str, budget: str = "macs") -> Path:
    """Build one cut for the Raspberry Pi 5, without recovery, and return its folder."""
    if network == "resnet18":
        factory, checkpoint = "arm.networks:nyuv2_resnet18", _random_resnet()
    else:
        factory = "secateur.zoo:nyuv2_lite0"
        checkpoint = ROOT / "benchmarks/parents/nyuv2_lite0_96x128.safetensors"
    text = RECIPE.format(
        factory=factory, checkpoint=checkpoint, data=os.environ["SECATEUR_DATA"], share=share,
        precision=precision, runtime=runtime, budget=budget,
    )  # fmt: skip
    out = WORK / f"{network}-{runtime}-{precision}-{budget}-{share}"
    recipe = parse_recipe(text, ROOT / "recipe.yaml")
    return build(recipe, TARGET, out, cache=StageCache(WORK / "cache")).folder


def _random_resnet() -> Path:
    """Write the weights of the ResNet-18 once."""
    path = WORK / "resnet18.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        save_file(nyuv2_resnet18().state_dict(), path)
    return path


def verified(precision: str, folder: Path, cpus: Sequence[str] = CPUS, images: int = IMAGES) -> Row:
    """Return how a bundle agrees with this machine on each CPU, and they with each other."""
    found = compare_emulated(folder, cpus, limit=images)
    return {
        "part": "verify", "precision": precision, "images": found.images,
        "same_bits": found.same_bits, "accuracy_here": found.accuracy_here,
        "runs": [
            {"cpu": run.cpu, "int8_form": run.int8_form, "accuracy": run.accuracy,
             "against_here": {task: asdict(each) for task, each in run.against_here.items()}}
            for run in found.runs
        ],
    }  # fmt: skip


def counted(folder: Path) -> Row:
    """Return the instructions of one inference and what has to be on the board."""
    record = bench_emulated(folder, COUNTED_ON)
    counts: Mapping[str, Any] = record["instructions"]
    return {
        "macs": json.loads((folder / "manifest.json").read_text())["cost"]["macs"],
        "instructions": counts.get("inference"), "spread": counts.get("spread"),
        "cold_start": counts.get("cold_start"), "not_available": counts.get("not_available"),
        "wheels_mb": record["edge_runner"]["wheels_mb"],
        "bundle_mb": record["edge_runner"]["bundle_mb"],
    }  # fmt: skip


def claims(rows: Sequence[Row]) -> list[Show]:
    """Claim agreement, repeatability, and that the table's cut saves what its MACs promise."""
    shows = [show for row in rows if row["part"] == "verify" for show in agreement(row)]
    known = [row for row in rows if row["part"] != "verify" and row["instructions"]]
    counts = {key_of(row)[1:]: row for row in known if row["part"] == "counts"}
    if known:
        worst = max(row["spread"] for row in known)
        claim = "spread of the instructions of one inference, the largest"
        shows.append(Show(claim, SPREAD, worst, "<="))
    for row in (row for row in known if row["part"] == "table"):
        network, runtime, precision, share = key_of(row)[1:]
        if whole := counts.get((network, runtime, precision, 1.0)):
            which = f"{network}, {runtime} {precision}, cut by the table of instructions"
            kept = row["instructions"] / whole["instructions"]
            shows.append(Show(f"{which}: share of them that ships", share, kept, "<="))
            claim = f"{which}: share of these saved over that of the MACs"
            shows.append(Show(claim, REALISED, realised(row, whole), ">="))
    return shows


def realised(row: Row, whole: Row) -> float:
    """Return the share of the instructions that a cut saves over that of the MACs."""
    saved = {key: 1 - row[key] / whole[key] for key in ("instructions", "macs")}
    return float(saved["instructions"] / saved["macs"])


def agreement(row: Row) -> list[Show]:
    """Claim that a bundle gives on every CPU what it gives here."""
    agreed = [each for run in row["runs"] for each in run["against_here"].values()]
    where = f"{row['precision']}, {row['images']} images, {len(row['runs'])} CPU models"
    shows = []
    if row["precision"] == "fp32":
        parities = [each["parity"] for each in agreed]
        largest = max(own["max_abs_difference"] / own["output_range"] for own in parities)
        claim = f"{where}: largest difference to this machine / range"
        shows.append(Show(claim, FP32_TARGET, largest, "<="))
    else:
        same = sum(row["same_bits"].values()) / len(row["same_bits"])
        claim = f"{where}: share of the tasks with the same bits on all of them"
        shows.append(Show(claim, 1.0, same, ">="))
    classes = [each["same_class"] for each in agreed if each["same_class"] is not None]
    claim = f"{where}: least share of pixels of the same class"
    shows.append(Show(claim, SAME_CLASS, min(classes), ">="))
    return shows


if __name__ == "__main__":
    main()
