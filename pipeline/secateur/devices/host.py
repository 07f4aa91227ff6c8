"""Facts about the machine that something was built or measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import secateur
from secateur.devices.probe import parse_cpuinfo

LIBRARIES = ("torch", "timm", "torch-pruning", "onnx", "onnxruntime", "onnxslim", "numpy",
             "opencv-python-headless", "safetensors", "accelerate", "ncnn", "pnnx")  # fmt: skip


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries a result depends on; absent ones are left out."""
    found = {"secateur": secateur.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def host_facts() -> dict[str, Any]:
    """Return CPU, cores, memory, governor, temperature (deg C) and load, as far as known."""
    return {
        "cpu": _cpu_name(),
        "arch": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "logical_cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "clock_mhz": _clock_mhz(),
        "temperature_c": temperature_c(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def temperature_c() -> float | None:
    """Return the hottest sensor in deg C, or None where the system shows none."""
    sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    readings = [entry.current for entries in sensors.values() for entry in entries]
    return max(readings, default=None)


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that Linux says this CPU has; none where it does not say."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in {"flags", "features"}:
            return frozenset(value.split())
    return frozenset()


def _clock_mhz() -> float | None:
    clock = psutil.cpu_freq()
    return round(clock.current, 1) if clock else None


def _cpu_name() -> str:
    found = parse_cpuinfo(_read(Path("/proc/cpuinfo")) or "")
    return (found.name if found else None) or platform.processor() or "unknown"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
