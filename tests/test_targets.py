"""Profiles: every one is valid and sourced, typos are errors, and what code reads adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_run import run
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core.errors import DeviceError
from secateur.devices.target import Target, load_target, target_names
from secateur.devices.version import between, in_series, parse_version, show_version

JETSONS = (
    "jetson-orin-nano-8gb",
    "jetson-orin-nx-16gb",
    "jetson-agx-orin-64gb",
    "jetson-thor-t5000",
)
ORINS = JETSONS[:3]


def written(folder: Path, **changes: Any) -> Path:
    """A root of targets that holds AGX Orin's profile with some keys changed (None: removed)."""
    source = REPOSITORY / "targets" / "jetson-agx-orin-64gb" / "target.yaml"
    profile = yaml.safe_load(source.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = profile
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (folder / "jetson-agx-orin-64gb").mkdir()
    (folder / "jetson-agx-orin-64gb" / "target.yaml").write_text(yaml.safe_dump(profile))
    return folder


def test_everything_known_is_printed_with_whole_addresses(capsys) -> None:
    code, out, _ = run(capsys, "targets", "jetson-orin-nano-8gb")
    target = load_target("jetson-orin-nano-8gb")
    assert code == 0 and "run by tensorrt, checked here with onnxruntime" in out
    for row in target.rows():
        assert f"\n{row.fact}: {row.value}" in out and " ".join(row.source.split()) in out
    rates = {row.fact: row.value for row in target.rows() if row.fact.startswith("dense")}
    assert rates["dense int8"].startswith("TOPS of the GPU alone, without sparsity: 6.69 in 7W")
    assert "16.7 in MAXN_SUPER" in rates["dense fp16"]
    listed = run(capsys, "targets")[1]
    assert all(name in listed for name in target_names())


def refusal(root: Path) -> str:
    with pytest.raises(DeviceError) as caught:
        load_target("jetson-agx-orin-64gb", root)
    return caught.value.message


@pytest.mark.parametrize("name", target_names())
def test_every_profile_is_valid_and_every_line_has_a_source(name: str) -> None:
    target = load_target(name)
    rows = target.rows()
    assert rows
    for row in rows:
        assert row.value.strip() and len(row.source) >= 3, row
        assert not any(word in row.source.lower() for word in ("todo", "example.com", "unknown"))


@pytest.mark.parametrize("name", [*JETSONS, "rtx-pc"])
def test_gpu_targets_build_an_engine_on_the_device(name: str) -> None:
    target = load_target(name)
    assert set(target.builds) == {"onnx", "engine"}
    assert target.engine_runtime == ("tensorrt_rtx" if name == "rtx-pc" else "tensorrt")
    assert target.channel_grid == {"fp32": 8, "fp16": 8, "int8": 32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu__smss": 16}, "gpu.smss"),
        ({"power_modes__0__gpu_hz": 1}, "power_modes.0.gpu_hz"),
        ({"stacks__0__tensort": "10.3"}, "stacks.0.tensort"),
        ({"facts__tensorrt_11__sourc": "x"}, "facts.tensorrt_11.sourc"),
        ({"gpu__source": ""}, "gpu.source"),
        ({"memory__source": None}, "memory.source"),
        ({"gpu__compute_capabilities": ["sm_87"]}, "gpu.compute_capabilities.0"),
        ({"gpu__formats": ["fp15"]}, "gpu.formats.0"),
        ({"cpu__isa": ["i8m"]}, "cpu.isa.0"),
        ({"stacks__0__cuda": "12.6+"}, "stacks.0.cuda"),
        ({"dla__tensorrt": [{"first": "11.4", "last": "10.7"}]}, "comes after"),
        ({"dla__tensorrt": [{}]}, "first, last or both"),
        ({"builds": ["onnx"]}, "engine_runtime"),
        ({"engine_runtime": None}, "engine_runtime"),
        ({"channel_grid": {"fp32": 8, "fp16": 8}}, "channel_grid lacks int8"),
        ({"gpu": None}, "needs the gpu block"),
        ({"stacks__1__l4t": ["36.4.0"]}, "same l4t release"),
        ({"power_modes__1__name": "MAXN"}, "same name"),
        ({"name": "other"}, "says it is 'other'"),
    ],
)
def test_a_typo_or_a_contradiction_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    assert said in refusal(written(tmp_path, **change))


def test_dla_depends_on_the_module_and_on_tensorrt() -> None:
    versions = ("10.3.0", "10.7.1", "10.8.0", "10.16.2", "11.1.0", "11.4.0", "11.4.1")
    cores = {
        target.name: [target.dla_cores(parse_version(each) or ()) for each in versions]
        for target in map(load_target, JETSONS)
    }
    assert cores == {
        "jetson-orin-nano-8gb": [0, 0, 0, 0, 0, 0, 0],
        "jetson-orin-nx-16gb": [2, 2, 0, 0, 0, 0, 0],
        "jetson-agx-orin-64gb": [2, 2, 0, 0, 0, 0, 2],
        "jetson-thor-t5000": [0, 0, 0, 0, 0, 0, 0],
    }


def test_dense_rates_are_the_gpus_alone_and_follow_the_mode() -> None:
    nano, nx, agx = (load_target(name) for name in ORINS)
    # half of the 171 sparse TOPS of AGX Orin's GPU at MAXN; half of Orin Nano's 67
    assert agx.dense_rate("int8", "MAXN") == pytest.approx(171 / 2, rel=0.01)
    assert nano.dense_rate("int8", "MAXN_SUPER") == pytest.approx(67 / 2, rel=0.01)
    # 25 W on Orin NX has more cores and a slower GPU than 40 W; 15 W half the SMs
    assert nx.dense_rate("int8", "25W") == pytest.approx(4.1 * 8 * 0.408)
    assert nx.dense_rate("int8", "15W") == pytest.approx(4.1 * 4 * 0.612)
    for target in (agx, nano, nx):
        for mode in target.power_modes:
            int8, fp16 = (target.dense_rate(kind, mode.name) for kind in ("int8", "fp16"))
            assert int8 == pytest.approx(2 * (fp16 or 0))
    thor = load_target("jetson-thor-t5000")
    assert thor.dense_rate("fp16", "MAXN") == pytest.approx(258.5, rel=0.01)
    assert thor.dense_rate("int8", "MAXN") is None  # no source: not guessed


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DeviceError) as caught:
        load_target("jetson-orin-nano-8gb").dense_rate("int8", "60W")
    assert "60W" in caught.value.message and "MAXN_SUPER" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "l4t", "expected"),
    [
        ("jetson-orin-nano-8gb", "36.4.3", ("6.2", "12.6", "10.3")),
        ("jetson-agx-orin-64gb", "39.2.0", ("7.2", "13.2", "10.16")),
        ("jetson-thor-t5000", "38.2.1", ("7.0", "13.0", "10.13")),
        ("jetson-thor-t5000", "38.4.0", ("7.1", "13.0", "10.13")),
        ("jetson-agx-orin-64gb", "39.2.2", None),  # may have another TensorRT: not guessed
        ("jetson-agx-orin-64gb", "35.4.1", None),
        ("jetson-agx-orin-64gb", "nonsense", None),
        ("rtx-pc", "36.4.3", None),
    ],
)
def test_jetpack_says_tensorrt_and_cuda(
    name: str, l4t: str, expected: tuple[str, str, str] | None
) -> None:
    stack = load_target(name).stack(l4t)
    assert (stack and (stack.jetpack, stack.cuda, stack.tensorrt)) == expected


def test_power_modes_are_known_by_name_and_never_by_id() -> None:
    for name in JETSONS:
        for mode in load_target(name).power_modes:
            assert "id" not in mode.model_dump()
    for name in ORINS:
        target = load_target(name)
        assert target.power_modes[-1].name.startswith("MAXN")
        assert target.power_modes[-1].watts is None  # MAXN has no budget
        for mode in target.power_modes:
            assert target.gpu and target.gpu.sms and target.gpu.max_mhz and target.cpu
            assert (mode.gpu_sms or 1) <= target.gpu.sms
            assert (mode.gpu_mhz or 1) <= target.gpu.max_mhz
            assert (mode.cpu_cores or 1) <= target.cpu.cores
            # a budget is in the mode's name: 25W, MODE_30W
            assert mode.watts is None or mode.name.endswith(f"{mode.watts:g}W")


def test_orin_has_no_int8_matrix_instruction_and_no_fp8() -> None:
    for name in ORINS:
        target = load_target(name)
        assert target.cpu and "i8mm" not in target.cpu.isa and "dotprod" in target.cpu.isa
        assert target.gpu and not {"fp8", "fp4"} & set(target.gpu.formats)
    thor = load_target("jetson-thor-t5000")
    assert thor.gpu and "fp8" in thor.gpu.formats and thor.cpu and "i8mm" in thor.cpu.isa


def test_no_two_targets_claim_one_module() -> None:
    modules = [module for name in target_names() for module in load_target(name).modules]
    assert len(modules) == len(set(modules)) >= 5


def test_the_command_line_shows_typed_facts_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "targets", "jetson-orin-nx-16gb")
    assert code == 0 and "DLA" in output and "JetPack" in output
    code, output, _ = run(capsys, "targets", "jetson-orin-nx-16gb", "--json")
    assert code == 0 and json.loads(output)[0]["dla"]["cores"] == 2


def test_a_target_cannot_be_changed() -> None:
    target: Target = load_target("jetson-thor-t5000")
    with pytest.raises(ValueError, match="frozen"):
        target.threads = 1  # type: ignore[misc]


numbers = st.lists(st.integers(0, 400), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(numbers)
def test_a_version_is_read_as_it_is_shown(version: tuple[int, ...]) -> None:
    text = show_version(version)
    assert parse_version(text) == version
    assert parse_version(f"  {text}-1+cuda12.5 ") == version
    assert in_series(version, version[:1])


@settings(deadline=None)
@given(st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "replace")))
def test_any_text_is_a_version_or_none(text: str) -> None:
    version = parse_version(text)
    assert version is None or version


@settings(deadline=None)
@given(numbers, numbers)
def test_a_range_that_ends_with_a_series_holds_all_of_it(
    last: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    assert between(last + patch, None, last)
    assert not between((*last[:-1], last[-1] + 1), None, last)
    assert between(last, last, None) and between(last + patch, last, last)
