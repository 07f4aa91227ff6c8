"""The typed parts of a target's profile: GPU, CPU, memory, DLA, power modes, software stacks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from secateur.devices.version import Version, between, parse_version, show_version

NumberFormat = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4"]
IsaFeature = Literal["fp16", "dotprod", "i8mm", "bf16", "sve", "sve2"]


def _is_version(text: str) -> str:
    version = parse_version(text)
    if version is None or show_version(version) != text:
        raise ValueError("a version looks like 10.3 or 36.4.3")
    return text


VersionText = Annotated[str, AfterValidator(_is_version)]


class Strict(BaseModel):
    """A part of a profile: a key that is not known is an error, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sourced(Strict):
    """Something stated. ``derived``: computed from others, in the way that ``source`` says."""

    source: str = Field(min_length=3)
    derived: bool = False


class Fact(Sourced):
    """One fact that people read and no code does."""

    value: str | int | float | bool
    unit: str = ""


class Gpu(Sourced):
    """A GPU, or the kind of GPU where a profile stands for many.

    ``max_mhz`` is the clock without a cap. ``dense_int8`` (TOPS) and ``dense_fp16`` (TFLOPS) are
    peak rates per SM and GHz: without sparsity, without DLA.
    """

    name: str
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")], ...] = Field(
        min_length=1
    )
    sms: int | None = Field(default=None, ge=1)
    max_mhz: float | None = Field(default=None, gt=0)
    formats: tuple[NumberFormat, ...]
    dense_int8: float | None = Field(default=None, gt=0)
    dense_fp16: float | None = Field(default=None, gt=0)

    def dense_rate(self, precision: Literal["int8", "fp16"], mode: PowerMode) -> float | None:
        """Return the peak in a power mode; None where a factor is unknown."""
        per_sm_ghz = self.dense_int8 if precision == "int8" else self.dense_fp16
        sms, mhz = mode.gpu_sms or self.sms, mode.gpu_mhz or self.max_mhz
        if per_sm_ghz is None or sms is None or mhz is None:
            return None
        return per_sm_ghz * sms * mhz / 1000

    def said(self) -> str:
        """Return the facts in one line."""
        parts = [self.name, f"compute capability {', '.join(self.compute_capabilities)}"]
        parts += [f"{self.sms} SMs"] if self.sms else []
        parts += [f"up to {self.max_mhz:g} MHz"] if self.max_mhz else []
        return "; ".join([*parts, " ".join(self.formats)])


class Cpu(Sourced):
    """A CPU; ``isa`` lists what int8 and fp16 kernels ask for, not all it has."""

    name: str
    cores: int = Field(ge=1)
    max_ghz: float = Field(gt=0)
    isa: tuple[IsaFeature, ...]

    def said(self) -> str:
        """Return the facts in one line."""
        return f"{self.cores}x {self.name}, {self.max_ghz:g} GHz; {' '.join(self.isa)}"


class Memory(Sourced):
    """Memory, shared by CPU and GPU on a Jetson."""

    gb: float = Field(gt=0)
    kind: str
    bandwidth_gb_s: float = Field(gt=0)

    def said(self) -> str:
        """Return the facts in one line."""
        return f"{self.gb:g} GB {self.kind}, {self.bandwidth_gb_s:g} GB/s"


class StandIn(Sourced):
    """The CPU models of QEMU that stand in for the device, best first: releases have others.

    A model may have properties, as in ``max,sme=off``.
    """

    qemu_cpus: tuple[str, ...] = Field(min_length=1)

    def said(self) -> str:
        """Return the models in one line."""
        return "qemu-aarch64 -cpu " + ", else ".join(self.qemu_cpus)


class VersionRange(Strict):
    """Versions from ``first`` to ``last``, both included; an end left out is open."""

    first: VersionText | None = None
    last: VersionText | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> VersionRange:
        first, last = self.bounds()
        if first is None and last is None:
            raise ValueError("a range needs first, last or both")
        if first and last and last < first[: len(last)]:
            raise ValueError(f"first {self.first} comes after last {self.last}")
        return self

    def bounds(self) -> tuple[Version | None, Version | None]:
        """Return both ends as numbers."""
        first, last = (parse_version(end) if end else None for end in (self.first, self.last))
        return first, last

    def said(self) -> str:
        """Return the range in words."""
        if self.first and self.last:
            return f"{self.first} to {self.last}"
        return f"{self.first} on" if self.first else f"up to {self.last}"


class Dla(Sourced):
    """Deep-learning accelerators: whether they can be used depends on TensorRT's version too."""

    cores: int = Field(ge=1)
    tensorrt: tuple[VersionRange, ...] = Field(min_length=1)

    def usable(self, tensorrt: Version) -> int:
        """Return the cores that a TensorRT version can use: all or none."""
        fits = any(between(tensorrt, *versions.bounds()) for versions in self.tensorrt)
        return self.cores if fits else 0

    def said(self) -> str:
        """Return the facts in one line."""
        ranges = " and ".join(versions.said() for versions in self.tensorrt)
        return f"{self.cores} cores, with TensorRT {ranges}"


class PowerMode(Sourced):
    """An nvpmodel power mode. A clock left out is not capped by it.

    There is no id: ids move between releases, so they are read on the device (``nvpmodel.py``).
    ``gpu_sms`` are those left powered where the mode switches some off. ``watts`` is the budget,
    left out for the MAXN modes, which have none.
    """

    name: str
    watts: float | None = Field(default=None, gt=0)
    cpu_cores: int | None = Field(default=None, ge=1)
    cpu_mhz: float | None = Field(default=None, gt=0)
    gpu_mhz: float | None = Field(default=None, gt=0)
    gpu_sms: int | None = Field(default=None, ge=1)
    emc_mhz: float | None = Field(default=None, gt=0)
    dla_mhz: float | None = Field(default=None, gt=0)

    def said(self) -> str:
        """Return the facts in one line."""
        cores = f"{self.cpu_cores} cores" if self.cpu_cores else "CPU"
        parts = [f"{self.watts:g} W"] if self.watts else []
        parts.append(f"{cores} {_cap(self.cpu_mhz)}")
        parts.append(f"GPU {_cap(self.gpu_mhz)}" + (f", {self.gpu_sms} SMs" * bool(self.gpu_sms)))
        parts.append(f"memory {_cap(self.emc_mhz)}")
        parts += [f"DLA {_cap(self.dla_mhz)}"] if self.dla_mhz else []
        return "; ".join(parts)


def _cap(mhz: float | None) -> str:
    return "not capped" if mhz is None else f"<= {mhz:g} MHz"


class Stack(Sourced):
    """What one JetPack brings; ``l4t`` are the Jetson Linux releases it is known by."""

    jetpack: str
    l4t: tuple[VersionText, ...] = Field(min_length=1)
    cuda: VersionText
    tensorrt: VersionText

    def said(self) -> str:
        """Return the facts in one line."""
        return f"Jetson Linux {', '.join(self.l4t)}: CUDA {self.cuda}, TensorRT {self.tensorrt}"
