"""The harness of rivals, as tables of the README and of the index."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Cells = dict[tuple[str, float], Row]
PARENT = "nyuv2_lite0_96x128"
KEEP = (0.5, 0.3, 0.1)
RECOVERIES = (0.05, 0.15, 0.4)
HEADLINE = ("cut", "tp_group_taylor", "l2", "random")
MEAN = "cut, scored once"  # what the rules are told of: its own is the mean
OURS = ("rule ", "cut, ", "tp_group_taylor, ", "l2, ")  # how the names of parts begin
SHOWN = (MEAN, "cut, label-free", "cut, no refit")  # of these the README tells, too
SETTING = (
    "EfficientNet-Lite0 with segmentation, depth and normals at 96x128; every method",
    "recovers for 15 % of the parent's steps, with the same loss and rate (`label-free`: with",
    "its distance to the parent's outputs alone).",
)


def fusion_table(suite: dict[str, Any]) -> str:
    """Return ΔT per method at each budget, mean over the seeds, best first at 70 % removed."""
    cells = _cells(suite)
    methods = {m for m, keep in cells if keep < 1 and (m in SHOWN or not m.startswith(OURS))}
    lines = ["", "| MACs removed | 50 % | 70 % | 90 % | 70 %, before recovery | seeds |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for method in _sorted(methods, {m: c["delta_t"]["mean"] for m, c in _at_70(cells)}):
        found = [cells.get((method, keep)) for keep in KEEP]
        values = [spread(cell["delta_t"]) if cell else "" for cell in found]
        before = spread(found[1]["delta_t_before"]) if found[1] else ""
        counts = [str(len(cell["seeds"])) if cell else "-" for cell in found]
        seeds = counts[0] if len(set(counts)) == 1 else ", ".join(counts)
        lines.append(f"| {_named(method, found)} | {' | '.join(values)} | {before} | {seeds} |")
    lines += [
        "",
        "ΔT in % on the 654 test images, mean ± standard deviation over the seeds;",
        *SETTING,
        "(+n steps): training that the method's cut takes itself.",
        *_control(cells),
    ]
    return "\n".join([*lines, ""])


def rules_table(suite: dict[str, Any]) -> str:
    """Return ΔT and the worst task per rule and budget, mean over the seeds."""
    cells = _cells(suite)
    rules = [MEAN, *sorted({m for m, _ in cells if m.startswith("rule ")})]
    columns = "50 % | worst task | 70 % | worst task | 90 % | worst task | seeds"
    lines = ["", f"| MACs removed | {columns} |", "|---" * 8 + "|"]
    for method in _sorted(rules, {m: c["delta_t"]["mean"] for m, c in _at_70(cells)}):
        found = [cells.get((method, keep)) for keep in KEEP]
        values = [
            spread(cell[key]) if cell else "" for cell in found for key in ("delta_t", "worst_task")
        ]
        name = "mean" if method == MEAN else method.removeprefix("rule ")
        seeds = ", ".join(sorted({str(len(cell["seeds"])) for cell in found if cell}))
        lines.append(f"| {name} | {' | '.join(values)} | {seeds} |")
    lines += [
        "",
        "ΔT in %, mean ± standard deviation over the seeds; channels scored once, all else as in",
        "the cut, 15 % of the parent's steps. `prune.fusion: cut` is the mean.",
    ]
    return "\n".join([*lines, ""])


def recoveries_table(suite: dict[str, Any]) -> str:
    """Return ΔT of the headline methods by budget and length of recovery, mean over the seeds."""
    lines = ["", "| MACs removed, recovery | " + " | ".join(HEADLINE) + " |",
             "|---" * (len(HEADLINE) + 1) + "|"]  # fmt: skip
    for keep in KEEP:
        for recovery in RECOVERIES:
            cells = _cells(suite, recovery)
            found = [cells.get((method, keep)) for method in HEADLINE]
            values = [f"{spread(c['delta_t'])} ({len(c['seeds'])})" if c else "" for c in found]
            lines.append(
                f"| {100 - 100 * keep:.0f} %, {100 * recovery:.0f} % | {' | '.join(values)} |"
            )
    lines += [
        "",
        "ΔT in %, mean ± standard deviation (seeds); recovery in % of the parent's steps. At 90 %",
        "torch-pruning's GroupTaylor reaches no such cut.",
    ]
    return "\n".join([*lines, ""])


def parts_table(suite: dict[str, Any]) -> str:
    """Return ΔT of every rival and of our cut with a part left out, all on the first seed.

    Most parts have no other seed.
    """
    cells = {key: cell for key, cell in _cells(suite).items() if "0" in cell["delta_t_by_seed"]}
    methods = {m for m, keep in cells if keep < 1 and not m.startswith("rule ")}
    lines = ["", "| MACs removed | 50 % | 70 % | 90 % |", "|---|---|---|---|"]
    for method in _sorted(methods, {m: c["delta_t_by_seed"]["0"] for m, c in _at_70(cells)}):
        found = [cells.get((method, keep)) for keep in KEEP]
        values = [f"{cell['delta_t_by_seed']['0']:+.1f}" if cell else "" for cell in found]
        lines.append(f"| {_named(method, found)} | {' | '.join(values)} |")
    lines += [
        "",
        "ΔT in % on the 654 test images, first seed;",
        *SETTING,
        "(+n steps): training that the method's cut takes itself.",
        "A refit leaves batch norms that fit the cut network; recovery freezes them half-way",
        "(if short, after a mild cut, at once), `frozen norms` from the first step (a rival's",
        "after re-estimating them), `trained norms` never.",
        *_control(cells),
    ]
    return "\n".join([*lines, ""])


def spread(value: dict[str, float]) -> str:
    """Return mean and standard deviation; the mean alone where there is no deviation."""
    deviation = f" ± {value['std']:.1f}" if value["std"] else ""
    return f"{value['mean']:+.1f}{deviation}"


def _cells(suite: dict[str, Any], recovery: float = 0.15) -> Cells:
    return {
        (row["method"], row["keep"]): row
        for row in suite["rows"]
        if (row["parent"], row["recovery"]) == (PARENT, recovery) and "unreached" not in row
    }


def _at_70(cells: Cells) -> Iterable[tuple[str, Row]]:
    return ((method, cell) for (method, keep), cell in cells.items() if keep == 0.3)


def _sorted(methods: Collection[str], at_70: dict[str, float]) -> list[str]:
    """Return the best first, then, by name, those that have no figure."""
    return sorted(methods, key=lambda method: (-at_70.get(method, -1e9), method))


def _named(method: str, found: Sequence[Row | None]) -> str:
    extra = max(cell["steps_before"] for cell in found if cell)
    return f"{method} (+{extra} steps)" if extra else method


def _control(cells: Cells) -> list[str]:
    for (_, keep), cell in cells.items():
        if keep == 1.0:
            return [f"The same recovery without any cut changes the parent by "
                    f"{spread(cell['delta_t'])} % ({len(cell['seeds'])} seed(s)): read the rows "
                    "against that."]  # fmt: skip
    return []
