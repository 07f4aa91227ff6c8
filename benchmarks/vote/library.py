"""The library under load: python benchmarks/vote/library.py [--seconds 60] [--entries 10000]

Eight processes share one library: five add entries, three look for neighbours and load what they
find, and one of the five is killed halfway, whatever it is doing. Afterwards every entry that an
add had returned must be there and whole. Then a library of synthetic entries, shaped as cuts of the
EfficientNet-Lite0 parent are, is asked for neighbours, and they vote.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench
from secateur.core.errors import LibraryError
from secateur.core.plan import GroupCut, PrunePlan
from secateur.core.progress import track
from secateur.vote.ballot import keep_opinion, tally, vote_weights
from secateur.vote.entry import Entry, Facts, TaskMark
from secateur.vote.garbage import collect_garbage
from secateur.vote.library import (
    Library,
    add_entries,
    add_entry,
    find_axes,
    find_entries,
    ids_of_recipe,
    load_entry,
    open_library,
)
from secateur.vote.nearest import nearest
from secateur.vote.similarity import score_cosine
from secateur.vote.store import connect
from suite import Show, exit_status, write_suite

WRITERS, READERS, NEIGHBOURS, BATCH = 5, 3, 5, 500
MEASURE = "score_cosine"
Widths = Mapping[str, int]


def main() -> None:
    """Run both and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--entries", type=int, default=10_000)
    options = parser.parse_args()
    widths = {group.name: group.width for group in Bench(PARENT).groups}
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        load = under_load(Path(scratch) / "shared", widths, options.seconds)
        size = searched(Path(scratch) / "large", widths, options.entries)
    shows = [
        Show(f"entries lost or torn, eight processes for {options.seconds:g} s, one killed",
             0, load["lost"] + load["torn"], "<="),
        Show("an entry of another parent is refused with a reason", 1, size["refused"], ">="),
        Show(f"seconds for nearest and vote among {options.entries} entries",
             1.0, size["seconds"], "<="),
    ]  # fmt: skip
    write_suite("vote_library", "python benchmarks/vote/library.py", [0], [load, size], shows)
    exit_status(shows)


def under_load(root: Path, widths: Widths, seconds: float) -> dict[str, Any]:
    """Let eight processes share a library; return what they did and what is lost or torn."""
    library, spawn = open_library(root), multiprocessing.get_context("spawn")
    ready = spawn.Barrier(WRITERS + READERS + 1)
    said = [root.parent / f"writer{number}" for number in range(WRITERS)]
    writers = [spawn.Process(target=write, args=(root, widths, n, seconds, ready, said[n]))
               for n in range(WRITERS)]  # fmt: skip
    found = spawn.Value("i", 0)
    readers = [spawn.Process(target=read, args=(root, widths, n, seconds, ready, found))
               for n in range(READERS)]  # fmt: skip
    for process in (*writers, *readers):
        process.start()
    ready.wait()
    time.sleep(seconds / 2)
    writers[0].kill()
    for process in (*writers, *readers):
        process.join()
    if [p.exitcode for p in writers] != [-signal.SIGKILL, *[0] * (WRITERS - 1)] or any(
        process.exitcode for process in readers
    ):
        sys.exit("a process failed; see above")
    added = [line for path in said for line in path.read_text().splitlines()]
    there = {listed.id for listed in find_entries(library)}
    torn = sum(not _whole(library, entry) for entry in there)
    damage = collect_garbage(library, older_than_s=0)
    with connect(library.index) as index:
        sound = index.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return {
        "what": "eight processes, one killed", "seconds": seconds, "added": len(added),
        "loaded by readers": found.value, "lost": len({*added} - there),
        "torn": torn + (not sound) + len(damage.missing) + len(damage.altered),
    }  # fmt: skip


def write(root: Path, widths: Widths, number: int, seconds: float, ready: Any, said: Path) -> None:
    """Add entries for that long; what was added is noted once the library has it."""
    library, rng = open_library(root), np.random.default_rng(number)
    with said.open("a", buffering=1) as notes:
        ready.wait()
        end = time.time() + seconds
        while time.time() < end:
            notes.write(add_entry(library, entry_of(widths, rng, weights=True)) + "\n")


def read(root: Path, widths: Widths, number: int, seconds: float, ready: Any, found: Any) -> None:
    """Look for neighbours of made-up tasks and load them for that long."""
    library, rng = open_library(root), np.random.default_rng(100 + number)
    ready.wait()
    end = time.time() + seconds
    while time.time() < end:
        own = entry_of(widths, rng)
        near = nearest(library, own.sketches, own.facts.parent, MEASURE, NEIGHBOURS)
        for neighbour in near.neighbours:
            load_entry(library, neighbour.id)
            with found.get_lock():
                found.value += 1


def searched(root: Path, widths: Widths, entries: int) -> dict[str, Any]:
    """Fill a library, and time one search and vote; return that and the bytes of an entry."""
    library, rng = open_library(root), np.random.default_rng(0)
    for _ in track(range(entries // BATCH), "adding entries", entries // BATCH):
        add_entries(library, [entry_of(widths, rng) for _ in range(BATCH)])
    stranger = entry_of(widths, rng)
    add_entry(library, replace(stranger, facts=replace(stranger.facts, parent="another")))
    own = entry_of(widths, rng)
    start = time.perf_counter()
    known = find_axes(library, own.facts.parent)  # what a plan asks first, and which are its own
    skip = ids_of_recipe(library, own.facts.parent, "this recipe", data=own.facts.data)
    near = nearest(library, own.sketches, own.facts.parent, MEASURE, NEIGHBOURS, skip=skip)
    keeps = [{cut.name: keep_opinion(cut.width, cut.kept)
              for cut in load_entry(library, each.id).plan.cuts}
             for each in near.neighbours]  # fmt: skip
    votes = tally(keeps, vote_weights([each.similarity for each in near.neighbours]))
    seconds = time.perf_counter() - start
    assert votes.keys() == widths.keys() and not known and not skip
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    with_weights = open_library(root.with_name("weights"))
    add_entry(with_weights, entry_of(widths, rng, weights=True))
    heavy = sum(path.stat().st_size for path in with_weights.blobs.rglob("*") if path.is_file())
    shutil.rmtree(root)
    return {
        "what": "search and vote", "entries": len(keeps) and entries, "seconds": seconds,
        "bytes of an entry": size / entries, "bytes of its arrays with weights": heavy,
        "refused": len(near.refused), "why": near.refused[0].why if near.refused else "",
    }  # fmt: skip


def entry_of(widths: Widths, rng: np.random.Generator, *, weights: bool = False) -> Entry:
    """Return a made-up cut to half the width of every group; ``weights``: a square per group."""
    kept = {name: np.sort(rng.permutation(width)[: width // 2 or 1])
            for name, width in widths.items()}  # fmt: skip
    cuts = tuple(GroupCut(name, widths[name], tuple(own.tolist())) for name, own in kept.items())
    plan = PrunePlan(cuts, 1000, 500, 500, 8, "taylor", "cut", {"task": 0.1})
    scores = {"task": {name: rng.random(width) for name, width in widths.items()}}
    facts = Facts("parent", "zoo:net", (TaskMark("task", "depth"),), "data", 0.5)
    state: dict[str, NDArray[np.float32]] = {}
    if weights:
        state = {f"{name}.weight": rng.random((len(own), len(own))).astype(np.float32)
                 for name, own in kept.items()}  # fmt: skip
    return Entry(facts, plan, scores, {MEASURE: score_cosine.sketch(scores)}, state)


def _whole(library: Library, entry: str) -> bool:
    """Say whether an entry loads, its arrays as their digests say."""
    try:
        return load_entry(library, entry).id == entry
    except LibraryError:
        return False


if __name__ == "__main__":
    main()
