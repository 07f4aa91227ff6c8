"""Commands and files on a device: the protocol, and what every connection over pipes shares.

What a device answers is never believed: texts are bounded and freed of control characters, sizes
are bounded, files have names that we chose and are checked by SHA-256.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from secateur.core.errors import ConnectionLost, DeviceError
from secateur.core.files import file_sha256, not_writable
from secateur.devices import on_device
from secateur.devices.session import BLOCK, PATIENCE, Session

Told = Callable[[int, int], None]
"""Called with the bytes that went over, and those that have to."""

# Turned into one line, so that every login shell takes it; older Pythons could not read the rest.
_LOADER = (
    "import sys;sys.path[:]=[p for p in sys.path if p];import base64;"
    "sys.exit('secateur:old '+sys.version.split()[0]) if sys.version_info<(3,8) else "
    "exec(base64.b64decode(sys.argv.pop(1)))"
)
RESUMES = "run the same command again: it goes on where this one stopped"


@dataclass(frozen=True)
class Output:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


class Connection(Protocol):
    """A device that commands run on. ``name`` is what messages call it, ``address`` what one types.

    ``folder`` is the name of a folder of ours there, made when something is put into it. All
    methods raise ``ConnectionLost`` when the connection breaks, other ``DeviceError`` for what is
    wrong with the device or with access to it.
    """

    name: str
    address: str

    def run(self, command: str, *, seconds: float = 60) -> Output:
        """Run a POSIX shell command; a failing one is the caller's to judge."""

    def ask(self, verb: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Run a verb of ``on_device.py`` there and yield its answers as they come."""

    def put(self, files: Mapping[str, Path], folder: str, told: Told | None = None) -> int:
        """Copy the files that differ by SHA-256; return the bytes that had to go over.

        A file of which a part arrived earlier is continued. Nothing is copied while a job of that
        folder runs or waits to be followed.
        """

    def get(
        self, folder: str, name: str, into: Path, sha256: str, limit: int, told: Told | None = None
    ) -> None:
        """Bring one file of at most ``limit`` bytes, continue a part that came earlier."""

    def close(self) -> None:
        """Let go of the device; what runs there detached goes on."""


class PipedConnection(ABC):
    """A ``Connection`` whose commands are processes of this machine with three pipes.

    ``patience``: seconds without a byte after which a device has stopped answering.
    """

    name: str
    address: str
    python: str
    patience: float = PATIENCE

    @abstractmethod
    def _argv(self, command: str) -> list[str]:
        """Return the command line here that runs a shell command there."""

    @abstractmethod
    def _failure(self, code: int, err: str) -> DeviceError | None:
        """Return what an exit status and stderr say about the connection itself, if anything."""

    def close(self) -> None:  # noqa: B027 - most connections hold nothing
        """Nothing to let go of, unless a subclass holds something."""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, command: str, *, seconds: float = 60) -> Output:
        """See ``Connection``."""
        with Session(self._argv(command)) as session:
            out = session.read_all(seconds)
            if out is None:
                raise DeviceError(
                    f"{self.name} gave no answer to `{command[:60]}` within {seconds:.0f} s",
                    hint="look at what the device is busy with, then try again",
                )
            code, err = session.wait()
        if failure := self._failure(code, err):
            raise failure
        return Output(code, out, err)

    def ask(self, verb: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """See ``Connection``."""
        with self._asking(verb, arguments) as session:
            yield from self._answers(session)

    def put(self, files: Mapping[str, Path], folder: str, told: Told | None = None) -> int:
        """See ``Connection``."""
        sizes = {name: (path.stat().st_size, file_sha256(path)) for name, path in files.items()}
        with self._asking("receive", {"folder": folder}) as session:
            answers = self._answers(session)
            first = next(answers, {})
            there = first.get("files")
            if not isinstance(there, dict):
                raise self._nonsense(first)
            if first.get("job"):
                return 0
            offsets = {
                name: _resumed(files[name], there.get(f"{name}.part"))
                for name, (size, sha256) in sizes.items()
                if there.get(name) != [size, sha256]
            }
            need = sum(sizes[name][0] - offset for name, offset in offsets.items())
            free = first.get("free")
            if isinstance(free, int) and need > free:
                raise disk_full(self.name, f"{need:,} bytes are needed, {free:,} are free")
            done = 0
            for block in _sent(files, sizes, offsets):
                if not session.write(block.header + block.data):
                    break  # the answers say why
                done += len(block.data)
                if told:
                    told(done, need)
            session.end_input()
            arrived = {answer.get("done") for answer in answers}
        if set(offsets) - arrived:
            raise ConnectionLost(f"{self.name} did not receive everything", hint=RESUMES)
        return need

    def get(
        self, folder: str, name: str, into: Path, sha256: str, limit: int, told: Told | None = None
    ) -> None:
        """See ``Connection``."""
        part = into.with_name(f".{into.name}.part-{sha256[:16]}")
        done = part.stat().st_size if part.exists() else 0
        asked = {"folder": folder, "name": name, "offset": done}
        with self._asking("send", asked) as session:
            first = next(self._answers(session), {})
            size = first.get("size")
            if not isinstance(size, int) or not done <= size <= limit:
                part.unlink(missing_ok=True)
                raise self._nonsense({name: first}, f"at most {limit:,} bytes")
            try:
                with part.open("ab") as stream:
                    while done < size and (block := session.read(min(BLOCK, size - done))):
                        stream.write(block)
                        done += len(block)
                        if told:
                            told(done, size)
            except OSError as error:
                raise not_writable(into, error) from error
            self._finish(session)
        if done < size:
            raise ConnectionLost(f"{self.name} sent only a part of {name}", hint=RESUMES)
        if file_sha256(part) != sha256:
            part.unlink()
            raise DeviceError(
                f"{name} came from {self.name} with other bytes than it was announced with",
                hint="run the same command again; if it stays, check the device's disk",
            )
        part.replace(into)

    # -- one call of on_device.py

    @contextmanager
    def _asking(self, verb: str, arguments: Mapping[str, Any]) -> Iterator[Session]:
        text = Path(on_device.__file__).read_bytes()
        words = [_LOADER, base64.b64encode(text).decode("ascii"), verb, json.dumps(arguments)]
        home, python = (
            ('"$HOME"', self.python[1:]) if self.python[:2] == "~/" else ("", self.python)
        )
        command = f"exec {home}{shlex.quote(python)} -c {shlex.join(words)}"
        with Session(self._argv(command), self.patience) as session:
            yield session

    def _answers(self, session: Session) -> Iterator[dict[str, Any]]:
        """Yield answers up to the end of the output; raise what its end says."""
        while line := session.line():
            if not line.startswith(on_device.MARK):
                continue  # what a login script prints
            try:
                found = json.loads(line[len(on_device.MARK) :])
            except (ValueError, RecursionError) as error:
                raise self._nonsense(line[:80]) from error
            if not isinstance(found, dict):
                raise self._nonsense(found)
            if "refused" in found:
                raise self._refusal(found)
            yield found
        self._finish(session)

    def _finish(self, session: Session) -> None:
        code, err = session.wait()
        if session.silent:
            raise ConnectionLost(
                f"{self.name} stopped answering: nothing came from it for {self.patience:.0f} s",
                hint=f"look at what it is busy with, then {RESUMES}",
            )
        if failure := self._failure(code, err):
            raise failure
        last = clean(err.strip().rpartition("\n")[2])
        if last.startswith("secateur:old "):
            raise DeviceError(
                f"{self.name} has only Python {last.split()[1]} as {self.python}, 3.8 is needed",
                hint="install a newer Python there and name it: ssh://host?python=/path/to/python3",
            )
        if code in (126, 127):
            raise DeviceError(
                f"{self.name} has no {self.python} that runs: {last}",
                hint="install python3 there, or name another: ssh://host?python=/path/to/python3",
            )
        if code != 0:
            raise DeviceError(
                f"{self.python} on {self.name} ended with status {code}: {last or 'no reason'}",
                hint="try it there by hand; if it works, this is a bug worth reporting",
            )

    def _refusal(self, found: Mapping[str, Any]) -> DeviceError:
        word, text = found["refused"], clean(str(found.get("text")))
        if word == "system" and found.get("errno") in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(self.name, text)
        if word == "system":
            return DeviceError(
                f"{self.name} cannot use {clean(str(found.get('path')))}: {text}",
                hint="look at who owns it and whether it still exists there",
            )
        if word == "copying":
            return DeviceError(
                f"the same files are being copied to {self.name} by another call",
                hint="run the same command again when that has ended",
            )
        if word == "altered":
            return DeviceError(
                f"a file arrived on {self.name} with other bytes than were sent",
                hint="run the same command again, and change nothing in the bundle meanwhile",
            )
        return self._nonsense(found)

    def _nonsense(self, got: object, wanted: str = "an answer of this version") -> DeviceError:
        return DeviceError(
            f"{self.name} answered {clean(repr(got))[:120]}, expected {wanted}",
            hint="check that this is the device you mean; if so, this is a bug worth reporting",
        )


def clean(text: str) -> str:
    """Return a device's text without characters that would steer a terminal."""
    return "".join(each if each.isprintable() else " " for each in text)[: on_device.LONGEST]


def disk_full(device: str, what: str) -> DeviceError:
    """Return the error for a device without room."""
    return DeviceError(
        f"the disk of {device} is full: {what}",
        hint="free some space in ~/.cache there, or set XDG_CACHE_HOME there to a larger disk",
    )


def _resumed(path: Path, part: object) -> int:
    """Return how many bytes of a file are there already, by the size and SHA-256 of a part."""
    if not isinstance(part, list) or len(part) != 2 or not isinstance(part[0], int):
        return 0
    size, sha = part[0], hashlib.sha256()
    if not 0 < size <= path.stat().st_size:
        return 0
    with path.open("rb") as stream:
        while size and (block := stream.read(min(BLOCK, size))):
            sha.update(block)
            size -= len(block)
    return int(part[0]) if sha.hexdigest() == part[1] else 0


@dataclass(frozen=True)
class _Block:
    header: bytes
    data: bytes


def _sent(
    files: Mapping[str, Path], sizes: Mapping[str, tuple[int, str]], offsets: Mapping[str, int]
) -> Iterator[_Block]:
    """Yield what ``on_device.receive`` reads: per file a line of JSON, then its bytes."""
    for name, offset in offsets.items():
        size, sha256 = sizes[name]
        head = {"name": name, "offset": offset, "size": size, "sha256": sha256}
        yield _Block(json.dumps(head).encode("ascii") + b"\n", b"")
        with files[name].open("rb") as stream:
            stream.seek(offset)
            while block := stream.read(min(BLOCK, size - stream.tell())):
                yield _Block(b"", block)
