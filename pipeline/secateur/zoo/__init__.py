"""Parents: any timm backbone with one light head per task, trained ones, and a foreign one."""

from secateur.zoo.age_gender import AGE_GENDER_INPUT, age_gender
from secateur.zoo.cifar import cifar_resnet, cifar_vit
from secateur.zoo.compose import ComposedModel, HeadSpec, compose
from secateur.zoo.parents import (
    nyuv2_lite0,
    nyuv2_mobilenetv2,
    nyuv2_mobilenetv3,
    nyuv2_resnet18,
    nyuv2_vit,
    pets_lite0,
    scenes_small,
    scenes_vit,
)

__all__ = [
    "AGE_GENDER_INPUT",
    "ComposedModel",
    "HeadSpec",
    "age_gender",
    "cifar_resnet",
    "cifar_vit",
    "compose",
    "nyuv2_lite0",
    "nyuv2_mobilenetv2",
    "nyuv2_mobilenetv3",
    "nyuv2_resnet18",
    "nyuv2_vit",
    "pets_lite0",
    "scenes_small",
    "scenes_vit",
]
