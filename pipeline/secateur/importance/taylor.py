"""Gate Taylor: the first-order change of the loss when a channel's batch-norm gate closes.

For a group with batch norms, per batch ``b`` and channel ``c``: ``g_b = gamma * dL/dgamma +
beta * dL/dbeta`` (Molchanov et al., arXiv 1906.10771, eq. 8 on gates); the score is
``sqrt(sum_b g_b^2)``, averaged over the group's batch norms. A group without batch norm uses the
summed weight form ``|sum w * dL/dw|`` over the channel's producing weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Loss


def score(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    images: Iterable[Tensor],
    loss: Loss,
) -> dict[str, NDArray[np.float64]]:
    """Return the gate-Taylor score of each group, with batch norm in eval mode."""
    modules = dict(model.named_modules())
    gates = {group.name: _gates(group, modules) for group in groups}
    squares = {group.name: np.zeros((len(gates[group.name]), group.width)) for group in groups}
    model.eval()
    for number, batch in enumerate(images):
        model.zero_grad(set_to_none=True)  # gradients of another task or batch must not leak in
        with torch.enable_grad():
            torch.autograd.backward(loss(model(batch), number))
        for name, members in gates.items():
            for row, member in enumerate(members):
                squares[name][row] += _gate_change(member, modules[member.layer]) ** 2
    model.zero_grad(set_to_none=True)
    return {
        name: np.sqrt(square).mean(axis=0) if len(square) else np.zeros(square.shape[1])
        for name, square in squares.items()
    }


def _gates(group: ChannelGroup, modules: dict[str, nn.Module]) -> list[Member]:
    makers = [member for member in group.members if member.axis == "out"]
    norms = [
        member
        for member in makers
        if isinstance(modules[member.layer], nn.modules.batchnorm._BatchNorm)
    ]
    return norms or [m for m in makers if isinstance(modules[m.layer], nn.Conv2d | nn.Linear)]


def _gate_change(member: Member, module: nn.Module) -> NDArray[np.float64]:
    """Return (width,) first-order changes of the loss if each channel were zeroed here."""
    change: Tensor | None = None
    for parameter in (module.weight, module.bias):
        if isinstance(parameter, Tensor) and parameter.grad is not None:
            part = (parameter.detach() * parameter.grad).flatten(1).sum(1) if parameter.dim() > 1 \
                else parameter.detach() * parameter.grad  # fmt: skip
            change = part if change is None else change + part
    if change is None:  # this task does not use the layer
        return np.zeros(len(member.indices))
    values = change.double().cpu().numpy()
    return np.array([values[list(at)].sum() for at in member.indices])
