"""From a torch model to ncnn's two files, through pnnx: layers (.param, text) and weights (.bin).

https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure. pnnx reads TorchScript here:
on the models of benchmarks/ncnn it converts what it converts from ONNX, several times as fast.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from secateur.core.errors import BuildError, RuntimeMissing, first_line
from secateur.core.files import atomic_path, write_text
from secateur.core.model import MultiTaskModel
from secateur.lower.attention import split_attention
from secateur.lower.export import INPUT_NAME, TupleOutputs, silence

# ``31=`` of a layer names the options that it goes without, whatever a program asks for
# (``get_masked_option`` in ncnn's src/net.cpp): 1 arithmetic in fp16, 2 storage in fp16, 4 in bf16.
# Storage in fp16 without the arithmetic takes an emulated Cortex-A76 four times the instructions
# of fp32 (a 14 M MACs network; with the arithmetic 0.6 times), so they come together.
WITHOUT = {"fp32": 7, "fp16": 4}
_LONGEST_NAME = 255
_HEADER = 2  # lines: a magic number, and how many layers and blobs there are
_PATIENCE = 600.0  # seconds
_INSTALL = "pip install 'secateur[ncnn]'"


def export_ncnn(
    model: MultiTaskModel, example: Tensor, path: Path, precision: Literal["fp32", "fp16"]
) -> None:
    """Write ``path`` (.param) and its ``weights_file``: input ``image``, one output per task name.

    ncnn's arrays have no batch: one image (C, H, W) at a time. In fp16 the file has half the bytes,
    and a CPU with fp16 arithmetic (Armv8.2) computes in it; others compute in fp32.

    Raises:
        RuntimeMissing: pnnx is not installed.
        BuildError: pnnx or ncnn cannot express the model, or a task's name.
    """
    names = {f"out{place}": task.name for place, task in enumerate(model.tasks)}
    names["in0"] = INPUT_NAME
    _check_names(names)
    program = find_pnnx()
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        traced = Path(scratch) / "model.pt"
        _trace(model, example[:1], traced)
        shape = ",".join(map(str, (1, *example.shape[1:])))
        _convert([str(program), traced.name, f"inputshape=[{shape}]",
                  f"fp16={int(precision == 'fp16')}"], Path(scratch))  # fmt: skip
        made = Path(scratch) / "model.ncnn.param"
        text = _renamed(made.read_text(encoding="utf-8"), names, WITHOUT[precision])
        with atomic_path(weights_file(path)) as temporary:
            temporary.write_bytes(weights_file(made).read_bytes())
        write_text(path, text)  # last: where it is, both are


def weights_file(path: Path) -> Path:
    """Return the file of weights beside a .param file."""
    return path.with_suffix(".bin")


def find_pnnx() -> Path:
    """Return the converter.

    Raises:
        RuntimeMissing: it is not installed.
    """
    found = importlib.util.find_spec("pnnx")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for name in ("pnnx", "pnnx.exe"):
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    raise RuntimeMissing("pnnx, which converts models for ncnn, is not installed", hint=_INSTALL)


def _check_names(names: Mapping[str, str]) -> None:
    for name in names.values():
        if not name or name.split() != [name] or len(name.encode()) > _LONGEST_NAME:
            raise BuildError(
                f"ncnn cannot call an output '{name}': its names have no spaces and at most "
                f"{_LONGEST_NAME} bytes",
                hint="rename that task in the recipe",
            )


def _trace(model: MultiTaskModel, example: Tensor, path: Path) -> None:
    """Write the model as TorchScript."""
    plain = TupleOutputs(split_attention(model)).eval()
    try:
        with silence(), torch.no_grad():
            traced = torch.jit.trace(plain, example, check_trace=False)  # type: ignore[no-untyped-call]
            traced.save(str(path))
    except Exception as error:  # whatever the model's own forward raises
        raise BuildError(
            f"the model cannot be traced for ncnn: {first_line(error)}",
            hint="forward must be traceable by torch.jit.trace",
        ) from error


def _convert(command: list[str], folder: Path) -> None:
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_PATIENCE,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"pnnx did not run: {error}", hint=_INSTALL) from error
    if result.returncode != 0 or not (folder / "model.ncnn.param").is_file():
        said = f"{result.stdout}\n{result.stderr}".strip().splitlines() or ["nothing"]
        raise BuildError(
            f"pnnx ended with status {result.returncode}; its last words: {said[-1][:200]}",
            hint="use runtime: onnxruntime for this model, or report it to pnnx",
        )


def _renamed(text: str, names: Mapping[str, str], without: int) -> str:
    """Return the layers with blobs called by ``names``, and what each layer goes without.

    Raises:
        BuildError: a layer is none of ncnn's, or a task's output is missing.
    """
    lines = [line.split() for line in text.splitlines()]
    layers, taken, found = lines[_HEADER:], set(names.values()), set[str]()
    for words in layers:
        kind, _, reads, makes = words[:4]
        if "." in kind or "::" in kind:  # torch's own, which pnnx has found no layer for
            raise BuildError(
                f"ncnn has no layer for torch's {kind} as this model uses it",
                hint="use runtime: onnxruntime for this model",
            )
        blobs = slice(4, 4 + int(reads) + int(makes))
        found.update(words[blobs])
        words[blobs] = [names.get(blob) or _free(blob, taken) for blob in words[blobs]]
        words.append(f"31={without}")
    missing = [name for blob, name in names.items() if blob not in found]
    if missing:
        raise BuildError(
            f"pnnx lost '{missing[0]}'",
            hint="use runtime: onnxruntime for this model, or report it to pnnx",
        )
    return "".join(" ".join(words) + "\n" for words in lines)


def _free(blob: str, taken: set[str]) -> str:
    """Return a name for an inner blob that no task has."""
    while blob in taken:
        blob += "_"
    return blob
