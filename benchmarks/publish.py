"""Carry results/*.json into the README and the index: python benchmarks/publish.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
INDEX = HERE / "README.md"


def main() -> None:
    suites = {path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")}
    pages = {README: readme(README.read_text(), suites), INDEX: index(suites)}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(map(str, stale))}; run python benchmarks/publish.py")
    for path, text in pages.items():
        path.write_text(text)


def readme(text: str, suites: dict[str, Any]) -> str:
    """Return the README with every ``<!-- suite -->`` block filled from its results."""
    for name in re.findall(r"<!-- (\w+) -->", text):
        before, rest = text.split(f"<!-- {name} -->")
        _, after = rest.split(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->\n{table(suites[name])}\n<!-- /{name} -->{after}"
    return text


def table(suite: dict[str, Any]) -> str:
    """Return the whole-way table of a suite, and that of cuts without training if it has one."""
    build = suite["rows"][0]
    accuracy, before, after = build["accuracy"], build["cost_parent"], build["cost"]
    parent_ms, cut_ms = (build["latency_ms"][k]["median_ms"] for k in ("parent", "cut"))
    lines = ["", "| | parent, same tasks | cut | |", "|---|---|---|---|"]
    for task, metrics in accuracy["shipped"].items():
        for number, (metric, value) in enumerate(metrics.items()):
            change = f"{accuracy['change_percent'][task]:+.2f} %" if number == 0 else ""
            lines.append(f"| {task} {metric} | {accuracy['parent'][task][metric]:.4g} "
                         f"| {value:.4g} | {change} |")  # fmt: skip
    rows = [
        ("M MACs", before["macs"] / 1e6, after["macs"] / 1e6),
        ("M parameters", before["params"] / 1e6, after["params"] / 1e6),
        ("MB of ONNX", before["onnx_bytes"] / 1e6, after["onnx_bytes"] / 1e6),
        ("p50 ms, ONNX Runtime, 1 thread", parent_ms, cut_ms),
    ]
    lines += [f"| {n} | {b:.4g} | {a:.4g} | x {a / b:.3f} |" for n, b, a in rows]
    lines += [
        "",
        f"ΔT {accuracy['delta_t']:+.2f} %, worst task {accuracy['worst_task']} "
        f"{accuracy['change_percent'][accuracy['worst_task']]:+.2f} %; before any training "
        f"{accuracy['delta_t_before_recovery']:+.2f} % ({accuracy['images']} test images; "
        f"{suite['host']['cpu']}).",
    ]
    cuts = [row for row in suite["rows"] if row["what"] == "no training"] if len(
        suite["rows"]) > 1 else []  # fmt: skip
    if cuts:
        lines += ["", "The same budget without any training, ΔT in %:", "",
                  "| criterion | plain cut | compensated on 64 unlabelled images |",
                  "|---|---|---|"]  # fmt: skip
        by = {(row["criterion"], row["cut"]): row["delta_t"] for row in cuts}
        for criterion in dict.fromkeys(row["criterion"] for row in cuts):
            lines.append(f"| {criterion} | {by[criterion, 'plain']:+.1f} "
                         f"| {by[criterion, 'compensated']:+.1f} |")  # fmt: skip
    return "\n".join([*lines, ""])


def index(suites: dict[str, Any]) -> str:
    """Return the index: every claim, its command and its last value."""
    lines = [
        "# Benchmarks",
        "",
        "Each suite has one command and writes `results/<suite>.json` (host, versions, seeds,",
        "rows, claims). `ok` is computed by the script. This page is written by `publish.py`.",
        "",
        "| claim | value | target | ok | command |",
        "|---|---|---|---|---|",
    ]
    for suite in (suites[name] for name in sorted(suites)):
        for show in suite["shows"]:
            lines.append(
                f"| {show['claim']} | {show['value']:.4g} | {show['sense']} {show['target']:g} "
                f"| {'yes' if show['ok'] else '**no**'} | `{suite['command']}` |"
            )
    lines += [
        "",
        "Parents and their cards: `parents/`; trained by `train_parent.py`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
