"""Two bundles side by side: what is called faster, slower, worse, and what turns a gate red."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_run import run
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from secateur.bench.compare import ratio_of_medians, take_turns
from secateur.bench.latency import Protocol, block_medians, summarise
from secateur.bundle.read import read_bundle
from secateur.core.files import file_sha256
from secateur.flow.compare import compare

SHORT = Protocol(warmup_ms=5, seconds=0.3, runs=30)


def busy(milliseconds: float) -> Callable[[], None]:
    """A call that takes that long."""

    def call() -> None:
        until = time.perf_counter() + milliseconds / 1000
        while time.perf_counter() < until:
            pass

    return call


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def change_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    manifest = manifest_of(bundle)
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def slowed(bundle: Path, layers: int = 40) -> None:
    """Put convolutions that change nothing before a bundle's model."""
    path = bundle / "model.onnx"
    model = onnx.load(path)
    weight = np.zeros((3, 3, 7, 7), np.float32)
    weight[range(3), range(3), 3, 3] = 1
    model.graph.initializer.append(numpy_helper.from_array(weight, "nothing"))
    source = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = [f"same_{layers}" if name == source else name for name in node.input]
    names = [source, *(f"same_{i + 1}" for i in range(layers))]
    added = [
        helper.make_node("Conv", [before, "nothing"], [after], name=after, pads=[3, 3, 3, 3])
        for before, after in itertools.pairwise(names)
    ]
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)

    def change(manifest: dict) -> None:
        manifest["files"]["model.onnx"]["sha256"] = file_sha256(path)

    change_manifest(bundle, change)


def write_bench(path: Path, ms: float, *, spread: float = 0.02, seed: int = 0, **more) -> Path:
    """A bench.json whose calls took about ``ms``."""
    samples = ms * np.exp(spread * np.random.default_rng(seed).standard_normal(600))
    row = summarise(samples).to_json()
    record = {
        "device": "local", "target": "x86-64-cpu", "precision": "fp32", "runtime": "onnxruntime",
        "threads": 1, "model_sha256": "0" * 64, "host": {"cpu": "a CPU"},
        "latency": {"host_to_host": row, "end_to_end": row}, **more,
    }  # fmt: skip
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def other(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "other"))


@given(
    medians=st.lists(st.floats(0.1, 100), min_size=2, max_size=40),
    factor=st.floats(0.1, 10),
)
def test_a_scaled_copy_measured_in_turns_has_exactly_that_ratio(
    medians: list[float], factor: float
) -> None:
    a = np.array(medians)
    ratio = ratio_of_medians(a, factor * a, paired=True)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((factor,) * 3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        drift = 1 + 0.2 * np.sin(np.linspace(0, 6, 30))  # of the machine, the same for both
        a, b = (drift * (1 + 0.05 * random.standard_normal(30)) for _ in range(2))
        ratio = ratio_of_medians(a, 1.1 * b, paired=True, seed=seed)
        held += ratio.low <= 1.1 <= ratio.high
    assert held >= 88


def test_measuring_in_turns_sees_through_a_machine_that_slows_down() -> None:
    slope = np.linspace(1, 2, 30)
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal((2, 30))
    a, b = slope * noise[0], 1.08 * slope * noise[1]
    assert ratio_of_medians(a, b, paired=True).verdict == "slower"
    assert ratio_of_medians(a, b, paired=False).verdict == "no difference"


@pytest.mark.parametrize(("ratio", "verdict"), [(0.995, "no difference"), (1.03, "slower")])
def test_what_another_session_might_have_given_is_no_difference(ratio: float, verdict: str) -> None:
    """Two sessions of one file are apart by half a percent, however little their calls vary."""
    a = np.linspace(10.0, 10.001, 30)
    assert ratio_of_medians(a, ratio * a, paired=True).verdict == verdict


def test_a_slower_call_is_found_and_an_equal_one_is_not() -> None:
    slower = ratio_of_medians(*take_turns(busy(0.5), busy(0.75), SHORT), paired=True)
    assert slower.verdict == "slower" and slower.exceeds(5) and not slower.exceeds(90)
    faster = ratio_of_medians(*take_turns(busy(0.75), busy(0.5), SHORT), paired=True)
    assert faster.verdict == "faster" and not faster.exceeds(0)


def test_block_medians_cover_the_run_in_order() -> None:
    samples = np.repeat(np.arange(1.0, 31.0), 5)
    assert block_medians(samples) == tuple(range(1, 31))
    assert len(block_medians(np.ones(7))) == 7


def test_a_bundle_is_no_regression_of_itself(bundle: Path, other: Path) -> None:
    result = compare(bundle, other, threshold=50, protocol=SHORT)
    assert result.regressions == () and result.latency is not None
    assert result.latency.how == "in turns" and 0.5 < result.latency.ratio.value < 2
    changes = {task: row.change_percent for task, row in result.tasks.items()}
    assert changes == {"segmentation": 0, "depth": 0}
    assert all(cost.a == cost.b > 0 for cost in result.costs)


def test_a_planted_slowdown_turns_the_gate_red(capsys, bundle: Path, other: Path) -> None:
    slowed(other)
    code, stdout, _ = run(capsys, "compare", bundle, other)
    assert code == 1 and "B is slower than A beyond the noise (run in turns here)" in stdout
    assert "regression: B is" in stdout
    back = compare(other, bundle, protocol=SHORT)  # the other way round: good news
    assert back.regressions == () and back.latency is not None
    assert back.latency.verdict == "faster"


@pytest.mark.parametrize(("allowed", "red"), [(1, 1), (30, 0)])
def test_a_planted_loss_of_accuracy_turns_the_gate_red(
    bundle: Path, other: Path, allowed: float, red: int
) -> None:
    def change(manifest: dict) -> None:
        manifest["accuracy"]["shipped"]["depth"]["rmse"] *= 1.3

    change_manifest(other, change)
    result = compare(bundle, other, max_drop=allowed, threshold=90, protocol=SHORT)
    metrics = read_bundle(bundle).accuracy.shipped["depth"].values()
    told = sum(value != 0 for value in metrics)  # nothing is relative to 0
    assert result.tasks["depth"].change_percent == pytest.approx(-30 / told)
    assert len(result.regressions) == red


def test_an_accuracy_that_is_no_number_is_a_regression(bundle: Path, other: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["accuracy"]["shipped"]["depth"]["rmse"] = float("nan")

    change_manifest(other, change)
    result = compare(bundle, other, threshold=90, protocol=SHORT)
    assert result.regressions == ("task 'depth' changed by +nan %, allowed -1 %",)


def test_accuracies_on_other_images_are_not_compared(bundle: Path, other: Path) -> None:
    change_manifest(other, lambda manifest: manifest["data"].update(eval="others"))
    result = compare(bundle, other, threshold=90, protocol=SHORT)
    assert result.regressions == () and result.tasks == {}
    assert any("different images" in note for note in result.notes)


def test_two_dates_of_one_bench_are_compared_as_stored(capsys, tmp_path: Path) -> None:
    old = write_bench(tmp_path / "old.json", 10)
    new = write_bench(tmp_path / "new.json", 10.8, seed=1, threads=2)
    code, stdout, _ = run(capsys, "compare", old, new, "--json")
    result = json.loads(stdout)
    assert code == 1 and result["latency"]["how"] == "stored"
    assert result["latency"]["verdict"] == "slower"
    assert "different numbers of threads: A 1, B 2" in result["notes"]
    assert run(capsys, "compare", old, new, "--threshold", "10")[0] == 0


def test_two_devices_are_not_each_others_measure(capsys, tmp_path: Path) -> None:
    old = write_bench(tmp_path / "old.json", 10)
    new = write_bench(tmp_path / "new.json", 20, target="raspberry-pi-5", host={"cpu": "an A76"})
    code, stdout, _ = run(capsys, "compare", old, new, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["latency"] is None and result["regressions"] == []
    assert "latency is not compared: it is of different machines" in result["notes"]


def test_a_task_that_is_gone_is_a_regression(bundle: Path, other: Path) -> None:
    def drop(manifest: dict) -> None:
        manifest["tasks"] = [task for task in manifest["tasks"] if task["name"] != "depth"]
        manifest["accuracy"]["shipped"].pop("depth")

    change_manifest(other, drop)
    assert compare(bundle, other, threshold=90, protocol=SHORT).regressions == ("B lacks depth",)
    assert compare(other, bundle, threshold=90, protocol=SHORT).regressions == ()  # more is no less


def test_a_difference_within_the_noise_is_none(capsys, tmp_path: Path) -> None:
    old = write_bench(tmp_path / "old.json", 10, spread=0.3)
    new = write_bench(tmp_path / "new.json", 10.1, spread=0.3, seed=1)
    code, stdout, _ = run(capsys, "compare", old, new)
    assert code == 0 and "B is no faster, no slower than A beyond the noise" in stdout
    assert "noisy" in stdout


def test_bundles_for_another_machine_are_compared_by_their_benches(
    capsys, bundle: Path, other: Path
) -> None:
    for folder, ms in ((bundle, 10), (other, 8)):
        change_manifest(folder, lambda manifest: manifest.update(device="jetson-orin-nano-8gb"))
        sha = manifest_of(folder)["files"]["model.onnx"]["sha256"]
        write_bench(folder / "bench.json", ms, model_sha256=sha, target="jetson-orin-nano-8gb")
    code, stdout, _ = run(capsys, "compare", bundle, other, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["latency"]["verdict"] == "faster"
    (other / "bench.json").unlink()
    code, stdout, _ = run(capsys, "compare", bundle, other, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["latency"] is None
    assert any("has no bench.json" in note for note in result["notes"])
    write_bench(other / "bench.json", 8)  # of another model
    code, _, stderr = run(capsys, "compare", bundle, other)
    assert code == 2 and "measured on another model" in stderr


def test_a_bench_of_an_older_version_is_said_to_be_one(capsys, tmp_path: Path) -> None:
    new, old = write_bench(tmp_path / "new.json", 10), write_bench(tmp_path / "old.json", 10)
    record = json.loads(old.read_text())
    del record["latency"]["host_to_host"]["block_medians_ms"]
    old.write_text(json.dumps(record))
    code, stdout, _ = run(capsys, "compare", old, new, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["latency"] is None
    assert any("bench it again" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is not JSON"), ("{}", "device: Field required"), ("[]", "valid dictionary")],
)
def test_what_is_no_bench_is_the_users_error(capsys, tmp_path: Path, text: str, says: str) -> None:
    good, bad = write_bench(tmp_path / "good.json", 10), tmp_path / "bad.json"
    bad.write_text(text)
    code, _, stderr = run(capsys, "compare", good, bad)
    assert code == 2 and says in stderr.replace("\n", " ") and "Traceback" not in stderr
    code, _, stderr = run(capsys, "compare", good, tmp_path / "absent")
    assert code == 2 and "is not a bundle" in stderr


def energy(mj: float, error: float = 0.1, **more: object) -> dict[str, object]:
    """What a laptop's bench says of one inference."""
    return {"per_inference_mj": mj, "standard_error_mj": error, "within_noise": False,
            "idle_w": 4.0, "busy_w": 12.0, "inferences": 900, "rounds": 5,
            "meter": "powercap (RAPL)", "covers": ["package-0"], **more}  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "verdict", "regressions"),
    [
        (10.0, 12.0, "more", 1),
        (10.0, 10.4, "more", 0),  # beyond the noise, and within 5 %
        (10.0, 10.2, "no difference", 0),  # less than two errors of 0.14
        (10.0, 8.0, "less", 0),
    ],
)
def test_energy_differs_beyond_its_error_only(
    tmp_path: Path, capsys, a: float, b: float, verdict: str, regressions: int
) -> None:
    first = write_bench(tmp_path / "a.json", 5.0, energy=energy(a))
    second = write_bench(tmp_path / "b.json", 5.0, energy=energy(b))
    result = compare(first, second)
    assert result.energy is not None and result.energy.verdict == verdict
    assert result.energy.standard_error_mj == pytest.approx(0.1 * 2**0.5)
    assert len(result.regressions) == regressions
    code, out, _ = run(capsys, "compare", first, second)
    assert code == regressions and "energy than A beyond the noise" in out
    assert ("B takes 12 mJ per inference, A 10 mJ, allowed 5 % more" in out) == bool(regressions)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"not_measurable": "there is no counter"}, "not measurable where"),
        (None, "says nothing of it; bench it again"),
        (energy(10.0, meter="INA3221 sensors", covers=["VDD_IN"]), "B by INA3221 sensors: VDD_IN"),
        (energy(10.0, covers=["package-0", "package-0 dram"]), "B by powercap (RAPL): package-0, "),
    ],
)
def test_energies_that_are_not_alike_are_not_compared(
    tmp_path: Path, told: dict[str, object] | None, why: str
) -> None:
    more = {} if told is None else {"energy": told}
    first = write_bench(tmp_path / "a.json", 5.0, energy=energy(10.0))
    second = write_bench(tmp_path / "b.json", 5.0, **more)
    result = compare(first, second)
    assert result.energy is None and result.regressions == ()
    (note,) = (n for n in result.notes if n.startswith("energy is not compared"))
    assert why in note


def test_bundles_that_were_benched_tell_their_energy_too(bundle: Path, other: Path) -> None:
    digest = manifest_of(bundle)["files"]["model.onnx"]["sha256"]
    write_bench(bundle / "bench.json", 5.0, model_sha256=digest, energy=energy(10.0))
    write_bench(other / "bench.json", 5.0, model_sha256=digest, energy=energy(9.0))
    result = compare(bundle, other, threshold=50, protocol=SHORT)
    assert result.latency is not None and result.latency.how == "in turns"
    assert result.energy is not None and result.energy.verdict == "less"
    write_bench(other / "bench.json", 5.0, model_sha256="0" * 64, energy=energy(9.0))
    result = compare(bundle, other, threshold=50, protocol=SHORT)
    assert result.energy is None and any("measured on another model" in n for n in result.notes)


def test_an_energy_that_is_no_number_is_refused(tmp_path: Path, capsys) -> None:
    first = write_bench(tmp_path / "a.json", 5.0, energy=energy(float("nan")))
    code, _, err = run(capsys, "compare", first, first)
    assert code == 2 and "energy" in err and "a.json" in err
