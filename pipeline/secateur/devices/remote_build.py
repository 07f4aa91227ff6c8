"""Build an engine on a device: copy, build there, bring it back, clean up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from secateur.core.errors import BuildError, ConnectionLost, DeviceError, first_problem
from secateur.core.files import file_sha256, not_writable, value_digest
from secateur.devices.connection import Connection, clean
from secateur.devices.remote_job import (
    MIB,
    Job,
    Made,
    Tell,
    copy_files,
    follow_job,
    remove_job,
    start_job,
)
from secateur.devices.remote_probe import check_python, probe_python

BUILDER = "build_engine.py"
RECORD = "engine.json"
LIMITS: Mapping[str, int] = {
    RECORD: MIB, "layers.json": 64 * MIB, "timing.cache": 512 * MIB, "model.engine": 8192 * MIB,
}  # fmt: skip
"""All that is brought back, and the most bytes that each may have."""

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class EngineRecord(BaseModel):
    """``engine.json`` as ``build_engine.py`` writes it; ``device`` is what the engine is bound to.

    ``files`` holds the SHA-256 of the ONNX file, the engine and the timing cache (None: no cache).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    schema_version: Literal[1]
    device: dict[str, Any]
    files: dict[str, Digest | None]
    options: dict[str, Any]
    bytes: int = Field(ge=1)
    layers: int = Field(ge=0)
    layers_of: Literal["engine", "network"]
    seconds: dict[str, float]
    created: str


@dataclass(frozen=True)
class Order:
    """What to build: the bundle's files by name, and the TensorRT module (its ``runtime``)."""

    files: Mapping[str, Path]
    runtime: str

    def key(self) -> str:
        """Return the name of its folder on the device: equal orders have equal ones."""
        digests = {name: file_sha256(path) for name, path in self.files.items()}
        return value_digest([digests, self.runtime])


def build_engine(connection: Connection, order: Order, into: Path, tell: Tell) -> EngineRecord:
    """Run the bundle's ``build_engine.py`` on the device; write what it made into a folder.

    Builds of one device run one after the other, whoever calls. Written are model.engine,
    layers.json, timing.cache where there is one, and last engine.json.

    Raises:
        ConnectionLost: calling again resumes.
        BuildError: the builder there says why it cannot.
        DeviceError: the device lacks TensorRT or room, or what it sent is not what it must be.
        BundleError: nothing can be written here.
    """
    key = order.key()
    python = probe_python(connection)
    check_python(python, connection.name, order.runtime)
    job = Job(key, order.files, [BUILDER], "build", BuildError)
    try:
        copy_files(connection, job, tell)
        start_job(connection, job, tell)
        announced = follow_job(connection, job, tell)
        record = _bring(connection, order, key, announced, into)
    except ConnectionLost:
        raise
    except (DeviceError, BuildError):
        remove_job(connection, key)
        raise
    remove_job(connection, key)
    tell(f"model.engine: {record.bytes:,} bytes, {record.layers} layers, from {connection.name}")
    return record


def _bring(
    connection: Connection,
    order: Order,
    key: str,
    announced: Made,
    into: Path,
) -> EngineRecord:
    """Bring the results into a folder beside the bundle's files, then rename them all."""
    waiting = into / ".from-device"
    names = [name for name in LIMITS if name in announced]
    try:
        waiting.mkdir(exist_ok=True)
        for name in names:
            connection.get(key, name, waiting / name, announced[name][1], LIMITS[name])
        record = _checked(connection.name, order, waiting, announced)
        for name in LIMITS:  # engine.json first: it must not vouch for another engine
            (into / name).unlink(missing_ok=True)
        for name in reversed(names):  # engine.json last
            (waiting / name).replace(into / name)
        shutil.rmtree(waiting)
    except ConnectionLost:  # what came is kept
        raise
    except DeviceError:
        shutil.rmtree(waiting)
        raise
    except OSError as error:
        raise not_writable(into, error) from error
    return record


def _checked(device: str, order: Order, folder: Path, announced: Made) -> EngineRecord:
    """Return engine.json's content, checked against what was ordered and what came."""
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        record = EngineRecord.model_validate(json.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        raise DeviceError(
            f"{RECORD} from {device} is not valid: {clean(first_problem(error))}",
            hint="check that the device is the one you mean, and build again",
        ) from error
    came = {name: sha256 for name, (_, sha256) in announced.items()}
    pairs = {
        "the ONNX file": (record.files.get("model.onnx"), file_sha256(order.files["model.onnx"])),
        "model.engine": (record.files.get("model.engine"), came.get("model.engine")),
        "timing.cache": (record.files.get("timing.cache"), came.get("timing.cache")),
        "bytes": (record.bytes, announced.get("model.engine", (None,))[0]),
        "runtime": (record.device.get("runtime"), order.runtime),
    }
    for field, (said, wanted) in pairs.items():
        if said != wanted:
            raise DeviceError(
                f"the engine from {device} does not match: {field} is {clean(str(said))} in its "
                f"{RECORD}, expected {wanted}",
                hint="another file or TensorRT was used there: run the same command again",
            )
    return record
