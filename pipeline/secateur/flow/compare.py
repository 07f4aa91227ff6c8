"""Two bundles, or one bundle's bench.json of two dates, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from secateur.bench.compare import (
    EnergyChange,
    Ratio,
    energy_change,
    ratio_of_medians,
    take_turns,
)
from secateur.bench.latency import Protocol
from secateur.bench.record import BenchRecord, NoEnergy, read_bench
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, read_bundle, weights_sha256
from secateur.core.errors import BundleError
from secateur.devices.target import load_target
from secateur.flow.predict import bundle_session
from secateur.flow.verify import higher_is_better, own_input
from secateur.metrics.delta import delta

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class LatencyChange:
    """Median milliseconds of the runtime's call alone, and B's ratio to A's.

    ``how``: "in turns" on this machine, or "stored" in two bench.json.
    """

    how: Literal["in turns", "stored"]
    a_ms: float
    b_ms: float
    ratio: Ratio
    verdict: str


@dataclass(frozen=True)
class TaskChange:
    """A task's metrics in A and B, and the mean signed change in percent; higher is better."""

    a: Metrics
    b: Metrics
    change_percent: float


@dataclass(frozen=True)
class CostChange:
    """One of "MACs", "parameters", "ONNX bytes" in A and B."""

    name: str
    a: int
    b: int


@dataclass(frozen=True)
class Comparison:
    """``latency`` and ``energy`` are None and ``tasks`` empty where ``notes`` say why.

    ``regressions`` say in words what got worse by more than is allowed.
    """

    latency: LatencyChange | None
    energy: EnergyChange | None
    tasks: Mapping[str, TaskChange]
    costs: tuple[CostChange, ...]
    notes: tuple[str, ...]
    regressions: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    path: Path
    manifest: Manifest | None
    bench: BenchRecord | None


def compare(
    a: Path,
    b: Path,
    *,
    threshold: float = 5.0,
    max_drop: float = 1.0,
    protocol: Protocol | None = None,
) -> Comparison:
    """Compare B with A; each is a bundle's folder or a ``bench.json``.

    Two bundles for a machine like this one are run in turns here; else what is stored is compared,
    if it was measured on the same kind of CPU.
    ``threshold``: how much slower or hungrier, and ``max_drop``: how much worse per task, in
    percent, is no regression yet.

    Raises:
        BundleError, VerifyError: one of them cannot be read, or is not whole.
        DeviceError: a bundle is for a target that is not known.
    """
    sides, notes = (_open(a), _open(b)), list[str]()
    latency = _in_turns(*sides, protocol) or _stored(*sides, notes)
    energy = _energy(*sides, notes)
    tasks = _tasks(*sides, notes)
    return Comparison(
        latency,
        energy,
        tasks,
        _costs(*sides),
        tuple(notes),
        (
            *_lost_tasks(*sides),
            *_regressions(latency, energy, tasks, threshold, max_drop),
        ),
    )


def _open(path: Path) -> _Side:
    if path.is_file() and path.name != "manifest.json":
        return _Side(path, None, read_bench(path))
    folder = path.parent if path.is_file() else path
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    stored = folder / "bench.json"
    return _Side(folder, manifest, read_bench(stored) if stored.is_file() else None)


def _in_turns(a: _Side, b: _Side, protocol: Protocol | None) -> LatencyChange | None:
    """Measure both here, or return None where this machine is not of both targets' kind."""
    if a.manifest is None or b.manifest is None:
        return None
    if not all(load_target(m.device).is_this_machine() for m in (a.manifest, b.manifest)):
        return None
    calls = _call(a.path, a.manifest), _call(b.path, b.manifest)
    return _change("in turns", *take_turns(*calls, protocol))


def _call(folder: Path, manifest: Manifest) -> Callable[[], object]:
    """Return one inference of a bundle, on the image it brings."""
    session = bundle_session(folder, manifest)
    inputs = own_input(folder, manifest)
    return lambda: session.run(inputs)


def _stored(a: _Side, b: _Side, notes: list[str]) -> LatencyChange | None:
    medians = []
    for side in (a, b):
        if side.bench is None:
            notes.append(
                f"latency is not compared: {side.path} has no bench.json, and this machine is not "
                "the one it is for; run `secateur bench` there"
            )
            return None
        row = side.bench.latency.get("host_to_host")
        if row is None or not row.block_medians_ms:
            notes.append(
                f"latency is not compared: the bench.json of {side.path} is of an older version "
                "and does not say how much its medians vary; bench it again"
            )
            return None
        if row.noisy:
            notes.append(f"{side.path} was benched on a noisy machine")
        if side.manifest is not None and not _is_of(side.bench, side.manifest):
            raise BundleError(
                f"{side.path / 'bench.json'} was measured on another model than the bundle's",
                hint="run `secateur bench` on it again",
            )
        medians.append(np.array(row.block_medians_ms))
    if a.bench is not None and b.bench is not None:
        notes += _different(a.bench, b.bench)
        if a.bench.host.cpu != b.bench.host.cpu:
            notes.append("latency is not compared: it is of different machines")
            return None
    notes.append("the latencies were measured at two times: what the machine did in between counts")
    return _change("stored", *medians)


def _is_of(bench: BenchRecord, manifest: Manifest) -> bool:
    return bench.model_sha256 == weights_sha256(manifest)


def _different(a: BenchRecord, b: BenchRecord) -> list[str]:
    """Say in which conditions two benches differ."""
    pairs = (
        ("targets", a.target, b.target),
        ("machines", a.host.cpu, b.host.cpu),
        ("devices", a.device, b.device),
        ("runtimes", a.runtime, b.runtime),
        ("numbers of threads", a.threads, b.threads),
    )
    return [f"different {what}: A {x}, B {y}" for what, x, y in pairs if x != y]


def _change(how: Literal["in turns", "stored"], a: np.ndarray, b: np.ndarray) -> LatencyChange:
    ratio = ratio_of_medians(a, b, paired=how == "in turns")
    return LatencyChange(how, float(np.median(a)), float(np.median(b)), ratio, ratio.verdict)


def _energy(a: _Side, b: _Side, notes: list[str]) -> EnergyChange | None:
    """Compare what two bench.json tell of energy; where neither was benched, nothing is said."""
    if a.bench is None and b.bench is None:
        return None
    rows = []
    for side in (a, b):
        found = side.bench.energy if side.bench else None
        if side.bench is None:
            why = f"{side.path} has no bench.json"
        elif side.manifest is not None and not _is_of(side.bench, side.manifest):
            why = f"the bench.json of {side.path} was measured on another model"
        elif isinstance(found, NoEnergy):
            why = f"not measurable where {side.path} was benched ({found.not_measurable})"
        elif found is None:
            why = f"the bench.json of {side.path} says nothing of it; bench it again"
        else:
            rows.append(found)
            continue
        notes.append(f"energy is not compared: {why}")
        return None
    first, second = rows
    if first.source != second.source or _machine(a) != _machine(b):
        notes.append(
            f"energy is not compared: A was measured by {first.source} on {_machine(a)}, "
            f"B by {second.source} on {_machine(b)}"
        )
        return None
    return energy_change(first, second)


def _machine(side: _Side) -> str:
    return side.bench.host.cpu if side.bench else "unknown"


def _tasks(a: _Side, b: _Side, notes: list[str]) -> dict[str, TaskChange]:
    if a.manifest is None or b.manifest is None:
        notes.append("accuracy is not compared: a bench.json has none; give the bundles' folders")
        return {}
    before, after = a.manifest.accuracy.shipped, b.manifest.accuracy.shipped
    for name, here, there in (("A", before, after), ("B", after, before)):
        if only := sorted(here.keys() - there.keys()):
            notes.append(f"only {name} has {', '.join(only)}")
    if a.manifest.data.get("eval") != b.manifest.data.get("eval"):
        notes.append("accuracy is not compared: A and B were evaluated on different images")
        return {}
    common = [task for task in before if task in after]
    higher = higher_is_better(a.manifest)
    change = delta(before, {t: after[t] for t in common}, {t: higher[t] for t in common})
    return {t: TaskChange(before[t], after[t], change.per_task[t]) for t in common}


def _costs(a: _Side, b: _Side) -> tuple[CostChange, ...]:
    if a.manifest is None or b.manifest is None:
        return ()
    x, y = a.manifest.cost, b.manifest.cost
    return (
        CostChange("MACs", x.macs, y.macs),
        CostChange("parameters", x.params, y.params),
        CostChange("ONNX bytes", x.onnx_bytes, y.onnx_bytes),
    )


def _lost_tasks(a: _Side, b: _Side) -> list[str]:
    if a.manifest is None or b.manifest is None:
        return []
    lost = {task.name for task in a.manifest.tasks} - {task.name for task in b.manifest.tasks}
    return [f"B lacks {', '.join(sorted(lost))}"] if lost else []


def _regressions(
    latency: LatencyChange | None,
    energy: EnergyChange | None,
    tasks: Mapping[str, TaskChange],
    threshold: float,
    max_drop: float,
) -> list[str]:
    found = []
    if latency is not None and latency.ratio.exceeds(threshold):
        slower = 100 * (latency.ratio.value - 1)
        found.append(f"B is {slower:.1f} % slower than A, allowed {threshold:g} %")
    if energy is not None and energy.exceeds(threshold):
        found.append(
            f"B takes {energy.b_mj:.3g} mJ per inference, A {energy.a_mj:.3g} mJ, allowed "
            f"{threshold:g} % more"
        )
    for name, task in tasks.items():
        if not task.change_percent >= -max_drop:  # not a number is a regression too
            found.append(
                f"task '{name}' changed by {task.change_percent:+.2f} %, allowed {-max_drop:g} %"
            )
    return found
