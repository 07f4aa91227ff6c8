"""Lines of ``tegrastats``, as JetPack 5, 6 and 7 print them.

The tool's words are documented in NVIDIA's Jetson Linux Developer Guide, "tegrastats Utility"
("Reported Statistics": ``RAM X/Y (lfb NxZ)``, ``CPU [X%@Z, ...]``, ``GR3D_FREQ X%@[Y,Y]``,
``VDD_xxx X/Y``), the same table as
https://developer.nvidia.com/docs/drive/drive-os/6.0.9.1/public/drive-os-linux-sdk/common/topics/util_setup/ReportedStatistics4.html.
How releases differ, all of it optional here: a date in front since JetPack 5; rails as
``5336/4970`` (JetPack 4) or ``5336mW/4970mW`` (5 on); sensors in capitals (5) or small letters
(6 on); clocks of the GPU as ``@1020``, ``@[1020,1020]`` or none; no ``EMC_FREQ`` and no
``GR3D_FREQ`` at all on Thor. Field by field, so an unknown word costs only itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

LONGEST = 8192  # characters; a line is about 500
OFF_SENSOR_C = -256.0  # what a sensor reads whose part is switched off

_DATE = re.compile(r"(\d{2}-\d{2}-\d{4} \d{2}:\d{2}:\d{2})\b", re.ASCII)
_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB\b", re.ASCII)
_SWAP = re.compile(r"\bSWAP (\d{1,9})/(\d{1,9})MB\b", re.ASCII)
_CPU = re.compile(r"\bCPU \[([^\]]{1,2000})\](?:@(\d{1,6}))?", re.ASCII)
_CORE = re.compile(r"(\d{1,3})%(?:@(\d{1,6}))?", re.ASCII)
_LOAD = r"\b%s_FREQ (\d{1,3})%%(?:@\[?(\d{1,6}))?"
_GPU = re.compile(_LOAD % "GR3D", re.ASCII)
_EMC = re.compile(_LOAD % "EMC", re.ASCII)
_SENSOR = re.compile(r"(?<![\w.@])([A-Za-z][\w-]{0,30})@(-?\d{1,4}(?:\.\d{1,6})?)C\b", re.ASCII)
_RAIL = re.compile(
    r"(?<!\S)([A-Z][A-Z0-9_]{1,40}) (\d{1,9})(mW)?(?:/(\d{1,9})(?:mW)?(?:/\d{1,9}(?:mW)?)?)?(?!\S)",
    re.ASCII,
)


@dataclass(frozen=True)
class CoreLoad:
    """One CPU core: ``percent`` at the present clock; None where it is off or not said."""

    percent: int | None
    mhz: int | None


@dataclass(frozen=True)
class Rail:
    """One power rail: now, and the tool's average since it was started. Watts."""

    watts: float
    average_watts: float | None


@dataclass(frozen=True)
class Sample:
    """What one line says; None or nothing where it does not.

    ``temperatures_c`` and ``rails`` are keyed by the line's own names, temperatures in small
    letters. Sensors of parts that are switched off are left out.
    """

    time: str | None = None
    ram_used_mb: int | None = None
    ram_total_mb: int | None = None
    swap_used_mb: int | None = None
    cores: tuple[CoreLoad, ...] = ()
    gpu_percent: int | None = None
    gpu_mhz: int | None = None
    emc_percent: int | None = None
    emc_mhz: int | None = None
    temperatures_c: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    rails: Mapping[str, Rail] = field(default_factory=lambda: MappingProxyType({}))


def parse_line(line: str) -> Sample | None:
    """Read one line; None where it holds nothing that ``tegrastats`` says."""
    line = line[:LONGEST]
    date, ram, swap = _DATE.match(line.strip()), _RAM.search(line), _SWAP.search(line)
    gpu_percent, gpu_mhz = _load(_GPU.search(line))
    emc_percent, emc_mhz = _load(_EMC.search(line))
    sample = Sample(
        time=date.group(1) if date else None,
        ram_used_mb=int(ram.group(1)) if ram else None,
        ram_total_mb=int(ram.group(2)) if ram else None,
        swap_used_mb=int(swap.group(1)) if swap else None,
        cores=_cores(_CPU.search(line)),
        gpu_percent=gpu_percent,
        gpu_mhz=gpu_mhz,
        emc_percent=emc_percent,
        emc_mhz=emc_mhz,
        temperatures_c=MappingProxyType(
            {
                name.lower(): float(degrees)
                for name, degrees in _SENSOR.findall(line)
                if float(degrees) > OFF_SENSOR_C
            }
        ),
        rails=MappingProxyType(_rails(line)),
    )
    said_something = ram or sample.cores or sample.rails or sample.temperatures_c
    return sample if said_something else None


def parse_lines(text: str) -> tuple[Sample, ...]:
    """Read a log; lines that say nothing are left out."""
    samples = (parse_line(line) for line in text.splitlines())
    return tuple(sample for sample in samples if sample is not None)


def _load(found: re.Match[str] | None) -> tuple[int | None, int | None]:
    if found is None:
        return None, None
    percent, mhz = found.groups()
    # 0 MHz: the part is switched off, which is not a clock
    return int(percent), int(mhz) if mhz and int(mhz) > 0 else None


def _rails(line: str) -> dict[str, Rail]:
    # "APE 174" has the form of a rail, so a number counts only with a unit or an average
    return {
        name: Rail(int(now) / 1000, int(average) / 1000 if average else None)
        for name, now, unit, average in _RAIL.findall(line)
        if unit or average
    }


def _cores(found: re.Match[str] | None) -> tuple[CoreLoad, ...]:
    if found is None:
        return ()
    shared = int(found.group(2)) if found.group(2) else None
    cores = []
    for part in found.group(1).split(","):
        core = _CORE.fullmatch(part.strip())
        if core is None:
            cores.append(CoreLoad(None, None))
        else:
            own = int(core.group(2)) if core.group(2) else shared
            cores.append(CoreLoad(int(core.group(1)), own))
    return tuple(cores)
