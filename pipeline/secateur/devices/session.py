"""One process of this machine with three pipes: what a command elsewhere is reached through."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from secateur.core.errors import RuntimeMissing

BLOCK = 1 << 18
_LONGEST_LINE = 1 << 20  # bytes
_MOST_OUTPUT = 1 << 24
_MOST_ERRORS = 1 << 16
PATIENCE = 300.0  # seconds; a slow disk with a file of gigabytes to digest is silent for long


class Session:
    """A running command; killed when the block is left before it ended.

    stderr goes into a file, not a pipe: older OpenSSH masters keep it open when they go to the
    background, and who waits for the pipe's end would wait for them.

    A command that takes or gives no byte for ``patience`` seconds is killed, and ``silent`` set.
    """

    def __init__(self, argv: list[str], patience: float = PATIENCE) -> None:
        self.silent = False
        self._patience = patience
        self._err = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._err,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except FileNotFoundError as error:
            self._err.close()
            raise RuntimeMissing(
                f"there is no `{argv[0]}` on this machine",
                hint="install the OpenSSH client: sudo apt install openssh-client",
            ) from error
        self._in: IO[bytes] = self._process.stdin  # type: ignore[assignment]
        self._out: IO[bytes] = self._process.stdout  # type: ignore[assignment]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.end_input()
        self._out.close()
        self._err.close()

    def write(self, data: bytes) -> bool:
        """Send bytes at once; return False where nobody takes them any more."""
        try:
            with self._watched():
                self._in.write(data)
                self._in.flush()
        except BrokenPipeError:
            return False
        return True

    def end_input(self) -> None:
        """Let the command see the end of its input."""
        try:
            self._in.close()
        except BrokenPipeError:
            return

    def line(self) -> bytes:
        """Return the next line of the output, b"" at its end."""
        with self._watched():
            return self._out.readline(_LONGEST_LINE)

    def read(self, most: int) -> bytes:
        """Return the next bytes of the output, b"" at its end."""
        with self._watched():
            return self._out.read(most)

    def read_all(self, seconds: float) -> str | None:
        """Return all output up to a limit; None when it took longer."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            self.end_input()
            out = self._out.read(_MOST_OUTPUT)
        finally:
            timer.cancel()
            timer.join()
        return None if late.is_set() else out.decode("utf-8", errors="replace")

    def wait(self) -> tuple[int, str]:
        """Return the exit status (negative: a signal) and the first of what stderr had."""
        self.end_input()
        while self.read(BLOCK):  # it could not end with a full pipe
            pass
        with self._watched():
            code = self._process.wait()
        self._err.seek(0)
        return code, self._err.read(_MOST_ERRORS).decode("utf-8", errors="replace")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Kill the command if the block takes too long, so that no pipe is waited for for ever."""
        timer = threading.Timer(self._patience, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.silent = True
        self._process.kill()
