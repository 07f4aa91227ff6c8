"""What a bench measures beside medians, and how it says that a figure cannot be believed."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from cli_run import run
from conftest import REPOSITORY, SPEC, tiny_model
from onnx import TensorProto, helper
from secateur.bench.latency import (
    Protocol,
    block_medians,
    measure,
    offline,
    summarise,
    sweep_counts,
)
from secateur.devices import on_bench
from secateur.devices.on_bench import (
    MOST_WINDOWS,
    many_at_once,
    take_samples,
    throttled,
    throttling,
    warm_up,
)
from secateur.flow.measure import bench
from secateur.flow.report import report
from secateur.lower import export_onnx
from secateur.lower.memory import model_memory
from secateur.lower.quant import calibrate, emit, onnxruntime_x86, plan_quant
from test_run_tensorrt import device, write_bundle  # noqa: F401 - a fixture

QUICK = Protocol(warmup_ms=5, seconds=0.05, runs=20)


def steady(runs: int = 600, ms: float = 10.0) -> np.ndarray:
    return ms * (1 + 0.01 * np.random.default_rng(0).standard_normal(runs))


# -- reasons to doubt


def test_a_steady_run_gives_no_reason() -> None:
    found = summarise(steady())
    assert (found.remarks, found.noisy, found.outliers, found.throttled) == ((), False, 0, None)


@pytest.mark.parametrize(
    ("part", "factor", "says"),
    [
        (slice(0, 240), 1.3, "the first third of the run took 30% more than the fastest: it was"),
        (slice(200, 400), 1.3, "the middle third of the run took 30% more than the fastest: som"),
        (slice(400, 600), 1.3, "the last third of the run took 30% more than the fastest: it was "
                               "throttled, or something else began"),
        (slice(0, 60), 1.3, "it was not warm: the first 3 of 30 parts took 30% more"),
    ],
)  # fmt: skip
def test_a_part_that_took_longer_is_named(part: slice, factor: float, says: str) -> None:
    samples = steady()
    samples[part] *= factor
    found = summarise(samples)
    assert found.noisy and any(says in remark for remark in found.remarks), found.remarks


def test_one_slow_part_at_the_beginning_may_be_chance() -> None:
    samples = steady()
    samples[:20] *= 1.3
    assert not summarise(samples).noisy


def test_outliers_are_counted_and_stay_in_every_figure() -> None:
    samples = steady()
    samples[[50, 150, 350]] = 500
    found = summarise(samples)
    assert found.outliers == 3 and found.max_ms == 500 and found.runs == 600
    assert found.mean_ms == pytest.approx(samples.mean()) and found.mean_ms > 12
    assert found.percentiles_ms["p99.9"] > 400
    assert found.noisy and "calls vary by" in found.remarks[0]


def test_the_percentiles_are_the_list_of_the_protocol() -> None:
    samples = np.arange(1, 10_001, dtype=float)
    row = summarise(samples).to_json()
    assert list(row["percentiles_ms"]) == ["p90", "p95", "p97", "p99", "p99.9"]
    assert row["percentiles_ms"]["p97"] == pytest.approx(9700, rel=1e-3)
    assert (row["min_ms"], row["mean_ms"], row["median_ms"], row["max_ms"]) == (
        1, 5000.5, 5000.5, 10_000)  # fmt: skip


def test_our_figures_never_bear_the_name_of_a_benchmark_that_we_have_not_run() -> None:
    ours = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "ARCHITECTURE.md")]
    for folder, kinds in (("pipeline", ("py", "html", "js")), ("docs", ("md",)),
                          ("benchmarks", ("py", "md", "json"))):  # fmt: skip
        ours += [path for kind in kinds for path in (REPOSITORY / folder).rglob(f"*.{kind}")]
    assert len(ours) > 100
    found = [path for path in ours if "mlperf" in path.read_text(encoding="utf-8").lower()]
    assert found == []


# -- warm-up


def taking(call_ms: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what takes so many ms when called the n-th time, by the clock of ``on_bench``."""
    clock_ms, calls = [0.0], count()

    def call() -> None:
        clock_ms[0] += call_ms(next(calls))

    clock = SimpleNamespace(perf_counter=lambda: clock_ms[0] / 1000)
    monkeypatch.setattr(on_bench, "time", clock)  # a busy machine would stretch real calls
    return call


def windows_of(call_ms: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many windows of 10 ms a runtime warms up whose n-th call takes so long."""
    return warm_up(taking(call_ms, monkeypatch), 0.01)


def test_warm_up_lasts_until_calls_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    # Medians of 7.6, 6.1, 4.2 and 1 ms: the fifth window is the first like the one before it.
    assert windows_of(lambda n: max(1.0, 8.0 - 0.75 * n), monkeypatch) == 5
    assert windows_of(lambda n: 3.0, monkeypatch) == 2


def test_warm_up_ends_where_nothing_gets_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows_of(lambda n: 10.0 * 1.1**n, monkeypatch) == MOST_WINDOWS


def test_samples_go_on_until_their_seconds_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two calls warm up; the third, which foretells how many rounds are wanted, is a slow one.
    call = taking(lambda n: 40.0 if n == 2 else 1.0, monkeypatch)
    samples = take_samples({"call": call}, warmup_ms=0, seconds=0.2, runs=3)["call"]
    assert sum(samples) == pytest.approx(200, abs=1.5)


# -- clocks lowered


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose files are in a folder."""
    monkeypatch.setattr(on_bench, "CPUS", str(tmp_path / "cpu"))
    monkeypatch.setattr(on_bench, "ZONES", str(tmp_path / "thermal"))
    monkeypatch.setattr(on_bench, "PI_BITS", str(tmp_path / "get_throttled"))
    return tmp_path


ALERT = "gpu-throttle-alert"
CASES = {
    "nothing tells": ({}, {}, {}, None),
    "x86, cool": ({"cpu/cpu0/thermal_throttle/core_throttle_count": "7\n",
                   "cpu/cpu1/thermal_throttle/core_throttle_count": "5\n"}, {},
                  {"core_throttle_count": 12}, False),
    "x86, hot": ({"cpu/cpu0/thermal_throttle/core_throttle_count": "7\n"},
                 {"cpu/cpu0/thermal_throttle/core_throttle_count": "9\n"},
                 {"core_throttle_count": 9}, True),
    "a Jetson, cool, its fan turning": (
        {"thermal/cooling_device0/type": "pwm-fan\n", "thermal/cooling_device0/cur_state": "3\n",
         "thermal/cooling_device1/type": f"{ALERT}\n", "thermal/cooling_device1/cur_state": "0\n"},
        {}, {ALERT: 0}, False),
    "a Jetson, throttled": (
        {"thermal/cooling_device1/type": f"{ALERT}\n", "thermal/cooling_device1/cur_state": "0\n"},
        {"thermal/cooling_device1/cur_state": "1\n"}, {ALERT: 1}, True),
    "a Pi that was throttled long ago": ({"get_throttled": "50000\n"}, {}, {"get_throttled": 0},
                                         False),
    "a Pi with too weak a supply": ({"get_throttled": "0\n"}, {"get_throttled": "50005\n"},
                                    {"get_throttled": 5}, True),
    "a file that says nothing": ({"get_throttled": "\n"}, {}, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_lowered_clock_is_seen(system: Path, case: str) -> None:
    before, change, after, wanted = CASES[case]
    write(system, before)
    first = throttling()
    write(system, change)
    assert throttling() == after
    assert throttled(first, throttling()) is wanted


def test_a_run_during_which_the_clock_was_lowered_is_noisy(system: Path) -> None:
    name = "cpu/cpu0/thermal_throttle/core_throttle_count"
    write(system, {name: "0"})
    calls = count()

    def work() -> None:
        time.sleep(0.002)
        if next(calls) == 40:
            write(system, {name: "1"})

    found = measure({"work": work}, Protocol(warmup_ms=5, seconds=0.1, runs=60))["work"]
    assert found.throttled is True and found.noisy
    assert any("lowered its clock" in remark for remark in found.remarks)


# -- offline, threads


def test_images_a_second_are_all_images_in_all_time() -> None:
    found = offline(np.array([40.0, 40, 40, 120]), 8)  # 32 images in 240 ms
    assert found.images_per_s == pytest.approx(1000 * 32 / 240) and found.batch == 8


@pytest.mark.parametrize(
    ("cores", "wanted"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])],
)
def test_a_sweep_goes_in_powers_of_two_to_all_cores(cores: int, wanted: list[int]) -> None:
    assert sweep_counts(cores) == wanted


@pytest.mark.parametrize(("batches", "shapes"), [(True, [8]), (False, [1] * 8)])
def test_what_takes_no_batch_runs_image_by_image(batches: bool, shapes: list[int]) -> None:
    class Session:
        def __init__(self) -> None:
            self.batches, self.seen = batches, list[int]()

        def run(self, inputs: np.ndarray) -> None:
            self.seen.append(len(inputs))

    session = Session()
    many_at_once(session, np.zeros((1, 3, 4, 6), np.float32))()
    assert session.seen == shapes


def test_a_bench_tells_offline_threads_and_memory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    record = bench(bundle, protocol=QUICK, sweep=True)
    assert json.loads((bundle / "bench.json").read_text()) == json.loads(json.dumps(record))
    many = record["offline"]
    assert many["batch"] == 8 and many["latency"]["runs"] >= 2
    assert many["images_per_s"] == pytest.approx(8000 / many["latency"]["mean_ms"])
    assert [row["threads"] for row in record["threads_sweep"]] == [1, 2]
    assert all(row["median_ms"] > 0 and row["images_per_s"] > 0 for row in record["threads_sweep"])
    memory = record["memory_mb"]
    stored = sum(onnx.numpy_helper.to_array(t).nbytes
                 for t in onnx.load(bundle / "model.onnx").graph.initializer)  # fmt: skip
    assert memory["weights"] == pytest.approx(stored / 1e6, abs=1e-3)
    import psutil

    assert 20 < memory["process_peak"] < psutil.Process().memory_info().rss / 1e6  # no torch in it
    assert 0 < memory["activations"] < 1
    page = report(bundle).page.read_text(encoding="utf-8")
    assert "By number of threads" in page and "images a second, 8 at a time" in page
    code, out, _ = run(capsys, "bench", bundle, "--sweep")
    assert code == 0 and "…" not in out  # nothing cut off where no terminal is
    for words in (
        "p99.9",
        "end_to_end",
        "offline: ",
        "images a second, 8 at a time",
        "weights ",
        "threads",
    ):
        assert words in out


# -- memory


def test_activations_are_those_alive_at_the_worst_step(tmp_path: Path) -> None:
    """image (4x10x10) -> conv+relu -> 16 channels -> conv -> 2 channels; the image is added."""
    rng = np.random.default_rng(0)
    weights = {"w1": (16, 4, 1, 1), "w2": (4, 16, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),  # within the convolution
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Add", ["c", "image"], ["out"]),
    ]
    shape = ["batch", 4, 10, 10]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(rng.normal(size=s).astype("f4"), n)
         for n, s in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    found = model_memory(tmp_path / "m.onnx")
    assert found.weights == 4 * (16 * 4 + 4 * 16)
    assert found.activations == 4 * 100 * (4 + 16 + 4)  # the image, b, and c while b is read


def test_int8_needs_about_a_quarter(tmp_path: Path) -> None:
    export_onnx(tiny_model(), SPEC.example(1), tmp_path / "fp32.onnx")
    images = SPEC.example(2).numpy()
    plan = plan_quant(
        tmp_path / "fp32.onnx", calibrate(tmp_path / "fp32.onnx", lambda: [images], "minmax"), {}
    )
    emit(tmp_path / "fp32.onnx", plan, onnxruntime_x86(), tmp_path / "int8.onnx")
    fp32, int8 = (model_memory(tmp_path / f"{name}.onnx") for name in ("fp32", "int8"))
    assert fp32.activations and int8.activations
    assert 0.2 < int8.weights / fp32.weights < 0.45  # scales and biases stay
    assert 0.2 < int8.activations / fp32.activations < 0.6  # so does the image


# -- the device's own time


def test_an_engine_tells_its_own_time_on_the_gpu(
    device,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    from secateur.bundle.engine_run import EngineSession

    _, cuda = device()
    session = EngineSession(write_bundle(tmp_path))
    session.run(np.zeros((1, 3, 4, 6), np.float32))
    cuda.calls.clear()
    assert session.device_ms() == pytest.approx(1.5)
    assert cuda.calls == [
        *["cudaEventCreate"] * 2, "cudaEventRecord", "cudaEventRecord", "cudaStreamSynchronize",
        "cudaEventElapsedTime",
    ]  # fmt: skip
    session.device_ms()
    assert cuda.calls.count("cudaEventCreate") == 2  # made once
    del session
    gc.collect()
    assert cuda.alive == {}


def test_parts_of_a_run_follow_one_another() -> None:
    assert block_medians(np.arange(90.0), 3) == (14.5, 44.5, 74.5)
