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
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

LOOK_EVERY = 0.05  # seconds between two looks at the system's files
MOST_LOOKS, LONGEST_TEXT = 500, 200  # of a phase; of a file
TOLD_EVERY = 5.0  # seconds between lines on how far it is
STEADY, MOST_WINDOWS = 1.05, 10  # warm-up goes on until two windows' medians agree
OFFLINE_BATCH = 8  # images of one call where only their number a second counts
OFFLINE_SHARE = 10  # so many times fewer calls: each has many images
ZONES = "/sys/class/thermal"
CPUS = "/sys/devices/system/cpu"
CLOCKS = f"{CPUS}/cpu0/cpufreq"
PI_BITS = "/sys/devices/platform/soc/soc:firmware/get_throttled"


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
        warm_up(call, warmup_ms / 1000)
    fastest = float("inf")
    for call in calls.values():
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    foreseen = iter(progress(range(max(runs, round(seconds / max(fastest, 1e-6))))))
    while next(foreseen, None) is not None or min(map(sum, samples.values())) < 1000 * seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - start))
    return samples


def warm_up(call: Callable[[], object], window: float) -> int:
    """Call for windows of so many seconds until it is steady; return how many windows it took.

    Steady is when the medians of two that follow one another differ by less than 5 %. After ten it
    ends: what is not steady by then is for the samples to tell.
    """
    last = 0.0
    for number in range(MOST_WINDOWS):
        times: list[float] = []
        until = time.perf_counter() + window
        while not times or time.perf_counter() < until:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        middle = statistics.median(times)
        if number and max(middle, last) <= STEADY * min(middle, last):
            break
        last = middle
    return number + 1


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
    result: str,
    image: str,
    file: str,
    threads: int | None,
    protocol: dict[str, Any],
    watched: dict[str, Any] | None = None,
) -> None:
    """Write the protocol's samples as JSON, with what the device is and did meanwhile.

    ``image``: what the runtime's call alone is measured on; ``file``: what is read, decoded,
    prepared, run and answered from end to end. ``watched``: arguments of ``watch``, whose looks
    come after the timed runs, to leave those alone.
    """
    runner = opened(threads)
    inputs = runner.module.preprocess(runner.module.read_rgb(image), runner.manifest["input"])

    def from_file() -> None:
        picture = runner.module.read_rgb(file)
        runner.decode(runner.predict(picture), picture.shape[:2])

    calls = {"host_to_host": lambda: runner.session.run(inputs), "end_to_end": from_file}
    before, alarms = temperature_c(), throttling()
    samples = take_samples(calls, progress=lambda rounds: told(rounds, "rounds"), **protocol)
    after, lowered, peak_mb = temperature_c(), throttling(), peak_memory_mb()  # of these alone
    if hasattr(runner.session, "device_ms"):  # a runtime that tells its device's own time
        samples["device_only"] = [runner.session.device_ms() for _ in samples["host_to_host"]]
    offline = offline_samples(many_at_once(runner.session, inputs), **protocol)
    lowered_offline = throttling()
    seconds = protocol["seconds"] / 3
    found = {
        "samples_ms": samples,
        "phases": watch(calls["host_to_host"], seconds, **watched) if watched else [],
        "offline_ms": offline,
        "offline_batch": OFFLINE_BATCH,
        "temperature_before_c": before,
        "temperature_after_c": after,
        "throttling_before": alarms,
        "throttling_after": lowered,
        "throttling_offline": lowered_offline,
        "runtime": runner.runtime,
        "process_peak_memory_mb": peak_mb,
        "host": host(),
        "versions": versions(),
    }
    with written(result) as part:
        part.write_text(json.dumps(found))


def trtexec(result: str, command: list[str], reports: list[str]) -> None:
    """Write what ``trtexec`` prints and the reports it writes, as JSON."""
    places = (command[0], shutil.which("trtexec"))
    program = next((place for place in places if place and Path(place).exists()), None)
    if program is None:
        raise FileNotFoundError("there is no trtexec here: sudo apt install libnvinfer-bin")
    process = subprocess.run(
        [program, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    found = {name: text_of(name) for name in reports}
    with written(result) as part:
        part.write_text(json.dumps({
            "code": process.returncode, "output": process.stdout.decode("utf-8", "replace"),
            "reports": {name: text for name, text in found.items() if text is not None},
        }))  # fmt: skip


def watch(
    call: Callable[[], object],
    seconds: float,
    patterns: list[str],
    root: str,
    rounds: int,
    settle: float,
) -> list[dict[str, Any]]:
    """Return what files of the system say while nothing runs, and while ``call`` does.

    In every round ``seconds`` of calls between two halves of idling; what follows a change for
    ``settle`` seconds is not looked at. Files are glob patterns below ``root``.
    """
    paths = [path for pattern in patterns for path in Path(f"{root}/").glob(pattern[1:])]

    def once() -> dict[str, str]:
        texts = {str(path)[len(root) :]: text_of(str(path)) for path in paths}
        return {name: text[:LONGEST_TEXT] for name, text in texts.items() if text is not None}

    say(f"watching {len(paths)} files of the system")
    phases = []
    for _ in told(range(rounds), "rounds watched"):
        for phase, long in (("idle", seconds / 2), ("busy", seconds), ("idle", seconds / 2)):
            work = call if phase == "busy" else partial(time.sleep, LOOK_EVERY)
            repeat(work, settle)
            phases.append({"phase": phase, **look_during(work, long, once)})
    return phases


def look_during(
    work: Callable[[], object], seconds: float, once: Callable[[], dict[str, str]]
) -> dict[str, Any]:
    """Repeat ``work`` for so long while a thread of its own takes looks."""
    looks: list[dict[str, Any]] = []
    done, start = threading.Event(), time.perf_counter()

    def keep_looking() -> None:
        while not done.is_set() and len(looks) < MOST_LOOKS:
            before = time.perf_counter()
            files = once()
            at = (before + time.perf_counter()) / 2 - start  # reading them takes milliseconds
            looks.append({"at": at, "files": files})
            done.wait(LOOK_EVERY)

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    calls = repeat(work, seconds)
    took = time.perf_counter() - start
    done.set()
    thread.join()
    return {"seconds": took, "calls": calls, "looks": looks}


def repeat(work: Callable[[], object], seconds: float) -> int:
    """Call again and again for that long, once at least; return how often."""
    until, count = time.perf_counter() + seconds, 0
    while not count or time.perf_counter() < until:
        work()
        count += 1
    return count


def peak(result: str, image: str, threads: int | None, how: str) -> None:
    """Write the MB that this process held at its highest, having run one image file to its end."""
    runner = opened(threads, how)
    picture = runner.module.read_rgb(image)
    runner.decode(runner.predict(picture), picture.shape[:2])
    with written(result) as part:
        part.write_text(str(peak_memory_mb()))


def peak_memory_mb() -> float:
    """The largest resident size that this process had, libraries included.

    Linux's own count starts with the program; that of ``getrusage`` with who started it.
    """
    for line in (text_of("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)


def offline_samples(
    call: Callable[[], object], warmup_ms: float, seconds: float, runs: int
) -> list[float]:
    """Milliseconds of calls with many images each, one after another: what a batch job does."""
    fewer = -(-runs // OFFLINE_SHARE)
    return take_samples({"offline": call}, warmup_ms, seconds, fewer)["offline"]


def many_at_once(session: Any, inputs: Any) -> Callable[[], object]:
    """A call for ``OFFLINE_BATCH`` images, one by one where the runtime takes no batch."""
    if getattr(session, "batches", False):
        batch = inputs.repeat(OFFLINE_BATCH, axis=0)
        return lambda: session.run(batch)
    return lambda: [session.run(inputs) for _ in range(OFFLINE_BATCH)]


def opened(threads: int | None, how: str | None = None) -> Any:
    """Open the bundle in this folder; ``module`` is its run.py, ``runtime`` what runs it.

    ``how`` names the runtime, if not the one that run.py takes by itself.
    """
    sys.path.insert(0, str(Path.cwd()))
    import run  # type: ignore[import-not-found]  # the bundle's run.py

    runner = run.Runner(Path.cwd(), threads, how)
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


def throttling() -> dict[str, int]:
    """What lowers clocks for heat or lack of power, by name; empty where nothing tells.

    x86's counts of events since the start; the alerts of a Jetson's cooling devices and the
    Raspberry Pi's present bits (under-voltage, capped, throttled, soft limit), 0 where all is well.
    """
    found = {}
    counts = [
        number(str(path)) for path in Path(CPUS).glob("cpu*/thermal_throttle/core_throttle_count")
    ]
    if counts:
        found["core_throttle_count"] = int(sum(count or 0 for count in counts))
    for device in sorted(Path(ZONES).glob("cooling_device*")):
        kind = text_of(str(device / "type")) or ""
        if kind.endswith("throttle-alert"):
            found[kind] = int(number(str(device / "cur_state")) or 0)
    with contextlib.suppress(ValueError):
        found["get_throttled"] = int(text_of(PI_BITS) or "", 16) & 0xF
    return found


def throttled(before: Mapping[str, int], after: Mapping[str, int]) -> bool | None:
    """Whether clocks were lowered between two looks, or are now; None where nothing tells."""
    if not after:
        return None
    rose = any(value > before.get(name, value) for name, value in after.items())
    return rose or any(v for name, v in after.items() if name != "core_throttle_count")


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


VERBS: dict[str, Callable[..., None]] = {
    "infer": infer, "latency": latency, "peak": peak, "trtexec": trtexec,
}  # fmt: skip


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
