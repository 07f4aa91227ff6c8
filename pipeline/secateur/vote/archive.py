"""Entries in one zip file, to carry a library to another machine.

``library.json`` lists the entries, ``blobs/<sha256>.safetensors`` hold their arrays. Members are
stored, not compressed, so that a small archive cannot unfold into a large one; they are read by
the names that digests give, and never extracted to a path of the archive's choosing.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from secateur.core.errors import BundleError, LibraryError
from secateur.core.files import atomic_path
from secateur.core.plan import PrunePlan
from secateur.core.progress import track
from secateur.vote.entry import (
    Entry,
    Facts,
    arrays_of,
    digest_of,
    pack,
    parsed,
    scores_of,
    tensors,
)
from secateur.vote.library import Library, add_entries, find_entries, load_entry
from secateur.vote.store import SCHEMA_VERSION

CONTENTS = "library.json"
FORMAT = "secateur library"
BLOB = re.compile(r"blobs/[0-9a-f]{64}\.safetensors")
UNREADABLE = (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, ValueError)


@dataclass(frozen=True)
class _Header:
    format: str
    schema_version: int


@dataclass(frozen=True)
class _Item:
    """An entry; its arrays are digests of members."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    id: str
    facts: Facts
    plan: PrunePlan
    scores: str | None
    weights: str | None
    sketches: str | None
    axes: str | None = None  # since schema version 3


@dataclass(frozen=True)
class _Contents(_Header):
    entries: tuple[_Item, ...]


def export_entries(
    library: Library, path: Path, entries: Collection[str] | None = None
) -> tuple[str, ...]:
    """Write the entries with these ids (all when None) to a zip file, and return their ids.

    Raises:
        LibraryError: an entry is unknown or damaged, or the file cannot be written.
    """
    wanted = [listed.id for listed in find_entries(library)] if entries is None else [*entries]
    try:
        with (
            atomic_path(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            written: set[str] = set()
            items = [_write_entry(archive, load_entry(library, name), written)
                     for name in track(wanted, "writing entries", len(wanted))]  # fmt: skip
            contents = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "entries": items}
            archive.writestr(CONTENTS, json.dumps(contents))
    except (OSError, BundleError) as error:
        raise LibraryError(
            f"cannot write {path}: {error}", hint="choose another file, on a disk with free space"
        ) from error
    return tuple(wanted)


def import_entries(library: Library, path: Path) -> tuple[str, ...]:
    """Add all entries of a zip file that ``export_entries`` wrote, or none; return their ids.

    Raises:
        LibraryError: the file is none of ours, altered, of a newer schema, or names other paths.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(add_entries(library, _read_entries(archive, path)))
    except UNREADABLE as error:
        raise _refused(path, f"it cannot be read: {error}") from error


def _write_entry(archive: zipfile.ZipFile, entry: Entry, written: set[str]) -> dict[str, Any]:
    """Write those arrays of an entry that no other has ``written``, and note them there."""
    packed = pack(entry)
    digests = {}
    for name, data in (
        ("scores", packed.scores),
        ("weights", packed.weights),
        ("sketches", tensors(entry.sketches)),
        ("axes", packed.axes),
    ):
        digests[name] = digest = None if data is None else digest_of(data)
        if data is not None and digest is not None and digest not in written:
            archive.writestr(_member(digest), data)
            written.add(digest)
    return {"id": packed.id, "facts": asdict(entry.facts), "plan": entry.plan.to_json(), **digests}


def _read_entries(archive: zipfile.ZipFile, path: Path) -> Iterator[Entry]:
    """Yield the archive's entries, each checked; what is wrong with any is raised before one is
    added, since ``add_entries`` reads them all first.
    """
    names = archive.namelist()
    strange = [name for name in names if name != CONTENTS and not BLOB.fullmatch(name)]
    if strange or len(set(names)) < len(names) or CONTENTS not in names:
        raise _refused(path, f"it holds {strange[0]!r}" if strange else "a file lacks or is double")
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise _refused(path, "its files are compressed, expected stored")
    text = archive.read(CONTENTS).decode("utf-8")
    header = parsed(_Header, text, CONTENTS)
    if header.format != FORMAT or not 1 <= header.schema_version <= SCHEMA_VERSION:
        raise _refused(
            path, f"it is a '{header.format}' of schema version {header.schema_version}, "
            f"this Secateur reads '{FORMAT}' up to {SCHEMA_VERSION}"
        )  # fmt: skip
    items = parsed(_Contents, text, CONTENTS).entries
    for item in track(items, "reading entries", len(items)):
        scores, weights, sketches, axes = (
            _blob(archive, path, digest)
            for digest in (item.scores, item.weights, item.sketches, item.axes)
        )
        entry = Entry(
            item.facts,
            item.plan,
            scores_of(scores),
            arrays_of(sketches, "the sketches"),
            arrays_of(weights, "the weights"),
            arrays_of(axes, "the axes"),
        )
        if entry.id != item.id:
            raise _refused(path, f"entry {item.id} was altered: its content has id {entry.id}")
        yield entry


def _blob(archive: zipfile.ZipFile, path: Path, digest: str | None) -> bytes | None:
    if digest is None:
        return None
    if _member(digest) not in archive.namelist():
        raise _refused(path, f"the array file {digest[:12]!r}… is missing")
    data = archive.read(_member(digest))
    if digest_of(data) != digest:
        raise _refused(path, f"the array file {digest[:12]}… was altered")
    return data


def _member(digest: str) -> str:
    return f"blobs/{digest}.safetensors"


def _refused(path: Path, why: str) -> LibraryError:
    return LibraryError(
        f"{path} is not imported: {why}",
        hint="give a file that `secateur library export` wrote, and copy it again",
    )
