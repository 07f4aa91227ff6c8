"""Whether a model does better on images prepared in another usual way: then it was trained so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from secateur.bench.accuracy import Predict, score
from secateur.bench.intervals import bootstrap
from secateur.core.model import ModelInput
from secateur.core.progress import hidden
from secateur.core.task import Task
from secateur.data.sample import Reader

IMAGES = 64
# Constants that pre-trained weights come with: torchvision's and timm's (timm.data.constants), per
# channel R, G, B.
CONSTANTS = {
    "of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5 (Inception, ViT)": ((0.5,) * 3, (0.5,) * 3),
    "0 and 1 (plain)": ((0.0,) * 3, (1.0,) * 3),
    "of CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
ALIKE = 0.06  # constants nearer than this, as ImageNet's and CLIP's, make no difference to tell
LEAST_GAIN = 2.0  # percent; less is found by trying several ways on few images


@dataclass(frozen=True)
class Better:
    """What the tasks gain, in %, with the images prepared as ``how`` says; ``fields`` differ."""

    how: str
    fields: str
    gain: float


def better_input(
    predict: Predict, tasks: Sequence[Task], reader: Reader, spec: ModelInput, limit: int | None
) -> Better | None:
    """Return the other usual way to prepare images that the tasks are best with, or None.

    None unless one is better beyond chance, the 95 % interval of the difference, on the same
    images, lying above 0, and by LEAST_GAIN.
    """
    most = min(limit or IMAGES, IMAGES)
    found: list[Better] = []
    with hidden():
        given = score(predict, tasks, reader, spec, limit=most, per_image=True)
        for how, fields, other in usual_inputs(spec):
            tried = score(predict, tasks, reader, other, limit=most, per_image=True)
            interval = bootstrap(tasks, tried, given)
            if interval is not None and interval.delta_t[0] > 0:
                found.append(Better(how, fields, sum(interval.delta_t) / 2))
    found = [better for better in found if better.gain >= LEAST_GAIN]
    return max(found, key=lambda better: better.gain, default=None)


def usual_inputs(spec: ModelInput) -> Iterator[tuple[str, str, ModelInput]]:
    """Yield (how, which fields differ, the input) of other ways to prepare three channels."""
    if spec.channels != 3:
        return
    other = "BGR" if spec.layout == "RGB" else "RGB"
    yield (f"the channels not in the order {spec.layout} but in the other one", "layout",
           replace(spec, layout=other))  # fmt: skip
    own = (*spec.mean, *spec.std)
    for name, (mean, std) in CONSTANTS.items():
        if spec.layout == "BGR":
            mean, std = mean[::-1], std[::-1]
        if max(abs(a - b) for a, b in zip(own, (*mean, *std), strict=True)) > ALIKE:
            yield f"mean and std {name}", "mean and std", replace(spec, mean=mean, std=std)
