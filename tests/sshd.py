"""A real sshd on loopback as a device, with keys, environment and folders of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@dataclass(frozen=True)
class Device:
    """``ssh://device`` under ``config``; ``cache`` is where it keeps what is copied to it."""

    config: Path
    cache: Path
    process: subprocess.Popen[bytes]

    def builds(self) -> list[Path]:
        return sorted(self.cache.glob("secateur/builds/*"))

    def rewrite(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))


def make_key(path: Path) -> str:
    """Make a key pair; return its public half."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def need_sshd() -> None:
    if not Path(SSHD).exists() or shutil.which("ssh") is None:
        pytest.skip("no sshd here: sudo apt install openssh-server openssh-client")


@contextlib.contextmanager
def started(folder: Path, environment: Mapping[str, str], shell: str = "sh") -> Iterator[Device]:
    """Start sshd; everything it runs has ``environment`` and a login script that talks.

    ``shell`` is what runs commands, as ``shell -c COMMAND``.
    """
    host, key = make_key(folder / "host_key"), make_key(folder / "id")
    (folder / "authorized_keys").write_text(key + "\n")
    (folder / "known_hosts").write_text(f"device {host}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv {' '.join(f'{name}={value}' for name, value in environment.items())}\n"
        f'ForceCommand echo Welcome; echo noise >&2; exec {shell} -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    config = folder / "ssh_config"
    config.write_text(
        f"Host device\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
        f" HostKeyAlias device\n UserKnownHostsFile {folder}/known_hosts\n"
        f" GlobalKnownHostsFile none\n IdentityFile {folder}/id\n IdentitiesOnly yes\n"
        " IdentityAgent none\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it drops its privileges into that
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        try:
            wait_for_port(port, process, folder / "sshd.log")
            yield Device(config, Path(environment["XDG_CACHE_HOME"]), process)
        finally:
            process.kill()
            process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"sshd does not listen: {log.read_text()}")
