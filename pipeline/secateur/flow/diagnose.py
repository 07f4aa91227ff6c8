"""Why a bundle is worse than its model: preprocessing, overflow, kernels, and which nodes.

Nodes are judged by writing the ONNX again with other precisions, never by marking outputs, which
would change what a runtime fuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.bench.accuracy import evaluate
from secateur.bundle.manifest import Manifest, Metrics
from secateur.bundle.read import check_files, read_bundle
from secateur.bundle.write import FP32_FILE, QUANT_FILE
from secateur.core.errors import BundleError, CalibrationError, DataError, RecipeError
from secateur.core.progress import hidden, track
from secateur.data.loading import image_batch, spread
from secateur.data.sample import Reader
from secateur.flow.ncnn import NCNN
from secateur.flow.predict import bundle_session, predictor
from secateur.flow.recipe import Recipe, parse_recipe
from secateur.flow.trials import Trials, noise_power
from secateur.flow.usual_inputs import better_input
from secateur.flow.verify import eval_data, higher_is_better, own_input
from secateur.lower.quant import (
    CalibrationTable,
    Dialect,
    Precision,
    QuantPlan,
    dialect_named,
    find_units,
    node_modules,
    observe,
    overflowing,
    plan_assigned,
)
from secateur.lower.quant.bisect import Culprit, bisect_noise
from secateur.lower.reference import find_disagreements
from secateur.metrics.delta import delta
from secateur.runtimes.base import runtime_of

Kind = Literal["preprocessing", "kernel", "overflow", "precision"]
# Error power over variance up to which a runtime rounds as it may.
MAY_DIFFER: Mapping[str, float] = {"fp32": 1e-6, "fp16": 1e-4, "int8": 1e-2}
DISTANCE_IMAGES = 4
NO_LOSS = 0.05  # percent: less is no difference
JUDGED = 5  # culprits whose cost is measured in the task's own metrics


@dataclass(frozen=True)
class Finding:
    """``cost_percent``: the change of ``task`` when the ``nodes`` alone are as they ship."""

    kind: Kind
    message: str
    task: str = ""
    nodes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    cost_percent: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was found, the worst first, and what could not be looked at.

    ``change_percent`` is the shipped precision against fp32, per task, when it was built.
    ``faulty``: something is wrong, beyond what a lower precision costs.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]
    change_percent: Mapping[str, float]
    too_low: tuple[str, ...]
    evaluations: int

    @property
    def faulty(self) -> bool:
        """Say whether this bundle should not be used as it is."""
        return bool(self.too_low) or any(f.kind != "precision" for f in self.findings)


def diagnose(folder: Path, *, limit: int | None = 128) -> Diagnosis:
    """Look for what makes a bundle worse than the model it was made from.

    ``limit``: evaluation images that costs are measured on.

    Raises:
        BundleError: it cannot be read.
        VerifyError: a file of it was altered.
    """
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    if manifest.runtime == NCNN:
        raise BundleError(
            f"{folder} runs on ncnn, and only ONNX files can be taken apart",
            hint="build it with runtime: onnxruntime; `secateur verify` compares its outputs",
        )
    recipe = parse_recipe(manifest.recipe, folder / "recipe.yaml", unset=True)
    findings = [*_preprocessing(manifest, recipe), *_kernels(folder, manifest)]
    skipped, evaluations = [], 0
    reader = None
    try:
        _, reader = eval_data(folder, manifest)
    except (DataError, RecipeError) as error:
        skipped.append(f"costs in the tasks' own metrics: {error}")
    if reader is not None:
        findings += _usual_inputs(folder, manifest, recipe, reader, limit)
    if manifest.precision != "fp32":
        suspect = _Suspect(folder, manifest, recipe, reader, limit)
        try:
            findings += suspect.overflows()
        except CalibrationError as error:  # black frames are no fault of the bundle's
            skipped.append(f"results beyond fp16: {error.message}")
        costs, evaluations = suspect.culprits()
        findings += costs
    return Diagnosis(
        tuple(findings), tuple(skipped), _change(manifest), manifest.accuracy.too_low, evaluations
    )


def _change(manifest: Manifest) -> dict[str, float]:
    accuracy = manifest.accuracy
    before = accuracy.pruned or accuracy.shipped
    return dict(delta(before, accuracy.shipped, higher_is_better(manifest)).per_task)


def _preprocessing(manifest: Manifest, recipe: Recipe) -> list[Finding]:
    """Compare what the runner does to an image with what the model was trained on."""
    trained, runs = recipe.model.input.model_input(), manifest.input
    fields = ("channels", "height", "width", "mean", "std", "layout")
    return [
        Finding("preprocessing", f"the runner prepares images with {name} {getattr(runs, name)}, "
                f"the model was trained with {getattr(trained, name)}")
        for name in fields
        if getattr(runs, name) != getattr(trained, name)
    ]  # fmt: skip


def _usual_inputs(
    folder: Path, manifest: Manifest, recipe: Recipe, reader: Reader, limit: int | None
) -> list[Finding]:
    """Prepare images in other usual ways: no model is better with what it never saw."""
    session = bundle_session(folder, manifest)
    spec = recipe.model.input.model_input()
    better = better_input(predictor(session), recipe.kept_tasks(), reader, spec, limit)
    if better is None:
        return []
    said = (
        f"with {better.how} the tasks are {better.gain:.1f} % better: model.input's "
        f"{better.fields} in the recipe, or how the images are read, may not be what the model was "
        "trained with"
    )
    return [Finding("preprocessing", said)]


def _kernels(folder: Path, manifest: Manifest) -> list[Finding]:
    """Compare the runtime with onnx's reference evaluator on the bundle's own image."""
    image = own_input(folder, manifest)
    runtime = runtime_of(manifest.runtime)

    def run(path: Path) -> Mapping[str, NDArray[np.float32]]:
        return runtime.open_session(path, manifest.threads).run(image)

    model = folder / "model.onnx"
    off = find_disagreements(model, image, run, noise_power, MAY_DIFFER[manifest.precision])
    return [
        Finding("kernel", f"{runtime.version()} leaves the ONNX reference by "
                f"{found.difference:.1e} of the output's variance", found.task,
                (found.node,), (node_modules(model)[found.node],))
        for found in off
    ]  # fmt: skip


class _Suspect:
    """A bundle in a lower precision, and the fp32 model it was made from."""

    def __init__(
        self, folder: Path, manifest: Manifest, recipe: Recipe, reader: Reader | None,
        limit: int | None,
    ) -> None:  # fmt: skip
        self.recipe, self.reader, self.limit = recipe, reader, limit
        self.higher = higher_is_better(manifest)
        self.plan, dialect = _read_plan(folder)
        self.model = folder / FP32_FILE
        runtime = runtime_of(manifest.runtime)
        self.trials = Trials(self.model, dialect, runtime, manifest.threads)
        self.modules = node_modules(self.model)
        if reader is None:
            self.images = own_input(folder, manifest)
        else:
            spec = recipe.model.input.model_input()
            self.images = image_batch(reader, spread(reader, DISTANCE_IMAGES), spec).numpy()

    def overflows(self) -> list[Finding]:
        """Return the nodes in fp16 whose results are beyond its largest number.

        Raises:
            CalibrationError: the images are fewer than two, or say nothing.
        """
        half = "fp16" in {self.plan.carrier, *self.plan.precisions.values()}
        if not half:
            return []
        seen = observe(self.model, lambda: [self.images]).tensors
        peaks = {name: max(-found.lowest, found.highest)
                 for name, found in seen.items() if found.bounded}  # fmt: skip
        return [
            Finding("overflow", f"reaches {peak:.3g}, fp16 ends at 65504", nodes=(node,),
                    modules=(self.modules[node],))
            for node, peak in overflowing(self.model, self.plan, peaks).items()
        ]  # fmt: skip

    def culprits(self) -> tuple[list[Finding], int]:
        """Return what the loudest nodes cost, and how many forms of the model were run."""
        units = [unit.name for unit in find_units(self.model, self.plan)]
        reference = self.trials.reference(self.images)

        def noise(nodes: Sequence[str]) -> Mapping[str, float]:
            return self.trials.noise(self._only(nodes), reference)

        found = bisect_noise(units, noise)
        judged = found.culprits[:JUDGED]
        exact = self._metrics(self.model) if self.reader is not None else None
        titled = track(judged, "what each node costs", len(judged))
        findings = [self._finding(culprit, exact) for culprit in titled]
        return sorted(findings, key=_loss, reverse=True), found.evaluations + len(judged)

    def _finding(self, culprit: Culprit, exact: Metrics | None) -> Finding:
        task, cost = culprit.task, None
        said = f"{culprit.share:.0%} of the whole error of '{task}'"
        if exact is not None:
            with self.trials.written(self._only(culprit.nodes)) as path:
                lost = delta(exact, self._metrics(path), self.higher).per_task
            # The task that loses most is what a user meets; the loudest may bear its noise.
            worst = min(lost, key=lambda name: lost[name])
            task = worst if lost[worst] < lost[culprit.task] - NO_LOSS else culprit.task
            cost = lost[task]
        modules = tuple(dict.fromkeys(self.modules[node] for node in culprit.nodes))
        return Finding("precision", said, task, culprit.nodes, modules, cost)

    def _metrics(self, path: Path) -> Metrics:
        if self.reader is None:
            raise DataError("there are no evaluation data", hint="point the recipe at them")
        session = self.trials.runtime.open_session(path, self.trials.threads)
        tasks = self.recipe.kept_tasks()
        spec = self.recipe.model.input.model_input()
        with hidden():
            return evaluate(predictor(session), tasks, self.reader, spec, limit=self.limit)

    def _only(self, nodes: Sequence[str]) -> QuantPlan:
        """Return the bundle's plan with all other nodes in fp32."""
        precisions: dict[str, Precision] = dict.fromkeys(self.modules, "fp32")
        precisions.update({node: self.plan.precisions[node] for node in nodes})
        part = plan_assigned(self.model, _table_of(self.plan), precisions, {}, self.plan.carrier)
        return replace(part, shifts=self.plan.shifts)


def _loss(finding: Finding) -> float:
    return -(finding.cost_percent or 0.0)


def _read_plan(folder: Path) -> tuple[QuantPlan, Dialect]:
    """Read what the bundle says of its own making.

    Raises:
        BundleError: the file has another form.
    """
    try:
        stored = json.loads((folder / QUANT_FILE).read_text(encoding="utf-8"))
        return QuantPlan.from_json(stored["plan"]), dialect_named(**stored["dialect"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{folder / QUANT_FILE} cannot be read: {error!r}", hint="build the bundle again"
        ) from error


def _table_of(plan: QuantPlan) -> CalibrationTable:
    """Return a table of the ranges that a plan uses; parts of the plan need no others.

    Its rule and its images are left open: ranges are all that is read.
    """
    return CalibrationTable(plan.model, "minmax", 0, "", plan.ranges)
