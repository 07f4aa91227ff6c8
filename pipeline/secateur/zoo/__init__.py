"""Our own parents: any timm backbone with one light head per task, and trained ones."""

from secateur.zoo.compose import ComposedModel, HeadSpec, compose
from secateur.zoo.parents import nyuv2_lite0, nyuv2_mobilenetv2, pets_lite0, scenes_small

__all__ = [
    "ComposedModel",
    "HeadSpec",
    "compose",
    "nyuv2_lite0",
    "nyuv2_mobilenetv2",
    "pets_lite0",
    "scenes_small",
]
