"""trtexec: one meaning on TensorRT 10 and 11, and its reports read or refused with a reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_run import run
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.bundle.read import read_bundle
from secateur.core.errors import BuildError, DeviceError, SecateurError
from secateur.devices.local import LocalConnection
from secateur.devices.remote_run import bundle_on_device
from secateur.devices.trtexec import Building, Exports, Timing, engine_command, onnx_command
from secateur.devices.trtexec_report import (
    METRICS,
    parse_layers,
    parse_profile,
    parse_summary,
    parse_times,
)
from secateur.flow.second_opinion import asked_opinion, said_of, second_opinion, trtexec_order

ANY = st.binary(max_size=80).map(lambda raw: raw.decode("utf-8", "replace"))
OLD, NEW = (10, 3, 0), (11, 1, 0)
VERSIONS = [OLD, (10, 16, 2, 10), (11, 0, 0), NEW, (11, 4, 1)]


def meaning(words: tuple[str, ...], major: int) -> dict[str, object]:
    """What trtexec makes of a command line, after sampleOptions.cpp of v10.3.0 and of v11.1.

    A flag that this version warns of as deprecated, or does not have, is an error here.
    """
    old = {"--useCudaGraph": ("graph", True), "--useSpinWait": ("spin", True),
           "--noDataTransfers": ("transfers", False), "--separateProfileRun": ("apart", True),
           "--stronglyTyped": ("typed", True)}  # fmt: skip
    new = {"--noCudaGraph": ("graph", False), "--noSpinWait": ("spin", False),
           "--includeDataTransfers": ("transfers", True)}  # fmt: skip
    if major == 10:
        state: dict[str, object] = {"graph": False, "spin": False, "transfers": True,
                                    "apart": False, "typed": False}  # fmt: skip
    else:
        state = {"graph": True, "spin": True, "transfers": False, "apart": True, "typed": True}
    flags = old if major == 10 else new
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if equals:
            state[name] = value
        elif name in flags:
            key, setting = flags[name]
            state[key] = setting
        else:
            assert name in {"--noTF32", "--allowGPUFallback"}, f"{name} is not of {major}.x"
            state[name] = True
    return state


timings = st.builds(
    Timing,
    warm_up_ms=st.integers(0, 5000),
    seconds=st.integers(1, 60),
    runs=st.integers(1, 10_000),
    cuda_graph=st.booleans(),
    spin_wait=st.booleans(),
    transfers=st.booleans(),
)
buildings = st.builds(
    Building,
    save=st.sampled_from([None, "model.engine"]),
    workspace_mib=st.sampled_from([None, 1, 4096]),
    timing_cache=st.sampled_from([None, "timing.cache"]),
    dla_core=st.sampled_from([None, 0, 1]),
    gpu_fallback=st.booleans(),
    sparse=st.booleans(),
    tf32=st.booleans(),
    optimization_level=st.integers(0, 5),
)


@settings(deadline=None, max_examples=60)
@given(timings, buildings, st.booleans())
def test_both_versions_mean_the_same(timing: Timing, building: Building, profile: bool) -> None:
    exports = Exports(profile="profile.json" if profile else None, times="times.json")
    commands = [
        meaning(onnx_command("m.onnx", v, building=building, timing=timing, exports=exports), v[0])
        for v in VERSIONS
    ]
    for each in commands:
        if not profile:
            each.pop("apart")  # means nothing without a profile
        assert each["typed"] is True
        assert each["graph"] is timing.cuda_graph and each["spin"] is timing.spin_wait
        assert each["transfers"] is timing.transfers
        assert each == commands[0]


@settings(deadline=None, max_examples=60)
@given(timings)
def test_timing_an_engine_needs_no_building_words(timing: Timing) -> None:
    commands = [meaning(engine_command("m.engine", v, timing=timing), v[0]) for v in (OLD, NEW)]
    for each in commands:
        for word in ("typed", "apart"):
            each.pop(word)
        assert not {"--sparsity", "--saveEngine", "--onnx"} & set(each)
    assert commands[0] == commands[1]


def test_a_command_in_full() -> None:
    building = Building(
        save="model.engine", workspace_mib=2048, timing_cache="timing.cache",
        shapes={"image": ((1, 3, 288, 384), (4, 3, 288, 384), (8, 3, 288, 384))},
    )  # fmt: skip
    exports = Exports("times.json", "profile.json", "layers.json")
    assert onnx_command("model.onnx", OLD, building=building, exports=exports) == (
        "/usr/src/tensorrt/bin/trtexec", "--onnx=model.onnx", "--stronglyTyped",
        "--saveEngine=model.engine", "--minShapes=image:1x3x288x384",
        "--optShapes=image:4x3x288x384", "--maxShapes=image:8x3x288x384",
        "--memPoolSize=workspace:2048M", "--timingCacheFile=timing.cache", "--sparsity=disable",
        "--builderOptimizationLevel=3", "--profilingVerbosity=detailed",
        "--shapes=image:4x3x288x384", "--warmUp=200", "--duration=3", "--iterations=100",
        "--percentile=50,90,95,97,99,99.9", "--infStreams=1", "--idleTime=0",
        "--useCudaGraph", "--useSpinWait", "--noDataTransfers",
        "--exportTimes=times.json", "--exportProfile=profile.json", "--separateProfileRun",
        "--exportLayerInfo=layers.json",
    )  # fmt: skip
    newer = onnx_command("model.onnx", NEW, building=building, exports=exports)
    assert not {"--stronglyTyped", "--useCudaGraph", "--separateProfileRun"} & set(newer)
    assert "--noCudaGraph" in engine_command("m.engine", NEW, timing=Timing(cuda_graph=False))


@pytest.mark.parametrize("version", [(8, 6, 2), (10, 2, 0), (12, 0), ()])
def test_a_version_whose_defaults_are_unknown_is_refused(version: tuple[int, ...]) -> None:
    with pytest.raises(BuildError, match="is not known"):
        engine_command("m.engine", version)


@pytest.mark.parametrize(
    ("building", "timing", "said"),
    [
        (Building(workspace_mib=0), Timing(), "workspace"),
        (Building(dla_core=-1), Timing(), "DLA"),
        (Building(optimization_level=6), Timing(), "optimization"),
        (Building(shapes={"x": ((2, 3), (1, 3), (4, 3))}), Timing(), "grow"),
        (Building(shapes={"x": ((1, 3), (1, 3), (4,))}), Timing(), "grow"),
        (Building(shapes={"x": ((0, 3), (1, 3), (4, 3))}), Timing(), "no shape"),
        (Building(shapes={"a,b": ((1,), (1,), (1,))}), Timing(), "name"),
        (Building(), Timing(runs=0), "at least one run"),
        (Building(), Timing(percentiles=(101,)), "percentiles"),
        (Building(), Timing(percentiles=()), "percentiles"),
    ],
)
def test_settings_that_are_not_allowed(building: Building, timing: Timing, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        onnx_command("m.onnx", OLD, building=building, timing=timing)


# TensorRT 10.3 (JetPack 6.2, Orin Nano), after sampleReporting.cpp; with transfers
SUMMARY = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --loadEngine=m.engine
[01/20/2025-10:11:12] [I] Warmup completed 38 queries over 200 ms
[01/20/2025-10:11:12] [I] Timing trace has 612 queries over 3.00521 s
[01/20/2025-10:11:12] [I]
[01/20/2025-10:11:12] [I] === Performance summary ===
[01/20/2025-10:11:12] [I] Throughput: 203.65 qps
[01/20/2025-10:11:12] [I] Latency: min = 4.95 ms, max = 6.5 ms, mean = 5.16602 ms, median = 5.13 ms, percentile(90%) = 5.25 ms, percentile(99.9%) = 6.4 ms
[01/20/2025-10:11:12] [I] Enqueue Time: min = 0.011 ms, max = 0.2 ms, mean = 0.02 ms, median = 0.019 ms, percentile(90%) = 0.03 ms, percentile(99.9%) = 0.1 ms
[01/20/2025-10:11:12] [I] H2D Latency: min = 0.15 ms, max = 0.4 ms, mean = 0.2 ms, median = 0.19 ms, percentile(90%) = 0.21 ms, percentile(99.9%) = 0.39 ms
[01/20/2025-10:11:12] [I] GPU Compute Time: min = 4.7 ms, max = 6.1 ms, mean = 4.89 ms, median = 4.86 ms, percentile(90%) = 5 ms, percentile(99.9%) = 6 ms
[01/20/2025-10:11:12] [I] D2H Latency: min = 0.07 ms, max = 0.1 ms, mean = 0.08 ms, median = 8.1e-02 ms, percentile(90%) = 0.09 ms, percentile(99.9%) = 0.1 ms
[01/20/2025-10:11:12] [I] Total Host Walltime: 3.00521 s
[01/20/2025-10:11:12] [I] Total GPU Compute Time: 2.99268 s
[01/20/2025-10:11:12] [W] * GPU compute time is unstable, with coefficient of variance = 3.42%.
[01/20/2025-10:11:12] [V] === Explanations of the performance metrics ===
[01/20/2025-10:11:12] [V] Latency: the summation of H2D Latency, GPU Compute Time, and D2H Latency.
&&&& PASSED TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --loadEngine=m.engine
"""  # noqa: E501


def test_the_summary() -> None:
    read = parse_summary(SUMMARY)
    assert read.version == (10, 3, 0) and read.throughput_qps == 203.65 and read.queries == 612
    assert set(read.times) == set(METRICS)
    gpu = read.times["GPU Compute Time"]
    assert (gpu.min, gpu.max, gpu.mean, gpu.median) == (4.7, 6.1, 4.89, 4.86)
    assert gpu.percentiles == {90: 5, 99.9: 6}
    assert read.times["D2H Latency"].median == 0.081
    assert (read.walltime_s, read.gpu_total_s, read.unstable_percent) == (3.00521, 2.99268, 3.42)
    parts = [read.times[name].mean for name in ("H2D Latency", "GPU Compute Time", "D2H Latency")]
    assert read.times["Latency"].mean == pytest.approx(sum(parts), abs=0.01)


def test_the_summary_keeps_trtexecs_names() -> None:
    row = json.loads(json.dumps(parse_summary(SUMMARY).to_json()))
    assert row["Throughput"] == 203.65
    assert row["GPU Compute Time"]["percentile(99.9%)"] == 6
    assert row["H2D Latency"]["median"] == 0.19


def test_the_summary_without_the_logs_prefix() -> None:
    plain = "\n".join(line.split("] ", 2)[-1] for line in SUMMARY.splitlines())
    assert parse_summary(plain).times == parse_summary(SUMMARY).times


@pytest.mark.parametrize(
    ("printed", "version"),
    [("v110100", (11, 1, 0)), ("v101602", (10, 16, 2)), ("v8602", (8, 6, 2))],
)
def test_the_version_that_ran(printed: str, version: tuple[int, ...]) -> None:
    assert parse_summary(SUMMARY.replace("v100300", printed)).version == version


def test_a_failed_run_quotes_its_first_error() -> None:
    output = (
        "[01/20/2025-10:11:12] [E] Error[10]: Could not find any implementation for node /a/Conv.\n"
        "[01/20/2025-10:11:12] [E] Engine could not be created from network\n"
        "&&&& FAILED TensorRT.trtexec [TensorRT v100300] # trtexec\n"
    )
    with pytest.raises(BuildError, match=r"Error\[10\]: Could not find any implementation"):
        parse_summary(output)
    with pytest.raises(BuildError, match="says no reason"):
        parse_summary("&&&& FAILED TensorRT.trtexec [TensorRT v100300] # trtexec")


@pytest.mark.parametrize("missing", ["Throughput", *METRICS])
def test_a_summary_with_a_line_missing_is_refused(missing: str) -> None:
    kept = [line for line in SUMMARY.splitlines() if f"[I] {missing}: " not in line]
    with pytest.raises(BuildError, match=missing):
        parse_summary("\n".join(kept))


def test_times_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BuildError, match="GPU Compute Time"):
        parse_summary(SUMMARY.replace("min = 4.7 ms", "min = inf ms"))


TIMES = """[
  { "startEnqMs" : 2.67, "endEnqMs" : 2.70, "startH2dMs" : 2.5, "endH2dMs" : 2.6, "startComputeMs" : 2.6, "endComputeMs" : 3.5, "startD2hMs" : 3.5, "endD2hMs" : 3.55, "h2dMs" : 0.1, "computeMs" : 0.9, "d2hMs" : 0.05, "latencyMs" : 1.05 }
, { "startEnqMs" : 3.67, "endEnqMs" : 3.69, "startH2dMs" : 3.5, "endH2dMs" : 3.5, "startComputeMs" : 3.6, "endComputeMs" : 4.4, "startD2hMs" : 4.4, "endD2hMs" : 4.4, "h2dMs" : 0, "computeMs" : 0.8, "d2hMs" : 0, "latencyMs" : 0.8 }
]"""  # noqa: E501


def test_times_of_every_query() -> None:
    first, second = parse_times(TIMES)
    assert first.enqueue == pytest.approx(0.03) and first.compute == 0.9 and first.latency == 1.05
    assert first.h2d + first.compute + first.d2h == pytest.approx(first.latency)
    assert (second.h2d, second.d2h) == (0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TIMES[:-20], "not JSON"),
        ("[]", "no query"),
        ("{}", "not a list"),
        (TIMES.replace('"computeMs" : 0.8', '"computeMs" : NaN'), "query 1, computeMs"),
        (TIMES.replace('"d2hMs" : 0.05, ', ""), "query 0, d2hMs"),
        ("[1]", "query 0"),
    ],
)
def test_times_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        parse_times(text)


PROFILE = """[
  { "count" : 12 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1", "timeMs" : 0.96, "averageMs" : 0.08, "medianMs" : 0.081, "percentage" : 20 }
, { "name" : "Conv_0 + Relu_1", "timeMs" : 3.84, "averageMs" : 0.32, "medianMs" : 0.31, "percentage" : 80 }
, { "name" : "never run", "timeMs" : 0, "averageMs" : 0, "medianMs" : 0, "percentage" : 0 }
]"""  # noqa: E501


def test_the_profile() -> None:
    copy, convolution, never = parse_profile(PROFILE)
    assert copy.name.startswith("Reformatting") and copy.percent == pytest.approx(20)
    assert (convolution.mean, convolution.median) == (0.32, 0.31) and never.percent == 0


@pytest.mark.parametrize("name", ['a "quoted" layer', "back\\slash", "ünïcode", '", "timeMs" : 1'])
def test_layer_names_that_trtexec_does_not_escape(name: str) -> None:
    layers = parse_profile(
        PROFILE.replace('Conv_0 + Relu_1", "timeMs" : 3', f'{name}", "timeMs" : 3')
    )
    assert [layer.name for layer in layers][1] == name and layers[1].mean == 0.32


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"count": 0}]', "[1, 2]", PROFILE[:20]])
def test_a_profile_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="profile"):
        parse_profile(text)


# Built with detailed verbosity; TensorRT parts fused nodes by the unit separator
LAYERS = {
    "Layers": [
        {
            "Name": "/stem/Conv + /stem/Relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "image", "Format/Datatype": "Channel major FP16 format"}],
            "Outputs": [
                {"Name": "x", "Format/Datatype": "Channel major FP16 format where c % 8 == 0"}
            ],
            "TacticName": "sm80_xmma_fprop_implicit_gemm",
            "Metadata": "[ONNX Layer: /stem/Conv]\x1f[ONNX Layer: /Relu[0]]\x1e[ONNX Layer: q]",
        },
        {"Name": "seg", "LayerType": "NoOp", "Inputs": None, "Outputs": "?", "TacticName": 3},
    ],
    "Bindings": ["image", "seg"],
}


def test_the_layers_of_10() -> None:
    read = parse_layers(json.dumps(LAYERS))
    first, second = read.layers
    assert first.onnx_nodes == ("/stem/Conv", "/Relu[0]", "q")
    assert (first.kind, first.inputs, first.outputs) == ("CaskConvolution", ("image",), ("x",))
    assert first.formats == ("Channel major FP16 format where c % 8 == 0",)
    assert (second.inputs, second.outputs, second.tactic, second.onnx_nodes) == ((), (), None, ())
    assert read.tensors == ("image", "seg")


def test_the_layers_of_11_name_their_tensors_otherwise() -> None:
    eleven = {"Layers": LAYERS["Layers"], "I/O Tensors": [
        {"Name": "image", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 8, 8]},
        {"Name": "seg", "IOMode": "Output"}]}  # fmt: skip
    assert parse_layers(json.dumps(eleven)) == parse_layers(json.dumps(LAYERS))


def test_layers_without_detail_are_names() -> None:
    read = parse_layers('{"Layers": ["a", "b"], "Bindings": []}')
    assert [layer.name for layer in read.layers] == ["a", "b"] and read.layers[0].kind is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [[]]}']
)
def test_layers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BuildError, match="layers"):
        parse_layers(text)


@settings(deadline=None, max_examples=60)
@given(ANY | st.sampled_from([SUMMARY, TIMES, PROFILE]), st.integers(0, 3000), ANY)
def test_any_text_is_read_or_refused_with_a_sentence(text: str, at: int, noise: str) -> None:
    for parse in (parse_summary, parse_times, parse_profile, parse_layers):
        try:
            parse(text[:at] + noise + text[at:])
        except BuildError as error:
            assert error.message.startswith("trtexec") and error.hint


json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | ANY,
    lambda each: st.lists(each, max_size=4)
    | st.dictionaries(
        st.sampled_from(["Layers", "Name", "Inputs", "Outputs", "Bindings", "I/O Tensors", "count",
                         "Metadata", "name", "averageMs", "medianMs", "computeMs"]),
        each, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(json_like)
def test_any_json_is_read_or_refused(value: object) -> None:
    for parse in (parse_times, parse_profile, parse_layers):
        try:
            parse(json.dumps(value))
        except BuildError as error:
            assert error.message.startswith("trtexec")


# -- on a device: a program that prints and writes what trtexec would

PROGRAM = """\
#!/bin/sh
echo "$@" > words
for word in "$@"; do case $word in --exportProfile=*) cp {folder}/profile ${{word#*=}};; esac; done
cat {folder}/summary
"""
TASKS = [
    {"name": "Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1", "tasks": ["a", "b"]},
    {"name": "Conv_0 + Relu_1", "tasks": ["b"]},
]


@pytest.fixture
def engine_bundle(bundle: Path) -> Path:
    """The built bundle, with what a build on TensorRT 10.3 leaves."""
    (bundle / "model.engine").write_bytes(b"an engine")
    table = {"device": {"runtime": "tensorrt", "tensorrt": "10.3.0"}, "options": {"batch": [1] * 3}}
    (bundle / "engine.json").write_text(json.dumps(table))
    (bundle / "layers.json").write_text(json.dumps({"layers": TASKS}))
    return bundle


def opinion(
    bundle: Path, tmp_path: Path, monkeypatch, ask: Callable[..., dict[str, Any]] = second_opinion
) -> dict[str, Any]:
    """The second opinion of a program in this PATH."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "device"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    files = {"model.engine": bundle / "model.engine"}
    with bundle_on_device(LocalConnection(), files, tmp_path / "desk", print) as there:
        return ask(there, read_bundle(bundle), bundle)


def test_a_second_opinion_tells_each_tasks_share(
    engine_bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    for name, text in {"summary": SUMMARY, "profile": PROFILE}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "trtexec").write_text(PROGRAM.format(folder=tmp_path))
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = opinion(engine_bundle, tmp_path, monkeypatch)
    assert found["summary"]["GPU Compute Time"]["median"] == 4.86
    assert [row["tasks"] for row in found["layers"]] == [["a", "b"], ["b"], None]
    assert found["ms_by_tasks"] == {"a+b": 0.08, "b": 0.32, "unknown": 0.0}
    assert said_of(found) == [
        "trtexec: median Latency 5.13, GPU Compute Time 4.86 ms; 203.7 qps",
        "by tasks: b 0.32 ms, a+b 0.08 ms, unknown 0 ms",
    ]
    assert "--noDataTransfers" not in found["command"] and "--useSpinWait" in found["command"]
    (tmp_path / "summary").write_text("&&&& FAILED TensorRT.trtexec [TensorRT v100300]\n")
    with pytest.raises(BuildError, match="says no reason"):
        opinion(engine_bundle, tmp_path, monkeypatch)


def test_without_trtexec_there_it_is_said_how_to_get_it(
    engine_bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    with pytest.raises(DeviceError, match="no trtexec here: sudo apt install libnvinfer-bin"):
        opinion(engine_bundle, tmp_path, monkeypatch)
    found = opinion(engine_bundle, tmp_path, monkeypatch, asked_opinion)
    (line,) = said_of(found)  # what else was measured stays
    assert line.startswith("trtexec: not available: ") and "libnvinfer-bin" in line


def test_what_trtexec_cannot_time_is_refused_before_it_runs(engine_bundle: Path, capsys) -> None:
    manifest = read_bundle(engine_bundle)
    for device, said in (
        ({"runtime": "tensorrt_rtx", "tensorrt": "1.7"}, "the bundle's is of tensorrt_rtx"),
        ({}, "the bundle's is of none"),
        ({"runtime": "tensorrt", "tensorrt": "8.5.2"}, "TensorRT 8.5.2 is not known"),
    ):
        with pytest.raises(SecateurError, match=said):
            trtexec_order(manifest, {"device": device})
    table = {
        "device": {"runtime": "tensorrt", "tensorrt": "11.4.1"},
        "options": {"batch": [1, 4, 8]},
    }
    words = trtexec_order(manifest, table)["command"]
    size = f"{manifest.input.height}x{manifest.input.width}"
    assert f"--shapes=image:1x3x{size}" in words and "--includeDataTransfers" in words
    code, _, err = run(capsys, "bench", engine_bundle, "--trtexec")
    assert code == 2 and "--trtexec measures over ssh" in err


def test_values_cannot_be_changed() -> None:
    assert replace(Timing(), seconds=5).seconds == 5
    with pytest.raises(AttributeError):
        Timing().seconds = 5  # type: ignore[misc]
