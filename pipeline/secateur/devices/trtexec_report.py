"""What ``trtexec`` says: its summary, and its JSON files of times, profile and layers.

Forms: samples/common/sampleReporting.cpp of https://github.com/NVIDIA/TensorRT (v10.3.0 and v11.1
print the same), for layers the Engine Inspector pages and, for the change of ``Bindings`` into
``I/O Tensors``,
https://docs.nvidia.com/deeplearning/tensorrt/11.3.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html.
All times are milliseconds, and called what trtexec calls them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from secateur.core.errors import BuildError
from secateur.devices.version import Version

METRICS = ("Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")

_NUMBER = r"(-?(?:\d{1,18}(?:\.\d{1,12})?(?:e[+-]?\d{1,3})?|inf|nan))"
_PREFIX = r"^(?:\[[^\]\n]{1,40}\] )?(?:\[[A-Z]\] )?"
_LINE = re.compile(
    _PREFIX + rf"({'|'.join(METRICS)}): min = {_NUMBER} ms, max = {_NUMBER} ms, "
    rf"mean = {_NUMBER} ms, median = {_NUMBER} ms([^\n]{{0,2000}})$",
    re.ASCII | re.MULTILINE,
)
_PERCENTILE = re.compile(rf"percentile\((\d{{1,3}}(?:\.\d{{1,6}})?)%\) = {_NUMBER} ms", re.ASCII)
_THROUGHPUT = re.compile(_PREFIX + rf"Throughput: {_NUMBER} qps$", re.ASCII | re.MULTILINE)
_WALLTIME = re.compile(_PREFIX + rf"Total Host Walltime: {_NUMBER} s$", re.ASCII | re.MULTILINE)
_GPU_TOTAL = re.compile(_PREFIX + rf"Total GPU Compute Time: {_NUMBER} s$", re.ASCII | re.MULTILINE)
_QUERIES = re.compile(r"Timing trace has (\d{1,12}) queries over", re.ASCII)
_VARIATION = re.compile(rf"coefficient of variance = {_NUMBER}%", re.ASCII)
_VERDICT = re.compile(
    r"^&&&& (PASSED|FAILED|RUNNING) TensorRT\.trtexec(?: \[TensorRT v(\d{4,6})\])?",
    re.ASCII | re.MULTILINE,
)
_FAULT = re.compile(r"^(?:\[[^\]\n]{1,40}\] )?\[[EF]\] ([^\n]{1,400})", re.MULTILINE)
_ONNX = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]*?)\](?=[\x1e\x1f\[]|\s*$)")
# Layer names are not escaped in the profile, so one with a quote in it is no JSON: then by line.
_PROFILE_LINE = re.compile(
    rf'^, \{{ "name" : "(.*)", "timeMs" : {_NUMBER}, "averageMs" : {_NUMBER}, '
    rf'"medianMs" : {_NUMBER}, "percentage" : {_NUMBER} \}}$',
    re.ASCII | re.MULTILINE,
)
_COUNT_LINE = re.compile(r'^\s*\{ "count" : (\d{1,12}) \}$', re.ASCII | re.MULTILINE)


@dataclass(frozen=True)
class Times:
    """One metric over all queries, in ms; ``percentiles`` maps 99.9 to its time."""

    min: float
    max: float
    mean: float
    median: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True)
class Summary:
    """The performance summary.

    ``times`` has every name of ``METRICS``. ``unstable_percent`` is the coefficient of variance of
    the GPU Compute Time where trtexec warns of it (above 2.5 %).
    """

    version: Version | None
    throughput_qps: float
    times: Mapping[str, Times]
    walltime_s: float | None
    gpu_total_s: float | None
    queries: int | None
    unstable_percent: float | None

    def to_json(self) -> dict[str, Any]:
        """Return it under trtexec's own names."""
        rows = {
            name: {
                **{key: getattr(times, key) for key in ("min", "max", "mean", "median")},
                **{f"percentile({p:g}%)": value for p, value in times.percentiles.items()},
            }
            for name, times in self.times.items()
        }
        return {
            "Throughput": self.throughput_qps,
            **rows,
            "Total Host Walltime": self.walltime_s,
            "Total GPU Compute Time": self.gpu_total_s,
            "queries": self.queries,
            "unstable_percent": self.unstable_percent,
        }


@dataclass(frozen=True)
class Query:
    """One query of ``--exportTimes``, in ms; ``latency`` is the sum of the three in the middle."""

    enqueue: float
    h2d: float
    compute: float
    d2h: float
    latency: float


@dataclass(frozen=True)
class LayerTime:
    """One layer of ``--exportProfile``: ms per iteration, and its share of all in percent."""

    name: str
    mean: float
    median: float
    percent: float


@dataclass(frozen=True)
class Layer:
    """One layer of ``--exportLayerInfo``.

    ``onnx_nodes`` are the ONNX nodes fused into it. Only a name is known of a layer where the
    engine was not built with detailed profiling verbosity.
    """

    name: str
    kind: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    tactic: str | None = None
    onnx_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineLayers:
    """The layers of an engine in the order they run, and the names of its inputs and outputs."""

    layers: tuple[Layer, ...]
    tensors: tuple[str, ...]


def parse_summary(output: str) -> Summary:
    """Read what trtexec printed.

    Raises:
        BuildError: trtexec failed (its first error is quoted), or the summary is not there.
    """
    verdicts = _VERDICT.findall(output)
    version = next((_version(digits) for _, digits in verdicts if digits), None)
    if any(verdict == "FAILED" for verdict, _ in verdicts):
        fault = _FAULT.search(output)
        raise BuildError(
            f"trtexec failed: {fault.group(1).strip() if fault else 'it says no reason'}",
            hint="its whole output says more; out of memory reads as 'no implementation for node'",
        )
    times = {name: _times(name, rest) for name, *rest in _LINE.findall(output)}
    missing = [name for name in METRICS if name not in times]
    throughput = _THROUGHPUT.search(output)
    if missing or throughput is None:
        _unreadable("its output", f"no line for {', '.join(missing) or 'Throughput'}")
    queries = _QUERIES.search(output)
    return Summary(
        version=version,
        throughput_qps=_finite(throughput.group(1), "Throughput"),
        times=times,
        walltime_s=_found(_WALLTIME, output),
        gpu_total_s=_found(_GPU_TOTAL, output),
        queries=int(queries.group(1)) if queries else None,
        unstable_percent=_found(_VARIATION, output),
    )


def parse_times(text: str) -> tuple[Query, ...]:
    """Read the file of ``--exportTimes``.

    Raises:
        BuildError: it is not that file, or has no query in it.
    """
    rows = _json_list(text, "the times")
    queries = []
    for index, row in enumerate(rows):
        where = f"the times, query {index}"
        get = {
            key: _finite(row.get(key) if isinstance(row, dict) else None, f"{where}, {key}")
            for key in ("startEnqMs", "endEnqMs", "h2dMs", "computeMs", "d2hMs", "latencyMs")
        }
        queries.append(
            Query(
                enqueue=get["endEnqMs"] - get["startEnqMs"],
                h2d=get["h2dMs"],
                compute=get["computeMs"],
                d2h=get["d2hMs"],
                latency=get["latencyMs"],
            )
        )
    if not queries:
        _unreadable("the times", "no query in it")
    return tuple(queries)


def parse_profile(text: str) -> tuple[LayerTime, ...]:
    """Read the file of ``--exportProfile``; shares are computed again from the means.

    Raises:
        BuildError: it is not that file, or nothing was run.
    """
    try:
        rows = json.loads(text)
        first, rest = rows[0], rows[1:]
        count = first["count"]
        table = [(row["name"], row["averageMs"], row["medianMs"]) for row in rest]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        counts = _COUNT_LINE.search(text)
        count = int(counts.group(1)) if counts else 0
        table = [(name, mean, median) for name, _, mean, median, _ in _PROFILE_LINE.findall(text)]
    if not isinstance(count, int) or count < 1 or not table:
        _unreadable("the profile", "no iteration in it")
    means = [_finite(mean, f"the profile, layer {name!s:.80}") for name, mean, _ in table]
    whole = sum(means)
    return tuple(
        LayerTime(
            name=str(name),
            mean=mean,
            median=_finite(median, f"the profile, layer {name!s:.80}"),
            percent=100 * mean / whole if whole > 0 else 0.0,
        )
        for (name, _, median), mean in zip(table, means, strict=True)
    )


def parse_layers(text: str) -> EngineLayers:
    """Read the file of ``--exportLayerInfo`` of TensorRT 10 or 11.

    Raises:
        BuildError: it is not that file.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        _unreadable("the layers", "not JSON", error)
    if not isinstance(read, dict) or not isinstance(read.get("Layers"), list):
        _unreadable("the layers", "no list of Layers")
    tensors = read.get("I/O Tensors", read.get("Bindings", []))
    return EngineLayers(
        layers=tuple(_layer(index, layer) for index, layer in enumerate(read["Layers"])),
        tensors=_names(tensors),
    )


def _layer(index: int, layer: object) -> Layer:
    if isinstance(layer, str):
        return Layer(layer)
    if not isinstance(layer, dict) or not isinstance(layer.get("Name"), str):
        _unreadable("the layers", f"layer {index} has no name")
    outputs = layer.get("Outputs")
    outputs = outputs if isinstance(outputs, list) else []
    formats = (each.get("Format/Datatype") for each in outputs if isinstance(each, dict))
    return Layer(
        name=layer["Name"],
        kind=_text(layer.get("LayerType")),
        inputs=_names(layer.get("Inputs")),
        outputs=_names(outputs),
        formats=tuple(each for each in formats if isinstance(each, str)),
        tactic=_text(layer.get("TacticName")),
        onnx_nodes=tuple(_ONNX.findall(_text(layer.get("Metadata")) or "")),
    )


def _names(tensors: object) -> tuple[str, ...]:
    # TensorRT 10 lists an engine's tensors by name, 11 as objects; a layer's are objects in both
    listed = tensors if isinstance(tensors, list) else []
    names = (each.get("Name") if isinstance(each, dict) else each for each in listed)
    return tuple(name for name in names if isinstance(name, str))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _times(name: str, found: list[str]) -> Times:
    least, greatest, mean, median = (_finite(text, name) for text in found[:4])
    percentiles = {float(p): _finite(ms, name) for p, ms in _PERCENTILE.findall(found[4])}
    return Times(least, greatest, mean, median, percentiles)


def _found(pattern: re.Pattern[str], output: str) -> float | None:
    found = pattern.search(output)
    value = float(found.group(1)) if found else math.nan
    return value if math.isfinite(value) else None


def _finite(value: object, where: str) -> float:
    try:
        read = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        read = math.nan
    if not math.isfinite(read):
        _unreadable(where, f"got {value!r:.40} for a number")
    return read


def _json_list(text: str, what: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        _unreadable(what, "not JSON", error)
    if not isinstance(rows, list):
        _unreadable(what, "not a list")
    return rows


def _version(digits: str) -> Version:
    # v100300 is 10.3.0 and v110100 is 11.1.0; up to TensorRT 9 it was v8601 for 8.6.1
    if len(digits) == 4:
        return tuple(int(part) for part in (digits[0], digits[1], digits[2:]))
    return tuple(int(part) for part in (digits[:-4], digits[-4:-2], digits[-2:]))


def _unreadable(what: str, why: str, cause: BaseException | None = None) -> NoReturn:
    raise BuildError(
        f"trtexec, {what}: {why}", hint="run it again: it may have been stopped while it wrote"
    ) from cause
