"""Can a latency be believed: python benchmarks/latency/run.py [--bundle DIR] [--benches 5]

One bundle (of examples/scenes.yaml, unless told otherwise) benched five times, each in a process of
its own: how far the medians differ, and whether what differs is flagged. Then the protocol beside a
plain loop over ``time.perf_counter``, in turns, in sessions opened anew, the ratio taken turn by
turn; and beside ONNX Runtime's own profile of the very same calls, the ratio taken call by call,
since a profile costs time itself (told, too: about seven microseconds a node here). So what else
runs meanwhile is in both of a pair. What the bundle is built for is kept in ``out/latency``: five
minutes the first time, three afterwards. On a busy machine the flags are what is tested.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from secateur.bench.latency import Protocol, measure
from secateur.bundle.read import read_bundle
from secateur.bundle.runner import preprocess
from secateur.bundle.write import CHECK_FILE
from secateur.core.progress import shown, track
from secateur.devices.on_bench import take_samples
from secateur.flow.build import build
from secateur.flow.predict import bundle_session
from secateur.flow.recipe import load_recipe
from suite import Show, exit_status, write_suite

ROOT = Path(__file__).resolve().parents[2]
SPREAD, AGREEMENT = 0.05, 0.03
ROUNDS, RUNS = 30, 60
WARM_UP_MS = 200  # two of the protocol's windows: both ways start as warm
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="default: one is built")
    parser.add_argument("--benches", type=int, default=5)
    options = parser.parse_args()
    with shown():
        folder = options.bundle or built()
        rows = [benched(folder, number) for number in range(options.benches)]
        ways = side_by_side(folder)
    shows = [*repeatability(rows), *agreement(ways)]
    what = {"what": "bundle", "macs": read_bundle(folder).cost.macs}
    told = {"what": "side by side", **{way: statistics.median(ways[way]) for way in ways}}
    command = "python benchmarks/latency/run.py"
    write_suite("latency", command, [0], [what, *rows, told], shows)
    exit_status(shows)


def built() -> Path:
    recipe = load_recipe(ROOT / "examples" / "scenes.yaml")
    return build(recipe, "x86-64-cpu", ROOT / "out" / "latency").folder


def benched(folder: Path, number: int) -> Row:
    """Bench as a user does; return the runtime's call alone."""
    words = [sys.executable, "-m", "secateur", "bench", str(folder), "--json"]
    said = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT)
    record = json.loads(said.stdout)
    row = record["latency"]["host_to_host"]
    return {
        "what": "bench", "number": number + 1, "p50_ms": row["median_ms"],
        "p99_ms": row["percentiles_ms"]["p99"], "runs": row["runs"], "noisy": row["noisy"],
        "remarks": row["remarks"], "outliers": row["outliers"],
        "coefficient_of_variation": row["coefficient_of_variation"],
        "load_1min": record["host"]["load_1min"],
    }  # fmt: skip


def repeatability(rows: Sequence[Row]) -> list[Show]:
    """Claim that medians agree, but for those that were flagged; of all where that leaves none."""
    quiet = [row["p50_ms"] for row in rows if not row["noisy"]]
    which = f"that were not flagged noisy ({len(quiet)} of {len(rows)})"
    if len(quiet) < 2:
        quiet, which = [row["p50_ms"] for row in rows], "(all of them, for they are flagged noisy)"
    apart = (max(quiet) - min(quiet)) / statistics.median(quiet)
    return [Show(f"spread of p50 over the benches of one bundle {which}", SPREAD, apart, "<=")]


def side_by_side(folder: Path) -> dict[str, list[float]]:
    """Return p50 in ms by our protocol, by a plain loop and by ONNX Runtime's profile, each round.

    They take turns, in sessions opened anew; who goes first changes from round to round.
    """
    manifest = read_bundle(folder)
    with np.load(folder / CHECK_FILE, allow_pickle=False) as stored:
        image = preprocess(stored["image"], manifest.input.model_dump())  # type: ignore[no-untyped-call]
    found: dict[str, list[float]] = {}
    for number in track(range(ROUNDS), "three ways in turns", ROUNDS):
        session, plain = bundle_session(folder, manifest, 1), opened(folder / "model.onnx")
        ways = {
            "protocol": partial(by_protocol, partial(session.run, image)),
            "plain loop": partial(plain_loop, plain, image),
        }
        row = {way: ways[way]() for way in sorted(ways, reverse=number % 2 == 1)}
        for way, ms in {**row, **profiled(folder / "model.onnx", image)}.items():
            found.setdefault(way, []).append(ms)
    return found


def by_protocol(call: Callable[[], object]) -> float:
    """Return the median ms of a call by the protocol that every bench uses."""
    return measure({"call": call}, Protocol(WARM_UP_MS / 2, 0, RUNS))["call"].median_ms


def opened(model: Path, profile: str = "") -> onnxruntime.InferenceSession:
    """Open a session as anybody would, with one thread; with ``profile`` it writes one there."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def plain_loop(session: onnxruntime.InferenceSession, image: NDArray[np.float32]) -> float:
    """Return the median ms of calls in the loop that everybody writes."""
    feed = {session.get_inputs()[0].name: image}
    until = time.perf_counter() + WARM_UP_MS / 1000
    while time.perf_counter() < until:
        session.run(None, feed)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(1000 * (time.perf_counter() - start))
    return float(statistics.median(times))


def profiled(model: Path, image: NDArray[np.float32]) -> dict[str, float]:
    """Return the median ms of the same calls by the protocol and by the runtime's own profile.

    ``call by call`` is the median of one call's two times, the protocol's over the profile's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = opened(model, f"{scratch}/profile")
        feed = {session.get_inputs()[0].name: image}
        call = partial(session.run, None, feed)
        samples = take_samples({"call": call}, warmup_ms=100, seconds=0, runs=RUNS)["call"]
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event["dur"] / 1000 for event in events if event["name"] == "model_run"]
    runs = runs[-len(samples) :]  # those before warm up
    pairs = zip(samples, runs, strict=True)
    return {
        "protocol, profiled": statistics.median(samples),
        "runtime's profile": statistics.median(runs),
        "call by call": statistics.median(ours / told for ours, told in pairs),
    }


def agreement(ways: dict[str, list[float]]) -> list[Show]:
    """Claim that the protocol says what the others say of what they timed beside it."""
    turns = zip(ways["protocol"], ways["plain loop"], strict=True)
    ratios = {
        "plain loop": statistics.median(ours / plain for ours, plain in turns),
        "runtime's profile": statistics.median(ways["call by call"]),
    }
    return [
        Show(f"protocol's p50 against {way}, relative difference", AGREEMENT, abs(ratio - 1), "<=")
        for way, ratio in ratios.items()
    ]


if __name__ == "__main__":
    main()
