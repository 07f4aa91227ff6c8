"""What ``torch.utils.flop_counter`` counts in one pass."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.core.model import evaluating


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
