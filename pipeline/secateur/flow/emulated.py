"""A bundle on emulated Arm CPUs: whether its own runner gives there what the runtime gives here."""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from secateur.bench.accuracy import evaluate
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, model_files, read_bundle, run_files
from secateur.bundle.runner import preprocess
from secateur.core.errors import BuildError, DataError, DeviceError, RecipeError, VerifyError
from secateur.core.progress import track
from secateur.data.loading import Subset, spread
from secateur.data.sample import Reader
from secateur.data.transforms import fit_sample
from secateur.devices.emulated import EmulatedConnection, pick_cpu
from secateur.devices.host import library_versions
from secateur.devices.isa import Int8Form, int8_form
from secateur.devices.target import load_target, target_names
from secateur.devices.userland import Userland, find_qemu, prepare_userland
from secateur.flow.cache import StageCache
from secateur.flow.predict import bundle_session, predictor
from secateur.flow.recipe import Recipe
from secateur.flow.verify import check_budgets, check_parity, eval_data, own_image
from secateur.lower import Parity, compare_outputs
from secateur.runtimes import onnxruntime
from secateur.runtimes.base import Session

FP32_TOLERANCE = 1e-4  # of each output's range, between this machine and the emulated one
SAME_CLASS = 0.99  # of decisions, for lower precisions: their rounding differs between CPUs
IMAGES = 16  # beside the bundle's own
# Without and with the dot product, small cores and large ones.
_USUAL = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")
_UNKNOWN = "cortex-a76"  # stands in for a device without a profile
_LARGEST_RESULT = 1 << 30  # bytes
PATIENCE = 1800.0  # seconds for a run of all images
_CLASSES = ("segmentation", "classification")

Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Agreement:
    """One task on an emulated CPU against this machine, over all images.

    ``equal`` is the share of values that are the same to the bit, ``same_class`` that of pixels or
    images with the same class (None where the task has no classes).
    """

    parity: Parity
    equal: float
    same_class: float | None


@dataclass(frozen=True)
class OnCpu:
    """A bundle on one CPU model; ``against_torch`` is of the bundle's own image."""

    cpu: str
    isa: tuple[str, ...]
    int8_form: Int8Form
    against_torch: Mapping[str, Parity]
    against_here: Mapping[str, Agreement]
    accuracy: Mapping[str, Mapping[str, float]] | None


@dataclass(frozen=True)
class EmulatedVerify:
    """``same_bits``: per task, whether all CPU models gave the same bits (None: there is one).

    ``accuracy_here`` is of the same images on this machine; where the data are not at hand it is
    None and ``skipped`` says why.
    """

    images: int
    runs: tuple[OnCpu, ...]
    same_bits: Mapping[str, bool] | None
    accuracy_here: Mapping[str, Mapping[str, float]] | None
    skipped: str


@dataclass(frozen=True)
class _Material:
    """What is shown to every CPU: images (H, W, 3) RGB, the bundle's own first; labels if any."""

    images: tuple[NDArray[np.uint8], ...]
    labelled: tuple[Recipe, Reader] | None
    skipped: str


class _Recorded:
    """A ``Session`` that gives outputs from before, by the image that they were made of."""

    def __init__(self, inputs: Sequence[NDArray[np.float32]], outputs: Sequence[Outputs]) -> None:
        self._found = {_key(each): made for each, made in zip(inputs, outputs, strict=True)}

    def run(self, images: NDArray[np.float32]) -> Outputs:
        rows = [self._found[_key(image[None])] for image in images]
        return {task: np.concatenate([row[task] for row in rows]) for task in rows[0]}


def _key(image: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def verify_emulated(
    folder: Path, cpus: Sequence[str] = (), *, limit: int = IMAGES
) -> EmulatedVerify:
    """Run the bundle's own ``run.py`` on emulated CPUs, as ``compare_emulated`` does, and judge it.

    The tasks' accuracy is told; so few images say too little to fail one by its ``max_drop``.

    Raises:
        BundleError, VerifyError: the bundle is not whole or missed a budget when it was built, or
            a task differs on a CPU.
        RuntimeMissing, DeviceError: no userland can be prepared, or the bundle does not run.
    """
    manifest = read_for_arm(folder)
    check_budgets(manifest)
    found = compare_emulated(folder, cpus, limit=limit)
    for run in found.runs:
        for task, agreement in run.against_here.items():
            _check_agreement(manifest, run.cpu, task, agreement)
    return found


def compare_emulated(
    folder: Path, cpus: Sequence[str] = (), *, limit: int = IMAGES
) -> EmulatedVerify:
    """Run the bundle's own ``run.py`` on emulated CPUs and compare task by task.

    Without ``cpus``, on the target's stand-in and on two CPUs with and two without dot product.
    ``limit`` is the number of evaluation images beside the one that the bundle holds; with 0 no
    data are looked for.

    Raises:
        BundleError, VerifyError: the bundle is not whole, or differs from torch on its own image.
        RuntimeMissing, DeviceError: no userland can be prepared, or the bundle does not run.
    """
    manifest = read_for_arm(folder)
    chosen = list(dict.fromkeys(cpus or (stand_in_of(manifest), *_USUAL)))
    userland = prepared_userland(manifest.runtime)
    for cpu in chosen:
        pick_cpu(userland.qemu, (cpu,))
    material = _material(folder, manifest, limit)
    inputs = [preprocess(image, manifest.input.model_dump()) for image in material.images]
    session = _session_here(folder, manifest)
    here: list[Outputs] = [dict(session.run(each)) for each in inputs]
    try:
        accuracy_here = _accuracy(material, _Recorded(inputs, here))
    except DataError as error:  # images without labels still compare
        material = replace(material, labelled=None, skipped=f"accuracy not checked: {error}")
        accuracy_here = None
    runs, everything = [], []
    for cpu in track(chosen, "running on emulated CPUs", len(chosen)):
        with EmulatedConnection(userland, cpu) as connection:
            isa = connection.cpu.isa
            outputs = _run(connection, folder, manifest, material.images)
        recorded = _Recorded(inputs, outputs)
        against_here = {
            task.name: _agreement(task.name, task.kind, here, outputs, cpu)
            for task in manifest.tasks
        }
        runs.append(
            OnCpu(cpu, tuple(sorted(isa)), int8_form(isa), check_parity(folder, manifest, recorded),
                  against_here, _accuracy(material, recorded))
        )  # fmt: skip
        everything.append(outputs)
    return EmulatedVerify(
        images=len(material.images),
        runs=tuple(runs),
        same_bits=_same_bits(everything) if len(everything) > 1 else None,
        accuracy_here=accuracy_here,
        skipped=material.skipped,
    )


def _session_here(folder: Path, manifest: Manifest) -> Session:
    """Open a bundle on this machine, to compute what an Arm CPU does."""
    if manifest.runtime != "onnxruntime":
        return bundle_session(folder, manifest, 1)
    return onnxruntime.open_session(folder / model_files(manifest)[0], 1, as_on_arm=True)


def prepared_userland(runtime: str = "onnxruntime") -> Userland:
    """Return the userland that has this machine's releases of what a bundle's runner needs."""
    found = library_versions()
    wheels = ["numpy>=1.26,<3"]  # any: the userland's Python may be older than this one
    wheels += [
        f"{name}=={found[name]}" if name in found else name
        for name in ("opencv-python-headless", runtime)
    ]
    return prepare_userland(StageCache().root / "userland", wheels)


def read_for_arm(folder: Path) -> Manifest:
    """Return the manifest of a whole bundle that is for an aarch64 target.

    Raises:
        BundleError, VerifyError: the bundle is not whole.
        DeviceError: it is for another architecture.
    """
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    if manifest.device in target_names():
        target = load_target(manifest.device)
        if target.arch != "aarch64":
            able = [name for name in target_names() if load_target(name).stand_in]
            raise DeviceError(
                f"the bundle is for {target.name} ({target.arch}), the emulated device is aarch64",
                hint=f"build it with --target {' or '.join(able)}",
            )
    return manifest


def stand_in_of(manifest: Manifest) -> str:
    """Return the CPU model that stands in for the bundle's target."""
    known = manifest.device in target_names()
    stand_in = load_target(manifest.device).stand_in if known else None
    return pick_cpu(find_qemu(), stand_in.qemu_cpus if stand_in else (_UNKNOWN,))


def _material(folder: Path, manifest: Manifest, limit: int) -> _Material:
    own = own_image(folder)
    if not limit:
        return _Material((own,), None, "accuracy not checked: none was asked for")
    try:
        recipe, reader = eval_data(folder, manifest)
    except (DataError, RecipeError) as error:
        return _Material((own,), None, f"only the bundle's own image was run: {error}")
    subset = Subset(reader, spread(reader, limit))
    spec, tasks = recipe.model.input.model_input(), recipe.all_tasks()
    images = [fit_sample(subset[index], spec, tasks).image for index in range(len(subset))]
    return _Material((own, *images), (recipe, subset), "")


def _run(
    connection: EmulatedConnection,
    folder: Path,
    manifest: Manifest,
    images: Sequence[NDArray[np.uint8]],
) -> list[Outputs]:
    """Run the bundle's ``run.py`` there on images; return its outputs, each (1, ...)."""
    with placed(connection, folder, manifest, images) as (place, names):
        inside = f"cd {shlex.quote(place)} && exec"
        program = shlex.join([connection.python, "run.py", *names, "--threads", "1"])
        result = connection.run(f"{inside} {program}", seconds=PATIENCE)
        if result.code != 0:
            raise connection.refusal(result)
        results = [f"{Path(name).stem}.npz" for name in names]
        sums = connection.run(f"{inside} sha256sum {shlex.join(results)}").out
        lines = re.findall(r"^([0-9a-f]{64})  (\S+)$", sums, re.MULTILINE)
        digests = {name: sha256 for sha256, name in lines}
        outputs = []
        with tempfile.TemporaryDirectory() as scratch:
            for name in results:
                file = Path(scratch) / name
                connection.get(Path(place).name, name, file, digests[name], _LARGEST_RESULT)
                with np.load(file, allow_pickle=False) as stored:
                    outputs.append({task.name: stored[task.name] for task in manifest.tasks})
    return outputs


@contextmanager
def placed(
    connection: EmulatedConnection,
    folder: Path,
    manifest: Manifest,
    images: Sequence[NDArray[np.uint8]],
) -> Iterator[tuple[str, list[str]]]:
    """Copy a bundle and images there; yield the folder they lie in and the images' names."""
    place = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: folder / name for name in run_files(manifest)}
        names = [f"image{number}.png" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            files[name] = Path(scratch) / name
            cv2.imwrite(str(files[name]), image[:, :, ::-1])
        connection.put(files, place)
    where = next(connection.ask("look", modules=[]))["folder"]
    yield f"{where}/{place}", names


def _agreement(
    task: str, kind: str, here: Sequence[Outputs], there: Sequence[Outputs], cpu: str
) -> Agreement:
    """Compare a task's outputs of all images.

    Raises:
        VerifyError: they have different shapes.
    """
    wanted, got = (np.concatenate([row[task] for row in rows]) for rows in (here, there))
    try:
        parity = compare_outputs({task: wanted}, {task: got})[task]
    except BuildError as error:
        raise VerifyError(f"{cpu}: {error.message}", hint="report this with the model") from error
    same = None
    if kind in _CLASSES:
        same = float((wanted.argmax(axis=1) == got.argmax(axis=1)).mean())
    return Agreement(parity, float((wanted == got).mean()), same)


def _check_agreement(manifest: Manifest, cpu: str, task: str, agreement: Agreement) -> None:
    """Raise where a task is not on a CPU what it is here.

    Raises:
        VerifyError: fp32 outputs differ, or too many decisions of a lower precision do.
    """
    parity, same = agreement.parity, agreement.same_class
    if manifest.precision == "fp32" and not parity.relative <= FP32_TOLERANCE:
        raise VerifyError(
            f"task '{task}' differs by {parity.relative:.2e} of its range between this machine and "
            f"an emulated {cpu}, allowed {FP32_TOLERANCE:.0e}",
            hint=f"another release of {manifest.runtime} may do better on that CPU",
        )
    if manifest.precision != "fp32" and same is not None and same < SAME_CLASS:
        raise VerifyError(
            f"task '{task}' decides {100 * (1 - same):.1f} % otherwise on an emulated {cpu} than "
            f"on this machine, allowed {100 * (1 - SAME_CLASS):.0f} %",
            hint="keep that task's layers in fp32, or build int8 in the form for that CPU",
        )


def _accuracy(material: _Material, session: _Recorded) -> dict[str, dict[str, float]] | None:
    if material.labelled is None:
        return None
    recipe, reader = material.labelled
    tasks = recipe.kept_tasks()
    return evaluate(predictor(session), tasks, reader, recipe.model.input.model_input())


def _same_bits(runs: Sequence[Sequence[Outputs]]) -> dict[str, bool]:
    first, *others = runs
    return {
        task: all(
            np.array_equal(wanted[task], got[task])
            for other in others
            for wanted, got in zip(first, other, strict=True)
        )
        for task in first[0]
    }
