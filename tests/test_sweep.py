"""Several budgets side by side, before one is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_run import RECIPE, make_project, run
from secateur.flow.sweep import Point, Sweep


def sweep(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, str, str]:
    return run(capsys, "sweep", folder / "recipe.yaml", "--out", folder / "out", "--cache",
               folder / "cache", *options)  # fmt: skip


def test_each_share_is_the_cut_that_a_build_without_search_and_recovery_makes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = make_project(tmp_path)
    code, stdout, stderr = sweep(capsys, tmp_path, "--macs", "0.4,0.7", "--json")
    assert code == 0, stderr
    parent, mild, deep = json.loads(stdout)["points"]
    assert parent["delta_t"] == 0 and [mild["share"], deep["share"]] == [0.7, 0.4]
    assert parent["macs"] > 0.7 * parent["macs"] >= mild["macs"] > 0.4 * parent["macs"]
    assert 0.4 * parent["macs"] >= deep["macs"] and mild["params"] > deep["params"]
    assert all(point["latency_ms"] > 0 for point in (parent, mild, deep))
    assert json.loads((tmp_path / "out/x86-64-cpu/sweep.json").read_text()) == json.loads(stdout)
    assert (tmp_path / "out/x86-64-cpu/sweep.png").read_bytes().startswith(b"\x89PNG")

    text = RECIPE.replace("search: {tries: 3, images: 8}", "search: false")
    recipe.write_text(text.replace("macs: 0.5", "macs: 0.4").replace("{epochs: 1}", "none"))
    code, stdout, stderr = run(capsys, "build", recipe, "--out", tmp_path / "built", "--cache",
                               tmp_path / "cache", "--json")  # fmt: skip
    assert code == 0, stderr
    (built,) = json.loads(stdout)
    assert built["manifest"]["cost"]["macs"] == deep["macs"]
    assert built["manifest"]["accuracy"]["delta_t"] == pytest.approx(deep["delta_t"], abs=0.2)


def test_what_cannot_be_met_is_told_beside_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_project(tmp_path, RECIPE.replace("kind: depth}", "kind: depth, max_drop: 1000}"))
    code, stdout, stderr = sweep(capsys, tmp_path, "--macs", "0.6,0.0001", "--recover")
    assert code == 0, stderr
    assert "0.0001: " in stdout and "recovered for" in stdout and "0.6" in stdout


@pytest.mark.parametrize("shares", ["0.5,half", "1.5", "0", ""])
def test_what_is_no_share_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shares: str
) -> None:
    make_project(tmp_path)
    code, _, stderr = sweep(capsys, tmp_path, "--macs", shares)
    assert code == 2 and "is no share of the MACs" in stderr


def test_a_folder_that_cannot_be_made_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_project(tmp_path)
    (tmp_path / "out").write_text("a file")
    code, _, stderr = sweep(capsys, tmp_path)
    assert code == 2 and "hint:" in stderr and not (tmp_path / "cache").exists()


def test_the_least_is_the_cheapest_within_every_max_drop() -> None:
    parent = Point(1.0, 100, 10, {}, {"depth": 0.0}, 0.0, (), 0)
    mild = replace(parent, share=0.7, macs=70)
    deep = replace(parent, share=0.4, macs=40, too_low=("depth",))
    assert Sweep("x86-64-cpu", 1, (parent, mild, deep), {}).least == mild
    assert Sweep("x86-64-cpu", 1, (parent, deep), {}).least is None
