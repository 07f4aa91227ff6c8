"""Latency as a budget: the table of a recipe's operators, and the limits that come of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from secateur.bench.estimate import fixed_microseconds, table_estimate
from secateur.bench.latency import Protocol, measure
from secateur.bench.profile import Sampling, demands_of, measure_table
from secateur.core.channels import ChannelGroup
from secateur.core.errors import DeviceError
from secateur.devices.host import host_facts
from secateur.devices.latency_table import LatencyTable, Surface, load_table, save_table
from secateur.devices.operators import Operators
from secateur.devices.target import Target
from secateur.flow.job import Job
from secateur.flow.stages import exported
from secateur.lower.operators import list_operators
from secateur.prune import find_groups
from secateur.prune.costs import layer_widths
from secateur.prune.problem import Limit, PairCost, Term, product
from secateur.runtimes import onnxruntime as measured_runtime

LEAST_SHARE = 0.1  # of a group's channels: what the table reaches down to
ROUNDS = 30  # of each point
WHOLE = Protocol(seconds=1.5)
KEY = "prune.budget.latency_ms"


def network_operators(job: Job, groups: Sequence[ChannelGroup]) -> Operators:
    """Return the operators of the selected model, their widths by ``groups``."""
    onnx = exported(job, job.selected, job.parent_key)
    return list_operators(onnx, layer_widths(job.selected, groups))


def profile_job(job: Job, target: Target, out: Path) -> LatencyTable:
    """Measure the recipe's operators on this machine into ``out``; what it has is kept.

    Raises:
        DeviceError: this machine is not of the target's kind, or ``out`` is of another runtime.
    """
    if target.runtime != "onnxruntime" or target.arch != platform.machine():
        raise DeviceError(
            f"this machine ({platform.machine()}) cannot measure for {target.name} "
            f"({target.arch}, {target.runtime})",
            hint="run `secateur profile` on the device itself",
        )
    groups = find_groups(job.selected, job.example)
    operators = network_operators(job, groups)
    start = _start(target, out)
    full = [group.width for group in groups]
    sampling = Sampling(rounds=ROUNDS, multiple=job.grid(target))
    least = [_least(width, sampling.multiple) for width in full]
    demands = demands_of(
        (p.kind, (p.read(least), p.read(full)), (p.made(least), p.made(full)))
        for p in operators.timed
    )
    table = measure_table(
        demands,
        lambda models, rounds: measured_runtime.kernel_times(models, target.threads, rounds),
        replace(start, scale=1.0),
        partial(save_table, out),
        sampling,
    )
    predicted = table_estimate(operators, table, full).ms
    table = corrected(table, predicted, _parent_ms(job, target))
    save_table(out, table)
    return table


def _parent_ms(job: Job, target: Target) -> float:
    """Return the median time of the whole parent, its reorderings of memory and caches included."""
    session = measured_runtime.open_session(
        exported(job, job.selected, job.parent_key), target.threads
    )
    image = job.example[:1].numpy()
    return measure({"parent": lambda: session.run(image)}, WHOLE)["parent"].median_ms


def _least(width: int, multiple: int) -> int:
    """Return the narrowest that a plan would make a group of that width."""
    return min(width, max(1, round(LEAST_SHARE * width / multiple)) * multiple)


def _start(target: Target, out: Path) -> LatencyTable:
    if out.exists():
        table = load_table(out)
        table.check_runtime(measured_runtime.version())
        if table.threads != target.threads:
            raise DeviceError(
                f"{out} was measured with {table.threads} threads, {target.name} has "
                f"{target.threads}",
                hint="give another --out, or remove that file",
            )
        return table
    per_node, per_run = measured_runtime.overheads(target.threads)
    return LatencyTable(
        measured_runtime.version(), target.threads, host_facts(), {}, per_node, per_run
    )


def latency_limit(operators: Operators, table: LatencyTable, most_ms: float) -> Limit:
    """Return the limit on milliseconds that the table predicts.

    Raises:
        DeviceError: the table lacks an operator, or has holes.
    """
    scale = table.scale / 1000
    terms = tuple(
        Term(p.read, p.made, _milliseconds(table.surface(p.kind), scale)) for p in operators.timed
    )
    fixed = fixed_microseconds(operators, table) * scale
    return Limit("latency", most_ms, terms, fixed, "ms", key=KEY)


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
