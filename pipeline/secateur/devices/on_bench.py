"""Runs a bundle's own ``run.py`` on a device, on images or against the clock: stand-alone.

The standard library and what ``run.py`` needs, Python 3.8; it lies in the bundle's folder there.
``main([verb, order as JSON])``; an order names its result file, which appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TOLD_EVERY = 5.0  # seconds between lines on how far it is
ZONES = "/sys/class/thermal"
CLOCKS = "/sys/devices/system/cpu/cpu0/cpufreq"


def take_samples(
    calls: Mapping[str, Callable[[], object]],
    warmup_ms: float,
    seconds: float,
    runs: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Return each call's milliseconds, the calls taking turns until each has its seconds and runs.

    This is the latency protocol's loop, here and on devices.
    """
    for call in calls.values():
        until = time.perf_counter() + warmup_ms / 1000
        while time.perf_counter() < until:
            call()
    fastest = float("inf")
    for call in calls.values():
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in progress(range(max(runs, round(seconds / max(fastest, 1e-6))))):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - start))
    return samples


def infer(result: str, images: list[str], threads: int | None) -> None:
    """Write the outputs of PNG files: image after image, task after task, raw float32."""
    runner = opened(threads)
    with written(result) as part, part.open("wb") as stream:
        for name in told(images, "images"):
            outputs = runner.predict(runner.module.read_rgb(name))
            for task in runner.tasks:
                array = outputs[task["name"]]
                if list(array.shape) != [1, *task["shape"]]:
                    raise ValueError(
                        f"{task['name']} has shape {list(array.shape)}, the manifest says "
                        f"{[1, *task['shape']]}"
                    )
                stream.write(array.astype("<f4").tobytes())


def latency(
    result: str, image: str, file: str, threads: int | None, protocol: dict[str, Any]
) -> None:
    """Write the protocol's samples as JSON, with what the device is and did meanwhile.

    ``image``: what the runtime's call alone is measured on; ``file``: what is read, decoded,
    prepared, run and answered from end to end.
    """
    runner = opened(threads)
    inputs = runner.module.preprocess(runner.module.read_rgb(image), runner.manifest["input"])

    def from_file() -> None:
        picture = runner.module.read_rgb(file)
        runner.decode(runner.predict(picture), picture.shape[:2])

    calls = {"host_to_host": lambda: runner.session.run(inputs), "end_to_end": from_file}
    before = temperature_c()
    samples = take_samples(calls, progress=lambda rounds: told(rounds, "rounds"), **protocol)
    found = {
        "samples_ms": samples,
        "temperature_before_c": before,
        "temperature_after_c": temperature_c(),
        "runtime": runner.runtime,
        "process_peak_memory_mb": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1
        ),
        "host": host(),
        "versions": versions(),
    }
    with written(result) as part:
        part.write_text(json.dumps(found))


def opened(threads: int | None) -> Any:
    """Open the bundle in this folder; ``module`` is its run.py, ``runtime`` what runs it."""
    sys.path.insert(0, str(Path.cwd()))
    import run  # type: ignore[import-not-found]  # the bundle's run.py

    runner = run.Runner(Path.cwd(), threads)
    runner.module = run
    own = [getattr(runner.session, name, None) for name in ("trt", "ncnn")]
    library = next((each for each in own if each), None) or sys.modules["onnxruntime"]
    runner.runtime = f"{library.__name__} {library.__version__}"
    for note in runner.session.notes:
        say(f"note: {note}")
    return runner


@contextlib.contextmanager
def written(name: str) -> Iterator[Path]:
    """Yield a path that gets its name when the block succeeds."""
    part = Path(f"{name}.tmp")
    yield part
    part.replace(name)


def told(items: Any, noun: str) -> Iterator[Any]:
    """Yield the items and say from time to time how many are done."""
    last = time.monotonic()
    for number, item in enumerate(items):
        yield item
        if time.monotonic() - last > TOLD_EVERY:
            last = time.monotonic()
            say(f"{number + 1} of {len(items)} {noun}")


def say(text: str) -> None:
    """Print one line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def host() -> dict[str, Any]:
    """What this machine is and is set to; None where it does not say."""
    clock = number(f"{CLOCKS}/scaling_cur_freq")
    return {
        "cpu": platform.processor() or None,
        "arch": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "logical_cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "governor": text_of(f"{CLOCKS}/scaling_governor"),
        "clock_mhz": None if clock is None else clock / 1000,
        "temperature_c": temperature_c(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def temperature_c() -> float | None:
    """The hottest thermal zone in deg C, or None where there is none."""
    zones = [number(str(path)) for path in Path(ZONES).glob("thermal_zone*/temp")]
    return max((zone / 1000 for zone in zones if zone is not None), default=None)


def number(path: str) -> float | None:
    """The number in a file, or None."""
    try:
        return float(text_of(path) or "")
    except ValueError:
        return None


def text_of(path: str) -> str | None:
    """The text of a file of the system, or None."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that were loaded."""
    names = ("numpy", "cv2", "onnxruntime", "ncnn", "tensorrt", "tensorrt_rtx")
    loaded = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
    return {"python": platform.python_version(), **loaded}


VERBS: dict[str, Callable[..., None]] = {"infer": infer, "latency": latency}


def main(argv: list[str]) -> int:
    """Serve one order; any failure is one line."""
    try:
        VERBS[argv[0]](**json.loads(argv[1]))
    except Exception as error:  # ONNX Runtime's and TensorRT's own exceptions share no base
        lines = str(error).splitlines() or [type(error).__name__]
        say(f"error: {lines[0]}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
