"""What an exported file holds, beside the same answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.lower import export_onnx
from secateur.runtimes.onnxruntime import open_session
from torch import Tensor, nn
from torch.nn import functional


class Decoder(nn.Module):
    """Two strides, and a map that is resized to the finer one: (N, 3, H, W) -> (N, 2, H/2, W/2)."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(8, 2, 1)
        self.mode = mode

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine = self.fine(image)
        up = functional.interpolate(self.coarse(fine), size=fine.shape[-2:], mode=self.mode)
        return {"map": self.mix(torch.cat([fine, up], 1))}


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize(
    ("size", "inputs", "computes_sizes"),
    [((16, 24), 3, 0), ((18, 24), 4, 1)],  # 8x12 from 4x6; 9x12 from 5x6: no whole number
)
def test_a_resize_by_whole_numbers_has_constant_scales_and_an_open_batch(
    tmp_path: Path, mode: str, size: tuple[int, int], inputs: int, computes_sizes: int
) -> None:
    torch.manual_seed(0)
    task = Task("map", "map", "segmentation", "map", classes=2)
    model = MultiTaskModel(Decoder(mode), (task,)).eval()
    path = tmp_path / "model.onnx"
    export_onnx(model, torch.randn(1, 3, *size), path)
    graph = onnx.load(path).graph
    (resize,) = (node for node in graph.node if node.op_type == "Resize")
    assert len(resize.input) == inputs
    assert Counter(node.op_type for node in graph.node)["Shape"] == computes_sizes
    session = open_session(path, 1)
    for batch in (1, 3):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            wanted = model(images)["map"].numpy()
        np.testing.assert_allclose(session.run(images.numpy())["map"], wanted, atol=1e-5)
