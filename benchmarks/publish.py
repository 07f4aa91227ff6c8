"""Carry results/*.json into the README and the index: python benchmarks/publish.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from compensation_table import allocation_table, training_free_table
from rivals_table import fusion_table, parts_table, recoveries_table, rules_table, spread
from starts_table import starts_table
from suite import shown_value

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
INDEX = HERE / "README.md"
RESULTS = HERE / "results"


def main() -> None:
    suites = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
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
        filled = TABLES.get(name, table)(suites[name])
        text = f"{before}<!-- {name} -->\n{filled}\n<!-- /{name} -->{after}"
    return text


def table(suite: dict[str, Any]) -> str:
    """Return the whole-way table of a suite, and that of cuts without training if it has one."""
    build = suite["rows"][0]
    accuracy, before, after = build["accuracy"], build["cost_parent"], build["cost"]
    parent_ms, cut_ms = (build["latency_ms"][k]["median_ms"] for k in ("parent", "cut"))
    lines = ["", "| | parent, kept tasks | cut | change |", "|---|---|---|---|"]
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
    return "\n".join([*lines, ""])


def merging_table(suite: dict[str, Any]) -> str:
    """Return ΔT against the experts per merging rule, worst first."""
    rows = [row for row in suite["rows"] if row["what"] == "summary"]
    lines = ["", "| three experts in one backbone | merged | recovered | worst task, recovered |",
             "|---|---|---|---|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: row["merged_delta_t"]["mean"]):
        values = [spread(row[key]) for key in
                  ("merged_delta_t", "recovered_delta_t", "recovered_worst")]  # fmt: skip
        lines.append(f"| {row['row']} | {' | '.join(values)} |")
    merged = next(row for row in suite["rows"] if row["what"] == "merged")
    lines += [
        "",
        "ΔT in % against the single-task experts on the 654 test images, NYUv2 at 96x128,",
        f"{rows[0]['seeds']} seed(s); {merged['images']} unlabelled images to merge, then the same",
        f"{merged['recovery_steps']} steps of training for all.",
    ]
    return "\n".join([*lines, ""])


def peers_table(suite: dict[str, Any], *, whole: bool = False) -> str:
    """Return ours and every peer at each budget; ``whole``: with every metric and percentile."""
    parent = next(row for row in suite["rows"] if row["peer"] == "parent")
    metrics = [(task, metric) for task, found in parent["bundles"]["fp32"]["metrics"].items()
               for metric in found] if whole else []  # fmt: skip
    percentiles = ("p50", "p90", "p99") if whole else ("p50",)
    head = ["MACs", "precision", "ΔT %", "worst task %", *(f"{t} {m}" for t, m in metrics),
            *(f"{p} ms" for p in percentiles), "MB", "lines written", "minutes"]  # fmt: skip
    lines = ["", f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for row in suite["rows"]:
        if "failed" in row:
            lines.append(f"| {row['peer']}, {row['keep']:.0%}: {row['failed']} "
                         + "|" * (len(head) + 1))  # fmt: skip
        for precision, bundle in row.get("bundles", {}).items():
            cells = [
                f"{bundle['macs'] / parent['bundles']['fp32']['macs']:.0%}", precision,
                f"{bundle['delta_t']:+.1f}", f"{bundle['worst']:+.1f}",
                *(f"{bundle['metrics'][t][m]:.4g}" for t, m in metrics),
                *(f"{bundle['latency_ms'][p]:.2f}" for p in percentiles),
                f"{bundle['bytes'] / 1e6:.2f}",
                str(row.get("lines", "")), f"{row['cpu_s'] / 60:.0f}" if "cpu_s" in row else "",
            ]  # fmt: skip
            lines.append(f"| {row['peer']} | {' | '.join(cells)} |")
    noisy = any(bundle["latency_ms"]["noisy"] for row in suite["rows"]
                for bundle in row.get("bundles", {}).values())  # fmt: skip
    lines += [
        "",
        "ΔT and the worst task on the 654 test images; EfficientNet-Lite0 with segmentation, depth",
        "and normals at 96x128. The same parent, training images, share of MACs and 15 % of the",
        "parent's steps for all, one seed; all files timed in turns, ONNX Runtime, 1 thread"
        + (" (a busy" if noisy else "."),
        *(["machine: flagged noisy)."] if noisy else []),
        "Lines: without blank ones, comments and docstrings; data, losses and parent not counted.",
        "Minutes: of one core, the whole job, both precisions.",
    ]
    if whole:
        lines += [
            "FastNAS stops at this network's batch norms and heads: they are rewritten into",
            "equal functions; its second budget finds the statistics of the first. Olive cuts",
            "nothing. Uniform networks trained as long as the parent was are not among them.",
        ]
    return "\n".join([*lines, ""])


def engines_table(suite: dict[str, Any]) -> str:
    """Return bytes, layers and seconds of every engine, or why it could not be built."""
    forms = ("fp32", "fp16", "int8")
    lines = ["", f"| | {' | '.join(f'MB {f} | layers {f} | s {f}' for f in forms)} |",
             "|---" * (1 + 3 * len(forms)) + "|"]  # fmt: skip
    for row in suite["rows"]:
        cells = []
        for form in forms:
            found = row[form]
            cells += ["", "", found["fails"]] if "fails" in found else [
                f"{found['bytes'] / 1e6:.1f}", str(found["layers"]), f"{found['cpu_seconds']:.1f}"
            ]  # fmt: skip
        lines.append(f"| {row['backbone']} | {' | '.join(cells)} |")
    version = suite["rows"][0]["versions"]["tensorrt-rtx"]
    lines += [
        "",
        "Backbones with three heads, random weights, cut to half their MACs, built without a GPU",
        f"by the bundle's own build_engine.py with tensorrt-rtx {version}. Layers: of the parsed",
        "network, before fusion. Seconds: of CPU time, the whole builder. Bytes: TensorRT-RTX",
        "finishes kernels on the GPU, and what it keeps for that outweighs the weights of small",
        "networks, most of all in int8: these are no sizes of TensorRT's own engines.",
    ]
    return "\n".join([*lines, ""])


def sparsity_table(suite: dict[str, Any]) -> str:
    """Return what 2:4 sparsity costs each task, before and after recovery."""
    rows = [row for row in suite["rows"] if "before" in row]
    tasks = list(rows[0]["before"]["change_percent"])
    lines = ["", f"| | | ΔT % | worst task % | {' | '.join(f'{t} %' for t in tasks)} |",
             "|---" * (4 + len(tasks)) + "|"]  # fmt: skip
    for row in rows:
        for when in ("before", "after"):
            if when in row:
                found = row[when]
                changes = [f"{found['change_percent'][task]:+.2f}" for task in tasks]
                lines.append(f"| {row['method']} | {when} recovery | {found['delta_t']:+.2f} "
                             f"| {found['worst']:+.2f} | {' | '.join(changes)} |")  # fmt: skip
    exported = next(row for row in suite["rows"] if row["method"] == "exported")
    files = ", ".join(
        f"{form} {exported[form]['eligible'] - exported[form]['not_2_to_4']} of "
        f"{exported[form]['eligible']}"
        for form in ("fp32", "fp16", "int8")
    )
    lines += [
        "",
        "Half of the MACs of nyuv2_lite0_96x128 removed, then 2:4; the 654 test images, one seed.",
        f"Eligible layers that are 2:4 in the exported file: {files}.",
    ]
    return "\n".join([*lines, ""])


def arm_table(suite: dict[str, Any]) -> str:
    """Return the instructions of each network, runtime and precision, whole and cut."""
    counts: dict[tuple[str, str, str], dict[float, Any]] = {}
    for row in suite["rows"]:
        if row["part"] == "counts" and row["instructions"]:
            key = row["network"], row["runtime"], row["precision"]
            counts.setdefault(key, {})[row["share"]] = row
    shares = (1.0, 0.5, 0.25)
    head = ["whole", "50 % of the MACs", "25 %", "cold start, whole", "MB of wheels on the board"]
    lines = ["", f"| million instructions of one inference | {' | '.join(head)} |",
             "|---" * (len(head) + 1) + "|"]  # fmt: skip
    for (network, runtime, precision), rows in counts.items():
        whole = rows.get(1.0)
        cells = []
        for share in shares:
            row = rows.get(share)
            cell = "" if row is None else f"{row['instructions'] / 1e6:.1f}"
            if row is not None and whole is not None and share != 1.0:
                cell += f" (x {row['instructions'] / whole['instructions']:.2f})"
            cells.append(cell)
        some = next(iter(rows.values()))
        cold = f"{whole['cold_start'] / 1e6:.0f}" if whole else ""
        name = f"{network}, {runtime} {precision}"
        lines.append(f"| {name} | {' | '.join([*cells, cold, str(some['wheels_mb'])])} |")
    lines += [
        "",
        "Emulated Cortex-A76 (the Raspberry Pi 5's), 96x128, three dense tasks, one thread. A",
        "proxy: caches, memory and the order of execution are not modelled; no latency is meant.",
    ]
    return "\n".join([*lines, ""])


def budgets_table(suite: dict[str, Any]) -> str:
    """Return ΔT and the worst task at each budget, in a sentence."""
    found = []
    for keep in sorted({row["keep"] for row in suite["rows"]}, reverse=True):
        rows = [row["accuracy"] for row in suite["rows"] if row["keep"] == keep]
        change = sum(row["delta_t"] for row in rows) / len(rows)
        worst = sum(row["change_percent"][row["worst_task"]] for row in rows) / len(rows)
        found.append(f"{change:+.1f} ({worst:+.1f}) at {100 - 100 * keep:.0f} %")
    return "\n".join([
        "",
        "With all three tasks kept, ΔT and, in brackets, the worst task, by the MACs removed: "
        f"{', '.join(found)}",
        f"({len(suite['seeds'])} seed(s), the same recovery).",
        "",
    ])  # fmt: skip


TABLES = {
    "nyuv2_budgets": budgets_table,
    "peers": peers_table,
    "fusion": fusion_table,
    "compensation": training_free_table,
    "value_fusion": merging_table,
}


def _picture(name: str, what: str) -> list[str]:
    """Return lines that show ``results/<name>.png``, if it was drawn."""
    return [f"![{what}](results/{name}.png)", ""] if (RESULTS / f"{name}.png").exists() else []


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
            target = f"{show['sense']} {show['target']:g}"
            lines.append(
                f"| {show['claim']} | {shown_value(show['value'])} | {target} "
                f"| {'yes' if show['ok'] else '**no**'} | `{suite['command']}` |"
            )
    lines += [
        "",
        *_picture("fusion", "Change of the tasks against MACs removed, rivals and rules"),
        "## Rules that fuse the tasks' scores",
        rules_table(suites["fusion"]),
        "",
        "## Less and more recovery",
        recoveries_table(suites["fusion"]),
        "",
        "## Every rival and part of the cut",
        parts_table(suites["fusion"]),
        "",
        *(
            ["## Peers, side by side", peers_table(suites["peers"], whole=True), ""]
            if "peers" in suites
            else []
        ),
        *_picture("overlap", "Overlap of what the tasks keep, by depth"),
        "## How many channels, and which",
        allocation_table(suites["compensation"]),
        *(
            [
                "## Starts from earlier cuts",
                starts_table(suites["vote_cifar"]),
                *_picture("vote_cifar", "Accuracy on unseen tasks against iterations and seconds"),
                *_picture("vote_overlap", "Overlap of what similar and other tasks keep, by depth"),
            ]
            if "vote_cifar" in suites
            else []
        ),
        "## Engines of cut networks",
        engines_table(suites["tensorrt"]),
        "",
        "## 2:4 sparsity after the cut",
        sparsity_table(suites["sparsity"]),
        "",
        *(
            ["## Instructions on an emulated Arm CPU", arm_table(suites["arm"]), ""]
            if "arm" in suites
            else []
        ),
        "Parents and their cards: `parents/`; trained by `train_parent.py`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
