"""``secateur doctor``"""

from __future__ import annotations

import importlib.util
import json
import os

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import JsonOption
from secateur.devices.host import host_facts, library_versions
from secateur.devices.target import load_target, target_names

OPTIONAL = {
    "h5py": ("official nyu_depth_v2_labeled.mat", "pip install 'secateur[mat]'"),
}


def doctor(as_json: JsonOption = False) -> None:
    """What this machine can build and run, and what is missing, with the command that fixes it.

    Example: secateur doctor
    """
    missing = {
        name: {"for": purpose, "fix": fix}
        for name, (purpose, fix) in OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    }
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
