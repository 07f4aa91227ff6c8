"""The precision that ships: the recipe's, or the fastest that costs no task too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from secateur.bench.latency import Protocol, measure
from secateur.core.errors import RecipeError
from secateur.data.loading import image_batch
from secateur.devices.target import Target
from secateur.flow.job import Job
from secateur.flow.lowering import Lowered, Lowering
from secateur.flow.ncnn import NCNN, NcnnLowering
from secateur.flow.stages import Cut, too_low
from secateur.lower.quant import Precision
from secateur.runtimes.base import runtime_of


def check_precision(job: Job, target: Target) -> None:
    """Raise when the target does not have the precision that the recipe asks for.

    Raises:
        RecipeError: it does not.
    """
    mode = job.recipe.precision.mode
    if mode != "auto" and mode not in target.precisions:
        raise RecipeError(
            f"precision.mode: {target.name} has {', '.join(target.precisions)} with "
            f"{target.runtime}, got '{mode}'",
            hint="choose one of these, or auto",
        )


def lower_cut(job: Job, cut: Cut, target: Target, protocol: Protocol | None = None) -> Lowered:
    """Return the cut as it ships, and for ``auto`` why in this precision.

    Raises:
        RecipeError: a pin names nothing in the model.
        CalibrationError: the training images cannot be calibrated on.
    """
    lowering = (NcnnLowering if target.runtime == NCNN else Lowering)(job, cut, target)
    if job.recipe.precision.mode != "auto":
        return lowering.to(job.recipe.precision.mode)
    here = target.is_this_machine()
    # Unmeasured, int8 may be slower than fp16 and even than fp32: the guard need not search.
    tried: list[Precision] = [p for p in target.precisions if here or p != "int8"]
    forms = {precision: lowering.to(precision) for precision in tried}
    lost = {precision: too_low(job, form.change) for precision, form in forms.items()}
    passing = {precision: form for precision, form in forms.items() if not lost[precision]}
    times = _medians(job, passing, target, protocol) if here and len(passing) > 1 else {}
    chosen, why = _choice(list(passing), times, target)
    return replace(forms[chosen], choice={
        "chosen": chosen, "why": why, "median_ms": times,
        "too_low": {precision: list(tasks) for precision, tasks in lost.items() if tasks},
    })  # fmt: skip


def _choice(
    passing: list[Precision], times: Mapping[Precision, float], target: Target
) -> tuple[Precision, str]:
    if not passing:
        return "fp32", "in every precision a task is below its max_drop; fp32 loses nothing more"
    if len(passing) == 1:
        return passing[0], "the only precision that keeps every task within its max_drop"
    if times:
        said = ", ".join(f"{precision} {ms:.3g} ms" for precision, ms in times.items())
        return min(times, key=lambda p: times[p]), f"the fastest that passes, measured here: {said}"
    # TensorRT's fp16 is no slower than its fp32; a CPU's has to be measured.
    chosen: Precision = "fp16" if target.accelerator == "gpu" and "fp16" in passing else "fp32"
    return chosen, f"this machine is no {target.name}: int8 is not chosen without measuring it"


def _medians(
    job: Job, forms: Mapping[Precision, Lowered], target: Target, protocol: Protocol | None
) -> dict[Precision, float]:
    """Return each form's median latency in ms, the forms taking turns."""
    runtime = runtime_of(target.runtime)
    image = image_batch(job.eval, [0], job.spec).numpy()
    sessions = {p: runtime.open_session(form.opened, target.threads) for p, form in forms.items()}
    calls = {str(p): lambda s=session: s.run(image) for p, session in sessions.items()}
    timed = measure(calls, protocol, "measuring precisions")
    return {precision: timed[precision].median_ms for precision in forms}
