"""Tables that several verbs print."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

Metrics = Mapping[str, Mapping[str, float]]


def change_table(
    before: Metrics, after: Metrics, change_percent: Mapping[str, float], names: tuple[str, str]
) -> Table:
    """Return the metrics of each task of ``after`` beside those ``before``, and its change."""
    table = Table("task", "metric", *names, "task's change %")
    for task, metrics in after.items():
        for row, (metric, value) in enumerate(metrics.items()):
            table.add_row(
                task if row == 0 else "", metric, f"{before[task][metric]:.4g}", f"{value:.4g}",
                f"{change_percent[task]:+.2f}" if row == 0 else "",
            )  # fmt: skip
    return table
