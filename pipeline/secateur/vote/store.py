"""The library's index: one SQLite file in WAL mode, its schema and how an older one is brought up.

Readers never wait for a writer, writers wait for each other, and a process killed at any moment
leaves what was committed before. WAL needs a local disk: SQLite's own documentation rules out
network file systems (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from secateur.core.errors import LibraryError

APPLICATION_ID = 0x5ECA7E12  # tells our file from other people's SQLite files
PATIENCE_S = 60.0  # how long one process waits for another's write
# Each step brings the schema to the next version; a new library takes them all.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE entries (
            id TEXT PRIMARY KEY,
            parent TEXT NOT NULL,
            basis TEXT NOT NULL,
            budget REAL NOT NULL,
            created TEXT NOT NULL,
            facts TEXT NOT NULL,   -- JSON of entry.Facts; the columns above are taken from it
            plan TEXT NOT NULL,    -- JSON of a PrunePlan
            scores TEXT,           -- sha256 of a blob
            weights TEXT           -- sha256 of a blob
        )""",
    ),
    (
        """CREATE TABLE sketches (
            entry TEXT NOT NULL REFERENCES entries (id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            data BLOB NOT NULL,    -- safetensors
            PRIMARY KEY (name, entry)
        )""",
        "CREATE INDEX sketches_by_entry ON sketches (entry)",
        "CREATE INDEX entries_by_parent ON entries (parent, budget)",
    ),
    ("ALTER TABLE entries ADD COLUMN axes TEXT",),  # sha256 of a blob
    (),  # facts name their network: what knows no such key is told that the library is newer
)
SCHEMA_VERSION = len(MIGRATIONS)


@contextmanager
def connect(index: Path) -> Iterator[sqlite3.Connection]:
    """Open the index for a block, in autocommit mode; each process and thread opens its own.

    Raises:
        LibraryError: the file is not ours, damaged, not writable, or locked for too long.
    """
    try:
        with closing(
            sqlite3.connect(index, timeout=PATIENCE_S, isolation_level=None)
        ) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            yield connection
    except sqlite3.Error as error:
        raise LibraryError(
            f"the library's index {index} cannot be used: {error}",
            hint="see that the folder is writable, on a local disk and not full, or choose "
            "another with SECATEUR_LIBRARY",
        ) from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock for a block; commit when it succeeds, else leave nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk ends it by itself
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def prepare_index(index: Path) -> None:
    """Make the index, or bring an older one to this version's schema.

    Raises:
        LibraryError: it is something else, or a newer Secateur made it.
    """
    with connect(index) as connection:
        if _version(connection, index) == SCHEMA_VERSION:
            return
        _use_wal(connection)
        with transaction(connection):  # another process may have been first: look again
            for statements in MIGRATIONS[_version(connection, index) :]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _version(connection: sqlite3.Connection, index: Path) -> int:
    # one statement: in two, another process could make the file ours in between
    version, kind, tables = connection.execute(
        "SELECT (SELECT user_version FROM pragma_user_version), "
        "(SELECT application_id FROM pragma_application_id), "
        "(SELECT count(*) FROM sqlite_master)"
    ).fetchone()
    if kind != APPLICATION_ID and (version, kind, tables) != (0, 0, 0):
        raise LibraryError(
            f"{index} is not the index of a library",
            hint="choose an empty folder, with SECATEUR_LIBRARY",
        )
    if version > SCHEMA_VERSION:
        raise LibraryError(
            f"{index} has schema version {version}, this Secateur knows {SCHEMA_VERSION}",
            hint="use the newer Secateur, or another folder with SECATEUR_LIBRARY",
        )
    return int(version)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL; SQLite may refuse that at once while another process does the same."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
