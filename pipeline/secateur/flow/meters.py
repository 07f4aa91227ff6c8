"""What measures networks for a latency table: this machine, a device over ssh, an emulated CPU.

The emulated one counts instructions: a proxy where no board is attached, and never called latency.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from secateur.bench.profile import Sampling
from secateur.core.errors import DeviceError
from secateur.core.files import value_digest
from secateur.devices import on_profile
from secateur.devices.connect import connect
from secateur.devices.emulated import EMULATED, EmulatedConnection, pick_cpu
from secateur.devices.host import host_facts
from secateur.devices.latency_table import Unit
from secateur.devices.profiled import NetworkTimes, by_place, read_networks
from secateur.devices.remote_job import Tell
from secateur.devices.remote_probe import check_modules, probe_python
from secateur.devices.remote_run import LONGEST_RESULT, RemoteBundle, Work, bundle_on_device
from secateur.devices.target import Target
from secateur.devices.userland import find_qemu
from secateur.flow.cache import StageCache
from secateur.flow.emulated import PATIENCE, prepared_userland
from secateur.flow.engine import check_fits
from secateur.runtimes import onnxruntime as measured_runtime

RUNTIME = "onnxruntime"
SAMPLING = Sampling()
# A count is the same every time: one run of each network, fewer networks.
COUNTING = Sampling(rounds=1, fewest=4, most=8, tolerance=0.02)

Operators = Callable[[Sequence[bytes], Mapping[str, str], int], Sequence[NetworkTimes]]
"""Models, their operators' places by name, and rounds -> what each operator takes."""


@dataclass(frozen=True)
class Meter:
    """``runtime`` (name and version), ``host`` and ``threads`` go into the table, as ``unit``."""

    operators: Operators
    runtime: str
    host: Mapping[str, Any]
    threads: int
    sampling: Sampling
    unit: Unit = "ms"


@contextmanager
def meter_of(target: Target, device: str, tell: Tell, cpu: str = "") -> Iterator[Meter]:
    """Yield what measures for a target: ``local``, ``ssh://…`` or ``emulated``.

    Raises:
        DeviceError: the device cannot stand for the target, or lacks something.
        RuntimeMissing: nothing can be emulated here.
    """
    _check_cpu(target)
    if target.runtime != RUNTIME:
        raise DeviceError(
            f"tables are of ONNX Runtime's operators, and the runtime of {target.name} is "
            f"{target.runtime}",
            hint="choose a target with onnxruntime",
        )
    if device == EMULATED:
        with emulated(target, cpu) as connection:
            yield counting(target, connection)
    elif device == "local":
        yield here(target)
    else:
        with _on_board(target, device, tell) as meter:
            yield meter


def here(target: Target) -> Meter:
    """Return the meter of this machine.

    Raises:
        DeviceError: it is not of the target's kind.
    """
    _check_cpu(target)
    if target.arch != platform.machine():
        emulated_too = " or emulated" if target.stand_in else ""
        raise DeviceError(
            f"this machine ({platform.machine()}) cannot measure for {target.name} "
            f"({target.arch}, {target.runtime})",
            hint="run `secateur profile` on the device itself, or with --device "
            f"ssh://[user@]host{emulated_too}",
        )
    return Meter(
        lambda models, places, rounds: measured_runtime.network_times(
            models, places, target.threads, rounds
        ),
        measured_runtime.version(), host_facts(), target.threads, SAMPLING,
    )  # fmt: skip


def _check_cpu(target: Target) -> None:
    if target.accelerator != "cpu":
        raise DeviceError(
            f"tables are of operators on a CPU, and {target.name} computes on its GPU",
            hint="plan by macs or params; `secateur bench --device ssh://…` measures the engine",
        )


def counting(target: Target, connection: EmulatedConnection) -> Meter:
    """Return the meter that counts instructions on an emulated CPU."""
    known: dict[str, NetworkTimes] = {}  # the parent comes with every batch

    def operators(
        models: Sequence[bytes], places: Mapping[str, str], rounds: int
    ) -> list[NetworkTimes]:
        keys = [value_digest([model.hex(), dict(places)]) for model in models]
        new = {key: model for key, model in zip(keys, models, strict=True) if key not in known}
        with tempfile.TemporaryDirectory() as scratch:
            files = _written(Path(scratch), list(new.values()))
            if new:
                found = connection.count("count_operators", files, PATIENCE).operators(places)
                known.update(zip(new, found, strict=True))
        return [known[key] for key in keys]

    host = {"cpu": connection.name, "emulator": connection.emulator(), "target": target.name}
    return Meter(operators, measured_runtime.version(), host, 1, COUNTING, "million instructions")


@contextmanager
def emulated(target: Target, cpu: str = "", runtime: str = RUNTIME) -> Iterator[EmulatedConnection]:
    """Yield the emulated CPU that stands in for a target, or the one that is asked for.

    Raises:
        DeviceError: the target has no stand-in, or nothing runs on it.
        RuntimeMissing: the emulator or apt is missing here.
    """
    model = emulated_cpu(target, cpu)
    with EmulatedConnection(prepared_userland(runtime), model) as connection:
        yield connection


def emulated_cpu(target: Target, cpu: str = "") -> str:
    """Return the CPU model that this machine's QEMU takes for a target, or for the one asked for.

    Raises:
        DeviceError: the target has no stand-in, or this QEMU has no such CPU.
        RuntimeMissing: there is no QEMU here.
    """
    if target.stand_in is None:
        raise DeviceError(
            f"no emulated CPU stands in for {target.name}",
            hint="give an Arm CPU as the target (`secateur targets`), or leave out --device and "
            "prune.budget.instructions, whichever is given",
        )
    return pick_cpu(find_qemu(), (cpu,) if cpu else target.stand_in.qemu_cpus)


@contextmanager
def _on_board(target: Target, device: str, tell: Tell) -> Iterator[Meter]:
    with connect(device) as connection:
        facts = check_fits(target, connection)
        python = probe_python(connection, ["numpy", RUNTIME])
        check_modules(python, connection.name)
        desk = StageCache().folder("on-device", connection.name, "profile", target.name)
        agent = Path(on_profile.__file__)
        with bundle_on_device(connection, {}, desk, tell, agent) as board:
            host = {"cpu": facts.cpu.name if facts.cpu else None, "arch": facts.arch,
                    "model": facts.model, "device": connection.name}  # fmt: skip
            yield Meter(
                partial(_there, board, connection.name, target.threads),
                f"{RUNTIME} {python.modules[RUNTIME]}", host, target.threads, SAMPLING,
            )  # fmt: skip


def _there(
    board: RemoteBundle, name: str, threads: int, models: Sequence[bytes],
    places: Mapping[str, str], rounds: int,
) -> list[NetworkTimes]:  # fmt: skip
    """Measure operators on a device."""
    with tempfile.TemporaryDirectory() as scratch:
        files = _written(Path(scratch), models)
        order = {"models": list(files), "threads": threads, "rounds": rounds,
                 "warm_up": measured_runtime.WARM_UP}  # fmt: skip
        result = board.perform(Work("operators", order, files, LONGEST_RESULT))
        told = read_networks(result, name, len(models))
    return [by_place(network, places) for network in told]


def _written(folder: Path, models: Sequence[bytes]) -> dict[str, Path]:
    files = {f"model{number}.onnx": folder / f"model{number}.onnx"
             for number in range(len(models))}  # fmt: skip
    for path, model in zip(files.values(), models, strict=True):
        path.write_bytes(model)
    return files
