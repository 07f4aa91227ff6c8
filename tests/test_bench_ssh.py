"""Bundles measured and verified on a device: a real sshd on loopback, the bundle's own run.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from cli_run import RECIPE, make_project, run
from secateur.bench.latency import Protocol
from secateur.bundle import build_engine
from secateur.core.errors import ConnectionLost, DeviceError, SecateurError, VerifyError
from secateur.core.files import file_sha256
from secateur.devices.connect import connect
from secateur.devices.connection import PipedConnection
from secateur.devices.remote_run import RemoteBundle, Work, bundle_on_device
from secateur.flow.remote import bench_on_device, verify_on_device
from secateur.flow.verify import verify
from sshd import Device, need_sshd, started
from test_run_tensorrt import has_gpu
from test_telemetry import NANO, planted

QUICK = Protocol(warmup_ms=5, seconds=0.05, runs=20)
DEVICE = "ssh://device"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device whose python3 is this one."""
    need_sshd()
    for name in ("bin", "device-cache", "tmp", "modules"):
        (tmp_path / name).mkdir()
    script = tmp_path / "bin" / "python3"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}/modules",
        "HOME": str(tmp_path), "XDG_CACHE_HOME": f"{tmp_path}/device-cache",
        "TMPDIR": f"{tmp_path}/tmp",
    }  # fmt: skip
    with started(tmp_path, environment) as running:
        monkeypatch.setenv("SECATEUR_SSH_CONFIG", str(running.config))
        yield running


def edit_runner(bundle: Path, old: str, new: str) -> None:
    """Change the bundle's run.py, and its digest in the manifest: a device that misbehaves."""
    runner, table = bundle / "run.py", bundle / "manifest.json"
    text = runner.read_text()
    assert old in text
    runner.write_text(text.replace(old, new))
    manifest = json.loads(table.read_text())
    manifest["files"]["run.py"]["sha256"] = file_sha256(runner)
    table.write_text(json.dumps(manifest))


PREDICT = "        return {name: outputs[name] for name in self.names}\n"


def spoil_outputs(bundle: Path, statement: str) -> None:
    """Run a statement on ``outputs`` in the runner's ``predict``."""
    edit_runner(bundle, PREDICT, f"        {statement}\n{PREDICT}")


def left_here(tmp_path: Path) -> list[Path]:
    """What waits on this machine for a call that resumes."""
    return [path for path in tmp_path.glob("cache/on-device/*") if path.is_dir()]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- what comes back


def test_bench_measures_there_by_the_protocol(
    device: Device, bundle: Path, tmp_path: Path, capsys
) -> None:
    code, out, err = run(capsys, "bench", bundle, "--device", DEVICE, "--json")
    record = json.loads(out)
    assert code == 0, err
    assert record == json.loads((bundle / "bench.json").read_text())
    assert record["device"] == DEVICE and record["runtime"].startswith("onnxruntime ")
    rows = record["latency"]
    for row in rows.values():
        assert row["runs"] >= 100 and 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert list(row["percentiles_ms"]) == ["p90", "p95", "p97", "p99", "p99.9"]
        assert len(row["block_medians_ms"]) == 30
    assert rows["end_to_end"]["median_ms"] > rows["host_to_host"]["median_ms"]
    assert record["host"]["arch"] == os.uname().machine and record["host"]["cpu"] != "unknown"
    assert record["versions"]["numpy"] == np.__version__
    assert device.builds() == [] and left_here(tmp_path) == []
    code, out, _ = run(capsys, "compare", bundle / "bench.json", bundle / "bench.json", "--json")
    assert code == 0 and json.loads(out)["latency"]["ratio"]["value"] == 1


def test_a_module_is_watched_while_it_works(
    device: Device, bundle: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The device has the files of an Orin Nano beside its own."""
    root = tmp_path / "module"
    root.mkdir()
    monkeypatch.setattr("secateur.flow.watch.ROOT", str(planted(root, NANO)))
    monkeypatch.setattr("secateur.flow.watch.ROUNDS", 2)
    code, out, err = run(capsys, "bench", bundle, "--device", DEVICE, "--json")
    record = json.loads(out)
    assert code == 0, err
    state = record["telemetry"]
    assert state["before"]["mode"]["name"] == "25W" and state["busy"]["looks"] > 6
    assert state["busy"]["power_w"] == pytest.approx(4.984 * 1.856, abs=1e-3)
    assert state["before"] == state["after"] and "jetson_clocks" in state["notes"][0]
    energy = record["energy"]  # the same at rest as at work
    assert energy["busy_w"] == pytest.approx(energy["idle_w"]) and energy["within_noise"]
    assert energy["covers"] == ["VDD_IN"] and energy["inferences"] > 2


def test_verify_there_is_verify_here(
    device: Device, bundle: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("secateur.flow.remote.MOST_IMAGES", 3)  # 8 images: 3, 3 and 2
    here = asdict(verify(bundle))
    code, out, err = run(capsys, "verify", bundle, "--device", DEVICE, "--json")
    assert code == 0, err
    there = json.loads(out)
    assert (here.pop("device"), there.pop("device")) == ("local", DEVICE)
    assert there["parity"] == json.loads(json.dumps(here["parity"]))
    for task, metrics in here["accuracy"].items():
        assert there["accuracy"][task] == pytest.approx(metrics, rel=1e-6)
    assert there["change"]["per_task"] == pytest.approx(here["change"]["per_task"], abs=1e-4)
    assert device.builds() == [] and left_here(tmp_path) == []
    code, out, _ = run(capsys, "verify", bundle, "--device", DEVICE, "--limit", "2")
    assert code == 0 and "max_drop is judged on all images only" in out.replace("\n", " ")


def test_without_the_data_parity_is_checked_there(device: Device, bundle: Path) -> None:
    table = bundle / "manifest.json"
    manifest = json.loads(table.read_text())
    manifest["data"]["eval"] = "of other images"
    table.write_text(json.dumps(manifest))
    said: list[str] = []
    result = verify_on_device(bundle, DEVICE, said.append)
    assert result.accuracy is None and "not those of the build" in result.skipped
    assert set(result.parity) == {"segmentation", "depth"}


def test_the_bundle_is_copied_once(device: Device, bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr("secateur.flow.remote.MOST_IMAGES", 4)
    said: list[str] = []
    verify_on_device(bundle, DEVICE, said.append)
    copied = [int(line.split(", ")[1].split()[0].replace(",", "")) for line in said
              if "had to be copied" in line]  # fmt: skip
    model = (bundle / "model.onnx").stat().st_size
    assert len(copied) == 3 and copied[0] > model and max(copied[1:]) < model


def test_a_build_with_a_device_chooses_and_measures_there(
    device: Device, tmp_path: Path, capsys, monkeypatch
) -> None:
    """auto compares both runtimes' forms on the device, and the bench of what ships comes back."""
    # Not by "ncnn": benchmarks/ncnn may be found as a package of that name.
    pytest.importorskip("pnnx", reason="ncnn is absent: pip install '.[ncnn]'")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = RECIPE.replace("depth}", "depth, max_drop: 90}").replace("recover:    {epochs: 1}\n", "")
    recipe = make_project(
        tmp_path, f"{text}runtime: auto\nprecision: {{mode: auto, images: 8, guard: false}}\n"
    )
    code, out, err = run(capsys, "build", recipe, "--target", "x86-64-cpu", "--device", DEVICE,
                         "--out", tmp_path / "out", "--json")  # fmt: skip
    assert code in (0, 1), err
    (row,) = json.loads(out)
    choice = row["manifest"]["precision_choice"]
    assert choice["chosen"] == min(choice["median_ms"], key=choice["median_ms"].get)
    assert {name.split()[0] for name in choice["median_ms"]} == {"onnxruntime", "ncnn"}
    assert f"measured on {DEVICE}" in choice["why"]
    runtime, precision = choice["chosen"].split()
    assert (row["manifest"]["runtime"], row["manifest"]["precision"]) == (runtime, precision)
    assert row["measured"]["device"] == DEVICE and device.builds() == []
    assert row["measured"]["runtime"].startswith(f"{runtime} ")


# -- a connection that breaks


def drop(device: Device) -> None:
    """Kill sshd's side of every connection; what runs there goes on."""
    for session in psutil.Process(device.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if session.name().startswith("sshd"):
                session.kill()


def test_a_broken_connection_is_resumed(
    device: Device, bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("secateur.flow.remote.MOST_IMAGES", 4)
    whole, begun = verify(bundle), list[str]()

    def breaking(line: str) -> None:
        if line.startswith("running, process"):
            begun.append(line)
            if len(begun) == 3:  # the bundle's own image, the first four, the last four
                drop(device)

    with pytest.raises(ConnectionLost, match="lost") as stop:
        verify_on_device(bundle, DEVICE, breaking)
    assert "run the same command again" in stop.value.hint
    (desk,) = left_here(tmp_path)
    assert len(list(desk.glob("infer-*"))) == 2  # the bundle's own image, and the first four
    said: list[str] = []
    result = verify_on_device(bundle, DEVICE, said.append)
    assert sum("had to be copied" in line for line in said) == 1  # the last four
    assert result.accuracy is not None and whole.accuracy is not None
    for task, metrics in whole.accuracy.items():
        assert result.accuracy[task] == pytest.approx(metrics, rel=1e-6)
    assert device.builds() == [] and left_here(tmp_path) == []


def test_what_an_earlier_call_began_is_not_taken_for_ours(
    device: Device, bundle: Path, tmp_path: Path
) -> None:
    """A bench is cut off while it runs; the verify that follows gets its own results."""
    gate = tmp_path / "gate"
    edit_runner(
        bundle, "    def decode(self,",
        f"    def decode(self, *given):\n        while not Path({str(gate)!r}).exists(): "
        "time.sleep(0.01)\n        return {}\n\n    def _decode(self,",
    )  # fmt: skip

    def breaking(line: str) -> None:
        if "running, process" in line and list(device.cache.glob("**/image.jpg")):
            drop(device)

    with pytest.raises(ConnectionLost):
        bench_on_device(bundle, DEVICE, breaking, protocol=QUICK)
    gate.touch()
    said: list[str] = []
    result = verify_on_device(bundle, DEVICE, said.append)
    assert result.accuracy is not None and device.builds() == []
    assert "an earlier call began this run: following it" in said


def test_two_calls_for_one_bundle_and_device_do_not_mix(
    device: Device, bundle: Path, tmp_path: Path
) -> None:
    with (
        connect(DEVICE) as connection,
        bundle_on_device(connection, {}, tmp_path / "desk", print),
        pytest.raises(DeviceError, match="another call is at work"),
        bundle_on_device(connection, {}, tmp_path / "desk", print),
    ):
        pass


def test_a_measurement_waits_for_its_turn(device: Device, bundle: Path, tmp_path: Path) -> None:
    """The device's lock is held by another job: nothing is measured beside it."""
    import fcntl

    lock = tmp_path / "tmp" / "secateur-device.lock"
    said: list[str] = []
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        call = threading.Thread(
            target=bench_on_device, args=(bundle, DEVICE, said.append), kwargs={"protocol": QUICK}
        )
        call.start()
        wait_until(lambda: any("waiting: another job runs" in line for line in said))
        time.sleep(0.3)
        assert not any("running, process" in line for line in said)
    call.join(30)
    assert not call.is_alive() and (bundle / "bench.json").exists()


# -- what a device may do wrong


@pytest.mark.parametrize(
    ("statement", "error", "says"),
    [
        ("outputs['depth'][:] = np.nan", VerifyError,
         "task 'depth' gives values on ssh://device that are no finite numbers, in 1 of 1 image"),
        ("outputs['depth'][0, 0, 0, 0] = np.inf", VerifyError, "no finite numbers"),
        ("outputs['depth'] = outputs['depth'] + 0.1", VerifyError, "task 'depth' differs by"),
        ("outputs['depth'] = outputs['depth'][:, :, 1:]", DeviceError,
         r"depth has shape .* the manifest says"),
        ("raise MemoryError()", DeviceError, "ssh://device: MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", DeviceError, "killed by signal 9, as happens when"),
        ("sys.exit(0)", DeviceError, "ended the run without a result"),
    ],
)  # fmt: skip
def test_wrong_outputs_there_are_flagged(
    device: Device, bundle: Path, tmp_path: Path, statement: str, error: type, says: str
) -> None:
    spoil_outputs(bundle, statement)
    with pytest.raises(error, match=says) as stop:
        verify_on_device(bundle, DEVICE, lambda _: None)
    assert "\n" not in str(stop.value)
    assert device.builds() == [] and left_here(tmp_path) == []


def test_what_gives_no_numbers_is_not_measured(device: Device, bundle: Path) -> None:
    spoil_outputs(bundle, "outputs['depth'][:] = np.nan")
    with pytest.raises(VerifyError, match="no finite numbers"):
        bench_on_device(bundle, DEVICE, lambda _: None)
    assert not (bundle / "bench.json").exists()


def test_one_bad_image_of_many_is_not_averaged_away(device: Device, bundle: Path) -> None:
    """The bundle's own image is right, one of the data is not."""
    spoil_outputs(bundle, "Runner.seen = getattr(Runner, 'seen', 0) + 1; "
                          "outputs['segmentation'][0, 0, 0, 0] *= 1 if Runner.seen != 3 else "
                          "float('nan')")  # fmt: skip
    with pytest.raises(VerifyError, match=r"'segmentation' gives values .* in 1 of 8 image"):
        verify_on_device(bundle, DEVICE, lambda _: None)


def told(samples: object, **changes: object) -> str:
    """A text as ``on_bench.latency`` writes it."""
    host = {"cpu": None, "arch": "x", "os": "x", "logical_cores": 1, "memory_gb": 1.0,
            "governor": None, "clock_mhz": None, "temperature_c": None,
            "load_1min": 0.1}  # fmt: skip
    whole = {
        "samples_ms": samples, "phases": [], "offline_ms": [8.0] * 2, "offline_batch": 8,
        "temperature_before_c": None, "temperature_after_c": None, "throttling_before": {},
        "throttling_after": {}, "throttling_offline": {}, "runtime": "x",
        "process_peak_memory_mb": 1.0, "host": host, "versions": {},
    }  # fmt: skip
    return json.dumps({**whole, **changes})


GOOD = {"host_to_host": [1.0] * 20, "end_to_end": [2.0] * 20}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "not valid"),
        ("[]", "not valid"),
        (told({**GOOD, "device_only": []}), "device_only"),
        (told({**GOOD, "end_to_end": [2.0] * 19}), "20 and 19 runs, expected as many of each"),
        (told({"host_to_host": [1.0], "end_to_end": [1.0]}), "at least 20"),
        (told({**GOOD, "host_to_host": [float("nan")] * 20}), "host_to_host.0"),
        (told({**GOOD, "host_to_host": [0.0] * 20}), "greater than 0"),
        (told({**GOOD, "host_to_host": ["1"] * 20}), "valid number"),
        (told(GOOD, runtime="x" * 1000), "runtime"),
        (told(GOOD, extra="\x1b[2J"), "extra"),
        (told(GOOD, phases=[{"phase": "asleep"}]), "phases.0.phase"),
        (told(GOOD, phases=[{"phase": "idle", "seconds": 1.0, "calls": 1, "looks": [
            {"at": 0.1, "files": {"/sys/x": "y" * 201}}]}]), "phases.0.looks.0.files"),
        (told(GOOD, offline_ms=[]), "offline_ms"),
        (told(GOOD, offline_ms=[-1.0]), "offline_ms.0"),
        (told(GOOD, throttling_after={"x": "much"}), "throttling_after"),
        (told(GOOD, process_peak_memory_mb=float("inf")), "process_peak_memory_mb"),
    ],
)  # fmt: skip
def test_a_devices_figures_are_checked(tmp_path: Path, text: str, says: str) -> None:
    class Told(RemoteBundle):
        def perform(self, work: Work) -> Path:
            (tmp_path / "result").write_text(text)
            return tmp_path / "result"

    class Nowhere:
        name = DEVICE

    bundle = Told(Nowhere(), {}, tmp_path, "x", print)  # type: ignore[arg-type]
    work = Work("latency", {"protocol": asdict(QUICK)}, {}, 1000)
    with pytest.raises(DeviceError, match="the latencies from ssh://device are not valid") as stop:
        bundle.latency(work)
    assert says in stop.value.message and stop.value.message.isprintable()


def test_the_figures_that_the_check_above_spoils_are_good(tmp_path: Path) -> None:
    from secateur.devices.remote_run import ToldLatency

    assert ToldLatency.model_validate(json.loads(told(GOOD))).samples_ms.end_to_end == [2.0] * 20


# -- a device that stops answering


def test_a_frozen_device_is_given_up_in_a_sentence(
    device: Device, bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    """Everything on the device stands still, and the connection stays open."""
    monkeypatch.setattr(PipedConnection, "patience", 1.0)
    edit_runner(bundle, "    def predict(self, image):", "    def predict(self, image):\n"
                "        time.sleep(60)")  # fmt: skip
    stopped: list[psutil.Process] = []

    def freeze(line: str) -> None:
        if "running, process" in line:
            for each in psutil.Process(device.process.pid).children(recursive=True):
                if "follow" in each.cmdline():
                    each.suspend()
                    stopped.append(each)

    try:
        with pytest.raises(ConnectionLost, match="stopped answering: nothing came from it for 1 s"):
            verify_on_device(bundle, DEVICE, freeze)
        assert stopped
    finally:
        for each in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        monkeypatch.setattr(PipedConnection, "patience", 30.0)
        for place in device.builds():
            with connect(DEVICE) as connection:
                assert list(connection.ask("stop", folder=place.name)) == [{"stopped": True}]


def test_a_run_that_hangs_is_stopped_there(
    device: Device, bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    """The device answers, the bundle's runner does not come back."""
    from secateur.devices import on_device

    patched = tmp_path / "on_device.py"
    patched.write_text(Path(on_device.__file__).read_text().replace("BEAT = 10.0", "BEAT = 0.2"))
    monkeypatch.setattr(on_device, "__file__", str(patched))
    monkeypatch.setattr("secateur.devices.remote_run.PATIENCE", 1.0)
    edit_runner(bundle, "    def predict(self, image):", "    def predict(self, image):\n"
                "        time.sleep(60)")  # fmt: skip
    with pytest.raises(DeviceError, match="the run has told nothing for 1 s and is given up"):
        verify_on_device(bundle, DEVICE, lambda _: None)
    assert device.builds() == [] and left_here(tmp_path) == []
    assert not [each for each in psutil.process_iter(["cmdline", "cwd"])  # other tests run theirs
                if "on_bench.py" in (each.info["cmdline"] or ())
                and (each.info["cwd"] or "").startswith(str(tmp_path))]  # fmt: skip


# -- what does not fit


def refused(bundle: Path, address: str, says: str, advice: str) -> None:
    for verb in (verify_on_device, bench_on_device):
        with pytest.raises(SecateurError) as stop:
            verb(bundle, address, lambda _: None)
        assert says in stop.value.message and advice in stop.value.hint
        assert "\n" not in str(stop.value)


def change_device(bundle: Path, name: str) -> None:
    table = bundle / "manifest.json"
    table.write_text(json.dumps({**json.loads(table.read_text()), "device": name}))


def test_a_bundle_for_another_architecture(device: Device, bundle: Path) -> None:
    change_device(bundle, "raspberry-pi-5")
    refused(bundle, DEVICE, f"processor is {os.uname().machine}, expected aarch64", "target")


def test_a_bundle_that_has_no_engine_yet(device: Device, bundle: Path) -> None:
    change_device(bundle, "rtx-pc")
    refused(bundle, DEVICE, "has no engine yet", "secateur build RECIPE --target rtx-pc --device")


@pytest.mark.skipif(has_gpu(), reason="for a machine without a GPU")
def test_an_engine_without_a_gpu_ends_in_a_sentence(
    device: Device, bundle: Path, tmp_path: Path
) -> None:
    """A real engine is copied and checked there; what opens it says that CUDA is missing."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    change_device(bundle, "rtx-pc")
    build_engine.build(bundle, None, rtx)
    for verb in (verify_on_device, bench_on_device):
        with pytest.raises(DeviceError, match=r"ssh://device: .*CUDA") as stop:
            verb(bundle, DEVICE, lambda _: None)
        assert "\n" not in str(stop.value)
    assert device.builds() == [] and left_here(tmp_path) == []
    (tmp_path / "modules" / "tensorrt_rtx.py").write_text("raise ImportError('none')\n")
    refused(bundle, DEVICE, "has no tensorrt_rtx", "pip install tensorrt-rtx")
    engine = json.loads((bundle / "engine.json").read_text())
    (bundle / "model.engine").write_bytes(b"altered")
    (tmp_path / "modules" / "tensorrt_rtx.py").unlink()
    refused(bundle, DEVICE, f"{engine['files']['model.engine'][:12]}", "")


def test_a_device_without_the_runtime(device: Device, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "modules" / "onnxruntime.py").write_text("raise ImportError('none')\n")
    refused(bundle, DEVICE, "has no onnxruntime", "-m pip install onnxruntime")
    (tmp_path / "modules" / "cv2.py").write_text("raise ImportError('none')\n")
    refused(bundle, DEVICE, "has no cv2, onnxruntime", "opencv-python-headless onnxruntime")


def test_a_device_that_is_not_there(device: Device, bundle: Path) -> None:
    device.process.kill()
    device.process.wait()
    refused(bundle, DEVICE, "refuses connections", "sshd runs there")
    refused(bundle, "ssh://me:secret@host", "passwords are never used", "ssh-copy-id")


def test_an_altered_bundle_goes_nowhere(device: Device, bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"x")
    refused(bundle, DEVICE, "model.onnx was altered", "copy the bundle again")
    assert device.builds() == []
