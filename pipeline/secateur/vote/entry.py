"""An entry of the library: one finished cut, what it kept, how good it was, what it cost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache, cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

import secateur
from secateur.core.errors import LibraryError, first_line, first_problem
from secateur.core.plan import PrunePlan

Array = NDArray[Any]
T = TypeVar("T")
NOT_CONTENT = ("created", "version")  # the same cut made twice is one entry
SKETCH_NAME = re.compile(r"[\w.:-]{1,80}")


def utc_now() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class TaskMark:
    """What is known of a kept task without its data; ``classes`` where its kind has any."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    name: str
    kind: str
    classes: int | None = None


@dataclass(frozen=True)
class Facts:
    """What an entry says of itself in a listing.

    ``parent`` is a digest of the untouched parent's weights, or of the trunk's that it shares with
    others; ``basis`` names what the channels there are counted in, ``original`` or the axes it was
    turned to before scoring. Keep-sets of two entries mean the same channels only where both agree.
    ``network`` is a digest of the whole parent's weights ("" where that is not known): of two
    networks with one trunk only the trunk compares. ``data`` is the fingerprint of the training
    data, ``budget`` the share of MACs that may stay (0..1], ``accuracy`` each task's metrics as
    shipped, ``delta_t`` ΔT in % against the parent (None: not measured), ``steps`` recovery's
    optimiser steps, ``recipe`` its text, ``device`` what it was built for ("" where that is not
    known), ``created`` ISO 8601 in UTC.

    Raises:
        LibraryError: no task, two of one name, or a number out of its range.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    parent: str
    parent_name: str
    tasks: tuple[TaskMark, ...]
    data: str
    budget: float
    basis: str = "original"
    network: str = ""
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    delta_t: float | None = None
    steps: int = 0
    recipe: str = ""
    device: str = ""
    created: str = field(default_factory=utc_now)
    version: str = secateur.__version__

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise _bad(f"its tasks are {names}, expected one or more, of different names")
        if not 0 < self.budget <= 1:
            raise _bad(f"its budget is {self.budget}, expected a share of MACs in (0, 1]")
        if self.steps < 0 or not self.parent:
            raise _bad("it has no parent, or negative recovery steps")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The kept tasks' names."""
        return tuple(task.name for task in self.tasks)


@dataclass(frozen=True, eq=False)
class Entry:
    """One cut of one parent.

    ``plan`` holds the keep-set of every group. ``scores`` are (width,) per task and group,
    ``sketches`` small arrays by the name of the measure that compares them, ``weights`` the
    recovered sub-network's state; the first two are stored as float32. ``axes`` are what channels
    are counted in, the trunk's of ``facts.basis`` among them: (W, W) by group name, as used.
    All four may be empty.

    Raises:
        LibraryError: a part does not fit another, or is not finite.
    """

    facts: Facts
    plan: PrunePlan
    scores: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    sketches: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    axes: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = {}
        for cut in self.plan.cuts:
            widths[cut.name] = cut.width
            inside = all(0 <= channel < cut.width for channel in cut.kept)
            if not cut.kept or not inside or list(cut.kept) != sorted(set(cut.kept)):
                raise _bad(f"group '{cut.name}' keeps {cut.kept[:4]}… of {cut.width} channels")
        for task, group, values in _flat(self.scores):
            if values.shape != (widths.get(group, values.size),):
                raise _bad(
                    f"the scores of task '{task}' in group '{group}' have shape "
                    f"{values.shape}, expected ({widths.get(group, values.size)},)"
                )
            _check_finite(values, f"a score of task '{task}' in group '{group}'")
        for name, sketch in self.sketches.items():
            if not SKETCH_NAME.fullmatch(name):
                raise _bad(f"'{name}' is no name of a sketch")
            _check_finite(sketch, f"the sketch '{name}'")

    @cached_property
    def id(self) -> str:
        """A digest of all but time, version and axes; ``facts.basis`` is one of the trunk's axes.

        The same cut added twice is one entry.
        """
        return pack(self).id


@dataclass(frozen=True)
class Packed:
    """An entry as text and bytes: the arrays are safetensors, None where there are none."""

    id: str
    facts: str
    plan: str
    scores: bytes | None
    weights: bytes | None
    axes: bytes | None
    sketches: Mapping[str, bytes]


def pack(entry: Entry) -> Packed:
    """Return the entry as it is stored; equal entries give equal bytes."""
    facts, plan = asdict(entry.facts), entry.plan.to_json()
    content = {key: value for key, value in facts.items() if key not in NOT_CONTENT}
    for key in ("device", "network"):  # entries from before there was one keep their ids
        if not content[key]:
            del content[key]
    scores = tensors(
        {
            json.dumps([task, group]): values.astype(np.float32)
            for task, group, values in _flat(entry.scores)
        }
    )
    weights = tensors(entry.weights)
    sketches = {name: pack_sketch(array) for name, array in sorted(entry.sketches.items())}
    digests = [data and digest_of(data) for data in (scores, weights)]
    of_sketches = {name: digest_of(data) for name, data in sketches.items()}
    identity = digest_of(_json([content, plan, digests, of_sketches]).encode())[:20]
    axes = tensors(entry.axes)
    return Packed(identity, _json(facts), _json(plan), scores, weights, axes, sketches)


def unpack(packed: Packed) -> Entry:
    """Return the entry that ``pack`` packed; nothing is ever unpickled.

    Raises:
        LibraryError: a part is not of the form that ``pack`` gives it.
    """
    return Entry(
        parsed(Facts, packed.facts, "the facts"),
        parsed(PrunePlan, packed.plan, "the plan"),
        scores_of(packed.scores),
        {name: unpack_sketch(data) for name, data in packed.sketches.items()},
        arrays_of(packed.weights, "the weights"),
        arrays_of(packed.axes, "the axes"),
    )


def scores_of(data: bytes | None) -> dict[str, dict[str, Array]]:
    """Return the scores, per task and group, that ``pack`` made bytes of.

    Raises:
        LibraryError: it made none of these.
    """
    scores: dict[str, dict[str, Array]] = {}
    for key, values in arrays_of(data, "the scores").items():
        task, group = parsed(tuple[str, str], key, "the scores")
        scores.setdefault(task, {})[group] = values
    return scores


def pack_sketch(sketch: Array) -> bytes:
    """Return an array as safetensors of float32."""
    return save({"sketch": np.asarray(sketch, np.float32, order="C")})


def unpack_sketch(data: bytes) -> NDArray[np.float32]:
    """Return what ``pack_sketch`` wrote.

    Raises:
        LibraryError: it wrote something else.
    """
    arrays = arrays_of(data, "a sketch")
    if arrays.keys() != {"sketch"}:
        raise _bad("a sketch is not of the expected form")
    sketch: NDArray[np.float32] = arrays["sketch"]
    return sketch


def parsed(kind: type[T], text: str, what: str) -> T:
    """Read JSON as ``kind``, strictly.

    Raises:
        LibraryError: it is not JSON, a key is missing or unknown, or a value has another type.
    """
    try:
        value: T = _reader(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
        return value
    except ValidationError as error:
        raise _bad(f"{what}: {first_problem(error)}") from error


def tensors(arrays: Mapping[str, Array]) -> bytes | None:
    """Return arrays as safetensors, names in order; None where there are none.

    Raises:
        LibraryError: an array's type has no place there.
    """
    if not arrays:
        return None
    try:
        return save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})
    except (SafetensorError, KeyError, ValueError) as error:
        raise _bad(f"its arrays cannot be stored: {first_line(error)}") from error


def arrays_of(data: bytes | None, what: str) -> dict[str, Array]:
    """Return what ``tensors`` made bytes of; ``what`` names it in the error.

    Raises:
        LibraryError: the bytes are not safetensors.
    """
    if data is None:
        return {}
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _bad(f"{what} cannot be read: {first_line(error)}") from error


def digest_of(data: bytes) -> str:
    """Return the hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


@cache
def _reader(kind: type[T]) -> TypeAdapter[T]:
    """Return what reads a kind: making it takes a hundred times as long as using it."""
    return TypeAdapter(kind)


def _flat(scores: Mapping[str, Mapping[str, Array]]) -> Iterator[tuple[str, str, Array]]:
    for task, groups in scores.items():
        for group, values in groups.items():
            yield task, group, np.asarray(values)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _check_finite(values: Array, what: str) -> None:
    if not (np.abs(values) <= np.finfo(np.float32).max).all():  # false for NaN too
        raise _bad(f"{what} is not finite")


def _bad(what: str) -> LibraryError:
    return LibraryError(f"this is not an entry: {what}", hint="make the entry again")
