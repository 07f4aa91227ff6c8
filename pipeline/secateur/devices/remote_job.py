"""A job on a device: copy files, start, follow; it goes on there whatever happens to us.

Calling again after anything went wrong goes on where the last call stopped: files that arrived
stay, a job that was begun runs on there without us and is followed from its first line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import BuildError, ConnectionLost, DeviceError
from secateur.devices.connection import Connection, clean, disk_full

MIB = 1 << 20

_MOST_LINES = 10_000  # of a job's output are passed on
Tell = Callable[[str], None]
"""Called with one line, without its end, on what happens."""

Made = Mapping[str, tuple[int, str]]
"""{name: (bytes, sha256)} of the files that lie in the job's folder when it has ended."""


@dataclass(frozen=True)
class Job:
    """``command`` is what the device's Python runs in ``folder``, where ``files`` lie by name.

    ``noun`` is what messages call it, ``error`` what is raised where it ends badly. A job that
    prints nothing for ``patience`` seconds is given up.
    """

    folder: str
    files: Mapping[str, Path]
    command: Sequence[str]
    noun: str
    error: type[BuildError] | type[DeviceError]
    patience: float = math.inf


def copy_files(connection: Connection, job: Job, tell: Tell) -> None:
    """Copy what differs there, telling how far it is where that takes long."""
    shown = -1

    def told(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)  # a file may be there but for its name
        if tenth > shown and total >= 16 * MIB:
            tell(f"copied {done // MIB} of {total // MIB} MiB")
        shown = tenth

    sent = connection.put(job.files, job.folder, told)
    tell(f"{len(job.files)} files on {connection.name}, {sent:,} bytes had to be copied")


def start_job(connection: Connection, job: Job, tell: Tell) -> bool:
    """Start the job; return False where one of its folder runs or has ended already."""
    started = any(
        answer.get("started") is True
        for answer in connection.ask("start", folder=job.folder, command=list(job.command))
    )
    tell(f"the {job.noun} goes on there even if the connection breaks" if started
         else f"an earlier call began this {job.noun}: following it")  # fmt: skip
    return started


def follow_job(connection: Connection, job: Job, tell: Tell) -> Made:
    """Pass on what the job prints; return what it made.

    Raises:
        ConnectionLost: calling again resumes.
        BuildError, DeviceError: the job's kind of error, with the reason that it gave.
    """
    last, lines, end, heard = "", 0, None, time.monotonic()
    for answer in _answers(connection, job, tell):
        if isinstance(answer.get("line"), str):
            heard = time.monotonic()
            if lines < _MOST_LINES:
                last, lines = clean(answer["line"]), lines + 1
                tell(last)
        elif isinstance(answer.get("seconds"), int):
            if last.startswith("waiting"):  # for the device, not for the job
                heard = time.monotonic()
            if time.monotonic() - heard > job.patience:
                raise job.error(
                    f"{connection.name}: the {job.noun} has told nothing for "
                    f"{job.patience:.0f} s and is given up",
                    hint="look at what the device is busy with, then try again",
                )
            tell(f"{answer['seconds']} s so far")
        elif "end" in answer:
            end = answer
    if end is None:
        raise ConnectionLost(
            f"{connection.name} stopped telling how the {job.noun} goes",
            hint=f"run the same command again: the {job.noun} goes on there",
        )
    code = end["end"].get("code") if isinstance(end["end"], dict) else None
    if code != 0:
        raise _failed(connection, job, code, last, end.get("free"))
    made: Any = end.get("files")
    return {
        name: (row[0], row[1])
        for name, row in (made.items() if isinstance(made, dict) else ())
        if isinstance(row, list) and [type(cell) for cell in row] == [int, str]
    }


def _answers(connection: Connection, job: Job, tell: Tell) -> Iterator[dict[str, Any]]:
    try:
        yield from connection.ask("follow", folder=job.folder)
    except KeyboardInterrupt:
        tell(f"the {job.noun} goes on there; to end it: secateur doctor --device "
             f"'{connection.address}' --stop")  # fmt: skip
        raise


def _failed(
    connection: Connection, job: Job, code: object, last: str, free: object
) -> DeviceError | BuildError:
    """Return the error for a job that ended badly; ``last`` is the last line it printed."""
    if isinstance(free, int) and free < MIB:
        return disk_full(connection.name, f"{free:,} bytes were left when the {job.noun} failed")
    if last.startswith("error: "):  # the program's own sentence
        what = last.removeprefix("error: ")
    elif not isinstance(code, int):
        what = f"the {job.noun} was stopped there before it ended"
    elif code < 0:
        what = f"the {job.noun} was killed by signal {-code}"
        what += ", as happens when memory runs out" * (code == -9)
    else:
        what = f"the {job.noun} ended with status {code}: {last or 'it gave no reason'}"
    return job.error(f"{connection.name}: {what}", hint="change that, run the same command again")


def stop_jobs(connection: Connection, folders: Sequence[str]) -> list[str]:
    """Stop jobs and remove their folders; return those of which none is left.

    Raises:
        DeviceError: the device cannot be reached.
    """
    gone = []
    for folder in folders:
        list(connection.ask("stop", folder=folder))
        answers = list(connection.ask("remove", folder=folder))
        gone += [folder] * any(answer.get("removed") is True for answer in answers)
    return gone


def remove_job(connection: Connection, folder: str) -> None:
    """Clean up; where that fails, what is left goes with a later call (``on_device.forget``)."""
    with suppress(DeviceError):
        list(connection.ask("stop", folder=folder))
        list(connection.ask("remove", folder=folder))
