"""A board on loopback: sshd whose shell is an emulated aarch64 userland, root's rights not needed.

Every command runs in a user namespace with a binfmt_misc of its own (Linux 6.7 and later), where
the kernel starts aarch64 programs through QEMU, so that they start others, too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from secateur.core.errors import SecateurError
from secateur.devices.emulated import cpuinfo_text
from secateur.devices.host import library_versions
from secateur.devices.userland import Userland, find_qemu, prepare_userland

BYTES = r"\x7fELF\x02\x01\x01" + 9 * r"\x00" + r"\x02\x00\xb7\x00"  # of an aarch64 program
MASK = 7 * r"\xff" + r"\x00" + 8 * r"\xff" + r"\xfe\xff\xff\xff"
MAGIC = f":aarch64:M::{BYTES}:{MASK}:"
CORTEX_A76 = (0x414FD0B1, [1 << 9 | 1 << 10 | 1 << 20, 0])  # MIDR_EL1; fphp, asimdhp, asimddp
SHELL = """#!/bin/sh
# $0 -c COMMAND: run it in the board's userland
exec unshare --user --map-root-user --mount --propagation private sh -ec '
mount -t binfmt_misc binfmt_misc {binfmt}
printf "%s" "{magic}{qemu}:F" > {binfmt}/register
mount --rbind /dev {root}/dev
mount --rbind /proc {root}/proc
mount --bind {root}/cpuinfo {root}/proc/cpuinfo
exec env -i QEMU_CPU=cortex-a76 HOME=/root PATH=/usr/bin:/bin:/usr/sbin:/sbin \
  PYTHONPATH=/opt/site PYTHONNOUSERSITE=1 OMP_NUM_THREADS=1 chroot {root} /bin/sh "$@"' sh "$@"
"""


def make_board(folder: Path, cache: Path) -> Path:
    """Make the userland of a board with four Cortex-A76; return the shell that runs in it."""
    try:
        versions = library_versions()
        wheels = ["numpy>=1.26,<3", *(f"{name}=={versions[name]}" for name in
                                      ("opencv-python-headless", "onnxruntime"))]  # fmt: skip
        userland = prepare_userland(cache, wheels, ("dash", "coreutils", "grep"))
    except SecateurError as error:
        pytest.skip(f"no aarch64 userland here: {error}")
    root = folder / "root"
    shutil.copytree(userland.system, root, symlinks=True)
    _furnish(root, userland)
    (folder / "binfmt").mkdir()
    shell = folder / "shell"
    qemu = find_qemu().resolve()
    shell.write_text(SHELL.format(binfmt=folder / "binfmt", magic=MAGIC, qemu=qemu, root=root))
    shell.chmod(0o755)
    tried = subprocess.run(
        [shell, "-c", "uname -m"], capture_output=True, text=True, check=False, timeout=120
    )
    if tried.stdout != "aarch64\n":
        pytest.skip(f"no private binfmt_misc here (Linux 6.7): {tried.stderr.strip()[-200:]}")
    return shell


def _furnish(root: Path, userland: Userland) -> None:
    """Add what a distribution's set-up would, and the libraries of a QEMU that is not static."""
    for name in ("dev", "proc", "tmp", "root", "opt", "etc", "sys/devices/system/cpu"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present"):
        (root / "sys/devices/system/cpu" / name).write_text("0-3\n")
    (root / "cpuinfo").write_text(cpuinfo_text(*CORTEX_A76))
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    for link, goal in (("bin/sh", "dash"), ("usr/bin/python3", "python3.11")):
        if not (root / link).exists():
            (root / link).symlink_to(goal)
    shutil.copytree(userland.site, root / "opt" / "site")
    said = subprocess.run(["ldd", find_qemu()], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"(/[^ ]+) \(0x", said):
        place = root / library[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, place)
        place.chmod(0o755)
