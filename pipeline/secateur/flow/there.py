"""A build's last part, on the device: its engine, or the bundle run and measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.devices.emulated import EMULATED
from secateur.devices.remote_job import Tell
from secateur.devices.target import load_target
from secateur.flow.emulated_bench import RECORD, bench_emulated
from secateur.flow.engine import check_device, engine_on_device
from secateur.flow.meters import emulated, emulated_cpu
from secateur.flow.ncnn import AUTO, runtimes_of, target_of
from secateur.flow.recipe import Recipe
from secateur.flow.remote import bench_on_device


@dataclass(frozen=True)
class There:
    """What came of it: its name, what it says, and the file that it was written to."""

    key: str
    told: Mapping[str, Any]
    file: Path


def check_there(recipe: Recipe, target_name: str, device: str) -> None:
    """Check that the device can do its part, before any long work.

    Raises:
        DeviceError: it is none of the target's kind, or lacks something.
        RuntimeMissing: nothing can be emulated here.
    """
    target = target_of(recipe, target_name)
    if _is_emulated(device):
        cpu = device.partition(":")[2]
        emulated_cpu(target, cpu)
        if AUTO in (recipe.precision.mode, recipe.runtime):  # it counts, after the long work
            for runtime in runtimes_of(recipe, target):
                with emulated(target, cpu, runtime) as connection:
                    connection.check_counting()
        return
    check_device(target, device, runtimes_of(recipe, target), recipe.engine.dla)


def finish_there(folder: Path, device: str, tell: Tell) -> There:
    """Build the bundle's engine on the device; a CPU's bundle is measured there.

    Raises:
        DeviceError, BuildError, VerifyError: see ``engine_on_device``, ``bench_on_device`` and
            ``bench_emulated``.
        ConnectionLost: the same command again resumes.
    """
    if _is_emulated(device):
        cpu = device.partition(":")[2]
        return There("counted", bench_emulated(folder, cpu), folder / RECORD)
    if load_target(folder.parent.name).engine_runtime:
        engine = engine_on_device(folder, device, tell).model_dump(mode="json")
        return There("engine", engine, folder / "model.engine")
    return There("measured", bench_on_device(folder, device, tell), folder / "bench.json")


def _is_emulated(device: str) -> bool:
    return device.partition(":")[0] == EMULATED
