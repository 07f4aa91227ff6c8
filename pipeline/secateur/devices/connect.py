"""From what a user calls a device to a connection."""

from __future__ import annotations

from secateur.core.errors import DeviceError
from secateur.devices.connection import PipedConnection
from secateur.devices.emulated import EMULATED
from secateur.devices.local import LocalConnection
from secateur.devices.ssh import SshConnection, parse_address


def connect(device: str) -> PipedConnection:
    """Return a connection, to be closed, for ``local`` or ``ssh://[user@]host[:port]``.

    Nothing is sent before its first command.

    Raises:
        DeviceError: the text is neither.
    """
    if device == "local":
        return LocalConnection()
    if device.startswith("ssh:"):
        return SshConnection(parse_address(device))
    hint = "give local, or ssh://[user@]host[:port]"
    if device.partition(":")[0] == EMULATED:
        raise DeviceError(
            "an emulated device runs bundles and nothing else",
            hint=f"{hint}; `secateur build`, `verify`, `bench` and `profile` take emulated",
        )
    raise DeviceError(f"'{device}' is no device", hint=hint)
