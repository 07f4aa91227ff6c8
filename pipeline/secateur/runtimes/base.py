"""The contract of a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.core import registry
from secateur.core.errors import DeviceError


class Session(Protocol):
    """A loaded model."""

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        """Return ``{task: array}`` for (N, C, H, W) network inputs."""
        ...


class Runtime(Protocol):
    """A module with ``open_session`` and ``version``."""

    def open_session(self, model: Path, threads: int) -> Session: ...

    def version(self) -> str: ...


def runtime_of(name: str) -> Runtime:
    """Return the runtime ``name``.

    Raises:
        DeviceError: there is no file (or entry point) of that name.
    """
    try:
        module: Runtime = registry.load("secateur.runtimes", name)
    except KeyError as error:
        raise DeviceError(
            f"there is no runtime '{name}'",
            hint=f"runtimes: {', '.join(registry.entries('secateur.runtimes'))}",
        ) from error
    return module
