"""Arm CPUs: profiles, the form of int8 by instruction set, and bundles on emulated ones."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_run import make_project, run
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from secateur.core.errors import DeviceError, RuntimeMissing, SecateurError
from secateur.devices.connect import connect
from secateur.devices.emulated import (
    EmulatedConnection,
    asked_cpus,
    cpu_models,
    cpuinfo_text,
    pick_cpu,
)
from secateur.devices.isa import int8_form
from secateur.devices.probe import parse_cpuinfo
from secateur.devices.target import load_target, target_names
from secateur.devices.userland import (
    QEMU_NAMES,
    Userland,
    find_qemu,
    prepare_userland,
    userland_folder,
)

ARM_CPUS = ("graviton3", "jetson-cpu", "raspberry-pi-4", "raspberry-pi-5", "rk3588")
PI_4 = "fp asimd evtstrm crc32 cpuid"
PI_5 = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
GRAVITON_3 = f"{PI_5} sve i8mm bf16"


def cpuinfo(*cores: str) -> str:
    """/proc/cpuinfo of a machine whose cores have these features."""
    return "\n".join(
        f"processor\t: {number}\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        for number, features in enumerate(cores)
    )


# -- profiles


def test_every_arm_cpu_has_a_stand_in_and_a_reason_for_its_precision() -> None:
    able = [name for name in target_names() if load_target(name).stand_in]
    assert able == sorted(ARM_CPUS)
    for name in ARM_CPUS:
        target = load_target(name)
        assert (target.arch, target.accelerator, target.runtime) == (
            "aarch64",
            "cpu",
            "onnxruntime",
        )
        assert target.cpu and target.memory and 1 <= target.threads <= target.cpu.cores
        assert target.facts["default_precision"].value in target.precisions
        assert any(row.fact == "stand-in" and "qemu" in row.value for row in target.rows())


def test_a_profiles_instructions_decide_its_int8() -> None:
    forms = {
        name: int8_form(cpu.isa) for name in ARM_CPUS if (cpu := load_target(name).cpu) is not None
    }
    assert forms == {
        "graviton3": "S8S8", "jetson-cpu": "S8S8", "raspberry-pi-4": "fp32",
        "raspberry-pi-5": "S8S8", "rk3588": "S8S8",
    }  # fmt: skip


@pytest.mark.parametrize("bad", [{"qemu_cpus": []}, {"qemu_cpu": ["max"]}, {"source": ""}])
def test_a_wrong_stand_in_is_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    profile = yaml.safe_load((REPOSITORY / "targets/rk3588/target.yaml").read_text())
    profile["stand_in"] |= bad
    (tmp_path / "rk3588").mkdir()
    (tmp_path / "rk3588" / "target.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(DeviceError, match=f"stand_in.{next(iter(bad))}"):
        load_target("rk3588", tmp_path)


# -- int8 by instruction set


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (cpuinfo(PI_4, PI_4), "fp32"),
        (cpuinfo(PI_5, PI_5), "S8S8"),
        (cpuinfo(GRAVITON_3), "S8S8"),
        (cpuinfo(PI_5, PI_4), "fp32"),  # work moves to the core without dot product, too
        ("processor : 0\nflags : fpu sse4_1 avx2\n", "U8S8"),
        ("processor : 0\nflags : fpu sse4_1\n", "fp32"),
    ],
)
def test_int8_follows_from_what_the_kernel_says(text: str, form: str) -> None:
    found = parse_cpuinfo(text)
    assert found is not None and int8_form(found.isa) == form


@given(
    st.sets(st.sampled_from(["fp16", "bf16", "sve", "sve2", "dotprod", "i8mm"])),
    st.sampled_from(["fp16", "bf16", "sve", "dotprod", "i8mm"]),
)
def test_one_more_instruction_never_takes_int8_away(isa: set[str], more: str) -> None:
    assert int8_form(isa) == "fp32" or int8_form(isa | {more}) == int8_form(isa)


def test_a_cpu_describes_itself_as_linux_would() -> None:
    # MIDR_EL1 of a Cortex-A76 r4p1; asimdhp, fphp and asimddp of AT_HWCAP, i8mm of AT_HWCAP2
    found = parse_cpuinfo(cpuinfo_text(0x414FD0B1, [1 << 9 | 1 << 10 | 1 << 20, 1 << 13]))
    assert found is not None
    assert (found.name, found.isa) == ("Cortex-A76", {"fp16", "dotprod", "i8mm"})


# -- what may be missing, and how it is said


@pytest.fixture
def old_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH whose only programs are an emulator with two CPU models, and a shell."""
    path = tmp_path / "bin" / QEMU_NAMES[0]
    path.parent.mkdir()
    path.write_text("#!/bin/sh\necho Available CPUs:\necho '  cortex-a53'\necho '  max'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


def test_without_an_emulator_the_hint_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeMissing, match="qemu-aarch64") as caught:
        prepare_userland(tmp_path, ["numpy"])
    assert caught.value.hint == "sudo apt install qemu-user"


def test_without_apt_the_hint_names_a_machine_that_has_it(old_qemu: Path, tmp_path: Path) -> None:
    assert find_qemu() == old_qemu
    with pytest.raises(RuntimeMissing, match="apt-get") as caught:
        prepare_userland(tmp_path / "cache", ["numpy"])
    assert "Debian" in caught.value.hint
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half made stays


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here")
def test_without_a_network_apts_own_words_are_passed_on(
    old_qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{old_qemu.parent}:/usr/bin:/bin")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SecateurError) as caught:
        prepare_userland(tmp_path / "cache", ["numpy"])
    if "keyring" not in caught.value.message:  # not a Debian
        assert "Debian's list of packages could not be had: E:" in caught.value.message
        assert "network" in caught.value.hint
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("stamp", ['{"files": {"site/a.py": "0"}, "wheels": {}, "debs": {}}',
                                   "[]", "{", ""])  # fmt: skip
def test_an_altered_cache_is_not_used(old_qemu: Path, tmp_path: Path, stamp: str) -> None:
    folder = userland_folder(tmp_path, ["numpy"])
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "a.py").write_text("changed")
    (folder / "userland.json").write_text(stamp)
    with pytest.raises(DeviceError, match="altered") as caught:
        prepare_userland(tmp_path, ["numpy"])
    assert caught.value.hint.startswith(f"rm -r {folder};")


def test_the_first_model_that_this_qemu_has_stands_in(old_qemu: Path) -> None:
    assert cpu_models(old_qemu) == ["cortex-a53", "max"]
    assert pick_cpu(old_qemu, ("neoverse-v1", "max,sme=off")) == "max,sme=off"
    with pytest.raises(DeviceError, match="cortex-a76") as caught:
        pick_cpu(old_qemu, ("cortex-a76",))
    assert "cortex-a53, max" in caught.value.hint


def test_an_emulated_device_is_named_with_its_cpu() -> None:
    assert asked_cpus("local", []) is None
    assert asked_cpus("emulated", []) == ()
    assert asked_cpus("emulated:cortex-a72", ["max"]) == ("cortex-a72", "max")
    assert asked_cpus("ssh://board", []) is None
    for device, cpus in (("ssh://board", ["max"]), ("emulate", []), ("local", ["max"])):
        with pytest.raises(DeviceError, match=r"no device|emulated"):
            asked_cpus(device, cpus)
    with pytest.raises(DeviceError, match="bundles and nothing else"):
        connect("emulated:max")


# -- the real thing: about a minute, and as long for the userland


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def userland(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Userland:
    """The userland that the command line uses in this test, too."""
    from secateur.flow.emulated import prepared_userland

    monkeypatch.setenv("SECATEUR_CACHE", str(cache))
    try:
        return prepared_userland()
    except SecateurError as error:
        pytest.skip(f"no aarch64 userland here: {error}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("project")
    recipe = make_project(folder)
    subprocess.run(
        [sys.executable, "-m", "secateur", "build", recipe, "--target", "raspberry-pi-5",
         "--out", folder / "out", "--cache", folder / "cache"],
        check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder / "out/raspberry-pi-5/fp32"


@pytest.mark.emulated
@pytest.mark.slow
def test_a_bundles_own_runner_gives_on_arm_what_it_gives_here(
    userland: Userland, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "emulated:cortex-a53", "--cpu", "cortex-a76", "--limit", "2", "--json"]
    code, out, err = run(capsys, "verify", built, *words)
    assert code == 0, out + err
    result = json.loads(out)
    assert result["images"] == 3 and result["skipped"] == ""
    assert [row["cpu"] for row in result["runs"]] == ["cortex-a53", "cortex-a76"]
    assert [row["int8_form"] for row in result["runs"]] == ["fp32", "S8S8"]
    for row in result["runs"]:
        assert set(row["against_here"]) == {"segmentation", "depth"}
        for parity in (*row["against_torch"].values(),
                       *(task["parity"] for task in row["against_here"].values())):  # fmt: skip
            assert parity["max_abs_difference"] <= 1e-4 * parity["output_range"]
        assert row["against_here"]["segmentation"]["same_class"] >= 0.99
        for task, metrics in row["accuracy"].items():
            assert metrics == pytest.approx(result["accuracy_here"][task], abs=1e-3)
    assert result["same_bits"] == {"segmentation": True, "depth": True}


@pytest.mark.emulated
@pytest.mark.slow
def test_what_fails_a_bundle_here_fails_it_on_arm(
    userland: Userland, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data that are not at hand, unless nobody asks for accuracy; a budget that was missed."""
    copy = Path(shutil.copytree(built, tmp_path / "bundle"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"]["eval"] = "of other images"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    words = ["verify", copy, "--device", "emulated:cortex-a76", "--json"]
    code, out, _ = run(capsys, *words)
    assert code == 1 and "only the bundle's own image" in json.loads(out)["skipped"]
    code, out, err = run(capsys, *words, "--no-accuracy")
    assert code == 0, err
    assert json.loads(out)["images"] == 1
    manifest["budgets"]["macs"]["met"] = False
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = run(capsys, *words, "--no-accuracy")
    assert code == 1 and "missed its budget macs" in json.loads(out)["error"]


@pytest.mark.emulated
@pytest.mark.slow
def test_a_bench_counts_instructions_and_never_says_latency(
    userland: Userland, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "bench", built, "--device", "emulated", "--json")
    assert code == 0, out + err
    record = json.loads(out)
    assert record == json.loads((built / "bench-emulated.json").read_text())
    assert record["cpu"] == "cortex-a76"
    assert not any(word in out for word in ("latency", "_ms", "seconds"))
    counts = record["instructions"]
    if "not_available" in counts:
        assert "install" in counts["not_available"] or "plugin" in counts["not_available"]
    else:
        macs = json.loads((built / "manifest.json").read_text())["cost"]["macs"]
        assert macs / 16 < counts["inference"] < counts["cold_start"]
        assert counts["spread"] <= 0.05
    edge = record["edge_runner"]
    assert set(edge["wheels"]) >= {"numpy", "onnxruntime", "opencv-python-headless"}
    assert edge["wheels_mb"] == pytest.approx(
        sum(row["mb"] for row in edge["wheels"].values()), abs=0.5
    )
    assert record["process_peak_memory_mb"] > record["idle_python_peak_memory_mb"] > 0


@pytest.mark.slow
def test_without_a_compiler_counts_are_not_available_and_the_rest_is(
    userland: Userland, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("sh", "env", "sha256sum", userland.qemu.name):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = run(capsys, "bench", built, "--device", "emulated:cortex-a72")
    assert code == 0, out + err
    assert "not available" in out and "peak memory" in out and "onnxruntime" in out
    record = json.loads((built / "bench-emulated.json").read_text())
    assert "gcc" in record["instructions"]["not_available"]
    assert record["process_peak_memory_mb"] > record["idle_python_peak_memory_mb"]


@pytest.mark.emulated
@pytest.mark.slow
def test_an_instruction_that_the_cpu_lacks_is_a_sentence(userland: Userland) -> None:
    sdot = (0x4E829420, 0xD65F03C0)  # sdot v0.4s, v1.16b, v2.16b; ret
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'pipeline/secateur/devices')!r}); "
        f"from on_emulated import execute; execute({sdot}); print('ran')"
    )
    with EmulatedConnection(userland, "cortex-a76") as with_dot_product:
        command = f"exec {with_dot_product.python} -c {shlex.quote(script)}"
        assert with_dot_product.run(command).out == "ran\n"
    with EmulatedConnection(userland, "cortex-a72") as without:
        with pytest.raises(DeviceError, match="instruction that the emulated cortex-a72") as caught:
            without.run(f"exec {without.python} -c {shlex.quote(script)}")
        assert "SIGILL" in caught.value.hint
        facts = without.run(f"exec {without.python} -c 'import os; print(os.uname().machine)'")
        assert facts.out == "aarch64\n"


@pytest.mark.emulated
@pytest.mark.slow
def test_a_bundle_for_another_architecture_is_refused(
    userland: Userland, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"device": "x86-64-cpu"}))
    code, _, err = run(capsys, "verify", bundle, "--device", "emulated")
    assert code == 2 and "is for x86-64-cpu" in err and "raspberry-pi-5" in err
    code, _, err = run(capsys, "bench", built, "--device", "emulated:cortex-a999")
    assert code == 2 and "cortex-a76" in err
    code, _, err = run(capsys, "bench", built, "--device", "emulated", "--sweep")
    assert code == 2 and "leave out --sweep" in err
