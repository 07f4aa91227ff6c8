"""What runs on the device: stand-alone, standard library, Python 3.8; sent along with every call.

Nothing is installed there. ``connection.py`` hands this text to the device's Python, which calls
``main([verb, arguments as JSON])``. Answers are lines of JSON behind ``MARK``: what a login script
prints is no answer. A folder is a name under ``builds()``; in it lie the copied files, and

* ``copy.lock``: held while files are received, so that two copies do not mix;
* ``job.lock``: held by the job and its program as long as either lives, with their process group
  in it. A lock is the kernel's (flock), so none is ever stale: it goes with its last holder;
* ``job.log``, ``job.json``: what the job printed, and how it ended.

One lock of the whole device, in its folder for temporary files, lets one job run at a time,
whoever starts it: builds would run out of memory beside another, and latencies would be wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = b"secateur:"
BLOCK = 1 << 16
SILENCE = 20.0  # seconds without a byte after which a copy is given up: its sender is gone
BEAT = 10.0  # seconds between signs of life while a job prints nothing
FORGOTTEN = 7 * 24 * 3600.0  # seconds after which what a lost caller left is removed
LONGEST = 2000  # characters of a line that is passed on
OWN = ("copy.lock", "job.lock", "job.log", "job.json")
DEVICE_LOCK = "secateur-device.lock"


class Refusal(Exception):
    """Why a call cannot be served; the caller has the sentence for each of these words."""


def answer(**fields: Any) -> None:
    """Send one answer."""
    sys.stdout.buffer.write(MARK + json.dumps(fields).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def builds() -> Path:
    """The folder that all of ours lies in."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(cache) / "secateur" / "builds"


def folder_of(name: str) -> Path:
    """The folder of that name, which may not exist."""
    if not re.fullmatch(r"[0-9a-z]{1,64}", name):
        raise Refusal("name")
    return builds() / name


def file_in(folder: Path, name: str) -> Path:
    """A file of the folder that is the caller's to write or read."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name in OWN:
        raise Refusal("name")
    return folder / name


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(str(folder))
    return found.f_bavail * found.f_frsize


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(BLOCK), b""):
            sha.update(block)
    return sha.hexdigest()


def listing(folder: Path) -> dict[str, Any]:
    """{name: [bytes, sha256]} of the plain files there, but for our own."""
    return {
        path.name: [path.stat().st_size, digest(path)]
        for path in sorted(folder.iterdir())
        if stat.S_ISREG(path.lstat().st_mode) and path.name not in OWN
    }


# -- locks


def take(path: Path, seconds: float = 0.0) -> int:
    """Lock a file, made if need be, within so many seconds; return its descriptor, -1 if held."""
    handle = os.open(str(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(handle)
                return -1
            time.sleep(0.1)
        else:
            return handle


def held(path: Path) -> bool:
    """Whether another process holds that lock."""
    if not path.exists():
        return False
    handle = take(path)
    if handle >= 0:
        os.close(handle)
    return handle < 0


def take_device() -> int:
    """Wait until no other job runs on this device; return the lock's descriptor."""
    path = Path(tempfile.gettempdir()) / DEVICE_LOCK
    try:  # the file may be another user's, and is then not to be opened with O_CREAT in /tmp
        handle = os.open(str(path), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        try:
            handle = os.open(str(path), os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL)
            os.fchmod(handle, 0o666)  # every user's jobs take turns
        except FileExistsError:
            return take_device()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
        say("waiting: another job runs on this device ({})".format(owner or "unknown"))
        fcntl.flock(handle, fcntl.LOCK_EX)
    user, since = os.environ.get("USER") or os.getuid(), time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{user}, process {os.getpid()}, since {since}".encode(), 0)
    return handle


# -- verbs


def look(modules: list[str]) -> None:
    """Answer what jobs could use: this Python, which modules it has, free space; and who runs."""
    found: dict[str, str | None] = {}
    for name in modules:
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except Exception as error:  # whatever a broken installation raises
            found[name] = None
            sys.stderr.write(f"{name}: {error}\n")
    jobs = sorted(path.name for path in builds().glob("*") if held(path / "job.lock"))
    answer(python=sys.version.split()[0], executable=sys.executable, modules=found, jobs=jobs,
           folder=str(builds()), free=free_bytes(builds()))  # fmt: skip


class Incoming:
    """Standard input, read with an eye on the clock."""

    def __init__(self) -> None:
        self.rest = b""

    def some(self, most: int) -> bytes:
        """Up to ``most`` bytes; b"" at the end, or after a long silence."""
        if not self.rest and select.select([0], [], [], SILENCE)[0]:
            self.rest = os.read(0, BLOCK)
        block, self.rest = self.rest[:most], self.rest[most:]
        return block

    def line(self) -> bytes:
        """The next line, or b"" at the end."""
        line = b""
        while not line.endswith(b"\n") and len(line) < LONGEST:
            byte = self.some(1)
            if not byte:
                return b""
            line += byte
        return line


def receive(folder: str) -> None:
    """Answer what lies there; then write the files that are sent: a line of JSON, then the bytes.

    A file grows under its name with ``.part``; that stays when the connection breaks.
    """
    place = folder_of(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(str(place))  # not forgotten
    forget()
    lock = take(place / "copy.lock", SILENCE + 5)
    if lock < 0:
        raise Refusal("copying")
    job = held(place / "job.lock") or (place / "job.json").exists()  # it has what it needs
    answer(files={} if job else listing(place), job=job, free=free_bytes(place))
    source = Incoming()
    while not job:
        line = source.line()
        if not line:
            return
        head = json.loads(line.decode("ascii"))
        path = file_in(place, head["name"])
        part = path.with_name(path.name + ".part")
        try:
            if not receive_one(source, part, head):
                return
        except OSError:
            part.unlink()  # a full disk is not left full
            raise
        if digest(part) != head["sha256"]:
            part.unlink()
            raise Refusal("altered")
        part.replace(path)
        answer(done=path.name)


def receive_one(source: Incoming, part: Path, head: dict[str, Any]) -> bool:
    """Append what comes to the first ``offset`` bytes of a part; return whether it was all."""
    handle = os.open(str(part), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "r+b", 0) as stream:
        stream.truncate(head["offset"])
        stream.seek(0, os.SEEK_END)
        while stream.tell() < head["size"]:
            block = source.some(head["size"] - stream.tell())
            if not block:
                return False
            while block:
                block = block[stream.write(block) :]
    return True


def send(folder: str, name: str, offset: int) -> None:
    """Answer a file's size, then send its bytes from ``offset`` on."""
    path = file_in(folder_of(folder), name)
    with os.fdopen(os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        answer(size=os.fstat(stream.fileno()).st_size)
        stream.seek(offset)
        shutil.copyfileobj(stream, sys.stdout.buffer, BLOCK)
    sys.stdout.buffer.flush()


def start(folder: str, command: list[str]) -> None:
    """Run this Python on ``command`` there, detached; answer whether it was started by this call.

    A job that runs already, or has ended and was not removed yet, is left to be followed.
    """
    place = folder_of(folder)
    lock = take(place / "job.lock", 0.5)  # whoever looks holds it for a moment
    if lock < 0 or (place / "job.json").exists():
        answer(started=False)
        return
    os.ftruncate(lock, 0)
    os.utime(str(place / "job.lock"))  # when it began
    (place / "job.log").write_bytes(b"")
    if os.fork():
        answer(started=True)
        return
    try:  # detached: own session, nothing open that belongs to the connection
        os.setsid()
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        handle = os.open(os.devnull, os.O_RDONLY)
        log = os.open(str(place / "job.log"), os.O_WRONLY | os.O_APPEND)
        for source, target in ((handle, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        supervise(place, command, lock)
    except OSError as error:
        with contextlib.suppress(OSError):
            say(f"the job could not be run: {error}")
    finally:
        os._exit(0)


def say(text: str) -> None:
    """Print one line into the job's log."""
    os.write(1, text.encode("utf-8", "replace") + b"\n")


def supervise(place: Path, command: list[str], lock: int) -> None:
    """Run the command when the device is free, and note how it ended."""
    device = take_device()
    began = time.time()
    program = [sys.executable, "-uB", *command]
    both = (lock, device)  # they stay held if this process is killed
    process = subprocess.Popen(program, cwd=str(place), stdin=subprocess.DEVNULL, pass_fds=both)
    say(f"running, process {process.pid}")
    code = process.wait()
    ended = {"code": code, "seconds": round(time.time() - began, 1)}
    temporary = place / "job.json.tmp"
    temporary.write_text(json.dumps(ended))
    temporary.replace(place / "job.json")


def follow(folder: str) -> None:
    """Answer the job's lines from the first on, and a sign of life; at its end, how it ended."""
    place = folder_of(folder)
    began = (place / "job.lock").stat().st_mtime
    beat, rest = time.monotonic(), b""
    with (place / "job.log").open("rb") as log:
        while True:
            over = not held(place / "job.lock")  # before the log is read: then that is whole
            *lines, rest = (rest + log.read()).split(b"\n")
            for line in [*lines, rest] if over else lines:
                if line:
                    answer(line=line.decode("utf-8", "replace")[:LONGEST])
            if over:
                break
            if time.monotonic() - beat > BEAT:
                beat = time.monotonic()
                answer(seconds=round(time.time() - began))
            if select.select([0], [], [], 0.1)[0] and not os.read(0, BLOCK):
                return  # the caller is gone
    ended = place / "job.json"
    end = json.loads(ended.read_text()) if ended.exists() else None
    answer(end=end, files=listing(place), free=free_bytes(place))


def stop(folder: str) -> None:
    """Kill the folder's job, if one runs; answer whether none is left."""
    lock = folder_of(folder) / "job.lock"
    if held(lock):
        with contextlib.suppress(OSError, ValueError):  # it has just ended, or just begins
            os.killpg(int(lock.read_text()), signal.SIGKILL)
    time.sleep(0.2)  # its locks go with it
    answer(stopped=not held(lock))


def clear(folder: str, keep: list[str]) -> None:
    """Remove an ended job and all files but those to keep."""
    removed(folder_of(folder), ["copy.lock", "job.lock", *keep])
    answer(cleared=True)


def remove(folder: str) -> None:
    """Remove the folder unless something works in it; answer whether it is gone."""
    place = folder_of(folder)
    answer(removed=removed(place))
    with contextlib.suppress(OSError):  # others' folders may lie there
        builds().rmdir()
        builds().parent.rmdir()


def removed(place: Path, keep: list[str] | None = None) -> bool:
    """Remove a folder, or all in it but what to keep, that no copy and no job works in."""
    if not place.exists():
        return True
    copying, job = take(place / "copy.lock", 5), take(place / "job.lock", 0.5)  # both soon end
    if copying >= 0 and job >= 0:
        if keep is None:
            shutil.rmtree(str(place))
        else:
            for path in {*place.iterdir()} - {place / name for name in keep}:
                path.unlink()
    for handle in (copying, job):
        if handle >= 0:
            os.close(handle)
    return not place.exists()


def forget() -> None:
    """Remove what callers that never came back left long ago."""
    for place in builds().iterdir():
        with contextlib.suppress(OSError):
            times = [path.lstat().st_mtime for path in (place, *place.iterdir())]
            if max(times) < time.time() - FORGOTTEN:
                removed(place)


VERBS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (look, receive, send, start, follow, stop, clear, remove)
}


def main(argv: list[str]) -> None:
    """Serve one call: a verb, and its arguments as JSON."""
    try:
        VERBS[argv[0]](**json.loads(argv[1]))
    except Refusal as refusal:
        answer(refused=str(refusal))
    except BrokenPipeError:  # the caller is gone
        os._exit(1)
    except OSError as error:
        answer(refused="system", errno=error.errno, text=error.strerror, path=error.filename)


if __name__ == "__main__":
    main(sys.argv[1:])
