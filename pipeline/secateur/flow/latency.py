"""Latency as a budget: the table of a recipe's operators, and the limits that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from secateur.bench.profile import Narrowed, measure_table
from secateur.core.channels import ChannelGroup
from secateur.core.errors import DeviceError
from secateur.core.files import file_sha256, value_digest
from secateur.core.model import MultiTaskModel
from secateur.devices.latency_table import LatencyTable, Surface, load_table, save_table
from secateur.devices.operators import Operators
from secateur.devices.target import Precision, Target
from secateur.flow.job import Job
from secateur.flow.meters import Meter, here
from secateur.flow.stages import exported
from secateur.flow.trials import dialect_of
from secateur.lower.operators import list_operators
from secateur.lower.quant import calibrate, emit, plan_quant
from secateur.lower.resized import Resized
from secateur.prune import find_groups
from secateur.prune.costs import layer_widths
from secateur.prune.problem import Limit, PairCost, Term, product

LEAST_SHARE = 0.1  # of a group's channels: what the table reaches down to
# Of a table's host: what another table is of. Older tables do not name the last two.
MEASURED_ON, NAMED = ("cpu", "device", "target", "network"), ("target", "network")
SEEN = 4  # images of noise that int8 ranges are read from
KEY, COUNT_KEY = "prune.budget.latency_ms", "prune.budget.instructions"


def network_operators(job: Job, groups: Sequence[ChannelGroup], file: Path) -> Operators:
    """Return the operators of a ``file`` of the job's outline, by the ``groups`` of that."""
    return list_operators(file, layer_widths(job.outline, groups))


def timed_precision(job: Job) -> Precision:
    """Return what the recipe's plans are timed in: int8 if that is what it builds, else fp32."""
    return "int8" if job.recipe.precision.mode == "int8" else "fp32"


def profile_job(job: Job, target: Target, out: Path, meter: Meter | None = None) -> LatencyTable:
    """Measure the recipe's operators into ``out`` by the meter, of this machine if there is none.

    What ``out`` has is kept. They are those of the precision that plans are timed in.

    Raises:
        DeviceError: this machine is not of the target's kind, or ``out`` is of another runtime.
    """
    used = meter or here(target)
    groups, precision = find_groups(job.selected, job.example), timed_precision(job)
    file = timed_file(job, target)
    network = narrowed(job.selected, groups, file, job.grid(target))
    places = network.operators.places
    return measure_table(
        network,
        lambda models, rounds: used.operators(models, places, rounds),
        replace(_start(used, target, out, precision, _network_digest(network)), scale=1.0),
        partial(save_table, out),
        used.sampling,
    )


def timed_file(
    job: Job, target: Target, model: MultiTaskModel | None = None, key: str = ""
) -> Path:
    """Return a file of the selected model, or of a ``model`` that ``key`` names, to be timed.

    In int8 every node is, with ranges that fit noise: no time depends on them. A guard may leave
    some nodes in fp32.
    """
    fp32 = exported(job, model or job.selected, key or job.selected_key)
    precision = timed_precision(job)
    if precision == "fp32":
        return fp32
    dialect = dialect_of(target)
    path = job.cache.folder("timed", file_sha256(fp32), precision, dialect.mark()) / "model.onnx"
    if not path.exists():
        seen = job.spec.example(SEEN).numpy()
        ranges = calibrate(fp32, lambda: [seen], "minmax")
        emit(fp32, plan_quant(fp32, ranges, {}, default=precision), dialect, path)
    return path


def narrowed(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], file: Path, grid: int
) -> Narrowed:
    """Return the model in ``file`` at any widths on the grid."""
    widths, full = layer_widths(model, groups), [group.width for group in groups]
    steps = [min(group.step(grid), group.width) for group in groups]
    least = [_least(width, step) for width, step in zip(full, steps, strict=True)]
    to = Resized(file, widths, full).to
    return Narrowed(list_operators(file, widths), to, least, full, steps)


def _least(width: int, step: int) -> int:
    """Return the narrowest that a plan would make a group of that width."""
    return min(width, max(1, round(LEAST_SHARE * width / step)) * step)


def _network_digest(network: Narrowed) -> str:
    kinds = [asdict(placed.kind) for placed in network.operators.timed]
    return value_digest([kinds, network.full, network.steps])


def _start(
    meter: Meter, target: Target, out: Path, precision: Precision, network: str
) -> LatencyTable:
    host = {**meter.host, "target": target.name, "network": network}
    if not out.exists():
        return LatencyTable(meter.runtime, meter.threads, host, {}, precision, unit=meter.unit)
    table = load_table(out)
    table.check_runtime(meter.runtime)
    if (table.threads, table.precision, table.unit) != (meter.threads, precision, meter.unit):
        raise DeviceError(
            f"{out} was measured in {table.precision} with {table.threads} threads in "
            f"{table.unit}, wanted are {precision} and the {meter.threads} of {target.name} in "
            f"{meter.unit}",
            hint="give another --out, or remove that file",
        )
    for key in MEASURED_ON:
        then, now = table.host.get(key), host.get(key)
        if then != now and not (then is None and key in NAMED):
            raise DeviceError(
                f"{out} was measured on another {key} ({then or 'none'}, now {now or 'none'})",
                hint="give another --out, or remove that file",
            )
    return table


def latency_limit(operators: Operators, table: LatencyTable, most: float) -> Limit:
    """Return the limit on what the table predicts, in its unit.

    Raises:
        DeviceError: the table lacks an operator, or has holes.
    """
    scale = table.scale / 1000
    timed = [(p, table.surface(p.kind)) for p in operators.timed]
    terms = tuple(
        Term(p.read, p.made, _milliseconds(surface, scale))
        for p, surface in timed
        if surface.takes_time
    )
    name, key = ("latency", KEY) if table.unit == "ms" else ("instructions", COUNT_KEY)
    return Limit(name, most, terms, table.fixed_us * scale, table.unit, key=key)


def _milliseconds(surface: Surface, scale: float) -> PairCost:
    return lambda first, second: scale * surface.table(first, second)


def peak_limits(operators: Operators, most_bytes: int) -> list[Limit]:
    """Return a limit per step of the network on the activations alive then (fp32, one image).

    A step whose activations are all alive at another one too is left out.
    """
    found: dict[frozenset[tuple[object, ...]], Limit] = {}
    sets = [frozenset(live) for live in operators.live]
    for live, key in zip(operators.live, sets, strict=True):
        if key in found or any(key < other for other in sets):
            continue
        terms = tuple(Term(a, b, product(size)) for a, b, size in live)
        found[key] = Limit("peak activations", most_bytes, terms, 0.0, "MB", 1e-6,
                           "prune.budget.peak_memory_mb")  # fmt: skip
    return list(found.values())


def corrected(table: LatencyTable, predicted_ms: float, measured_ms: float) -> LatencyTable:
    """Return the table scaled so that it would have predicted what was measured."""
    return table.scaled(measured_ms / predicted_ms)
