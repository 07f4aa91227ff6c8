"""What can be said of a cut: its ONNX, parity, accuracy, latency and cost beside the parent's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.bench.latency import Latency, Protocol, measure
from secateur.bundle.manifest import Accuracy, Cost
from secateur.core.model import MultiTaskModel, evaluating, parameter_count
from secateur.data.loading import image_batch, spread
from secateur.devices.target import Target
from secateur.flow.job import Job
from secateur.flow.stages import (
    Cut,
    change,
    exported,
    session_accuracy,
    too_low,
    torch_accuracy,
)
from secateur.lower import Parity, compare_outputs
from secateur.prune import count_macs
from secateur.runtimes.base import Session, runtime_of

PARITY_TOLERANCE = 1e-4  # of each output's range
PARITY_IMAGES = 8


@dataclass(frozen=True)
class Evidence:
    """``onnx`` is the cut's file.

    ``latency`` has "parent" (kept tasks only) and "cut", or is empty where this machine is not of
    the target's kind: a latency is measured there or not at all.
    """

    onnx: Path
    parity: Mapping[str, Parity]
    accuracy: Accuracy
    latency: Mapping[str, Latency]
    cost_parent: Cost
    cost: Cost


def gather_evidence(
    job: Job, cut: Cut, target: Target, protocol: Protocol | None = None
) -> Evidence:
    """Export the cut and its parent, compare, evaluate and time them on the target's runtime.

    Raises:
        BuildError: the model cannot be exported, or ONNX and torch differ.
    """
    files = {
        "parent": exported(job, job.selected, job.parent_key),
        "cut": exported(job, cut.recovered, cut.key),
    }
    runtime = runtime_of(target.runtime)
    sessions = {name: runtime.open_session(path, target.threads) for name, path in files.items()}
    return Evidence(
        onnx=files["cut"],
        parity=_parity(job, cut.recovered, sessions["cut"]),
        accuracy=_accuracy(job, cut, sessions["cut"], files["cut"]),
        latency=_latency(job, sessions, protocol) if target.is_this_machine() else {},
        cost_parent=_cost(job, job.selected, files["parent"]),
        cost=_cost(job, cut.recovered, files["cut"]),
    )


def _parity(job: Job, model: MultiTaskModel, session: Session) -> dict[str, Parity]:
    images = image_batch(job.eval, spread(job.eval, PARITY_IMAGES), job.spec)
    with evaluating(model):
        wanted = {name: tensor.numpy() for name, tensor in model(images).items()}
    return compare_outputs(wanted, session.run(images.numpy()), tolerance=PARITY_TOLERANCE)


def _accuracy(job: Job, cut: Cut, session: Session, onnx: Path) -> Accuracy:
    parent = torch_accuracy(job, job.selected, "accuracy of the parent")
    before = torch_accuracy(job, cut.compensated, "accuracy before recovery")
    shipped = session_accuracy(job, session, onnx, "accuracy of the bundle")
    result = change(job, parent, shipped)
    return Accuracy(
        images=len(job.eval),
        parent=parent,
        before_recovery=before,
        shipped=shipped,
        change_percent=dict(result.per_task),
        delta_t=result.mean,
        delta_t_before_recovery=change(job, parent, before).mean,
        worst_task=result.worst_task,
        too_low=too_low(job, result),
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
