"""The recipe's ``model``: where the network comes from, and what images it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from secateur.core.model import ModelInput
from secateur.flow.precision_spec import Strict

Positive = Annotated[float, Field(gt=0)]
UNIT_RANGE = 2.0  # constants of images in 0..1 are within it


def _of_images(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if shape[0] != 3 or min(shape) < 1:
        raise ValueError("expected [3, height, width]: channels first, without the batch")
    return shape


def _module_and_function(factory: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", factory) or factory.partition(":")[0].endswith(".py"):
        raise ValueError("expected module:function, as in net:make for make() of net.py")
    return factory


class InputSpec(Strict):
    """The recipe's ``model.input``."""

    shape: Annotated[tuple[int, int, int], AfterValidator(_of_images)]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    layout: Literal["RGB", "BGR"] = "RGB"

    @model_validator(mode="after")
    def _is_of_unit_range(self) -> InputSpec:
        if max(map(abs, (*self.mean, *self.std))) > UNIT_RANGE:
            raise ValueError(
                f"mean {self.mean} and std {self.std} look like those of images of 0 to 255; "
                "images are scaled to 0..1 first: divide each by 255"
            )
        return self

    def model_input(self) -> ModelInput:
        """Return the same as the pipeline's own value."""
        return ModelInput(*self.shape, mean=self.mean, std=self.std, layout=self.layout)


class ModelSpec(Strict):
    """The recipe's ``model``."""

    factory: Annotated[str, AfterValidator(_module_and_function)]
    arguments: dict[str, Any] = Field(default={})
    checkpoint: Path | None = None
    trunk: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*$")
    input: InputSpec
