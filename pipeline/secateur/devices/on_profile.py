"""Runs models on a device, whole or operator by operator: stand-alone.

The standard library, numpy and a runtime, Python 3.8. ``main([verb, order as JSON])``; an order
names its result file, which appears whole or not at all. Under an emulator that counts instructions
it also marks where runs begin and end (``count_instructions.c``); then times mean nothing, and the
reader puts counts in their place.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

KERNEL = "_kernel_time"
DISABLED = ["WeightBiasQuantization"]  # see run.py of a bundle
NCNN_LAYERS = ".param"
MARK, GETPRIORITY = 0x4D41524B, 141  # of count_instructions.c
TOLD_EVERY = 5.0  # seconds


def operators(result: str, models: list[str], threads: int, rounds: int, warm_up: int) -> None:
    """Write per model how long its runs took, and each of its operators."""
    write(result, measured(models, threads, rounds, warm_up))


def count_operators(result: str, models: list[str]) -> None:
    """Write the same of one run each, with marks: two around a run, two around one with traces."""
    write(result, measured(models, 1, 1, 1, marker()))


def whole(result: str, models: list[str], threads: int, rounds: int, warm_up: int) -> None:
    """Write per model the microseconds of its runs, the models taking turns."""
    calls = [opened(model, threads) for model in models]
    spent: list[list[float]] = [[] for _ in models]
    for number in range(rounds + warm_up):
        tell(f"{number + 1} of {rounds + warm_up} rounds")
        for call, own in zip(calls, spent):  # noqa: B905 - Python 3.8
            own.append(timed(call))
    write(result, [{"run_us": own[warm_up:], "nodes": []} for own in spent])


def count_whole(result: str, models: list[str]) -> None:
    """Write nothing of use, but mark the second run of each model."""
    mark = marker()
    for number, model in enumerate(models):
        call = opened(model, 1)
        call()
        mark(2 * number)
        call()
        mark(2 * number + 1)
    write(result, [{"run_us": [1.0], "nodes": []} for _ in models])


def measured(
    models: Sequence[Any],
    threads: int,
    rounds: int,
    warm_up: int,
    mark: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return per ONNX model (a file or its bytes) its runs and its operators, models taking turns.

    Operators are read from ONNX Runtime's own profile, in a session beside the one whose runs are
    timed. ``sequence`` are the operators of the last run in order, with the profile's own time.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = [session(model, options(threads)) for model in models]
        traced = [session(model, traced_options(threads, f"{folder}/{number}"))
                  for number, model in enumerate(models)]  # fmt: skip
        feeds = [noise(each) for each in plain]
        spent: list[list[float]] = [[] for _ in models]
        for turn in range(rounds + warm_up):
            last = turn == rounds + warm_up - 1
            tell(f"{turn + 1} of {rounds + warm_up} rounds")
            for number, (one, other, feed) in enumerate(zip(plain, traced, feeds)):  # noqa: B905
                marked = mark if last else lambda _: None
                marked(4 * number)
                spent[number].append(timed(partial(one.run, None, feed)))
                marked(4 * number + 1)
                marked(4 * number + 2)
                other.run(None, feed)
                marked(4 * number + 3)
        files = [Path(each.end_profiling()) for each in traced]
        return [
            {"run_us": own[warm_up:], **kernels(file, rounds, warm_up)}
            for own, file in zip(spent, files)  # noqa: B905
        ]


def kernels(profile: Path, rounds: int, warm_up: int) -> dict[str, Any]:
    """Return the operators of a profile in order, and those of its last run."""
    events = [each for each in json.loads(profile.read_text(encoding="utf-8"))
              if each.get("cat") == "Node" and each["name"].endswith(KERNEL)]  # fmt: skip
    nodes: dict[str, list[Any]] = {}
    for event in events:
        nodes.setdefault(event["name"][: -len(KERNEL)], []).append(event)
    last = events[len(events) - len(events) // (rounds + warm_up) :]
    return {
        "nodes": [
            {
                "name": name,
                "us": [each["dur"] for each in own[warm_up:]],
                "reads": shapes(own[0]["args"]["input_type_shape"]),
                "makes": shapes(own[0]["args"]["output_type_shape"]),
            }
            for name, own in nodes.items()
        ],
        "sequence": [[each["name"][: -len(KERNEL)], each["dur"]] for each in last],
    }


def shapes(typed: list[Any]) -> list[list[int]]:
    """The shapes in entries {type: shape} of a profile."""
    return [next(iter(each.values()), []) for each in typed]


def opened(model: str, threads: int) -> Callable[[], object]:
    """What runs a model once on noise: an ONNX file, or ncnn's with the weights beside it."""
    if model.endswith(NCNN_LAYERS):
        return opened_ncnn(Path(model), threads)
    found = session(model, options(threads))
    feed = noise(found)
    return lambda: found.run(None, feed)


def opened_ncnn(model: Path, threads: int) -> Callable[[], object]:
    """The same for ncnn; a .json file beside the model has the shape of its input."""
    import ncnn
    import numpy

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    weights = model.with_suffix(".bin")
    if net.load_param(str(model)) != 0 or net.load_model(str(weights)) != 0:
        raise ValueError(f"ncnn {ncnn.__version__} cannot load {model.name}")
    (name,), outputs = net.input_names(), list(net.output_names())
    shape = json.loads(model.with_suffix(".json").read_text())
    image = numpy.random.default_rng(0).standard_normal(shape).astype("float32")

    def run() -> None:
        extractor = net.create_extractor()
        extractor.input(name, ncnn.Mat(image))
        for output in outputs:
            if extractor.extract(output)[0] != 0:
                raise ValueError(f"ncnn {ncnn.__version__} cannot run {model.name}")

    return run


def timed(call: Callable[[], object]) -> float:
    """Microseconds of a call."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def options(threads: int) -> Any:
    """ONNX Runtime as bundles run it."""
    import onnxruntime

    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = threads
    found.inter_op_num_threads = 1
    found.log_severity_level = 3
    return found


def traced_options(threads: int, prefix: str) -> Any:
    """Those that also write a profile."""
    found = options(threads)
    found.enable_profiling = True
    found.profile_file_prefix = prefix
    return found


def session(model: Any, how: Any) -> Any:
    """Open a model."""
    import onnxruntime

    return onnxruntime.InferenceSession(
        model, how, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
    )


def noise(opened_session: Any) -> dict[str, Any]:
    """Noise for every input; a size that is open is 1."""
    import numpy

    rng = numpy.random.default_rng(0)
    return {
        value.name: rng.standard_normal(
            [size if isinstance(size, int) else 1 for size in value.shape]
        ).astype("float32")
        for value in opened_session.get_inputs()
    }


def marker() -> Callable[[int], None]:
    """What marks a place for the counting emulator."""
    library = ctypes.CDLL(None)
    return lambda number: library.syscall(
        ctypes.c_long(GETPRIORITY), ctypes.c_long(MARK), ctypes.c_long(number)
    )


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a result, whole or not at all."""
    part = Path(f"{name}.tmp")
    part.write_text(json.dumps(rows))
    part.replace(name)


def tell(text: str, last: list[float] = [0.0]) -> None:  # noqa: B006 - when it told last
    """Print a line, not too often: whoever waits knows that it goes on."""
    if __name__ == "__main__" and time.monotonic() - last[0] > TOLD_EVERY:
        last[0] = time.monotonic()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


VERBS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (operators, count_operators, whole, count_whole)
}


def main(argv: list[str]) -> int:
    """Serve one order; any failure is one line."""
    try:
        VERBS[argv[0]](**json.loads(argv[1]))
    except Exception as error:  # runtimes' own exceptions share no base
        lines = str(error).splitlines() or [type(error).__name__]
        sys.stdout.write(f"error: {lines[0]}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
