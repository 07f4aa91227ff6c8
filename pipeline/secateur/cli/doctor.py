"""``secateur doctor``"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur.cli.options import DeviceOption, JsonOption
from secateur.core.errors import ConnectionLost, DeviceError
from secateur.devices.host import host_facts, library_versions
from secateur.devices.target import load_target, target_names
from secateur.devices.userland import INSTALL_QEMU, QEMU_NAMES

OPTIONAL = {
    "ncnn": ("runtime: ncnn", "pip install 'secateur[ncnn]'"),
    "pnnx": ("runtime: ncnn", "pip install 'secateur[ncnn]'"),
    "h5py": ("official nyu_depth_v2_labeled.mat", "pip install 'secateur[mat]'"),
}


def doctor(
    device: DeviceOption = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="With --device: end what earlier calls left running.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What this machine can build and run, and what is missing, with the command that fixes it.

    With --device: what that device is, whether engines can be built there, and which jobs run.

    Example: secateur doctor
    """
    if device:
        _examine(device, stop, as_json)
        return
    if stop:
        raise DeviceError("--stop ends jobs on a device", hint="name it with --device")
    missing = {
        name: {"for": purpose, "fix": fix}
        for name, (purpose, fix) in OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    }
    if not any(map(shutil.which, QEMU_NAMES)):
        missing[QEMU_NAMES[0]] = {"for": "verify and bench --device emulated", "fix": INSTALL_QEMU}
    targets = {name: list(load_target(name).builds) for name in target_names()}
    data = os.environ.get("SECATEUR_DATA")
    if as_json:
        report = {"host": host_facts(), "versions": library_versions(), "targets": targets,
                  "missing": missing, "SECATEUR_DATA": data}  # fmt: skip
        typer.echo(json.dumps(report, indent=2))
        return
    console = Console()
    host = host_facts()
    console.print(f"{host['cpu']}, {host['logical_cores']} cores, {host['memory_gb']} GB")
    console.print(", ".join(f"{name} {version}" for name, version in library_versions().items()))
    table = Table("target", "can be built")
    for name, builds in targets.items():
        table.add_row(name, ", ".join(builds).replace("engine", "engine (on the device)"))
    console.print(table)
    for name, row in missing.items():
        console.print(f"not installed: {name} ({row['for']}); {row['fix']}", markup=False)
    if not data:
        console.print("SECATEUR_DATA is not set; recipes on real data need it: "
                      "export SECATEUR_DATA=/path/to/data")  # fmt: skip


def _examine(device: str, stop: bool, as_json: bool) -> None:
    """Print what a device is; unknown facts are named as such. ``stop``: end its jobs first."""
    from secateur.devices.connect import connect
    from secateur.devices.probe import target_of
    from secateur.devices.remote_job import stop_jobs
    from secateur.devices.remote_probe import probe, probe_python

    with connect(device) as connection:
        facts, python, problem, stopped = probe(connection), None, None, list[str]()
        try:
            python = probe_python(connection)
            if stop:
                stopped = stop_jobs(connection, python.jobs)
                python = probe_python(connection)
        except ConnectionLost:
            raise
        except DeviceError as error:  # a device without Python is still a device
            problem = error
        name = connection.name
    target = target_of(facts, map(load_target, target_names()))
    report = {"device": name, "target": target.name if target else None, **asdict(facts),
              "python": asdict(python) if python else None,
              "python_problem": str(problem) if problem else None,
              **({"stopped": stopped} if stop else {})}  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report, indent=2, default=sorted))  # a set of CPU features
        return
    table = Table("fact", "value")
    for key, value in report.items():
        none = key in ("python_problem", "stopped")
        shown = ("none" if none else "unknown") if value in (None, (), []) else value
        table.add_row(
            key, escape(shown if isinstance(shown, str) else json.dumps(shown, default=sorted))
        )
    Console().print(table)
