"""Target profiles: ``targets/<name>/target.yaml``, each fact with its source.

What code reads is a typed field; what people only read is a free ``Fact``. Either has a source,
and ``derived`` where it was computed from others rather than read somewhere.
"""

from __future__ import annotations

import difflib
import platform
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from secateur.core.errors import DeviceError, first_problem
from secateur.core.shipped import shipped
from secateur.devices.hardware import Cpu, Dla, Fact, Gpu, Memory, PowerMode, Stack, StandIn, Strict
from secateur.devices.version import Version, in_series, parse_version

Precision = Literal["fp32", "fp16", "int8"]


class Row(NamedTuple):
    """One line of what is known: for people."""

    fact: str
    value: str
    source: str
    derived: bool


class Target(Strict):
    """A device as the pipeline sees it.

    ``channel_grid`` gives, per precision, the multiple that channel counts are kept at, because
    the runtime's kernels work in such blocks. ``builds`` lists what this version can make for it;
    an ``engine`` is built on the device itself, by ``engine_runtime`` (the Python module there).
    ``runtime`` is what a bundle is checked with on the machine that builds it. ``modules`` are
    the part numbers by which a device tells in its device tree that it is this target.
    ``stand_in`` is what an emulator runs bundles on in its place.
    """

    name: str
    title: str
    arch: Literal["x86_64", "aarch64"]
    accelerator: Literal["cpu", "gpu"]
    runtime: str
    engine_runtime: Literal["tensorrt", "tensorrt_rtx"] | None = None
    threads: int = Field(ge=1, description="threads a latency is measured with by default")
    precisions: tuple[Precision, ...]
    channel_grid: dict[Precision, int]
    builds: tuple[Literal["onnx", "engine"], ...]
    note: str = ""
    modules: tuple[str, ...] = ()
    gpu: Gpu | None = None
    cpu: Cpu | None = None
    memory: Memory | None = None
    stand_in: StandIn | None = None
    dla: Dla | None = None
    power_modes: tuple[PowerMode, ...] = ()
    stacks: tuple[Stack, ...] = ()
    facts: dict[str, Fact] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parts_agree(self) -> Target:
        missing = set(self.precisions) - set(self.channel_grid)
        if missing:
            raise ValueError(f"channel_grid lacks {', '.join(sorted(missing))}")
        if ("engine" in self.builds) != (self.engine_runtime is not None):
            raise ValueError("engine_runtime is set exactly where builds has engine")
        if self.accelerator == "gpu" and self.gpu is None:
            raise ValueError("a gpu target needs the gpu block")
        names = [mode.name for mode in self.power_modes]
        if len(set(names)) < len(names):
            raise ValueError("two power modes have the same name")
        releases = [release for stack in self.stacks for release in stack.l4t]
        if len(set(releases)) < len(releases):
            raise ValueError("two stacks claim the same l4t release")
        return self

    def is_this_machine(self) -> bool:
        """Say whether a latency measured here, on the CPU, is one of this target."""
        return self.arch == platform.machine() and self.accelerator == "cpu"

    def power_mode(self, name: str) -> PowerMode | None:
        """Return the mode of that name, or None: a device may have others than we know."""
        return next((mode for mode in self.power_modes if mode.name == name), None)

    def stack(self, l4t: str) -> Stack | None:
        """Return what comes with a Jetson Linux release such as "36.4.3"; None when unknown."""
        release = parse_version(l4t)
        return None if release is None else _stack_of(self.stacks, release)

    def dla_cores(self, tensorrt: Version) -> int:
        """Return how many DLA cores that TensorRT version can use on this module."""
        return self.dla.usable(tensorrt) if self.dla else 0

    def dense_rate(self, precision: Literal["int8", "fp16"], mode: str) -> float | None:
        """Return the GPU's dense int8 (TOPS) or fp16 (TFLOPS) peak in a power mode.

        Without DLA and without sparsity: rate per SM and GHz x SMs x GHz. None where a factor
        is unknown.

        Raises:
            DeviceError: the profile has no such power mode.
        """
        found = self.power_mode(mode)
        if found is None:
            raise DeviceError(
                f"{self.name} has no power mode '{mode}'",
                hint=f"modes: {', '.join(each.name for each in self.power_modes) or 'none known'}",
            )
        return self.gpu.dense_rate(precision, found) if self.gpu else None

    def rows(self) -> list[Row]:
        """Return everything known, one line a fact."""
        blocks = {"gpu": self.gpu, "cpu": self.cpu, "memory": self.memory, "dla": self.dla,
                  "stand-in": self.stand_in}  # fmt: skip
        rows = [
            Row(name, block.said(), block.source, block.derived)
            for name, block in blocks.items()
            if block is not None
        ]
        rows += [
            Row(f"power mode {mode.name}", mode.said(), mode.source, mode.derived)
            for mode in self.power_modes
        ]
        rows += self._rates()
        rows += [
            Row(f"JetPack {stack.jetpack}", stack.said(), stack.source, stack.derived)
            for stack in self.stacks
        ]
        return rows + [
            Row(name, f"{fact.value} {fact.unit}".strip(), fact.source, fact.derived)
            for name, fact in self.facts.items()
        ]

    def _rates(self) -> list[Row]:
        """Return the GPU's dense peaks in every power mode, or without any where it has none."""
        if self.gpu is None:
            return []
        modes = self.power_modes or (PowerMode(name="", source=self.gpu.source),)
        rows = []
        units: dict[Literal["int8", "fp16"], str] = {"int8": "TOPS", "fp16": "TFLOPS"}
        for precision, unit in units.items():
            rates = [(mode.name, self.gpu.dense_rate(precision, mode)) for mode in modes]
            said = [f"{rate:.3g}{name and f' in {name}'}" for name, rate in rates if rate]
            if said:
                words = f"{unit} of the GPU alone, without sparsity: {', '.join(said)}"
                rows.append(Row(f"dense {precision}", words, "rate per SM and GHz of gpu, above, "
                                "x SMs x GHz of the mode", True))  # fmt: skip
        return rows


def _stack_of(stacks: tuple[Stack, ...], release: Version) -> Stack | None:
    # The longest match wins, so that 39.2.2 may have its own stack beside 39.2.
    matches = [
        (len(series), stack)
        for stack in stacks
        for series in map(parse_version, stack.l4t)
        if series is not None and in_series(release, series)
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def target_names(root: Path | None = None) -> list[str]:
    """Return the names of all targets, sorted."""
    return sorted(file.parent.name for file in (root or shipped("targets")).glob("*/target.yaml"))


def _first_problem(error: ValidationError | yaml.YAMLError) -> str:
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {error}"
    return first_problem(error)


def load_target(name: str, root: Path | None = None) -> Target:
    """Read a target's profile.

    Raises:
        DeviceError: there is no such target, or its profile has a typo or a missing fact.
    """
    folder = root or shipped("targets")
    path = folder / name / "target.yaml"
    if name not in target_names(folder):
        known = target_names(folder)
        near = difflib.get_close_matches(name, known, n=1)
        raise DeviceError(
            f"there is no target '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"targets: {', '.join(known)}",
        )
    try:
        target = Target.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise DeviceError(
            f"{path}: {_first_problem(error)}",
            hint="compare with another target's profile",
        ) from error
    if target.name != name:
        raise DeviceError(
            f"{path} says it is '{target.name}'", hint="the folder and the name must agree"
        )
    return target
