"""Stands for your own model file: any nn.Module whose forward gives one tensor per task."""

import timm
import torch
from torch import Tensor, nn


class RoadNet(nn.Module):
    """A ResNet trunk shared by lane segmentation, weather and time of day."""

    def __init__(self, lane_classes: int = 3) -> None:
        super().__init__()
        self.trunk = timm.create_model("resnet10t", features_only=True, out_indices=(2, 4))
        fine, coarse = self.trunk.feature_info.channels()
        self.lane_fine = nn.Sequential(nn.Conv2d(fine, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.lane_coarse = nn.Sequential(nn.Conv2d(coarse, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.lane = nn.Conv2d(128, lane_classes, 3, padding=1)
        self.weather = nn.Linear(coarse, 4)
        self.daytime = nn.Linear(coarse, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, coarse = self.trunk(image)
        up = nn.functional.interpolate(self.lane_coarse(coarse), scale_factor=4.0, mode="bilinear")
        lane = self.lane(torch.cat([self.lane_fine(fine), up], dim=1))
        pooled = coarse.mean(dim=(2, 3))
        return lane, self.weather(pooled), self.daytime(pooled)


def make(lane_classes: int = 3) -> nn.Module:
    """What model.factory in recipe.yaml names."""
    return RoadNet(lane_classes)
