"""``secateur verify`` and ``secateur bench``: check and measure a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import DEVICES, JsonOption, teller
from secateur.core.errors import DeviceError, VerifyError
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.flow.verify import VerifyResult

BundleArgument = Annotated[
    Path, typer.Argument(help="The bundle's folder, out/<device>/<precision>.", show_default=False)
]


def verify(
    bundle: BundleArgument,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate only so many images (default: all; emulated: 16)."),
    ] = None,
    device: Annotated[str, typer.Option(help=f"Where to run it: {DEVICES}.")] = "local",
    cpu: Annotated[
        list[str] | None, typer.Option(help="An emulated CPU model; may be given again.")
    ] = None,
    accuracy: Annotated[
        bool,
        typer.Option(
            "--accuracy/--no-accuracy", help="Judge every task; it needs the data of the build."
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Checksums, ONNX parity, and per-task accuracy against max_drop.

    Exit 1 if it falls short, or if its accuracy cannot be judged: where the data of the build are
    not at hand, --no-accuracy checks the rest alone.

    With --device ssh://host, the bundle's own run.py does it there; run it again to resume.
    With --device emulated, that runs on emulated Arm CPUs, against this machine: what differs there
    fails; accuracy is told, and such few images fail no task.

    Example: secateur verify out/x86-64-cpu/fp32
    """
    from secateur.devices.emulated import asked_cpus

    cpus = asked_cpus(device, cpu or [])
    if cpus is not None:
        skipped = _verify_emulated(bundle, cpus, limit, accuracy, as_json)
        if as_json and skipped and accuracy:
            raise typer.Exit(1)
    else:
        result = _verified(bundle, device, limit, accuracy, as_json)
        skipped = result.skipped
        if as_json:
            typer.echo(json.dumps(asdict(result), indent=2))
            if result.failed or (skipped and accuracy):
                raise typer.Exit(1)
        else:
            _print_checked(result, console := Console())
        if result.failed:
            raise VerifyError("; ".join(result.failed), hint="raise the budget, recover longer, or "
                              "allow more with max_drop")  # fmt: skip
        if not as_json and (not skipped or not accuracy):
            good = "the bundle is whole and every task is good enough"
            if result.partial:
                good = "the bundle is whole; max_drop is judged on all images only"
            console.print(skipped or good)
    if skipped and accuracy:
        raise VerifyError(skipped, hint="bring the data of the build here, or give --no-accuracy")


def _print_checked(result: VerifyResult, console: Console) -> None:
    """Print how far each task is off, how good it is, and how sure that is."""
    table = Table("task", "max |difference|", "of range", "change %")
    for task, parity in result.parity.items():
        change = "-"
        if result.change:
            change = f"{result.change.per_task[task]:+.2f}"
        if result.intervals:
            low, high = result.intervals.change_percent[task]
            change += f" ({low:+.2f} to {high:+.2f})"
        table.add_row(task, f"{parity.max_abs_difference:.2e}", f"{parity.relative:.2e}", change)
    console.print(table)
    if result.split:
        console.print(f"accuracy on {result.split}:", highlight=False)
    for task, metrics in (result.accuracy or {}).items():
        said = [f"{name} {value:.4g}" for name, value in metrics.items()]
        if result.intervals:
            ranges = result.intervals.metrics[task].values()
            said = [
                f"{text} ({low:.4g} to {high:.4g})"
                for text, (low, high) in zip(said, ranges, strict=True)
            ]
        console.print(f"{task}: {', '.join(said)}", soft_wrap=True, highlight=False)
    if result.change and result.intervals:
        low, high = result.intervals.delta_t
        how = "parent and cut drawn alike" if result.intervals.paired else "the parent's exact"
        console.print(
            f"ΔT {result.change.mean:+.2f} % ({low:+.2f} to {high:+.2f}); in brackets: 95 % "
            f"intervals, images drawn with replacement, {how}", soft_wrap=True, highlight=False,
        )  # fmt: skip


def _verified(
    bundle: Path, device: str, limit: int | None, accuracy: bool, as_json: bool
) -> VerifyResult:
    if device == "local":
        from secateur.flow.verify import verify as run_verify

        with shown(quiet=as_json):
            return run_verify(bundle, limit=limit, accuracy=accuracy)
    from secateur.flow.remote import verify_on_device

    return verify_on_device(bundle, device, teller(quiet=as_json), limit=limit, accuracy=accuracy)


def _verify_emulated(
    bundle: Path, cpus: Sequence[str], limit: int | None, accuracy: bool, as_json: bool
) -> str:
    """Return why accuracy was not judged, "" where it was."""
    from secateur.cli.emulated import print_verified
    from secateur.flow.emulated import IMAGES, verify_emulated

    with shown(quiet=as_json):
        images = (IMAGES if limit is None else limit) if accuracy else 0
        result = verify_emulated(bundle, cpus, limit=images)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
    else:
        print_verified(result)
    return result.skipped


def bench(
    bundle: BundleArgument,
    device: Annotated[str, typer.Option(help=f"Where to measure: {DEVICES}.")] = "local",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (default: the manifest's).")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also with 1, 2, 4 ... threads, up to all cores.")
    ] = False,
    cpu: Annotated[str | None, typer.Option(help="The emulated CPU model.")] = None,
    trtexec: Annotated[
        bool, typer.Option("--trtexec", help="Over ssh: let TensorRT's trtexec measure, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Latency by the protocol: inference alone, and from image file to decoded answer; energy.

    That is one image after another; offline are batches of images that are all there, as images a
    second. Energy is that of one inference above idle, where this machine tells (RAPL, INA3221).

    On a machine of another kind than the bundle's target nothing is written.
    With --device ssh://host, the bundle's own run.py is measured there; run it again to resume.
    With --device emulated, no latency: instructions, memory and what has to be on the board.

    Example: secateur bench out/x86-64-cpu/fp32 --threads 2
    """
    from secateur.devices.emulated import asked_cpus

    cpus = asked_cpus(device, [cpu] if cpu else [])
    if trtexec and not device.startswith("ssh:"):
        raise DeviceError("--trtexec measures over ssh", hint="give --device ssh://host")
    if cpus is not None:
        if sweep or threads:
            raise DeviceError("instructions are counted of one thread",
                              hint="leave out --sweep and --threads")  # fmt: skip
        _bench_emulated(bundle, cpus, as_json)
        return
    record = _benched(bundle, device, threads, sweep, trtexec, as_json)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        print_bench(record, str(bundle / "bench.json"), Console())


def print_bench(record: Mapping[str, Any], file: str, console: Console) -> None:
    """Print what ``bench`` measured, and every reason to doubt it."""
    console.print(_latency_table(record["latency"]))
    if record["threads_sweep"]:
        console.print(_sweep_table(record["threads_sweep"]))
    for line in _bench_lines(record):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    where = f"written to {file}"
    if record.get("stand_in"):
        where = f"not written: measured on this CPU, not on a {record['target']}"
    console.print(f"{record['runtime']}, {record['threads']} thread(s), {record['host']['cpu']}; "
                  f"{where}", soft_wrap=True)  # fmt: skip


def _latency_table(latency: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a column per way of measuring: a log of 80 characters has room for all figures."""
    rows = list(latency.values())
    table = Table("ms", *latency)
    for name in ("min", "mean", "median"):
        table.add_row(name, *(f"{row[f'{name}_ms']:.3f}" for row in rows))
    for name in rows[0]["percentiles_ms"]:
        table.add_row(name, *(f"{row['percentiles_ms'][name]:.3f}" for row in rows))
    table.add_row("max", *(f"{row['max_ms']:.3f}" for row in rows))
    table.add_row("runs", *(str(row["runs"]) for row in rows))
    table.add_row("variation", *(f"{row['coefficient_of_variation']:.1%}" for row in rows))
    table.add_row("", *("noisy" if row["noisy"] else "" for row in rows))
    return table


def _bench_lines(record: Mapping[str, Any]) -> list[str]:
    """Return why figures are noisy, throughput, memory, energy and the device's state, in lines."""
    from secateur.bench.wording import memory_said

    many = record["offline"]
    lines = [f"{name} is noisy: {remark}" for name, row in
             [*record["latency"].items(), ("offline", many["latency"])]
             for remark in row["remarks"]]  # fmt: skip
    lines += [
        f"{name}: {row['outliers']} of {row['runs']} calls are outliers, which all figures have in"
        for name, row in record["latency"].items()
        if row["outliers"]
    ]
    lines.append(f"offline: {many['images_per_s']:.4g} images a second, {many['batch']} at a time")
    lines.append(f"memory: {memory_said(record['memory_mb'])}")
    lines.append(energy_line(record["energy"]))
    return lines + state_lines(record.get("telemetry")) + opinion_lines(record.get("trtexec"))


def _sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("threads", "ms (median)", "p99", "images a second, offline", "")
    for row in rows:
        table.add_row(
            str(row["threads"]), f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}",
            f"{row['images_per_s']:.4g}", "noisy" if row["noisy"] else "",
        )  # fmt: skip
    return table


def energy_line(found: Mapping[str, Any]) -> str:
    """Return ``bench.json``'s energy in words: the figure with its error, or why there is none."""
    if "not_measurable" in found:
        return f"energy: not measurable here: {found['not_measurable']}"
    figure = f"{found['per_inference_mj']:.3g} ± {found['standard_error_mj']:.2g} mJ per inference"
    if found["within_noise"]:
        figure += ", which is within this meter's noise"
    return (
        f"energy: {figure} above idle (standard error of {found['rounds']} rounds; "
        f"{found['meter']}: {', '.join(found['covers'])}; idle {found['idle_w']:.3g} W, busy "
        f"{found['busy_w']:.3g} W)"
    )


def state_lines(state: Mapping[str, Any] | None) -> list[str]:
    """Return ``bench.json``'s telemetry in words; nothing where the device tells nothing."""
    if state is None:
        return []
    mode, busy, lines = state["before"]["mode"], state["busy"], []
    said = [f"power mode {mode['name']}"] if mode else []
    if busy:
        said += [f"{busy['power_w']:.3g} W"] if busy["power_w"] is not None else []
        said += [f"{busy['hottest_c']:g} °C at most"] if busy["hottest_c"] is not None else []
        said += ["GPU {:g} to {:g} MHz".format(*busy["gpu_mhz"])] if busy["gpu_mhz"] else []
    if said:
        lines.append(f"at work: {', '.join(said)}")
    return lines + [f"note: {note}" for note in state["notes"]]


def opinion_lines(opinion: Mapping[str, Any] | None) -> list[str]:
    """Return ``bench.json``'s second opinion in words, where there is one."""
    if opinion is None:
        return []
    from secateur.flow.second_opinion import said_of

    return said_of(opinion)


def _benched(
    bundle: Path, device: str, threads: int | None, sweep: bool, trtexec: bool, as_json: bool
) -> dict[str, Any]:
    if device == "local":
        from secateur.flow.measure import bench as run_bench

        with shown(quiet=as_json):
            return run_bench(bundle, threads=threads, sweep=sweep)
    from secateur.flow.remote import bench_on_device

    tell = teller(quiet=as_json)
    return bench_on_device(bundle, device, tell, threads=threads, sweep=sweep, trtexec=trtexec)


def _bench_emulated(bundle: Path, cpus: Sequence[str], as_json: bool) -> None:
    from secateur.cli.emulated import print_benched
    from secateur.flow.emulated_bench import RECORD, bench_emulated

    if len(cpus) > 1:
        raise DeviceError(
            f"bench counts on one CPU model, got {', '.join(cpus)}",
            hint="leave --cpu out where --device names one, or call bench for each",
        )
    with shown(quiet=as_json):
        record = bench_emulated(bundle, *cpus)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        print_benched(record, str(bundle / RECORD))
