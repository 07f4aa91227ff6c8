"""Files that are whole or absent, and digests that name their contents."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.core.errors import BundleError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    A killed process leaves at most a ``.name.tmp-*`` file, never a half file that looks whole.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.tmp-", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise not_writable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have a file's bytes on the disk before its name is: a power cut must not leave it empty."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def not_writable(path: Path, error: OSError) -> BundleError:
    """Return the error that says ``path`` cannot be written and why."""
    return BundleError(
        f"cannot write {path}: {error.strerror or error}",
        hint="choose a writable folder with free space, with --out or SECATEUR_CACHE",
    )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """Return a short digest of any JSON-like value; equal values give equal digests."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
