"""Turns: which of several processes of this machine runs a piece of work."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(path: Path) -> Iterator[bool]:
    """Say for a block whether the work that ``path`` stands for is ours meanwhile.

    The lock is the system's: it goes with the process, however that ends. Whether another one did
    the work before is to be seen within the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
