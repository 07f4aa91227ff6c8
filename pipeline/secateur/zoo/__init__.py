"""Our own parents: any timm backbone with one light head per task, and two trained ones."""

from secateur.zoo.compose import ComposedModel, HeadSpec, compose
from secateur.zoo.parents import nyuv2_lite0, scenes_small

__all__ = ["ComposedModel", "HeadSpec", "compose", "nyuv2_lite0", "scenes_small"]
