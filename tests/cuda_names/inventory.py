"""What the CUDA runtime offers, as small JSON files beside this script: C's header and cuda-python.

    python tests/cuda_names/inventory.py

Downloads NVIDIA's runtime wheels for their ``cuda_runtime_api.h`` and cuda-bindings for its Python
module, which is imported in a process of its own; none of its functions is called. Needs pip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WHEELS = {  # (C header, Python module); CUDA 12.6 is JetPack 6's, and cuda-bindings begin with 12.8
    "cuda_12": ("nvidia-cuda-runtime-cu12==12.6.77", "cuda-bindings==12.8.0"),
    "cuda_13": ("nvidia-cuda-runtime==13.0.96", "cuda-bindings==13.0.3"),
}
FAMILIES = (
    r"cuda(?:Malloc|Free|MemcpyAsync|Stream|GetError|GetLast"
    r"|Event(?:Create|Destroy|ElapsedTime|Record)"
    r"|Graph(?:Instantiate|Launch|Destroy|ExecDestroy))\w*"
)
ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode")


def c_functions(header: str) -> dict[str, list[str]]:
    """Return the types of each function's arguments."""
    found = {}
    pattern = rf"^ *extern [^;(]*?CUDARTAPI ({FAMILIES})\(([^;]*)\);"
    for name, text in re.findall(pattern, header, re.MULTILINE):
        arguments = re.sub(r" __dv\([^)]*\)", "", text).split(",")
        found[name] = [
            re.sub(r"\s*(\**)\w+$", r" \1", part.strip()).strip()
            for part in arguments
            if part.strip() not in ("", "void")
        ]
    return dict(sorted(found.items()))


def python_names() -> dict[str, Any]:
    """Return cuda-python's functions with their arguments' names, and numbers of enums."""
    from cuda.bindings import runtime

    functions = {}
    for name in dir(runtime):
        line = (getattr(runtime, name).__doc__ or "").splitlines()[:1]
        match = re.match(rf"{name}\((.*)\)", line[0] if line else "")
        if match and re.fullmatch(FAMILIES, name):
            parts = [part.split(":")[0].split("=")[0].split() for part in match[1].split(",")]
            functions[name] = [part[-1] for part in parts if part]
    enums = {name: {m.name: int(m) for m in getattr(runtime, name)} for name in ENUMS}
    return {"python": functions, "enums": enums}


def download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, requirement], check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)


def read_wheels(c: str, python: str) -> dict[str, Any]:
    """Download both wheels and return their inventory."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for requirement in (c, python):
            download(requirement, folder)
        (header,) = folder.glob("nvidia/*/include/cuda_runtime_api.h")
        child = subprocess.run(
            [sys.executable, __file__, "--print-python"],
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        functions = c_functions(header.read_text(encoding="utf-8"))
        return {"wheels": [c, python], "c": functions, **json.loads(child.stdout)}


def to_text(found: dict[str, Any]) -> str:
    """Return JSON with one line per function and enum, so that a diff shows what changed."""
    lines = []
    for key, value in found.items():
        rows = json.dumps(value)
        if isinstance(value, dict):
            inner = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items()]
            rows = "{\n" + ",\n".join(inner) + "\n }"
        lines.append(f" {json.dumps(key)}: {rows}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print-python", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().print_python:
        print(json.dumps(python_names()))
        return
    for name, (c, python) in WHEELS.items():
        found = read_wheels(c, python)
        (HERE / f"{name}.json").write_text(to_text(found))
        print(name, len(found["c"]), len(found["python"]))


if __name__ == "__main__":
    main()
