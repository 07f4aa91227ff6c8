"""What ``torch.utils.flop_counter`` counts in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_flop_count,
)

from secateur.core.model import evaluating

__all__ = ["counted", "flop_registry"]

# torch 2.14 counts the fused attention of GPUs and leaves out that of CPUs.
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

if ON_CPU not in flop_registry:

    @register_flop_formula(ON_CPU)
    def _attention_on_cpu(
        query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object,
        **__: object,
    ) -> int:  # fmt: skip
        """Return the operations of q k^T and a v."""
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def counted(model: nn.Module, example: Tensor) -> FlopCounterMode:
    """Return the counter after one forward pass of ``example``."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)  # the counter stumbles on views of bare parameters
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), counter:
            model(example)
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)
    return counter
