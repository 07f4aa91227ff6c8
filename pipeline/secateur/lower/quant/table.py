"""Calibration: from images to the range of every activation, as a table that names its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.core.errors import CalibrationError
from secateur.core.files import file_sha256, write_json
from secateur.lower.quant.activations import ActivationStatistics, ReadImages, observe
from secateur.lower.quant.calibrators import CALIBRATORS, Calibrator, Range, calibrated_range

TABLE_SCHEMA = 1


@dataclass(frozen=True)
class CalibrationSettings:
    """How many images, drawn with which seed, and the rule that turns them into ranges.

    Raises:
        CalibrationError: fewer than two images are asked for, or the rule is unknown.
    """

    images: int = 128
    seed: int = 0
    calibrator: Calibrator = "percentile"

    def __post_init__(self) -> None:
        if self.images < 2:
            raise CalibrationError(
                f"calibration needs at least 2 images, got images={self.images}",
                hint="64 to 512 images are usual",
            )
        if self.calibrator not in CALIBRATORS:
            raise CalibrationError(
                f"there is no calibrator '{self.calibrator}'",
                hint=f"calibrators: {', '.join(CALIBRATORS)}",
            )

    def choose(self, available: int) -> tuple[int, ...]:
        """Return the positions of the images to read, ascending, out of ``available``.

        Raises:
            CalibrationError: there are fewer than asked for.
        """
        if available < self.images:
            raise CalibrationError(
                f"calibration asks for {self.images} images, there are {available}",
                hint="ask for fewer images, or add some",
            )
        drawn = np.random.default_rng(self.seed).choice(available, self.images, replace=False)
        return tuple(sorted(int(position) for position in drawn))


@dataclass(frozen=True)
class CalibrationTable:
    """``ranges`` are (lowest, highest) per activation of the model with SHA-256 ``model``.

    ``images`` and ``images_digest`` say on how many images, and on which.
    """

    model: str
    calibrator: Calibrator
    images: int
    images_digest: str
    ranges: Mapping[str, Range]

    def check_model(self, model: Path) -> None:
        """Refuse a model that the table was not made for.

        Raises:
            CalibrationError: the file's SHA-256 is another.
        """
        digest = file_sha256(model)
        if digest != self.model:
            raise CalibrationError(
                f"the calibration table was made for another model: {model} has SHA-256 "
                f"{digest[:12]}…, the table is for {self.model[:12]}…",
                hint="calibrate this model again; names of tensors may agree and ranges not",
            )

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_json(path, {"schema": TABLE_SCHEMA, **asdict(self)})

    @staticmethod
    def load(path: Path) -> CalibrationTable:
        """Read what ``save`` wrote.

        Raises:
            CalibrationError: the file is absent or of another form.
        """
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("schema") != TABLE_SCHEMA:
                raise ValueError("another schema")
            ranges = {
                name: (float(low), float(high)) for name, (low, high) in data["ranges"].items()
            }
            return CalibrationTable(**{**data, "ranges": ranges})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{path} is not a calibration table: {error!r}", hint="calibrate again"
            ) from error


def table_of(statistics: ActivationStatistics, calibrator: Calibrator) -> CalibrationTable:
    """Return the table that ``calibrator`` makes of finished statistics.

    What the model gives keeps its whole range: an answer that is clipped is a wrong one. What an
    attention mask makes -infinity has none.
    """
    ranges = {
        name: calibrated_range(found, "minmax" if name in statistics.results else calibrator)
        for name, found in sorted(statistics.tensors.items())
        if found.bounded
    }
    return CalibrationTable(
        statistics.model, calibrator, statistics.images, statistics.images_digest, ranges
    )


def calibrate(
    model: Path, read: ReadImages, calibrator: Calibrator, *, state: Path | None = None
) -> CalibrationTable:
    """Run ``read``'s images through an fp32 ONNX ``model`` and return its table.

    ``state`` (.npz) keeps the statistics: a killed calibration goes on from it, and another
    calibrator on the same images costs no further run of the model. See ``observe``.

    Raises:
        CalibrationError: see ``observe``.
    """
    return table_of(observe(model, read, state=state), calibrator)
