"""Accuracy at equal measured latency: python benchmarks/budget/accuracy.py [--part plan|train]

    SECATEUR_DATA=... python benchmarks/budget/accuracy.py --seeds 0 1 2

One parent (EfficientNet-Lite0, three tasks, 96x128), cut to 0.35 of its own p50 by four planners:
``latency`` plans milliseconds with a table measured here, and ``blocks`` does so after whole
residual blocks went where the cut is judged the better for it; ``macs`` plans MACs and ``torch-
pruning`` (GroupTaylor, ``round_to=8``) prunes to a ratio, each with the share of MACs at which its
cut takes that long, found by measuring cuts. ``plan`` finds the cuts, each timed in turns with the
parent as a build does it, and then all of a seed together, on a quiet machine. ``train`` then
recovers each for 15 % of the parent's steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import GRID, PARENT, Bench, Scores
from fusion.ours import CUT, REFIT_IMAGES, budget_of, fused_scores, ranked_plan
from fusion.rivals import RIVALS
from fusion.run import Cell, freeze_norms, measure, recover
from secateur.bench.estimate import table_estimate
from secateur.bench.latency import Protocol
from secateur.bench.latency import measure as measure_latency
from secateur.bench.profile import Sampling, measure_table
from secateur.compensate import refit
from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.core.progress import shown
from secateur.devices.host import host_facts
from secateur.devices.latency_table import LatencyTable, load_table, save_table
from secateur.devices.operators import Operators
from secateur.devices.target import load_target
from secateur.flow.allocation import judge_of
from secateur.flow.blocks import Outline, best_removal
from secateur.flow.channel_scores import scores_for
from secateur.flow.latency import latency_limit, narrowed
from secateur.lower import export_onnx
from secateur.lower.operators import list_operators, placed_as
from secateur.prune import (
    MacsModel,
    apply_plan,
    count_macs,
    find_groups,
    macs_model,
    plan_prune,
    plan_widths,
)
from secateur.prune.blocks import without_blocks
from secateur.prune.costs import layer_widths
from secateur.prune.plan import Budget, default_budget
from secateur.runtimes import onnxruntime
from suite import RESULTS, Show, append_row, read_rows, write_suite

CELLS = RESULTS / "budget_accuracy.cells.jsonl"
WORK = Path(__file__).resolve().parents[2] / "out" / "budget_accuracy"
TARGET = load_target("x86-64-cpu")
SHARE, LEAST = 0.35, 0.97  # of the parent's p50; a cut that uses less than LEAST of it is retried
TRIES = 6
SESSIONS, ONE_SESSION = 9, Protocol(seconds=0, runs=100)
RECOVERY = 0.15
PLANNERS = ("latency", "blocks", "macs", "torch-pruning")
BY_LATENCY = PLANNERS[:2]
JUDGING = 96  # images: a third for the refit, the others to judge by
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("plan", "train"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--planners", nargs="+", choices=PLANNERS, default=PLANNERS)
    options = parser.parse_args()
    with shown():
        race = Race()
        for seed in options.seeds:
            missing = [p for p in options.planners if p not in _planners("plan", seed)]
            if options.part != "train" and missing:
                for row in race.planned(seed, missing):
                    append_row(CELLS, row)
            if options.part != "plan":
                done = _planners("train", seed)
                for row in _rows("plan", seed):
                    if row["planner"] not in done:
                        append_row(CELLS, race.trained(row))
    rows = read_rows(CELLS)
    write_suite("budget_accuracy", "python benchmarks/budget/accuracy.py", options.seeds, rows,
                claims(rows))  # fmt: skip


def _rows(part: str, seed: int) -> list[Row]:
    return [row for row in read_rows(CELLS) if (row["part"], row["seed"]) == (part, seed)]


def _planners(part: str, seed: int) -> set[str]:
    return {row["planner"] for row in _rows(part, seed)}


class Race:
    """The parent, its latency table, and cuts of it that take the same time."""

    def __init__(self) -> None:
        self.bench = Bench(PARENT)
        self.turned = self.bench.turned()
        self.groups, self.cost = self.turned.groups, self.turned.cost
        self.parent_file = self._file(self.turned.parent, "parent")

    def planned(self, seed: int, planners: Sequence[str] = PLANNERS) -> list[Row]:
        """Return what each planner needs to reach the latency, and how long the cuts take."""
        found = {
            planner: self._by_latency(seed, planner == "blocks") if planner in BY_LATENCY
            else self._by_share(planner, seed)
            for planner in planners
        }  # fmt: skip
        cuts = {p: self.cut(p, how, seed, refitted=False) for p, how in found.items()}
        together = self.shares(cuts)
        return [
            {
                "part": "plan", "planner": planner, "seed": seed, **how,
                "macs": count_macs(cuts[planner], self.bench.example) / self.bench.full_macs,
                "latency_share_in_turns": together[planner],
            }
            for planner, how in found.items()
        ]  # fmt: skip

    def trained(self, row: Row) -> Row:
        """Cut as planned, recover, and measure on the test images."""
        seed, planner = row["seed"], row["planner"]
        model = self.cut(planner, row, seed)
        before = measure(self.bench, model)
        steps = round(RECOVERY * self.bench.parent_steps)
        method = "tp_group_taylor" if planner == "torch-pruning" else "cut"
        freeze = freeze_norms(self.bench, Cell(PARENT, method, row["macs"], RECOVERY, seed), steps)
        after = measure(self.bench, recover(self.bench, model, steps, seed, freeze=freeze))
        return {"part": "train", "planner": planner, "seed": seed, "steps": steps,
                "before": before, "after": after}  # fmt: skip

    def cut(
        self, planner: str, how: Mapping[str, Any], seed: int, *, refitted: bool = True
    ) -> MultiTaskModel:
        """Return the cut at the widths or at the share of MACs found; only ours are refitted."""
        if planner == "torch-pruning":
            return RIVALS["tp_group_taylor"](self.bench, how["keep"], seed)
        scores = fused_scores(self.turned, CUT.criterion, CUT.rule, SHARE, seed)
        parent, groups = self.turned.parent, self.groups
        if planner in BY_LATENCY:
            outline = self.outline(tuple(how.get("removed", ())))
            groups = outline.groups
            plan = outline.at(scores, how["counts"])
        else:
            plan = ranked_plan(self.turned, scores, budget_of(self.turned, how["keep"], "balanced"))
        pruned = apply_plan(parent, groups, plan)
        if not refitted:
            return pruned
        return refit(parent, pruned, groups, plan, self.turned.images(REFIT_IMAGES, seed))

    def _by_latency(self, seed: int, blocks: bool) -> Row:
        """Plan milliseconds; what is measured corrects the table's idea of the share."""
        scores = fused_scores(self.turned, CUT.criterion, CUT.rule, SHARE, seed)
        aim, removed = SHARE, self._removal(scores, seed) if blocks else ()
        outline = self.outline(removed)
        tried: list[tuple[float, Row]] = []
        for _ in range(TRIES):
            plan = outline.plan(scores, aim * self.parent_table_ms)
            share = self.shares({"cut": apply_plan(self.turned.parent, outline.groups, plan)})[
                "cut"
            ]
            tried.append((share, {"counts": [len(c.kept) for c in plan.cuts], "removed": removed}))
            if LEAST * SHARE <= share <= SHARE:
                break
            aim *= 0.99 * SHARE / share
        return _closest(tried)

    def _removal(self, scores: Scores, seed: int) -> tuple[str, ...]:
        """Return the blocks without which the cut to the latency is judged the best."""
        images, most = self.turned.images(JUDGING // 3, seed), SHARE * self.parent_table_ms
        batch = next(self.turned.stream(JUDGING - len(images), seed + 1, JUDGING))

        def outline_of(removed: tuple[str, ...]) -> Outline:
            outline = self.outline(removed)
            limit = latency_limit(outline.operators, self.table, most)
            over = limit.total([group.width for group in outline.groups]) / limit.most
            return Outline(outline.groups, over, lambda: outline.plan(scores, most))

        judge = judge_of(self.turned.parent, images, batch)
        return best_removal(self.turned.parent, self.bench.example, judge, 1.0, outline_of)

    def outline(self, removed: tuple[str, ...]) -> Shorter:
        """Return the parent without some blocks, ready to be planned in."""
        model = without_blocks(self.turned.parent, removed)
        groups = find_groups(model, self.bench.example) if removed else self.groups
        file = self._file(model, "outline") if removed else self.parent_file
        operators = list_operators(file, layer_widths(model, groups))
        if removed:
            whole = list_operators(self.parent_file, layer_widths(self.turned.parent, groups))
            operators = placed_as(operators, file, whole, self.parent_file)
        cost = macs_model(model, groups, self.bench.example)
        return Shorter(self, removed, groups, cost, operators)

    def _by_share(self, planner: str, seed: int) -> Row:
        """Find the share of MACs at which the planner's cut takes the wanted time.

        The search narrows an interval, from where the seed before ended. A share that the planner
        cannot reach bounds it from below.
        """
        before = [r["keep"] for r in _rows("plan", seed - 1) if r["planner"] == planner]
        keep, low, high = (before or [SHARE])[0], 0.0, 1.0
        tried: list[tuple[float, Row]] = []
        for _ in range(TRIES):
            try:
                cut = self.cut(planner, {"keep": keep}, seed, refitted=False)
            except PlanError:
                low, keep = keep, (keep + high) / 2
                continue
            share = self.shares({"cut": cut})["cut"]
            tried.append((share, {"keep": keep}))
            if LEAST * SHARE <= share <= SHARE:
                break
            low, high = (low, keep) if share > SHARE else (keep, high)
            aim = keep * 0.99 * SHARE / share
            keep = aim if low < aim < high else (low + high) / 2
        return _closest(tried)

    def shares(self, models: Mapping[str, MultiTaskModel]) -> dict[str, float]:
        """Return each model's p50 over the parent's: the middle one of several sessions.

        A session takes one or two per cent more or less each time that it is opened.
        """
        image = self.bench.example[:1].numpy()
        files = {"parent": self.parent_file, **{n: self._file(m, n) for n, m in models.items()}}
        found: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(SESSIONS):
            sessions = {n: onnxruntime.open_session(f, TARGET.threads) for n, f in files.items()}
            calls = {name: partial(session.run, image) for name, session in sessions.items()}
            timed = measure_latency(calls, ONE_SESSION)
            for name, shares in found.items():
                shares.append(timed[name].median_ms / timed["parent"].median_ms)
        return {name: float(np.median(shares)) for name, shares in found.items()}

    @cached_property
    def parent_table_ms(self) -> float:
        """What the parent takes by its table."""
        full = [group.width for group in self.groups]
        return table_estimate(self.outline(()).operators, self.table, full).ms

    @cached_property
    def table(self) -> LatencyTable:
        """The parent's latency table, measured once on this machine."""
        path, version = WORK / "table.json", onnxruntime.version()
        known = (
            load_table(path) if path.exists()
            else LatencyTable(version, TARGET.threads, host_facts(), {}, "fp32")
        )  # fmt: skip
        network = narrowed(self.turned.parent, self.groups, self.parent_file, GRID)
        places = network.operators.places
        return measure_table(
            network,
            lambda models, rounds: onnxruntime.network_times(
                models, places, TARGET.threads, rounds
            ),
            known, partial(save_table, path), Sampling(),
        )  # fmt: skip

    def _file(self, model: MultiTaskModel, name: str) -> Path:
        WORK.mkdir(parents=True, exist_ok=True)
        path = WORK / f"{name}.onnx"
        export_onnx(model, self.bench.example, path)
        return path


@dataclass(frozen=True, eq=False)
class Shorter:
    """The race's parent without the blocks of ``removed``, its groups, cost and operators."""

    race: Race
    removed: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]
    cost: MacsModel
    operators: Operators

    def scores(self, scores: Scores) -> Scores:
        """Return the parent's scores of the channels that are left."""
        return scores_for(self.groups, self.race.groups, scores) if self.removed else scores

    def plan(self, scores: Scores, most_ms: float) -> PrunePlan:
        """Return the cut that takes so long by the parent's table."""
        limit = latency_limit(self.operators, self.race.table, most_ms)
        budget = default_budget(self.groups, self.cost, SHARE, GRID, limits=[limit])
        plan = plan_prune(self.groups, self.cost, self.scores(scores), {}, budget, criterion="-",
                          fusion="-", limits=[limit])  # fmt: skip
        return replace(plan, removed=self.removed)

    def at(self, scores: Scores, counts: Sequence[int]) -> PrunePlan:
        """Return the cut to so many channels of each group."""
        plan = plan_widths(self.groups, self.cost, self.scores(scores), counts, Budget(1.0, GRID),
                           per_task={}, criterion="-", fusion="-")  # fmt: skip
        return replace(plan, removed=self.removed)


def _closest(tried: Sequence[tuple[float, Row]]) -> Row:
    """Return how the slowest try within the budget was cut, or else the fastest one."""
    within = [one for one in tried if one[0] <= SHARE]
    best = max(within, key=_share) if within else min(tried, key=_share)
    return {**best[1], "latency_share": best[0], "tries": len(tried)}


def _share(tried: tuple[float, Row]) -> float:
    return tried[0]


def claims(rows: Sequence[Row]) -> list[Show]:
    """Claim that planning milliseconds beats either rival by more than their spreads together."""
    trained = [row for row in rows if row["part"] == "train"]
    after = {
        planner: np.array([r["after"]["delta_t"] for r in trained if r["planner"] == planner])
        for planner in PLANNERS
    }
    ours, shows = after["latency"], []
    for planner in PLANNERS[len(BY_LATENCY) :]:
        rival = after[planner]
        if ours.size and ours.size == rival.size:
            noise = float(np.hypot(ours.std(), rival.std()))
            claim = (
                f"points of delta T ahead of {planner} at {SHARE} of the parent's latency, "
                f"beyond the noise, {ours.size} seed(s)"
            )
            shows.append(Show(claim, noise, float(ours.mean() - rival.mean()), ">="))
    for planner in PLANNERS:
        taken = [r["latency_share"] for r in rows
                 if r["part"] == "plan" and r["planner"] == planner]  # fmt: skip
        if taken:
            claim = f"{planner}: measured share of the parent's latency, the highest"
            shows.append(Show(claim, SHARE, max(taken), "<="))
        again = [r["latency_share_in_turns"] for r in rows if r["part"] == "plan"
                 and r["planner"] == planner and "latency_share_in_turns" in r]  # fmt: skip
        if again:
            claim = f"{planner}: the same, timed once more, every cut in turns, mean"
            shows.append(Show(claim, SHARE, float(np.mean(again)), "<="))
    return shows


if __name__ == "__main__":
    main()
