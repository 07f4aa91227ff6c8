"""``trtexec``, TensorRT's own benchmark, as a second opinion: its command line, and its reports.

Its defaults changed with 11.0: CUDA graph, spinning and no data transfers became the default and
their old flags no-ops, with new flags for the opposite (samples/common/sampleOptions.cpp of
https://github.com/NVIDIA/TensorRT at v10.3.0 and v11.1). So every knob is set here for the
version that runs, and times of different versions mean the same. The words of the reports are
those of samples/common/sampleReporting.cpp; ``trtexec_report.py`` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.core.errors import BuildError
from secateur.devices.version import Version, show_version

PROGRAM = "/usr/src/tensorrt/bin/trtexec"  # where NVIDIA's packages put it
OLDEST, NEWEST = (10, 3), (11,)  # the second is a whole series
NEW_DEFAULTS = (11, 0)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """How to time, with the defaults of the bench protocol.

    Runs last until all three of ``warm_up_ms``, ``seconds`` and ``runs`` are over. ``transfers``
    adds the copies of inputs and outputs to what is timed.
    """

    warm_up_ms: int = 200
    seconds: int = 3
    runs: int = 100
    percentiles: tuple[float, ...] = (50, 90, 95, 97, 99, 99.9)
    cuda_graph: bool = True
    spin_wait: bool = True
    transfers: bool = False


@dataclass(frozen=True)
class Building:
    """How to build an engine from an ONNX; always strongly typed.

    ``shapes`` gives (least, usual, greatest) per input that is dynamic. ``sparse`` lets kernels
    use 2:4 sparse weights. A layer that the DLA cannot run goes to the GPU if ``gpu_fallback``.
    ``tf32`` is TensorRT's own default; without it fp32 is computed in full.
    """

    save: str | None = None
    shapes: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    workspace_mib: int | None = None
    timing_cache: str | None = None
    dla_core: int | None = None
    gpu_fallback: bool = True
    sparse: bool = False
    tf32: bool = True
    optimization_level: int = 3


@dataclass(frozen=True)
class Exports:
    """Files to write: every run's times, time per layer, and what the layers are."""

    times: str | None = None
    profile: str | None = None
    layers: str | None = None


def engine_command(
    engine: str,
    version: Version,
    *,
    timing: Timing | None = None,
    exports: Exports | None = None,
    shapes: Mapping[str, Shape] | None = None,
    program: str = PROGRAM,
) -> tuple[str, ...]:
    """Return the command that times an engine; ``shapes`` are those of its dynamic inputs.

    Raises:
        BuildError: the version is none that we know the defaults of, or a setting is not allowed.
    """
    _check_version(version)
    words = [program, f"--loadEngine={engine}"]
    if shapes:
        words.append(f"--shapes={_shapes(shapes)}")
    words += _timing(timing or Timing(), version)
    return tuple(words + _exports(exports or Exports(), version))


def onnx_command(
    onnx: str,
    version: Version,
    *,
    building: Building | None = None,
    timing: Timing | None = None,
    exports: Exports | None = None,
    program: str = PROGRAM,
) -> tuple[str, ...]:
    """Return the command that builds an engine and times it, at the usual shapes.

    Raises:
        BuildError: the version is none that we know the defaults of, or a setting is not allowed.
    """
    _check_version(version)
    building = building or Building()
    words = [program, f"--onnx={onnx}", *_building(building, version)]
    if building.shapes:
        words.append(
            f"--shapes={_shapes({n: usual for n, (_, usual, _) in building.shapes.items()})}"
        )
    words += _timing(timing or Timing(), version)
    return tuple(words + _exports(exports or Exports(), version))


def _check_version(version: Version) -> None:
    if version < OLDEST or version[: len(NEWEST)] > NEWEST:
        raise BuildError(
            f"trtexec of TensorRT {show_version(version) or '?'} is not known",
            hint=f"{show_version(OLDEST)} to {show_version(NEWEST)}.x are; defaults of others may "
            "differ, so times could not be compared",
        )


def _building(building: Building, version: Version) -> list[str]:
    words = [] if version >= NEW_DEFAULTS else ["--stronglyTyped"]  # a no-op that warns, since 11
    if building.save:
        words.append(f"--saveEngine={building.save}")
    for name, (least, usual, greatest) in building.shapes.items():
        ordered = len(least) == len(usual) == len(greatest) and all(
            low <= mid <= high for low, mid, high in zip(least, usual, greatest, strict=True)
        )
        _need(ordered, f"the shapes of '{name}' do not grow from least to greatest")
    for index, name in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
        if building.shapes:
            words.append(f"{name}={_shapes({n: s[index] for n, s in building.shapes.items()})}")
    if building.workspace_mib is not None:
        _need(building.workspace_mib > 0, "a workspace has at least 1 MiB")
        words.append(f"--memPoolSize=workspace:{building.workspace_mib}M")
    if building.timing_cache:
        words.append(f"--timingCacheFile={building.timing_cache}")
    if building.dla_core is not None:
        _need(building.dla_core >= 0, "DLA cores are counted from 0")
        words.append(f"--useDLACore={building.dla_core}")
        words += ["--allowGPUFallback"] if building.gpu_fallback else []
    _need(0 <= building.optimization_level <= 5, "optimization levels go from 0 to 5")
    words.append(f"--sparsity={'enable' if building.sparse else 'disable'}")
    words += [] if building.tf32 else ["--noTF32"]
    words.append(f"--builderOptimizationLevel={building.optimization_level}")
    return [*words, "--profilingVerbosity=detailed"]


def _timing(timing: Timing, version: Version) -> list[str]:
    _need(timing.warm_up_ms >= 0, "a warm-up is not negative")
    _need(timing.seconds > 0 and timing.runs > 0, "at least one run and one second are timed")
    _need(
        bool(timing.percentiles) and all(0 <= p <= 100 for p in timing.percentiles),
        "percentiles are from 0 to 100",
    )
    knobs = [
        # on, words of 10.x for on, words of 11.x for off
        (timing.cuda_graph, "--useCudaGraph", "--noCudaGraph"),
        (timing.spin_wait, "--useSpinWait", "--noSpinWait"),
        (not timing.transfers, "--noDataTransfers", "--includeDataTransfers"),
    ]
    if version >= NEW_DEFAULTS:
        words = [off for on, _, off in knobs if not on]
    else:
        words = [word for on, word, _ in knobs if on]
    return [
        f"--warmUp={timing.warm_up_ms}",
        f"--duration={timing.seconds}",
        f"--iterations={timing.runs}",
        f"--percentile={','.join(f'{p:g}' for p in timing.percentiles)}",
        "--infStreams=1",
        "--idleTime=0",
        *words,
    ]


def _exports(exports: Exports, version: Version) -> list[str]:
    words = [f"--exportTimes={exports.times}"] if exports.times else []
    if exports.profile:
        words.append(f"--exportProfile={exports.profile}")
        # 11.x always profiles in a run of its own; 10.x would slow the timed one
        words += [] if version >= NEW_DEFAULTS else ["--separateProfileRun"]
    return words + ([f"--exportLayerInfo={exports.layers}"] if exports.layers else [])


def _shapes(shapes: Mapping[str, Shape]) -> str:
    for name, shape in shapes.items():
        _need(bool(name) and not set(name) & set(",:'"), f"the name '{name}' cannot be given to it")
        _need(bool(shape) and all(size > 0 for size in shape), f"'{name}' has no shape {shape}")
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise BuildError(f"trtexec: {rule}", hint="change the setting; nothing was run")
