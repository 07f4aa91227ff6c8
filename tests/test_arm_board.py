"""An aarch64 board behind a real sshd on loopback: build, copy, run, results back; and dropped."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from arm_board import make_board
from cli_run import make_project, run
from secateur.bench.latency import Protocol
from secateur.bench.profile import Sampling
from secateur.core.errors import ConnectionLost
from secateur.devices.latency_table import load_table
from secateur.flow.remote import bench_on_device, verify_on_device
from secateur.flow.verify import verify
from sshd import Device, need_sshd, started

DEVICE = "ssh://device"
QUICK = Protocol(warmup_ms=5, seconds=0.05, runs=20)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module")
def board(folder: Path) -> Iterator[Device]:
    need_sshd()
    shell = make_board(folder, folder / "userland")
    environment = {"XDG_CACHE_HOME": str(folder / "root/root/.cache")}
    with started(folder, environment, str(shell)) as running:
        yield running


@pytest.fixture(autouse=True)
def _reached(board: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_SSH_CONFIG", str(board.config))


@pytest.fixture(scope="module")
def built(folder: Path) -> Iterator[Path]:
    project = folder / "project"
    project.mkdir()
    recipe = make_project(project)
    subprocess.run(
        [sys.executable, "-m", "secateur", "build", recipe, "--target", "raspberry-pi-5",
         "--out", project / "out", "--cache", project / "cache"],
        check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(project))
        yield project / "out/raspberry-pi-5/fp32"


def test_a_bundle_is_measured_on_the_board_and_the_board_says_what_it_is(
    board: Device, built: Path
) -> None:
    record = bench_on_device(built, DEVICE, lambda _: None, protocol=QUICK)
    assert json.loads(json.dumps(record)) == json.loads((built / "bench.json").read_text())
    assert record["host"]["arch"] == "aarch64" and record["host"]["cpu"] == "Cortex-A76"
    assert record["latency"]["host_to_host"]["runs"] >= 20
    assert record["runtime"].startswith("onnxruntime ") and board.builds() == []


def test_a_verify_that_is_cut_off_is_resumed(
    board: Device, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.flow.remote.MOST_IMAGES", 4)
    begun: list[str] = []

    def breaking(line: str) -> None:
        if line.startswith("running, process"):
            begun.append(line)
            if len(begun) == 2:  # the bundle's own image is done, the first four are not
                for session in psutil.Process(board.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if session.name().startswith("sshd"):
                            session.kill()

    with pytest.raises(ConnectionLost, match="lost"):
        verify_on_device(built, DEVICE, breaking)
    said: list[str] = []
    result, whole = verify_on_device(built, DEVICE, said.append), verify(built)
    assert "an earlier call began this run: following it" in said
    assert result.accuracy is not None and whole.accuracy is not None
    for task, metrics in whole.accuracy.items():
        assert result.accuracy[task] == pytest.approx(metrics, rel=1e-4)
    assert board.builds() == []


def test_a_latency_table_is_measured_on_the_board(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    few = Sampling(rounds=2, batch=3, fewest=1, most=1)
    monkeypatch.setattr("secateur.flow.meters.SAMPLING", few)
    recipe, table = built.parents[2] / "recipe.yaml", tmp_path / "board.json"
    code, out, err = run(capsys, "profile", recipe, "--target", "raspberry-pi-5", "--device",
                         DEVICE, "--out", table, "--json")  # fmt: skip
    assert code == 0, out + err
    found = load_table(table)
    assert (found.unit, found.threads, found.host["arch"]) == ("ms", 4, "aarch64")
    assert json.loads(out)["points"] == sum(map(len, found.points.values())) > 30
    code, out, err = run(capsys, "plan", recipe, "--target", "raspberry-pi-5", "--table", table)
    assert code == 0 and "by the latency table" in out.replace("\n", " ")
