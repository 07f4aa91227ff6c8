"""Build an engine on a device: copy, build there, bring it back, clean up.

Calling again after anything went wrong goes on where the last call stopped: files that arrived
stay, a build that was begun runs on there without us and is followed from its first line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from secateur.core.errors import BuildError, ConnectionLost, DeviceError
from secateur.core.files import file_sha256, not_writable, value_digest
from secateur.devices.connection import Connection, clean, disk_full
from secateur.devices.remote_probe import check_python, probe_python

BUILDER = "build_engine.py"
RECORD = "engine.json"
MIB = 1 << 20
LIMITS: Mapping[str, int] = {
    RECORD: MIB, "layers.json": 64 * MIB, "timing.cache": 512 * MIB, "model.engine": 8192 * MIB,
}  # fmt: skip
"""All that is brought back, and the most bytes that each may have."""

_MOST_LINES = 10_000  # of a builder's output are passed on
Tell = Callable[[str], None]
"""Called with one line, without its end, on what happens."""

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
    try:
        _copy(connection, order, key, tell)
        _run(connection, key, tell)
        announced = _follow(connection, key, tell)
        record = _bring(connection, order, key, announced, into)
    except ConnectionLost:
        raise
    except (DeviceError, BuildError):
        _remove(connection, key)
        raise
    _remove(connection, key)
    tell(f"model.engine: {record.bytes:,} bytes, {record.layers} layers, from {connection.name}")
    return record


def _copy(connection: Connection, order: Order, key: str, tell: Tell) -> None:
    shown = -1

    def told(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // total
        if tenth > shown and total >= 16 * MIB:
            tell(f"copied {done // MIB} of {total // MIB} MiB")
        shown = tenth

    sent = connection.put(order.files, key, told)
    tell(f"{len(order.files)} files on {connection.name}, {sent:,} bytes had to be copied")


def _run(connection: Connection, key: str, tell: Tell) -> None:
    started = any(
        answer.get("started") is True
        for answer in connection.ask("start", folder=key, command=[BUILDER])
    )
    tell("the build goes on there even if the connection breaks" if started
         else "an earlier call began this build: following it")  # fmt: skip


def _follow(connection: Connection, key: str, tell: Tell) -> Mapping[str, tuple[int, str]]:
    """Pass on what the build prints; return {name: (bytes, sha256)} of what it made."""
    last, lines, end = "", 0, None
    for answer in connection.ask("follow", folder=key):
        if isinstance(answer.get("line"), str) and lines < _MOST_LINES:
            last, lines = clean(answer["line"]), lines + 1
            tell(last)
        elif isinstance(answer.get("seconds"), int):
            tell(f"{answer['seconds']} s so far")
        elif "end" in answer:
            end = answer
    if end is None:
        raise ConnectionLost(
            f"{connection.name} stopped telling how the build goes",
            hint="run the same command again: the build goes on there",
        )
    code = end["end"].get("code") if isinstance(end["end"], dict) else None
    if code != 0:
        raise _failed(connection, code, last, end.get("free"))
    made = end.get("files")
    return {
        name: (row[0], row[1])
        for name, row in (made.items() if isinstance(made, dict) else ())
        if isinstance(row, list) and [type(cell) for cell in row] == [int, str]
    }


def _failed(
    connection: Connection, code: object, last: str, free: object
) -> DeviceError | BuildError:
    """Return the error for a build that ended badly; ``last`` is the last line it printed."""
    if isinstance(free, int) and free < MIB:
        return disk_full(connection.name, f"{free:,} bytes were left when the build failed")
    if last.startswith("error: "):  # the builder's own sentence
        what = last.removeprefix("error: ")
    elif not isinstance(code, int):
        what = "the build was stopped there before it ended"
    elif code < 0:
        what = f"the builder was killed by signal {-code}"
        what += ", as happens when memory runs out" * (code == -9)
    else:
        what = f"the build ended with status {code}: {last or 'it gave no reason'}"
    return BuildError(f"{connection.name}: {what}", hint="change that, run the same command again")


def _bring(
    connection: Connection,
    order: Order,
    key: str,
    announced: Mapping[str, tuple[int, str]],
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


def _checked(
    device: str, order: Order, folder: Path, announced: Mapping[str, tuple[int, str]]
) -> EngineRecord:
    """Return engine.json's content, checked against what was ordered and what came."""
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        record = EngineRecord.model_validate(json.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        where = ".".join(map(str, first["loc"])) + ": " + first["msg"] if first else str(error)
        raise DeviceError(
            f"{RECORD} from {device} is not valid: {clean(where)}",
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


def _remove(connection: Connection, key: str) -> None:
    """Clean up; where that fails, what is left goes with a later call (``on_device.forget``)."""
    with suppress(DeviceError):
        list(connection.ask("remove", folder=key))
