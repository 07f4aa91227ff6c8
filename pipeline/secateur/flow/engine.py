"""From a bundle to its engine: whether a device fits the target, then the build there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.bundle.engine_options import OPTIONS
from secateur.bundle.read import check_files, read_bundle
from secateur.core.errors import DeviceError, RecipeError
from secateur.devices.connect import connect
from secateur.devices.connection import Connection
from secateur.devices.probe import DeviceFacts
from secateur.devices.remote_build import BUILDER, EngineRecord, Order, build_engine
from secateur.devices.remote_job import Tell
from secateur.devices.remote_probe import check_modules, check_python, probe, probe_python
from secateur.devices.target import Target, load_target, target_names
from secateur.devices.version import Version, parse_version, show_version
from secateur.flow.recipe import Recipe

_NEEDED = (BUILDER, "model.onnx", "nodes.json", OPTIONS)
_EARLIER = "timing.cache"  # of an earlier build: makes the next one faster


def check_options(recipe: Recipe, target: Target) -> None:
    """Raise when the target's engine cannot be built as the recipe says; CPUs have no engine.

    Raises:
        RecipeError: it asks for a DLA or for compute capabilities that are not to be had.
    """
    if target.engine_runtime is None:
        return
    wanted, cores = recipe.engine, target.dla.cores if target.dla else 0
    if wanted.dla is not None and wanted.dla >= cores:
        raise RecipeError(
            f"engine.dla: {target.name} has {cores or 'no'} DLA cores, got core {wanted.dla}",
            hint="leave it out, or choose a module with a DLA",
        )
    portable = target.engine_runtime == "tensorrt_rtx"
    known = target.gpu.compute_capabilities if target.gpu and portable else ()
    other = sorted(set(wanted.compute_capabilities) - set(known))
    if other:
        raise RecipeError(
            f"engine.compute_capabilities: an engine of {target.name} is for "
            f"{', '.join(known) or 'the very device that builds it'}, got {other[0]}",
            hint="correct it, or leave it out",
        )


def check_device(
    target: Target, device: str, runtimes: Sequence[str], dla: int | None = None
) -> None:
    """Check that a device can do its part of a build, before any long work.

    It is to build the target's engine, which is to run on the core ``dla`` if that is given; or,
    where the target has none, to run the bundle with each of the ``runtimes``.

    Raises:
        DeviceError: the device is another one, cannot be reached, or lacks what is needed, or its
            TensorRT cannot use a DLA.
    """
    with connect(device) as connection:
        check_fits(target, connection)
        if not target.engine_runtime:
            wanted = ["numpy", "cv2", *runtimes]
            check_modules(probe_python(connection, wanted), connection.name)
            return
        python = probe_python(connection)
        check_python(python, connection.name, target.engine_runtime)
    if dla is not None:
        check_dla(target, parse_version(python.modules[target.engine_runtime] or "") or ())


def check_dla(target: Target, tensorrt: Version) -> None:
    """Raise when that TensorRT can use none of the target's DLA cores.

    Raises:
        DeviceError: it cannot.
    """
    if target.dla_cores(tensorrt) == 0:
        ranges = " and ".join(each.said() for each in target.dla.tensorrt) if target.dla else "none"
        raise DeviceError(
            f"engine.dla: TensorRT {show_version(tensorrt)} has no DLA on a {target.name}",
            hint=f"leave it out of the recipe (versions with one: {ranges})",
        )


def engine_on_device(folder: Path, device: str, tell: Tell) -> EngineRecord:
    """Build a bundle's engine on the device it is for, and bring it into the bundle's folder.

    Raises:
        BundleError, VerifyError: the bundle is not whole.
        DeviceError, BuildError: see ``remote_build.build_engine``.
    """
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    target = load_target(manifest.device)
    runtime = _engine_runtime(target)
    # not manifest.json: its times change with every call, and equal orders must stay equal
    names = [*_NEEDED, *([_EARLIER] if (folder / _EARLIER).is_file() else [])]
    missing = [name for name in _NEEDED if name not in manifest.files]
    if missing:
        raise DeviceError(
            f"{folder} has no {missing[0]}, which builds its engine",
            hint="build the bundle again with this version",
        )
    with connect(device) as connection:
        check_fits(target, connection)
        order = Order({name: folder / name for name in names}, runtime)
        return build_engine(connection, order, folder, tell)


def _engine_runtime(target: Target) -> str:
    if target.engine_runtime is None:
        able = [name for name in target_names() if load_target(name).engine_runtime]
        raise DeviceError(
            f"{target.name} has no engine that is built on a device",
            hint=f"leave out --device, or choose a target with one: {', '.join(able)}",
        )
    return target.engine_runtime


def check_fits(target: Target, connection: Connection) -> DeviceFacts:
    """Return what a device is.

    Raises:
        DeviceError: it is none of the target's kind, as far as it tells.
    """
    facts = probe(connection)
    pairs = (
        ("processor", facts.arch, (target.arch,)),
        ("module", facts.module, target.modules),
    )
    for what, found, wanted in pairs:
        if wanted and found is not None and found not in wanted:
            raise DeviceError(
                f"{connection.name} is not a {target.name}: its {what} is {found}, expected "
                f"{' or '.join(wanted)}",
                hint="choose the target it is (`secateur doctor --device …` says what is known)",
            )
    return facts
