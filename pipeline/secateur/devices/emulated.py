"""An Arm CPU that QEMU emulates, as a device: correctness and instruction counts, never time.

Only Python is emulated: the shell of ``run`` and its other commands are this machine's, and an
emulated program cannot start another. So it stands in for a board that runs a bundle, and for
nothing else; ``connect`` does not offer it to those who ask a device what it is.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.core.errors import DeviceError, first_line
from secateur.devices import on_emulated, on_profile
from secateur.devices.connection import Output, PipedConnection, clean
from secateur.devices.counted import Counted
from secateur.devices.probe import CpuFacts, parse_cpuinfo
from secateur.devices.profiled import read_networks
from secateur.devices.userland import INSTALL_QEMU, Userland

EMULATED = "emulated"
_PLUGIN = Path(__file__).with_name("count_instructions.c")
_SIGNAL = re.compile(r"uncaught target signal (\d{1,2})")
_ILLEGAL_INSTRUCTION = 4
_MARK = re.compile(r"^secateur:mark (\d+) (\d+)$", re.MULTILINE)
_CORES = 4  # that the emulated machine says it has
# Bits of AT_HWCAP and AT_HWCAP2: arch/arm64/include/uapi/asm/hwcap.h of Linux, in its order.
_CAPABILITIES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg",
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm "
    "svebf16 i8mm bf16",
)


@dataclass(frozen=True)
class Counts:
    """Instructions that the emulated CPU executed, its C library and Python included.

    ``cold_start``: from the program's start until the bundle is open; ``inferences``: each of
    several equal calls of the runtime, after a first one that is left out.
    """

    cold_start: int
    inferences: tuple[int, ...]


@dataclass(frozen=True)
class Needs:
    """What one run of a bundle needed: peak memory in bytes, the modules it loaded.

    ``counts`` is None, with the reason in ``uncounted``, where QEMU takes no plugin here.
    """

    peak_memory: int
    modules: frozenset[str]
    counts: Counts | None
    uncounted: str


def asked_cpus(device: str, cpus: Sequence[str]) -> tuple[str, ...] | None:
    """Return the CPU models of ``emulated[:CPU]`` and beside it; None for a real device.

    Raises:
        DeviceError: it is no device, or CPU models are asked of a real one.
    """
    name, _, model = device.partition(":")
    if name == EMULATED:
        return (*([model] if model else []), *cpus)
    if device != "local" and not device.startswith("ssh:"):
        raise DeviceError(
            f"'{clean(device)}' is no device",
            hint="give local, ssh://[user@]host[:port] or emulated[:CPU]",
        )
    if cpus:
        raise DeviceError("a CPU model is given, but nothing is emulated",
                          hint="add --device emulated")  # fmt: skip
    return None


def cpu_models(qemu: Path) -> list[str]:
    """Return the CPU models that this QEMU has."""
    found = subprocess.run(
        [qemu, "-cpu", "help"], capture_output=True, text=True, check=False, timeout=60
    )
    return [line.strip() for line in found.stdout.splitlines() if line.startswith(" ")]


def pick_cpu(qemu: Path, wanted: Sequence[str]) -> str:
    """Return the first of the models (properties may follow a comma) that this QEMU has.

    Raises:
        DeviceError: it has none of them.
    """
    models = cpu_models(qemu)
    for cpu in wanted:
        if cpu.partition(",")[0] in models:
            return cpu
    raise DeviceError(
        f"{qemu.name} has no CPU model {' or '.join(wanted)}",
        hint=f"models: {', '.join(models) or 'none'}; a newer QEMU has more",
    )


class EmulatedConnection(PipedConnection):
    """Runs commands whose Python is aarch64 on one model of a CPU.

    ``cpu`` is what a program there finds in /proc/cpuinfo, ``idle_memory`` what a Python that does
    nothing takes, both with the emulator.

    Raises:
        DeviceError: QEMU has no such model, or Python does not run on it.
    """

    def __init__(self, userland: Userland, model: str) -> None:
        self.name, self.address = f"{EMULATED} {model}", f"{EMULATED}:{model}"
        self._userland, self._model = userland, pick_cpu(userland.qemu, (model,))
        self._folder = Path(tempfile.mkdtemp(prefix="secateur-"))
        self.python = str(self._wrapper("python3"))
        try:
            root = self._folder / "root"
            _link_system(userland.system, root)
            text = self.run(f"exec {self._agent('identity')}").out
            identity = json.loads(text)
            description = cpuinfo_text(int(identity["midr"]), identity["capabilities"])
            (root / "proc" / "cpuinfo").write_text(description)
            found = parse_cpuinfo(description)
            self.idle_memory = int(identity["peak_memory"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            self.close()
            raise DeviceError(
                f"Python does not run on the {self.name}: {first_line(error)}",
                hint=f"try another CPU model, or install QEMU anew: {INSTALL_QEMU}",
            ) from error
        except BaseException:
            self.close()
            raise
        self.cpu: CpuFacts = found or CpuFacts(None, 0, frozenset())

    def __enter__(self) -> EmulatedConnection:
        return self

    def close(self) -> None:
        """Remove what was put there."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def needs(self, place: str, image: str, seconds: float) -> Needs:
        """Run the bundle that lies in the folder ``place`` there on its file ``image``.

        Raises:
            DeviceError: it does not run.
        """
        plugin = self._plugin()
        python = None
        if not isinstance(plugin, str):
            python = self._wrapper("counting", "-plugin", str(plugin))
        command = f"cd {shlex.quote(place)} && exec {self._agent('inference', image, python)}"
        result = self.run(command, seconds=seconds)
        if result.code != 0:
            raise self.refusal(result)
        told = json.loads(result.out)
        marks = {int(number): int(count) for number, count in _MARK.findall(result.err)}
        counts = None
        if python:
            pairs = range(on_emulated.REPEATS)
            counts = Counts(
                marks[on_emulated.READY],
                tuple(marks[2 * each + 2] - marks[2 * each + 1] for each in pairs),
            )
        return Needs(
            int(told["peak_memory"]), frozenset(told["modules"]), counts,
            plugin if isinstance(plugin, str) else "",
        )  # fmt: skip

    def check_counting(self) -> Path:
        """Return QEMU's plugin that counts, compiled.

        Raises:
            DeviceError: it cannot be had here.
        """
        plugin = self._plugin()
        if isinstance(plugin, str):
            raise DeviceError(f"instructions cannot be counted: {plugin}", hint=INSTALL_QEMU)
        return plugin

    def count(self, verb: str, models: Mapping[str, Path], seconds: float) -> Counted:
        """Run a counting verb of ``on_profile.py`` on models by their file names.

        Files beside a model of another name than ``*.onnx`` and ``*.param`` go along.

        Raises:
            DeviceError: instructions cannot be counted here, or a model does not run.
        """
        plugin = self.check_counting()
        place = Path(tempfile.mkdtemp(dir=self._folder))
        for name, path in models.items():
            (place / name).symlink_to(path.resolve())
        python = self._wrapper("profiling", "-plugin", f"{plugin},out=counts")
        names = [name for name in models if name.endswith((".onnx", ".param"))]
        order = json.dumps({"result": "result", "models": names})
        words = shlex.join([str(python), on_profile.__file__, verb, order])
        result = self.run(f"cd {shlex.quote(str(place))} && exec {words}", seconds=seconds)
        if result.code != 0:
            said = clean(result.out.strip().rpartition("\n")[2]).removeprefix("error: ")
            raise DeviceError(
                f"a model does not run on the {self.name}: {said or f'status {result.code}'}",
                hint="choose another runtime or CPU model, or report this with the recipe",
            )
        counts = (place / "counts").read_text(encoding="utf-8")
        return Counted(counts, read_networks(place / "result", self.name, len(names)))

    def refusal(self, result: Output) -> DeviceError:
        """Return the error for a program that ended with a bad status there."""
        last = clean(result.err.strip().rpartition("\n")[2]) or f"status {result.code}"
        return DeviceError(
            f"the bundle does not run on the {self.name}: {last.removeprefix('error: ')}",
            hint="try `secateur verify` without --device; if that works, report this",
        )

    def emulator(self) -> str:
        """Return QEMU's name and version."""
        found = subprocess.run(
            [self._userland.qemu, "--version"], capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip
        return found.stdout.partition("\n")[0].strip()

    def _argv(self, command: str) -> list[str]:
        return ["sh", "-c", command]

    def _failure(self, code: int, err: str) -> DeviceError | None:
        ended = _SIGNAL.search(err)
        if ended and int(ended[1]) == _ILLEGAL_INSTRUCTION:
            return DeviceError(
                f"the program asked for an instruction that the {self.name} does not have",
                hint="it would stop on such a board, too (SIGILL); choose a target whose CPU has "
                "the instruction, or a runtime that looks before it asks",
            )
        if ended or code < 0:
            number = int(ended[1]) if ended else -code
            return DeviceError(
                f"the program on the {self.name} was ended by signal {number}",
                hint="9 is a lack of memory here; else try another CPU model, or report this",
            )
        return None

    def _agent(self, verb: str, image: str = "", python: Path | None = None) -> str:
        words = [str(python or self.python), str(Path(on_emulated.__file__)), verb, image]
        return shlex.join(word for word in words if word)

    def _wrapper(self, name: str, *options: str) -> Path:
        """Write a program that runs the aarch64 Python, and return its path."""
        path = self._folder / name
        command = self._userland.command(
            self._folder / "root", "-cpu", self._model, *options,
            XDG_CACHE_HOME=self._folder / "cache", HOME=self._folder,
        )  # fmt: skip
        path.write_text(f'#!/bin/sh\nulimit -c 0\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o755)
        return path

    def _plugin(self) -> Path | str:
        """Return the plugin, compiled; else why there is none, and what to install."""
        if self._userland.qemu.name.endswith("-static"):
            return f"{self._userland.qemu.name} takes no plugin; {INSTALL_QEMU}"
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            return "there is no C compiler for QEMU's plugin; sudo apt install gcc libc6-dev"
        path = self._folder / "count_instructions.so"
        made = subprocess.run(
            [compiler, "-O2", "-fPIC", "-shared", "-o", path, _PLUGIN],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        if made.returncode != 0:
            return f"QEMU's plugin does not compile: {clean(made.stderr)[:200]}"
        tried = self.run(f"exec {self._wrapper('trying', '-plugin', str(path))} -c ''")
        if tried.code != 0:
            return f"this QEMU does not take the plugin: {clean(tried.err.strip())[:200]}"
        return path


def _link_system(system: Path, root: Path) -> None:
    """Make a root that has Debian's files and a /proc and /sys of its own.

    Programs see a file of the host wherever this root has none, and ONNX Runtime would find an x86
    in the host's /proc/cpuinfo.
    """
    cpus = root / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    (root / "proc").mkdir()
    for each in system.iterdir():
        if each.name not in ("sys", "proc"):
            (root / each.name).symlink_to(each)
    for name in ("possible", "present"):
        (cpus / name).write_text(f"0-{_CORES - 1}\n")


def cpuinfo_text(midr: int, capabilities: Sequence[int]) -> str:
    """Return /proc/cpuinfo as Linux writes it for a CPU, from its MIDR_EL1 and its AT_HWCAP."""
    features = [
        name
        for bits, names in zip(capabilities, _CAPABILITIES, strict=True)
        for place, name in enumerate(names.split())
        if bits >> place & 1
    ]
    fields = (
        f"BogoMIPS\t: 100.00\nFeatures\t: {' '.join(features)}\n"
        f"CPU implementer\t: {midr >> 24 & 0xFF:#04x}\nCPU architecture: 8\n"
        f"CPU variant\t: {midr >> 20 & 0xF:#x}\nCPU part\t: {midr >> 4 & 0xFFF:#05x}\n"
        f"CPU revision\t: {midr & 0xF}\n"
    )
    return "".join(f"processor\t: {core}\n{fields}\n" for core in range(_CORES))
