"""What TensorRT's Python API offers, version by version, as small JSON files beside this script.

    python tests/tensorrt_names/inventory.py

Downloads the bindings wheels (1 to 2 MB each, without NVIDIA's libraries) and imports each
extension module in a process of its own, with hollow shared objects in the place of the libraries:
making a list of names calls none of their functions. So names, arguments and the enums' numbers are
those of the wheel itself. Needs pip, cc, readelf and a Python that all these wheels are made for:
3.10 to 3.12.
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
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
WHEELS = {
    "tensorrt_10.3": "tensorrt-cu12-bindings==10.3.0",
    "tensorrt_10.13": "tensorrt-cu12-bindings==10.13.3.9",
    "tensorrt_10.16": "tensorrt-cu12-bindings==10.16.1.11",
    "tensorrt_11.4": "tensorrt-cu13-bindings==11.4.0.106",
    "tensorrt_rtx_1.7": "tensorrt-rtx-cu13-bindings==1.7.1.116",
}
CLASSES = (
    "Builder", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext",
    "IHostMemory", "ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile",
    "IProgressMonitor", "ITensor", "ITimingCache", "OnnxParser", "ParserError", "Runtime",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "ComputeCapability", "DataType", "DeviceType", "ErrorCode",
    "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParserFlag",
    "ProfilingVerbosity", "TensorIOMode",
)  # fmt: skip


def signatures(name: str, documentation: str) -> list[list[str]]:
    """Return the arguments of each overload; ``=`` marks one that may be left out."""
    found = []
    for line in documentation.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line)
        if match:
            flat = re.sub(r"<[^>]*>|\[[^\]]*\]", "", match[1])  # types and defaults with commas
            arguments = [part.strip() for part in flat.split(",")]
            found.append(
                [
                    part.split(":")[0].strip() + ("=" if "=" in part else "")
                    for part in arguments
                    if part and not part.startswith("self")
                ]
            )
    return found


def members(kind: type) -> dict[str, Any]:
    """Return what a class offers: ``read``, ``read write``, or a list of overloads."""
    result: dict[str, Any] = {}
    for name in dir(kind):
        value = getattr(kind, name)
        if name.startswith("add_") and name != "add_optimization_profile":
            continue  # networks come from the parser
        if name == "__init__" or (callable(value) and not name.startswith("_")):
            result[name] = signatures(name, value.__doc__ or "")
        elif isinstance(value, property):
            result[name] = "read write" if value.fset else "read"
    return result


def inventory(module: ModuleType) -> dict[str, Any]:
    """Return names, arguments and numbers of one imported extension module."""
    enums = {name: getattr(module, name).__members__ for name in ENUMS if hasattr(module, name)}
    enums["ILogger.Severity"] = module.ILogger.Severity.__members__
    return {
        "module": sorted(
            name
            for name in dir(module)
            if name in CLASSES + ENUMS or (name[0].islower() and callable(getattr(module, name)))
        ),
        "classes": {name: members(getattr(module, name)) for name in CLASSES},
        "enums": {name: {key: int(value) for key, value in enums[name].items()} for name in enums},
    }


def import_and_print(extension: Path) -> None:
    """Import the extension module (in the child process) and print its inventory."""
    sys.path.insert(0, str(extension.parent))
    module = __import__(extension.stem)
    package = (extension.parent / "__init__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', package)
    found = inventory(module)
    found["module"] = sorted([*found["module"], "__version__"])
    print(json.dumps({"version": version[1] if version else None, **found}))


def stand_ins(extension: Path, folder: Path) -> None:
    """Make a hollow shared object for each of NVIDIA's libraries that the module names."""
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", extension]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = re.findall(r" UND ((?:create|get|init)[A-Z]\w*)$", dynamic, re.MULTILINE)
    source = folder / "stand_in.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in wanted))
    for name in re.findall(r"\[(lib(?:nv|tensorrt)[^\]]+)\]", dynamic):
        subprocess.run(
            ["cc", "-shared", "-o", folder / name, source, f"-Wl,-soname,{name}"], check=True
        )


def read_wheel(requirement: str) -> dict[str, Any]:
    """Download a bindings wheel and return its inventory."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        (extension,) = folder.glob("tensorrt*_bindings/tensorrt*.so")
        stand_ins(extension, folder)
        child = subprocess.run(
            [sys.executable, __file__, "--import", extension],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if child.returncode:
            raise SystemExit(f"{requirement}: {child.stderr}")
        found: dict[str, Any] = json.loads(child.stdout)
    return {"wheel": requirement, **found}


def to_text(found: dict[str, Any]) -> str:
    """Return JSON with one line per class and enum, so that a diff shows what changed."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items()]
            value_text = "{\n" + ",\n".join(rows) + "\n }"
        else:
            value_text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {value_text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--import", dest="extension", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.extension:
        import_and_print(options.extension)
        return
    for name, requirement in WHEELS.items():
        found = read_wheel(requirement)
        (HERE / f"{name}.json").write_text(to_text(found))
        print(name, found["version"], sum(len(kind) for kind in found["classes"].values()))


if __name__ == "__main__":
    main()
