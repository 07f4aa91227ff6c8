"""Open a reader by name and turn samples into batches, the same way every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core import registry
from secateur.core.errors import DataError, SecateurError
from secateur.core.model import ModelInput
from secateur.core.task import Task
from secateur.data.sample import Reader, Sample
from secateur.data.transforms import Augment, draw_view, fit_sample, image_tensor, target_tensor


@dataclass(frozen=True)
class Batch:
    """``images`` (N, C, H, W); ``targets`` by task name; ``ids`` of the samples."""

    images: Tensor
    targets: Mapping[str, Tensor]
    ids: tuple[str, ...]


def open_reader(name: str, root: str | Path | None, split: str, **options: Any) -> Reader:
    """Open the reader ``name`` (a file of this folder, or an entry point of ``secateur.data``).

    Raises:
        DataError: unknown reader, no data at ``root``, a wrong option or an empty split.
    """
    try:
        module = registry.load("secateur.data", name)
    except KeyError as error:
        raise DataError(
            f"there is no reader '{name}'",
            hint=f"readers: {', '.join(registry.entries('secateur.data'))}",
        ) from error
    try:
        reader: Reader = module.create(Path(root or "."), split, **options)
        count = len(reader)
    except SecateurError:
        raise
    except Exception as error:  # a third party's code may raise anything
        if options and isinstance(error, (TypeError, ValueError)):
            raise DataError(
                f"reader '{name}' does not take these options: {error}",
                hint=f"see the docstring of {module.__name__}.create",
            ) from error
        if not _foreign(module.__name__):
            raise
        raise DataError(
            f"reader '{name}' failed: {error!r}", hint=f"mend create() in {module.__name__}"
        ) from error
    if count == 0:
        raise DataError(
            f"split '{split}' of reader '{name}' at {root} is empty",
            hint="check the split's name and that its files are there",
        )
    return reader


def _foreign(module: str) -> bool:
    return not module.startswith("secateur.")


def class_names(name: str, label: str, classes: int | None) -> tuple[str, ...]:
    """Return what a reader calls a label's classes; ``class 0`` and so on where it does not say.

    A reader says it in ``CLASS_NAMES``, by label; names of another count of classes are not used.
    """
    try:
        known = getattr(registry.load("secateur.data", name), "CLASS_NAMES", {})
    except KeyError:
        known = {}
    names = tuple(known.get(label, ()))
    if len(names) == classes:
        return names
    return tuple(f"class {index}" for index in range(classes or 0))


class InMemory:
    """A reader that decodes each sample once, as long as they fit in ``max_bytes``."""

    def __init__(self, reader: Reader, max_bytes: int = 1 << 30) -> None:
        self.source = reader
        self._samples: dict[int, Sample] = {}
        self._room = max_bytes
        self.fingerprint = reader.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    @property
    def label_names(self) -> frozenset[str]:
        return self.source.label_names

    def __getitem__(self, index: int) -> Sample:
        if index in self._samples:
            return self._samples[index]
        sample = self._decoded(index)
        size = sample.image.nbytes + sum(label.nbytes for label in sample.labels.values())
        if size <= self._room:
            self._room -= size
            self._samples[index] = sample
        return sample

    def _decoded(self, index: int) -> Sample:
        try:
            return self.source[index]
        except Exception as error:  # a third party's code may raise anything
            reader = type(self.source)
            if isinstance(error, SecateurError) or not _foreign(reader.__module__):
                raise
            raise DataError(
                f"the reader {reader.__module__}.{reader.__name__} failed on its sample {index}: "
                f"{error!r}",
                hint="mend its __getitem__, or take that sample out of the data",
            ) from error


class Subset:
    """Some samples of a reader, by index. Its fingerprint is the whole reader's."""

    def __init__(self, reader: Reader, indices: Sequence[int]) -> None:
        self._reader, self._indices = reader, list(indices)
        self.fingerprint = reader.fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def label_names(self) -> frozenset[str]:
        return self._reader.label_names

    def __getitem__(self, index: int) -> Sample:
        return self._reader[self._indices[index]]


class _Fitted:
    """A reader whose samples have the input's size already."""

    def __init__(self, reader: Reader, spec: ModelInput, tasks: Sequence[Task]) -> None:
        self._reader, self._spec, self._tasks = reader, spec, tuple(tasks)
        self.fingerprint = reader.fingerprint
        self.label_names = reader.label_names & {task.label for task in tasks}

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Sample:
        return fit_sample(self._reader[index], self._spec, self._tasks)


def resized_reader(
    reader: Reader, spec: ModelInput, tasks: Sequence[Task], max_bytes: int = 1 << 30
) -> Reader:
    """Decode and resize each sample once, and keep the small ones in memory.

    Batches of the result are bit-equal to those of ``reader`` as long as no augmentation zooms
    (``Augment.scale`` 1); only the labels of ``tasks`` are there. Where ``reader`` keeps whole
    samples in memory it is passed by, so that they are not held twice.
    """
    source = reader.source if isinstance(reader, InMemory) else reader
    return InMemory(_Fitted(source, spec, tasks), max_bytes)


def batches(
    reader: Reader,
    tasks: Sequence[Task],
    spec: ModelInput,
    batch_size: int,
    *,
    augment: Augment | None = None,
    shuffle_seed: int | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yield batches in order, or shuffled and augmented by ``shuffle_seed``.

    A last batch of one sample is dropped when shuffling, since batch norm cannot train on it.
    """
    order = np.arange(len(reader))
    rng = np.random.default_rng(shuffle_seed or 0)
    if shuffle_seed is not None:
        rng.shuffle(order)
    order = order[:limit]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        if shuffle_seed is not None and len(chosen) == 1 < batch_size:
            return
        yield _collate([reader[int(i)] for i in chosen], tasks, spec, augment, rng)


def spread(images: Sized, count: int) -> list[int]:
    """Return ``count`` indices spread evenly over a reader (all of it when it is smaller)."""
    size = len(images)
    return [int(i) for i in np.linspace(0, size - 1, min(count, size)).round()]


def image_batch(reader: Reader, indices: Sequence[int], spec: ModelInput) -> Tensor:
    """Return the (N, C, H, W) network inputs of some samples, without labels."""
    return torch.stack([image_tensor(reader[i].image, spec) for i in indices])


def has_labels(reader: Reader, tasks: Sequence[Task]) -> bool:
    """Say whether ``reader`` carries a label for every task."""
    return all(task.label in reader.label_names for task in tasks)


def _collate(
    samples: Sequence[Sample],
    tasks: Sequence[Task],
    spec: ModelInput,
    augment: Augment | None,
    rng: np.random.Generator,
) -> Batch:
    views = [draw_view(augment, rng) for _ in samples]
    pairs = list(zip(samples, views, strict=True))
    return Batch(
        images=torch.stack([image_tensor(s.image, spec, view) for s, view in pairs]),
        targets={
            task.name: torch.stack([target_tensor(s, task, spec, view) for s, view in pairs])
            for task in tasks
        },
        ids=tuple(sample.id for sample in samples),
    )
