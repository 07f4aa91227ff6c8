"""How the tasks' losses become one gradient: fixed weights, uncertainty, DWA or PCGrad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Losses = Mapping[str, Tensor]  # by task: a scalar, the task's weight already in it
Backward = Callable[[Tensor], None]


class Balance(nn.Module):
    """Fixed weights: the plain sum, and the contract of the other rules.

    What a rule learns or remembers are its parameters and buffers, so that a checkpoint holds
    them and the trained model does not.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.names = tuple(weights)

    def forward(self, losses: Losses) -> Tensor:
        """Return the scalar whose gradient is taken."""
        return torch.stack(list(losses.values())).sum()

    def backward(
        self,
        losses: Losses,
        shared: Tensor | None,
        parameters: Sequence[nn.Parameter],
        backward: Backward,
    ) -> None:
        """Leave the balanced gradient in ``parameters``' ``grad``, which is empty before.

        ``shared`` is a loss of no task (feature distillation); it is never re-weighted.
        """
        total = self(losses)
        backward(total if shared is None else total + shared)

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Take note of each task's mean loss over the epoch."""


class Uncertainty(Balance):
    """Learned homoscedastic uncertainty (Kendall et al., CVPR 2018, arXiv 1705.07115, eq. 10).

    ``sum_t w_t (exp(-s_t) L_t + s_t / 2)`` with ``s_t = log(sigma_t^2)``, which starts at 0, the
    fixed weights. Kendall halves the first term of regression tasks; here all tasks share the
    classification's form, for that factor only shifts ``s_t``. The user's ``w_t`` stays outside,
    or else ``s_t`` would learn to undo it.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.log_variances = nn.Parameter(torch.zeros(len(weights)))
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(list(weights.values())), persistent=False)

    def forward(self, losses: Losses) -> Tensor:
        """Return the tasks' negative log likelihood, up to a constant."""
        values = torch.stack([losses[name] for name in self.names])
        spread = self.log_variances
        return (torch.exp(-spread) * values + self.weights * spread / 2).sum()


class DynamicWeightAverage(Balance):
    """DWA (Liu et al., CVPR 2019, arXiv 1803.10704, eq. 7): slow learners weigh more.

    ``lambda_t = K softmax_t(r_t / 2)`` over K tasks with ``r_t = L_t(e-1) / L_t(e-2)``, the means
    of the two epochs before; the first two epochs have ``lambda_t = 1``.
    """

    TEMPERATURE = 2.0

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.factors: Tensor
        self.last: Tensor
        self.register_buffer("factors", torch.ones(len(weights)))
        self.register_buffer("last", torch.full((len(weights),), torch.inf))

    def forward(self, losses: Losses) -> Tensor:
        """Return the sum with this epoch's factors."""
        return (self.factors * torch.stack([losses[name] for name in self.names])).sum()

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Set the next epoch's factors."""
        now = self.last.new_tensor([means[name] for name in self.names])
        ratio = now / self.last.clamp(min=1e-12)  # all 0 after the first epoch: last is infinite
        self.factors = len(self.names) * torch.softmax(ratio / self.TEMPERATURE, 0)
        self.last = now


class ProjectedGradients(Balance):
    """PCGrad (Yu et al., NeurIPS 2020, arXiv 2001.06782, algorithm 1): gradient surgery.

    Each task's gradient loses its component along every conflicting one (negative inner product),
    in random order. Conflicts are judged on the parameters that several tasks reach: the others
    have nothing to conflict with, but would change the norms.
    """

    def backward(
        self,
        losses: Losses,
        shared: Tensor | None,
        parameters: Sequence[nn.Parameter],
        backward: Backward,
    ) -> None:
        """Set ``parameters``' ``grad`` to the sum of the projected gradients and ``shared``'s."""
        del backward  # one backward per task; bf16 needs no scaling
        used = [p for p in parameters if p.requires_grad]
        rows = [
            torch.autograd.grad(loss, used, retain_graph=True, allow_unused=True)
            for loss in losses.values()
        ]
        extra: Sequence[Tensor | None] = [None] * len(used)
        if shared is not None:
            extra = torch.autograd.grad(shared, used, allow_unused=True)
        common = [sum(row[i] is not None for row in rows) > 1 for i in range(len(used))]
        flat = [_flatten(used, row, common) for row in rows]
        merged = iter(_unflatten(used, common, _project(flat)))
        for i, parameter in enumerate(used):
            parts = [row[i] for row in rows] if not common[i] else [next(merged)]
            given = [part for part in (*parts, extra[i]) if part is not None]
            parameter.grad = torch.stack(given).sum(0) if given else None


def _project(gradients: Sequence[Tensor]) -> Tensor:
    """Return the sum of the (P,) gradients after the surgery."""
    total = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        turned = gradient.clone()
        for j in torch.randperm(len(gradients)).tolist():
            other = gradients[j]
            inner = turned @ other
            if j != i and inner < 0:
                turned -= inner / other.square().sum() * other
        total += turned
    return total


def _flatten(
    parameters: Sequence[nn.Parameter], row: Sequence[Tensor | None], common: Sequence[bool]
) -> Tensor:
    parts = [
        (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
        for parameter, gradient, wanted in zip(parameters, row, common, strict=True)
        if wanted
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _unflatten(
    parameters: Sequence[nn.Parameter], common: Sequence[bool], flat: Tensor
) -> list[Tensor]:
    wanted = [p for p, yes in zip(parameters, common, strict=True) if yes]
    pieces = torch.split(flat, [p.numel() for p in wanted])
    return [piece.reshape(p.shape) for p, piece in zip(wanted, pieces, strict=True)]


BALANCES: Mapping[str, type[Balance]] = {
    "fixed": Balance,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "pcgrad": ProjectedGradients,
}
