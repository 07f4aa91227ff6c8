"""A start from earlier cuts, on CIFAR-100: python benchmarks/vote/cifar.py [--network resnet vit]

    SECATEUR_DATA=... python benchmarks/vote/cifar.py [--part choose] [--minutes M]

A parent that knows 80 classes (``benchmarks/parents/cifar_*``); a library of 40 five-way tasks of
these, each cut to 50, 20, 10 and 2 % of the MACs; and twelve new tasks of 20 classes that neither
has seen, three seeds each. ``choose`` finds the best library start on six tasks of the library,
each left out of it; ``new`` then runs every row on the new tasks. A stopped run goes on; two may
run side by side. ``--quick`` takes one task, one seed and few iterations, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.core.progress import shown
from suite import RESULTS, append_row, read_rows, write_suite
from vote.cifar_claims import best_by_share, claims
from vote.lab import COLD, ITERATIVE, MEASURES, SHARES, STAGED, Lab, Row
from vote.starts import STARTS

CELLS = RESULTS / "vote_cifar.cells.jsonl"
CLAIMS = Path(__file__).resolve().parents[2] / "out" / "vote_cifar" / "claims"
NETWORKS = ("resnet", "vit")
SEEDS = (0, 1, 2)
CHOOSING = 6  # tasks of the library that the best start is chosen on
SHORT, MIDDLE, LONG = 100, 300, 1000
CANDIDATES = tuple(start for start in STARTS if start not in COLD)
MEASURED_SHARE, MEASURED_ITERATIONS = 0.2, 30
Cell = tuple[str, str, str, int, float, str, int, str]  # part, network, task, seed, share, ...


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--part", choices=("bank", "choose", "new", "measures"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        quick(options.network[0])
        return
    end = time.monotonic() + 60 * options.minutes
    with shown():
        for network in options.network:
            lab = Lab(network)
            if options.part in (None, "bank"):
                lab.make_bank()
            for part in ("choose", "new", "measures"):
                if options.part in (None, part):
                    fill(lab, part, end)
    rows = read_rows(CELLS)
    write_suite("vote_cifar", "python benchmarks/vote/cifar.py", list(SEEDS), rows, claims(rows))


def fill(lab: Lab, part: str, end: float) -> None:
    """Run the part's cells that nobody has run or begun."""
    CLAIMS.mkdir(parents=True, exist_ok=True)
    tasks = {task.name: task for task in (*lab.data.bank_tasks(), *lab.data.new_tasks())}
    done = {cell_of(row) for row in read_rows(CELLS)}
    for cell in cells(lab, part):
        if time.monotonic() > end:
            return
        if cell in done or not _claimed(cell):
            continue
        _, _, task, seed, share, start, iterations, measure = cell
        row = lab.run(tasks[task], share, seed, start, iterations, measure)
        append_row(CELLS, {"part": part, **row})
        print(part, lab.network, task, seed, share, start, iterations,
              f"{row['accuracy']:.1f} % in {row['seconds']:.1f} s", flush=True)  # fmt: skip


def cells(lab: Lab, part: str) -> Iterator[Cell]:
    """Yield what a part consists of."""
    network = lab.network
    if part == "choose":
        for share in SHARES:
            for task in lab.data.bank_tasks()[:: len(lab.data.bank_tasks()) // CHOOSING][:CHOOSING]:
                for start in (*CANDIDATES, *(f"{STAGED}{start}" for start in CANDIDATES)):
                    for iterations in (SHORT, MIDDLE):
                        yield part, network, task.name, 0, share, start, iterations, "leep"
        return
    if part == "measures":
        for task in lab.data.new_tasks():
            for measure in MEASURES:
                for start in ("votes of the nearest", "nearest task's weights"):
                    yield (part, network, task.name, 0, MEASURED_SHARE, start,
                           MEASURED_ITERATIONS, measure)  # fmt: skip
        return
    best = best_by_share(read_rows(CELLS), network)
    for seed in SEEDS:
        for task in lab.data.new_tasks():
            for share in SHARES:
                rows = [(ITERATIVE, n) for n in (SHORT, MIDDLE, LONG)]
                rows += [(start, SHORT) for start in STARTS] + [("cold, one-shot", MIDDLE)]
                rows += [(best[share, n], n) for n in (SHORT, MIDDLE) if (share, n) in best]
                for start, iterations in dict.fromkeys(rows):
                    yield part, network, task.name, seed, share, start, iterations, "leep"


def cell_of(row: Row) -> Cell:
    """Return which cell a row is of."""
    return (row["part"], row["network"], row["task"], row["seed"], row["share"], row["start"],
            row["iterations"], row["measure"])  # fmt: skip


def _claimed(cell: Cell) -> bool:
    """Say whether the cell is ours; a claim of a run that died is taken over after an hour."""
    path = CLAIMS / "_".join(str(part).replace(" ", "-").replace("'", "") for part in cell)
    if path.exists() and time.time() - path.stat().st_mtime > 3600:
        path.unlink(missing_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def quick(network: str) -> None:
    """Run each start once, shortly, on a parent as it is: does the suite work?"""
    lab = Lab(network)
    lab.make_bank()
    task = lab.data.new_tasks()[0]
    for start in (ITERATIVE, *STARTS, f"{STAGED}{CANDIDATES[-1]}"):
        row = lab.run(task, 0.2, 0, start, 10)
        print(f"{start}: {row['accuracy']:.1f} %, MACs {row['macs']:.3f}, {row['seconds']:.1f} s")


if __name__ == "__main__":
    main()
