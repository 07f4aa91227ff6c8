"""Run the command line in this process, and a small project to run it on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

RECIPE = """\
model:
  factory: tinyproject:make
  checkpoint: tiny.safetensors
  input: {shape: [3, 32, 48]}
tasks:
  segmentation: {output: seg, kind: segmentation, classes: 8}
  depth:        {output: depth, kind: depth}
  room:         {output: room, kind: classification, classes: 4}
keep: [segmentation, depth]
data:
  train: {reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}
  eval:  {reader: scenes, split: test, options: {count: 8, height: 32, width: 48}}
prune:      {budget: {macs: 0.5}, search: {tries: 3, images: 8}, images: 16}
compensate: {images: 8}
recover:    {epochs: 1}
"""

FACTORY = """\
from conftest import TinyNet

def make():
    return TinyNet()

def make_wide():
    return TinyNet(24)

class Losing(TinyNet):
    def forward(self, image):
        outputs = super().forward(image)
        return {"loss": sum(each.mean() for each in outputs.values())} if self.training else outputs

def make_losing():
    return Losing()
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of ``secateur ARGUMENTS``."""
    from secateur.cli.app import main

    before = sys.argv
    sys.argv = ["secateur", *map(str, arguments)]
    try:
        main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def make_project(folder: Path, recipe: str = RECIPE) -> Path:
    """Write a factory, a checkpoint and a recipe; return the recipe's path."""
    from conftest import tiny_model
    from safetensors.torch import save_file

    (folder / "tinyproject.py").write_text(FACTORY)
    save_file(tiny_model().network.state_dict(), folder / "tiny.safetensors")
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return path
