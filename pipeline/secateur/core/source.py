"""The files whose code a network runs."""

from __future__ import annotations

import inspect
import site
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from torch import nn

import secateur

_INSTALLED = tuple(
    Path(folder).resolve()
    for folder in (
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(), site.getusersitepackages(), *secateur.__path__,
    )
)  # fmt: skip


def source_files(model: nn.Module) -> set[Path]:
    """Return the files that define the classes of a network's modules, and what these import.

    Imports are followed through a file's own names (a function that ``forward`` calls, say), into
    files that are installed nowhere: those change under one's hands. A class made at run time
    (torch.fx) has no file.
    """
    found: set[Path] = set()
    seen: set[str] = set()
    left = [sys.modules.get(type(module).__module__) for module in model.modules()]
    for kind in {type(module) for module in model.modules()}:
        found |= _file_of(kind)
    while left:
        module = left.pop()
        if module is None or module.__name__ in seen:
            continue
        seen.add(module.__name__)
        files = _file_of(module)
        if not files or not is_own(*files):
            continue
        found |= files
        for value in list(vars(module).values()):
            if isinstance(value, ModuleType):
                left.append(value)
            elif isinstance(name := getattr(value, "__module__", None), str):
                left.append(sys.modules.get(name))
    return found


def _file_of(thing: type | ModuleType) -> set[Path]:
    try:
        file = Path(inspect.getsourcefile(thing) or "")
    except TypeError:
        return set()
    return {file} if file.is_file() else set()


def is_own(file: Path) -> bool:
    """Say whether a file is the user's own, and not Python's, an installed package's or ours."""
    folder = file.resolve()
    return file.is_file() and not any(folder.is_relative_to(each) for each in _INSTALLED)
