"""Estimated against measured latency of random cuts: python benchmarks/budget/estimator.py

Three multi-task networks, fp32 and int8, one thread. Per network and precision a latency table is
measured, then the p50 of ten cuts whose widths are uniformly random, all in turns with the parent.
The table never saw these cuts; they are made, exported and quantised as a build does. An estimate
counts relative to the parent's, since the machine's speed drifts between table and measurement;
``estimated_ms`` is what it says without that. Where the parent took a tenth more or less than the
table says, the machine was busy, and the cuts are measured again. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from budget.networks import CASES, GRID, TARGET, WORK, Network
from secateur.bench.estimate import table_estimate
from secateur.bench.latency import Protocol, measure
from secateur.bench.profile import Sampling, measure_table
from secateur.core.progress import shown
from secateur.devices.host import host_facts
from secateur.devices.latency_table import LatencyTable, channel_grid, load_table, save_table
from secateur.devices.profiled import NetworkTimes
from secateur.devices.target import Precision
from secateur.flow.latency import narrowed
from secateur.runtimes import onnxruntime
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite
from torchmetrics.functional import spearman_corrcoef

CELLS = RESULTS / "budget_estimator.cells.jsonl"
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
PLANS, SESSIONS = 10, 3
ONE_SESSION = Protocol(seconds=0, runs=50)
DRIFT, TRIES = 0.1, 3  # of the parent since the table: beyond, the machine is busy; so often
MAPE, RANK, SECONDS = 0.05, 0.98, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first network only")
    options = parser.parse_args()
    cases = CASES[:1] if options.quick else CASES
    version = onnxruntime.version()
    cells = {(c["model"], c["precision"]): c for c in read_rows(CELLS) if c["runtime"] == version}
    with shown():
        for case in cases:
            network = Network(case)
            for precision in PRECISIONS:
                if (case.name, precision) not in cells:
                    cell = {**measured(network, precision), "runtime": version}
                    append_row(CELLS, cell)
                    cells[case.name, precision] = cell
    rows = [cells[case.name, precision] for case in cases for precision in PRECISIONS]
    if options.quick:
        print(json.dumps(rows, indent=2))
        return
    shows = claims(rows)
    seeds = list(range(PLANS))
    write_suite("budget_estimator", "python benchmarks/budget/estimator.py", seeds, rows, shows)
    exit_status(shows)


def measured(network: Network, precision: Precision) -> dict[str, Any]:
    """Return one network's table in a precision, in short, and its cuts' latencies."""
    plans = [network.random_counts(seed) for seed in range(PLANS)]
    files = {f"cut{seed}": network.file(f"cut{seed}", precision, kept)
             for seed, kept in enumerate(plans)}  # fmt: skip
    files["parent"] = network.file("parent", precision)
    table, seconds = profiled(network, precision)
    operators = network.operators(precision)
    parent_estimate = table_estimate(operators, table, network.full).ms
    for _ in range(TRIES):
        medians = measured_ms(network, files)
        parent_ms = medians["parent"]
        if abs(parent_ms / parent_estimate - 1) <= DRIFT:
            break
    cuts = []
    for seed, kept in enumerate(plans):
        took, estimate = medians[f"cut{seed}"], table_estimate(operators, table, kept)
        cuts.append({
            "seed": seed, "measured_ms": took, "share": took / parent_ms,
            "estimated_ms": estimate.ms, "estimated_share": estimate.ms / parent_estimate,
        })  # fmt: skip
    return {
        "model": network.case.name, "precision": precision, "parent_ms": parent_ms,
        "parent_estimated_ms": parent_estimate, "profile_seconds": round(seconds, 1),
        "networks": len(table.runs), "channel_grid": channel_grid(table),
        "error_said": table.error(), "mape": mape([cuts]), "rank": rank([cuts]), "cuts": cuts,
    }  # fmt: skip


def measured_ms(network: Network, files: Mapping[str, Path]) -> dict[str, float]:
    """Return each file's p50, all taking turns: the middle one of several sessions.

    A session takes one or two per cent more or less each time that it is opened.
    """
    image = network.spec.example().numpy()
    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(SESSIONS):
        sessions = {n: onnxruntime.open_session(f, TARGET.threads) for n, f in files.items()}
        calls = {name: partial(session.run, image) for name, session in sessions.items()}
        for name, latency in measure(calls, ONE_SESSION).items():
            found[name].append(latency.median_ms)
    return {name: float(np.median(medians)) for name, medians in found.items()}


def profiled(network: Network, precision: Precision) -> tuple[LatencyTable, float]:
    """Measure the network's table, and say for how many seconds in all."""
    path = WORK / network.case.name / f"table.{precision}.json"
    spent = path.with_suffix(".seconds")
    before = float(spent.read_text()) if spent.exists() else 0.0
    start = time.monotonic()
    parent = network.file("parent", precision)
    job = narrowed(network.model, network.groups, parent, GRID)
    known = (
        load_table(path) if path.exists()
        else LatencyTable(onnxruntime.version(), TARGET.threads, host_facts(), {}, precision)
    )  # fmt: skip

    def keep(table: LatencyTable) -> None:
        save_table(path, table)
        spent.write_text(str(before + time.monotonic() - start))

    def timer(models: Sequence[bytes], rounds: int) -> Sequence[NetworkTimes]:
        return onnxruntime.network_times(models, job.operators.places, TARGET.threads, rounds)

    table = measure_table(job, timer, known, keep, Sampling())
    return table, float(spent.read_text())


def mape(cells: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Return the mean absolute relative error of the shares of the parent's latency."""
    return float(np.mean([abs(c["estimated_share"] / c["share"] - 1) for cs in cells for c in cs]))


def rank(cells: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Return Spearman's correlation of estimated and measured shares."""
    pairs = [(cut["estimated_share"], cut["share"]) for cuts in cells for cut in cuts]
    estimated, wanted = torch.tensor(pairs, dtype=torch.float64).T
    return float(spearman_corrcoef(estimated, wanted))


def claims(rows: Sequence[dict[str, Any]]) -> list[Show]:
    shows = []
    for row in rows:
        name = f"{row['model']} {row['precision']}"
        shows += [
            Show(f"{name}, {PLANS} random cuts, share of the parent estimated against measured: "
                 "MAPE", MAPE, row["mape"], "<="),
            Show(f"{name}: rank correlation", RANK, row["rank"], ">="),
        ]  # fmt: skip
    cells = [row["cuts"] for row in rows]
    return [
        Show(f"all {PLANS * len(rows)} random cuts: MAPE", MAPE, mape(cells), "<="),
        Show("... rank correlation", RANK, rank(cells), ">="),
        *shows,
        Show("seconds to measure the table of nyuv2_lite0 at 192x256, fp32", SECONDS,
             rows[0]["profile_seconds"], "<="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
