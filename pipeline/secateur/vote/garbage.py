"""Arrays in the library's folder that no entry names, and entries whose arrays are not there."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass

from secateur.core.errors import LibraryError
from secateur.core.progress import track
from secateur.vote.entry import digest_of
from secateur.vote.library import Library
from secateur.vote.store import connect, transaction

GARBAGE_AGE_S = 600.0  # younger orphans may belong to an entry that is being added


@dataclass(frozen=True)
class Garbage:
    """``removed`` files and their ``bytes``; what is wrong with the blobs that entries name.

    ``missing`` and ``altered`` are (entry id, digest).
    """

    removed: tuple[str, ...]
    bytes: int
    missing: tuple[tuple[str, str], ...]
    altered: tuple[tuple[str, str], ...]


def collect_garbage(library: Library, *, older_than_s: float = GARBAGE_AGE_S) -> Garbage:
    """Remove files under ``blobs`` that no entry names and that are older than so many seconds.

    Nothing is committed meanwhile, so no entry can come to name a file that is being removed.
    Afterwards every other file is read: has each entry its arrays, as they were written?
    """
    removed, freed = [], 0
    with connect(library.index) as connection, transaction(connection):
        named = list(_named(connection))
        used = {library.blob(digest).name for _, digest in named}
        for path in sorted(library.blobs.iterdir()):
            try:
                facts = path.stat()
                if path.name in used or time.time() - facts.st_mtime < older_than_s:
                    continue
                path.unlink()
            except FileNotFoundError:  # another process's temporary file: renamed by now
                continue
            except OSError as error:
                raise LibraryError(
                    f"cannot remove {path}: {error.strerror}",
                    hint="it is no array of the library's; remove it yourself",
                ) from error
            removed.append(path.name)
            freed += facts.st_size
        missing = tuple(pair for pair in named if not library.blob(pair[1]).is_file())
    digests = sorted({digest for _, digest in named})
    bad = {digest for digest in track(digests, "reading arrays", len(digests))
           if _altered(library, digest)}  # fmt: skip
    altered = tuple(pair for pair in named if pair[1] in bad)
    return Garbage(tuple(removed), freed, missing, altered)


def _altered(library: Library, digest: str) -> bool:
    """Say whether a blob is there and other than it was written.

    Raises:
        LibraryError: it cannot be read.
    """
    path = library.blob(digest)
    try:
        return digest_of(path.read_bytes()) != digest
    except (
        FileNotFoundError,
        IsADirectoryError,
    ):  # told as missing, or removed by now
        return False
    except OSError as error:
        raise LibraryError(
            f"cannot read {path}: {error.strerror}", hint="make the file readable again"
        ) from error


def _named(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    for entry, *digests in connection.execute("SELECT id, scores, weights, axes FROM entries"):
        for digest in digests:
            if digest is not None:
                yield entry, digest
