"""Target profiles: ``targets/<name>/target.yaml``, each fact with its source."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.core.errors import DeviceError
from secateur.core.shipped import shipped

Precision = Literal["fp32", "fp16", "int8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fact(_Strict):
    """One fact. ``derived`` marks what was computed from others rather than read somewhere."""

    value: str | int | float | bool
    unit: str = ""
    source: str = Field(min_length=3)
    derived: bool = False


class Target(_Strict):
    """A device as the pipeline sees it.

    ``channel_grid`` gives, per precision, the multiple that channel counts are kept at, because
    the runtime's kernels work in such blocks. ``builds`` lists what this version can make for it.
    """

    name: str
    title: str
    arch: Literal["x86_64", "aarch64"]
    accelerator: Literal["cpu", "gpu"]
    runtime: str
    threads: int = Field(ge=1, description="threads a latency is measured with by default")
    precisions: tuple[Precision, ...]
    channel_grid: dict[Precision, int]
    builds: tuple[Literal["onnx", "engine"], ...]
    note: str = ""
    facts: dict[str, Fact]


def target_names(root: Path | None = None) -> list[str]:
    """Return the names of all targets, sorted."""
    return sorted(file.parent.name for file in (root or shipped("targets")).glob("*/target.yaml"))


def _first_problem(error: ValidationError | yaml.YAMLError) -> str:
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {error}"
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


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
