"""The ``precision`` part of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur.lower.quant.calibrators import Calibrator
from secateur.lower.quant.plan import Precision


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DistillSpec(Strict):
    """Quantisation-aware distillation, where the guard leaves less than ``share`` in int8."""

    steps: int = Field(default=300, ge=1)
    share: float = Field(default=0.9, gt=0, le=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=8, ge=2)


class PrecisionSpec(Strict):
    """How the cut is lowered; ``docs/recipe.md`` says what each key does."""

    mode: Literal["fp32", "fp16", "int8", "auto"] = "fp32"
    calibrator: Calibrator = "percentile"
    images: int = Field(default=128, ge=2)
    equalise: bool | Literal["auto"] = "auto"
    correct_bias: bool = True
    guard: bool = True
    pin: dict[str, Precision] = {}
    distill: DistillSpec | Literal[False] = False

    @model_validator(mode="after")
    def _pins_something(self) -> PrecisionSpec:
        if self.pin and self.mode == "fp32":
            raise ValueError("pin: with mode fp32 every node is in fp32 already")
        if self.distill and self.mode not in ("int8", "auto"):
            raise ValueError("distill: teaches a network to bear int8; give mode int8 or auto")
        return self
