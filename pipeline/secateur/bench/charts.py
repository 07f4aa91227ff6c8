"""Where the marks of the report's charts go; the page draws them as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 20, 44
BAR, STAGE_GAP, TALLEST, NAMES = 13, 9, 190, 96  # of the chart of layers, in SVG units
MOST_STAGES = 16
CLOSE = 6  # SVG units between marks that hide each other

Place = Callable[[float], float]


@dataclass(frozen=True)
class Tick:
    """A line of the grid; ``at`` in SVG units."""

    at: float
    label: str


@dataclass(frozen=True)
class Candidate:
    """A model: ``x`` is what it costs, ``y`` its ΔT, ``worst`` the worst task's change in percent.

    ``mark`` stands in its point, ``tip`` says everything in words.
    """

    x: float
    y: float
    worst: float
    mark: str
    tip: str
    parent: bool = False


@dataclass(frozen=True)
class Point:
    """Where one candidate lies, or several that would hide each other.

    ``worst`` is the height of the worst task of them all.
    """

    x: float
    y: float
    worst: float
    mark: str
    tip: str
    parent: bool

    @property
    def width(self) -> int:
        """Of the mark, in SVG units."""
        return 12 + 6 * len(self.mark)


@dataclass(frozen=True)
class Scatter:
    """Accuracy against one cost; ``front`` is the SVG path of the Pareto front."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    front: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Layer:
    """A group of channels: ``kept`` of ``width``; ``users`` is empty where it is not known."""

    name: str
    width: int
    kept: int
    users: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A layer's bar: the kept part below, the cut part on it; y and heights in SVG units."""

    x: float
    kept_y: float
    kept_height: float
    cut_y: float
    cut_height: float
    layer: Layer


@dataclass(frozen=True)
class Stage:
    """Bars that belong together: layers whose names begin alike."""

    name: str
    left: float
    right: float

    @property
    def label(self) -> str:
        """The last two parts of the name: what tells it from its neighbours."""
        return ".".join(self.name.split(".")[-2:])


@dataclass(frozen=True)
class Skyline:
    """All layers side by side in execution order."""

    bars: tuple[Bar, ...]
    stages: tuple[Stage, ...]
    ticks: tuple[Tick, ...]
    width: float
    height: float = TOP + TALLEST + NAMES
    left: int = LEFT
    floor: int = TOP + TALLEST
    bar: int = BAR - 3


def scatter(title: str, x_label: str, candidates: Sequence[Candidate]) -> Scatter:
    """Place candidates; at least one. The x axis begins at 0."""
    xs = _ticks(0, max(c.x for c in candidates) * 1.04)
    lowest = min(0.0, *(min(c.y, c.worst) for c in candidates))
    highest = max(0.0, *(max(c.y, c.worst) for c in candidates))
    pad = max(0.08 * (highest - lowest), 0.2)
    ys = _ticks(lowest - pad, highest + pad)

    def across(x: float) -> float:
        return round(LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(TOP + (ys[-1] - y) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM), 1)

    return Scatter(
        title=title,
        x_label=x_label,
        x_ticks=tuple(Tick(across(x), f"{x:g}") for x in xs),
        y_ticks=tuple(Tick(down(y), f"{y:g}".replace("-", "−")) for y in ys),
        points=tuple(
            Point(
                across(first.x),
                down(first.y),
                max(down(c.worst) for c in those),
                ",".join(c.mark for c in those),
                "\n\n".join(c.tip for c in those),
                first.parent,
            )
            for those in _coincident(candidates, across, down)
            for first in those[:1]
        ),
        front=" ".join(
            f"{'M' if i == 0 else 'L'}{across(c.x)},{down(c.y)}"
            for i, c in enumerate(pareto_front(candidates))
        ),
    )


def _coincident(
    candidates: Sequence[Candidate], across: Place, down: Place
) -> list[list[Candidate]]:
    """Put candidates together whose marks would lie on each other: one model on two devices."""
    found: list[list[Candidate]] = []
    for candidate in candidates:
        for those in found:
            near = max(abs(across(those[0].x) - across(candidate.x)),
                       abs(down(those[0].y) - down(candidate.y)))  # fmt: skip
            if near < CLOSE and those[0].parent == candidate.parent:
                those.append(candidate)
                break
        else:
            found.append([candidate])
    return found


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that none beats in both accuracy and cost, by rising cost."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.x, -c.y)):
        if not front or candidate.y > front[-1].y:
            front.append(candidate)
    return front


def skyline(layers: Sequence[Layer]) -> Skyline:
    """Place one bar per layer, those of a stage together; at least one layer."""
    names = _stage_names([layer.name for layer in layers])
    order = list(dict.fromkeys(names))
    ticks = _ticks(0, max(layer.width for layer in layers))
    unit = TALLEST / ticks[-1]
    floor, x = TOP + TALLEST, float(LEFT + 6)
    bars, stages = [], []
    for stage in order:
        left = x
        for layer in (layer for layer, name in zip(layers, names, strict=True) if name == stage):
            kept, cut = layer.kept * unit, (layer.width - layer.kept) * unit
            bars.append(
                Bar(x, round(floor - kept, 1), round(kept, 1), round(floor - kept - cut, 1),
                    round(cut, 1), layer)
            )  # fmt: skip
            x += BAR
        stages.append(Stage(stage, left, x - 3))
        x += STAGE_GAP
    return Skyline(
        bars=tuple(bars),
        stages=tuple(stages),
        ticks=tuple(Tick(round(floor - value * unit, 1), f"{value:g}") for value in ticks),
        width=x + 12,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that span from ``low`` to ``high``."""
    return [float(v) for v in MaxNLocator(nbins=5).tick_values(low, max(high, low + 1e-9))]


def _stage_names(layers: Sequence[str]) -> list[str]:
    """Return each layer's stage: its name cut at the deepest level with few enough of them."""
    parts = [layer.split("#")[0].split(".") for layer in layers]
    names = [path[0] for path in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        finer = [".".join(path[:depth]) for path in parts]
        if len(set(finer)) > MOST_STAGES:
            break
        names = finer
    return names
