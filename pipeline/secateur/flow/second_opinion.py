"""What TensorRT's own ``trtexec`` measures of a bundle's engine on its device, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.bundle.manifest import Manifest
from secateur.core.errors import BuildError, ConnectionLost, DeviceError
from secateur.devices.connection import clean
from secateur.devices.remote_run import RemoteBundle, Work
from secateur.devices.trtexec import Exports, Timing, engine_command
from secateur.devices.trtexec_report import parse_profile, parse_summary
from secateur.devices.version import parse_version

PROFILE = "trtexec-profile.json"
_MOST = 8 << 20  # bytes of its output, and of its profile


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    code: int
    output: Annotated[str, Field(max_length=_MOST)]
    reports: dict[str, Annotated[str, Field(max_length=_MOST)]]


def engine_of(folder: Path) -> dict[str, Any]:
    """Return the ``engine.json`` of a bundle; empty where there is none."""
    return _table(folder / "engine.json")


def trtexec_order(manifest: Manifest, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``on_bench.trtexec`` for an engine, of which ``engine.json`` is.

    The copies of image and outputs are timed, too, as the protocol's ``host_to_host`` does.

    Raises:
        DeviceError: it is no engine of TensorRT.
        BuildError: its version is none whose defaults are known.
    """
    device, options = engine.get("device", {}), engine.get("options", {})
    runtime = device.get("runtime", "none")
    if runtime != "tensorrt":
        raise DeviceError(
            f"trtexec times engines of TensorRT, and the bundle's is of {runtime}",
            hint="leave out --trtexec",
        )
    contract, batch = manifest.input, options.get("batch") or [1, 1, 1]
    shape = (1, 3, contract.height, contract.width)
    command = engine_command(
        "model.engine",
        parse_version(str(device.get("tensorrt"))) or (),
        timing=Timing(transfers=True),
        exports=Exports(profile=PROFILE),
        shapes={contract.name: shape} if len(set(batch)) > 1 else None,
    )
    return {"command": list(command), "reports": [PROFILE]}


def second_opinion(bundle: RemoteBundle, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Run trtexec on the device, on the engine of the bundle in ``folder``.

    Returns its summary, each layer's time with the tasks that need it, and the sums by tasks.

    Raises:
        DeviceError: see ``trtexec_order``; or trtexec is missing there.
        BuildError: what it says cannot be read.
    """
    layers = _table(folder / "layers.json")
    order = trtexec_order(manifest, engine_of(folder))
    text = bundle.perform(Work("trtexec", order, {}, 4 * _MOST)).read_text(encoding="utf-8")
    try:
        said = _Said.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise BuildError(
            f"trtexec's reports are not valid: {clean(str(error))[:200]}", hint="bench again"
        ) from error
    summary = parse_summary(said.output)
    if PROFILE not in said.reports:
        raise BuildError("trtexec wrote no profile", hint="bench again")
    known = {row.get("name"): row.get("tasks", []) for row in layers.get("layers", [])}
    rows = [
        {"name": layer.name, "mean_ms": layer.mean, "percent": layer.percent,
         "tasks": known.get(layer.name)}
        for layer in parse_profile(said.reports[PROFILE])
    ]  # fmt: skip
    return {
        "command": order["command"],
        "summary": summary.to_json(),
        "layers": rows,
        "ms_by_tasks": _by_tasks(rows),
    }


def asked_opinion(bundle: RemoteBundle, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return the same, or why there is none: what else was measured there is kept.

    Raises:
        ConnectionLost: calling again resumes.
    """
    try:
        return second_opinion(bundle, manifest, folder)
    except ConnectionLost:
        raise
    except (DeviceError, BuildError) as error:
        return {"not_available": error.message}


def said_of(opinion: Mapping[str, Any]) -> list[str]:
    """Return a second opinion in words."""
    if "not_available" in opinion:
        return [f"trtexec: not available: {opinion['not_available']}"]
    summary = opinion["summary"]
    times = [f"{name} {summary[name]['median']:.3g}" for name in ("Latency", "GPU Compute Time")]
    lines = [f"trtexec: median {', '.join(times)} ms; {summary['Throughput']:.4g} qps"]
    parts = sorted(opinion["ms_by_tasks"].items(), key=lambda pair: -pair[1])
    lines.append("by tasks: " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in parts))
    return lines


def _by_tasks(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sum the layers' milliseconds by the tasks that need them."""
    sums: dict[str, float] = {}
    for row in rows:
        key = "unknown" if row["tasks"] is None else "+".join(row["tasks"]) or "none"
        sums[key] = sums.get(key, 0.0) + row["mean_ms"]
    return {key: round(ms, 6) for key, ms in sums.items()}


def _table(path: Path) -> dict[str, Any]:
    """Return a table that the engine's builder wrote; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
