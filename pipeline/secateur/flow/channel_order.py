"""Whether a model does better with red and blue swapped: then it was trained the other way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from secateur.bench.accuracy import Predict, score
from secateur.bench.intervals import bootstrap
from secateur.core.model import ModelInput
from secateur.core.progress import hidden
from secateur.core.task import Task
from secateur.data.sample import Reader

IMAGES = 64


def gain_if_swapped(
    predict: Predict, tasks: Sequence[Task], reader: Reader, spec: ModelInput, limit: int | None
) -> float | None:
    """Return how many percent better the tasks are with the channels in the other order.

    None unless that is beyond chance: the 95 % interval of the difference, on the same images,
    lies above 0.
    """
    other = replace(spec, layout="BGR" if spec.layout == "RGB" else "RGB")
    most = min(limit or IMAGES, IMAGES)
    with hidden():
        given, swapped = (
            score(predict, tasks, reader, each, limit=most, per_image=True)
            for each in (spec, other)
        )
    found = bootstrap(tasks, swapped, given)
    if found is None or not found.delta_t[0] > 0:
        return None
    return (found.delta_t[0] + found.delta_t[1]) / 2
