"""A build in a process of its own: a library that aborts, hangs or is killed ends in one sentence.

What TensorRT does when memory runs out depends on where: mostly it reports an error, but it may
also abort (an exception in its own logger), stand still for ever (a lock that nobody holds), or be
killed by Linux. Travels inside build_engine.py; standard library only, Python 3.8.
"""

import ctypes
import signal
import subprocess
import time
from contextlib import suppress
from sys import executable, flags

from secateur.bundle.engine_errors import BuildProblem

STANDS_STILL = 180.0  # seconds without any CPU time: a builder that waits for its GPU takes some
LOOK_EVERY = 0.2
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
CHANGE = "close what else runs, give a smaller --workspace or --batch, or add swap"


def supervised(program, words):
    """Run ``program`` with this Python; return its exit status. Raises BuildProblem."""
    switches = ["-I"] * flags.isolated + ["-S"] * flags.no_site
    switches += ["-B"] * flags.dont_write_bytecode + ["-u"]
    # whoever waits for this build to end waits for its process: locks are handed on
    process = subprocess.Popen([executable, *switches, str(program), *words], close_fds=False)
    try:
        code = wait(process)
    except KeyboardInterrupt:  # it was told, too, and stops at its next step
        process.wait()
        return 130
    if code is None:
        raise BuildProblem(
            "the builder stood still for {:.0f} s, as it may when memory runs out: {}".format(
                STANDS_STILL, CHANGE
            )
        )
    if code < 0:
        raise BuildProblem(
            "the builder was ended by signal {}, as happens when memory runs out: {}".format(
                -code, CHANGE
            )
        )
    return code


def end_with_supervisor():
    """Have Linux kill this process when the one that started it ends: nobody wants its engine."""
    with suppress(OSError, AttributeError):  # another system: it builds to the end
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def wait(process):
    """The exit status of a process; None if it stood still and was killed for it."""
    spent, since = None, time.monotonic()
    while process.poll() is None:
        time.sleep(LOOK_EVERY)
        now = cpu_time(process.pid)
        if now != spent or now is None:
            spent, since = now, time.monotonic()
        elif time.monotonic() - since > STANDS_STILL:
            process.kill()
            process.wait()
            return None
    return process.returncode


def cpu_time(pid):
    """What a process has taken of the CPU so far, in the kernel's ticks; None where unknown."""
    try:
        with open("/proc/{}/stat".format(pid), "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()  # its name may have blanks
        return int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return None
