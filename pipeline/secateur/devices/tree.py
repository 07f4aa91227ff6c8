"""Small text files of a device (``/sys``, ``/proc``, ``/etc``), from a folder or over a shell.

Every reader of telemetry and of facts takes such a mapping, so that what was recorded on one
device, brought over a connection or written in a test is read by the same code.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

Files = Mapping[str, str]
"""Absolute path on the device -> text of the file, without the blanks and zero bytes around it."""

_LARGEST = 256 * 1024  # bytes; nothing that is read here is near it, so more is not ours
_MOST = 4096  # files a pattern
_NUMBER = re.compile(r"[+-]?\d{1,18}(?:\.\d{1,9})?", re.ASCII)


def collect(patterns: Iterable[str], root: Path = Path("/")) -> dict[str, str]:
    """Read the files that match absolute glob patterns, as if ``root`` were ``/``.

    What cannot be read is left out: a sensor whose part is switched off answers with an error.
    """
    found = {}
    for pattern in patterns:
        for path in _matches(root, pattern):
            text = read_text(path)
            if text is not None:
                found["/" + path.relative_to(root).as_posix()] = text
    return found


def collect_command(patterns: Iterable[str]) -> str:
    """Return one shell command that prints what ``collect`` would read; see ``parse_collected``."""
    spaced = " ".join(_quoted_glob(pattern) for pattern in patterns)
    return f"LC_ALL=C grep -sHa '' -- {spaced} | head -c {16 * _LARGEST}; true"


def parse_collected(output: str) -> dict[str, str]:
    """Read the output of ``collect_command``: lines of ``path:text``. Other lines are left out."""
    lines: dict[str, list[str]] = {}
    for line in output.split("\n"):
        path, colon, text = line.partition(":")
        if colon and path.startswith("/"):
            lines.setdefault(path, []).append(text)
    return {path: _trimmed("\n".join(parts)) for path, parts in lines.items()}


def read_text(path: Path) -> str | None:
    """Return a small file's text, or None where there is none to be had."""
    try:
        with path.open("rb") as file:
            return _trimmed(file.read(_LARGEST).decode("utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def number(text: str | None) -> float | None:
    """Return the finite number that a text is; None where it is anything else."""
    if text is None or not _NUMBER.fullmatch(text.strip()):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def matching(files: Files, pattern: str) -> list[tuple[re.Match[str], str]]:
    """Return the matches of a regular expression on whole paths, with the texts, sorted by path."""
    compiled = re.compile(pattern)
    found = ((compiled.fullmatch(path), files[path]) for path in sorted(files, key=_natural))
    return [(match, text) for match, text in found if match]


def _matches(root: Path, pattern: str) -> list[Path]:
    try:
        return list(islice(root.glob(pattern.lstrip("/")), _MOST))
    except OSError:  # a folder that went away, or may not be listed
        return []


def _natural(path: str) -> list[tuple[int, int, str]]:
    # zone10 after zone9; runs of digits longer than any index stay text
    parts = re.findall(r"\d{1,9}|[^\d]+|\d", path, re.ASCII)
    return [(0, int(p), "") if p.isdigit() and p.isascii() else (1, 0, p) for p in parts]


def _trimmed(text: str) -> str:
    return text.strip("\x00 \t\r\n")


def _quoted_glob(pattern: str) -> str:
    return "*".join(shlex.quote(part) if part else "" for part in pattern.split("*"))
