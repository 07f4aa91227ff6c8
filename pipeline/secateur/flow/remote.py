"""A bundle on a device over ssh: verified and measured there by its own runner."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from secateur.bench.latency import (
    Latency,
    Offline,
    Protocol,
    offline,
    summarise,
    sweep_counts,
    sweep_row,
)
from secateur.bundle.engine_run import has_engine
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, read_bundle, run_files, weights_sha256
from secateur.core.errors import DeviceError, VerifyError
from secateur.core.files import file_sha256, write_json
from secateur.data.sample import Reader
from secateur.data.transforms import fit_sample
from secateur.devices.connect import connect
from secateur.devices.connection import Connection
from secateur.devices.on_bench import throttled
from secateur.devices.probe import DeviceFacts
from secateur.devices.remote_job import MIB, Tell
from secateur.devices.remote_probe import check_modules, probe, probe_python
from secateur.devices.remote_run import (
    LONGEST_RESULT,
    RemoteBundle,
    ToldLatency,
    Work,
    bundle_on_device,
)
from secateur.devices.target import load_target, target_names
from secateur.flow.cache import StageCache
from secateur.flow.engine import check_fits
from secateur.flow.measure import memory_record
from secateur.flow.recipe import Recipe
from secateur.flow.second_opinion import asked_opinion, engine_of, trtexec_order
from secateur.flow.verify import (
    VerifyResult,
    check_budgets,
    check_parity,
    judged,
    own_image,
    unjudged,
)
from secateur.flow.watch import Watch, begin_watch, end_watch
from secateur.lower import Parity

ENGINE = ("model.engine", "engine.json")
MOST_IMAGES, MOST_BYTES = 64, 64 * MIB  # of outputs: what the device's disk holds at a time
_LIBRARIES = ("numpy", "cv2")

Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Board:
    """A bundle on a device that it fits."""

    name: str
    folder: Path
    manifest: Manifest
    facts: DeviceFacts
    bundle: RemoteBundle
    connection: Connection

    def outputs(self, images: Sequence[NDArray[np.uint8]], threads: int | None = None) -> Outputs:
        """Run images (H, W, 3) RGB there; return each task's outputs (N, ...).

        Raises:
            DeviceError: the bundle does not run there.
            VerifyError: an output is not a number.
        """
        tasks = self.manifest.tasks
        sizes = [int(np.prod(task.shape)) for task in tasks]
        wanted = 4 * sum(sizes) * len(images)
        with tempfile.TemporaryDirectory() as scratch:
            files = {f"image{i}.png": Path(scratch) / f"{i}.png" for i in range(len(images))}
            for path, image in zip(files.values(), images, strict=True):
                cv2.imwrite(str(path), image[:, :, ::-1])
            order = {"images": list(files), "threads": threads}
            data = self.bundle.perform(Work("infer", order, files, wanted)).read_bytes()
        if len(data) != wanted:
            raise DeviceError(
                f"{self.name} gave {len(data):,} bytes for {len(images)} image(s), expected "
                f"{wanted:,}",
                hint="check that the device is the one you mean; if so, report this",
            )
        rows = np.frombuffer(data, "<f4").reshape(len(images), -1).astype(np.float32)
        parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        found = {
            task.name: part.reshape(len(images), *task.shape)
            for task, part in zip(tasks, parts, strict=True)
        }
        self._check_numbers(found)
        return found

    def latency(self, threads: int, protocol: Protocol, watch: Watch | None = None) -> ToldLatency:
        """Measure there by the protocol, on the bundle's own image; with a watch, that too."""
        image = own_image(self.folder)[:, :, ::-1]
        with tempfile.TemporaryDirectory() as scratch:
            files = {name: Path(scratch) / name for name in ("image.png", "image.jpg")}
            for path in files.values():
                cv2.imwrite(str(path), image)
            order = {"image": "image.png", "file": "image.jpg", "threads": threads,
                     "protocol": asdict(protocol), "watched": watch and watch.order}  # fmt: skip
            return self.bundle.latency(Work("latency", order, files, LONGEST_RESULT))

    def _check_numbers(self, outputs: Outputs) -> None:
        for task, values in outputs.items():
            whole = [bool(np.isfinite(row).all()) for row in values]
            if not all(whole):
                raise VerifyError(
                    f"task '{task}' gives values on {self.name} that are no finite numbers, in "
                    f"{whole.count(False)} of {len(whole)} image(s)",
                    hint="run it in fp32 there; if that is right, keep that task's layers in fp32",
                )


class _InOrder:
    """A ``Session`` that was run before: it is asked for the same images in the same order."""

    def __init__(self, parts: Iterator[Outputs]) -> None:
        self._parts, self._rest = parts, next(parts)

    def run(self, images: NDArray[np.float32]) -> Outputs:
        taken: list[Outputs] = []
        missing = len(images)
        while missing:
            have = len(next(iter(self._rest.values())))
            if not have:
                self._rest = next(self._parts)
                continue
            taken.append({task: rows[:missing] for task, rows in self._rest.items()})
            self._rest = {task: rows[missing:] for task, rows in self._rest.items()}
            missing -= min(have, missing)
        return {task: np.concatenate([part[task] for part in taken]) for task in taken[0]}


def verify_on_device(
    folder: Path, device: str, tell: Tell, *, limit: int | None = None, accuracy: bool = True
) -> VerifyResult:
    """Verify a bundle by its own ``run.py`` on a device, its images being sent there.

    Without ``accuracy`` its files and its outputs for one image alone.

    Raises:
        BundleError, VerifyError: see ``verify.verify``; or an output there is not a number.
        DeviceError: the device does not fit, lacks something, or does not run the bundle.
        ConnectionLost: calling again resumes.
    """
    with _board(folder, device, tell) as board:
        parity = _checked_parity(board)
        if not accuracy:
            check_budgets(board.manifest)
            return unjudged(board.name, parity)

        def session(recipe: Recipe, reader: Reader) -> _InOrder:
            return _InOrder(_parts(board, recipe, reader, limit, tell))

        return judged(folder, board.manifest, board.name, parity, session, limit)


def bench_on_device(
    folder: Path,
    device: str,
    tell: Tell,
    *,
    threads: int | None = None,
    protocol: Protocol | None = None,
    sweep: bool = False,
    trtexec: bool = False,
) -> dict[str, Any]:
    """Measure a bundle by its own ``run.py`` on a device and write ``bench.json`` into it.

    ``sweep``: also with every number of threads that the device has cores for. ``trtexec``: and let
    TensorRT's own benchmark measure its engine, layer by layer.

    Raises:
        BundleError, VerifyError: the bundle is not whole, or its outputs there are wrong.
        DeviceError, ConnectionLost: see ``verify_on_device``; or an engine has no threads to sweep.
    """
    if trtexec:
        trtexec_order(read_bundle(folder), engine_of(folder))  # before the long work
    if sweep and has_engine(folder):  # type: ignore[no-untyped-call]
        raise DeviceError(
            f"{folder} runs as an engine: the number of the CPU's threads does not change it",
            hint="bench it without --sweep",
        )
    how = protocol or Protocol()
    with _board(folder, device, tell) as board:
        _checked_parity(board)  # what is measured must be right
        used = threads or board.manifest.threads
        watch = begin_watch(board.connection)
        told = board.latency(used, how, watch)
        state, energy = end_watch(watch, board.connection, told.phases)
        swept = _swept(board, told, how) if sweep else None
        opinion = asked_opinion(board.bundle, board.manifest, folder) if trtexec else None
    manifest = board.manifest
    record = {
        "device": board.name,
        "target": manifest.device,
        "precision": manifest.precision,
        "runtime": told.runtime,
        "threads": used,
        "model_sha256": weights_sha256(manifest),
        "latency": {name: row.to_json() for name, row in _latencies(told).items()},
        "energy": energy,
        "telemetry": state,
        **({"trtexec": opinion} if opinion else {}),
        "offline": _offline(told).to_json(),
        "threads_sweep": swept,
        "memory_mb": memory_record(folder, manifest, told.process_peak_memory_mb),
        "host": _host(board.facts, told),
        "versions": told.versions,
    }
    write_json(folder / "bench.json", record)
    return record


@contextmanager
def _board(folder: Path, device: str, tell: Tell) -> Iterator[Board]:
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    files = {name: folder / name for name in run_files(manifest)}
    modules = [*_LIBRARIES, manifest.runtime]
    target = load_target(manifest.device) if manifest.device in target_names() else None
    if target is not None and target.engine_runtime:
        if not has_engine(folder):  # type: ignore[no-untyped-call]
            raise DeviceError(
                f"{folder} has no engine yet, which is what runs on a {target.name}",
                hint=f"build it there: secateur build RECIPE --target {target.name} --device "
                f"{device}",
            )
        files |= {name: folder / name for name in ENGINE}
        modules[-1] = target.engine_runtime
    with connect(device) as connection:
        facts = check_fits(target, connection) if target else probe(connection)
        check_modules(probe_python(connection, modules), connection.name)
        key = [connection.name, {name: file_sha256(path) for name, path in files.items()}]
        desk = StageCache().folder("on-device", *key)
        with bundle_on_device(connection, files, desk, tell) as bundle:
            yield Board(connection.name, folder, manifest, facts, bundle, connection)


def _checked_parity(board: Board) -> dict[str, Parity]:
    """Compare the bundle's own image there with what torch made of it."""
    outputs = iter([board.outputs([own_image(board.folder)])])
    return check_parity(board.folder, board.manifest, _InOrder(outputs))


def _parts(
    board: Board, recipe: Recipe, reader: Reader, limit: int | None, tell: Tell
) -> Iterator[Outputs]:
    """Yield the outputs of the evaluation images, so many at a time as the device has room for."""
    spec, tasks = recipe.model.input.model_input(), recipe.all_tasks()
    each = 4 * sum(int(np.prod(task.shape)) for task in board.manifest.tasks)
    step = max(1, min(MOST_IMAGES, MOST_BYTES // each))
    count = min(len(reader), limit or len(reader))
    for start in range(0, count, step):
        end = min(start + step, count)
        tell(f"images {start + 1} to {end} of {count}")
        yield board.outputs([fit_sample(reader[i], spec, tasks).image for i in range(start, end)])


def _latencies(told: ToldLatency) -> dict[str, Latency]:
    """Return the statistics, made here from every single call."""
    lowered = throttled(told.throttling_before, told.throttling_after)
    seen = told.temperature_before_c, told.temperature_after_c, lowered
    return {
        name: summarise(np.array(values), *seen)
        for name, values in dict(told.samples_ms).items()
        if values is not None
    }


def _offline(told: ToldLatency) -> Offline:
    lowered = throttled(told.throttling_after, told.throttling_offline)
    return offline(np.array(told.offline_ms), told.offline_batch, lowered)


def _swept(board: Board, told: ToldLatency, protocol: Protocol) -> list[dict[str, Any]]:
    """Measure with every number of threads there, one after the other."""
    rows = []
    for count in sweep_counts(told.host.logical_cores or 1):
        found = board.latency(count, protocol)
        rows.append(sweep_row(count, _latencies(found)["host_to_host"], _offline(found)))
    return rows


def _host(facts: DeviceFacts, told: ToldLatency) -> dict[str, Any]:
    """Return what the device says of itself, in the form of ``host_facts`` and beyond it."""
    cpu = facts.cpu.name if facts.cpu else None
    return {
        **told.host.model_dump(),
        "cpu": cpu or told.host.cpu or "unknown",
        "model": facts.model,
        "module": facts.module,
        "l4t": facts.l4t,
        "power_mode": facts.power_mode,
        "gpus": [gpu.name for gpu in facts.gpus],
    }
