"""The whole job, in order. Each line is a stage; the rooms never call one another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.bench.latency import Latency, Protocol, measure
from secateur.bench.pictures import contact_sheet, savings_chart
from secateur.bundle.manifest import (
    SCHEMA_VERSION,
    Accuracy,
    Cost,
    InputContract,
    Manifest,
    TaskContract,
)
from secateur.bundle.write import (
    file_records,
    prepare_folder,
    write_bundle,
    write_check,
    write_runner,
)
from secateur.core.errors import BuildError
from secateur.core.files import atomic_path, write_json, write_text
from secateur.core.model import MultiTaskModel, evaluating, parameter_count
from secateur.core.plan import PrunePlan
from secateur.data.loading import image_batch, spread
from secateur.data.transforms import image_tensor
from secateur.devices.host import host_facts, library_versions
from secateur.devices.target import Target, load_target
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.recipe import Recipe
from secateur.flow.stages import (
    Cut,
    change,
    check_evaluable,
    exported,
    make_cut,
    make_plan,
    plain_image,
    session_accuracy,
    too_low,
    torch_accuracy,
)
from secateur.lower import Parity, compare_outputs
from secateur.lower.export import INPUT_NAME
from secateur.prune import count_macs
from secateur.runtimes.base import Session, runtime_of

PARITY_TOLERANCE = 1e-4  # of each output's range
PARITY_IMAGES = 8
SHEET_IMAGES = 6


@dataclass(frozen=True)
class BuildResult:
    """Where the bundle lies, and its manifest."""

    folder: Path
    manifest: Manifest


def build(
    recipe: Recipe,
    target_name: str,
    out: Path,
    *,
    cache: StageCache | None = None,
    protocol: Protocol | None = None,
    command: str = "",
) -> BuildResult:
    """Cut, lower, measure and bundle one recipe for one target.

    Raises:
        SecateurError: what is wrong, before anything is written to ``out``.
    """
    clock = _Clock()
    target = load_target(target_name)
    job = open_job(recipe, cache or StageCache())
    check_evaluable(job)
    folder = out / target.name / recipe.precision.mode
    prepare_folder(folder)
    clock.lap("load")
    groups, plan = make_plan(job, job.grid(target))
    clock.lap("score_and_plan")
    cut = make_cut(job, groups, plan)
    _check_macs(cut, plan, job)
    clock.lap("cut_compensate_recover")
    files = {
        "parent": exported(job, job.selected, job.parent_key),
        "cut": exported(job, cut.recovered, cut.key),
    }
    clock.lap("export")
    runtime = runtime_of(target.runtime)
    sessions = {name: runtime.open_session(path, target.threads) for name, path in files.items()}
    parity = _parity(job, cut.recovered, sessions["cut"])
    accuracy = _accuracy(job, cut, sessions["cut"], files["cut"])
    clock.lap("accuracy")
    latency = _latency(job, sessions, protocol)
    clock.lap("latency")
    manifest = _manifest(job, target, plan, cut, files, parity, accuracy, latency, clock, command)
    manifest = _write(job, folder, files["cut"], plan, cut, manifest)
    return BuildResult(folder, manifest)


class _Clock:
    """Seconds per stage of this very run (a stage found in the cache takes almost none)."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def _check_macs(cut: Cut, plan: PrunePlan, job: Job) -> None:
    counted = count_macs(cut.recovered, job.example)
    if counted != plan.macs_after:
        raise BuildError(
            f"the cut model has {counted} MACs, the plan said {plan.macs_after}",
            hint="report this with the recipe: the cost model missed a layer",
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


def _cost(model: MultiTaskModel, job: Job, onnx: Path) -> Cost:
    return Cost(
        macs=count_macs(model, job.example),
        params=parameter_count(model),
        onnx_bytes=onnx.stat().st_size,
    )


def _manifest(
    job: Job,
    target: Target,
    plan: PrunePlan,
    cut: Cut,
    files: Mapping[str, Path],
    parity: Mapping[str, Parity],
    accuracy: Accuracy,
    latency: Mapping[str, Latency],
    clock: _Clock,
    command: str,
) -> Manifest:
    with evaluating(cut.recovered):
        shapes = {n: tuple(t.shape[1:]) for n, t in cut.recovered(job.example).items()}
    spec = job.spec
    summary = {key: value for key, value in plan.to_json().items() if key != "cuts"}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=target.name,
        precision=job.recipe.precision.mode,
        runtime=target.runtime,
        threads=target.threads,
        input=InputContract(
            name=INPUT_NAME, channels=spec.channels, height=spec.height, width=spec.width,
            mean=spec.mean, std=spec.std, layout=spec.layout,
        ),
        tasks=tuple(
            TaskContract(
                name=task.name, kind=task.kind, classes=task.classes,
                ignore_index=task.ignore_index, max_drop=task.max_drop, shape=shapes[task.name],
            )
            for task in job.tasks
        ),
        files={},
        parent={"factory": job.recipe.model.factory, "fingerprint": job.parent_key},
        data={
            "train": job.train.fingerprint,
            "eval": job.eval.fingerprint,
            "eval_root": str(job.recipe.data_root(job.recipe.data.eval)),
        },
        plan={**summary, "recovery_steps": cut.steps},
        cost_parent=_cost(job.selected, job, files["parent"]),
        cost=_cost(cut.recovered, job, files["cut"]),
        accuracy=accuracy,
        parity={
            name: {"max_abs_difference": p.max_abs_difference, "of_range": p.relative}
            for name, p in parity.items()
        },
        latency_ms={name: result.to_json() for name, result in latency.items()},
        seconds=clock.seconds,
        versions=library_versions(),
        host=host_facts(),
        command=command,
        recipe=job.recipe.source,
    )  # fmt: skip


def _write(
    job: Job, folder: Path, onnx: Path, plan: PrunePlan, cut: Cut, manifest: Manifest
) -> Manifest:
    """Write every file, the manifest last."""
    (folder / "manifest.json").unlink(missing_ok=True)  # an older one must not vouch for new files
    with atomic_path(folder / "model.onnx") as temporary:
        temporary.write_bytes(onnx.read_bytes())
    write_json(folder / "plan.json", plan.to_json())
    write_text(folder / "recipe.yaml", job.recipe.source)
    write_runner(folder)
    write_check(folder, *_check_pair(job, cut.recovered))
    _write_pictures(job, folder / "pictures", cut, manifest)
    complete = manifest.model_copy(update={"files": file_records(folder)})
    write_bundle(folder, complete)
    return complete


def _check_pair(
    job: Job, model: MultiTaskModel
) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Return one image and the torch model's outputs for it, for `verify` anywhere."""
    image = plain_image(job, 0)
    with evaluating(model):
        outputs = model(image_tensor(image, job.spec)[None])
    return image, {name: tensor.numpy() for name, tensor in outputs.items()}


def _write_pictures(job: Job, folder: Path, cut: Cut, manifest: Manifest) -> None:
    indices = spread(job.eval, SHEET_IMAGES)
    inputs = [image_batch(job.eval, [i], job.spec) for i in indices]

    def outputs(model: MultiTaskModel) -> list[dict[str, torch.Tensor]]:
        with evaluating(model):
            return [model(image) for image in inputs]

    contact_sheet(
        folder / "contact_sheet.png", job.eval, indices, job.tasks, job.spec,
        {"parent": outputs(job.selected), "cut": outputs(cut.recovered)},
    )  # fmt: skip
    savings_chart(
        folder / "savings.png",
        *({
            "M MACs": cost.macs / 1e6,
            "M parameters": cost.params / 1e6,
            "MB of ONNX": cost.onnx_bytes / 1e6,
            "ms (median)": manifest.latency_ms[name]["median_ms"],
        } for name, cost in (("parent", manifest.cost_parent), ("cut", manifest.cost))),
    )  # fmt: skip
