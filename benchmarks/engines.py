"""Precisions of a network for TensorRT, and engines of them, built by the bundle's own builder.

tensorrt-rtx needs no GPU for it; $SECATEUR_TENSORRT_PYTHON names the Python that has it, by default
this one.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.bundle.write import write_builder
from secateur.lower.quant import (
    TENSORRT,
    QuantPlan,
    emit,
    find_units,
    observe,
    plan_assigned,
    plan_quant,
    table_of,
)
from suite import read_json
from torch import Tensor

PYTHON = os.environ.get("SECATEUR_TENSORRT_PYTHON", sys.executable)
FORMS = ("fp32", "fp16", "int8")


def tensorrt_version() -> str:
    """The version that PYTHON has; without one there is nothing to measure."""
    program = "import tensorrt_rtx; print(tensorrt_rtx.__version__)"
    found = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        sys.exit(f"{PYTHON} has no tensorrt_rtx: pip install tensorrt-rtx, or name a Python that "
                 "has it in $SECATEUR_TENSORRT_PYTHON")  # fmt: skip
    return found.stdout.strip()


def plans(fp32: Path, images: Tensor) -> dict[str, QuantPlan | None]:
    """Lower all that can be lowered, int8 between fp16, as a build without guard does."""
    seen = observe(fp32, lambda: iter([images.numpy()]))
    ranges, half = table_of(seen, "percentile"), table_of(seen, "minmax")
    fp16 = plan_quant(fp32, half, {}, default="fp16", carrier="fp16")
    lowest = plan_quant(fp32, ranges, {}, default="int8", carrier="fp16")
    units = [unit.name for unit in find_units(fp32, lowest)
             if lowest.precisions[unit.name] == "int8" and fp16.precisions[unit.name] == "fp16"
             and not unit.ends_head]  # fmt: skip
    named = {**fp16.precisions, **{name: lowest.precisions[name] for name in units}}
    int8 = plan_assigned(fp32, ranges, named, {}, "fp16")
    return {"fp32": None, "fp16": fp16, "int8": int8}


def write_form(fp32: Path, form: str, plan: QuantPlan | None) -> Path:
    """Write a precision into a folder beside that of ``fp32``; return its file."""
    if plan is None:
        return fp32
    path = fp32.parents[1] / form / "model.onnx"
    path.parent.mkdir()
    emit(fp32, plan, TENSORRT, path)
    return path


def built(onnx_file: Path, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Build an engine as a device would: the bundle's file, in a process of its own."""
    folder = onnx_file.parent
    write_builder(folder, options)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([PYTHON, folder / "build_engine.py", "--json"],
                            capture_output=True, text=True, check=False)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = {"onnx_bytes": onnx_file.stat().st_size}
    if result.returncode != 0:
        last = result.stderr.strip().rpartition("\n")[2] or f"status {result.returncode}"
        return {**found, "fails": last.removeprefix("error: ").replace(f"{folder}/", "")}
    engine = json.loads(result.stdout)
    table = read_json(folder / "layers.json")["layers"]
    formats = Counter(tensor["format"] for layer in table for tensor in layer["outputs"])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        **found,
        "bytes": engine["bytes"],
        "layers": engine["layers"],
        "tensors": dict(formats.most_common()),
        "seconds": engine["seconds"],
        "cpu_seconds": round(cpu, 2),
        "layers_without_task": sum(not layer["tasks"] for layer in table),
    }
