"""The precision and the runtime that ship: the recipe's, or the best that costs no task too much.

Best is the fastest, measured on this machine or on a device; or, on an emulated CPU, what takes the
fewest instructions, which is a proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.bench.latency import Protocol, measure
from secateur.core.errors import DeviceError, RecipeError, SecateurError
from secateur.data.loading import image_batch
from secateur.devices.emulated import EMULATED
from secateur.devices.isa import int8_form
from secateur.devices.remote_job import Tell
from secateur.devices.target import Target
from secateur.flow.forms import count_forms, time_forms
from secateur.flow.job import Job
from secateur.flow.lowering import Lowered, Lowering
from secateur.flow.ncnn import NCNN, NcnnLowering, runtimes_of, with_runtime
from secateur.flow.stages import Cut, too_low
from secateur.lower.quant import Precision
from secateur.runtimes.base import runtime_of

Forms = Mapping[str, Lowered]  # by what they are called


@dataclass(frozen=True)
class Device:
    """Where ``auto`` chooses: "" is this machine, else ``emulated[:CPU]`` or ``ssh://…``."""

    name: str = ""
    tell: Tell = lambda _: None


@dataclass(frozen=True)
class _Judge:
    """What ranks forms: ``costs`` in ``unit``, ``how`` in words."""

    costs: Callable[[Forms], Mapping[str, float]]
    unit: str
    how: str


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


def lower_cut(
    job: Job,
    cut: Cut,
    target: Target,
    protocol: Protocol | None = None,
    device: Device | None = None,
) -> Lowered:
    """Return the cut as it ships, and for ``auto`` why in this precision and for this runtime.

    Raises:
        RecipeError: a pin names nothing in the model.
        CalibrationError: the training images cannot be calibrated on.
        DeviceError: the device does not run a form, or nothing can be counted here.
    """
    mode, runtimes = job.recipe.precision.mode, runtimes_of(job.recipe, target)
    if mode != "auto" and len(runtimes) == 1:
        return _lowering(job, cut, target, runtimes[0]).to(mode)
    judge = _judge(job, target, protocol, device or Device())
    forms, left_out = _made(job, cut, target, runtimes if judge else runtimes[:1], judge)
    lost = {name: too_low(job, form.change) for name, form in forms.items()}
    passing = {name: form for name, form in forms.items() if not lost[name]}
    costs = dict(judge.costs(passing)) if judge and len(passing) > 1 else {}
    chosen, why = _choice(passing, forms, costs, judge, target)
    reasons = [f"{name} was left out: {said}" for name, said in left_out.items()]
    unit = judge.unit if judge else "ms"
    return replace(forms[chosen], choice={
        "chosen": chosen, "why": "; ".join([why, *reasons]),
        ("median_ms" if unit == "ms" else unit.replace(" ", "_")): costs,
        "too_low": {name: list(tasks) for name, tasks in lost.items() if tasks},
        "left_out": left_out,
    })  # fmt: skip


def _made(
    job: Job, cut: Cut, target: Target, runtimes: Sequence[str], judge: _Judge | None
) -> tuple[Forms, dict[str, str]]:
    """Return the forms to choose from, and why others are none of them.

    Raises:
        DeviceError: a device failed, not a form.
        SecateurError: not one can be made.
    """
    forms: dict[str, Lowered] = {}
    left_out: dict[str, str] = {}
    refused: SecateurError | None = None
    for runtime in runtimes:
        lowering = _lowering(job, cut, target, runtime)
        precisions, reasons = _tried(job, with_runtime(target, runtime), judge is not None)
        prefix = "" if len(runtimes) == 1 else f"{runtime} "
        left_out |= {prefix + precision: why for precision, why in reasons.items()}
        for precision in precisions:
            try:
                forms[prefix + precision] = lowering.to(precision)
            except DeviceError:
                raise
            except SecateurError as error:
                left_out[prefix + precision], refused = error.message, error
    if refused and not forms:
        raise refused
    return forms, left_out


def _lowering(job: Job, cut: Cut, target: Target, runtime: str) -> Lowering | NcnnLowering:
    kind = NcnnLowering if runtime == NCNN else Lowering
    return kind(job, cut, with_runtime(target, runtime))


def _tried(
    job: Job, target: Target, judged: bool
) -> tuple[Sequence[Precision], Mapping[Precision, str]]:
    """Return the precisions that a runtime's forms are made in, and why others are not."""
    mode = job.recipe.precision.mode
    if mode != "auto":
        able = mode in target.precisions
        return ([mode], {}) if able else ([], {mode: f"{target.runtime} has none on {target.name}"})
    high = [each for each in target.precisions if each != "int8"]
    if len(high) == len(target.precisions):
        return high, {}
    if target.cpu and target.arch == "aarch64" and int8_form(target.cpu.isa) == "fp32":
        # It takes fewer instructions there, which a count would take for better.
        return high, {"int8": "it is slower on Arm cores without dot product"}
    if not judged:  # the guard need not search
        return high, {"int8": "unmeasured, it may be slower than fp32"}
    return target.precisions, {}


def _judge(job: Job, target: Target, protocol: Protocol | None, device: Device) -> _Judge | None:
    """Return what ranks forms for the target: None where nothing here can."""
    shape = tuple(job.example.shape[1:])
    if target.accelerator == "cpu" and device.name not in ("", "local"):
        return _judge_there(target, device, shape)
    if target.is_this_machine():
        return _Judge(
            lambda forms: _medians(job, forms, target, protocol), "ms",
            "the fastest that passes, measured here",
        )  # fmt: skip
    return None


def _judge_there(target: Target, device: Device, shape: tuple[int, ...]) -> _Judge:
    if device.name.partition(":")[0] == EMULATED:
        cpu = device.name.partition(":")[2]
        how = "the fewest instructions of what passes, on an emulated CPU (no latency)"
        return _Judge(
            lambda forms: count_forms(target, cpu, _opened(forms), shape),
            "million instructions", how,
        )  # fmt: skip
    return _Judge(
        lambda forms: time_forms(target, device.name, device.tell, _opened(forms), shape),
        "ms", f"the fastest that passes, measured on {device.name}",
    )  # fmt: skip


def _opened(forms: Forms) -> dict[str, tuple[str, str]]:
    return {name: (NCNN if form.ncnn else "onnxruntime", str(form.opened))
            for name, form in forms.items()}  # fmt: skip


def _choice(
    passing: Forms, forms: Forms, costs: Mapping[str, float], judge: _Judge | None, target: Target
) -> tuple[str, str]:
    if not passing:
        exact = next((name for name, form in forms.items() if form.precision == "fp32"), None)
        if exact is None:
            return next(iter(forms)), "each form takes a task below its max_drop"
        return exact, "in every precision a task is below its max_drop; fp32 loses nothing more"
    if len(passing) == 1 and len(forms) > 1:
        return next(iter(passing)), "the only one that keeps every task within its max_drop"
    if costs and judge:
        said = ", ".join(f"{name} {cost:.3g} {judge.unit}" for name, cost in costs.items())
        return min(costs, key=lambda name: costs[name]), f"{judge.how}: {said}"
    if judge:
        return next(iter(passing)), "the only one that can be made"
    # TensorRT's fp16 is no slower than its fp32; a CPU's has to be measured.
    low = target.accelerator == "gpu"
    wanted = "fp16" if low else "fp32"
    chosen = next((n for n, f in passing.items() if f.precision == wanted), next(iter(passing)))
    advice = "" if low else "; build with --device ssh://… to measure, or emulated to count"
    return chosen, f"this machine is no {target.name}, and nothing was measured{advice}"


def _medians(job: Job, forms: Forms, target: Target, protocol: Protocol | None) -> dict[str, float]:
    """Return each form's median latency in ms here, the forms taking turns."""
    image = image_batch(job.eval, [0], job.spec).numpy()
    sessions = {
        name: runtime_of(NCNN if form.ncnn else "onnxruntime").open_session(
            form.opened, target.threads
        )
        for name, form in forms.items()
    }
    calls = {name: lambda s=session: s.run(image) for name, session in sessions.items()}
    timed = measure(calls, protocol, "measuring precisions")
    return {name: timed[name].median_ms for name in forms}
