"""``secateur verify`` and ``secateur bench``: check and measure a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import JsonOption
from secateur.core.progress import shown

BundleArgument = Annotated[
    Path, typer.Argument(help="The bundle's folder, out/<device>/<precision>.", show_default=False)
]


def verify(
    bundle: BundleArgument,
    limit: Annotated[int | None, typer.Option(help="Evaluate only so many images.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Checksums, ONNX parity, and per-task accuracy against max_drop; exit 1 if it falls short.

    Example: secateur verify out/x86-64-cpu/fp32
    """
    from secateur.flow.verify import verify as run_verify

    with shown(quiet=as_json):
        result = run_verify(bundle, limit=limit)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    table = Table("task", "max |difference|", "of range", "change %")
    for task, parity in result.parity.items():
        change = f"{result.change.per_task[task]:+.2f}" if result.change else "-"
        table.add_row(task, f"{parity.max_abs_difference:.2e}", f"{parity.relative:.2e}", change)
    console = Console()
    console.print(table)
    console.print(result.skipped or "the bundle is whole and every task is as good as it must be")


def bench(
    bundle: BundleArgument,
    device: Annotated[str, typer.Option(help="Where to measure: local.")] = "local",
    threads: Annotated[int | None, typer.Option(help="Threads (default: the manifest's).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Latency by the protocol: inference alone, and from image file to decoded answer.

    Example: secateur bench out/x86-64-cpu/fp32 --threads 2
    """
    from secateur.flow.measure import bench as run_bench

    with shown(quiet=as_json):
        record = run_bench(bundle, device=device, threads=threads)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    percentiles = list(record["latency"]["host_to_host"]["percentiles_ms"])
    table = Table("ms", "min", "mean", "median", *percentiles, "max", "runs", "CoV")
    for name, row in record["latency"].items():
        table.add_row(
            name, *(f"{row[key]:.2f}" for key in ("min_ms", "mean_ms", "median_ms")),
            *(f"{row['percentiles_ms'][p]:.2f}" for p in percentiles), f"{row['max_ms']:.2f}",
            str(row["runs"]), f"{row['coefficient_of_variation']:.3f}"
            + (" noisy" if row["noisy"] else ""),
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{record['runtime']}, {record['threads']} thread(s), {record['host']['cpu']}; "
                  f"written to {bundle / 'bench.json'}", soft_wrap=True)  # fmt: skip
