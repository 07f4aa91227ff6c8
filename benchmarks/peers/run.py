"""Ours beside what else there is, from one parent: python benchmarks/peers/run.py [--quick]

    SECATEUR_DATA=... python benchmarks/peers/run.py [--peer NAME ...] [--minutes 60]

NYUv2, EfficientNet-Lite0 with segmentation, depth and normals at 96x128, on x86-64-cpu. Every peer
gets the same parent, training images, share of the parent's MACs and training steps (15 % of the
parent's), and delivers an ONNX file in fp32 and one in int8. Then all of them are evaluated on the
same 654 test images and timed in turns, one thread of ONNX Runtime. Jobs are appended to
``results/peers.cells.jsonl``; a later call does those still missing, and times all anew.
``--quick`` runs the script that an engineer writes by hand and ours for a few steps, and writes
no result.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import onnx
import torch
from fusion.bench import PARENT, Bench
from peers.jobs import DROP, PEERS, PRECISIONS, WORK, Cell, lines_written, package_versions, run_job
from secateur.bench.accuracy import evaluate
from secateur.bench.latency import summarise
from secateur.core.progress import shown
from secateur.devices.on_bench import take_samples
from secateur.lower import export_onnx
from secateur.metrics.delta import delta
from secateur.metrics.kind import kind_of
from secateur.runtimes import onnxruntime
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite
from torch import Tensor

CELLS = RESULTS / "peers.cells.jsonl"
RECOVERY, QUICK_STEPS = 0.15, 8
SESSIONS, RUNS = 9, 60  # a session takes one or two per cent more or less each time it is opened
TIE = 1.02  # a peer that takes up to 2 % longer counts as just as fast: against us
PARENT_FILE = WORK / "parent" / "fp32.onnx"
DENSE = ("Olive",)  # takes the parent as it is
JUDGED = {"delta T": "delta_t", "the worst task": "worst"}
Row = dict[str, Any]


class Point(NamedTuple):
    """A file on the plot of accuracy against latency."""

    peer: str
    keep: float
    precision: str
    ms: float
    bundle: Row


def main() -> None:
    options = _options()
    bench = Bench(PARENT)
    steps = QUICK_STEPS if options.quick else round(RECOVERY * bench.parent_steps)
    wanted = [cell for cell in cells(steps) if not options.peer or cell.peer in options.peer]
    if options.quick:
        wanted = [cell for cell in cells(steps) if cell.peer in ("secateur", "by hand")][:2]
    deadline = time.monotonic() + 60 * options.minutes
    with shown():
        export_onnx(bench.parent, bench.example, PARENT_FILE)
        parent = judged(bench, PARENT_FILE)
        found = [] if options.quick else read_rows(CELLS)
        for cell in wanted:
            if _of(cell, found) is None and time.monotonic() < deadline:
                found.append({**asdict(cell), **run_job(cell), **delivered(bench, cell, parent)})
                if not options.quick:
                    append_row(CELLS, found[-1])
        rows = [row for row in (_of(cell, found) for cell in cells(steps)) if row is not None]
        told = [{**row, "lines": lines_written(row["peer"])} for row in rows]
        rows = timed(bench, [parent_row(parent), *told])
    if options.quick:
        print(json.dumps(rows, indent=2))
        return
    shows = claims(rows)
    write_suite("peers", "python benchmarks/peers/run.py", [0],
                [{"peer": "packages", **package_versions()}, *rows], shows)  # fmt: skip
    exit_status(shows)


def cells(steps: int) -> list[Cell]:
    """Return every job; those that train nothing first, then the milder budget."""
    both = [Cell(peer, keep, steps) for keep in DROP for peer in PEERS if peer not in DENSE]
    return [*(Cell(peer, 1.0, 0) for peer in DENSE), *both]


def _of(cell: Cell, rows: Iterable[Row]) -> Row | None:
    """Return a cell's last row, unless its files are gone."""
    told = asdict(cell)
    for row in reversed(list(rows)):
        files = [cell.folder / f"{precision}.onnx" for precision in row.get("bundles", {})]
        if told.items() <= row.items() and all(file.exists() for file in files):
            return row
    return None


def delivered(bench: Bench, cell: Cell, parent: Row) -> Row:
    """Return what is in the files that a job left: accuracy, MACs, bytes."""
    bundles = {}
    for precision in PRECISIONS:
        path = cell.folder / f"{precision}.onnx"
        if path.exists():
            bundles[precision] = judged(bench, path, parent)
            fp32 = PARENT_FILE if cell.peer in DENSE else cell.folder / "fp32.onnx"
            bundles[precision]["macs"] = conv_macs(fp32)
    return {"bundles": bundles} if bundles else {}


def judged(bench: Bench, path: Path, parent: Row | None = None) -> Row:
    """Evaluate a file on the test images; with the parent's row, tell the change, too."""
    session = onnxruntime.open_session(path, 1)
    names = [task.name for task in bench.parent.tasks]

    def predict(images: Tensor) -> dict[str, Tensor]:
        outputs = session.run(images.numpy())
        return {name: torch.from_numpy(outputs[name]) for name in names}

    metrics = evaluate(predict, bench.parent.tasks, bench.test, bench.spec, batch_size=1)
    row: Row = {"metrics": metrics, "bytes": path.stat().st_size}
    if parent is None:
        return {**row, "macs": conv_macs(path), "delta_t": 0.0, "worst": 0.0}
    higher = {task.name: kind_of(task).higher_is_better for task in bench.parent.tasks}
    change = delta(parent["metrics"], metrics, higher)
    return {**row, "delta_t": change.mean, "worst": change.worst,
            "change_percent": dict(change.per_task)}  # fmt: skip


def conv_macs(path: Path) -> int:
    """Return the multiply-accumulates of an fp32 file's convolutions, for one image."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
              for value in (*model.graph.value_info, *model.graph.output)}  # fmt: skip
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return sum(
        int(np.prod(shapes[node.output[0]][1:])) * int(np.prod(weights[node.input[1]][1:]))
        for node in model.graph.node if node.op_type == "Conv"
    )  # fmt: skip


def parent_row(parent: Row) -> Row:
    return {"peer": "parent", "keep": 1.0, "bundles": {"fp32": parent}}


def timed(bench: Bench, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with every bundle's latency: all take turns, in sessions opened anew."""
    image = bench.example[:1].numpy()
    files = {(i, precision): _file(row, precision)
             for i, row in enumerate(rows) for precision in row.get("bundles", {})}  # fmt: skip
    samples: dict[Any, list[float]] = {key: [] for key in files}
    for _ in range(SESSIONS):
        sessions = {key: onnxruntime.open_session(path, 1) for key, path in files.items()}
        calls = {f"{i} {p}": partial(s.run, image) for (i, p), s in sessions.items()}
        for name, values in take_samples(calls, warmup_ms=100, seconds=0, runs=RUNS).items():
            number, precision = name.split()
            samples[int(number), precision] += values
    told: list[Row] = copy.deepcopy(list(rows))
    for (i, precision), values in samples.items():
        found = summarise(np.array(values))
        told[i]["bundles"][precision]["latency_ms"] = {
            "p50": found.median_ms, "p90": found.percentiles_ms["p90"],
            "p99": found.percentiles_ms["p99"], "noisy": found.noisy, "runs": found.runs,
        }  # fmt: skip
    return told


def _file(row: Row, precision: str) -> Path:
    if row["peer"] == "parent":
        return PARENT_FILE
    return Cell(row["peer"], row["keep"], row["steps"]).folder / f"{precision}.onnx"


def claims(rows: Sequence[Row]) -> list[Show]:
    """Claim that ours is on or above the Pareto front of all peers at each budget.

    Of our files at a budget, how many no peer's file of any budget and precision matches in both
    latency and accuracy: at least one has to be such. Then per file of ours, which is stricter: how
    many match it, of all (fp32 has to stand against the peers' int8) and of its own precision.
    """
    points = [
        Point(row["peer"], row["keep"], precision, bundle["latency_ms"]["p50"], bundle)
        for row in rows for precision, bundle in row.get("bundles", {}).items()
    ]  # fmt: skip
    ours = [point for point in points if point.peer == "secateur"]
    others = [point for point in points if point.peer not in ("secateur", "parent")]
    shows = []
    for keep in (keep for keep in DROP if any(point.keep == keep for point in ours)):
        for what, key in JUDGED.items():
            alone = [p for p in ours if p.keep == keep and not _matching(p, others, key)]
            claim = f"our files at {keep:.0%} of the MACs that no peer's file matches in p50 and "
            shows.append(Show(f"{claim}{what}", 1, len(alone), ">="))
    for point in ours:
        for what, key in JUDGED.items():
            claim = f"peers' files at least as good as ours in p50 and in {what}, "
            claim += f"ours at {point.keep:.0%} of the MACs, {point.precision}"
            shows.append(Show(claim, 0, len(_matching(point, others, key)), "<="))
            alike = [p for p in others if p.precision == point.precision]
            shows.append(Show(f"... of {point.precision} alone", 0,
                              len(_matching(point, alike, key)), "<="))  # fmt: skip
    for precision in PRECISIONS:
        for keep in DROP:
            shows += _lead(rows, keep, precision)
    return shows


def _matching(ours: Point, others: Iterable[Point], key: str) -> list[Point]:
    """Return those at least as good in both; as fast counts up to a tie, against us."""
    return [p for p in others if p.ms <= TIE * ours.ms and p.bundle[key] >= ours.bundle[key]]


def _lead(rows: Sequence[Row], keep: float, precision: str) -> list[Show]:
    """Return how far ahead ours is of the best peer at the same budget and precision."""
    found = {row["peer"]: row["bundles"][precision]["delta_t"] for row in rows
             if row["keep"] == keep and precision in row.get("bundles", {})}  # fmt: skip
    ours = found.pop("secateur", None)
    if ours is None or not found:
        return []
    best = max(found, key=lambda peer: found[peer])
    claim = f"points of delta T ahead of the best peer ({best}), {keep:.0%} of the MACs, "
    return [Show(f"{claim}{precision}", 0.0, ours - found[best], ">=")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", nargs="*", choices=PEERS, help="only these")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no job after these")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
