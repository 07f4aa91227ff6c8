"""What ``verify`` and ``bench`` print of a bundle on emulated CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from secateur.flow.emulated import EmulatedVerify


def print_verified(result: EmulatedVerify) -> None:
    """Print one line per CPU model and task."""
    table = Table("CPU", "task", "torch: of range", "here: of range", "equal %", "same class %")
    for run in result.runs:
        for task, agreement in run.against_here.items():
            same = agreement.same_class
            table.add_row(
                run.cpu, task, f"{run.against_torch[task].relative:.2e}",
                f"{agreement.parity.relative:.2e}", f"{100 * agreement.equal:.1f}",
                "-" if same is None else f"{100 * same:.2f}",
            )  # fmt: skip
    console = Console()
    console.print(table)
    accuracies = [("this machine", result.accuracy_here)]
    accuracies += [(run.cpu, run.accuracy) for run in result.runs]
    for where, accuracy in accuracies:
        for task, metrics in (accuracy or {}).items():
            console.print(f"{task} on {where}: {_metrics(metrics)}", soft_wrap=True)
    for run in result.runs:
        console.print(
            f"{run.cpu} has {', '.join(run.isa) or 'no fp16, dotprod or i8mm'}: "
            f"int8 as {run.int8_form}"
        )
    if result.same_bits is not None:
        unequal = [task for task, same in result.same_bits.items() if not same]
        console.print(
            f"not the same bits on all CPU models: {', '.join(unequal)}"
            if unequal
            else "the same bits on all CPU models"
        )
    console.print(f"{result.images} image(s)" + (f"; {result.skipped}" if result.skipped else ""))


def print_benched(record: Mapping[str, Any], file: str) -> None:
    """Print instructions, memory and megabytes; there is no time to print."""
    counts, edge = record["instructions"], record["edge_runner"]
    table = Table("on an emulated CPU", record["cpu"])
    if "not_available" in counts:
        table.add_row("instructions", f"not available: {counts['not_available']}")
    else:
        table.add_row(
            "million instructions per inference",
            f"{counts['inference'] / 1e6:.1f} (spread {100 * counts['spread']:.2f} %)",
        )
        table.add_row("million instructions of a cold start", f"{counts['cold_start'] / 1e6:.0f}")
    table.add_row(
        "peak memory, emulator included",
        f"{record['process_peak_memory_mb']} MB "
        f"(a Python that does nothing: {record['idle_python_peak_memory_mb']})",
    )
    wheels = ", ".join(f"{name} {row['mb']}" for name, row in edge["wheels"].items())
    table.add_row("wheels that have to be there", f"{edge['wheels_mb']} MB: {wheels}")
    table.add_row("the bundle's own files there", f"{edge['bundle_mb']} MB")
    console = Console()
    console.print(table)
    console.print(f"{record['emulator']}; {record['note']}; written to {file}", soft_wrap=True)


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
