"""What a bundle costs on an emulated Arm CPU: instructions, memory, megabytes on the board.

Nothing here is a latency, and seconds under emulation are not even recorded: they rank models
wrongly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.bundle.manifest import Manifest
from secateur.bundle.read import run_files, weights_sha256
from secateur.core.files import write_json
from secateur.devices.emulated import EMULATED, EmulatedConnection, Needs
from secateur.devices.isa import int8_form
from secateur.devices.userland import Userland
from secateur.flow.emulated import (
    PATIENCE,
    placed,
    prepared_userland,
    read_for_arm,
    stand_in_of,
)
from secateur.flow.verify import own_image

RECORD = "bench-emulated.json"


def bench_emulated(folder: Path, cpu: str = "") -> dict[str, Any]:
    """Count a bundle's instructions, memory and megabytes on an emulated CPU; write ``RECORD``.

    Raises:
        BundleError, VerifyError: the bundle is not whole.
        RuntimeMissing, DeviceError: no userland can be prepared, or the bundle does not run.
    """
    manifest = read_for_arm(folder)
    cpu = cpu or stand_in_of(manifest)
    userland = prepared_userland(manifest.runtime)
    image = own_image(folder)
    with EmulatedConnection(userland, cpu) as connection:
        with placed(connection, folder, manifest, (image,)) as (place, names):
            needs = connection.needs(place, names[0], PATIENCE)
        record = {
            "device": EMULATED,
            "cpu": cpu,
            "isa": sorted(connection.cpu.isa),
            "int8_form": int8_form(connection.cpu.isa),
            "emulator": connection.emulator(),
            "target": manifest.device,
            "precision": manifest.precision,
            "threads": 1,
            "model_sha256": weights_sha256(manifest),
            "instructions": _instructions(needs),
            "process_peak_memory_mb": _megabytes(needs.peak_memory),
            "idle_python_peak_memory_mb": _megabytes(connection.idle_memory),
            "edge_runner": _edge_runner(folder, manifest, userland, needs),
            "note": "instructions are no time: caches, memory and the order of execution are not "
            "modelled; both memories have the emulator's own in them",
        }
    write_json(folder / RECORD, record)
    return record


def _instructions(needs: Needs) -> dict[str, Any]:
    """Return counts; the least of several inferences, as some work comes now and then."""
    if needs.counts is None:
        return {"not_available": needs.uncounted}
    runs = needs.counts.inferences
    return {
        "inference": min(runs),
        "spread": (max(runs) - min(runs)) / min(runs),
        "runs": list(runs),
        "cold_start": needs.counts.cold_start,
    }


def _edge_runner(
    folder: Path, manifest: Manifest, userland: Userland, needs: Needs
) -> dict[str, Any]:
    """Return what has to be on the board beside Python, and its size unpacked.

    A distribution counts where one of its modules was loaded by the run.
    """
    wheels = {
        name: {"version": row["version"], "mb": _megabytes(row["bytes"])}
        for name, row in userland.wheels.items()
        if needs.modules & set(row["imports"])
    }
    counted = sum(userland.wheels[name]["bytes"] for name in wheels)
    bundle = sum((folder / name).stat().st_size for name in run_files(manifest))
    return {
        "python": userland.python.name,
        "wheels": wheels,
        "wheels_mb": _megabytes(counted),
        "bundle_mb": _megabytes(bundle),
        "cold_start_instructions": needs.counts.cold_start if needs.counts else None,
    }


def _megabytes(count: int) -> float:
    return round(count / 1e6, 1)
