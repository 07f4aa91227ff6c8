"""The parents we train and commit (``benchmarks/train_parent.py``, ``benchmarks/parents``)."""

from __future__ import annotations

from pathlib import Path

from secateur.data.pets import BREEDS, SPECIES, TRIMAP
from secateur.data.scenes import CLASSES as SCENE_CLASSES
from secateur.data.scenes import ROOMS as SCENE_ROOMS
from secateur.zoo.compose import ComposedModel, HeadSpec, compose

NYUV2_HEADS = {
    "segmentation": HeadSpec("segmentation", 13),
    "depth": HeadSpec("depth", 1),
    "normals": HeadSpec("normals", 3),
}
SCENES_HEADS = {
    "segmentation": HeadSpec("segmentation", len(SCENE_CLASSES), width=32),
    "depth": HeadSpec("depth", 1, width=32),
    "normals": HeadSpec("normals", 3, width=32),
    "room": HeadSpec("classification", len(SCENE_ROOMS), width=32),
}


def nyuv2_lite0(backbone_weights: str | Path | None = None) -> ComposedModel:
    """EfficientNet-Lite0 with segmentation (13 classes), depth (metres) and normals heads."""
    return compose("efficientnet_lite0", NYUV2_HEADS, backbone_weights=backbone_weights)


def nyuv2_mobilenetv2(backbone_weights: str | Path | None = None) -> ComposedModel:
    """MobileNetV2 with the same three heads; takes timm's or torchvision's ImageNet weights."""
    return compose("mobilenetv2_100", NYUV2_HEADS, backbone_weights=backbone_weights)


def nyuv2_mobilenetv3(backbone_weights: str | Path | None = None) -> ComposedModel:
    """MobileNetV3-Large (hard-swish, squeeze-and-excite) with the same three heads."""
    return compose("mobilenetv3_large_100", NYUV2_HEADS, backbone_weights=backbone_weights)


def nyuv2_resnet18(backbone_weights: str | Path | None = None) -> ComposedModel:
    """ResNet-18 with the same three heads."""
    return compose("resnet18", NYUV2_HEADS, backbone_weights=backbone_weights)


def nyuv2_vit(backbone_weights: str | Path | None = None) -> ComposedModel:
    """ViT-Tiny with the same heads: 96x128 in patches of 8; they read blocks 4, 8 and 12."""
    return compose(
        "vit_tiny_patch16_224", NYUV2_HEADS, backbone_weights=backbone_weights,
        img_size=(96, 128), patch_size=8, out_indices=(3, 7, 11),
    )  # fmt: skip


def pets_lite0(backbone_weights: str | Path | None = None) -> ComposedModel:
    """EfficientNet-Lite0 with breed (3), species (2) and trimap (3 classes per pixel) heads."""
    return compose(
        "efficientnet_lite0",
        {
            "breed": HeadSpec("classification", len(BREEDS)),
            "species": HeadSpec("classification", len(SPECIES)),
            "trimap": HeadSpec("segmentation", len(TRIMAP)),
        },
        backbone_weights=backbone_weights,
    )


def scenes_small() -> ComposedModel:
    """A narrow MobileNetV2 with four heads, for the rendered rooms of ``data.scenes``."""
    return compose("mobilenetv2_050", SCENES_HEADS)


def scenes_vit() -> ComposedModel:
    """A ViT with the same heads: 96x128 in patches of 8, six blocks of 128 channels, four heads.

    The task heads read blocks 2, 4 and 6.
    """
    return compose(
        "vit_tiny_patch16_224", SCENES_HEADS, img_size=(96, 128), patch_size=8, embed_dim=128,
        depth=6, num_heads=4, out_indices=(1, 3, 5),
    )  # fmt: skip
