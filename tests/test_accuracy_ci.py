"""Intervals of accuracies, and faults that no average may hide."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_run import make_project, run
from conftest import SPEC, TASKS
from secateur.bench import accuracy
from secateur.bench.accuracy import Scores, evaluate, score
from secateur.bench.intervals import Intervals, bootstrap
from secateur.bench.latency import Protocol, measure, summarise
from secateur.bundle.write import PARENT_FILE
from secateur.core import registry
from secateur.core.task import Task
from secateur.data.loading import open_reader
from secateur.flow.measure import bench
from secateur.flow.verify import _parent, verify
from secateur.metrics.delta import delta
from secateur.metrics.kind import kind_of
from test_metrics import SAMPLES

ROOM = Task("room", "room", "classification", "room", classes=4)


def scenes(count: int):
    return open_reader("scenes", ".", "test", count=count, height=32, width=48)


def noisy(seed: int):
    """A model that knows nothing: noise of the right shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"segmentation": (8, 16, 24), "depth": (1, 8, 12), "room": (4,)}

    def predict(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(len(images), *shape, generator=generator)
            for name, shape in shapes.items()
        }

    return predict


def top1(hits: np.ndarray) -> Scores:
    """Scores of a classifier that was right (1) or wrong (0) on each image."""
    sums = np.stack([hits, np.ones_like(hits)], 1).astype(float)
    return Scores({"room": {"top1": 100 * float(hits.mean())}}, {"room": sums})


def interval(scores: Scores, parent: Scores) -> Intervals:
    found = bootstrap([ROOM], scores, parent)
    assert found is not None
    return found


# -- what is summed up


@pytest.mark.parametrize("name", sorted(registry.entries("secateur.metrics")))
def test_sums_are_all_that_a_metric_is_made_of(name: str) -> None:
    output, target = SAMPLES[name]
    kind = kind_of(Task("t", "t", name, "t", classes=3))
    whole, parts, again = kind.evaluator(), [], kind.evaluator()
    whole.update(output, target)
    for i in range(len(target)):
        part = kind.evaluator()
        part.update(output[i : i + 1], target[i : i + 1])
        parts.append(part.sums)
    assert all(each.dtype == torch.float64 and each.any() for each in parts)
    again.sums = torch.stack(parts).sum(0)
    assert again.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_keeping_images_apart_changes_no_figure() -> None:
    reader = scenes(20)
    plain = evaluate(noisy(0), TASKS, reader, SPEC)
    apart = score(noisy(0), TASKS, reader, SPEC, per_image=True)
    assert apart.metrics == plain
    assert {name: len(rows) for name, rows in apart.sums.items()} == dict.fromkeys(plain, 20)
    for task in TASKS:
        evaluator = kind_of(task).evaluator()
        evaluator.sums = torch.from_numpy(apart.sums[task.name].sum(0))
        assert evaluator.compute() == pytest.approx(plain[task.name], rel=1e-6)


def test_many_images_share_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "MOST_UNITS", 6)
    found = score(noisy(0), TASKS, scenes(20), SPEC, per_image=True)
    assert found.sums["room"].shape == (6, 2)
    assert found.sums["room"][:, 1].tolist() == [4, 3, 3, 4, 3, 3]  # images, in order


# -- intervals


def test_the_interval_of_a_share_is_the_binomials() -> None:
    hits = (np.arange(400) < 280).astype(int)
    found = interval(top1(hits), top1(np.ones(400))).metrics["room"]["top1"]
    spread = 1.96 * 100 * math.sqrt(0.7 * 0.3 / 400)
    assert found == pytest.approx((70 - spread, 70 + spread), abs=0.6)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        scores = top1(random.random(100) < 0.6)
        found = bootstrap([ROOM], scores, top1(np.ones(100)), seed)
        assert found is not None
        low, high = found.metrics["room"]["top1"]
        held += low <= 60 <= high
    assert 88 <= held <= 100


def test_drawing_the_parent_alike_tells_more() -> None:
    """Both fail on the same images but for a few: the change is far surer than either figure."""
    parent = np.arange(300) % 3 > 0
    cut = parent.copy()
    cut[1:31:3] = False
    paired = interval(top1(cut), top1(parent))
    alone = interval(top1(cut), Scores(top1(parent).metrics))
    assert (paired.paired, alone.paired) == (True, False)
    assert np.ptp(paired.delta_t) < 0.6 * np.ptp(alone.delta_t)
    assert paired.delta_t[1] < 0  # surely a loss
    assert interval(top1(parent), top1(parent)).delta_t == (0, 0)


def test_intervals_hold_the_figures_they_are_of() -> None:
    reader = scenes(24)
    ours, parent = (score(noisy(seed), TASKS, reader, SPEC, per_image=True) for seed in (1, 2))
    found = bootstrap(TASKS, ours, parent)
    assert found is not None and found == bootstrap(TASKS, ours, parent)
    higher = {task.name: kind_of(task).higher_is_better for task in TASKS}
    change = delta(parent.metrics, ours.metrics, higher)
    assert found.delta_t[0] < change.mean < found.delta_t[1]
    for task, metrics in ours.metrics.items():
        for name, value in metrics.items():
            low, high = found.metrics[task][name]
            assert low <= value <= high, (task, name)
    assert json.loads(json.dumps(found.to_json()))["delta_t"] == list(found.delta_t)


def test_of_a_few_images_nothing_is_said() -> None:
    assert bootstrap([ROOM], top1(np.ones(4)), top1(np.ones(4))) is None
    wrong = Scores({"room": {"top1": math.nan}}, top1(np.ones(9)).sums)
    assert bootstrap([ROOM], wrong, top1(np.ones(9))) is None


def test_verify_and_the_manifest_agree(capsys, bundle: Path) -> None:
    stored = json.loads((bundle / "manifest.json").read_text())["accuracy"]["intervals"]
    code, out, _ = run(capsys, "verify", bundle, "--json")
    result = json.loads(out)
    assert code == 0 and result["intervals"] == stored and stored["paired"] is True
    assert stored["delta_t"][0] <= result["change"]["mean"] <= stored["delta_t"][1]
    assert result["split"] == "8 images of split 'test', scenes"
    out = run(capsys, "verify", bundle)[1]
    assert "accuracy on 8 images of split 'test', scenes" in out
    assert "95 % intervals, images drawn with replacement, parent and cut drawn alike" in out
    part = json.loads(run(capsys, "verify", bundle, "--limit", "6", "--json")[1])
    assert part["partial"] is True and part["change"] != result["change"]
    said = " ".join(run(capsys, "verify", bundle, "--limit", "6")[1].split())
    assert "max_drop is judged on all images only" in said
    assert json.loads(run(capsys, "verify", bundle, "--limit", "2", "--json")[1])[
        "intervals"
    ] is None  # fmt: skip


def test_a_part_of_the_images_is_compared_with_the_same_part_of_the_parents(tmp_path) -> None:
    rows = top1(np.array([0, 1, 1, 1, 1, 0, 0, 0])).sums["room"]
    np.savez(tmp_path / PARENT_FILE, room=rows)
    stated = SimpleNamespace(parent={"room": {"top1": 50.0}})
    manifest = SimpleNamespace(files={PARENT_FILE: None}, accuracy=stated)

    def parent(images: int, part: bool) -> Scores:
        return _parent(tmp_path, manifest, [ROOM], {"room": rows[:images]}, part=part)

    assert parent(8, False).metrics == {"room": {"top1": 50.0}}
    assert parent(4, True).metrics == {"room": {"top1": 75.0}}
    np.testing.assert_array_equal(parent(4, True).sums["room"], rows[:4])
    # Of one image the parent has nothing right, and nothing can be told relative to that.
    assert parent(1, True).metrics == {"room": {"top1": 50.0}} and not parent(1, True).sums


def test_the_report_shows_them(capsys, bundle: Path, tmp_path: Path) -> None:
    intervals = json.loads((bundle / "manifest.json").read_text())["accuracy"]["intervals"]
    code, _, err = run(capsys, "report", bundle.parent, "--out", tmp_path / "report.html")
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert "95 % intervals from drawing images with replacement" in page
    low, high = intervals["metrics"]["segmentation"]["pixel_accuracy"]
    assert f"{low:.2f} to {high:.2f}" in page or f"{low:.4g} to {high:.4g}" in page


# -- faults


def spoiled(seed: int, task: str, image: int):
    """A model whose output of one image has a NaN."""
    predict, seen = noisy(seed), 0

    def wrong(images: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal seen
        outputs = predict(images)
        if seen <= image < seen + len(images):
            outputs[task][image - seen].view(-1)[0] = math.nan
        seen += len(images)
        return outputs

    return wrong


@pytest.mark.parametrize("task", ["segmentation", "depth", "room"])
def test_one_nan_of_many_images_is_no_average(task: str) -> None:
    found = score(spoiled(0, task, 17), TASKS, scenes(20), SPEC)
    assert found.wrong == {task: 1}
    for name, metrics in found.metrics.items():
        assert all(math.isnan(value) == (name == task) for value in metrics.values())


def test_a_wild_keypoint_counts() -> None:
    evaluator = kind_of(Task("k", "k", "keypoints", "k")).evaluator()
    target = torch.tensor([[[0.5, 0.5], [math.nan, math.nan]]])
    evaluator.update(torch.tensor([[math.inf, 0.5, 0.1, 0.1]]), target)
    assert evaluator.compute() == {"mean_error": math.inf, "pck_10": 0}


def test_no_label_is_no_score() -> None:
    """All depths unknown: an error of zero would be perfect."""

    class Unlabelled:
        def __init__(self) -> None:
            self.source = scenes(6)
            self.fingerprint, self.label_names = "x", self.source.label_names

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int):
            sample = self.source[index]
            depth = np.zeros_like(sample.labels["depth"])
            return replace(sample, labels={**sample.labels, "depth": depth})

    found = score(noisy(0), TASKS, Unlabelled(), SPEC)
    assert found.unlabelled == ("depth",)
    assert all(math.isnan(value) for value in found.metrics["depth"].values())
    assert not math.isnan(found.metrics["room"]["top1"])


class Wrong:
    """A runtime whose depth becomes NaN after the first so many images."""

    def __init__(self, session, good: int) -> None:
        self.session, self.good = session, good

    def run(self, images):
        outputs = dict(self.session.run(images))
        outputs["depth"] = outputs["depth"].copy()
        outputs["depth"][max(self.good, 0) :] = np.nan
        self.good -= len(images)
        return outputs


@pytest.fixture
def nan_after(monkeypatch: pytest.MonkeyPatch):
    from secateur.runtimes import onnxruntime

    def spoil(images: int) -> None:
        plain = onnxruntime.OnnxRuntimeSession
        monkeypatch.setattr(
            onnxruntime, "open_session", lambda *given: Wrong(plain(*given), images)
        )

    return spoil


def test_verify_fails_on_nan_wherever_it_is(capsys, bundle: Path, nan_after) -> None:
    nan_after(6)  # the bundle's own image and five of the data are right
    for words in ((), ("--limit", "7")):
        code, _, err = run(capsys, "verify", bundle, *words)
        assert code == 1 and "task 'depth' gives NaN (local), in" in err
        nan_after(6)


def test_bench_measures_no_nan(capsys, bundle: Path, nan_after) -> None:
    nan_after(0)
    code, _, err = run(capsys, "bench", bundle)
    assert code == 1 and "task 'depth' differs by nan" in err
    assert not (bundle / "bench.json").exists()


def test_an_empty_split_stops_the_build(capsys, tmp_path: Path) -> None:
    for name in ("train", "empty"):
        (tmp_path / name / "images").mkdir(parents=True)
    recipe = make_project(tmp_path)
    text = recipe.read_text()
    old = "{reader: scenes, split: test, options: {count: 8, height: 32, width: 48}}"
    assert old in text
    recipe.write_text(text.replace(old, f"{{reader: folder, root: {tmp_path}, split: empty}}"))
    sys.path.insert(0, str(tmp_path))
    try:
        code, _, err = run(capsys, "build", recipe, "--out", tmp_path / "out")
    finally:
        sys.path.remove(str(tmp_path))
    assert code == 2 and "split 'empty' of reader 'folder'" in err and "is empty" in err
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_not_verified_as_good(bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr("secateur.data.scenes.Scenes.__len__", lambda _: 0)
    result = verify(bundle)
    assert result.accuracy is None and "is empty" in result.skipped


def test_what_could_not_be_judged_is_not_green(capsys, bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr("secateur.data.scenes.Scenes.__len__", lambda _: 0)
    code, out, err = run(capsys, "verify", bundle)
    assert code == 1 and "accuracy not checked" in err and "--no-accuracy" in err
    assert "good enough" not in out
    code, out, err = run(capsys, "verify", bundle, "--no-accuracy", "--json")
    assert code == 0 and err == ""
    assert (
        json.loads(out)["accuracy"] is None and "none was asked for" in json.loads(out)["skipped"]
    )


# -- a machine that is busy


@pytest.fixture
def one_core() -> Iterator[int]:
    """This process on one core."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, before)


def test_a_bench_during_which_others_take_the_cpu_says_so(bundle: Path, one_core: int) -> None:
    script = f"import os\nos.sched_setaffinity(0, {{{one_core}}})\nwhile True: pass"
    hogs: list[subprocess.Popen[bytes]] = []
    later = threading.Timer(  # well within the run
        0.7, lambda: hogs.extend(subprocess.Popen([sys.executable, "-c", script]) for _ in range(3))
    )
    later.start()
    try:
        record = bench(bundle, protocol=Protocol(warmup_ms=20, seconds=1, runs=200))
    finally:
        later.join()
        for hog in hogs:
            hog.kill()
            hog.wait()
    written = json.loads((bundle / "bench.json").read_text())
    assert len(hogs) == 3 and written["latency"] == json.loads(json.dumps(record["latency"]))
    row = written["latency"]["host_to_host"]
    assert row["noisy"] and row["max_ms"] > 2 * row["median_ms"]  # told, not averaged away


def test_a_cpu_hogged_mid_run_is_noisy(one_core: int) -> None:
    """A second process takes the core for the last half of the run."""
    hogs: list[subprocess.Popen[bytes]] = []
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        if calls == 100:
            script = f"import os\nos.sched_setaffinity(0, {{{one_core}}})\nwhile True: pass"
            hogs.extend(subprocess.Popen([sys.executable, "-c", script]) for _ in range(3))
            time.sleep(0.3)  # until they run
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    try:
        found = measure({"work": work}, Protocol(warmup_ms=1, seconds=0.1, runs=200))["work"]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert found.noisy and found.coefficient_of_variation > 0.1
    assert found.max_ms > found.min_ms * 2


@pytest.mark.parametrize(("slower", "noisy"), [(1.0, False), (1.05, False), (1.15, True),
                                               (2.0, True)])  # fmt: skip
def test_a_clock_that_changes_mid_run_is_noisy(slower: float, noisy: bool) -> None:
    """The calls hardly vary among themselves; the second half of the run is slower."""
    samples = 1 + 0.02 * np.random.default_rng(0).standard_normal(400)
    samples[200:] *= slower
    assert summarise(samples).noisy is noisy


def test_an_early_stop_needs_a_label_among_the_held_out() -> None:
    """A task without labels there says nothing; without any, nothing can be judged."""
    from types import SimpleNamespace

    from conftest import tiny_model
    from secateur.core.errors import DataError
    from secateur.flow.recovery import _validation

    class Partly:
        """Images whose labels of some tasks are unknown."""

        def __init__(self, unknown: dict[str, float]) -> None:
            self.source, self.unknown = scenes(4), unknown
            self.fingerprint, self.label_names = "x", self.source.label_names

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int):
            sample = self.source[index]
            labels = {name: np.full_like(label, self.unknown[name]) if name in self.unknown
                      else label for name, label in sample.labels.items()}  # fmt: skip
            return replace(sample, labels=labels)

    model = tiny_model()
    job = SimpleNamespace(selected=model, spec=SPEC, tasks=TASKS)
    change = _validation(job, Partly({"depth": 0}))  # type: ignore[arg-type]
    assert change(model) == 0
    everything = Partly({"depth": 0, "segmentation": 255, "room": 255})
    with pytest.raises(DataError, match="none of the 4 held-out images has a label"):
        _validation(job, everything)  # type: ignore[arg-type]
