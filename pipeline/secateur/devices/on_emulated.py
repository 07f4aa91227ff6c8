"""What runs in the emulated userland besides a bundle's ``run.py``: stand-alone.

``identity`` writes as JSON what the CPU is: its MIDR_EL1 register, which programs may read
(https://docs.kernel.org/arch/arm64/cpu-feature-registers.html), and the hardware capabilities; and
the memory of a Python that does nothing else. ``inference`` opens the bundle in this folder with
its own runner, and marks for ``count_instructions.c`` where it is ready and where inferences begin
and end.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import sys
from pathlib import Path

MARK = 0x4D41524B
GETPRIORITY = 141
READY = 0  # the number of the first mark; then two for each inference
REPEATS = 3
READ_MIDR = (0xD5380000, 0xD65F03C0)  # mrs x0, midr_el1; ret
HARDWARE_CAPABILITIES = (16, 26)  # AT_HWCAP, AT_HWCAP2


def identity() -> None:
    """Write what the CPU is, and the memory that this took."""
    library = ctypes.CDLL(None)
    library.getauxval.restype = ctypes.c_ulong
    capabilities = [library.getauxval(ctypes.c_ulong(each)) for each in HARDWARE_CAPABILITIES]
    row = {"midr": execute(READ_MIDR), "capabilities": capabilities, "peak_memory": peak_memory()}
    json.dump(row, sys.stdout)


def execute(words: tuple[int, ...]) -> int:
    """Run machine code that takes nothing and returns x0."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(struct.pack(f"<{len(words)}I", *words))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_uint64)(address)())


def inference(image: str) -> None:
    """Open the bundle here and run it on an image; write what it needed as JSON."""
    sys.path.insert(0, str(Path.cwd()))
    import run  # type: ignore[import-not-found]  # the bundle's run.py

    library = ctypes.CDLL(None)

    def mark(number: int) -> None:
        library.syscall(ctypes.c_long(GETPRIORITY), ctypes.c_long(MARK), ctypes.c_long(number))

    runner = run.Runner(Path.cwd(), 1)
    mark(READY)
    inputs = run.preprocess(run.read_rgb(image), runner.manifest["input"])
    runner.session.run(inputs)  # the first one also lays weights out
    for repeat in range(REPEATS):
        mark(2 * repeat + 1)
        runner.session.run(inputs)
        mark(2 * repeat + 2)
    json.dump({"peak_memory": peak_memory(), "modules": imported()}, sys.stdout)


def peak_memory() -> int:
    """The largest resident size of this process in bytes, the emulator's own included."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def imported() -> list[str]:
    """The top-level modules that are loaded."""
    return sorted({name.partition(".")[0] for name in sys.modules})


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "identity":
        identity()
    else:
        inference(*words)
