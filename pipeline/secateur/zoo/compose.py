"""Compose a timm backbone and one head per task into a multi-task parent."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.zoo.heads import DenseHead, PooledHead

DENSE_KINDS = frozenset({"segmentation", "depth", "normals", "edges"})
POOLED_KINDS = frozenset({"classification", "multilabel", "regression", "keypoints"})


@dataclass(frozen=True)
class HeadSpec:
    """A head: the kind of task it serves, its output channels and its hidden width."""

    kind: str
    channels: int
    width: int = 64


class ComposedModel(nn.Module):
    """A feature pyramid shared by independent heads; ``forward`` gives ``{head name: tensor}``."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels_last = getattr(backbone, "output_fmt", None) == "NHWC"  # Swin and its kin
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return {name: head(features) for name, head in self.heads.items()}

    def select_outputs(self, names: Collection[str]) -> ComposedModel:
        """Return a copy that holds and computes only the heads in ``names``."""
        heads = {name: head for name, head in self.heads.items() if name in names}
        return ComposedModel(copy.deepcopy(self.backbone), copy.deepcopy(heads))


def compose(
    backbone: str,
    heads: Mapping[str, HeadSpec],
    *,
    backbone_weights: str | Path | None = None,
    min_stride: int = 4,
    **backbone_options: Any,
) -> ComposedModel:
    """Build ``backbone`` (any timm name with ``features_only``, CNN or ViT) with ``heads``.

    Features finer than ``min_stride`` are not used. ``backbone_weights`` is a safetensors file
    with the backbone's own timm keys; a classifier in it is ignored. Further options go to
    ``timm.create_model`` (a ViT wants ``img_size=(H, W)``).

    Raises:
        ModelError: unknown backbone, or one that offers no feature pyramid; unknown head kind.
    """
    trunk = _feature_backbone(backbone, min_stride, backbone_options)
    if backbone_weights is not None:
        _load_backbone(trunk, Path(backbone_weights))
    channels = trunk.feature_info.channels()
    reductions = trunk.feature_info.reduction()
    return ComposedModel(
        trunk,
        {name: _head(name, spec, channels, reductions) for name, spec in heads.items()},
    )


def _feature_backbone(name: str, min_stride: int, options: Mapping[str, Any]) -> Any:
    if name not in timm.list_models():
        near = timm.list_models(f"{name[:8]}*")[:5] or timm.list_models()[:5]
        raise ModelError(f"timm has no backbone '{name}'", hint=f"names like it: {', '.join(near)}")
    try:
        probe = timm.create_model(name, features_only=True, **options)
        reductions = probe.feature_info.reduction()
        used = tuple(i for i, r in enumerate(reductions) if r >= min_stride)
        if len(used) == len(reductions):
            return probe
        return timm.create_model(name, features_only=True, out_indices=used, **options)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"timm backbone '{name}' gives no feature pyramid: {error}",
            hint="choose a backbone that timm builds with features_only=True",
        ) from error


def _load_backbone(trunk: nn.Module, path: Path) -> None:
    weights = load_file(path)
    if "features.0.0.weight" in weights:
        weights = _in_order(weights, trunk, path)
    result = trunk.load_state_dict(weights, strict=False)
    if result.missing_keys:
        raise ModelError(
            f"{path} lacks {len(result.missing_keys)} backbone weights, "
            f"first '{result.missing_keys[0]}'",
            hint="the file must hold the keys of timm.create_model(<backbone>)",
        )


def _in_order(weights: dict[str, Tensor], trunk: nn.Module, path: Path) -> dict[str, Tensor]:
    """Rename torchvision's keys (``features.3.conv.0.0.weight``) to timm's.

    Both number the same layers in execution order; the shapes must agree one by one.
    """

    def layers(keys: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))

    theirs = layers(k for k in weights if k.startswith("features."))
    theirs.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    wanted = trunk.state_dict()
    names = dict(zip(layers(wanted), theirs, strict=False))
    renamed = {}
    for key, ours in wanted.items():
        layer, _, field = key.rpartition(".")
        found = weights.get(f"{names.get(layer)}.{field}")
        if found is None or found.shape != ours.shape:
            raise ModelError(
                f"{path} has no weight of shape {tuple(ours.shape)} in the place of '{key}'",
                hint="the file must hold torchvision's weights of the same architecture",
            )
        renamed[key] = found
    return renamed


def _head(name: str, spec: HeadSpec, channels: list[int], reductions: list[int]) -> nn.Module:
    if spec.kind in DENSE_KINDS:
        return DenseHead(channels, reductions, spec.channels, spec.width)
    if spec.kind in POOLED_KINDS:
        return PooledHead(channels, spec.channels, spec.width)
    raise ModelError(
        f"head '{name}' has unknown kind '{spec.kind}'",
        hint=f"kinds: {', '.join(sorted(DENSE_KINDS | POOLED_KINDS))}",
    )
