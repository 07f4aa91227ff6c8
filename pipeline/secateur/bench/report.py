"""One HTML page about bundles: complete in itself, and asking for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import jinja2

import secateur
from secateur.bench.bundle_view import Entry, View
from secateur.bench.charts import Candidate, Scatter, scatter
from secateur.bench.latency import NOISY_ABOVE
from secateur.bench.wording import (
    FILTERS,
    count,
    megabytes,
    millijoules,
    milliseconds,
    number,
    percent,
)

PAGE = Path(__file__).parent / "page"
Cost = Callable[[View, str], float | None]
Say = Callable[[object], str]


@dataclass(frozen=True)
class Family:
    """Bundles of one parent, for the same tasks, evaluated on the same images."""

    name: str
    views: tuple[View, ...]
    plots: tuple[Scatter, ...]

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return [str(task["name"]) for task in self.views[0].manifest["tasks"]]

    @property
    def parents_differ(self) -> list[str]:
        """Devices where the builds' own parents took unlike times, and which.

        A build times its parent beside its cut; that the parents differ says how far latencies
        of two builds can be compared.
        """
        found = []
        for device in dict.fromkeys(str(view.manifest["device"]) for view in self.views):
            here = [view for view in self.views if view.manifest["device"] == device]
            times = [t for view in here if (t := view.latency("parent")) is not None]
            if times and max(times) > (1 + NOISY_ABOVE) * min(times):
                span = f"{milliseconds(min(times))} to {milliseconds(max(times))}"
                found.append(f"{device}: {span}")
        return found

    @property
    def tells_energy(self) -> bool:
        """Whether any was measured."""
        return any(view.energy is not None for view in self.views)

    @property
    def parent(self) -> View:
        """Any of them tells the parent's costs."""
        return self.views[0]


def render(entries: Sequence[Entry], title: str, problems: Sequence[str] = ()) -> str:
    """Return the page about ``entries`` (at least one); ``problems`` are what is not among them.

    Whatever comes from files is escaped, and the page forbids the browser to run any script but
    its own or to load anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        title=title,
        families=_families(entries),
        problems=problems,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=secateur.__version__,
        style=(PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
    )


def _families(entries: Sequence[Entry]) -> list[Family]:
    grouped: dict[tuple[object, ...], list[View]] = {}
    for index, entry in enumerate(entries, 1):
        manifest = entry.manifest
        key = (
            manifest["parent"].get("fingerprint"),
            manifest["data"].get("eval"),
            tuple(task["name"] for task in manifest["tasks"]),
        )
        grouped.setdefault(key, []).append(View(index, entry))
    return [
        Family(_model_name(views[0]), tuple(views), tuple(_plots(views)))
        for views in grouped.values()
    ]


def _model_name(view: View) -> str:
    return str(view.manifest["parent"].get("factory", "model")).rpartition(":")[2]


def _plots(views: Sequence[View]) -> list[Scatter]:
    """Return accuracy against each cost; latencies only beside those of the same device.

    Energies only beside those of the same meter on the same device; none that are within its noise.
    """
    plots = [
        _plot("Accuracy against computation", "M MACs", views, _cost("macs"), count, 1e6),
        _plot("Accuracy against size", "MB of ONNX", views, _cost("onnx_bytes"), megabytes, 1e6),
    ]
    for device in dict.fromkeys(str(view.manifest["device"]) for view in views):
        here = [view for view in views if view.manifest["device"] == device]
        title = f"Accuracy against latency on {device}"
        plots.append(_plot(title, "ms, median", here, View.latency, milliseconds))
        for source in dict.fromkeys(v.energy.source for v in here if v.energy is not None):
            same = [v for v in here if v.energy is not None and v.energy.source == source]
            title = f"Accuracy against energy on {device} ({source})"
            plots.append(_plot(title, "mJ above idle, one inference", same, _energy, millijoules))
    return [plot for plot in plots if plot is not None]


def _cost(name: str) -> Cost:
    def read(view: View, which: str) -> float | None:
        return number(view.manifest["cost_parent" if which == "parent" else "cost"][name])

    return read


def _energy(view: View, which: str) -> float | None:
    """Return the bundle's energy; nobody has measured its parent's."""
    if which == "parent" or view.energy is None or view.energy.within_noise:
        return None
    return view.energy.per_inference_mj


def _plot(
    title: str, x_label: str, views: Sequence[View], cost: Cost, say: Say, unit: float = 1.0
) -> Scatter | None:
    found = []
    before = cost(views[0], "parent")
    if before is not None:
        tip = f"Parent, with the kept tasks only\n{say(before)}\nΔT 0"
        found.append(Candidate(before / unit, 0.0, 0.0, "P", tip, parent=True))
    for view in views:
        x, y, worst = cost(view, "cut"), view.delta_t, view.worst
        if x is not None and y is not None and worst is not None:
            tip = (
                f"{view.index}: {view.title}\n{view.entry.path}\n{say(x)}\nΔT {percent(y)}\n"
                f"worst task: {view.worst_task} {percent(worst)}"
            )
            found.append(Candidate(x / unit, y, worst, str(view.index), tip))
    return scatter(title, x_label, found) if any(not c.parent for c in found) else None
