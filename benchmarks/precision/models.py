"""The models of the suite of precisions, each as a recipe without its ``precision``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NYUV2 = """\
model:
  factory: secateur.zoo:{factory}
  checkpoint: benchmarks/parents/{weights}.safetensors
  input: {{shape: [3, {height}, {width}]}}
tasks:
  segmentation: {{output: segmentation, kind: segmentation, classes: 13}}
  depth:        {{output: depth, kind: depth}}
  normals:      {{output: normals, kind: normals}}
data:
  train: {{reader: nyuv2, root: "${{SECATEUR_DATA}}/nyuv2_288x384", split: {train}}}
  eval:  {{reader: nyuv2, root: "${{SECATEUR_DATA}}/nyuv2_288x384", split: {test}}}
"""
SCENES = """\
model:
  factory: secateur.zoo:{factory}
  checkpoint: benchmarks/parents/{weights}.safetensors
  input: {{shape: [3, {height}, {width}]}}
tasks:
  segmentation: {{output: segmentation, kind: segmentation, classes: 8}}
  depth:        {{output: depth, kind: depth}}
  normals:      {{output: normals, kind: normals}}
  room:         {{output: room, kind: classification, classes: 4}}
data:
  train: {{reader: scenes, split: train, options: {{height: {height}, width: {width}}}}}
  eval:  {{reader: scenes, split: {test}, options: {{height: {height}, width: {width}}}}}
"""
WHOLE = """\
prune:      {budget: {macs: 1.0}, search: false, images: 4, axes: original, criterion: magnitude}
compensate: false
"""
HALF = "prune:      {budget: {macs: 0.5}, search: false}\n"
LIBRARY = "library:    {add: false}\n"


@dataclass(frozen=True)
class Model:
    """``keep`` is the share of the parent's MACs; a cut is compensated and not trained."""

    name: str
    factory: str
    weights: str
    size: tuple[int, int] = (96, 128)
    train: str = "fit"
    keep: float = 1.0

    @property
    def trained(self) -> bool:
        """Whether its weights are there."""
        return (ROOT / "benchmarks" / "parents" / f"{self.weights}.safetensors").exists()

    def recipe(self, precision: str, test: str) -> str:
        """Return the recipe with ``precision: {...}``, judged on the split ``test``."""
        text = SCENES if self.factory.startswith("scenes") else NYUV2
        filled = text.format(
            factory=self.factory, weights=self.weights, height=self.size[0], width=self.size[1],
            train=self.train, test=test,
        )  # fmt: skip
        cut = WHOLE if self.keep == 1.0 else HALF
        return f"{filled}{cut}{LIBRARY}precision: {precision}\n"


MODELS = (
    Model("Lite0, NYUv2 96x128", "nyuv2_lite0", "nyuv2_lite0_96x128"),
    Model("MobileNetV2, NYUv2 96x128", "nyuv2_mobilenetv2", "nyuv2_mobilenetv2_96x128"),
    Model("Lite0 at half the MACs, NYUv2 96x128", "nyuv2_lite0", "nyuv2_lite0_96x128", keep=0.5),
    Model("MobileNetV3-Large, NYUv2 96x128", "nyuv2_mobilenetv3", "nyuv2_mobilenetv3_96x128"),
    Model("ResNet-18, NYUv2 96x128", "nyuv2_resnet18", "nyuv2_resnet18_96x128"),
    Model("ViT-Tiny, NYUv2 96x128", "nyuv2_vit", "nyuv2_vit_96x128"),
    Model("ViT, rendered rooms 96x128", "scenes_vit", "scenes_vit", train="train"),
    Model("Lite0, NYUv2 192x256", "nyuv2_lite0", "nyuv2_lite0", (192, 256), "train"),
)
QUICK = Model("MobileNetV2 x 0.5, rendered rooms 96x128", "scenes_small", "scenes_small",
              train="train")  # fmt: skip
