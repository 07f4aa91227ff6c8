"""A network of the counts that is no parent of ours: ResNet-18 with the heads of NYUv2."""

from __future__ import annotations

from secateur.zoo.compose import ComposedModel, compose
from secateur.zoo.parents import NYUV2_HEADS


def nyuv2_resnet18() -> ComposedModel:
    """ResNet-18 with segmentation (13 classes), depth and normals heads; random weights."""
    return compose("resnet18", NYUV2_HEADS)
