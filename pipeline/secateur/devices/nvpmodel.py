"""The power mode of a Jetson: what ``nvpmodel`` is set to, and what its modes allow.

Ids move between releases (0 is MAXN on AGX Orin and 15 W on Orin Nano Super), so a mode is known
by its name, and names are read from the device's own configuration.

Formats: the header of ``/etc/nvpmodel.conf`` itself (its FORMAT comment); ``nvpmodel -q`` and
"Supported Modes and Power Efficiency" in NVIDIA's Jetson Linux Developer Guide, "Platform Power
and Performance". Units of ``MAX_FREQ``: kHz for CPU clusters, Hz for all else, -1 for no cap
(https://github.com/NVIDIA/skills, jetson-customize-clocks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

STATUS = "/var/lib/nvpmodel/status"
CONFIG = "/etc/nvpmodel.conf"

_SECTION = re.compile(
    r"<\s*([A-Z_]{1,40})((?:\s+[A-Z_]{1,40}\s*=\s*[^\s<>=]{1,80})*)\s*>", re.ASCII
)
_PAIR = re.compile(r"([A-Z_]{1,40})\s*=\s*([^\s<>=]{1,80})", re.ASCII)
_INTEGER = re.compile(r"-?\d{1,15}", re.ASCII)
_ID = re.compile(r"\d{1,4}", re.ASCII)


@dataclass(frozen=True)
class Mode:
    """One mode of ``nvpmodel.conf``; None where it sets no such cap.

    ``gpu_tpc_mask`` has a bit set for each TPC (two SMs) that is switched off.
    """

    id: int
    name: str
    cpu_cores: int | None = None
    cpu_max_mhz: float | None = None
    gpu_max_mhz: float | None = None
    emc_max_mhz: float | None = None
    gpu_tpc_mask: int | None = None


@dataclass(frozen=True)
class Modes:
    """All modes of a device and the id of the one it boots with."""

    modes: tuple[Mode, ...] = ()
    default_id: int | None = None

    def by_id(self, mode_id: int | None) -> Mode | None:
        """Return the mode with an id, or None."""
        return next((mode for mode in self.modes if mode.id == mode_id), None)


def parse_config(text: str) -> Modes:
    """Read ``/etc/nvpmodel.conf``; what is not a mode is passed over."""
    modes: list[Mode] = []
    default: int | None = None
    for kind, keys, settings in _sections(text):
        if kind == "POWER_MODEL" and _ID.fullmatch(keys.get("ID", "")) and "NAME" in keys:
            modes.append(_mode(int(keys["ID"]), keys["NAME"], settings))
        elif kind == "PM_CONFIG" and _ID.fullmatch(keys.get("DEFAULT", "")):
            default = int(keys["DEFAULT"])
    return Modes(tuple(modes), default)


def parse_status(text: str) -> int | None:
    """Read ``/var/lib/nvpmodel/status``: ``pmode:0002 fmode:quiet`` is mode 2.

    It says what was asked for, not what was applied; ``telemetry.mode_is_applied`` compares.
    """
    found = re.search(r"\bpmode:(\d{1,4})\b", text, re.ASCII)
    return int(found.group(1)) if found else None


def parse_query(text: str) -> tuple[str | None, int | None]:
    """Read ``nvpmodel -q``: the name after ``NV Power Mode:`` and the id on the line below it."""
    lines = [line.strip() for line in text.splitlines()]
    for index, line in enumerate(lines):
        found = re.fullmatch(r"NV Power Mode:\s*(\S{1,80})", line)
        if found:
            following = next((each for each in lines[index + 1 :] if each), "")
            return found.group(1), int(following) if _ID.fullmatch(following) else None
    return None, None


def _sections(text: str) -> Iterator[tuple[str, dict[str, str], list[tuple[str, str, int]]]]:
    kind, keys, settings = "", dict[str, str](), list[tuple[str, str, int]]()
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        header = _SECTION.fullmatch(line)
        if header:
            yield kind, keys, settings
            kind, keys, settings = header.group(1), dict(_PAIR.findall(header.group(2))), []
            continue
        words = line.split()
        if len(words) == 3 and _INTEGER.fullmatch(words[2]):
            settings.append((words[0], words[1], int(words[2])))
    yield kind, keys, settings


def _mode(mode_id: int, name: str, settings: list[tuple[str, str, int]]) -> Mode:
    online = [value for group, _, value in settings if group == "CPU_ONLINE"]
    cpu = [v for group, key, v in settings if group.startswith("CPU_") and key == "MAX_FREQ"]
    gpu = [v for group, key, v in settings if group == "GPU" and key == "MAX_FREQ"]
    emc = [v for group, key, v in settings if group == "EMC" and key == "MAX_FREQ"]
    mask = [v for group, key, v in settings if key == "TPC_PG_MASK" and v >= 0]
    return Mode(
        id=mode_id,
        name=name,
        cpu_cores=sum(value == 1 for value in online) if online else None,
        cpu_max_mhz=_cap(cpu, 1e3),
        gpu_max_mhz=_cap(gpu, 1e6),
        emc_max_mhz=_cap(emc, 1e6),
        gpu_tpc_mask=mask[0] if mask else None,
    )


def _cap(values: list[int], per_mhz: float) -> float | None:
    # clusters may be capped apart; the fastest is what a single thread can reach. 0 and -1: no cap
    capped = [value for value in values if value > 0]
    return max(capped) / per_mhz if capped and len(capped) == len(values) else None
