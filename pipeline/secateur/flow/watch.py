"""A device while it is measured: power, temperatures, clocks, throttling, power mode, and energy.

The device hands over texts of its own files, before, meanwhile and after; all is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.bench.energy import Energy, Round, summarise_energy
from secateur.core.errors import DeviceError
from secateur.devices.connection import Connection
from secateur.devices.energy import LOOKS, PowerSensors, Spent, integral
from secateur.devices.nvpmodel import CONFIG, STATUS
from secateur.devices.remote_run import ToldPhase
from secateur.devices.telemetry import PATTERNS, Telemetry, parse_telemetry
from secateur.devices.tree import Files, collect_command, parse_collected

ROOT = ""  # where the device's files lie; tests put a recorded tree there
ROUNDS, SETTLE = 5, 0.2
_COUNTERS = {"under_voltage": "under-voltage", "average_over_current": "average over-current",
             "instant_over_current": "over-current"}  # fmt: skip


@dataclass(frozen=True)
class Watch:
    """What a device said of itself before it was measured; ``order`` is what it is to look at."""

    files: Files
    before: Telemetry

    @property
    def order(self) -> dict[str, Any] | None:
        """Return the arguments of ``on_bench.watch``; None where it has nothing worth a look."""
        said = (self.before.module, self.before.gpu, self.before.throttling.now)
        if all(each is None for each in said):
            return None
        patterns = [pattern for pattern in PATTERNS if pattern not in (STATUS, CONFIG)]
        return {"patterns": patterns, "root": ROOT, "rounds": ROUNDS, "settle": SETTLE}


def begin_watch(connection: Connection) -> Watch:
    """Read the device at rest."""
    files = _files(connection)
    return Watch(files, parse_telemetry(files))


def end_watch(
    watch: Watch, connection: Connection, phases: Sequence[ToldPhase]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``bench.json`` says of the device's state, and of energy."""
    after = parse_telemetry(_files(connection))
    busy = [
        parse_telemetry({**watch.files, **look.files})
        for phase in phases
        if phase.phase == "busy"
        for look in phase.looks
    ]
    state = {
        "before": watch.before.to_json(),
        "busy": _summary(busy) if busy else None,
        "after": after.to_json(),
        "notes": list(notes(watch.before, busy, after)),
    }
    return state, _energy(watch, phases, connection.name)


def notes(before: Telemetry, busy: Sequence[Telemetry], after: Telemetry) -> Iterator[str]:
    """Say in sentences what made the device slower than it could be, or its times unsure."""
    readings = [before, *busy, after]
    found = (each.throttling for each in readings)
    held = sorted({name for each in found for name in (each.alerts or ()) + (each.cooling or ())})
    if held:
        yield f"heat held clocks down ({', '.join(held)}): cool the device, or lower its mode"
    for field, words in _COUNTERS.items():
        first, last = (getattr(each.throttling, field) for each in (before, after))
        if first is not None and last is not None and last > first:
            yield f"the supply gave way meanwhile: {words}, {last - first} times"
    if before.mode is not None and before.mode_is_applied is False:
        yield (f"power mode {before.mode.name} is set, but the clocks are not its: restart the "
               "device")  # fmt: skip
    if before.mode_id != after.mode_id:
        yield "the power mode was changed meanwhile"
    if before.gpu is not None and before.gpu.locked is False:
        yield (f"the GPU's clock may move between {before.gpu.min_mhz:g} and "
               f"{before.gpu.max_mhz:g} MHz: `sudo jetson_clocks` holds it")  # fmt: skip


def _files(connection: Connection) -> Files:
    """Bring the files of ``PATTERNS`` as they are now."""
    out = connection.run(collect_command(f"{ROOT}{pattern}" for pattern in PATTERNS)).out
    return {path.removeprefix(ROOT): text for path, text in parse_collected(out).items()}


def _summary(busy: Sequence[Telemetry]) -> dict[str, Any]:
    watts = [each.module.watts for each in busy if each.module]
    hottest = [each.hottest_c for each in busy if each.hottest_c is not None]
    clocks = [each.gpu.mhz for each in busy if each.gpu and each.gpu.mhz is not None]
    throttled = [each.throttling.now for each in busy if each.throttling.now is not None]
    return {
        "power_w": round(float(np.mean(watts)), 3) if watts else None,
        "hottest_c": max(hottest, default=None),
        "gpu_mhz": [min(clocks), max(clocks)] if clocks else None,
        "throttled": any(throttled) if throttled else None,
        "looks": len(busy),
    }


def _energy(watch: Watch, phases: Sequence[ToldPhase], device: str) -> dict[str, Any]:
    module = watch.before.module
    if module is None:
        return {"not_measurable": f"{device} has no sensors of a module's power that are known"}
    try:
        rounds = list(_rounds(watch.files, phases, module.rails))
        return _checked(rounds, module.rails).to_json()
    except DeviceError as error:  # a meter that fails costs its own figure only
        return {"not_measurable": error.message}


def _checked(rounds: list[Round], rails: tuple[str, ...]) -> Energy:
    if len(rounds) < 2:
        raise DeviceError("the device was not watched long enough", hint="bench it again")
    return summarise_energy(rounds, PowerSensors.name, rails)


def _rounds(files: Files, phases: Sequence[ToldPhase], rails: tuple[str, ...]) -> Iterator[Round]:
    """Yield a round per busy phase, each between two idle ones."""
    for first, busy, last in zip(phases[::3], phases[1::3], phases[2::3], strict=False):
        if (first.phase, busy.phase, last.phase) != ("idle", "busy", "idle") or not busy.calls:
            raise DeviceError("the device was idle when it was to work", hint="bench it again")
        spent = [_spent(files, phase, rails) for phase in (first, busy, last)]
        idle = Spent(spent[0].joules + spent[2].joules, spent[0].seconds + spent[2].seconds)
        yield Round(idle, spent[1], busy.calls)


def _spent(files: Files, phase: ToldPhase, rails: tuple[str, ...]) -> Spent:
    """Return what a phase took, from the module's power at each look."""
    looks = []
    for look in phase.looks:
        module = parse_telemetry({**files, **look.files}).module
        if module is not None and module.rails == rails and 0 <= look.at <= phase.seconds:
            looks.append((look.at, module.watts))
    if len(looks) < LOOKS:
        raise DeviceError(
            f"the power sensors ({', '.join(rails)}) answered {len(looks)} times in "
            f"{phase.seconds:.2f} s",
            hint="bench it again",
        )
    return Spent(integral(sorted(looks), 0.0, phase.seconds), phase.seconds)
