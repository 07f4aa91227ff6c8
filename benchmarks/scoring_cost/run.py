"""What scoring every task costs against one plain pass: python benchmarks/scoring_cost/run.py

Time and memory of the per-task scoring pass against one forward and backward pass of the summed
losses over the same images, in the same batches, with the same labels. Each measurement is a
process of its own, since a process's peak memory never falls.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur import zoo
from secateur.core.channels import ChannelGroup
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import Batch, InMemory, batches, open_reader
from secateur.importance.bank import score_tasks
from secateur.metrics.kind import kind_of
from secateur.prune import find_groups
from secateur.zoo.parents import NYUV2_HEADS
from suite import Show, exit_status, write_suite

DATA = Path(os.environ.get("SECATEUR_DATA", "../shared/data")) / "nyuv2_288x384"
TASKS = (
    Task("segmentation", "segmentation", "segmentation", "segmentation", classes=13),
    Task("depth", "depth", "depth", "depth"),
    Task("normals", "normals", "normals", "normals"),
)
SIZES = {"nyuv2_lite0": (288, 384), "vit_base_patch16_224": (224, 224)}
PASSES = ("plain", "scoring")
LIMIT = 1.2 * len(TASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # network, pass
    options = parser.parse_args()
    if options.measure:
        network, kind = options.measure
        print(json.dumps(measure(network, kind, options)))
        return
    rows = [
        {"network": network, "pass": kind, **in_new_process(network, kind)}
        for network in SIZES
        for kind in PASSES
    ]
    shows = [show for network in SIZES for show in claims(network, rows)]
    write_suite("scoring_cost", "python benchmarks/scoring_cost/run.py", [0], rows, shows)
    exit_status(shows)


def in_new_process(network: str, kind: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", network, kind]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(result.stdout)
    print(f"{network} {kind}: {row['seconds']:.2f} s, {row['added_mb']:.0f} MB", flush=True)
    return row


def measure(network: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Warm up on one batch, then time whole passes; memory is what they add to the process."""
    torch.manual_seed(0)  # the weights are random: time and memory do not depend on them
    height, width = SIZES[network]
    spec = ModelInput(3, height, width, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = MultiTaskModel(build(network), TASKS).eval()
    reader = InMemory(open_reader("nyuv2", DATA, "train"))
    stream = partial(batches, reader, TASKS, spec, options.batch_size, limit=options.images)
    one_batch = partial(batches, reader, TASKS, spec, options.batch_size, limit=options.batch_size)
    for _ in stream():  # read the files before anything is measured
        pass
    before = psutil.Process().memory_info().rss
    go: Callable[[Callable[[], Iterable[Batch]]], object]
    if kind == "plain":
        go = partial(plain_pass, model)
    else:  # memory that tracing the groups needs, or leaves behind, is scoring's too
        go = partial(scoring_pass, model, find_groups(model, spec.example()), options.criterion)
    go(one_batch)
    seconds = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        go(stream)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": min(seconds),
        "seconds_all": seconds,
        "added_mb": (peak - before) / 1e6,
        "peak_mb": peak / 1e6,
        "input": [3, height, width],
        "images": options.images,
        "batch_size": options.batch_size,
        "criterion": options.criterion if kind == "scoring" else None,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def build(network: str) -> torch.nn.Module:
    if network == "nyuv2_lite0":
        return zoo.nyuv2_lite0()
    return zoo.compose(network, NYUV2_HEADS, img_size=SIZES[network])


def plain_pass(model: MultiTaskModel, stream: Callable[[], Iterable[Batch]]) -> None:
    """One forward and one backward pass of all tasks' losses together."""
    for batch in stream():
        model.zero_grad(set_to_none=True)
        outputs = model(batch.images)
        losses = [kind_of(t).loss(outputs[t.name], batch.targets[t.name]) for t in TASKS]
        torch.autograd.backward(sum(losses[1:], losses[0]))
    model.zero_grad(set_to_none=True)


def scoring_pass(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    criterion: str,
    stream: Callable[[], Iterable[Batch]],
) -> None:
    score_tasks(model, groups, model.tasks, criterion, stream, sum(1 for _ in stream()))


def claims(network: str, rows: list[dict[str, Any]]) -> list[Show]:
    plain, scoring = (
        next(r for r in rows if r["network"] == network and r["pass"] == kind) for kind in PASSES
    )
    of = f"{network}, scoring of {len(TASKS)} tasks / one plain pass"
    return [
        Show(f"{of}: time", LIMIT, scoring["seconds"] / plain["seconds"], "<="),
        Show(f"{of}: peak memory added", LIMIT, scoring["added_mb"] / plain["added_mb"], "<="),
    ]


if __name__ == "__main__":
    main()
