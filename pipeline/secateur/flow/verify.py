"""Check a finished bundle: its bytes, its outputs and every task's accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.bench.accuracy import MOST_UNITS, Scores, Sums, metrics_of, score
from secateur.bench.intervals import Intervals, bootstrap
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, read_bundle
from secateur.bundle.runner import preprocess
from secateur.bundle.write import CHECK_FILE, PARENT_FILE
from secateur.core.errors import BuildError, DataError, RecipeError, VerifyError
from secateur.core.task import Task
from secateur.data.loading import open_reader
from secateur.data.sample import Reader
from secateur.flow.ncnn import NCNN
from secateur.flow.predict import bundle_session, predictor
from secateur.flow.recipe import Recipe, parse_recipe
from secateur.lower import Parity, compare_outputs
from secateur.metrics.delta import Delta, delta
from secateur.metrics.kind import kind_of
from secateur.runtimes.base import Session

PARITY_TOLERANCE = 1e-3  # of each output's range; other CPUs add in another order
# Of each output's largest value: a CPU with fp16 arithmetic computes in it under ncnn, and rounds
# by sizes, not by ranges; the machine that built it perhaps did not.
NCNN_FP16 = 2e-2  # 3e-3 was seen of a trained network, 1.5e-2 of a random one
ROUNDING = 2  # times what a lower precision was off when it was built: other CPUs round otherwise


@dataclass(frozen=True)
class VerifyResult:
    """``accuracy`` is None, with the reason, where it was not judged or no data are at hand.

    ``device`` is where the bundle ran, ``split`` on what ("654 images of split 'test', nyuv2");
    of a few images only there are no ``intervals``. ``partial``: not all images were looked at, so
    no task was held to its ``max_drop``. ``failed`` says of each task that lost more how much.
    """

    device: str
    parity: Mapping[str, Parity]
    accuracy: Mapping[str, Mapping[str, float]] | None
    change: Delta | None
    intervals: Intervals | None
    skipped: str
    split: str = ""
    partial: bool = False
    failed: tuple[str, ...] = ()


def verify(folder: Path, *, limit: int | None = None, accuracy: bool = True) -> VerifyResult:
    """Verify a bundle on this machine; without ``accuracy`` its files and outputs alone.

    Raises:
        BundleError: it cannot be read.
        VerifyError: a file was altered, outputs differ, or the build missed a budget.
    """
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    session = bundle_session(folder, manifest)
    parity = check_parity(folder, manifest, session)
    if not accuracy:
        check_budgets(manifest)
        return unjudged("local", parity)
    return judged(folder, manifest, "local", parity, lambda *_: session, limit)


def unjudged(
    device: str, parity: Mapping[str, Parity], why: str = "none was asked for"
) -> VerifyResult:
    """Return what is known of a bundle whose accuracy nobody looked at."""
    return VerifyResult(device, parity, None, None, None, f"accuracy not checked: {why}")


def judged(
    folder: Path,
    manifest: Manifest,
    device: str,
    parity: Mapping[str, Parity],
    open_session: Callable[[Recipe, Reader], Session],
    limit: int | None,
) -> VerifyResult:
    """Evaluate what runs on ``device`` and compare it with what the bundle may lose.

    ``open_session`` is given the data, which the session is then shown in order.

    Raises:
        VerifyError: an output is not a number, or the build missed a budget.
    """
    check_budgets(manifest)
    try:
        recipe, reader = eval_data(folder, manifest)
        tasks = recipe.kept_tasks()
        predict, spec = predictor(open_session(recipe, reader)), recipe.model.input.model_input()
        scores = score(predict, tasks, reader, spec, limit=limit, per_image=True)
        _check_judged(scores, device)
    except (DataError, RecipeError) as error:
        return unjudged(device, parity, str(error))
    shown = len(reader) if limit is None else min(limit, len(reader))
    partial = shown < len(reader)  # which says too little to fail a bundle
    parent = _parent(folder, manifest, tasks, scores.sums, part=partial)
    intervals = bootstrap(tasks, scores, parent)
    change = delta(parent.metrics, scores.metrics, higher_is_better(manifest))
    said = f"{shown} images of split '{recipe.data.eval.split}', {recipe.data.eval.reader}"
    failed = () if partial else _too_low(manifest, change)
    return VerifyResult(
        device, parity, scores.metrics, change, intervals, "", said, partial, failed
    )


def _check_judged(scores: Scores, device: str) -> None:
    """Raise where an average would hide what is wrong.

    Raises:
        VerifyError: an output is not a number.
        DataError: nothing tells how good a task is.
    """
    for task, images in scores.wrong.items():
        raise VerifyError(
            f"task '{task}' gives NaN ({device}), in {images} image(s)",
            hint="run `secateur diagnose`; if the fp32 bundle is right, keep that task's layers in "
            "fp32",
        )
    for task in scores.unlabelled:
        raise DataError(
            f"no image that was evaluated has a label for task '{task}'",
            hint="give data.eval images with labels of every kept task, or a larger --limit",
        )


def _parent(
    folder: Path, manifest: Manifest, tasks: Sequence[Task], ours: Sums, *, part: bool
) -> Scores:
    """Return the parent's accuracy, and each image's part in it where that is known.

    Of a ``part`` of the images it is that of the same first ones.
    """
    whole = Scores(manifest.accuracy.parent)
    if PARENT_FILE not in manifest.files:  # of an older version
        return whole
    with np.load(folder / PARENT_FILE, allow_pickle=False) as stored:
        found = {task: stored[task] for task in ours if task in stored}
    if found.keys() != ours.keys():
        return whole
    if part and all(len(rows) < MOST_UNITS for rows in found.values()):  # a row is an image
        found = {task: rows[: len(ours[task])] for task, rows in found.items()}
        measured = metrics_of(tasks, found)
        if not all(all(row.values()) for row in measured.values()):
            return whole  # a change relative to 0 says nothing
        whole = Scores(measured)
    same = {task: rows.shape for task, rows in found.items()}
    alike = same == {task: rows.shape for task, rows in ours.items()}
    return Scores(whole.metrics, found) if alike else whole


def own_image(folder: Path) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) RGB that the bundle was checked with."""
    with np.load(folder / CHECK_FILE, allow_pickle=False) as stored:
        return np.asarray(stored["image"], dtype=np.uint8)


def own_input(folder: Path, manifest: Manifest) -> NDArray[np.float32]:
    """Return the same as the network takes it, (1, C, H, W)."""
    return np.asarray(preprocess(own_image(folder), manifest.input.model_dump()), np.float32)


def own_outputs(folder: Path, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Return what the torch network made of that image when the bundle was built."""
    with np.load(folder / CHECK_FILE, allow_pickle=False) as stored:
        return {task.name: stored[f"output/{task.name}"] for task in manifest.tasks}


def check_parity(folder: Path, manifest: Manifest, session: Session) -> dict[str, Parity]:
    """Compare what a session makes of the bundle's own image with what torch made of it.

    Raises:
        VerifyError: a task differs by more than another CPU may.
    """
    wanted = own_outputs(folder, manifest)
    outputs = session.run(own_input(folder, manifest))
    try:
        if manifest.precision == "fp32":
            return compare_outputs(wanted, outputs, tolerance=PARITY_TOLERANCE)
        parity = compare_outputs(wanted, outputs)
    except BuildError as error:
        raise VerifyError(
            error.message, hint="this runtime does not reproduce the model"
        ) from error
    for task, found in parity.items():
        allowed = ROUNDING * manifest.parity[task]["max_abs_difference"]
        slack = PARITY_TOLERANCE * found.output_range
        if manifest.runtime == NCNN:
            slack = NCNN_FP16 * float(np.abs(wanted[task]).max())
        if not found.max_abs_difference <= allowed + slack:
            raise VerifyError(
                f"task '{task}' is off by {found.max_abs_difference:.3g} from fp32, "
                f"{allowed / ROUNDING:.3g} when it was built",
                hint="this runtime rounds otherwise than the one it was built with; try "
                "`secateur diagnose`",
            )
    return parity


def eval_data(folder: Path, manifest: Manifest) -> tuple[Recipe, Reader]:
    """Return the bundle's recipe and the evaluation data it was built with.

    Raises:
        DataError, RecipeError: they are not at hand, or not the same any more.
    """
    recipe = parse_recipe(manifest.recipe, folder / "recipe.yaml")
    spec = recipe.data.eval
    root = Path(manifest.data["eval_root"])
    if not root.exists():  # the bundle has moved to a machine with data of its own
        root = recipe.data_root(spec)
    reader = open_reader(spec.reader, root, spec.split, **spec.options)
    if reader.fingerprint != manifest.data["eval"]:
        raise DataError(
            "the evaluation data are not those of the build", hint="point the recipe at the same"
        )
    return recipe, reader


def higher_is_better(manifest: Manifest) -> dict[str, Mapping[str, bool]]:
    """Return, per task and metric, whether higher is better."""
    return {
        t.name: kind_of(
            Task(t.name, t.name, t.kind, t.name, t.classes, t.ignore_index)
        ).higher_is_better
        for t in manifest.tasks
    }


def check_budgets(manifest: Manifest) -> None:
    """Raise VerifyError where the build missed a budget."""
    for name, budget in manifest.budgets.items():
        if budget.met is False:
            shipped = "unknown" if budget.shipped is None else f"{budget.shipped:.4g}"
            raise VerifyError(
                f"the bundle missed its budget {name} when it was built: {shipped} "
                f"{budget.unit}, wanted at {budget.sense} {budget.wanted:g}",
                hint="build it again, while nothing else runs, or raise the budget",
            )


def _too_low(manifest: Manifest, change: Delta) -> tuple[str, ...]:
    drops = {task.name: -change.per_task[task.name] for task in manifest.tasks}
    return tuple(
        f"task '{task.name}' lost {drops[task.name]:.2f} % against the parent, allowed "
        f"{task.max_drop:g} %"
        for task in manifest.tasks
        if task.max_drop is not None and not drops[task.name] <= task.max_drop
    )
