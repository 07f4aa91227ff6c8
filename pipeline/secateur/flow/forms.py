"""Forms of one model (runtime and file) on a device: what each takes, measured or counted there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from secateur.devices import on_profile
from secateur.devices.connect import connect
from secateur.devices.profiled import read_networks
from secateur.devices.remote_job import Tell
from secateur.devices.remote_probe import check_modules, probe_python
from secateur.devices.remote_run import LONGEST_RESULT, Work, bundle_on_device
from secateur.devices.target import Target
from secateur.flow.cache import StageCache
from secateur.flow.emulated import PATIENCE
from secateur.flow.engine import check_fits
from secateur.flow.meters import emulated
from secateur.lower.ncnn import weights_file

ROUNDS, WARM_UP = 60, 5

Opened = Mapping[str, tuple[str, str]]
"""By the form's name: its runtime, and the file that it opens."""
Shape = tuple[int, ...]


def count_forms(target: Target, cpu: str, forms: Opened, shape: Shape) -> dict[str, float]:
    """Return million instructions of one inference of each form on the target's stand-in.

    Raises:
        DeviceError, RuntimeMissing: nothing can be counted here, or a form does not run.
    """
    found: dict[str, float] = {}
    for runtime in dict.fromkeys(runtime for runtime, _ in forms.values()):
        own = {name: form for name, form in forms.items() if form[0] == runtime}
        with _files(own, shape) as files, emulated(target, cpu, runtime) as connection:
            counts = connection.count("count_whole", files, PATIENCE).wholes()
        found |= {name: count / 1e6 for name, count in zip(own, counts, strict=True)}
    return {name: found[name] for name in forms}


def time_forms(
    target: Target, device: str, tell: Tell, forms: Opened, shape: Shape
) -> dict[str, float]:
    """Return each form's median latency in ms on a device, the forms taking turns.

    Raises:
        DeviceError: the device does not fit, lacks a runtime, or does not run a form.
        ConnectionLost: calling again resumes.
    """
    runtimes = list(dict.fromkeys(runtime for runtime, _ in forms.values()))
    with connect(device) as connection, _files(forms, shape) as files:
        check_fits(target, connection)
        check_modules(probe_python(connection, ["numpy", *runtimes]), connection.name)
        desk = StageCache().folder("on-device", connection.name, "forms", target.name)
        names = [name for name in files if name.endswith((".onnx", ".param"))]
        order = {"models": names, "threads": target.threads, "rounds": ROUNDS,
                 "warm_up": WARM_UP}  # fmt: skip
        agent = Path(on_profile.__file__)
        with bundle_on_device(connection, {}, desk, tell, agent) as board:
            result = board.perform(Work("whole", order, files, LONGEST_RESULT))
            told = read_networks(result, connection.name, len(names))
    return {name: float(np.median(network.run_us)) / 1000
            for name, network in zip(forms, told, strict=True)}  # fmt: skip


@contextmanager
def _files(forms: Opened, shape: Shape) -> Iterator[dict[str, Path]]:
    """Yield what ``on_profile.py`` opens, by the names that it has there, in the forms' order."""
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "shape.json"
        note.write_text(json.dumps(shape))
        found: dict[str, Path] = {}
        for number, (_, file) in enumerate(forms.values()):
            path = Path(file)
            found[f"form{number}{path.suffix}"] = path
            if path.suffix == on_profile.NCNN_LAYERS:
                found |= {f"form{number}.bin": weights_file(path), f"form{number}.json": note}
        yield found
