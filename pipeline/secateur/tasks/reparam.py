"""Layers re-parametrised per task, and how each becomes a plain layer for one task.

The contract, which any module may keep without these classes (``secateur.tasks.fold``):

* an attribute ``task`` names the task it works for now. Whoever runs the backbone once per task
  sets it before each pass (`set_task`; `TaskPasses` is such a model), so ``forward`` takes no
  second argument and a plain layer fits in the same place;
* a method ``folded(task) -> nn.Module`` returns a new plain layer that answers as this one does
  for ``task``.

peft's LoRA layers need no such method: their layout is known (`folds_as_lora`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import ModelError

Plain = nn.Conv2d | nn.Linear


def set_task(model: nn.Module, task: str) -> None:
    """Let every submodule with an attribute ``task`` work for ``task`` from now on."""
    for module in model.modules():
        if hasattr(module, "task"):
            module.task = task  # type: ignore[assignment]


class TaskPasses(nn.Module):
    """One backbone run once per task, each time with that task's layers, and a head per task.

    ``forward``: (N, C, H, W) -> ``{task: heads[task](backbone(images))}``.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return one output per task."""
        outputs = {}
        for task, head in self.heads.items():
            set_task(self.backbone, task)
            outputs[task] = head(self.backbone(images))
        return outputs


class LoraLayer(nn.Module):
    """A layer with a low-rank update per task: ``base(x) + scaling_t * B_t(A_t(x))``.

    LoRA, arXiv 2106.09685, equation 3, one (A, B) per task, in peft's layout. ``base`` is a
    linear layer or an ungrouped convolution; B starts at zero.
    """

    def __init__(
        self, base: Plain, tasks: Sequence[str], rank: int = 4, alpha: float = 4.0
    ) -> None:
        super().__init__()
        self.base = base
        self.task = tasks[0]
        self.scaling = dict.fromkeys(tasks, alpha / rank)
        self.lora_A = nn.ModuleDict({task: _down(base, rank) for task in tasks})
        self.lora_B = nn.ModuleDict({task: _up(base, rank) for task in tasks})

    def forward(self, x: Tensor) -> Tensor:
        """Answer for the task it is set to."""
        update = self.lora_B[self.task](self.lora_A[self.task](x))
        y: Tensor = self.base(x) + self.scaling[self.task] * update
        return y

    def folded(self, task: str) -> Plain:
        """Return one layer with the weight ``W + scaling_t * B_t A_t``."""
        return merged_lora(self, task)


class TapsLayer(nn.Module):
    """A layer that each task takes as it is or changes: weight ``W + 1[s_t > tau] * delta_t``.

    TAPS, arXiv 2203.16708: delta_t has the weight's shape, s_t is one learnt score, and the
    indicator passes the gradient straight through to it.
    """

    def __init__(self, base: Plain, tasks: Sequence[str], threshold: float = 0.1) -> None:
        super().__init__()
        self.base = base
        self.task = tasks[0]
        self.threshold = threshold
        self.delta = nn.ParameterDict({t: torch.zeros_like(base.weight) for t in tasks})
        self.score = nn.ParameterDict({t: torch.ones(()) for t in tasks})

    def forward(self, x: Tensor) -> Tensor:
        """Answer for the task it is set to."""
        return _apply(self.base, self._weight(self.task), x)

    def folded(self, task: str) -> Plain:
        """Return one layer with the task's weight; the base layer's where its gate is shut."""
        return _plain(self.base, self._weight(task), self.base.bias)

    def _weight(self, task: str) -> Tensor:
        score = self.score[task]
        gate = (score > self.threshold).to(score.dtype) + score - score.detach()
        weight: Tensor = self.base.weight + gate * self.delta[task]
        return weight


class RcmConv(nn.Module):
    """A filter bank that all tasks share, and a 1x1 modulator per task: ``M_t(bank(x))``.

    RCM, arXiv 2007.12540: the bank is an ungrouped convolution (or a linear layer), M_t mixes its
    outputs; here M_t starts at the identity.
    """

    def __init__(self, bank: Plain, tasks: Sequence[str]) -> None:
        super().__init__()
        self.bank = bank
        self.task = tasks[0]
        self.modulator = nn.ModuleDict({task: _identity(bank) for task in tasks})

    def forward(self, x: Tensor) -> Tensor:
        """Answer for the task it is set to."""
        y: Tensor = self.modulator[self.task](self.bank(x))
        return y

    def folded(self, task: str) -> Plain:
        """Return one layer with the weight ``M_t W`` and the bias ``M_t b``."""
        _ungrouped(self.bank)
        mixing = self.modulator.get_parameter(f"{task}.weight").flatten(1)
        bias = None if self.bank.bias is None else mixing @ self.bank.bias
        return _plain(self.bank, _mixed(mixing, self.bank.weight), bias)


def folds_as_lora(module: nn.Module) -> bool:
    """Say whether ``module`` is a LoRA layer in peft's layout.

    That is: a linear layer or convolution ``base_layer``, ``base`` or ``original``, mappings
    ``lora_A`` and ``lora_B`` of layers by adapter, and ``scaling``. Not DoRA, nor an adapter that
    is merged already.
    """
    mappings = (getattr(module, name, None) for name in ("lora_A", "lora_B"))
    return (
        _lora_base(module) is not None
        and all(isinstance(mapping, nn.ModuleDict) for mapping in mappings)
        and hasattr(module, "scaling")
        and not getattr(module, "merged", False)
        and not any(dict(getattr(module, "use_dora", None) or {}).values())
    )


def merged_lora(module: Any, task: str) -> Plain:
    """Return one layer that answers as ``module``, a LoRA layer in peft's layout, for ``task``.

    Raises:
        ModelError: the update is of a kind that has no single layer.
    """
    base = _lora_base(module)
    down, up = module.lora_A[task], module.lora_B[task]
    if base is None or down.bias is not None:
        raise ModelError(
            f"the LoRA layer's update for '{task}' has a bias before its second factor",
            hint="give the layer a method folded(task)",
        )
    _ungrouped(base)
    scaling = module.scaling[task] if isinstance(module.scaling, Mapping) else module.scaling
    weight = base.weight + scaling * _mixed(up.weight.flatten(1), down.weight)
    bias = base.bias
    if up.bias is not None:
        bias = scaling * up.bias + (0 if bias is None else bias)
    return _plain(base, weight, bias)


def _lora_base(module: nn.Module) -> Plain | None:
    for name in ("base_layer", "base", "original"):
        base = getattr(module, name, None)
        if isinstance(base, nn.Conv2d | nn.Linear):
            return base
    return None


def _mixed(mixing: Tensor, weight: Tensor) -> Tensor:
    """Return (O, M) times (M, I, ...) over M: (O, I, ...)."""
    product: Tensor = torch.tensordot(mixing, weight, dims=1)
    return product


def _plain(base: Plain, weight: Tensor, bias: Tensor | None) -> Plain:
    """Return a layer like ``base`` with other values."""
    layer = copy.deepcopy(base)
    trains = base.weight.requires_grad
    layer.weight = nn.Parameter(weight.detach().clone(), trains)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), trains)
    return layer


def _apply(base: Plain, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(base, nn.Linear):
        return functional.linear(x, weight, base.bias)
    return functional.conv2d(
        x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups
    )


def _down(base: Plain, rank: int) -> Plain:
    if isinstance(base, nn.Linear):
        return nn.Linear(base.in_features, rank, bias=False)
    _ungrouped(base)
    return nn.Conv2d(
        base.in_channels, rank, base.kernel_size,  # type: ignore[arg-type]
        base.stride, base.padding, base.dilation, bias=False,  # type: ignore[arg-type]
    )  # fmt: skip


def _up(base: Plain, rank: int) -> Plain:
    layer: Plain
    if isinstance(base, nn.Linear):
        layer = nn.Linear(rank, base.out_features, bias=False)
    else:
        layer = nn.Conv2d(rank, base.out_channels, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _identity(bank: Plain) -> Plain:
    layer: Plain
    width = bank.weight.shape[0]
    if isinstance(bank, nn.Linear):
        layer = nn.Linear(width, width, bias=False)
    else:
        layer = nn.Conv2d(width, width, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width).reshape(layer.weight.shape))
    return layer


def _ungrouped(layer: Plain) -> None:
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise ModelError(
            f"a convolution of {layer.groups} groups with an update that mixes them has no single "
            "layer",
            hint="re-parametrise ungrouped layers only, or use TapsLayer",
        )
