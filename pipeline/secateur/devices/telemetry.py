"""What a device says of itself while it runs: power, temperatures, clocks, throttling, mode.

Read from the kernel's own files, so without a daemon and mostly without root. What a file does
not say is None. Where each is documented:

* power, over-current, cooling: NVIDIA Jetson Linux Developer Guide, "Platform Power and
  Performance" (r35.6, r36.3 for Orin; r38.2.1 for Thor), which names the rails per module;
* hwmon units (mV, mA, uW, millidegrees): https://docs.kernel.org/hwmon/sysfs-interface.html and
  https://docs.kernel.org/hwmon/ina3221.html;
* thermal zones and cooling devices: https://docs.kernel.org/driver-api/thermal/sysfs-api.html;
* devfreq (Hz) and cpufreq (kHz): https://docs.kernel.org/admin-guide/pm/cpufreq.html and
  Documentation/ABI/testing/sysfs-class-devfreq.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.devices.nvpmodel import CONFIG, STATUS, Mode, parse_config, parse_status
from secateur.devices.tree import Files, collect, matching, number

PATTERNS = (
    "/sys/class/hwmon/hwmon*/name",
    "/sys/class/hwmon/hwmon*/in*_label",
    "/sys/class/hwmon/hwmon*/in*_input",
    "/sys/class/hwmon/hwmon*/curr*_input",
    "/sys/class/hwmon/hwmon*/power*_input",
    "/sys/class/hwmon/hwmon*/oc*_event_cnt",
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/thermal/cooling_device*/type",
    "/sys/class/thermal/cooling_device*/cur_state",
    "/sys/class/devfreq/*/cur_freq",
    "/sys/class/devfreq/*/min_freq",
    "/sys/class/devfreq/*/max_freq",
    "/sys/class/devfreq/*/governor",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_*_freq",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    "/sys/devices/system/cpu/cpu*/online",
    STATUS,
    CONFIG,
)
"""Every file that is read here, as glob patterns."""

_HWMON = r"/sys/class/hwmon/hwmon(\d{1,4})/"
_POWER_CHIPS = {"ina3221", "ina238"}
# VDD_IN is the module's own input. Modules without it have no rail for the whole, so the ones that
# tegrastats prints are added up, and the result says which; Thor's VIN, the board's input, is not
# among them, since it feeds the carrier board as well.
_MODULE_SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
)
# An idle GPU without power has no clock; the video engines' domain (gpu-nvd) is none of ours.
_GPU_DEVFREQ = re.compile(r"[0-9a-f]{1,16}\.(?:gpu|ga10b|gb10b|gv11b)|gpu-gpc-\d{1,2}", re.ASCII)
_COLDEST, _HOTTEST = -60.0, 200.0  # deg C; beyond them a sensor is off (-256) or broken
_SLACK_MHZ = 1.0


@dataclass(frozen=True)
class ModulePower:
    """Power of the module in watts, and the rails it is the sum of."""

    watts: float
    rails: tuple[str, ...]


@dataclass(frozen=True)
class Clock:
    """A clock in MHz: now, and the bounds it may move in; None where not said."""

    mhz: float | None
    min_mhz: float | None
    max_mhz: float | None
    governor: str | None

    @property
    def locked(self) -> bool | None:
        """Whether both bounds are the same, as ``jetson_clocks`` leaves them; None if not said."""
        if self.min_mhz is None or self.max_mhz is None:
            return None
        return abs(self.max_mhz - self.min_mhz) <= _SLACK_MHZ


@dataclass(frozen=True)
class Throttling:
    """What holds clocks down now, and how often the supply has given way since the start.

    ``alerts`` are thermal alerts that are raised; ``cooling`` those clocks that heat has lowered.
    The counters only grow, so a run compares before and after. None: the device has no such.
    """

    alerts: tuple[str, ...] | None = None
    cooling: tuple[str, ...] | None = None
    under_voltage: int | None = None
    average_over_current: int | None = None
    instant_over_current: int | None = None

    @property
    def now(self) -> bool | None:
        """Whether heat holds anything down; None where the device does not say."""
        if self.alerts is None and self.cooling is None:
            return None
        return bool(self.alerts or self.cooling)


@dataclass(frozen=True)
class Telemetry:
    """One reading. ``rails_w`` and ``temperatures_c`` are keyed by the device's own names."""

    rails_w: Mapping[str, float]
    module: ModulePower | None
    temperatures_c: Mapping[str, float]
    gpu: Clock | None
    cpus: Mapping[int, Clock]
    cpus_offline: tuple[int, ...]
    throttling: Throttling
    mode_id: int | None
    mode: Mode | None

    @property
    def hottest_c(self) -> float | None:
        """The hottest sensor in deg C."""
        return max(self.temperatures_c.values(), default=None)

    @property
    def mode_is_applied(self) -> bool | None:
        """Whether the clocks' upper bounds are those of the mode; None if it cannot be told."""
        return mode_is_applied(self.mode, self.gpu, self.cpus)

    def to_json(self) -> dict[str, Any]:
        """Return what ``bench.json`` keeps."""
        return {
            **asdict(self),
            "hottest_c": self.hottest_c,
            "throttled": self.throttling.now,
            "mode_is_applied": self.mode_is_applied,
        }


def read_telemetry(root: Path = Path("/")) -> Telemetry:
    """Read this machine, or a recorded tree under ``root``."""
    return parse_telemetry(collect(PATTERNS, root))


def parse_telemetry(files: Files) -> Telemetry:
    """Read the files of ``PATTERNS``; see ``tree.collect``. Nothing in them raises an error."""
    rails = power_rails(files)
    mode_id = parse_status(files.get(STATUS, ""))
    return Telemetry(
        rails_w=rails,
        module=module_power(rails),
        temperatures_c=temperatures(files),
        gpu=gpu_clock(files),
        cpus=cpu_clocks(files),
        cpus_offline=tuple(
            int(found.group(1))
            for found, text in matching(files, r"/sys/devices/system/cpu/cpu(\d{1,4})/online")
            if text == "0"
        ),
        throttling=throttling(files),
        mode_id=mode_id,
        mode=parse_config(files.get(CONFIG, "")).by_id(mode_id),
    )


def power_rails(files: Files) -> dict[str, float]:
    """Return watts per rail of the INA3221 and INA238 sensors.

    An INA3221 channel is a rail where it has a label and a current; ``in4`` to ``in7`` are shunt
    voltages and their sum, which would count every rail twice.
    """
    rails: dict[str, float] = {}
    for found, chip in matching(files, _HWMON + "name"):
        if chip not in _POWER_CHIPS:
            continue
        folder = found.group().removesuffix("name")
        for index in range(1, 4):
            label = files.get(f"{folder}in{index}_label", "")
            volts = number(files.get(f"{folder}in{index}_input"))
            amperes = number(files.get(f"{folder}curr{index}_input"))
            if label and "shunt" not in label and volts is not None and amperes is not None:
                rails[label] = volts * amperes / 1e6
        watts = number(files.get(f"{folder}power1_input"))
        if watts is not None:
            rails[files.get(f"{folder}in1_label") or chip] = watts / 1e6
    return rails


def module_power(rails_w: Mapping[str, float]) -> ModulePower | None:
    """Return the module's power; None where the rails are not those of a module we know."""
    for names in (("VDD_IN",), *_MODULE_SUMS):
        if all(name in rails_w for name in names):
            return ModulePower(sum(rails_w[name] for name in names), names)
    return None


def temperatures(files: Files) -> dict[str, float]:
    """Return deg C per thermal zone, without ``-thermal``; a sensor that is off is left out."""
    found = {}
    for match, name in matching(files, r"/sys/class/thermal/thermal_zone\d{1,4}/type"):
        thousandths = number(files.get(match.group().removesuffix("type") + "temp"))
        if thousandths is not None and _COLDEST < thousandths / 1000 < _HOTTEST:
            found[name.removesuffix("-thermal").removesuffix("_thermal")] = thousandths / 1000
    return found


def gpu_clock(files: Files) -> Clock | None:
    """Return the GPU's clock: the first of its devfreq devices."""
    for match, _ in matching(files, r"/sys/class/devfreq/([^/]{1,80})/cur_freq"):
        if _GPU_DEVFREQ.fullmatch(match.group(1)):
            folder = match.group().removesuffix("cur_freq")
            names = ("cur_freq", "min_freq", "max_freq")
            return _clock(files, [folder + name for name in names], folder + "governor", 1e6)
    return None


def cpu_clocks(files: Files) -> dict[int, Clock]:
    """Return the clock of each core that has one."""
    pattern = r"/sys/devices/system/cpu/cpu(\d{1,4})/cpufreq/scaling_cur_freq"
    clocks = {}
    for match, _ in matching(files, pattern):
        stem = match.group().removesuffix("cur_freq")
        names = ("cur_freq", "min_freq", "max_freq")
        clocks[int(match.group(1))] = _clock(
            files, [stem + name for name in names], stem + "governor", 1e3
        )
    return clocks


def _clock(files: Files, paths: list[str], governor: str, per_mhz: float) -> Clock:
    now, low, high = (number(files.get(path)) for path in paths)
    return Clock(
        mhz=None if now is None else now / per_mhz,
        min_mhz=None if low is None else low / per_mhz,
        max_mhz=None if high is None else high / per_mhz,
        governor=files.get(governor) or None,
    )


def throttling(files: Files) -> Throttling:
    """Return what holds clocks down, and the over-current counters.

    ``oc1`` to ``oc3`` of the chip ``soctherm_oc`` are under-voltage, average and instantaneous
    over-current (developer guide, "Over-current throttling").
    """
    states: dict[str, float] = {}
    for match, name in matching(files, r"/sys/class/thermal/cooling_device\d{1,4}/type"):
        state = number(files.get(match.group().removesuffix("type") + "cur_state"))
        if state is not None:
            states[name] = max(state, states.get(name, 0))
    alerts = {name: state for name, state in states.items() if name.endswith("-throttle-alert")}
    clocks = {n: state for n, state in states.items() if n.startswith(("cpufreq-", "devfreq-"))}
    counters: list[int | None] = [None, None, None]
    for match, text in matching(files, _HWMON + r"oc([123])_event_cnt"):
        count = number(text)
        counters[int(match.group(2)) - 1] = None if count is None else int(count)
    return Throttling(
        alerts=_raised(alerts) if alerts else None,
        cooling=_raised(clocks) if clocks else None,
        under_voltage=counters[0],
        average_over_current=counters[1],
        instant_over_current=counters[2],
    )


def _raised(states: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(sorted(name for name, state in states.items() if state > 0))


def mode_is_applied(mode: Mode | None, gpu: Clock | None, cpus: Mapping[int, Clock]) -> bool | None:
    """Whether the clocks' upper bounds keep to a mode's caps.

    ``nvpmodel`` writes its status before it sets clocks, and may fail between (it asks for a
    restart when the mode switches off other TPCs than now), so a status alone proves nothing.
    None where the mode caps nothing or the bounds are not known. A cap is rounded down by the
    kernel to a step it has, so a lower bound counts as kept.
    """
    if mode is None:
        return None
    bounds = [each.max_mhz for each in cpus.values() if each.max_mhz is not None]
    pairs = [
        (mode.gpu_max_mhz, gpu.max_mhz if gpu else None),
        (mode.cpu_max_mhz, max(bounds, default=None)),
    ]
    kept = [
        bound <= cap + _SLACK_MHZ for cap, bound in pairs if cap is not None and bound is not None
    ]
    return all(kept) if kept else None
