"""One bundle as the report shows it: what the page needs, worked out from the manifest."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.bench.charts import Layer, Skyline, skyline
from secateur.bench.decisions import Decisions, decisions
from secateur.bench.record import BenchRecord, EnergyRow, NoEnergy
from secateur.bench.wording import (
    change,
    count,
    megabytes,
    memory_said,
    millijoules,
    milliseconds,
    number,
)
from secateur.core.errors import RecipeError
from secateur.core.task import Task
from secateur.metrics.kind import kind_of

COLOURS = 7  # of sets of tasks; the page's style has one more for "not known"


@dataclass(frozen=True)
class Picture:
    """A WebP picture of a bundle."""

    title: str
    data: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/webp;base64," + base64.b64encode(self.data).decode()


@dataclass(frozen=True)
class Entry:
    """A bundle: its folder's name below the report's, and what was read from it.

    ``manifest`` is validated, but its free parts (plan, host, latency) may hold anything.
    """

    path: str
    manifest: Mapping[str, Any]
    layers: tuple[Layer, ...]
    pictures: tuple[Picture, ...]
    bench: BenchRecord | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A cost before and after, as text, and the relative change in percent."""

    name: str
    before: str
    after: str
    change: float | None
    note: str = ""

    @property
    def share(self) -> float:
        """What is left, in percent of the parent, for a bar no longer than its track."""
        return 100.0 if self.change is None else min(max(100 + self.change, 0.0), 100.0)


@dataclass(frozen=True)
class MetricRow:
    """One metric of one task; ``range`` is the 95 % interval of ``shipped``, where known."""

    name: str
    better: str
    parent: float | None
    before_recovery: float | None
    pruned: float | None
    shipped: float | None
    range: tuple[float, float] | None


@dataclass(frozen=True)
class TaskRow:
    """One task's metrics, its change, and whether that is allowed (None: no limit was set)."""

    name: str
    kind: str
    metrics: tuple[MetricRow, ...]
    change: float | None
    max_drop: float | None
    too_low: bool
    worst: bool


@dataclass(frozen=True)
class UseRow:
    """The channels that one set of tasks uses: ``kept`` of ``width`` in ``layers`` groups."""

    users: str
    colour: int
    layers: int
    width: int
    kept: int


@dataclass(frozen=True)
class View:
    """A bundle on the page; ``index`` is its number there."""

    index: int
    entry: Entry

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest's content."""
        return self.entry.manifest

    @property
    def title(self) -> str:
        """Device and precision."""
        return f"{self.manifest['device']} · {self.manifest['precision']}"

    @property
    def delta_t(self) -> float | None:
        """ΔT in percent."""
        return number(self.manifest["accuracy"]["delta_t"])

    @property
    def delta_t_range(self) -> tuple[float, float] | None:
        """ΔT's 95 % interval; None where there are none."""
        found = self.manifest["accuracy"].get("intervals")
        return (found["delta_t"][0], found["delta_t"][1]) if found else None

    @property
    def worst_task(self) -> str:
        """The task that lost most."""
        return str(self.manifest["accuracy"]["worst_task"])

    @property
    def worst(self) -> float | None:
        """The worst task's change in percent."""
        return self.change_of(self.worst_task)

    def change_of(self, task: str) -> float | None:
        """Return a task's change in percent."""
        return number(self.manifest["accuracy"]["change_percent"].get(task))

    def latency(self, which: str, statistic: str = "median_ms") -> float | None:
        """Return the median milliseconds of "parent" or "cut", measured in turns by the build.

        Where the build's machine was of another kind, the cut's is that of ``bench.json``.
        """
        row = self.manifest["latency_ms"].get(which)
        if isinstance(row, Mapping):
            return number(row.get(statistic))
        if which == "cut" and self.entry.bench and "host_to_host" in self.entry.bench.latency:
            return number(getattr(self.entry.bench.latency["host_to_host"], statistic))
        return None

    @property
    def latencies(self) -> list[tuple[str, list[float | None]]]:
        """Rows of min, median, p90, p99, max, runs: of the build, then of ``bench.json``."""
        named = {"parent": "parent", "cut": "this bundle", "cut_fp32": "this bundle in fp32"}
        rows = [
            (named.get(name, name), row)
            for name, row in self.manifest["latency_ms"].items()
            if isinstance(row, Mapping)
        ]
        if self.entry.bench:
            where = f"bench, {self.entry.bench.runtime}, {self.entry.bench.threads} threads"
            for name, found in self.entry.bench.latency.items():
                rows.append((f"{name.replace('_', ' ')} ({where})", found.model_dump()))
        return [(name + ", noisy" * (row.get("noisy") is True), _statistics(row))
                for name, row in rows]  # fmt: skip

    @property
    def bench_said(self) -> list[str]:
        """Sentences on what ``bench.json`` has beside latencies and energy."""
        bench, said = self.entry.bench, list[str]()
        if bench is None:
            return said
        for name, row in bench.latency.items():
            said += [f"Bench, {name.replace('_', ' ')}: {remark}." for remark in row.remarks]
        if bench.offline:
            noisy = ", noisy" * bench.offline.latency.noisy
            said.append(f"Offline: {bench.offline.images_per_s:.4g} images a second, "
                        f"{bench.offline.batch} at a time{noisy}.")  # fmt: skip
        if bench.memory_mb:
            said.append(f"Memory: {memory_said(bench.memory_mb.model_dump())}.")
        return said

    @property
    def energy(self) -> EnergyRow | None:
        """What one inference takes, where ``bench.json`` tells."""
        found = self.entry.bench.energy if self.entry.bench else None
        return found if isinstance(found, EnergyRow) else None

    @property
    def energy_said(self) -> str:
        """The energy in a sentence, or why there is none."""
        found = self.entry.bench.energy if self.entry.bench else None
        if isinstance(found, NoEnergy):
            return f"not measurable on the machine that was benched: {found.not_measurable}"
        if found is None:
            return "not known: secateur bench measures it, where the machine has a meter"
        noise = ", within this meter's noise" if found.within_noise else ""
        return (
            f"{millijoules(found.per_inference_mj)} ± {found.standard_error_mj:.2g} per inference "
            f"above idle{noise} (standard error of {found.rounds} rounds; {found.source}; idle "
            f"{found.idle_w:.3g} W, busy {found.busy_w:.3g} W)"
        )

    @property
    def noisy(self) -> bool:
        """Whether the latency that is shown varied by more than the protocol allows."""
        rows = [row for row in self.manifest["latency_ms"].values() if isinstance(row, Mapping)]
        bench = self.entry.bench
        if not rows and bench and "host_to_host" in bench.latency:
            return bench.latency["host_to_host"].noisy
        return any(row.get("noisy") is True for row in rows)

    @property
    def tiles(self) -> list[Tile]:
        """What it cost before and costs now."""
        before, after = self.manifest["cost_parent"], self.manifest["cost"]
        rows = [
            ("MACs", before["macs"], after["macs"], count, ""),
            ("Parameters", before["params"], after["params"], count, ""),
            ("Size of the ONNX", before["onnx_bytes"], after["onnx_bytes"], megabytes, ""),
        ]
        if self.latency("cut") is not None:
            threads = self.manifest["threads"]
            note = f"median, {threads} thread{'s' * (threads != 1)}{', noisy' * self.noisy}"
            rows.append(
                ("Latency", self.latency("parent"), self.latency("cut"), milliseconds, note)
            )
        if self.energy is not None:
            note = (
                f"above idle, {self.energy.meter}{', within its noise' * self.energy.within_noise}"
            )
            rows.append(("Energy", None, self.energy.per_inference_mj, millijoules, note))
        return [Tile(n, say(a), say(b), change(a, b), note) for n, a, b, say, note in rows]

    @cached_property
    def tasks(self) -> list[TaskRow]:
        """Every task with every metric: parent, cut, shipped."""
        accuracy = self.manifest["accuracy"]
        rows = []
        for task in self.manifest["tasks"]:
            name = task["name"]
            higher = _higher_is_better(task)
            of = {key: (accuracy.get(key) or {}).get(name, {})
                  for key in ("parent", "before_recovery", "pruned", "shipped")}  # fmt: skip
            ranges = ((accuracy.get("intervals") or {}).get("metrics") or {}).get(name, {})
            metrics = tuple(
                MetricRow(
                    name=metric,
                    better=higher.get(metric, ""),
                    parent=number(of["parent"].get(metric)),
                    before_recovery=number(of["before_recovery"].get(metric)),
                    pruned=number(of["pruned"].get(metric)),
                    shipped=number(of["shipped"].get(metric)),
                    range=ranges.get(metric),
                )
                for metric in of["shipped"]
            )
            rows.append(
                TaskRow(name, task["kind"], metrics, self.change_of(name), task["max_drop"],
                        name in accuracy["too_low"], name == self.worst_task)
            )  # fmt: skip
        return rows

    @property
    def has_pruned(self) -> bool:
        """Whether it ships in a lower precision, and the cut in fp32 was evaluated too."""
        return bool(self.manifest["accuracy"].get("pruned"))

    @property
    def verdict(self) -> str:
        """Return "damaged", "too low", "good" or "no limits"."""
        if self.entry.problems:
            return "damaged"
        if self.manifest["accuracy"]["too_low"]:
            return "too low"
        limits = [task["max_drop"] for task in self.manifest["tasks"]]
        return "good" if any(limit is not None for limit in limits) else "no limits"

    def users_of(self, layer: Layer) -> str:
        """Say who uses a layer."""
        if not layer.users:
            return "not known"
        if len(layer.users) == len(self.manifest["tasks"]) > 1:
            return "all tasks"
        return ", ".join(layer.users)

    @cached_property
    def colours(self) -> dict[str, int]:
        """A colour for each set of tasks: 0 for all, then the larger sets first."""
        sets = {self.users_of(layer): len(layer.users) for layer in self.entry.layers}
        ranked = sorted(sets.keys() - {"all tasks", "not known"}, key=lambda s: (-sets[s], s))
        return {
            "all tasks": 0,
            "not known": COLOURS,
            **{users: 1 + i % (COLOURS - 1) for i, users in enumerate(ranked)},
        }

    @cached_property
    def use(self) -> list[UseRow]:
        """Channels by who uses them; those all tasks use first."""
        grouped: dict[str, list[Layer]] = {users: [] for users in self.colours}
        for layer in self.entry.layers:
            grouped[self.users_of(layer)].append(layer)
        return [
            UseRow(users, self.colours[users], len(layers), sum(layer.width for layer in layers),
                   sum(layer.kept for layer in layers))
            for users, layers in grouped.items() if layers
        ]  # fmt: skip

    @cached_property
    def skyline(self) -> Skyline | None:
        """The chart of layers, where the plan is known."""
        return skyline(self.entry.layers) if self.entry.layers else None

    @property
    def lost(self) -> list[tuple[str, float]]:
        """Per task, the share of its importance that went, in percent."""
        shares = self.manifest["plan"].get("lost")
        pairs = shares.items() if isinstance(shares, Mapping) else ()
        return [(str(t), 100 * v) for t, s in pairs if (v := number(s)) is not None]

    @property
    def plan(self) -> list[tuple[str, str]]:
        """What was decided, but for what is drawn elsewhere."""
        facts = {k: v for k, v in self.manifest["plan"].items() if k not in ("lost", "cuts")}
        return _facts(facts)

    @property
    def decisions(self) -> Decisions | None:
        """What was decided about precisions."""
        return decisions(self.manifest)

    @property
    def made_from(self) -> list[tuple[str, str]]:
        """Parent, data and machine."""
        data = {k: v for k, v in self.manifest["data"].items() if k != "eval_root"}
        return [
            *_facts({f"parent {k}": v for k, v in self.manifest["parent"].items()}),
            *_facts({f"{k} data": v for k, v in data.items()}),
            *_facts(self.manifest["host"]),
        ]

    @property
    def again(self) -> str:
        """The command that makes it again."""
        recorded = str(self.manifest["command"]).strip()
        if recorded and recorded != "secateur":
            return recorded
        recipe = shlex.quote(f"{self.entry.path}/recipe.yaml")
        return f"secateur build {recipe} --target {shlex.quote(self.manifest['device'])}"


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _text(v)) for name, v in values.items() if v is not None]


def _statistics(row: Mapping[str, Any]) -> list[float | None]:
    percentiles = row.get("percentiles_ms")
    parts = percentiles if isinstance(percentiles, Mapping) else {}
    return [
        *(number(row.get(name)) for name in ("min_ms", "median_ms")),
        *(number(parts.get(name)) for name in ("p90", "p99")),
        *(number(row.get(name)) for name in ("max_ms", "runs")),
    ]


def _higher_is_better(task: Mapping[str, Any]) -> dict[str, str]:
    """Return an arrow per metric; none for a kind that is not known here."""
    noun = Task(task["name"], task["name"], task["kind"], task["name"], task["classes"])
    try:
        higher = kind_of(noun).higher_is_better
    except RecipeError:
        return {}
    return {metric: "↑" if up else "↓" for metric, up in higher.items()}
