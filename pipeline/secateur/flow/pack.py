"""Put what was made into a bundle: every file first, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from secateur.bench.pictures import contact_sheet, savings_chart
from secateur.bundle.manifest import (
    SCHEMA_VERSION,
    BudgetRecord,
    InputContract,
    Manifest,
    TaskContract,
)
from secateur.bundle.write import (
    drop_outdated,
    file_records,
    folder_lock,
    write_builder,
    write_bundle,
    write_check,
    write_cut,
    write_ncnn,
    write_origin,
    write_parent,
    write_runner,
)
from secateur.core.files import atomic_path, write_json, write_text
from secateur.core.model import MultiTaskModel, evaluating
from secateur.data.loading import has_labels, image_batch, spread
from secateur.data.transforms import image_tensor
from secateur.devices.host import host_facts, library_versions
from secateur.devices.target import Target
from secateur.flow.evidence import Evidence
from secateur.flow.inherited import Origin
from secateur.flow.job import Job
from secateur.flow.lowering import Lowered
from secateur.flow.recovery import learning_rate
from secateur.flow.stages import Cut, plain_image
from secateur.flow.warm_start import Planned
from secateur.lower.export import INPUT_NAME
from secateur.lower.ncnn import weights_file
from secateur.prune import SparsityPlan, surgery_of

SHEET_IMAGES = 6


@dataclass(frozen=True)
class Made:
    """The outcome of a build, before it is packed."""

    target: Target
    planned: Planned
    origin: Origin | None
    cut: Cut
    lowered: Lowered
    evidence: Evidence
    budgets: Mapping[str, BudgetRecord]
    seconds: Mapping[str, float]
    command: str
    zeros: SparsityPlan | None = None


def pack(job: Job, made: Made, folder: Path) -> Manifest:
    """Write the bundle into ``folder`` and return its manifest."""
    with folder_lock(folder):  # another build may write here, too: whole after whole
        return _packed(job, made, folder)


def _packed(job: Job, made: Made, folder: Path) -> Manifest:
    (folder / "manifest.json").unlink(missing_ok=True)  # an older one must not vouch for new files
    drop_outdated(folder, made.lowered.onnx)
    with atomic_path(folder / "model.onnx") as temporary:
        temporary.write_bytes(made.lowered.onnx.read_bytes())
    ncnn = made.lowered.ncnn
    write_ncnn(folder, (ncnn[0], weights_file(ncnn[0])) if ncnn else None)
    quantised = made.lowered.quantised
    origin = quantised.model if quantised else made.lowered.fp32
    write_origin(folder, origin, quantised.to_json() if quantised else None)
    write_json(folder / "plan.json", made.planned.plan.to_json())
    write_text(folder / "recipe.yaml", job.recipe.source)
    surgery = surgery_of(made.planned.scored.groups, made.planned.plan)
    write_cut(folder, made.cut.recovered.network.state_dict(), surgery.to_json())
    write_runner(folder)
    write_parent(folder, made.evidence.parent_sums)
    if made.target.accelerator == "gpu":
        write_builder(folder, job.recipe.engine_options())
    _write_check(job, made.cut.recovered, folder)
    _write_pictures(job, made, folder / "pictures")
    manifest = _manifest(job, made).model_copy(update={"files": file_records(folder)})
    write_bundle(folder, manifest)
    return manifest


def _manifest(job: Job, made: Made) -> Manifest:
    evidence, spec = made.evidence, job.spec
    plan, vote = made.planned.plan.to_json(), made.planned.vote
    summary = {key: value for key, value in plan.items() if key != "cuts"}
    if vote is not None:
        origin = made.origin.to_json() if made.origin else None
        summary["warm_start"] = {**vote.to_json(), "weights": origin}
    unlabelled = [task.name for task in job.tasks if not has_labels(job.train, [task])]
    if unlabelled:
        summary["without_labels"] = unlabelled
    if made.zeros is not None:
        summary["sparsity"] = made.zeros.to_json()
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=made.target.name,
        precision=made.lowered.precision,
        runtime=made.target.runtime,
        threads=made.target.threads,
        input=InputContract(name=INPUT_NAME, **asdict(spec)),
        tasks=_task_contracts(job, made.cut.recovered),
        files={},
        parent={
            "factory": job.recipe.model.factory,
            "fingerprint": job.parent_key,
            "trunk": job.library_key,
            "network": job.network_key,
            "basis": job.library_basis,
        },
        data={
            "train": job.train.fingerprint,
            "eval": job.eval.fingerprint,
            "eval_root": str(job.recipe.data_root(job.recipe.data.eval)),
        },
        plan={**summary, **_recovery(job, made)},
        cost_parent=evidence.cost_parent,
        cost=evidence.cost,
        budgets=dict(made.budgets),
        accuracy=evidence.accuracy,
        parity={
            name: {"max_abs_difference": p.max_abs_difference, "of_range": p.relative}
            for name, p in evidence.parity.items()
        },
        quantisation=dict(report) if (report := _report(made.lowered)) else None,
        precision_choice=dict(choice) if (choice := made.lowered.choice) else None,
        latency_ms={name: result.to_json() for name, result in evidence.latency.items()},
        seconds=dict(made.seconds),
        versions=library_versions(),
        host=host_facts(),
        command=made.command,
        recipe=job.recipe.source,
    )


def _recovery(job: Job, made: Made) -> dict[str, Any]:
    wanted = job.recipe.recover
    inherited = made.origin is not None and made.origin.recovered
    rate = None if wanted == "none" else learning_rate(job, wanted, inherited=inherited)
    return {"recovery_steps": made.cut.steps, "recovery_undone": made.cut.undone,
            "recovery_learning_rate": rate, "joint_refit": made.cut.joint}  # fmt: skip


def _report(lowered: Lowered) -> Mapping[str, Any] | None:
    """Return what is told of a lower precision."""
    return lowered.quantised.report if lowered.quantised else lowered.ncnn_report


def _task_contracts(job: Job, model: MultiTaskModel) -> tuple[TaskContract, ...]:
    with evaluating(model):
        outputs = model(job.example)
    return tuple(
        TaskContract(
            name=task.name,
            kind=task.kind,
            classes=task.classes,
            ignore_index=task.ignore_index,
            max_drop=task.max_drop,
            shape=tuple(outputs[task.name].shape[1:]),
        )
        for task in job.tasks
    )


def _write_check(job: Job, model: MultiTaskModel, folder: Path) -> None:
    """Write one image and the torch model's outputs for it, for `verify` on any machine."""
    image = plain_image(job, 0)
    with evaluating(model):
        outputs = model(image_tensor(image, job.spec)[None])
    write_check(folder, image, {name: tensor.numpy() for name, tensor in outputs.items()})


def _write_pictures(job: Job, made: Made, folder: Path) -> None:
    indices = spread(job.eval, SHEET_IMAGES)
    inputs = [image_batch(job.eval, [i], job.spec) for i in indices]

    def outputs(model: MultiTaskModel) -> list[dict[str, torch.Tensor]]:
        with evaluating(model):
            return [model(image) for image in inputs]

    models = {"parent": outputs(job.selected), "cut": outputs(made.cut.recovered)}
    contact_sheet(folder / "contact_sheet.png", job.eval, indices, job.tasks, job.spec, models)
    evidence = made.evidence
    costs = {"parent": evidence.cost_parent, "cut": evidence.cost}
    before, after = (
        {
            "M MACs": cost.macs / 1e6,
            "M parameters": cost.params / 1e6,
            "MB of ONNX": cost.onnx_bytes / 1e6,
            **({"ms (median)": evidence.latency[name].median_ms} if evidence.latency else {}),
        }
        for name, cost in costs.items()
    )
    savings_chart(folder / "savings.png", before, after)
