"""Bench a bundle on this machine: inference alone, and from image file to decoded answer."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from secateur.bench.latency import Protocol, measure
from secateur.bundle.read import check_files, model_files, read_bundle
from secateur.bundle.runner import Runner, preprocess, read_rgb
from secateur.bundle.write import CHECK_FILE
from secateur.core.errors import DeviceError
from secateur.core.files import write_json
from secateur.devices.host import host_facts, library_versions
from secateur.flow.predict import bundle_session
from secateur.runtimes.base import runtime_of


def bench(
    folder: Path,
    *,
    device: str = "local",
    threads: int | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Measure a bundle and write ``bench.json`` into it.

    ``host_to_host`` is the runtime's call alone; ``end_to_end`` adds reading and decoding the
    image file, preprocessing and decoding the answers at the image's size.

    Raises:
        BundleError, VerifyError: the bundle is not whole.
        DeviceError: ``device`` is not one this version can reach.
    """
    if device != "local":
        raise DeviceError(
            f"device '{device}' cannot be reached by this version",
            hint="copy the bundle there and run `secateur bench BUNDLE --device local`",
        )
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    used = threads or manifest.threads
    session = bundle_session(folder, manifest, used)
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
    record = {
        "device": device,
        "target": manifest.device,
        "precision": manifest.precision,
        "runtime": runtime_of(manifest.runtime).version(),
        "threads": used,
        "model_sha256": manifest.files[model_files(manifest)[-1]].sha256,
        "latency": {name: result.to_json() for name, result in results.items()},
        "process_peak_memory_mb": _peak_memory_mb(),
        "host": host_facts(),
        "versions": library_versions(),
    }
    write_json(folder / "bench.json", record)
    return record


def _peak_memory_mb() -> float:
    """Return the largest resident size this whole process had, libraries included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)
