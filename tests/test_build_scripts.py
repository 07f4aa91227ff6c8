"""targets/<device>/build.sh: the whole job in one script per device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from secateur.devices.target import target_names

SHARED = REPOSITORY / "targets" / "build.sh"
SCRIPTS = {name: REPOSITORY / "targets" / name / "build.sh" for name in target_names()}


def run(
    script: Path, *arguments: str | Path, venv: Path, folder: Path
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VENV": str(venv)}
    return subprocess.run(
        [script, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture
def echo_venv(tmp_path: Path) -> Path:
    """A venv whose Python prints its arguments, one a line."""
    python = tmp_path / "a venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    return python.parents[1]


def test_every_device_has_the_same_script_and_bash_reads_it() -> None:
    assert len({script.read_text() for script in SCRIPTS.values()}) == 1
    for script in [SHARED, *SCRIPTS.values()]:
        assert os.access(script, os.X_OK), script
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("host", ["", "ssh://me@board:2222"])
def test_a_script_builds_for_its_own_device(
    name: str, host: str, echo_venv: Path, tmp_path: Path
) -> None:
    words = ["a recipe.yaml", host] if host else ["a recipe.yaml"]
    result = run(SCRIPTS[name], *words, venv=echo_venv, folder=tmp_path)
    wanted = ["-m", "secateur", "build", "a recipe.yaml", "--target", name, "--out", "out"]
    assert result.stdout.splitlines() == wanted + (["--device", host] if host else [])
    assert result.returncode == 0


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["a.yaml", "board"], ["a.yaml", "ssh://"], ["a.yaml", "ssh://b", "c"]]
)
def test_wrong_arguments_get_a_usage_line(
    words: list[str], echo_venv: Path, tmp_path: Path
) -> None:
    result = run(SCRIPTS["rtx-pc"], *words, venv=echo_venv, folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "usage: targets/rtx-pc/build.sh RECIPE [ssh://host]\n"


def test_without_a_venv_the_installed_command_is_used_or_one_sentence_says_what_to_do(
    echo_venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    missing = tmp_path / "none"
    result = run(SCRIPTS["rtx-pc"], "a.yaml", venv=missing, folder=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"there is no {missing}" in result.stderr and "`make setup`" in result.stderr
    (echo_venv / "bin" / "python").rename(echo_venv / "bin" / "secateur")
    monkeypatch.setenv("PATH", f"{echo_venv / 'bin'}:/usr/bin:/bin")
    result = run(SCRIPTS["rtx-pc"], "a.yaml", venv=missing, folder=tmp_path)
    assert result.stdout.splitlines()[:2] == ["build", "a.yaml"]


def test_a_failed_build_keeps_its_exit_status_and_its_sentence(tmp_path: Path) -> None:
    venv = Path(sys.prefix)
    result = run(SCRIPTS["x86-64-cpu"], "absent.yaml", venv=venv, folder=tmp_path)
    assert result.returncode == 2 and "absent.yaml" in result.stderr
    assert "Traceback" not in result.stderr


SHORTER = {  # than examples/scenes.yaml: the script is on trial, not the recovery
    "benchmarks/parents": str(REPOSITORY / "benchmarks" / "parents"), "count: 800": "count: 32",
    "split: test}": "split: test, options: {count: 8}}", "epochs: 8": "epochs: 1",
    "images: 256": "images: 16", "budget: {macs: 0.5}": "budget: {macs: 0.9}, images: 16",
    "max_drop: 6}": "max_drop: 90}", "max_drop: 10}": "max_drop: 90}",
}  # fmt: skip


@pytest.mark.slow
def test_the_whole_job_on_this_machine(tmp_path: Path) -> None:
    text = (REPOSITORY / "examples" / "scenes.yaml").read_text()
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "scenes.yaml").write_text(text)
    result = run(SCRIPTS["x86-64-cpu"], "scenes.yaml", venv=Path(sys.prefix), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    bundle = tmp_path / "out" / "x86-64-cpu" / "fp32"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["device"] == "x86-64-cpu" and (bundle / "run.py").is_file()
