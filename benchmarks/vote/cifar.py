"""A start from earlier cuts, on CIFAR-100: python benchmarks/vote/cifar.py [--network resnet vit]

    SECATEUR_DATA=... python benchmarks/vote/cifar.py [--part choose] [--minutes M]

A parent that knows 80 classes (``benchmarks/parents/cifar_*``); a library of 40 five-way tasks of
these, each cut to 50, 20, 10 and 2 % of the MACs; and twelve new tasks of 20 classes that neither
has seen, three seeds each. ``choose`` finds the best library start on six tasks of the library,
each left out of it (but its images are among those that the generic sub-network was taught on);
``new`` then runs every row on the new tasks; ``measures`` compares neighbours by other measures of
similarity, and other numbers of them. A library made anew on another CPU is another one (of the
ViT's at 98 %, single tasks by up to 25 points, the mean by 2): rows say what the library at hand
gave. The ViT's rows of ``choose`` are of an earlier making than those of ``bank`` and ``new``. A
stopped run goes on; two may run side by side. ``--quick`` takes one task, a small library made in
haste and few iterations, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.core.progress import shown
from suite import RESULTS, append_row, read_rows, write_suite
from vote.cifar_claims import (
    ITERATIONS,
    NETWORKS,
    SECONDS_AT,
    answers,
    claims,
    ranking,
    summary,
)
from vote.cifar_plots import draw_curves
from vote.lab import COLD, ITERATIVE, LIBRARIES, MEASURES, SHARES, STAGED, UNCUT, Effort, Lab, Row
from vote.starts import BY_COUNT, COUNTED, REFITTED, STARTS
from vote.turns import turn

CELLS = RESULTS / "vote_cifar.cells.jsonl"
CLAIMS = LIBRARIES / "claims"
SEEDS = (0, 1, 2)
CHOOSING, FINAL = 6, 2  # tasks of the library to choose the best start on; starts in the last round
SHORT, MIDDLE, LONG = 100, 300, 1000
CANDIDATES = tuple(start for start in STARTS if start not in COLD)
MEASURED_SHARE, MEASURED_ITERATIONS = 0.2, 30
HASTE = Effort(tasks=3, iterations=8, generic=8, cuts=1, shares=SHARES[:2])
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
                make_library(lab, end)
                tell_library(lab)
            if lab.missing():
                print(f"{network}: cold starts alone, for the library still lacks "
                      f"{', '.join(lab.missing())}")  # fmt: skip
            for part in ("choose", "new", "measures"):
                if options.part in (None, part):
                    fill(lab, part, end)
    rows = read_rows(CELLS)
    if not rows:
        return
    command, told = "python benchmarks/vote/cifar.py", [*summary(rows), *answers(rows)]
    seeds = sorted({row["seed"] for row in rows})
    write_suite("vote_cifar", command, seeds, told, claims(rows))
    draw_curves(rows, RESULTS / "vote_cifar.png")


def make_library(lab: Lab, end: float) -> None:
    """Make what the library lacks and nobody has begun."""
    for name in lab.missing():
        if time.monotonic() > end:
            return
        with turn(CLAIMS / f"{lab.network}_{name}") as ours:
            if ours and name in lab.missing():  # else another process makes it, or did meanwhile
                lab.make(name)
                print(lab.network, name, "made", flush=True)


def tell_library(lab: Lab) -> None:
    """Write down what the library took, once it is whole."""
    told = {cell_of(row) for row in read_rows(CELLS)}
    for row in [] if lab.missing() else lab.made():
        if cell_of({"part": "bank", **row}) not in told:
            append_row(CELLS, {"part": "bank", **row})


def fill(lab: Lab, part: str, end: float) -> None:
    """Run the part's cells that nobody has run or begun."""
    tasks = {task.name: task for task in (*lab.bank, *lab.data.new_tasks())}
    whole = not lab.missing()
    done = {cell_of(row) for row in read_rows(CELLS)}
    for cell in cells(lab, part):
        if time.monotonic() > end:
            return
        _, _, task, seed, share, start, iterations, measure = cell
        if cell in done or not (whole or start in (ITERATIVE, UNCUT, *COLD)):
            continue
        claim = CLAIMS / "_".join(str(word).replace(" ", "-").replace("'", "") for word in cell)
        with turn(claim) as ours:
            if not ours or cell in {cell_of(row) for row in read_rows(CELLS)}:
                continue  # another process runs it, or did since we began
            row = lab.run(tasks[task], share, seed, start, iterations, measure)
            append_row(CELLS, {"part": part, **row})
        print(part, lab.network, task, seed, share, start, iterations,
              f"{row['accuracy']:.1f} % in {row['seconds']:.1f} s", flush=True)  # fmt: skip


def cells(lab: Lab, part: str) -> Iterator[Cell]:
    """Yield what a part consists of."""
    yield from {"choose": _choosing, "new": _told, "measures": _measuring}[part](lab)


def _choosing(lab: Lab) -> Iterator[Cell]:
    """Each start on tasks of the library, shortly; then the best ones as long as is told.

    Among these is the best one of the share before, staged. The last round needs the first one
    whole: what another process still runs is waited for by calling again.
    """
    every = lab.bank
    tasks = every[:: len(every) // CHOOSING][:CHOOSING]
    first = [("choose", lab.network, task.name, 0, share, start, SHORT, "leep")
             for share in SHARES for task in tasks for start in CANDIDATES]  # fmt: skip
    yield from first
    rows = read_rows(CELLS)
    if not {*first} <= {cell_of(row) for row in rows}:
        return
    whole = [row for row in rows if not row["start"].startswith(STAGED)]
    best = {share: ranking(whole, lab.network, share, SHORT)[:FINAL] for share in SHARES}
    for before, share in zip((None, *SHARES), SHARES, strict=False):
        finalists = best[share] + ([f"{STAGED}{best[before][0]}"] if before else [])
        for task, start in product(tasks, finalists):
            yield ("choose", lab.network, task.name, 0, share, start, ITERATIONS[share],
                   "leep")  # fmt: skip


def _told(lab: Lab) -> Iterator[Cell]:
    """The new tasks, by seed: first what the targets are of, then every other start.

    The best starts are those that ``choose`` found. Staging is told of one seed; so are, at the
    end, short cold schedules, but where seconds to equal accuracy are. Then come controls: the
    parent itself, and, of one seed and share, compensation of library starts and a longer one of
    the cold start's.
    """
    rows = read_rows(CELLS)
    best = {share: ranking(rows, lab.network, share, ITERATIONS[share])[:1] for share in SHARES}
    short = [(ITERATIVE, SHORT), (ITERATIVE, MIDDLE), (COLD[0], MIDDLE)]
    rounds: list[tuple[int, float, list[tuple[str, int]]]] = []
    for seed in SEEDS:
        for share in SHARES:
            rounds.append((seed, share, [*((start, ITERATIONS[share]) for start in best[share]),
                                         (ITERATIVE, LONG)]))  # fmt: skip
        rounds.append((seed, SECONDS_AT, short))
        for share in SHARES:
            rounds.append((seed, share, [(start, SHORT) for start in STARTS]))
            if seed == SEEDS[0] and share != SHARES[0]:
                rounds.append((seed, share, [(f"{STAGED}generic weights", SHORT)]))
    rounds += [(SEEDS[0], share, short) for share in SHARES if share != SECONDS_AT]
    rounds += [(seed, 1.0, [(UNCUT, SHORT)]) for seed in SEEDS]
    rounds.append((SEEDS[0], SECONDS_AT, [*((start, SHORT) for start in REFITTED),
                                          (COLD[1], MIDDLE), (COLD[1], LONG)]))  # fmt: skip
    told = ((seed, task.name, share, start, iterations) for seed, share, wanted in rounds
            for start, iterations in wanted for task in lab.data.new_tasks())  # fmt: skip
    for seed, name, share, start, iterations in dict.fromkeys(told):
        yield "new", lab.network, name, seed, share, start, iterations, "leep"


def _measuring(lab: Lab) -> Iterator[Cell]:
    """The starts that depend on who is nearest, by each measure and from so many neighbours."""
    starts = ("votes of the nearest", "nearest task's weights")
    for task, measure, start in product(lab.data.new_tasks(), MEASURES, starts):
        yield ("measures", lab.network, task.name, 0, MEASURED_SHARE, start, MEASURED_ITERATIONS,
               measure)  # fmt: skip
    for task, start in product(lab.data.new_tasks(), (*COUNTED, *BY_COUNT)):
        yield ("measures", lab.network, task.name, 0, MEASURED_SHARE, start, MEASURED_ITERATIONS,
               "leep")  # fmt: skip


def cell_of(row: Row) -> Cell:
    """Return which cell a row is of."""
    return (row["part"], row["network"], row["task"], row["seed"], row["share"], row["start"],
            row["iterations"], row["measure"])  # fmt: skip


def quick(network: str) -> None:
    """Run each start once, shortly, from a small library made in haste: does the suite work?"""
    with TemporaryDirectory() as folder:
        _quick(Lab(network, Path(folder), HASTE))


def _quick(lab: Lab) -> None:
    for name in lab.missing():
        lab.make(name)
        print(f"{name}: cut", flush=True)
    task = lab.data.new_tasks()[0]
    for start in (ITERATIVE, *STARTS, f"{STAGED}{CANDIDATES[-1]}"):
        row = lab.run(task, HASTE.shares[-1], 0, start, 10)
        print(f"{start}: {row['accuracy']:.1f} %, MACs {row['macs']:.3f}, {row['seconds']:.1f} s",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
