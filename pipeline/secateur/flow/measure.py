"""Bench a bundle on this machine: inference alone, and from image file to decoded answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from secateur.bench.energy import EnergyProtocol, measure_energy
from secateur.bench.latency import (
    Latency,
    Offline,
    Protocol,
    measure,
    offline,
    sweep_counts,
    sweep_row,
)
from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, model_files, read_bundle, weights_sha256
from secateur.bundle.runner import Runner, read_rgb
from secateur.core.errors import DeviceError
from secateur.core.files import write_json
from secateur.devices import on_bench
from secateur.devices.energy import NotMeasurable, find_meter
from secateur.devices.host import host_facts, library_versions
from secateur.devices.on_bench import OFFLINE_BATCH, offline_samples, throttled, throttling
from secateur.devices.target import load_target
from secateur.flow.predict import bundle_session
from secateur.flow.verify import check_parity, own_image, own_input
from secateur.lower.memory import model_memory
from secateur.runtimes.base import Session, runtime_of


def bench(
    folder: Path,
    *,
    threads: int | None = None,
    protocol: Protocol | None = None,
    sweep: bool = False,
) -> dict[str, Any]:
    """Measure a bundle and write ``bench.json`` into it if this machine is of its target's kind.

    Elsewhere nothing is written, and the record is a ``stand_in``: no latency of the target.
    ``latency`` is of one image after another: ``host_to_host`` the runtime's call alone;
    ``end_to_end`` adds reading and decoding the image file, preprocessing and decoding the answers
    at the image's size. ``offline`` is of images that are all there: batches, and how many a
    second. ``energy`` is that of the call alone, or says why it is ``not_measurable``.

    ``sweep``: also with every number of threads that this machine has cores for.

    Raises:
        BundleError, VerifyError: the bundle is not whole, or its outputs here are wrong.
        DeviceError: its target is not known here.
    """
    protocol = protocol or Protocol()
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    stand_in = not load_target(manifest.device).is_this_machine()
    used = threads or manifest.threads
    session = bundle_session(folder, manifest, used)
    check_parity(folder, manifest, session)  # what is measured must be right
    runner = Runner(folder, used, manifest.runtime)
    image, inputs = own_image(folder), own_input(folder, manifest)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "image.jpg"
        cv2.imwrite(str(file), image[:, :, ::-1])

        def from_file() -> None:
            picture = read_rgb(file)
            runner.decode(runner.predict(picture), picture.shape[:2])

        results = measure(
            {"host_to_host": lambda: session.run(inputs), "end_to_end": from_file}, protocol
        )
        many = _offline(session, inputs, protocol)
        peak = _peak_memory_mb(folder, file, used, manifest.runtime)
    swept = _swept(folder, manifest, inputs, protocol) if sweep else None
    energy = energy_of(lambda: session.run(inputs), EnergyProtocol(seconds=protocol.seconds / 3))
    record = {
        "device": "local",
        "stand_in": stand_in,
        "target": manifest.device,
        "precision": manifest.precision,
        "runtime": runtime_of(manifest.runtime).version(),
        "threads": used,
        "model_sha256": weights_sha256(manifest),
        "latency": {name: result.to_json() for name, result in results.items()},
        "offline": many.to_json(),
        "threads_sweep": swept,
        "energy": energy,
        "memory_mb": memory_record(folder, manifest, peak),
        "host": host_facts(),
        "versions": library_versions(),
    }
    if not stand_in:
        write_json(folder / "bench.json", record)
    return record


def _offline(session: Session, inputs: NDArray[np.float32], protocol: Protocol) -> Offline:
    """Measure calls with many images each; every runtime here takes a batch."""
    batch = inputs.repeat(OFFLINE_BATCH, axis=0)
    alarms = throttling()
    samples = offline_samples(lambda: session.run(batch), **asdict(protocol))
    return offline(np.array(samples), OFFLINE_BATCH, throttled(alarms, throttling()))


def _swept(
    folder: Path, manifest: Manifest, inputs: NDArray[np.float32], protocol: Protocol
) -> list[dict[str, Any]]:
    """Measure with every number of threads, one after the other: pools would fight for cores."""
    rows = []
    for count in sweep_counts(os.cpu_count() or 1):
        session = bundle_session(folder, manifest, count)
        call = partial(session.run, inputs)
        one: Latency = measure({"call": call}, protocol, f"{count} thread(s)")["call"]
        rows.append(sweep_row(count, one, _offline(session, inputs, protocol)))
    return rows


def memory_record(folder: Path, manifest: Manifest, process_peak: float | None) -> dict[str, Any]:
    """Return what ``bench.json`` says of memory, in MB: measured, and what the model asks for.

    ``process_peak`` is all that ``run.py`` held at its highest, libraries included; ``weights`` and
    ``activations`` are those of one image in the file, None where it does not tell.
    """
    files = [folder / name for name in model_files(manifest)]
    graph = folder / "model.onnx"
    asked = model_memory(graph) if graph.exists() else None
    weights = asked.weights if asked else None
    if manifest.runtime == "ncnn":
        weights = files[-1].stat().st_size
    return {
        "process_peak": process_peak,
        "weights": _megabytes(weights),
        "activations": _megabytes(asked.activations if asked else None),
    }


def _megabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e6, 3)


def energy_of(
    call: Callable[[], object], protocol: EnergyProtocol, root: Path = Path("/")
) -> dict[str, Any]:
    """Return what ``bench.json`` says of a call's energy; ``root``: of a recorded tree."""
    meter = find_meter(root)
    if isinstance(meter, NotMeasurable):
        return {"not_measurable": meter.reason}
    try:
        return measure_energy(call, meter, protocol).to_json()
    except DeviceError as error:  # a meter that fails costs its own figure only
        return {"not_measurable": error.message}


def _peak_memory_mb(folder: Path, image: Path, threads: int, runtime: str) -> float | None:
    """Return what the bundle's own ``run.py`` holds at its highest, in a process of its own.

    This process has torch in it, which no device needs. None where the bundle runs here only
    within it.
    """
    agent, result = image.with_name("on_bench.py"), image.with_name("peak")
    shutil.copy(on_bench.__file__, agent)
    order = {"result": str(result), "image": str(image), "threads": threads, "how": runtime}
    words = [sys.executable, str(agent), "peak", json.dumps(order)]
    done = subprocess.run(words, cwd=folder, capture_output=True, check=False)
    return float(result.read_text()) if done.returncode == 0 and result.exists() else None
