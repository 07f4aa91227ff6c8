"""ncnn as the runtime of a build: whether it can be, what it opens, and the cut's forms for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from secateur.core.errors import RecipeError, RuntimeMissing
from secateur.core.model import MultiTaskModel
from secateur.devices.host import library_versions
from secateur.devices.target import Target, load_target
from secateur.flow.job import Job
from secateur.flow.lowering import Lowered, drop_limits
from secateur.flow.ncnn_int8 import to_int8
from secateur.flow.recipe import Recipe
from secateur.flow.stages import (
    Cut,
    change,
    exported,
    session_accuracy,
    torch_accuracy,
)
from secateur.lower.ncnn import WITHOUT, export_ncnn, find_pnnx
from secateur.lower.quant import Precision
from secateur.metrics.delta import Delta
from secateur.runtimes.base import runtime_of

NCNN, AUTO = "ncnn", "auto"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")  # that this version writes


def target_of(recipe: Recipe, name: str) -> Target:
    """Return the target, with the runtime that the recipe asks for.

    Raises:
        DeviceError: there is no such target.
        RecipeError: ncnn cannot run it, or not within a budget of the recipe.
        RuntimeMissing: ncnn or pnnx is not installed.
    """
    target = load_target(name)
    if recipe.runtime not in (None, AUTO):
        target = with_runtime(target, recipe.runtime)
    if target.runtime != NCNN:
        return target
    if target.accelerator != "cpu":
        raise RecipeError(
            f"runtime: {target.name} computes on its GPU, and ncnn runs on CPUs here",
            hint="leave runtime out, or choose a CPU target",
        )
    budget = recipe.prune.budget
    tabled = [key for key in ("latency_ms", "instructions") if getattr(budget, key) is not None]
    if tabled:
        raise RecipeError(
            f"prune.budget.{tabled[0]}: tables are of ONNX Runtime's operators, and the runtime is "
            "ncnn",
            hint="give macs instead, or runtime: onnxruntime",
        )
    find_pnnx()
    runtime_of(NCNN).version()
    return target


def with_runtime(target: Target, runtime: str) -> Target:
    """Return the target with another runtime, and the precisions that it has there."""
    if runtime == target.runtime:
        return target
    able = tuple(each for each in target.precisions if runtime != NCNN or each in PRECISIONS)
    return target.model_copy(update={"runtime": runtime, "precisions": able})


def runtimes_of(recipe: Recipe, target: Target) -> tuple[str, ...]:
    """Return the runtimes that a build of the recipe may ship: with ``auto`` also ncnn.

    It is left out where it is not installed, cannot run there, or a budget is in ONNX Runtime's
    own terms.
    """
    budget = recipe.prune.budget
    tabled = budget.latency_ms is not None or budget.instructions is not None
    if recipe.runtime != AUTO or target.accelerator != "cpu" or tabled:
        return (target.runtime,)
    try:
        find_pnnx()
        runtime_of(NCNN).version()
    except RuntimeMissing:
        return (target.runtime,)
    return target.runtime, NCNN


def runnable(
    job: Job, model: MultiTaskModel, key: str, runtime: str,
    precision: Literal["fp32", "fp16"] = "fp32",
) -> Path:  # fmt: skip
    """Return the file of ``model`` that a runtime opens, made now or found."""
    if runtime != NCNN:
        return exported(job, model, key)
    outputs = [(task.name, task.output) for task in job.tasks]
    version = library_versions().get("pnnx")
    form = precision, WITHOUT[precision], version
    folder = job.cache.folder("ncnn", key, outputs, asdict(job.spec), form)
    path = folder / "model.ncnn.param"
    if not path.exists():
        export_ncnn(model, job.example, path, precision)
    return path


class NcnnLowering:
    """Makes the forms of one cut for ncnn; the ONNX file goes along, in fp32.

    Raises:
        BuildError: ncnn cannot express the model.
    """

    def __init__(self, job: Job, cut: Cut, target: Target) -> None:
        self.job, self.cut, self.target = job, cut, target
        self.parent = torch_accuracy(job, job.selected, "accuracy of the parent")

    def to(self, precision: Precision) -> Lowered:
        """Return the cut in a precision.

        Raises:
            RecipeError: a node is pinned: names are those of the ONNX file.
            BuildError, CalibrationError: see ``ncnn_int8.to_int8``.
        """
        job, model, key = self.job, self.cut.recovered, self.cut.key
        if precision == "int8":
            return self._to_int8()
        low: Literal["fp32", "fp16"] = "fp16" if precision == "fp16" else "fp32"
        onnx = exported(job, model, key)
        exact = runnable(job, model, key, NCNN)
        path = runnable(job, model, key, NCNN, low)
        session = runtime_of(NCNN).open_session(path, self.target.threads)
        metrics = session_accuracy(job, session, path, f"accuracy, ncnn {low}")
        return Lowered(low, onnx, onnx, change(job, self.parent, metrics), ncnn=(path, exact))

    def _to_int8(self) -> Lowered:
        job, model, key = self.job, self.cut.recovered, self.cut.key
        if job.recipe.precision.pin:
            raise RecipeError(
                "precision.pin: its nodes are those of the ONNX file, and the runtime is ncnn",
                hint="leave pin out; what costs a task too much stays in fp32 by itself",
            )
        onnx, exact = exported(job, model, key), runnable(job, model, key, NCNN)

        def judge(path: Path) -> Delta:
            session = runtime_of(NCNN).open_session(path, self.target.threads)
            metrics = session_accuracy(job, session, path, "accuracy, ncnn int8")
            return change(job, self.parent, metrics)

        made = to_int8(job, exact, judge, drop_limits(job, judge(exact)))
        return Lowered("int8", onnx, onnx, made.change, ncnn=(made.path, exact),
                       ncnn_report=made.report)  # fmt: skip
