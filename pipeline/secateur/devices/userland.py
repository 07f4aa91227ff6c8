"""An aarch64 userland to run bundles in on another machine: Debian's Python, PyPI's wheels, QEMU.

Nothing of it needs root: packages are downloaded with apt's own checks (signatures, SHA-256) into
folders of ours and unpacked, wheels come through pip. It is prepared once into a folder whose name
tells what is in it; the digest of every file is written last and compared at every use.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import DeviceError, RuntimeMissing
from secateur.core.files import file_sha256, not_writable, value_digest, write_json
from secateur.core.progress import track

QEMU_NAMES = ("qemu-aarch64", "qemu-aarch64-static")  # the static one takes no plugin
INSTALL_QEMU = "sudo apt install qemu-user"
_SUITE, _PYTHON = "bookworm", "3.11"
_MIRROR = "http://deb.debian.org/debian"  # apt checks signatures
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_PACKAGES = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64",
              "manylinux2014_aarch64")  # fmt: skip
_STAMP = "userland.json"
_PATIENCE = 600.0  # seconds for one download


@dataclass(frozen=True)
class Userland:
    """``system`` holds Debian's files, ``site`` the wheels.

    ``wheels`` gives per distribution its version, the SHA-256 of the wheel, the bytes it takes
    unpacked and the modules it has; ``debs`` the SHA-256 of each package.
    """

    folder: Path
    qemu: Path
    wheels: Mapping[str, Mapping[str, Any]]
    debs: Mapping[str, str]

    @property
    def system(self) -> Path:
        """The root that Debian's packages are unpacked in."""
        return self.folder / "system"

    @property
    def site(self) -> Path:
        """The folder for PYTHONPATH."""
        return self.folder / "site"

    @property
    def python(self) -> Path:
        """The aarch64 interpreter."""
        return self.system / "usr" / "bin" / f"python{_PYTHON}"

    def command(self, root: Path, *options: str, **settings: object) -> list[str]:
        """Return the command line of the aarch64 Python that finds files under ``root``.

        Of the environment here nothing goes along: it would change what is counted.
        """
        settings = {
            "PYTHONPATH": self.site, "PYTHONNOUSERSITE": 1, "PYTHONHASHSEED": 0,
            "OMP_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1, "LC_ALL": "C.UTF-8", **settings,
        }  # fmt: skip
        return ["env", "-i", *(f"{name}={value}" for name, value in settings.items()),
                str(self.qemu), *options, "-L", str(root), str(self.python)]  # fmt: skip


def find_qemu() -> Path:
    """Return the emulator.

    Raises:
        RuntimeMissing: it is not on the PATH.
    """
    for name in QEMU_NAMES:
        if found := shutil.which(name):
            return Path(found)
    raise RuntimeMissing(
        f"there is no {QEMU_NAMES[0]} on this machine's PATH, which emulates the device",
        hint=INSTALL_QEMU,
    )


def prepare_userland(root: Path, wheels: Sequence[str], more: Sequence[str] = ()) -> Userland:
    """Return the userland under ``root`` with these wheels ("name==version"), made if need be.

    ``more`` are further packages of Debian: a runner needs none.

    Raises:
        RuntimeMissing: qemu-aarch64, apt or pip is not on this machine.
        DeviceError: something cannot be downloaded, or the userland was altered since it was made.
    """
    qemu = find_qemu()
    folder = userland_folder(root, wheels, more)
    if not folder.exists():
        _make(folder, qemu, wheels, more)
    return _checked(folder, qemu)


def userland_folder(root: Path, wheels: Sequence[str], more: Sequence[str] = ()) -> Path:
    """Return where a userland with these wheels lies, or will."""
    wanted = {"suite": _SUITE, "packages": (*_PACKAGES, *more), "wheels": sorted(wheels)}
    return root / value_digest(wanted)


def _checked(folder: Path, qemu: Path) -> Userland:
    """Read the stamp and compare every file with it."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        files, wheels, debs = stamp["files"], stamp["wheels"], stamp["debs"]
        wrong = next((name for name, sha in files.items() if _digest(folder / name) != sha), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = _STAMP
    if wrong is not None:
        raise DeviceError(
            f"the emulated userland was altered since it was made: {folder / wrong}",
            hint=f"rm -r {folder}; it is made anew by the next call",
        )
    return Userland(folder, qemu, wheels, debs)


def _digest(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""


def _make(folder: Path, qemu: Path, wheels: Sequence[str], more: Sequence[str]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        stamp: dict[str, Any] = {}
        steps: tuple[Callable[[], None], ...] = (
            lambda: stamp.update(debs=_debian(work, (*_PACKAGES, *more))),
            lambda: stamp.update(wheels=_wheels(work, wheels)),
            lambda: _compile(Userland(work, qemu, {}, {})),
            lambda: stamp.update(files=_digests(work)),
        )
        for step in track(steps, "preparing an aarch64 userland", len(steps)):
            step()
        write_json(work / _STAMP, stamp)
        work.replace(folder)
    except OSError as error:
        if not folder.exists():  # else another call was quicker
            raise not_writable(folder, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _debian(work: Path, packages: Sequence[str]) -> dict[str, str]:
    """Unpack the arm64 packages and what they depend on; return their digests."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise RuntimeMissing(
                f"there is no {tool} on this machine, which brings the aarch64 userland",
                hint="use a Debian or Ubuntu machine, or a container of one (debian:bookworm)",
            )
    if not _KEYRING.exists():
        raise RuntimeMissing(
            f"there is no {_KEYRING}, which Debian's packages are checked with",
            hint="sudo apt install debian-archive-keyring",
        )
    apt, system = work / "apt", work / "system"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(
        f"deb [arch=arm64 signed-by={_KEYRING}] {_MIRROR} {_SUITE} main\n"
    )
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": apt / "state",
        "Dir::State::status": apt / "status", "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "APT::Install-Recommends": "false", "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any", "Acquire::Languages": "none", "Debug::NoLocking": "true",
    }  # fmt: skip
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    _succeed([*command, "update"], "Debian's list of packages")
    _succeed([*command, "install", "-y", "--download-only", *packages], "Debian's packages")
    debs = sorted((apt / "cache" / "archives").glob("*.deb"))
    for deb in debs:
        _succeed(["dpkg", "-x", str(deb), str(system)], deb.name)
    digests = {deb.name: file_sha256(deb) for deb in debs}
    shutil.rmtree(apt)
    return digests


def _wheels(work: Path, wheels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Install the wheels and what they depend on for aarch64; return what came."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeMissing(
            f"{sys.executable} has no pip, which brings the wheels for aarch64",
            hint=f"{sys.executable} -m ensurepip",
        )
    site, report = work / "site", work / "pip.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-compile", "--only-binary=:all:", "--target", str(site),
               "--report", str(report), "--python-version", _PYTHON, "--implementation", "cp",
               *(f"--abi={abi}" for abi in (f"cp{_PYTHON.replace('.', '')}", "abi3", "none")),
               *(f"--platform={platform}" for platform in _PLATFORMS),
               *wheels]  # fmt: skip
    _succeed(command, "wheels for aarch64")
    rows = json.loads(report.read_text(encoding="utf-8"))["install"]
    report.unlink()
    return {
        row["metadata"]["name"].lower(): {
            "version": row["metadata"]["version"],
            "sha256": row["download_info"]["archive_info"]["hashes"]["sha256"],
            "bytes": _unpacked(site, row["metadata"]["name"]),
            "imports": _top_level(site, row["metadata"]["name"]),
        }
        for row in rows
    }


def _records(site: Path, name: str) -> list[Path]:
    """Return the files of a distribution, from its RECORD."""
    wanted = re.sub(r"[-_.]+", "_", name).lower()
    for record in site.glob("*.dist-info/RECORD"):
        if re.sub(r"[-_.]+", "_", record.parent.name.split("-")[0]).lower() == wanted:
            rows = record.read_text(encoding="utf-8").splitlines()
            return [site / row.rsplit(",", 2)[0].strip('"') for row in rows]
    return []


def _unpacked(site: Path, name: str) -> int:
    return sum(path.stat().st_size for path in _records(site, name) if path.is_file())


def _top_level(site: Path, name: str) -> list[str]:
    """Return the modules that a distribution gives to ``import``."""
    parts = {path.relative_to(site).parts[0] for path in _records(site, name) if path.is_file()}
    return sorted(
        part.split(".")[0] for part in parts if not part.endswith((".dist-info", ".libs"))
    )


def _compile(made: Userland) -> None:
    """Let the emulated Python write the byte code of what a runner imports, as a board's pip does.

    Without it the first start would compile, and its count of instructions would be of that.
    """
    # Runtimes are not imported: they look at the host's /proc/cpuinfo.
    folders = [made.site / name for name in ("onnxruntime", "onnxruntime/capi", "ncnn")]
    script = (
        "import argparse, compileall, hashlib, json, mmap, sys, time, numpy, cv2\n"
        "for folder in sys.argv[1:]: compileall.compile_dir(folder, maxlevels=0, quiet=2)"
    )
    found = [str(folder) for folder in folders if folder.is_dir()]
    command = [*made.command(made.system), "-c", script, *found]
    _succeed(command, "the byte code of the emulated Python")


def _digests(work: Path) -> dict[str, str]:
    """Return the digest of every file; links lead to one of them."""
    found = {}
    for folder, _, names in os.walk(work):
        for path in (Path(folder, name) for name in names):
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(work))] = file_sha256(path)
    return found


def _succeed(command: list[str], what: str) -> None:
    """Run a command; its last word about an error becomes ours."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"{what} could not be had within {_PATIENCE:.0f} s", hint="check the network"
        ) from error
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        said = [line for line in lines if re.match(r"(E:|ERROR:|error:)", line)] or lines or ["?"]
        raise DeviceError(
            f"{what} could not be had: {said[0][:200]}",
            hint="check the network and the space in the cache folder, then run it again",
        )
