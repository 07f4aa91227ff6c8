"""What can be said of a cut: its ONNX, parity, accuracy, latency and cost beside the parent's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.bench.accuracy import Scores, Sums
from secateur.bench.intervals import bootstrap
from secateur.bench.latency import Latency, Protocol, measure
from secateur.bundle.manifest import Accuracy, AccuracyIntervals, Cost
from secateur.core.model import MultiTaskModel, evaluating, parameter_count
from secateur.data.loading import image_batch, spread
from secateur.devices.target import Target
from secateur.flow.job import Job
from secateur.flow.lowering import Lowered
from secateur.flow.ncnn import NCNN, runnable
from secateur.flow.scoring import session_scores, torch_scores
from secateur.flow.stages import (
    Cut,
    change,
    exported,
    too_low,
    torch_accuracy,
)
from secateur.lower import Parity, compare_outputs
from secateur.prune import count_macs
from secateur.runtimes.base import Session, runtime_of

# Of each output's range, where not 1e-4: ncnn's Winograd convolutions round more.
TOLERANCES = {NCNN: 1e-3}
PARITY_IMAGES = 8


@dataclass(frozen=True)
class Evidence:
    """What was measured of the cut as it ships.

    ``parent_sums`` are each image's part in the parent's accuracy. ``latency`` has "parent" (kept
    tasks only), "cut" and, where that is in a lower precision, "cut_fp32"; it is empty where this
    machine is not of the target's kind: a latency is measured there or not at all.
    """

    parity: Mapping[str, Parity]
    accuracy: Accuracy
    parent_sums: Sums
    latency: Mapping[str, Latency]
    cost_parent: Cost
    cost: Cost


def gather_evidence(
    job: Job, cut: Cut, lowered: Lowered, target: Target, protocol: Protocol | None = None
) -> Evidence:
    """Compare, evaluate and time the lowered cut and its parent on the target's runtime.

    Raises:
        BuildError: the parent cannot be exported, or the cut in fp32 and torch differ.
    """
    parent = runnable(job, job.selected, job.selected_key, target.runtime)
    files = {"parent": parent, "cut": lowered.opened}
    if lowered.opened != lowered.opened_fp32:
        files["cut_fp32"] = lowered.opened_fp32
    runtime = runtime_of(target.runtime)
    sessions = {name: runtime.open_session(path, target.threads) for name, path in files.items()}
    scores = torch_scores(job, job.selected, "accuracy of the parent")
    return Evidence(
        parity=_parity(job, cut.recovered, sessions, TOLERANCES.get(target.runtime, 1e-4)),
        accuracy=_accuracy(job, cut, scores, sessions, files),
        parent_sums=scores.sums,
        latency=_latency(job, sessions, protocol) if target.is_this_machine() else {},
        cost_parent=_cost(job, job.selected, exported(job, job.selected, job.selected_key)),
        cost=_cost(job, cut.recovered, lowered.onnx),
    )


def _parity(
    job: Job, model: MultiTaskModel, sessions: Mapping[str, Session], tolerance: float
) -> dict[str, Parity]:
    """Compare with torch: fp32 must agree, of a lower precision it is said how far it is off."""
    images = image_batch(job.eval, spread(job.eval, PARITY_IMAGES), job.spec)
    with evaluating(model):
        wanted = {name: tensor.numpy() for name, tensor in model(images).items()}
    exact = sessions.get("cut_fp32", sessions["cut"]).run(images.numpy())
    parity = compare_outputs(wanted, exact, tolerance=tolerance)
    if "cut_fp32" not in sessions:
        return parity
    return compare_outputs(wanted, sessions["cut"].run(images.numpy()))


def _accuracy(
    job: Job, cut: Cut, parent: Scores, sessions: Mapping[str, Session], files: Mapping[str, Path]
) -> Accuracy:
    before = torch_accuracy(job, cut.compensated, "accuracy before recovery")
    found = {
        name: session_scores(job, sessions[name], files[name], "accuracy of the bundle")
        for name in files
        if name != "parent"
    }
    shipped = found["cut"]
    result = change(job, parent.metrics, shipped.metrics)
    intervals = bootstrap(job.tasks, shipped, parent)
    return Accuracy(
        images=len(job.eval),
        parent=parent.metrics,
        before_recovery=before,
        pruned=found["cut_fp32"].metrics if "cut_fp32" in found else None,
        shipped=shipped.metrics,
        change_percent=dict(result.per_task),
        delta_t=result.mean,
        delta_t_before_recovery=change(job, parent.metrics, before).mean,
        worst_task=result.worst_task,
        too_low=too_low(job, result),
        intervals=AccuracyIntervals(**intervals.to_json()) if intervals else None,
    )


def _latency(
    job: Job, sessions: Mapping[str, Session], protocol: Protocol | None
) -> dict[str, Latency]:
    image = image_batch(job.eval, [0], job.spec).numpy()
    calls = {name: lambda s=session: s.run(image) for name, session in sessions.items()}
    return measure(calls, protocol)


def _cost(job: Job, model: MultiTaskModel, onnx: Path) -> Cost:
    return Cost(
        macs=count_macs(model, job.example),
        params=parameter_count(model),
        onnx_bytes=onnx.stat().st_size,
    )
