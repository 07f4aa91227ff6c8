"""Turns: which of several processes runs a piece of work."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STALE_SECONDS = 3600  # a run that died this long ago loses its claim


def claimed(path: Path) -> bool:
    """Say whether the work that ``path`` stands for is ours now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and time.time() - path.stat().st_mtime > STALE_SECONDS:
        path.unlink(missing_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@contextmanager
def released(path: Path) -> Iterator[None]:
    """Give a claim back if the work within fails, Ctrl-C too: the next run may take it at once."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
