"""What a connected device is, and what its Python could build an engine with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.core.errors import DeviceError
from secateur.devices.connection import Connection, clean
from secateur.devices.probe import COMMANDS, PATTERNS, DeviceFacts, parse_probe
from secateur.devices.tree import collect_command, parse_collected
from secateur.devices.version import parse_version, show_version

ENGINE_MODULES = ("tensorrt", "tensorrt_rtx")
OLDEST_TENSORRT = (10, 3)
_NEXT = "secateur:next"
_NAMED = "ssh://host?python=/path/to/python3"
_OLD_SYSTEM = (
    "JetPack 5 and Ubuntu 20.04 stop at Python 3.8 and TensorRT 8.5: install JetPack 6.1 or later; "
    f"on a PC, a newer Python with TensorRT 10.3 or later, and name that: {_NAMED}"
)
_INSTALL = {
    "tensorrt": "on a Jetson: sudo apt install python3-libnvinfer; elsewhere `pip install "
    f"tensorrt` in a venv, and name its Python: {_NAMED}",
    "tensorrt_rtx": "there: python3 -m venv ~/trt && ~/trt/bin/pip install tensorrt-rtx; then name "
    "its Python: ssh://host?python=~/trt/bin/python",
}
_PACKAGES = {"cv2": "opencv-python-headless"}


@dataclass(frozen=True)
class PythonFacts:
    """The device's Python: versions of modules (None: absent), bytes free for us.

    ``jobs`` are the folders of our jobs that run there, whoever of the same user began them.
    """

    version: str
    executable: str
    modules: dict[str, str | None]
    free: int | None
    jobs: tuple[str, ...] = ()


def probe(connection: Connection) -> DeviceFacts:
    """Run all of ``probe.COMMANDS`` and read all of ``probe.PATTERNS`` in one command.

    Raises:
        DeviceError: the device cannot be reached. What it does not tell is None, not an error.
    """
    commands = [shlex.join(command) for command in COMMANDS.values()]
    commands.append(collect_command(PATTERNS))
    line = "; ".join(f"echo {_NEXT}; {{ {command}; }} 2>/dev/null" for command in commands)
    _, *parts = connection.run(line).out.split(f"{_NEXT}\n")  # before it: a login script's words
    outputs = dict(zip(COMMANDS, parts, strict=False))
    files = parse_collected(parts[len(COMMANDS)]) if len(parts) > len(COMMANDS) else {}
    return parse_probe(files, outputs)


def probe_python(connection: Connection, wanted: Sequence[str] = ENGINE_MODULES) -> PythonFacts:
    """Ask the device's Python which of the modules it has, by importing them there.

    Raises:
        DeviceError: there is no Python 3.8 or later, or the device cannot be reached.
    """
    found: dict[str, object] = {}
    for answer in connection.ask("look", modules=list(wanted)):
        found = answer
    modules, free, jobs = (found.get(name) for name in ("modules", "free", "jobs"))
    given = modules if isinstance(modules, dict) else {}
    return PythonFacts(
        version=clean(str(found.get("python"))),
        executable=clean(str(found.get("executable"))),
        modules={
            name: clean(given[name]) if isinstance(given.get(name), str) else None
            for name in wanted
        },
        free=free if isinstance(free, int) else None,
        jobs=tuple(
            name
            for name in (jobs if isinstance(jobs, list) else ())
            if isinstance(name, str) and re.fullmatch(r"[0-9a-z]{1,64}", name, re.ASCII)
        ),
    )


def check_modules(python: PythonFacts, device: str) -> None:
    """Check that a bundle's runner will find all the modules that were asked for.

    Raises:
        DeviceError: it will not.
    """
    missing = [name for name, version in python.modules.items() if version is None]
    if missing:
        packages = " ".join(_PACKAGES.get(name, name) for name in missing)
        raise DeviceError(
            f"{device}: {python.executable} (Python {python.version}) has no {', '.join(missing)}",
            hint=_INSTALL.get(missing[0])
            or f"there: {python.executable} -m pip install {packages}; or name a Python that has "
            f"it: {_NAMED}",
        )


def check_python(python: PythonFacts, device: str, wanted: str) -> None:
    """Check that the builder will find the TensorRT module wanted there, new enough.

    Raises:
        DeviceError: it will not.
    """
    versions = {name: parse_version(text or "") for name, text in python.modules.items()}
    full = versions["tensorrt"]
    where = f"{device}: {python.executable} (Python {python.version})"
    if wanted == "tensorrt" and full is not None and full < OLDEST_TENSORRT:
        raise DeviceError(
            f"{where} has TensorRT {show_version(full)}, 10.3 is the first that builds this",
            hint=_OLD_SYSTEM,
        )
    if versions[wanted] is None:
        old = (parse_version(python.version) or (0,)) < (3, 9)
        raise DeviceError(f"{where} has no {wanted}", hint=_OLD_SYSTEM if old else _INSTALL[wanted])
    if wanted != "tensorrt" and full is not None:
        raise DeviceError(
            f"{where} has both tensorrt and {wanted}, and build_engine.py takes the first",
            hint=f"name a Python that has {wanted} alone: {_NAMED}",
        )
