"""Every way to cut a multi-task network, in one harness with equal recovery.

    SECATEUR_DATA=... python benchmarks/fusion/run.py [--parent NAME] [--part 1/2] [--minutes 60]
    python benchmarks/fusion/run.py --tables

Cells (method, budget, recovery, seed) run in order of interest and are appended to
``results/fusion.cells.jsonl``; a later call does those still missing. Several processes may
share the work by ``--part``. ``--quick`` only shows that it works: four methods, recovered for a
few steps, printed and not kept. Afterwards, and with ``--tables`` alone,
``results/fusion.json`` and the plots are made from the cells.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from fusion.bench import PARENT, SECOND, Bench
from fusion.ours import OURS, REFIT_IMAGES
from fusion.rivals import RIVALS
from secateur.bench.accuracy import evaluate_model
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel, parameter_count
from secateur.core.progress import shown
from secateur.data.transforms import Augment
from secateur.metrics.delta import delta
from secateur.metrics.kind import kind_of
from secateur.prune import count_macs
from secateur.recover import TrainSettings, freeze_after, steps_per_epoch, train
from suite import RESULTS, append_row, read_rows
from torch.optim.swa_utils import update_bn

Cutter = Callable[[Bench, float, int], MultiTaskModel]


def re_estimated(cut: Cutter) -> Cutter:
    """Return ``cut`` followed by batch norms that know the cut network (256 unlabelled images)."""

    def both(bench: Bench, share: float, seed: int) -> MultiTaskModel:
        model = cut(bench, share, seed)
        update_bn(torch.split(bench.images(REFIT_IMAGES, seed), 32), model)
        return model.eval()

    return both


CONTROL = "no cut (control)"  # the parent after the same recovery; told with its whole MACs
FROZEN = ", frozen norms"  # of a rival: its batch norms re-estimated, then left alone
METHODS: dict[str, Cutter] = {
    **{name: recipe.cut for name, recipe in OURS.items()},
    **RIVALS,
    **{f"{name}{FROZEN}": re_estimated(RIVALS[name]) for name in ("tp_group_taylor", "l2")},
}
LABEL_FREE = frozenset(name for name, recipe in OURS.items() if not recipe.labels)
HEADLINE = ("cut", "tp_group_taylor", "l2", "random")
KEEP = (0.3, 0.5, 0.1)
QUICK_RECOVERY = 0.003
CELLS = RESULTS / "fusion.cells.jsonl"
# The same for every method; chosen on the validation split, the rate per parent.
LEARNING_RATE = {PARENT: 3e-3, SECOND: 1.5e-3}
DISTILL, BATCH = 1.0, 8


@dataclass(frozen=True)
class Cell:
    """``keep``: share of MACs kept. ``recovery``: share of the parent's training steps."""

    parent: str
    method: str
    keep: float
    recovery: float
    seed: int


def cells(parent: str) -> Iterator[Cell]:
    """Yield the whole grid, the most telling cells first."""
    for seed in (0, 1, 2):
        for recovery in (0.15, 0.05):
            yield from (Cell(parent, m, k, recovery, seed) for m in HEADLINE for k in KEEP)
        yield Cell(parent, CONTROL, 1.0, 0.15, seed)
        yield from (Cell(parent, m, k, 0.15, seed) for k in KEEP for m in METHODS)
        yield from (Cell(parent, m, k, 0.4, seed) for m in HEADLINE for k in KEEP)


def main() -> None:
    options = _options()
    if options.quick:
        with shown(quiet=options.quiet):
            quick(Bench(options.parent))
        return
    if not options.tables:
        with shown(quiet=options.quiet):
            _run(options)
    from fusion.tables import write_tables

    write_tables(CELLS)


def _run(options: argparse.Namespace) -> None:
    bench = Bench(options.parent)
    part, parts = (int(number) for number in options.part.split("/"))
    wanted = list(dict.fromkeys(cells(options.parent)))
    for field in ("method", "keep", "recovery", "seed"):
        chosen = getattr(options, field)
        wanted = [c for c in wanted if not chosen or getattr(c, field) in chosen]
    deadline = time.monotonic() + 60 * options.minutes
    for number, cell in enumerate(wanted):
        if number % parts != part - 1 or cell in _done():
            continue
        if time.monotonic() > deadline:
            return
        try:
            row = {**asdict(cell), **run_cell(bench, cell)}
        except PlanError as error:  # some rivals cannot be cut so far
            append_row(CELLS, {**asdict(cell), "unreached": error.message})
            print(*asdict(cell).values(), error, flush=True)
            continue
        append_row(CELLS, row)
        change = f"{row['before']['delta_t']:.2f} -> {row['after']['delta_t']:.2f}"
        print(*asdict(cell).values(), change, flush=True)


def quick(bench: Bench) -> None:
    """Run half the MACs of each headline method with hardly any recovery."""
    for method in HEADLINE:
        row = run_cell(bench, Cell(bench.name, method, 0.5, QUICK_RECOVERY, 0))
        change = f"{row['before']['delta_t']:.2f} -> {row['after']['delta_t']:.2f}"
        print(f"{method}: {change} in {row['steps']} steps, MACs {row['macs']:.3f}", flush=True)


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Cut, recover and measure on the test images."""
    started = time.monotonic()
    if cell.method == CONTROL:
        model = copy.deepcopy(bench.parent)
    else:
        model = METHODS[cell.method](bench, cell.keep, cell.seed)
    cut_seconds = time.monotonic() - started
    before = measure(bench, model)
    steps = round(cell.recovery * bench.parent_steps)
    recovered = recover(
        bench, model, steps, cell.seed,
        labels=cell.method not in LABEL_FREE, freeze=freeze_norms(bench, cell, steps),
    )  # fmt: skip
    return {
        "macs": count_macs(model, bench.example) / bench.full_macs,
        "params": parameter_count(model) / parameter_count(bench.parent),
        "steps": steps,
        "before": before,
        "after": measure(bench, recovered),
        "cut_seconds": round(cut_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def freeze_norms(bench: Bench, cell: Cell, steps: int) -> float:
    """Return after which share of the recovery batch norms are frozen, as suits the method.

    Ours has norms of the network they are in, and so has the parent. A plain cut has those of
    another network; on the validation images it is better never to freeze them.
    """
    if cell.method != CONTROL and cell.method not in OURS:
        return 0.0 if cell.method.endswith(FROZEN) else 1.0
    told = OURS[cell.method].freeze_norms if cell.method in OURS else None
    epochs = steps / steps_per_epoch(len(bench.fit), BATCH)
    return freeze_after(epochs, cell.keep) if told is None else told


def recover(
    bench: Bench,
    model: MultiTaskModel,
    steps: int,
    seed: int,
    *,
    labels: bool = True,
    freeze: float = 1.0,
    rate: float | None = None,
) -> MultiTaskModel:
    """Return ``model`` after ``steps`` of fine-tuning, equal for all but labels and norms.

    ``rate``: another learning rate than all have, for the search of settings (``settings.py``).
    """
    settings = TrainSettings(
        steps=steps,
        batch_size=BATCH,
        learning_rate=rate or LEARNING_RATE[bench.name],
        distill=DISTILL,
        seed=seed,
        labels=labels,
        freeze_norms=freeze,
    )
    augment = Augment(scale=1.0, jitter=0.0)
    return train(
        model, bench.fit, bench.spec, settings, parent=bench.parent, augment=augment,
        title="recovering", remembered=bench.teacher,
    ).model  # fmt: skip


def measure(bench: Bench, model: MultiTaskModel, split: str = "test") -> dict[str, Any]:
    """Return ΔT, each task's change and the metrics on a split."""
    reader = {"test": bench.test, "val": bench.val}[split]
    metrics = evaluate_model(model, reader, bench.spec, batch_size=32)
    higher = {task.name: kind_of(task).higher_is_better for task in bench.parent.tasks}
    change = delta(bench.parent_metrics(split), metrics, higher)
    return {
        "delta_t": change.mean,
        "worst": change.worst,
        "change_percent": dict(change.per_task),
        "metrics": metrics,
    }


def _done() -> set[Cell]:
    """Return what has been run; what a rival of ours, and no library, did not reach is not."""
    keys = list(Cell.__dataclass_fields__)
    return {
        Cell(**{key: row[key] for key in keys})
        for row in read_rows(CELLS)
        if "unreached" not in row or row["method"].startswith("tp_")
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", default=PARENT)
    parser.add_argument("--part", default="1/1", help="which share of the cells, as 2/3")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after these")
    parser.add_argument("--method", nargs="*", help="only these")
    parser.add_argument("--keep", nargs="*", type=float, help="only these shares of MACs")
    parser.add_argument("--recovery", nargs="*", type=float, help="only these shares of steps")
    parser.add_argument("--seed", nargs="*", type=int, help="only these")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", action="store_true", help="only tables, from the cells so far")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
