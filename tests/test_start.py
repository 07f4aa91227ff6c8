"""How the program starts: what it asks of the machine, and Ctrl-C while it is being loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import sys
from secateur.cli.app import main
sys.argv = ["secateur", "--version"]
try:
    main()
except SystemExit:
    pass
import torch
tensor = torch.ones(32 << 20)
(line,) = (line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print("huge kB:", line.split()[1])
"""


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this Linux does not grant huge pages to those who ask, and to those alone",
)
@pytest.mark.parametrize(
    ("own_setting", "granted"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)]
)
def test_large_tensors_lie_in_huge_pages(own_setting: dict[str, str], granted: bool) -> None:
    inherited = {k: v for k, v in os.environ.items()
                 if k not in ("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES")}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**inherited, **own_setting},
                          capture_output=True, text=True, check=True, timeout=120)  # fmt: skip
    huge_kb = int(done.stdout.split("huge kB:")[1])
    assert (huge_kb > 100_000) == granted, done.stdout


def test_stopped_while_loading_is_no_traceback() -> None:
    program = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "secateur.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from secateur.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")
