"""How recovery's settings were chosen, and whether rivals would choose others: validation images.

    SECATEUR_DATA=... python benchmarks/fusion/settings.py [--quick]

Each of four methods cuts once, to 30 % of the MACs, and its network recovers for 15 % of the
parent's steps with batch norms trained to the end or frozen half-way, all but L2's also at three
learning rates. Then our own
ranking is balanced between groups more and less, and with other floors; these cuts are refitted and
not trained. The test images are not looked at. Resumable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench
from fusion.ours import CUT, REFIT_IMAGES, budget_of, fused_scores, ranked_plan
from fusion.run import LEARNING_RATE, METHODS, measure, recover
from secateur.compensate import refit
from secateur.core.model import MultiTaskModel
from secateur.core.progress import shown
from suite import RESULTS, Show, append_row, read_rows, write_suite

CELLS = RESULTS / "fusion_settings.cells.jsonl"
KEEP, SHARE, SEED = 0.3, 0.15, 0
TRAINED, HALFWAY = 1.0, 0.5  # after which share of the steps norms are frozen
USUAL = {"tp_group_taylor": TRAINED, "disparse": TRAINED, "l2": TRAINED, "cut": HALFWAY}
FACTORS = (0.5, 1.0, 2.0)  # of the learning rate
KEEPS = (0.3, 0.1)
BALANCE = 0.65  # the usual one
# Balance, and a floor where it is not as usual (.3, or less where that leaves too little to choose)
ALLOCATIONS = ((BALANCE, None), (0.0, None), (0.4, None), (0.9, None), (BALANCE, 0.0))
NEAR = 0.5  # points of ΔT: about a seed's standard deviation


@dataclass(frozen=True)
class Setting:
    """One recovery of one method's network."""

    method: str
    learning_rate: float
    freeze_norms: float


def settings() -> Iterator[Setting]:
    """Yield what is tried, the usual setting of each method first."""
    rate = LEARNING_RATE[PARENT]
    for method, usual in USUAL.items():
        yield Setting(method, rate, usual)
        yield Setting(method, rate, HALFWAY if usual == TRAINED else TRAINED)
    for method in ("tp_group_taylor", "disparse", "cut"):
        for factor in FACTORS:
            yield Setting(method, rate * factor, USUAL[method])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one method, few steps, no figures")
    options = parser.parse_args()
    bench = Bench(PARENT)
    wanted = list(dict.fromkeys(settings()))
    with shown():
        if options.quick:
            model = METHODS["l2"](bench, KEEP, SEED)
            print(_recovered(bench, model, Setting("l2", 3e-3, TRAINED), 2)["delta_t"])
            return
        _fill(bench, wanted)
        _fill_allocations(bench)
    rows = read_rows(CELLS)
    write_suite("fusion_settings", "python benchmarks/fusion/settings.py", [SEED], rows,
                claims(rows))  # fmt: skip


def _fill(bench: Bench, wanted: list[Setting]) -> None:
    for method in dict.fromkeys(setting.method for setting in wanted):
        told = [row for row in read_rows(CELLS) if row["method"] == method]
        own = [one for one in wanted if one.method == method
               and not any(asdict(one).items() <= row.items() for row in told)]  # fmt: skip
        model = METHODS[method](bench, KEEP, SEED) if own else None
        for setting in own:
            assert model is not None
            row = {**asdict(setting), **_recovered(bench, model, setting,
                                                   round(SHARE * bench.parent_steps))}  # fmt: skip
            append_row(CELLS, row)
            print(*asdict(setting).values(), f"{row['delta_t']:.2f}", flush=True)


def _fill_allocations(bench: Bench) -> None:
    """Cut with each balance and floor, refit, and judge."""
    bench = CUT.bench(bench)
    for keep, (balance, floor) in product(KEEPS, ALLOCATIONS):
        key = {"method": "cut, scored once", "keep": keep, "balance": balance, "floor": floor}
        if any(key.items() <= row.items() for row in read_rows(CELLS)):
            continue
        fused = fused_scores(bench, CUT.criterion, CUT.rule, keep, SEED)
        budget = replace(budget_of(bench, keep, "balanced"), balance=balance)
        if floor is not None:
            budget = replace(budget, floor=floor)
        plan = ranked_plan(bench, fused, budget)
        model = refit(bench.parent, bench.apply(plan), bench.groups, plan,
                      bench.images(REFIT_IMAGES, SEED))  # fmt: skip
        found = measure(bench, model, "val")
        append_row(CELLS, {**key, "delta_t": found["delta_t"], "worst": found["worst"]})
        print(*key.values(), f"{found['delta_t']:.2f}", flush=True)


def _recovered(bench: Bench, model: MultiTaskModel, setting: Setting, steps: int) -> dict[str, Any]:
    recovered = recover(bench, model, steps, SEED, freeze=setting.freeze_norms,
                        rate=setting.learning_rate)  # fmt: skip
    found = measure(bench, recovered, "val")
    return {"steps": steps, "delta_t": found["delta_t"], "worst": found["worst"]}


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """Claim of each method that no other setting is better by more than seeds differ."""
    shows = []
    for method, usual in USUAL.items():
        own = {(row["learning_rate"], row["freeze_norms"]): row["delta_t"]
               for row in rows if row["method"] == method and "learning_rate" in row}  # fmt: skip
        here = own.get((LEARNING_RATE[PARENT], usual))
        if here is not None:
            best = max(own, key=lambda one: own[one])
            shows.append(Show(
                f"points of ΔT on validation images that {method} gains by other settings (rate "
                f"{best[0]:g}, norms frozen after {best[1]:g} of the steps), 70 % of MACs removed, "
                "15 %", NEAR, round(own[best] - here, 2), "<=",
            ))  # fmt: skip
    return shows + _of_allocations([row for row in rows if "balance" in row])


def _of_allocations(rows: list[dict[str, Any]]) -> list[Show]:
    shows = []
    for keep in dict.fromkeys(row["keep"] for row in rows):
        own = {
            (row["balance"], row["floor"]): row["delta_t"] for row in rows if row["keep"] == keep
        }
        best = max(own, key=lambda one: own[one])
        floor = "as usual" if best[1] is None else f"{best[1]:g}"
        shows.append(Show(
            f"points of ΔT on validation images that another balance or floor ({best[0]:g}, "
            f"{floor}) gains, {1 - keep:.0%} of MACs removed, refitted, not trained", NEAR,
            round(own[best] - own[BALANCE, None], 2), "<=",
        ))  # fmt: skip
    return shows


if __name__ == "__main__":
    main()
