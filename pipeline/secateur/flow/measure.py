"""Bench a bundle on this machine: inference alone, and from image file to decoded answer."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from secateur.bench.energy import EnergyProtocol, measure_energy
from secateur.bench.latency import Protocol, measure
from secateur.bundle.read import check_files, model_files, read_bundle
from secateur.bundle.runner import Runner, preprocess, read_rgb
from secateur.bundle.write import CHECK_FILE
from secateur.core.errors import DeviceError
from secateur.core.files import write_json
from secateur.devices.energy import NotMeasurable, find_meter
from secateur.devices.host import host_facts, library_versions
from secateur.flow.predict import bundle_session
from secateur.flow.verify import check_parity
from secateur.runtimes.base import runtime_of


def bench(
    folder: Path,
    *,
    threads: int | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Measure a bundle and write ``bench.json`` into it.

    ``host_to_host`` is the runtime's call alone; ``end_to_end`` adds reading and decoding the
    image file, preprocessing and decoding the answers at the image's size. ``energy`` is that of
    the call alone, or says why it is ``not_measurable``.

    Raises:
        BundleError, VerifyError: the bundle is not whole, or its outputs here are wrong.
    """
    protocol = protocol or Protocol()
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    used = threads or manifest.threads
    session = bundle_session(folder, manifest, used)
    check_parity(folder, manifest, session)  # what is measured must be right
    runner = Runner(folder, used, manifest.runtime)
    with np.load(folder / CHECK_FILE, allow_pickle=False) as stored:
        image = stored["image"]
    inputs = preprocess(image, manifest.input.model_dump())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "image.jpg"
        cv2.imwrite(str(file), image[:, :, ::-1])

        def from_file() -> None:
            picture = read_rgb(file)
            runner.decode(runner.predict(picture), picture.shape[:2])

        results = measure(
            {"host_to_host": lambda: session.run(inputs), "end_to_end": from_file}, protocol
        )
    energy = energy_of(lambda: session.run(inputs), EnergyProtocol(seconds=protocol.seconds / 3))
    record = {
        "device": "local",
        "target": manifest.device,
        "precision": manifest.precision,
        "runtime": runtime_of(manifest.runtime).version(),
        "threads": used,
        "model_sha256": manifest.files[model_files(manifest)[-1]].sha256,
        "latency": {name: result.to_json() for name, result in results.items()},
        "energy": energy,
        "process_peak_memory_mb": _peak_memory_mb(),
        "host": host_facts(),
        "versions": library_versions(),
    }
    write_json(folder / "bench.json", record)
    return record


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


def _peak_memory_mb() -> float:
    """Return the largest resident size this whole process had, libraries included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)
