"""How much of the MACs saved becomes time saved: python benchmarks/budget/realised.py

ResNet-50 with three heads at 224x224 (random weights: time does not read them), cut to 0.27 of its
MACs, fp32 and int8, one thread. Ours plans on the target's channel grid, by random scores, so that
groups are cut very unequally: by MACs alone, and by MACs and milliseconds together, with the least
milliseconds (found by halving) for which a plan still uses its MACs. torch-pruning cuts every layer
by a ratio, with and without rounding. Each cut's p50 over the parent's, all in turns, on a quiet
machine.
"""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch_pruning

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from budget.estimator import measured_ms, profiled
from budget.networks import CASES, TARGET, WORK, Network
from secateur.bench.estimate import table_estimate
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.progress import shown
from secateur.devices.target import Precision
from secateur.flow.latency import latency_limit
from secateur.lower import export_onnx
from secateur.prune import count_macs, macs_model, plan_prune
from secateur.prune.costs import macs_limit
from secateur.prune.groups import output_layers
from secateur.prune.plan import default_budget
from secateur.prune.problem import Limit
from suite import Show, exit_status, write_suite

SHARE = 0.27
SEEDS = (0, 1, 2)
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
MOST = {"fp32": 1.05, "int8": 1.2}  # of the share of MACs
TRIALS = 8  # of each bisection: for torch-pruning's ratio, for our milliseconds
OURS = ("MACs", "MACs and ms")
NEAR = 0.97  # of the MACs allowed: a plan that leaves more unused is not one at that share
ROUNDED = {"torch-pruning, unrounded": None, "torch-pruning, round_to=16": 16}


def main() -> None:
    network = Network(CASES[1])
    with shown():
        rows = [row for precision in PRECISIONS for row in realised(network, precision)]
    shows = claims(rows)
    write_suite("budget_realised", "python benchmarks/budget/realised.py", list(SEEDS), rows, shows)
    exit_status(shows)


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Show]:
    """Return the most of each planner's plans, in both precisions; the rival's beside ours."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["precision"], row["planner"]), []).append(row["time_over_macs"])
    return [
        Show(f"{planner}: share of time over share of MACs at {SHARE} of ResNet-50's, "
             f"{precision}, the most of {len(values)} plan(s)", MOST[precision], max(values), "<=")
        for (precision, planner), values in found.items()
    ]  # fmt: skip


def realised(network: Network, precision: Precision) -> Iterator[dict[str, Any]]:
    """Yield each cut's share of the parent's MACs and of its p50, in one precision."""
    network.file("parent", precision)
    cost = macs_model(network.model, network.groups, network.spec.example())
    macs, files = {}, {"parent": network.file("parent", precision)}
    planners: dict[str, str] = {}
    for planner, seed in itertools.product(OURS, SEEDS):
        plan = planned if planner == "MACs" else planned_with_ms
        counts = plan(network, precision, seed)
        name = f"realised-{zlib.crc32(str(counts).encode()):08x}"  # a file of other widths stays
        files[name], planners[name] = network.file(name, precision, counts), planner
        macs[name] = cost.macs(counts) / cost.macs(network.full)
    for planner, step in ROUNDED.items():
        name = f"realised-{planner.replace(' ', '-')}"
        fp32 = WORK / network.case.name / f"{name}.fp32.onnx"
        model = rival(network, step)
        export_onnx(model, network.spec.example(), fp32)
        files[name], planners[name] = network.file(name, precision), planner
        macs[name] = count_macs(model, network.spec.example()) / cost.macs(network.full)
    took = measured_ms(network, files)
    for name, share in macs.items():
        time_share = took[name] / took["parent"]
        yield {
            "precision": precision, "planner": planners[name], "cut": name, "macs_share": share,
            "p50_ms": took[name], "parent_p50_ms": took["parent"], "time_share": time_share,
            "time_over_macs": time_share / share,
        }  # fmt: skip


def planned(network: Network, precision: Precision, seed: int) -> list[int]:
    """Return the widths that our plan of random scores keeps, within the share of MACs."""
    return _kept(network, precision, seed, ())


def planned_with_ms(network: Network, precision: Precision, seed: int) -> list[int]:
    """Return the same within as few milliseconds as can be, by the network's latency table."""
    cost = macs_model(network.model, network.groups, network.spec.example())
    table, operators = profiled(network, precision)[0], network.operators(precision)
    parent_ms = table_estimate(operators, table, network.full).ms
    most_macs = int(SHARE * cost.macs(network.full))
    counts: list[int] = []
    low, high = SHARE / 2, 2 * SHARE  # of the parent's time: too little, surely enough
    for trial in range(TRIALS):
        share = (low + high) / 2 if trial else high
        limits = (macs_limit(cost, most_macs), latency_limit(operators, table, share * parent_ms))
        try:
            found = _kept(network, precision, seed, limits)
        except PlanError:
            found = []
        if found and cost.macs(found) >= NEAR * most_macs:
            counts, high = found, share
        else:  # no plan, or one that milliseconds alone decide
            low = share
    return counts


def _kept(
    network: Network, precision: Precision, seed: int, limits: tuple[Limit, ...]
) -> list[int]:
    groups, example = network.groups, network.spec.example()
    cost = macs_model(network.model, groups, example)
    rng = np.random.default_rng(seed)
    scores = {g.name: rng.lognormal(rng.normal(), 1, g.width) / g.width for g in groups}
    budget = default_budget(groups, cost, SHARE, TARGET.channel_grid[precision])
    plan = plan_prune(groups, cost, scores, {}, budget, criterion="-", fusion="-", limits=limits)
    return [len(cut.kept) for cut in plan.cuts]


def rival(network: Network, round_to: int | None) -> MultiTaskModel:
    """Return torch-pruning's cut of every layer by the ratio that comes closest to the share."""
    example = network.spec.example()
    full = count_macs(network.model, example)
    low, high = 0.0, 1.0
    best, off = network.model, 1.0
    for _ in range(TRIALS):
        ratio = (low + high) / 2
        model = copy.deepcopy(network.model)
        ignored = output_layers(model, example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_pruning.pruner.BasePruner(
                model, example, importance=torch_pruning.importance.MagnitudeImportance(),
                pruning_ratio=ratio, round_to=round_to, ignored_layers=ignored,
                in_channel_groups={}, out_channel_groups={},
            ).step()  # fmt: skip
        share = count_macs(model, example) / full
        low, high = (low, ratio) if share < SHARE else (ratio, high)
        if abs(share - SHARE) < off:
            best, off = model, abs(share - SHARE)
    return best.eval()


if __name__ == "__main__":
    main()
