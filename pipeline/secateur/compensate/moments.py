"""Streaming least squares for one layer: moments over chunks, then the weights that fit best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.003, 0.03, 0.3, 3.0)
UNJUDGED_RIDGE = 0.1
ROWS = 64  # outputs whose own equations are held at once


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


def fit(
    fitted_on: Moments,
    held_out: Moments | None,
    ridge: float | None,
    support: Tensor | None = None,
) -> Tensor:
    """Return the change of weights (G, O, D) that explains the errors.

    ``support`` (O, D) says which weights may change, equally many of each output; all may without.

    With ``ridge`` None, each output takes the ridge of ``RIDGES`` (or no change at all) under
    which it errs least on ``held_out``; then all samples are used. Where nothing was held out,
    that is ``UNJUDGED_RIDGE``.
    """
    if ridge is not None or held_out is None:
        whole = fitted_on if held_out is None else fitted_on + held_out
        level = UNJUDGED_RIDGE if ridge is None else ridge
        return _solve(whole.gram, whole.cross, level, support)
    errors = [torch.zeros_like(held_out.e)]  # no change
    gram, cross = fitted_on.gram, fitted_on.cross
    gram_out, cross_out = held_out.gram, held_out.cross
    for level in RIDGES:
        change = _solve(gram, cross, level, support)
        errors.append(((change @ gram_out) * change).sum(2) - 2 * (change * cross_out).sum(2))
    choice = torch.stack(errors).argmin(0)  # (G, O): 0 is no change
    whole = fitted_on + held_out
    return _chosen(whole, choice, support)


def _chosen(whole: Moments, choice: Tensor, support: Tensor | None) -> Tensor:
    gram, cross = whole.gram, whole.cross
    result = torch.zeros_like(cross)
    for number, level in enumerate(RIDGES, start=1):
        rows = choice == number
        if rows.any():
            solved = _solve(gram, cross, level, support)
            result = torch.where(rows[:, :, None], solved, result)
    return result


def _solve(gram: Tensor, cross: Tensor, ridge: float, support: Tensor | None) -> Tensor:
    """Return cross (gram + ridge * mean(diag) * I)^-1, row by row within the support.

    Zero where the inputs never change, so that the Gram is rounding and not positive definite.
    """
    level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    ridged = gram + (ridge * level)[:, None, None] * eye
    if support is None:
        factor, failed = torch.linalg.cholesky_ex(ridged)
        solved = torch.cholesky_solve(cross.transpose(1, 2), factor).transpose(1, 2)
        return torch.where((failed > 0)[:, None, None], 0.0, solved)
    result = torch.zeros_like(cross)
    places = support.nonzero()[:, 1].reshape(len(support), -1)
    for rows in torch.split(torch.arange(len(support)), ROWS):
        at = places[rows]
        factor, failed = torch.linalg.cholesky_ex(ridged[0][at[:, :, None], at[:, None, :]])
        wanted = cross[0][rows[:, None], at][:, :, None]
        solved = torch.cholesky_solve(wanted, factor)[:, :, 0]
        result[0][rows[:, None], at] = torch.where((failed > 0)[:, None], 0.0, solved)
    return result
