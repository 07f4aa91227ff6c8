"""Version numbers as devices print them: read, compared, and grouped into ranges."""

from __future__ import annotations

import re

Version = tuple[int, ...]

_NUMBERS = re.compile(r"\d{1,9}(?:\.\d{1,9}){0,5}", re.ASCII)


def parse_version(text: str) -> Version | None:
    """Return the dotted numbers a text starts with; None where it starts with none.

    What follows them is left out, so ``"10.3.0.30-1+cuda12.5"`` is ``(10, 3, 0, 30)``: in a
    Debian version the part after ``+`` says what a package was built against, not what is there.
    """
    found = _NUMBERS.match(text.strip())
    return tuple(int(part) for part in found.group().split(".")) if found else None


def show_version(version: Version) -> str:
    """Return the dotted form."""
    return ".".join(str(part) for part in version)


def in_series(version: Version, series: Version) -> bool:
    """Whether a version belongs to a series: 10.3.0 to 10.3, and 36.4.3 to 36.4."""
    return version[: len(series)] == series


def between(version: Version, first: Version | None, last: Version | None) -> bool:
    """Whether ``first <= version <= last``; a whole series is meant by ``last``, so 10.7.1 <= 10.7.

    None leaves that end open.
    """
    return (first is None or version >= first) and (last is None or version[: len(last)] <= last)
