"""What a device is: from the texts of a fixed list of files and commands to ``DeviceFacts``.

Nothing is run here; who has a connection runs ``COMMANDS`` and brings ``PATTERNS``. A text that
is missing, or not in the form expected, leaves its facts None: unknown, never guessed. Formats:

* ``/etc/nv_tegra_release``: ``# R36 (release), REVISION: 4.3, GCID: ...`` is Jetson Linux 36.4.3
  (NVIDIA Jetson Linux release notes);
* ``/proc/device-tree/compatible``: part numbers of carrier and module, as in
  https://www.kernel.org/doc/Documentation/devicetree/bindings/arm/tegra.yaml;
* ``dpkg -l``: dpkg-query(1), the ``ii`` in front means installed;
* ``/proc/cpuinfo``: Features are the kernel's names of
  https://docs.kernel.org/arch/arm64/elf_hwcaps.html, parts are of Arm's MIDR registers;
* ``nvidia-smi --query-gpu ... --format=csv,noheader,nounits``: nvidia-smi(1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.devices.nvpmodel import STATUS, parse_query, parse_status
from secateur.devices.target import Target
from secateur.devices.tree import Files
from secateur.devices.version import Version, parse_version, show_version

MODEL = "/proc/device-tree/model"
COMPATIBLE = "/proc/device-tree/compatible"
RELEASE = "/etc/nv_tegra_release"
CUDA = "/usr/local/cuda/version.json"
PATTERNS = (MODEL, COMPATIBLE, RELEASE, CUDA, STATUS, "/proc/meminfo", "/proc/cpuinfo")
"""The files to bring, with ``tree.collect`` or ``tree.collect_command``."""

_GPU_QUERY = ("name", "compute_cap", "driver_version", "memory.total", "memory.free")
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "uname": ("uname", "-m"),
    "dpkg": ("dpkg", "-l"),
    "nvpmodel": ("nvpmodel", "-q"),
    "nvidia-smi": (
        "nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits",
    ),
}  # fmt: skip
"""The commands to run, by the name their output is handed over with."""

# Kernel names of CPU features -> what kernels for int8 and fp16 ask for. fp16 needs both.
_ARM_ISA = {
    "fp16": {"fphp", "asimdhp"}, "dotprod": {"asimddp"}, "i8mm": {"i8mm"}, "bf16": {"bf16"},
    "sve": {"sve"}, "sve2": {"sve2"},
}  # fmt: skip
_X86_ISA = {
    "avx2": {"avx2"}, "avx512": {"avx512f", "avx512bw"}, "vnni": {"avx512_vnni"},
    "avx_vnni": {"avx_vnni"}, "amx_int8": {"amx_int8"},
}  # fmt: skip
_ARM_PARTS = {  # Arm's Technical Reference Manuals, MIDR_EL1
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD08: "Cortex-A72", 0xD0B: "Cortex-A76",
    0xD42: "Cortex-A78AE", 0xD83: "Neoverse-V3AE",
}  # fmt: skip
_MODULE = re.compile(r"p\d{4}-\d{4}", re.ASCII)


@dataclass(frozen=True)
class CpuFacts:
    """The CPU: ``isa`` holds what was found of the features that int8 and fp16 kernels ask for."""

    name: str | None
    cores: int
    isa: frozenset[str]


@dataclass(frozen=True)
class GpuFacts:
    """One GPU as ``nvidia-smi`` lists it; a Jetson shares its memory and shows none."""

    name: str
    compute_capability: str | None
    driver: str | None
    memory_mb: float | None
    free_mb: float | None


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a device; None is unknown.

    ``tensorrt`` is the library's version and ``tensorrt_python`` that of its Python module, which
    may be missing. ``memory_available`` is what programs can still have. Memory is in bytes.
    """

    arch: str | None = None
    model: str | None = None
    module: str | None = None
    super_mode: bool | None = None
    l4t: str | None = None
    jetpack: str | None = None
    tensorrt: str | None = None
    tensorrt_python: str | None = None
    cuda: str | None = None
    power_mode: str | None = None
    power_mode_id: int | None = None
    memory_total: int | None = None
    memory_available: int | None = None
    cpu: CpuFacts | None = None
    gpus: tuple[GpuFacts, ...] = ()


def parse_probe(files: Files, outputs: Mapping[str, str]) -> DeviceFacts:
    """Read the files of ``PATTERNS`` and the outputs of ``COMMANDS``, any of which may be missing.

    Whatever they hold, no error is raised.
    """
    packages = parse_packages(outputs.get("dpkg", ""))
    parts = [part for part in re.split(r"[\x00\s]+", files.get(COMPATIBLE, "")) if part]
    mode, mode_id = parse_query(outputs.get("nvpmodel", ""))
    memory = parse_meminfo(files.get("/proc/meminfo", ""))
    return DeviceFacts(
        arch=_line(outputs.get("uname", "")),
        model=_line(files.get(MODEL, "")),
        module=_module(parts),
        super_mode=any(part.endswith("-super") for part in parts) if _module(parts) else None,
        l4t=parse_release(files.get(RELEASE, "")) or _l4t_of(packages),
        jetpack=_number_of(packages, "nvidia-jetpack"),
        tensorrt=_tensorrt(packages),
        tensorrt_python=_number_of(packages, "python3-libnvinfer"),
        cuda=parse_cuda(files.get(CUDA, "")) or _cuda_of(packages),
        power_mode=mode,
        power_mode_id=parse_status(files.get(STATUS, "")) if mode_id is None else mode_id,
        memory_total=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        cpu=parse_cpuinfo(files.get("/proc/cpuinfo", "")),
        gpus=parse_gpus(outputs.get("nvidia-smi", "")),
    )


def target_of(facts: DeviceFacts, targets: Iterable[Target]) -> Target | None:
    """Return the target whose part numbers have the device's module; None where none does."""
    return next(
        (target for target in targets if facts.module and facts.module in target.modules), None
    )


def parse_release(text: str) -> str | None:
    """Return the Jetson Linux release of ``/etc/nv_tegra_release``: R36, REVISION 4.3 is 36.4.3."""
    found = re.search(r"R(\d{1,3}) \(release\), REVISION: (\d{1,3}(?:\.\d{1,3}){0,2})", text)
    version = parse_version(".".join(found.groups())) if found else None
    return show_version(version) if version else None


def parse_cuda(text: str) -> str | None:
    """Return the toolkit's version of CUDA's ``version.json``."""
    try:
        version = json.loads(text)["cuda"]["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return _shown(parse_version(version)) if isinstance(version, str) else None


def parse_packages(text: str) -> dict[str, str]:
    """Return the versions of installed packages in ``dpkg -l``, without the ``:arch`` of a name."""
    packages = {}
    for line in text.splitlines():
        words = line.split(None, 3)
        if len(words) >= 3 and words[0] in ("ii", "hi"):  # hi: held back from upgrades
            packages[words[1].split(":", 1)[0]] = words[2]
    return packages


def parse_meminfo(text: str) -> dict[str, int]:
    """Return the bytes of each line of ``/proc/meminfo`` that is in kB."""
    found = re.findall(r"^(\w{1,40}):\s+(\d{1,15}) kB$", text, re.ASCII | re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def parse_cpuinfo(text: str) -> CpuFacts | None:
    """Read ``/proc/cpuinfo`` of an Arm or x86 machine; None where it lists no core."""
    fields: dict[str, set[str]] = {}
    cores = 0
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), set()).add(value.strip())
            cores += key.strip() == "processor"
    if cores == 0:
        return None
    # a feature counts only where every core has it: work moves between them
    arm = [set(value.split()) for value in fields.get("Features", ())]
    x86 = [set(value.split()) for value in fields.get("flags", ())]
    isa = _isa(arm, _ARM_ISA) | _isa(x86, _X86_ISA)
    return CpuFacts(name=_cpu_name(fields), cores=cores, isa=isa)


def parse_gpus(text: str) -> tuple[GpuFacts, ...]:
    """Read ``nvidia-smi``'s answer; lines of another form, such as its errors, are left out."""
    gpus = []
    for line in text.splitlines():
        cells = [_cell(cell) for cell in line.split(",")]
        if len(cells) != len(_GPU_QUERY) or cells[0] is None:
            continue
        name, capability, driver, total, free = cells
        gpus.append(
            GpuFacts(
                name=name or "",
                compute_capability=_shown(parse_version(capability or "")),
                driver=driver,
                memory_mb=_megabytes(total),
                free_mb=_megabytes(free),
            )
        )
    return tuple(gpus)


def _line(text: str) -> str | None:
    lines = text.strip("\x00 \t\r\n").splitlines()
    return lines[0].strip("\x00 ") or None if lines else None


def _module(parts: list[str]) -> str | None:
    # "nvidia,p3768-0000+p3767-0005-super": the carrier board, then the module
    for part in parts:
        numbers = _MODULE.findall(part)
        if part.startswith("nvidia,") and len(numbers) == 2 and "+" in part:
            return str(numbers[1])
    alone = [part.removeprefix("nvidia,") for part in parts]
    return next((part for part in alone if _MODULE.fullmatch(part)), None)


def _number_of(packages: Mapping[str, str], name: str) -> str | None:
    return _shown(parse_version(packages.get(name, "")))


def _shown(version: Version | None) -> str | None:
    return show_version(version) if version else None


def _l4t_of(packages: Mapping[str, str]) -> str | None:
    version = parse_version(packages.get("nvidia-l4t-core", ""))  # 36.4.3-20250107174145
    return _shown(version)


def _tensorrt(packages: Mapping[str, str]) -> str | None:
    # the library, whose name ends in its major version; two of them side by side are ambiguous
    versions = {
        version
        for name, text in packages.items()
        if re.fullmatch(r"libnvinfer\d{1,2}", name, re.ASCII)
        if (version := parse_version(text))
    }
    return show_version(versions.pop()) if len(versions) == 1 else None


def _cuda_of(packages: Mapping[str, str]) -> str | None:
    # Not from TensorRT's "+cuda12.5": JetPack 6.2 has that on CUDA 12.6
    versions = {
        version
        for name, text in packages.items()
        if re.fullmatch(r"cuda-cudart-\d{1,2}-\d{1,2}", name, re.ASCII)
        if (version := parse_version(text))
    }
    return show_version(versions.pop()) if len(versions) == 1 else None


def _isa(cores: list[set[str]], wanted: Mapping[str, set[str]]) -> frozenset[str]:
    return frozenset(
        name for name, needed in wanted.items() if cores and all(needed <= core for core in cores)
    )


def _cpu_name(fields: Mapping[str, set[str]]) -> str | None:
    names = fields.get("model name", set())
    if len(names) == 1:
        return next(iter(names)) or None
    parts = {_hexadecimal(part) for part in fields.get("CPU part", ())}
    if len(parts) != 1 or fields.get("CPU implementer") != {"0x41"}:
        return None
    return _ARM_PARTS.get(parts.pop())


def _hexadecimal(text: str) -> int:
    return int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,8}", text) else -1


def _cell(text: str) -> str | None:
    text = text.strip()
    return None if text in ("", "[N/A]", "N/A", "[Not Supported]", "[Unknown Error]") else text


def _megabytes(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,9}(\.\d{1,3})?", text, re.ASCII) else None
