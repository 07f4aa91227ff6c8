"""Progress of long steps: stages report, the command line decides whether anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
_active: ContextVar[Progress | None] = ContextVar("secateur_progress", default=None)


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[None]:
    """Draw progress bars on stderr inside the block (none when ``quiet``)."""
    if quiet:
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        token = _active.set(progress)
        try:
            yield
        finally:
            _active.reset(token)


@contextmanager
def hidden() -> Iterator[None]:
    """Draw no bars inside the block: those of steps that another bar counts."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def track(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """Yield ``items``, moving a bar named ``description`` when bars are drawn.

    ``total`` is None where nobody knows how many there will be.
    """
    progress = _active.get()
    if progress is None:
        yield from items
        return
    bar = progress.add_task(description, total=total)
    for item in items:
        yield item
        progress.advance(bar)
    progress.update(bar, completed=total)
