"""What every suite writes: where, with what, which rows, and whether each claim holds."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.core.files import write_json
from secateur.devices.host import host_facts, library_versions

RESULTS = Path(__file__).resolve().parent / "results"
# Of a manifest: what repeats files of the repository, and paths of the machine.
LEFT_OUT: Any = {"recipe": True, "files": True, "data": {"eval_root"}}
# Builds of a suite add to a library of their own, not to the user's.
os.environ.setdefault("SECATEUR_LIBRARY", str(RESULTS.parents[1] / "out" / "library"))


@dataclass(frozen=True)
class Show:
    """One claim, computed here: ``value`` against ``target`` in the direction of ``sense``.

    A claim whose runs are still missing has no value, and does not hold.
    """

    claim: str
    target: float
    value: float | None
    sense: str  # "<=" or ">="

    @property
    def ok(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.target if self.sense == "<=" else self.value >= self.target


def write_suite(
    name: str, command: str, seeds: list[int], rows: list[dict[str, Any]], shows: list[Show]
) -> Path:
    """Write ``results/<name>.json`` and print the claims."""
    path = RESULTS / f"{name}.json"
    write_json(
        path,
        {
            "suite": name,
            "command": command,
            "host": host_facts(),
            "versions": library_versions(),
            "seeds": seeds,
            "rows": rows,
            "shows": [{**asdict(show), "ok": show.ok} for show in shows],
        },
    )
    for show in shows:
        mark = "ok    " if show.ok else "MISSED"
        print(f"{mark} {show.claim}: {shown_value(show.value, 6)} {show.sense} {show.target:g}")
    print(f"written to {path}")
    return path


def shown_value(value: float | None, digits: int = 4) -> str:
    """Return a claim's value as a reader sees it."""
    return "not run" if value is None else f"{value:.{digits}g}"


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows that ``append_row`` wrote; none when there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one row as a line of JSON, so that a stopped suite resumes and two may write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def exit_status(shows: list[Show]) -> None:
    """Leave with 1 when a claim does not hold."""
    sys.exit(0 if all(show.ok for show in shows) else 1)
