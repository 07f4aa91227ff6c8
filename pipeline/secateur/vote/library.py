"""The library of earlier cuts: one folder with an index and the arrays it names.

``index.sqlite`` says what there is (``store``); ``blobs/<sha256>.safetensors`` hold scores,
weights and axes. A blob is written whole under its digest before the one transaction that names
it, so a process killed in between leaves an orphan, which ``garbage`` removes, and never an
entry without its arrays.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.core.errors import BundleError, LibraryError
from secateur.core.files import atomic_path, not_writable
from secateur.core.plan import PrunePlan
from secateur.vote.entry import Entry, Facts, Packed, digest_of, pack, parsed, unpack
from secateur.vote.store import connect, prepare_index, transaction

OTHER_FOLDER = "choose a writable folder with free space, with SECATEUR_LIBRARY"


@dataclass(frozen=True)
class Library:
    """An open library; holds no file open, so it may be shared with threads and processes."""

    root: Path

    @property
    def index(self) -> Path:
        """The SQLite file."""
        return self.root / "index.sqlite"

    @property
    def blobs(self) -> Path:
        """The folder of safetensors files."""
        return self.root / "blobs"

    def blob(self, digest: str) -> Path:
        """Return the file of the blob with this SHA-256."""
        return self.blobs / f"{digest}.safetensors"


@dataclass(frozen=True)
class Listed:
    """An entry without its arrays: ``sketches`` are their names."""

    id: str
    facts: Facts
    sketches: tuple[str, ...]
    scored: bool
    with_weights: bool


@dataclass(frozen=True)
class _Row:
    packed: Packed
    facts: Facts
    digests: tuple[str | None, ...]  # of scores, weights and axes


def default_root() -> Path:
    """Return ``$SECATEUR_LIBRARY``, or ``~/.local/share/secateur/library``."""
    chosen = os.environ.get("SECATEUR_LIBRARY")
    return Path(chosen) if chosen else Path.home() / ".local/share/secateur/library"


def open_library(root: Path | None = None) -> Library:
    """Open the library in ``root`` (``default_root`` when None), making or migrating it.

    Raises:
        LibraryError: the folder cannot be used, holds something else, or a newer library.
    """
    library = Library(root or default_root())
    try:
        library.blobs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LibraryError(not_writable(library.root, error).message, hint=OTHER_FOLDER) from error
    prepare_index(library.index)
    return library


def add_entry(library: Library, entry: Entry) -> str:
    """Add an entry, unless it is there already, and return its id.

    Raises:
        LibraryError: the library cannot be written.
    """
    return add_entries(library, [entry])[0]


def add_entries(library: Library, entries: Iterable[Entry]) -> list[str]:
    """Add all entries or none, and return their ids.

    Raises:
        LibraryError: the library cannot be written.
    """
    rows = [_with_blobs_written(library, entry) for entry in entries]
    with connect(library.index) as connection, transaction(connection):
        for row in rows:
            _insert(library, connection, row)
    return [row.packed.id for row in rows]


def find_entries(
    library: Library,
    *,
    parent: str | None = None,
    tasks: Collection[str] | None = None,
    budget: tuple[float, float] | None = None,
) -> list[Listed]:
    """Return the entries, oldest first, that meet every condition given.

    ``parent`` is how a fingerprint begins, ``tasks`` are names of which an entry keeps at least
    one, and ``budget`` the least and the most share of MACs, both inclusive.

    Raises:
        LibraryError: the index cannot be read, or an entry in it.
    """
    least, most = budget or (0.0, 1.0)
    with connect(library.index) as connection:
        rows = connection.execute(
            "SELECT id, facts, scores IS NOT NULL, weights IS NOT NULL, "
            "(SELECT group_concat(name, ' ') FROM sketches WHERE entry = id) FROM entries "
            "WHERE budget BETWEEN ? AND ? AND substr(parent, 1, ?) = ? ORDER BY created, id",
            (least, most, len(parent or ""), parent or ""),
        ).fetchall()
    found = [
        Listed(
            entry,
            parsed(Facts, facts, f"entry {entry}"),
            tuple(sorted((sketches or "").split())),
            bool(scored),
            bool(with_weights),
        )
        for entry, facts, scored, with_weights, sketches in rows
    ]
    return [each for each in found if tasks is None or {*tasks} & {*each.facts.task_names}]


def ids_of_recipe(
    library: Library, parent: str, recipe: str, device: str = "", *, network: str = "", data: str
) -> set[str]:
    """Return the ids of what a recipe, by its text, made of a network, for one device or any.

    The text may leave the network and the data to variables, and networks share a ``parent`` where
    that is a trunk. An entry that does not say its device or its network counts as one for any; one
    that cannot be read is none.
    """
    with connect(library.index) as connection:
        rows = connection.execute(
            "SELECT id FROM (SELECT id, CASE WHEN json_valid(facts) THEN facts ELSE '{}' END "
            "AS said FROM entries WHERE parent = ?) WHERE json_extract(said, '$.recipe') = ? "
            "AND json_extract(said, '$.data') = ? "
            "AND coalesce(json_extract(said, '$.network'), '') IN ('', ?) "
            "AND (? = '' OR coalesce(json_extract(said, '$.device'), '') IN ('', ?))",
            (parent, recipe, data, network, device, device),
        )
        return {row[0] for row in rows}


def find_same_cut(library: Library, entry: Entry) -> str | None:
    """Return the id of an entry of the same network and tasks that keeps the same channels.

    One with arrays comes before one without.
    """
    with connect(library.index) as connection:
        rows = connection.execute(
            "SELECT id, facts, plan FROM entries WHERE parent = ? AND basis = ? "
            "ORDER BY scores IS NULL, weights IS NULL, id",
            (entry.facts.parent, entry.facts.basis),
        ).fetchall()
    for name, facts, plan in rows:
        known = parsed(Facts, facts, f"entry {name}")
        cuts = parsed(PrunePlan, plan, f"entry {name}").cuts
        of = known.network, known.task_names, cuts
        if of == (entry.facts.network, entry.facts.task_names, entry.plan.cuts):
            return str(name)
    return None


def load_entry(library: Library, entry: str) -> Entry:
    """Return the entry with this id, its arrays compared with their digests.

    Raises:
        LibraryError: there is none, or an array is missing or was altered.
    """
    with connect(library.index) as connection:
        connection.execute("BEGIN")  # one view: not the entry before, its sketches after a removal
        row = connection.execute(
            "SELECT facts, plan, scores, weights, axes FROM entries WHERE id = ?", (entry,)
        ).fetchone()
        sketches = dict(
            connection.execute("SELECT name, data FROM sketches WHERE entry = ?", (entry,))
        )
    if row is None:
        raise _unknown(entry)
    scores, weights, axes = (_read_blob(library, entry, digest) for digest in row[2:])
    return unpack(Packed(entry, row[0], row[1], scores, weights, axes, sketches))


def load_plan(library: Library, entry: str) -> PrunePlan:
    """Return the plan of the entry with this id, without reading its arrays.

    Raises:
        LibraryError: there is none, or it cannot be read.
    """
    with connect(library.index) as connection:
        row = connection.execute("SELECT plan FROM entries WHERE id = ?", (entry,)).fetchone()
    if row is None:
        raise _unknown(entry)
    return parsed(PrunePlan, row[0], f"entry {entry}")


def find_axes(
    library: Library, parent: str, budget: tuple[float, float] = (0.0, 1.0)
) -> dict[str, list[str]]:
    """Return, per basis of a parent's entries that hold its axes, these entries' ids.

    The basis of the most entries comes first; ``budget`` is between which shares of the MACs the
    entries were cut to.
    """
    found: dict[str, list[str]] = {}
    with connect(library.index) as connection:
        for basis, entry in connection.execute(
            "SELECT basis, id FROM entries WHERE parent = ? AND axes IS NOT NULL "
            "AND budget BETWEEN ? AND ? ORDER BY basis, id",
            (parent, *budget),
        ):
            found.setdefault(basis, []).append(entry)
    return dict(sorted(found.items(), key=lambda one: -len(one[1])))


def find_id(library: Library, start: str) -> str:
    """Return the one id that begins with ``start``.

    Raises:
        LibraryError: none does, or several do.
    """
    with connect(library.index) as connection:
        ids = [
            row[0]
            for row in connection.execute(
                "SELECT id FROM entries WHERE substr(id, 1, ?) = ? LIMIT 2", (len(start), start)
            )
        ]
    if len(ids) > 1 and start:
        raise LibraryError(f"several entries begin with '{start}'", hint="give more of the id")
    if not ids or not start:
        raise _unknown(start)
    return str(ids[0])


def remove_entry(library: Library, entry: str) -> None:
    """Remove the entry with this id; ``garbage`` frees its arrays.

    Raises:
        LibraryError: there is none.
    """
    with connect(library.index) as connection, transaction(connection):
        if not connection.execute("DELETE FROM entries WHERE id = ?", (entry,)).rowcount:
            raise _unknown(entry)


def write_blob(library: Library, data: bytes) -> str:
    """Write ``data`` under its digest, unless it is there, and return the digest.

    Raises:
        LibraryError: it cannot be written.
    """
    digest = digest_of(data)
    path = library.blob(digest)
    try:
        if path.is_file() and digest_of(path.read_bytes()) == digest:
            os.utime(path)  # an orphan so far? then it is young again, and no garbage
            return digest
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # the index must not outlive what it names
    except BundleError as error:
        raise LibraryError(error.message, hint=OTHER_FOLDER) from error
    except OSError as error:
        raise LibraryError(not_writable(path, error).message, hint=OTHER_FOLDER) from error
    return digest


def _with_blobs_written(library: Library, entry: Entry) -> _Row:
    packed = pack(entry)
    digests = tuple(
        None if data is None else write_blob(library, data)
        for data in (packed.scores, packed.weights, packed.axes)
    )
    light = replace(packed, scores=None, weights=None, axes=None)
    return _Row(light, entry.facts, digests)


def _insert(library: Library, connection: sqlite3.Connection, row: _Row) -> None:
    """Insert one row; what it names was written before, and is looked for once more."""
    packed, facts = row.packed, row.facts
    for digest in row.digests:
        if digest is not None and not library.blob(digest).is_file():
            raise LibraryError(
                f"{library.blob(digest)} was removed while its entry was being added",
                hint="add it again, and collect garbage with a longer age",
            )
    added = connection.execute(
        "INSERT INTO entries "
        "(id, parent, basis, budget, created, facts, plan, scores, weights, axes) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        (packed.id, facts.parent, facts.basis, facts.budget, facts.created,
         packed.facts, packed.plan, *row.digests),
    ).rowcount  # fmt: skip
    if added:
        connection.executemany(
            "INSERT INTO sketches (entry, name, data) VALUES (?, ?, ?)",
            [(packed.id, name, data) for name, data in packed.sketches.items()],
        )


def _read_blob(library: Library, entry: str, digest: str | None) -> bytes | None:
    if digest is None:
        return None
    path = library.blob(digest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LibraryError(
            f"entry {entry} lacks its array file {path}: {error.strerror}",
            hint="restore the file, or remove the entry with `secateur library remove`",
        ) from error
    if digest_of(data) != digest:
        raise LibraryError(
            f"{path} was altered: its bytes are not those of entry {entry}",
            hint="restore the file, or remove the entry with `secateur library remove`",
        )
    return data


def _unknown(entry: str) -> LibraryError:
    return LibraryError(f"the library has no entry '{entry}'", hint="see `secateur library list`")
