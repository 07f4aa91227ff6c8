"""A device over ssh, by the system's own OpenSSH client.

Not asyncssh or fabric: only the client honours all of a user's configuration (Match, Include,
ProxyJump, agents, security keys, certificates, hashed known_hosts), and where someone has reached
the device by hand, it needs nothing more. It runs in BatchMode: no password is asked for, taken
or stored, and no unknown host key accepted. Commands share one connection (ControlMaster).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from secateur.core.errors import ConnectionLost, DeviceError
from secateur.devices.connection import RESUMES, PipedConnection, clean

CONFIG = "SECATEUR_SSH_CONFIG"
"""Environment variable: a configuration file for ssh instead of ~/.ssh/config (``ssh -F``)."""

DEFAULT_PYTHON = "python3"
_FORM = "ssh://[user@]host[:port][?python=/path/to/python3]"
_OPTIONS = (
    "BatchMode=yes", "LogLevel=ERROR", "RequestTTY=no", "RemoteCommand=none", "ForwardX11=no",
    "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4",
)  # fmt: skip
_KEPT = 60  # seconds that the shared connection outlives its last command
_LONGEST_SOCKET = 80  # a socket's path may have 104 bytes, of which ssh adds some

# What the client says on stderr -> our sentence and hint; {at} is the device, {ssh} the command
# that reaches it by hand. ssh.c, sshconnect.c, sshconnect2.c and clientloop.c of OpenSSH.
_CAUSES = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
     "the host key of {at} is not the one that known_hosts has: another device answers there",
     "if you reinstalled it, `ssh-keygen -R '{entry}'`, then `{ssh}` and compare the fingerprint"),
    (r"Host key verification failed|host key is known for",
     "{at} is unknown: known_hosts has no host key of it",
     "connect once by hand and compare the fingerprint: {ssh}"),
    (r"Permission denied|Too many authentication failures|no mutual signature",
     "{at} accepts none of your keys",
     "put your public key there (`ssh-copy-id`), or load it (`ssh-add`), until `{ssh}` needs no "
     "password: none is ever asked for or stored"),
    (r"Could not resolve hostname|Name or service not known",
     "there is no host by the name of {at}", "check the name, or `Host` in ~/.ssh/config"),
    (r"Connection refused", "{at} refuses connections", "check the port, and that sshd runs there"),
    (r"Bad owner or permissions|Bad configuration option|Can't open user config",
     "your ssh configuration cannot be used: {reason}", "mend that file, try `{ssh}`"),
    (r"timed out|No route to host|Network is unreachable|Host is down",
     "{at} cannot be reached ({reason})",
     "check that it is on and on this network; calling again resumes what was begun"),
)  # fmt: skip


@dataclass(frozen=True)
class SshAddress:
    """Where a device is; ``host`` may be an alias of the OpenSSH configuration."""

    host: str
    user: str | None = None
    port: int | None = None
    python: str = DEFAULT_PYTHON

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"ssh://{user}{host}" + (f":{self.port}" if self.port else "")


def parse_address(text: str) -> SshAddress:
    """Read ``ssh://[user@]host[:port][?python=/path/to/python3]``.

    Raises:
        DeviceError: it has another form, or a password in it.
    """
    try:
        parts = urlsplit(text)
        host, port, query = parts.hostname, parts.port, dict(parse_qsl(parts.query))
    except ValueError as error:
        raise DeviceError(f"'{text}' is no address: {error}", hint=f"give {_FORM}") from error
    if parts.password is not None:
        raise DeviceError(
            f"the address of {host} has a password in it, and passwords are never used",
            hint="use a key: ssh-copy-id, then leave the password out",
        )
    python = query.pop("python", DEFAULT_PYTHON)
    names = [host or "", *([parts.username] if parts.username is not None else [])]
    # a name that begins with a dash would be an option to ssh
    bad = not all(re.fullmatch(r"[\w.:%\[][\w.:%\-\]]*", name) for name in names)
    if parts.scheme != "ssh" or bad or parts.path not in ("", "/") or query or not python:
        raise DeviceError(f"'{clean(text)}' is no address of a device", hint=f"give {_FORM}")
    # urlsplit gives host names in lower case, aliases of the configuration may have capitals
    found = re.search(re.escape(host or ""), parts.netloc, re.IGNORECASE)
    return SshAddress(found[0] if found else host or "", parts.username, port, python)


class SshConnection(PipedConnection):
    """Runs commands on the device that ssh reaches; opens nothing before the first."""

    def __init__(self, address: SshAddress) -> None:
        self.name = self.address = str(address)
        if address.python != DEFAULT_PYTHON:
            self.address += f"?python={quote(address.python)}"
        self.python = address.python
        self._address = address
        self._folder = Path(tempfile.mkdtemp(prefix="secateur-"))
        self._socket = self._folder / "ssh"

    def close(self) -> None:
        """End the shared connection."""
        if self._socket.exists():
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*self._client(), "-O", "exit", "--", self._address.host],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=10,
                )  # fmt: skip
        shutil.rmtree(self._folder, ignore_errors=True)

    def _argv(self, command: str) -> list[str]:
        # sh, whatever the login shell is
        return [*self._client(), "--", self._address.host, f"exec sh -c {shlex.quote(command)}"]

    def _client(self) -> list[str]:
        options = [f"-o{option}" for option in _OPTIONS]
        if len(str(self._socket)) < _LONGEST_SOCKET:
            options += ["-oControlMaster=auto", f"-oControlPersist={_KEPT}",
                        f"-oControlPath={str(self._socket).replace('%', '%%')}"]  # fmt: skip
        return ["ssh", *self._where(), *options]

    def _where(self) -> list[str]:
        config = os.environ.get(CONFIG)
        words = ["-F", config] if config else []
        words += ["-p", str(self._address.port)] if self._address.port else []
        return words + (["-l", self._address.user] if self._address.user else [])

    def _failure(self, code: int, err: str) -> DeviceError | None:
        if 0 <= code < 255:  # 255 is ssh's own
            return None
        lines = [clean(line).strip() for line in err.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"ssh was ended by signal {-code}" if code < 0 else "?"
        words = {
            "at": self.name,
            "ssh": shlex.join(["ssh", *self._where(), self._address.host]),
            "entry": f"[{self._address.host}]:{self._address.port}" if self._address.port
            else self._address.host,
            "reason": reason,
        }  # fmt: skip
        for pattern, message, hint in _CAUSES:
            if code == 255 and re.search(pattern, err):
                return ConnectionLost(message.format(**words), hint=hint.format(**words))
        return ConnectionLost(
            f"the connection to {self.name} was lost ({reason})",
            hint=RESUMES,
        )
