"""Turns: which of several processes of this machine runs a piece of work."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAMELESS_S = 60.0


def claimed(path: Path) -> bool:
    """Say whether the work that ``path`` stands for is ours now.

    A claim names the process that holds it; that of one which is no more is void.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _alive(path):
        path.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as stream:
        stream.write(str(os.getpid()))
    return True


def _alive(path: Path) -> bool:
    """Say whether the process that holds a claim still runs, or has yet to write its name."""
    try:
        holder = path.read_text()
        if not holder:
            return time.time() - path.stat().st_mtime < NAMELESS_S
        os.kill(int(holder), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    except PermissionError:  # somebody else's, and so alive
        return True
    return True


@contextmanager
def released(path: Path) -> Iterator[None]:
    """Give a claim back if the work within fails, Ctrl-C too: the next run may take it at once."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
