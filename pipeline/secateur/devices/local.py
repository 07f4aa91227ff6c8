"""This machine as a device: the same commands, without a network."""

from __future__ import annotations

import sys

from secateur.core.errors import ConnectionLost, DeviceError
from secateur.devices.connection import RESUMES, PipedConnection


class LocalConnection(PipedConnection):
    """Runs everything here, with the Python that runs this."""

    name, address = "this machine", "local"
    python = sys.executable

    def _argv(self, command: str) -> list[str]:
        return ["sh", "-c", command]

    def _failure(self, code: int, err: str) -> DeviceError | None:
        if code >= 0:
            return None
        return ConnectionLost(
            f"a command on this machine was killed by signal {-code}",
            hint=RESUMES,
        )
