"""Devices over ssh: a real sshd on loopback, real keys, real dropped connections."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_run import make_project, run
from conftest import REPOSITORY, SPEC, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from secateur.bundle.engine_device import file_digest
from secateur.bundle.write import write_builder
from secateur.core.errors import BuildError, ConnectionLost, DeviceError
from secateur.devices.connect import connect
from secateur.devices.connection import PipedConnection, clean
from secateur.devices.local import LocalConnection
from secateur.devices.remote_build import EngineRecord, Order, build_engine
from secateur.devices.remote_job import Job, follow_job
from secateur.devices.remote_probe import PythonFacts, check_python, probe, probe_python
from secateur.devices.ssh import SshAddress, SshConnection, parse_address
from secateur.lower.export import export_onnx
from sshd import Device, make_key, need_sshd, started
from test_build_scripts import SHORTER

# Stands in for build_engine.py, which the slow test runs: waits for a gate, keeps a journal.
BUILDER = """\
import hashlib, json, os, sys, time
from pathlib import Path
here, journal, gate = Path(__file__).parent, Path(os.environ["JOURNAL"]), Path(os.environ["GATE"])
sha = lambda name: hashlib.sha256((here / name).read_bytes()).hexdigest()
def note(what):
    with journal.open("a") as file: file.write(what + " " + sha("model.onnx")[:8] + "\\n")
note("begin")
print("parsing\\x1b[2J")
while not gate.exists(): time.sleep(0.02)
(here / "model.engine").write_bytes(b"engine of " + (here / "model.onnx").read_bytes())
(here / "layers.json").write_text("{}")
record = {"schema_version": 1, "device": {"runtime": "tensorrt_rtx"}, "options": {}, "layers": 1,
          "files": {name: sha(name) for name in ("model.onnx", "model.engine")},
          "bytes": (here / "model.engine").stat().st_size, "layers_of": "network",
          "seconds": {"build": 0.3}, "created": "now"}
#TRICK
(here / "engine.json").write_text(json.dumps(record))
note("end")
"""


def environment(folder: Path, python: str = sys.executable, rtx: bool = True) -> dict[str, str]:
    """What commands on the device see: this Python as python3, with or without TensorRT-RTX."""
    for name in ("bin", "cache", "home", "modules", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    script = folder / "bin" / "python3"
    script.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    script.chmod(0o755)
    if rtx:
        (folder / "modules" / "tensorrt_rtx.py").write_text("__version__ = '1.7.1.116'\n")
    return {
        "PATH": f"{folder}/bin:/usr/bin:/bin", "PYTHONPATH": f"{folder}/modules",
        "HOME": f"{folder}/home", "XDG_CACHE_HOME": f"{folder}/cache", "TMPDIR": f"{folder}/tmp",
        "JOURNAL": f"{folder}/journal", "GATE": f"{folder}/gate",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


@pytest.fixture
def device(tmp_path: Path, monkeypatch) -> Iterator[Device]:
    need_sshd()
    with started(tmp_path, environment(tmp_path)) as running:
        monkeypatch.setenv("SECATEUR_SSH_CONFIG", str(running.config))
        yield running


def order(folder: Path, model: bytes = b"a model", trick: str = "") -> Order:
    """A bundle's files with the builder that stands in."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    (folder / "build_engine.py").write_text(BUILDER.replace("#TRICK", trick))
    names = ("model.onnx", "build_engine.py")
    return Order({name: folder / name for name in names}, "tensorrt_rtx")


class Call(threading.Thread):
    """A build from a thread; ``said`` are its lines, ``result`` the record or the error."""

    def __init__(self, ordered: Order, into: Path, address: str = "ssh://device") -> None:
        super().__init__()
        self.ordered, self.into = ordered, into
        self.connection = connect(address)
        self.said: list[str] = []
        self.result: EngineRecord | DeviceError | BuildError | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.connection as connection:
                self.result = build_engine(connection, self.ordered, self.into, self.said.append)
        except (DeviceError, BuildError) as error:
            self.result = error

    def wait_until_said(self, words: str) -> None:
        wait_until(lambda: self.result is not None or any(words in line for line in self.said))
        assert any(words in line for line in self.said), (self.said, self.result)

    def ended(self) -> EngineRecord | DeviceError | BuildError | None:
        self.join(60)
        assert not self.is_alive()
        return self.result


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_ssh(connection: PipedConnection) -> None:
    """Kill the clients of a connection and the master that they share."""
    assert isinstance(connection, SshConnection)
    ours = str(connection._socket)
    found = [each for each in psutil.process_iter(["cmdline"])
             if any(ours in word for word in each.info["cmdline"] or ())]  # fmt: skip
    assert found
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def check_brought(folder: Path, record: Any) -> None:
    assert isinstance(record, EngineRecord), record
    assert json.loads((folder / "engine.json").read_text()) == record.model_dump()
    for name in ("model.onnx", "model.engine"):
        assert file_digest(folder / name) == record.files[name]
    assert not list(folder.glob(".*"))


# -- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://orin", SshAddress("orin")),
        ("ssh://Orin-Nano", SshAddress("Orin-Nano")),
        ("ssh://me@10.0.0.7:2222/", SshAddress("10.0.0.7", "me", 2222)),
        ("ssh://[fe80::1]:22", SshAddress("fe80::1", None, 22)),
        ("ssh://pi?python=~/trt/bin/python", SshAddress("pi", python="~/trt/bin/python")),
    ],
)
def test_addresses(text: str, address: SshAddress) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)).host == address.host


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ssh://me:secret@host", "passwords are never used"),
        ("ssh://-oProxyCommand=reboot", "no address"),
        ("ssh://-oProxyCommand=reboot@host", "no address"),
        ("ssh://host:99999", "no address"),
        ("ssh://host/path", "no address"),
        ("ssh://host?pyhton=x", "no address"),
        ("ssh://", "no address"),
        ("ssh:host", "no address"),
        ("host", "no device"),
    ],
)
def test_what_is_no_address_is_refused_before_anything_runs(text: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said) as stop:
        connect(text)
    assert "secret" not in str(stop.value)


@given(st.text(max_size=30))
def test_no_text_becomes_an_option_of_ssh(text: str) -> None:
    try:
        address = parse_address(f"ssh://{text}")
    except DeviceError:
        return
    assert not any(name.startswith("-") for name in (address.host, address.user or "x"))


@given(st.text())
def test_a_devices_text_cannot_steer_a_terminal(text: str) -> None:
    assert clean(text).isprintable()


# -- what a device is


def test_a_probe_over_ssh_is_the_probe_from_here(device: Device) -> None:
    with connect("ssh://device") as connection:
        there, python = probe(connection), probe_python(connection)
    here = probe(LocalConnection())
    assert (there.arch, there.cpu, there.memory_total) == (here.arch, here.cpu, here.memory_total)
    assert there.arch == os.uname().machine and there.memory_total and there.cpu
    assert python.modules == {"tensorrt": None, "tensorrt_rtx": "1.7.1.116"}
    assert python.free and python.version == sys.version.split()[0]


def test_doctor_prints_the_probe(device: Device, capsys) -> None:
    code, out, _ = run(capsys, "doctor", "--device", "ssh://device", "--json")
    found = json.loads(out)
    assert code == 0 and found["arch"] == os.uname().machine and found["target"] is None
    assert found["python"]["modules"]["tensorrt_rtx"] == "1.7.1.116"
    code, out, _ = run(capsys, "doctor", "--device", "ssh://device?python=/none", "--json")
    assert code == 0 and "has no /none that runs" in json.loads(out)["python_problem"]
    assert "unknown" in run(capsys, "doctor", "--device", "ssh://device")[1]


def test_commands_share_one_connection_that_ends_with_us(device: Device) -> None:
    connection = connect("ssh://device")
    with connection:
        words = 'it\'s "$HOME" `x`'
        assert connection.run(f"printf %s {json.dumps('a')}; exit 7").code == 7
        assert connection.run("cat <<'E'\n" + words + "\nE").out.endswith(words + "\n")
        with pytest.raises(DeviceError, match="no answer to `sleep 9` within 1 s"):
            connection.run("sleep 9", seconds=1)
        socket = connection._socket  # type: ignore[attr-defined]
        assert socket.exists()
    assert not socket.parent.exists()
    log = (device.config.parent / "sshd.log").read_text()
    assert log.count("Accepted publickey") == 1


# -- who may not in


def refused(said: str, advice: str) -> None:
    with connect("ssh://device") as connection, pytest.raises(ConnectionLost, match=said) as stop:
        connection.run("true")
    assert advice in stop.value.hint and "\n" not in str(stop.value)


def test_no_key(device: Device) -> None:
    make_key(device.config.parent / "another")
    device.rewrite("/id\n", "/another\n")
    refused("ssh://device accepts none of your keys", "ssh-copy-id")


def test_a_wrong_host_key(device: Device) -> None:
    public = make_key(device.config.parent / "another")
    (device.config.parent / "known_hosts").write_text(f"device {public}\n")
    refused("another device answers there", "ssh-keygen -R")


def test_an_unknown_host(device: Device) -> None:
    (device.config.parent / "known_hosts").write_text("")
    refused("known_hosts has no host key of it", f"ssh -F {device.config} device")
    device.rewrite("HostName 127.0.0.1", "HostName no-such-host.invalid")
    refused("there is no host by the name of ssh://device", "check the name")


def test_nobody_listens(device: Device) -> None:
    device.process.kill()
    device.process.wait()
    refused("refuses connections", "sshd runs there")


def test_a_broken_configuration(device: Device) -> None:
    device.rewrite(" IdentitiesOnly yes", " IdentitiesOnlyy yes")
    refused("your ssh configuration cannot be used", "mend that file")


# -- copying


def test_a_copy_that_was_cut_is_continued(device: Device, tmp_path: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(os.urandom(12 << 20))
    small.write_bytes(b"small")
    files = {"small.json": small, "big.bin": big}
    connection = connect("ssh://device")

    def cut(done: int, total: int) -> None:
        assert total == (12 << 20) + 5
        if done > 6 << 20:
            kill_ssh(connection)

    with connection, pytest.raises(ConnectionLost, match="lost") as stop:
        connection.put(files, "abc", cut)
    assert "run the same command again" in stop.value.hint
    with connect("ssh://device") as connection:
        rest = connection.put(files, "abc")
        assert 0 < rest < 10 << 20  # the pipes' contents are lost, not more
        there = device.cache / "secateur/builds/abc"
        assert (there / "big.bin").read_bytes() == big.read_bytes()
        assert connection.put(files, "abc") == 0
        small.write_bytes(b"SMALL")
        assert connection.put(files, "abc") == 5
        (there / "big.bin.part").write_bytes(b"of another file")
        big.write_bytes(b"anew" * 100)
        assert connection.put(files, "abc") == 400


def test_what_is_brought_is_bounded_and_checked(device: Device, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(1 << 20))
    digest = file_digest(source)
    with connect("ssh://device") as connection:
        connection.put({"file": source}, "abc")
        (tmp_path / f".target.part-{digest[:16]}").write_bytes(source.read_bytes()[:1000])
        connection.get("abc", "file", target, digest, 1 << 20)
        assert target.read_bytes() == source.read_bytes()
        for name, sha256, limit, said in (
            ("file", digest, 1000, "at most 1,000 bytes"),
            ("file", "0" * 64, 1 << 20, "other bytes than it was announced with"),
            ("gone", digest, 1 << 20, "No such file"),
            ("../abc/file", digest, 1 << 20, "refused"),
        ):
            with pytest.raises(DeviceError, match=said):
                connection.get("abc", name, target, sha256, limit)
    assert sorted(path.name for path in tmp_path.glob("*target*")) == ["target"]


# -- building


@pytest.mark.parametrize("old", [False, True])
def test_a_build(device: Device, tmp_path: Path, old: bool) -> None:
    if old:  # all that runs on the device must run on Python 3.8
        environment(tmp_path, python=python_of("3.8"))
    (tmp_path / "gate").touch()
    call = Call(order(tmp_path / "bundle"), tmp_path / "bundle")
    check_brought(tmp_path / "bundle", call.ended())
    assert "parsing [2J" in call.said  # its output, without what would clear the screen
    assert list(device.cache.iterdir()) == []  # cleaned up


def test_a_build_survives_its_caller(device: Device, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    first = Call(order(bundle), bundle)
    first.wait_until_said("parsing")
    kill_ssh(first.connection)
    lost = first.ended()
    assert isinstance(lost, ConnectionLost) and "run the same command again" in lost.hint
    second = Call(order(bundle), bundle)
    second.wait_until_said("an earlier call began this build")
    second.wait_until_said("parsing")
    (tmp_path / "gate").touch()
    check_brought(bundle, second.ended())
    assert [line.split()[0] for line in journal(tmp_path)] == ["begin", "end"]
    assert device.builds() == []


def test_a_build_that_ended_meanwhile_is_brought(device: Device, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    first = Call(order(bundle), bundle)
    first.wait_until_said("parsing")
    kill_ssh(first.connection)
    first.ended()
    (tmp_path / "gate").touch()
    (folder,) = device.builds()
    wait_until((folder / "job.json").exists)
    check_brought(bundle, Call(order(bundle), bundle).ended())
    assert len(journal(tmp_path)) == 2 and device.builds() == []


def test_a_build_that_nobody_wants_is_ended(device: Device, tmp_path: Path, capsys) -> None:
    bundle = tmp_path / "bundle"
    first = Call(order(bundle), bundle)
    first.wait_until_said("parsing")
    kill_ssh(first.connection)
    first.ended()
    (program,) = [each for each in psutil.process_iter(["cmdline"])
                  if "build_engine.py" in (each.info["cmdline"] or ())]  # fmt: skip
    doctor = ("doctor", "--device", "ssh://device", "--json")
    (job,) = json.loads(run(capsys, *doctor)[1])["python"]["jobs"]
    assert [folder.name for folder in device.builds()] == [job]
    code, out, _ = run(capsys, *doctor, "--stop")
    report = json.loads(out)
    assert code == 0 and report["stopped"] == [job] and report["python"]["jobs"] == []
    assert device.builds() == [] and has_ended(program)
    assert json.loads(run(capsys, *doctor, "--stop")[1])["stopped"] == []
    (tmp_path / "gate").touch()
    check_brought(bundle, Call(order(bundle), bundle).ended())


def has_ended(program: psutil.Process) -> bool:
    """Whether it runs no more: where nobody reaps it (a container), a zombie is left."""
    try:
        return program.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_who_stops_waiting_hears_how_to_end_the_build(tmp_path: Path, capsys) -> None:
    class Stopped(LocalConnection):
        def ask(self, verb: str, **arguments: Any) -> Iterator[dict[str, Any]]:
            yield {"line": "parsing"}
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        follow_job(Stopped(), Job("x", {}, [], "build", BuildError), said.append)
    hint = "the build goes on there; to end it: secateur doctor --device 'local' --stop"
    assert said[-1] == hint
    code, _, err = run(capsys, "doctor", "--stop")
    assert code == 2 and "name it with --device" in err


def test_two_builds_on_one_device_take_turns(device: Device, tmp_path: Path) -> None:
    calls = [Call(order(tmp_path / name, name.encode()), tmp_path / name) for name in ("a", "b")]
    wait_until(lambda: any("waiting: another job" in line for c in calls for line in c.said))
    (tmp_path / "gate").touch()
    for call in calls:
        check_brought(call.into, call.ended())
    lines = [line.split() for line in journal(tmp_path)]
    assert [word for word, _ in lines] == ["begin", "end", "begin", "end"]
    assert lines[0][1] == lines[1][1] != lines[2][1] == lines[3][1]


def journal(folder: Path) -> list[str]:
    return (folder / "journal").read_text().splitlines()


@pytest.mark.parametrize(
    ("trick", "kind", "said"),
    [
        ("print('error: memory ran out', file=sys.stderr); sys.exit(2)", BuildError,
         "this machine: memory ran out"),
        ("os.kill(os.getpid(), 9)", BuildError, "killed by signal 9, as happens when memory"),
        ("os.kill(os.getppid(), 9); sys.exit(0)", BuildError, "stopped there before it ended"),
        ("record['files']['model.onnx'] = '0' * 64", DeviceError, "the ONNX file is 000"),
        ("record['files']['model.engine'] = '0' * 64", DeviceError, "model.engine is 000"),
        ("record['bytes'] += 1", DeviceError, "bytes is"),
        ("record['device']['runtime'] = 'tensorrt'", DeviceError, "runtime is tensorrt in its"),
        ("record['schema_version'] = 2", DeviceError, "not valid: schema_version"),
        ("record['extra'] = 2", DeviceError, "not valid: extra"),
        ("record = ['[' * 99999]; json.dumps = lambda r: r[0]", DeviceError, "not valid"),
        ("(here / 'model.engine').unlink()", DeviceError, "model.engine is"),
        ("(here / 'engine.json').symlink_to('/etc/passwd'); sys.exit(0)", DeviceError, "not valid"),
        ("json.dumps = lambda r: ' ' * (2 << 20)", DeviceError, "at most 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_what_a_device_sends_is_not_believed(
    tmp_path: Path, monkeypatch, trick: str, kind: type, said: str
) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    bundle = tmp_path / "bundle"
    (tmp_path / "gate").touch()
    with pytest.raises(kind, match=re.escape(said)):
        build_engine(LocalConnection(), order(bundle, trick=trick), bundle, print)
    assert sorted(path.name for path in bundle.iterdir()) == ["build_engine.py", "model.onnx"]
    assert list((tmp_path / "cache").iterdir()) == []


# -- what devices lack


def python_of(version: str) -> str:
    """A real interpreter of an old version; the test is skipped where there is none."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [
        *sorted(root.glob(f"versions/{version}.*/bin/python3")),
        shutil.which(f"python{version}"),
    ]
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(path)
    pytest.skip(f"no Python {version} here")


def test_no_tensorrt_is_said_before_the_long_work(device: Device, tmp_path: Path, capsys) -> None:
    environment(tmp_path, python=sys._base_executable)  # our own may have the real one
    (tmp_path / "modules" / "tensorrt_rtx.py").unlink()
    recipe = make_project(tmp_path)
    words = ("build", recipe, "--target", "rtx-pc", "--device", "ssh://device", "--out", tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 2
    assert "has no tensorrt_rtx" in err and "pip install tensorrt-rtx" in err
    assert not (tmp_path / "rtx-pc").exists()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("3.8", r"Python 3\.8.*has no tensorrt.*install JetPack 6.1 or later"),
        ("3.7", r"has only Python 3\.7.*3\.8 is needed"),
        ("3.6", r"has only Python 3\.6.*3\.8 is needed"),
    ],
)
def test_only_an_old_python(device: Device, tmp_path: Path, version: str, said: str) -> None:
    environment(tmp_path, python=python_of(version))
    with connect("ssh://device") as connection, pytest.raises(DeviceError, match=said) as stop:
        check_python(probe_python(connection), connection.name, "tensorrt")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("wanted", "modules", "said"),
    [
        ("tensorrt", {"tensorrt": "10.3.0.30", "tensorrt_rtx": None}, None),
        ("tensorrt", {"tensorrt": "8.5.2.2", "tensorrt_rtx": None}, "TensorRT 8.5.2.2, 10.3"),
        ("tensorrt", {"tensorrt": None, "tensorrt_rtx": "1.5"}, "no tensorrt"),
        ("tensorrt_rtx", {"tensorrt": "10.3", "tensorrt_rtx": "1.5"}, "both tensorrt and"),
        ("tensorrt_rtx", {"tensorrt": None, "tensorrt_rtx": "1.5"}, None),
    ],
)
def test_the_builder_finds_the_tensorrt_wanted(
    wanted: str, modules: dict[str, str | None], said: str | None
) -> None:
    python = PythonFacts("3.10.12", "/usr/bin/python3", modules, 1 << 30)
    if said is None:
        check_python(python, "ssh://orin", wanted)
        return
    with pytest.raises(DeviceError, match=said):
        check_python(python, "ssh://orin", wanted)


def test_a_device_of_another_target_is_named(device: Device, tmp_path: Path, capsys) -> None:
    recipe = make_project(tmp_path)
    for target, said in (
        ("jetson-orin-nano-8gb", f"its processor is {os.uname().machine}, expected aarch64"),
        ("raspberry-pi-5", "its processor is x86_64, expected aarch64"),
    ):
        code, _, err = run(capsys, "build", recipe, "--target", target, "--device", "ssh://device")
        assert code == 2 and said in err


@pytest.fixture
def small_disk(device: Device) -> Iterator[Path]:
    """3 MiB for all that the device keeps."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", device.cache]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield device.cache
    subprocess.run(["umount", device.cache], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    bundle, filler = tmp_path / "bundle", small_disk / "filler"
    (tmp_path / "gate").touch()
    much = order(bundle, os.urandom(4 << 20))
    said = str(Call(much, bundle).ended())
    assert "the disk of ssh://device is full" in said and "bytes are needed" in said
    assert list(small_disk.iterdir()) == []

    def fill(_done: int, _total: int) -> None:
        if not filler.exists():  # another program, while the copy runs
            filler.write_bytes(bytes(2 << 20))

    (bundle / "model.onnx").write_bytes(os.urandom(2 << 20))
    with connect("ssh://device") as connection:
        with pytest.raises(DeviceError, match="full: No space left on device"):
            connection.put(much.files, "abc", fill)
        assert not list(small_disk.glob("**/*.part"))
        filler.unlink()
        for _ in connection.ask("remove", folder="abc"):
            pass
    fails = order(bundle, b"x", "(here / 'model.engine').write_bytes(bytes(4 << 20))")
    said = str(Call(fails, bundle).ended())
    assert "is full" in said and "when the build failed" in said
    assert list(small_disk.iterdir()) == []


# -- the real builder


@pytest.fixture
def real_python(tmp_path: Path) -> str:
    """A Python that has TensorRT-RTX itself: this one, or $SECATEUR_TENSORRT_PYTHON."""
    python = os.environ.get("SECATEUR_TENSORRT_PYTHON", sys.executable)
    (tmp_path / "modules" / "tensorrt_rtx.py").unlink(missing_ok=True)
    probed = [python, "-c", "import tensorrt_rtx"]
    if subprocess.run(probed, capture_output=True, check=False).returncode != 0:
        pytest.skip("no tensorrt_rtx in this Python, nor in SECATEUR_TENSORRT_PYTHON")
    return python


def cut_when(device: Device, pattern: str, over: threading.Event) -> None:
    """Kill sshd's side of every connection from when such a file is on the device."""
    while not over.wait(0.01):
        began = list(device.cache.glob(f"secateur/builds/{pattern}"))
        for session in psutil.Process(device.process.pid).children(recursive=True) if began else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if session.name().startswith("sshd"):  # not what it runs
                    session.kill()


def script(recipe: Path, address: str) -> subprocess.CompletedProcess[str]:
    """Run the script of the target rtx-pc beside the recipe, as a user does."""
    return subprocess.run(
        [REPOSITORY / "targets" / "rtx-pc" / "build.sh", recipe, address], cwd=recipe.parent,
        env={**os.environ, "VENV": sys.prefix, "COLUMNS": "200"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def cut_off(device: Device, pattern: str, recipe: Path, address: str) -> str:
    """Run the script while its connection is cut where it matters; return what it said."""
    over = threading.Event()
    breaker = threading.Thread(target=cut_when, args=(device, pattern, over))
    breaker.start()
    result = script(recipe, address)
    over.set()
    breaker.join()
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "the connection to ssh://device was lost" in result.stderr
    return result.stderr


@pytest.mark.slow
def test_the_whole_way_with_the_real_builder(
    device: Device, real_python: str, tmp_path: Path
) -> None:
    """An example to an engine that TensorRT-RTX built on the device, cut off twice and resumed."""
    text = (REPOSITORY / "examples" / "scenes.yaml").read_text()
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    text = text.replace("prune:      {", 'prune:      {sparsity: "2:4", ')
    recipe = tmp_path / "scenes.yaml"
    recipe.write_text(text + "engine: {batch: [1, 2, 4], level: 1}\n")
    address = f"ssh://device?python={real_python}"
    folder = tmp_path / "out" / "rtx-pc" / "fp32"
    said = cut_off(device, "*", recipe, address)  # while files are copied
    assert "had to be copied" not in said and not (folder / "model.engine").exists()
    said = cut_off(device, "*/job.log", recipe, address)  # while the engine is built
    assert "had to be copied" in said and not (folder / "model.engine").exists()
    result = script(recipe, address)
    assert result.returncode in (0, 1), result.stderr  # 1: so short a recovery may not suffice
    assert "an earlier call began this build" in result.stderr
    assert str(Path("out/rtx-pc/fp32/model.engine")) in result.stdout.replace("\n", "")
    resumed = json.loads((folder / "engine.json").read_text())
    for name in ("model.onnx", "model.engine"):
        assert resumed["files"][name] == file_digest(folder / name)
    assert resumed["device"]["runtime"] == "tensorrt_rtx" and resumed["layers"] > 50
    wanted = {"batch": [1, 2, 4], "level": 1, "sparse": True}
    assert {name: resumed["options"][name] for name in wanted} == wanted
    assert device.builds() == []
    layers = (folder / "layers.json").read_text()
    whole = script(recipe, address)  # nobody disturbs this one
    assert whole.returncode == result.returncode, whole.stderr
    assert "an earlier call" not in whole.stderr
    again = json.loads((folder / "engine.json").read_text())
    # TensorRT-RTX numbers what it compiles anew each time: bytes differ, even in number
    changing = dict.fromkeys(("bytes", "created", "files", "seconds"))
    assert {**again, **changing} == {**resumed, **changing}
    assert again["files"]["model.onnx"] == resumed["files"]["model.onnx"]
    assert (folder / "layers.json").read_text() == layers


@pytest.mark.slow
def test_two_real_builds_on_one_device_take_turns(
    device: Device, real_python: str, tmp_path: Path
) -> None:
    orders = []
    for level in (1, 2):
        folder = tmp_path / f"level-{level}"
        folder.mkdir()
        export_onnx(tiny_model(), SPEC.example(2), folder / "model.onnx")
        write_builder(folder, {"level": level})
        orders.append(
            (Order({path.name: path for path in folder.iterdir()}, "tensorrt_rtx"), folder)
        )
    calls = [Call(*order, f"ssh://device?python={real_python}") for order in orders]
    for call, level in zip(calls, (1, 2), strict=True):
        record = call.ended()
        check_brought(call.into, record)
        assert isinstance(record, EngineRecord) and record.options["level"] == level
    assert any("waiting: another job" in line for call in calls for line in call.said)
