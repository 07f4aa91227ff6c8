"""Instructions as a budget: the table of a target's stand-in, and what a cut comes to there.

They stand for a latency where no board is attached, and are not one.
"""

from __future__ import annotations

from pathlib import Path

from secateur.core.errors import DeviceError, RuntimeMissing
from secateur.core.files import file_sha256
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.devices.latency_table import LatencyTable
from secateur.devices.target import Target
from secateur.flow.emulated import PATIENCE
from secateur.flow.job import Job
from secateur.flow.latency import profile_job, timed_file
from secateur.flow.meters import RUNTIME, counting, emulated, emulated_cpu
from secateur.flow.stages import exported
from secateur.runtimes.base import runtime_of

UNIT = "of the parent's instructions"


def instruction_table(job: Job, target: Target, out: Path) -> LatencyTable:
    """Count the recipe's operators on the target's stand-in into ``out``; what it has is kept.

    Raises:
        DeviceError, RuntimeMissing: nothing can be counted here.
    """
    with emulated(target) as connection:
        return profile_job(job, target, out, counting(target, connection))


def instructions_of(job: Job, target: Target, file: Path) -> int:
    """Return the instructions of one inference of an ONNX file on the target's stand-in.

    Raises:
        DeviceError, RuntimeMissing: nothing can be counted here.
    """

    def counted() -> int:
        with emulated(target) as connection:
            return connection.count("count_whole", {"model.onnx": file}, PATIENCE).wholes()[0]

    key = file_sha256(file), emulated_cpu(target), runtime_of(RUNTIME).version()
    return int(job.cache.json("instructions", key, counted))


def parent_instructions(job: Job, target: Target) -> int:
    """Return those of the fp32 parent with the kept tasks."""
    return instructions_of(job, target, exported(job, job.selected, job.selected_key))


def share_counted(job: Job, target: Target, cut: MultiTaskModel) -> float:
    """Return a cut's instructions, in the precision that plans are timed in, over the parent's."""
    file = timed_file(job, target, cut, model_fingerprint(cut))
    return instructions_of(job, target, file) / parent_instructions(job, target)


def share_shipped(job: Job, target: Target, onnx: Path) -> float | None:
    """Return the same of the file that ships, None where nothing can be counted here."""
    try:
        return instructions_of(job, target, onnx) / parent_instructions(job, target)
    except (DeviceError, RuntimeMissing):
        return None
