"""Streaming least squares for one layer: moments over chunks, then the weights that fit best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.003, 0.03, 0.3, 3.0)
UNJUDGED_RIDGE = 0.1


@dataclass
class Moments:
    """Sums over samples of inputs ``x`` (G, D) and of errors ``e`` (G, O) still to be explained.

    G is 1, or the number of channels of a depth-wise convolution.
    """

    count: int
    x: Tensor
    e: Tensor
    xx: Tensor
    ex: Tensor

    @staticmethod
    def of(x: Tensor, e: Tensor) -> Moments:
        """Return the moments of inputs (G, D, S) and errors (G, O, S)."""
        across = x.transpose(1, 2)
        return Moments(
            x.shape[2], x.sum(2).double(), e.sum(2).double(),
            (x @ across).double(), (e @ across).double(),
        )  # fmt: skip

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.x + other.x, self.e + other.e,
            self.xx + other.xx, self.ex + other.ex,
        )  # fmt: skip

    @property
    def gram(self) -> Tensor:
        """Covariance of the inputs, (G, D, D)."""
        mean = self.x / self.count
        return self.xx / self.count - mean[:, :, None] * mean[:, None, :]

    @property
    def cross(self) -> Tensor:
        """Covariance of errors and inputs, (G, O, D)."""
        return (
            self.ex / self.count
            - (self.e / self.count)[:, :, None] * (self.x / self.count)[:, None, :]
        )


def fit(fitted_on: Moments, held_out: Moments | None, ridge: float | None) -> Tensor:
    """Return the change of weights (G, O, D) that explains the errors.

    With ``ridge`` None, each output takes the ridge of ``RIDGES`` (or no change at all) under
    which it errs least on ``held_out``; then all samples are used. Where nothing was held out,
    that is ``UNJUDGED_RIDGE``.
    """
    if ridge is not None or held_out is None:
        whole = fitted_on if held_out is None else fitted_on + held_out
        return _solve(whole.gram, whole.cross, UNJUDGED_RIDGE if ridge is None else ridge)
    errors = [torch.zeros_like(held_out.e)]  # no change
    gram, cross = fitted_on.gram, fitted_on.cross
    gram_out, cross_out = held_out.gram, held_out.cross
    for level in RIDGES:
        change = _solve(gram, cross, level)
        errors.append(((change @ gram_out) * change).sum(2) - 2 * (change * cross_out).sum(2))
    choice = torch.stack(errors).argmin(0)  # (G, O): 0 is no change
    whole = fitted_on + held_out
    return _chosen(whole, RIDGES, choice)


def _chosen(whole: Moments, ridges: Sequence[float], choice: Tensor) -> Tensor:
    gram, cross = whole.gram, whole.cross
    result = torch.zeros_like(cross)
    for number, level in enumerate(ridges, start=1):
        rows = choice == number
        if rows.any():
            result = torch.where(rows[:, :, None], _solve(gram, cross, level), result)
    return result


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return cross (gram + ridge * mean(diag) * I)^-1."""
    level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + (ridge * level)[:, None, None] * eye)
    return torch.cholesky_solve(cross.transpose(1, 2), factor).transpose(1, 2)
