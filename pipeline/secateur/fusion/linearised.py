"""A network's first-order Taylor expansion at its pre-trained weights, to fine-tune in.

Task vectors of experts that were trained linearised add up with less interference, because the
output is linear in them (Ortiz-Jimenez et al., arXiv 2305.12827, section 3; L-LoRA, arXiv
2310.04742, linearises adapters alone).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp


class Linearised(nn.Module):
    """``forward(x) = f(x; theta_0) + J(x; theta_0) tau`` with ``tau`` (zeros) as the parameters.

    ``network`` is copied, frozen and kept in eval mode: batch norm uses its pre-trained
    statistics, which are part of the expansion's point. Outputs may be a tensor or a list of them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.names = tuple(name for name, _ in self.network.named_parameters())
        self.tau = nn.ParameterList(torch.zeros_like(p) for p in self.network.parameters())

    def train(self, mode: bool = True) -> Linearised:
        """Set the mode of this module; the network inside stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        """Return the linearised network's outputs, of the network's own structure."""
        point = {name: p.detach() for name, p in self.network.named_parameters()}
        step = dict(zip(self.names, self.tau, strict=True))
        value, slope = jvp(  # type: ignore[misc]  # a third value only with has_aux
            lambda weights: functional_call(self.network, weights, (images,)), (point,), (step,)
        )
        if isinstance(value, Tensor):
            return value + slope
        return [at + change for at, change in zip(value, slope, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """Return ``theta_0 + tau`` (and the buffers) under the network's own names.

        To merge linearised experts into a linearised network, merge their own state dicts, in
        which ``tau`` counts from zero; this one merges them into a plain network.
        """
        state = {key: value.clone() for key, value in self.network.state_dict().items()}
        for name, tau in zip(self.names, self.tau, strict=True):
            state[name] += tau.detach()
        return state
