"""A pass over images keeps its running sums on disk, so that a stopped one goes on from them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.files import atomic_path
from secateur.importance.criterion import TaskBatch, TaskData

BETWEEN_SAVES_S = 5.0
DONE = "batches done"


def batches_to_add(data: TaskData, sums: Mapping[str, Tensor]) -> Iterator[TaskBatch]:
    """Yield the batches that are not in ``sums`` yet; the caller adds each to them in place.

    Sums that an earlier, stopped pass left in ``data.kept`` are first put into ``sums``. The file
    is written every few seconds between batches, whole or not at all, and removed at the end.
    """
    done = 0 if data.kept is None else _load(data.kept, sums)
    saved = time.monotonic()
    for count, batch in enumerate(data.stream(done), start=done + 1):
        yield batch
        if data.kept is not None and time.monotonic() - saved > BETWEEN_SAVES_S:
            _save(data.kept, sums, count)
            saved = time.monotonic()
    if data.kept is not None:
        data.kept.unlink(missing_ok=True)


def _load(path: Path, sums: Mapping[str, Tensor]) -> int:
    """Fill ``sums`` and return how many batches are in them: 0 where the file is not of these."""
    try:
        found = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return 0
    done = found.pop(DONE, None)
    expected = {name: (sum_.shape, sum_.dtype) for name, sum_ in sums.items()}
    if done is None or {name: (sum_.shape, sum_.dtype) for name, sum_ in found.items()} != expected:
        return 0
    for name, sum_ in found.items():
        sums[name].copy_(sum_)
    return int(done)


def _save(path: Path, sums: Mapping[str, Tensor], done: int) -> None:
    with atomic_path(path) as temporary:
        save_file({**sums, DONE: torch.tensor(done)}, temporary)
