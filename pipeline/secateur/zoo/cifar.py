"""Two parents for 32x32 images, narrow enough to be cut many times on a CPU (benchmarks/vote)."""

from __future__ import annotations

import timm
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

SEEN = 80  # classes of CIFAR-100 that they are trained on
WIDTH = 16  # of the ResNet's first stage; 64 in arXiv 1512.03385
EMBEDDING = 96


class Classifier(nn.Module):
    """A body that gives (N, D) features, and a linear head for them, the output ``label``."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return (N, classes) logits of (N, 3, 32, 32) images."""
        return {"label": self.head(self.body(images))}


def cifar_resnet(classes: int = SEEN) -> Classifier:
    """ResNet-18 of a quarter of the width; a 3x3 stem keeps the resolution (44 M MACs)."""
    widths = tuple(WIDTH * 2**stage for stage in range(4))
    body = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=0, channels=widths)
    body.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    body.maxpool = nn.Identity()
    return Classifier(body, widths[-1], classes)


def cifar_vit(classes: int = SEEN) -> Classifier:
    """A ViT with patches of 4, six blocks of 96 channels and eight heads (48 M MACs)."""
    body = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=EMBEDDING, depth=6,
        num_heads=8, num_classes=0,
    )  # fmt: skip
    for block in body.blocks:
        # On a CPU the fused attention's backward in bfloat16 takes ten times as long as in float32.
        block.attn.fused_attn = False
    return Classifier(body, EMBEDDING, classes)
