"""What a build decided about precisions, in words: read from the free parts of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.bench.wording import number, percent


@dataclass(frozen=True)
class Kept:
    """A node that stayed in high precision, and for which task."""

    node: str
    module: str
    precision: str
    why: str


@dataclass(frozen=True)
class Judged:
    """What the guard saw of a task, and what it allowed, as text."""

    task: str
    change: str
    limit: str


@dataclass(frozen=True)
class Decisions:
    """Sentences, the nodes kept in high precision, and the tasks the guard judged."""

    said: tuple[str, ...]
    kept: tuple[Kept, ...]
    judged: tuple[Judged, ...]


def decisions(manifest: Mapping[str, Any]) -> Decisions | None:
    """Return what is known; None where the build had nothing to decide."""
    found, choice = (
        _mapping(manifest.get("quantisation")),
        _mapping(manifest.get("precision_choice")),
    )
    if not found and not choice:
        return None
    guard = _mapping(found.get("guard"))
    kept = tuple(
        Kept(*(str(row.get(key) or "–") for key in ("node", "module", "precision", "why")))
        for row in _rows(found.get("kept"))
    )
    said = []
    if choice:
        said.append(f"{manifest['precision']} was chosen: {choice.get('why')}.")
    shares = [f"{100 * share:.3g} % in {name}" for name, value in
              _mapping(found.get("macs_share")).items() if (share := number(value))]  # fmt: skip
    if shares:
        how = f"ranges by {found.get('calibrator')} of {found.get('images')} images"
        said.append(f"Of the MACs, {', '.join(shares)}; {how}, for {found.get('dialect')}.")
    if found:
        said.append(_guard_said(guard, len(kept)))
    limits, change = _mapping(guard.get("limits")), _mapping(guard.get("change_percent"))
    judged = tuple(
        Judged(str(task), percent(number(change.get(task))), _limit(limits.get(task)))
        for task in dict.fromkeys([*change, *limits])
    )
    return Decisions(tuple(said), kept, judged)


def _guard_said(guard: Mapping[str, Any], kept: int) -> str:
    if not guard:
        return "No guard judged it, as the recipe says."
    outcome = "is satisfied" if guard.get("passed") is True else "found nothing that passes"
    nodes = "no node" if not kept else "one node" if kept == 1 else f"{kept} nodes"
    said = f"The guard {outcome} with {nodes} in high precision, after "
    said += f"{guard.get('evaluations')} evaluations."
    hopeless = guard.get("too_low_in_fp32")
    if isinstance(hopeless, list) and hopeless:
        said += f" Below their limits in fp32 already: {', '.join(map(str, hopeless))}."
    return said


def _limit(value: object) -> str:
    found = number(value)
    return "none" if found is None else percent(-found)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []
