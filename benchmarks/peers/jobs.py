"""Who takes part, what each is asked, and how its job is run: one process, timed as a whole."""

from __future__ import annotations

import ast
import os
import resource
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "out" / "peers"
DROP = {0.5: 3, 0.3: 8}  # max_drop in %, set before anything was measured
PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class Cell:
    """One job: ``keep`` is a share of the parent's MACs, ``steps`` what it may train."""

    peer: str
    keep: float
    steps: int

    @property
    def folder(self) -> Path:
        """Where its ``fp32.onnx`` and ``int8.onnx`` go."""
        return WORK / f"{self.peer.replace(' ', '-')}-{self.keep:g}-{self.steps}"


@dataclass(frozen=True)
class Peer:
    """``commands`` gives what to run one after another; ``written``: what the engineer writes.

    ``package`` is installed into a virtual environment of its own, beside what is here, with what
    it ``needs`` and does not say.
    """

    commands: Callable[[Cell, str], Sequence[Sequence[str]]]
    written: tuple[str, ...]
    package: str = ""
    needs: tuple[str, ...] = ()


def _script(name: str) -> Callable[[Cell, str], Sequence[Sequence[str]]]:
    def commands(cell: Cell, python: str) -> Sequence[Sequence[str]]:
        words = [python, str(HERE / name), f"{cell.keep:g}", str(cell.folder)]
        return [[*words, "--steps", str(cell.steps)]]

    return commands


def _secateur(cell: Cell, python: str) -> Sequence[Sequence[str]]:
    """Return two builds, as a user would ask for them; the second finds the cut of the first."""
    builds = []
    for mode in PRECISIONS:
        settings = {"KEEP": cell.keep, "STEPS": cell.steps, "DROP": DROP[cell.keep], "MODE": mode}
        builds.append([
            "env", *(f"{name}={value:g}" if name != "MODE" else f"{name}={value}"
                     for name, value in settings.items()),
            python, "-m", "secateur", "build", str(HERE / "ours.yaml"), "--target", "x86-64-cpu",
            "--out", str(cell.folder), "--cache", str(cell.folder / "cache"),
        ])  # fmt: skip
    return builds


PEERS = {
    "secateur": Peer(_secateur, ("ours.yaml",)),
    "by hand": Peer(_script("by_hand.py"), ("by_hand.py",)),
    "uniform, from scratch": Peer(_script("uniform.py"), ("uniform.py", "by_hand.py")),
    "modelopt FastNAS": Peer(
        _script("fastnas.py"),
        ("fastnas.py", "by_hand.py"),
        "nvidia-modelopt",
        ("requests", "torchprofile==0.0.4"),
    ),
    "Olive": Peer(_script("olive_job.py"), ("olive_job.py",), "olive-ai", ("requests",)),
}


def run_job(cell: Cell) -> dict[str, Any]:
    """Run a job; return its seconds, or with ``failed`` the last thing that it said."""
    peer = PEERS[cell.peer]
    python = own_python(peer) if peer.package else sys.executable
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    paths = os.pathsep.join(map(str, (ROOT / "pipeline", ROOT / "benchmarks")))
    environment = {**os.environ, "PYTHONPATH": paths, "OLIVE_DISABLE_TELEMETRY": "1"}
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    log = cell.folder / "log.txt"
    code = 0
    with log.open("w", encoding="utf-8") as stream:
        for words in peer.commands(cell, python):
            code |= subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, cwd=cell.folder,
                                   env=environment, check=False).returncode  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for mode in PRECISIONS:  # a build's bundles
        made = cell.folder / "x86-64-cpu" / mode / "model.onnx"
        if made.exists():
            shutil.copy(made, cell.folder / f"{mode}.onnx")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row: dict[str, Any] = {
        "wall_s": round(time.monotonic() - started),
        "cpu_s": round(cpu),
    }
    if not any((cell.folder / f"{mode}.onnx").exists() for mode in PRECISIONS):
        said = log.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {code}"]
        row["failed"] = said[-1].replace(str(ROOT), ".")
    return row


def own_python(peer: Peer) -> str:
    """Return the Python of a virtual environment with the peer's package, made on first use.

    It and pip see what is installed here: the package runs with the same torch and onnxruntime.
    """
    folder = WORK / f"venv-{peer.package}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (site,) = folder.glob("lib/python3*/site-packages")
        here = [path for path in sys.path if path.endswith("-packages")]
        (site / "here.pth").write_text("\n".join(here), encoding="utf-8")
        install = [str(python), "-m", "pip", "install", "-q", peer.package, *peer.needs]
        subprocess.run(install, check=True)
    return str(python)


def lines_written(name: str) -> int:
    """Return how many lines of code an engineer writes for a peer, or for ours."""
    return sum(lines_of_code(HERE / file) for file in PEERS[name].written)


def lines_of_code(path: Path) -> int:
    """Return a file's lines without blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    lines = {n for n, line in enumerate(text.splitlines(), 1)
             if line.strip() and not line.strip().startswith("#")}  # fmt: skip
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that peers are made of, where they are installed."""
    found = {}
    for package in (peer.package for peer in PEERS.values() if peer.package):
        python = WORK / f"venv-{package}" / "bin" / "python"
        if python.exists():
            code = f"import importlib.metadata as m; print(m.version({package!r}))"
            told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
            found[package] = told.stdout.strip()
    return found
