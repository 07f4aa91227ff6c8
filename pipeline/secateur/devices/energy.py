"""Joules that a piece of work takes, from the counters or sensors that this machine has.

* powercap counters (RAPL, Intel and AMD): microjoules since some time, wrapping at
  ``max_energy_range_uj`` (https://docs.kernel.org/power/powercap/powercap.html); ``energy_uj`` is
  for root only since Linux 5.10 (CVE-2020-8694);
* INA3221 and INA238 sensors of Jetson modules, as ``telemetry`` reads them: watts now, added up
  over time by the trapezoidal rule. JetPack 5 and 6 number and spell the rails differently; which
  of them make up the module is decided in ``telemetry.module_power``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from secateur.core.errors import DeviceError
from secateur.devices.telemetry import module_power, power_rails
from secateur.devices.tree import Files, collect, matching, number, read_text

ZONES = "sys/class/powercap"
_NAMES = (f"/{ZONES}/*/name", f"/{ZONES}/*/max_energy_range_uj")
_ZONE = rf"/{ZONES}/((intel-rapl(?:-mmio)?):\d{{1,3}}(?::\d{{1,3}})?)/name"
_PACKAGE = re.compile(r"package-\d{1,3}(?:-die-\d{1,3})?", re.ASCII)
_HWMON = tuple(
    f"/sys/class/hwmon/hwmon*/{name}"
    for name in ("name", "in*_label", "in*_input", "curr*_input", "power*_input")
)
_READING = re.compile(r"/(?:(?:in|curr)[123]|power1)_input$", re.ASCII)
EVERY = 0.02  # seconds between two looks at a sensor
LOOKS = 3  # fewer within a measurement say nothing


@dataclass(frozen=True)
class Spent:
    """What a piece of work took: joules of everything the meter covers, and seconds."""

    joules: float
    seconds: float

    @property
    def watts(self) -> float:
        """The mean power."""
        return self.joules / self.seconds


class Meter(Protocol):
    """Something that tells energy: ``name`` of its source, and what parts it ``covers``."""

    name: str
    covers: tuple[str, ...]

    def spent_by(self, work: Callable[[], object]) -> Spent:
        """Run ``work`` and return what was spent meanwhile, by it and by all else.

        Raises:
            DeviceError: the meter stopped answering.
        """
        ...


@dataclass(frozen=True)
class NotMeasurable:
    """Why this machine tells no energy, in a sentence."""

    reason: str


def find_meter(root: Path = Path("/")) -> Meter | NotMeasurable:
    """Return what tells the energy of this machine, or of a recorded tree under ``root``.

    A module's own sensors come first: where there are both, they cover more.
    """
    files = collect(_HWMON, root)
    rails = power_rails(files)
    module = module_power(rails)
    if module is not None:
        return PowerSensors(root, files, module.rails)
    counters = _counters(root)
    if isinstance(counters, NotMeasurable) and rails:
        return NotMeasurable(
            f"the sensors' rails {', '.join(sorted(rails))} are not known to add up to a module's "
            f"power; {counters.reason}"
        )
    return counters


# Counters


@dataclass(frozen=True)
class Zone:
    """A powercap zone: where it lies, what it is called, and where its counter wraps (uJ)."""

    folder: Path
    name: str
    range_uj: float


class EnergyCounters:
    """Powercap zones, read before and after."""

    name = "powercap (RAPL)"

    def __init__(self, zones: tuple[Zone, ...]) -> None:
        self.zones = zones
        self.covers = tuple(zone.name for zone in zones)

    def spent_by(self, work: Callable[[], object]) -> Spent:
        """Return by how much the counters grew while ``work`` ran."""
        start, before = time.perf_counter(), self._read()
        work()
        after, end = self._read(), time.perf_counter()
        joules = sum(growth(before[zone], after[zone], zone.range_uj) / 1e6 for zone in self.zones)
        return Spent(joules, end - start)

    def _read(self) -> Mapping[Zone, float]:
        counts = {}
        for zone in self.zones:
            count = number(read_text(zone.folder / "energy_uj"))
            if count is None:
                raise DeviceError(
                    f"{zone.folder / 'energy_uj'} gave no number while it was measured",
                    hint="run `secateur bench` again",
                )
            counts[zone] = count
        return counts


def growth(before: float, after: float, wraps_at: float) -> float:
    """Return how far a counter went that starts again at 0 after ``wraps_at``, at most once."""
    return after - before if after >= before else after - before + wraps_at


def _counters(root: Path) -> EnergyCounters | NotMeasurable:
    """Return the zones of all packages and of their memory; parts of a package are in it."""
    files = collect(_NAMES, root)
    named = [(match, name) for match, name in matching(files, _ZONE)]
    # The same counters again, over memory-mapped registers.
    drivers = {match.group(2) for match, _ in named}
    driver = "intel-rapl" if "intel-rapl" in drivers else "intel-rapl-mmio"
    wanted = [
        (match.group(1), name)
        for match, name in named
        if match.group(2) == driver and (_PACKAGE.fullmatch(name) or name == "dram")
    ]
    if not any(_PACKAGE.fullmatch(name) for _, name in wanted):
        return NotMeasurable(
            f"there is no counter of energy in /{ZONES}, and no sensor of power that is known"
        )
    zones = []
    for zone, name in wanted:
        folder = root / ZONES / zone
        wraps_at = number(files.get(f"/{ZONES}/{zone}/max_energy_range_uj"))
        trouble = _trouble(folder / "energy_uj", f"/{ZONES}/{zone}/energy_uj", wraps_at)
        if trouble or wraps_at is None:
            return NotMeasurable(trouble)
        above = files.get(f"/{ZONES}/{zone.rpartition(':')[0]}/name", "")
        zones.append(Zone(folder, f"{above} {name}" if name == "dram" else name, wraps_at))
    return EnergyCounters(tuple(zones))


def _trouble(path: Path, shown: str, wraps_at: float | None) -> str:
    """Return why a counter cannot be used; "" where it can."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except PermissionError:
        return f"{shown} is for root only: sudo chmod a+r {shown}, or run as root"
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"
    if number(text) is None:
        return f"{shown} holds no number"
    return "" if wraps_at else f"{shown} does not say where it wraps (max_energy_range_uj)"


# Sensors


class PowerSensors:
    """A module's power, looked at again and again from a thread of its own."""

    name = "INA3221 sensors"

    def __init__(self, root: Path, files: Files, rails: tuple[str, ...]) -> None:
        self._root, self._files, self.covers = root, files, rails
        folders = {path.rpartition("/")[0] for path, text in files.items() if text in rails}
        # A look over the bus takes about a millisecond a file, so only at what changes.
        self._changing = [
            path for path in files if path.rpartition("/")[0] in folders and _READING.search(path)
        ]

    def spent_by(self, work: Callable[[], object]) -> Spent:
        """Return what the looks taken while ``work`` ran add up to."""
        looks: list[tuple[float, float]] = []
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(looks, done), daemon=True)
        start = time.perf_counter()
        thread.start()
        try:
            work()
        finally:
            end = time.perf_counter()
            done.set()
            thread.join()
        inside = [(when, watts) for when, watts in looks if start <= when <= end]
        if len(inside) < LOOKS:
            raise DeviceError(
                f"the power sensors ({', '.join(self.covers)}) answered {len(inside)} times in "
                f"{end - start:.2f} s",
                hint="run `secateur bench` again",
            )
        return Spent(integral(inside, start, end), end - start)

    def _watch(self, looks: list[tuple[float, float]], done: threading.Event) -> None:
        while not done.is_set():
            before = time.perf_counter()
            now = {path: read_text(self._root / path[1:]) or "" for path in self._changing}
            rails = power_rails({**self._files, **now})
            if all(rail in rails for rail in self.covers):
                when = (before + time.perf_counter()) / 2  # reading them takes milliseconds
                looks.append((when, sum(rails[rail] for rail in self.covers)))
            done.wait(EVERY)


def integral(looks: list[tuple[float, float]], start: float, end: float) -> float:
    """Return joules from (seconds, watts), held before the first and after the last look."""
    times = np.array([start, *(when for when, _ in looks), end])
    watts = np.array([looks[0][1], *(power for _, power in looks), looks[-1][1]])
    return float(((watts[1:] + watts[:-1]) / 2 * np.diff(times)).sum())
