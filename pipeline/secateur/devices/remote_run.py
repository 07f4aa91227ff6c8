"""A bundle on a device: its own ``run.py`` there, one piece of work after the other.

The bundle is copied once and stays until the work is done. Results wait here, in a folder that
outlives a lost connection, so that calling again neither copies nor runs again what was done.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from secateur.core.errors import ConnectionLost, DeviceError, SecateurError, first_problem
from secateur.core.files import file_sha256, not_writable, value_digest
from secateur.devices import on_bench
from secateur.devices.connection import RESUMES, Connection, clean
from secateur.devices.remote_job import (
    MIB,
    Job,
    Tell,
    copy_files,
    follow_job,
    remove_job,
    start_job,
)

AGENT = Path(on_bench.__file__)
LONGEST_RESULT = 64 * MIB  # of JSON
PATIENCE = 1800.0  # seconds without a line, which comes every few seconds while images run

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Known = Annotated[float, Field(allow_inf_nan=False)] | None
Short = Annotated[str, StringConstraints(max_length=200)]


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ToldHost(_Told):
    """What the device says it is; None is unknown."""

    cpu: Short | None
    arch: Short
    os: Short
    logical_cores: Annotated[int, Field(ge=1, le=4096)] | None
    memory_gb: Known
    governor: Short | None
    clock_mhz: Known
    temperature_c: Known
    load_1min: Known


class ToldSamples(_Told):
    """Milliseconds of successive calls."""

    host_to_host: list[Positive]
    end_to_end: list[Positive]
    # of a runtime that tells
    device_only: Annotated[list[Positive], Field(min_length=1)] | None = None


class ToldLook(_Told):
    """Texts of the device's files, ``at`` so many seconds after a phase began."""

    at: Annotated[float, Field(allow_inf_nan=False)]
    files: dict[Short, Short]


class ToldPhase(_Told):
    """What was looked at while the device idled, or ran ``calls`` inferences."""

    phase: Literal["idle", "busy"]
    seconds: Positive
    calls: Annotated[int, Field(ge=1)]
    looks: Annotated[list[ToldLook], Field(max_length=on_bench.MOST_LOOKS)]


class ToldLatency(_Told):
    """What ``on_bench.latency`` writes."""

    samples_ms: ToldSamples
    phases: Annotated[list[ToldPhase], Field(max_length=30)]
    offline_ms: Annotated[list[Positive], Field(min_length=1)]
    offline_batch: Annotated[int, Field(gt=0)]
    temperature_before_c: Known
    temperature_after_c: Known
    throttling_before: dict[Short, int]
    throttling_after: dict[Short, int]
    throttling_offline: dict[Short, int]
    runtime: Short
    process_peak_memory_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    host: ToldHost
    versions: dict[Short, Short]


@dataclass(frozen=True)
class Work:
    """A verb of the agent, its arguments, the files it reads, the most bytes it may give."""

    verb: str
    arguments: Mapping[str, Any]
    files: Mapping[str, Path]
    limit: int

    def result(self) -> str:
        """Return the name of its result: equal work has equal ones."""
        digests = {name: file_sha256(path) for name, path in self.files.items()}
        return f"{self.verb}-{value_digest([self.verb, dict(self.arguments), digests])}"


class RemoteBundle:
    """A bundle's files on a device, in a folder of the name ``place``; ``agent`` works there."""

    def __init__(
        self, connection: Connection, files: Mapping[str, Path], desk: Path, place: str,
        tell: Tell, agent: Path = AGENT,
    ) -> None:  # fmt: skip
        self._connection, self._desk, self._place, self._tell = connection, desk, place, tell
        self._agent, self._files = agent.name, {**files, agent.name: agent}

    def perform(self, work: Work) -> Path:
        """Run a piece of work there; return the file here that holds what it gave.

        Raises:
            ConnectionLost: calling again resumes.
            DeviceError: the bundle does not run there, or what came is too large or altered.
        """
        name = work.result()
        result = self._desk / name
        if result.exists():
            return result
        order = json.dumps({**work.arguments, "result": name})
        job = Job(
            self._place, {**self._files, **work.files}, [self._agent, work.verb, order], "run",
            DeviceError, PATIENCE,
        )  # fmt: skip
        copy_files(self._connection, job, self._tell)
        started = start_job(self._connection, job, self._tell)
        made = follow_job(self._connection, job, self._tell)
        if name not in made and not started:  # that was other work, of a call that was cut off
            self._clear()
            copy_files(self._connection, job, self._tell)
            start_job(self._connection, job, self._tell)
            made = follow_job(self._connection, job, self._tell)
        if name not in made:
            raise DeviceError(
                f"{self._connection.name} ended the run without a result",
                hint="run the same command again; if it stays, report this",
            )
        self._connection.get(self._place, name, result, made[name][1], work.limit)
        self._clear()
        return result

    def latency(self, work: Work) -> ToldLatency:
        """Run ``on_bench.latency`` there and return what it wrote, checked.

        Raises:
            DeviceError: see ``perform``; or it is not what it must be.
        """
        path = self.perform(work)
        try:
            told = ToldLatency.model_validate(json.loads(path.read_text(encoding="utf-8")))
            samples, least = told.samples_ms, work.arguments["protocol"]["runs"]
            if not len(samples.host_to_host) == len(samples.end_to_end) >= least:
                raise ValueError(
                    f"{len(samples.host_to_host)} and {len(samples.end_to_end)} runs, expected as "
                    f"many of each, at least {least}"
                )
        except (ValueError, RecursionError) as error:
            raise DeviceError(
                f"the latencies from {self._connection.name} are not valid: "
                f"{clean(first_problem(error))}",
                hint="check that the device is the one you mean, and bench again",
            ) from error
        return told

    def _clear(self) -> None:
        list(self._connection.ask("clear", folder=self._place, keep=list(self._files)))


@contextmanager
def bundle_on_device(
    connection: Connection,
    files: Mapping[str, Path],
    desk: Path,
    tell: Tell,
    agent: Path = AGENT,
) -> Iterator[RemoteBundle]:
    """Yield a bundle that is copied with its first work, and removed there and here at the end.

    ``desk`` is a folder here that is the same for the same bundle and device. After a lost
    connection, or when this process is stopped, both sides keep what they have.

    Raises:
        DeviceError: another call is at work with the same bundle and device.
    """
    with _alone(desk, connection.name):
        place = _place(desk)
        try:
            yield RemoteBundle(connection, files, desk, place, tell, agent)
        except ConnectionLost:
            raise
        except SecateurError:
            _remove(connection, desk, place)
            raise
        _remove(connection, desk, place)


def _place(desk: Path) -> str:
    """Return the name of the folder there: random, so that no other machine's call has it."""
    note = desk / "place"
    if not note.exists():
        note.write_text(secrets.token_hex(16))
    return note.read_text()


def _remove(connection: Connection, desk: Path, place: str) -> None:
    remove_job(connection, place)
    shutil.rmtree(desk)


@contextmanager
def _alone(desk: Path, device: str) -> Iterator[None]:
    try:
        desk.mkdir(parents=True, exist_ok=True)
        lock = desk.with_name(f"{desk.name}.lock").open("w")
    except OSError as error:
        raise not_writable(desk, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DeviceError(
                f"another call is at work with this bundle on {device}",
                hint=f"wait until it has ended, then {RESUMES}",
            ) from error
        yield
