"""The manifest: what the bundle is, what it needs, how good it is and how to make it again."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
Metrics = dict[str, dict[str, float]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputContract(_Strict):
    """An RGB image is resized to (height, width), scaled to 0..1, then ``(x - mean) / std``."""

    name: str
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str


class TaskContract(_Strict):
    """One output of the model; ``shape`` is that of one image."""

    name: str
    kind: str
    classes: int | None
    ignore_index: int
    max_drop: float | None
    shape: tuple[int, ...]


class FileRecord(_Strict):
    """A file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int


Interval = tuple[float, float]


class AccuracyIntervals(_Strict):
    """95 % intervals (low, high) of the shipped model, images being drawn with replacement.

    ``paired``: the parent was drawn alike, so that what is hard for both cancels.
    """

    metrics: dict[str, dict[str, Interval]]
    change_percent: dict[str, Interval]
    delta_t: Interval
    paired: bool


class Accuracy(_Strict):
    """Per task and metric: the parent, the cut before recovery, and the model as shipped.

    ``pruned`` is the cut in fp32 where it ships in a lower precision, else None.
    ``change_percent`` is the shipped model against the parent, per task; its mean is ΔT.
    """

    images: int
    parent: Metrics
    before_recovery: Metrics
    pruned: Metrics | None = None
    shipped: Metrics
    change_percent: dict[str, float]
    delta_t: float
    delta_t_before_recovery: float
    worst_task: str
    too_low: tuple[str, ...] = ()
    intervals: AccuracyIntervals | None = None  # of too few images there are none


class Cost(_Strict):
    """What one inference costs and how large the model is."""

    macs: int
    params: int
    onnx_bytes: int


class BudgetRecord(_Strict):
    """One budget of the recipe; ``wanted`` is the most, or the least, of ``unit``.

    ``planned`` is what the plan spends: counted, or of milliseconds ``measured`` on the cut before
    its recovery, or predicted by a latency ``table`` of another machine; of instructions
    ``emulated``, or predicted by a ``table`` of them. ``shipped`` is what the
    bundle spends (its latency beside the parent's), None where it was not measured, and ``met``
    whether that is within what was wanted, None where that is not known.
    """

    wanted: float
    unit: str
    planned: float
    how: Literal["counted", "measured", "table", "emulated"]
    sense: Literal["most", "least"] = "most"
    shipped: float | None = None
    met: bool | None = None


class Manifest(_Strict):
    """``manifest.json``.

    Of ``parent``: its ``factory``; its ``fingerprint``, of code and weights; digests of the weights
    of the whole ``network`` and of its ``trunk``, which earlier cuts are found by; and the
    ``basis`` that the trunk's channels were counted in.
    """

    schema_version: int
    created: str
    device: str
    precision: str
    runtime: str
    threads: int
    input: InputContract
    tasks: tuple[TaskContract, ...]
    files: dict[str, FileRecord]
    parent: dict[str, str]
    data: dict[str, str]
    plan: dict[str, Any]
    cost_parent: Cost
    cost: Cost
    budgets: dict[str, BudgetRecord] = {}
    accuracy: Accuracy
    parity: dict[str, dict[str, float]]
    quantisation: dict[str, Any] | None = None  # what stayed in high precision, and why
    precision_choice: dict[str, Any] | None = None  # of mode auto
    latency_ms: dict[str, Any]
    seconds: dict[str, float]
    versions: dict[str, str]
    host: dict[str, Any]
    command: str
    recipe: str
