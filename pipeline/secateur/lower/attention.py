"""timm's attention with its projections apart: the same function without arrays of five axes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SplitAttention(nn.Module):
    """An ``Attention`` whose q, k and v are three layers; (N, tokens, C) in and out.

    timm cuts one projection into (N, tokens, 3, heads, width), and ncnn's arrays end at four axes.
    """

    def __init__(self, joint: Any) -> None:
        super().__init__()
        self.joint = joint
        # Releases of timm differ in whether they have these two.
        self.gate: nn.Module | None = getattr(joint, "gate", None)
        self.norm: nn.Module = getattr(joint, "norm", nn.Identity())
        bias = joint.qkv.bias
        weights = joint.qkv.weight.detach().chunk(3)
        biases = [None] * 3 if bias is None else bias.detach().chunk(3)
        self.parts = nn.ModuleList(map(_linear, weights, biases))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return what the joint block would."""
        joint = self.joint
        batch, tokens, _ = x.shape
        heads = batch, tokens, joint.num_heads, joint.head_dim
        q, k, v = (part(x).reshape(heads).transpose(1, 2) for part in self.parts)
        y = functional.scaled_dot_product_attention(
            joint.q_norm(q), joint.k_norm(k), v, attn_mask, is_causal=is_causal, scale=joint.scale
        )
        width = joint.num_heads * joint.head_dim
        y = self.norm(y.transpose(1, 2).reshape(batch, tokens, width))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        result: Tensor = joint.proj(y)
        return result


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def split_attention(model: nn.Module) -> nn.Module:
    """Return ``model``, or where it has timm's attention a copy with ``SplitAttention`` instead."""
    from timm.models.vision_transformer import Attention  # where all releases have it

    if not any(type(module) is Attention for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is Attention:  # a subclass has a forward of its own
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, SplitAttention(module))
    return model.eval()
