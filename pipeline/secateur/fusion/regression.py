"""Merges that look at activations: each shared layer is a least-squares problem.

``regmean`` matches every expert's layer on that expert's own inputs. ``fit_to_experts`` (the rule
``cut``) walks the merged network in execution order instead: for one layer with the merged
network's own inputs ``X`` and the experts' outputs ``Y_t`` on the same images it solves ::

    min_W  sum_t w_t |S_t^(1/2) (W X - Y_t)|^2  +  ridge * level * |M^(1/2) (W - W_0)|^2

where ``S_t`` (c_out, c_out) says how much task ``t`` depends on the layer's outputs. The first
sum depends on ``W`` as does ``|M^(1/2) (W X - Y)|^2`` with ``M = sum w_t S_t`` and the mixed
target ``Y = M^-1 sum w_t S_t Y_t``, so ordinary ridge regression onto ``Y`` solves it; ``W_0`` is
the same mixture of the experts' weights, the answer if all inputs were equal. Errors of earlier
layers are part of ``X``, so later layers, the private ones of each task included, correct them.

Where ``S_t = I`` and inputs are the experts' own this is RegMean (Jin et al., arXiv 2212.09849,
section 3); with them, and without the walk, it is the K-FAC form of Fisher merging (Tam et al.,
arXiv 2312.04339).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.layers import Layer
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.progress import track
from secateur.fusion.layers import (
    Norm,
    Positions,
    called_once,
    folded,
    following_norms,
    inputs_at,
    outputs_at,
    removed,
    unfold_into,
    visit,
)


def regmean(
    network: MultiTaskModel,
    experts: Mapping[str, MultiTaskModel],
    images: Tensor,
    *,
    weights: Mapping[str, float],
    off_diagonal: float = 0.9,
) -> MultiTaskModel:
    """Return ``network`` with shared layers ``(sum w_t G_t W_t) (sum w_t G_t)^-1``.

    RegMean (arXiv 2212.09849, section 3): ``G_t`` are the Grams of each expert's own
    inputs, ``off_diagonal`` scales what is off their diagonals. Convolutions are unfolded.
    ``images``: (N, C, H, W).
    """
    merged = copy.deepcopy(network)
    layers = called_once(merged, images[:1])
    owned = {task: set(called_once(expert, images[:1])) for task, expert in experts.items()}
    shared = {name for name in layers if sum(name in names for names in owned.values()) > 1}
    grams: dict[str, Tensor] = {}
    crosses: dict[str, Tensor] = {}
    positions = Positions(len(images))

    def see(name: str, layer: Layer, inputs: Tensor, output: Tensor, weight: float) -> None:
        if name not in shared:
            return
        x = inputs_at(layer, inputs, positions.of(name, layer, output))  # (G, D, S)
        gram = weight * (x @ x.transpose(1, 2)).double()
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag_embed(_diagonal(gram))
        cross = _rows(layer, len(gram)) @ gram
        grams[name] = grams[name] + gram if name in grams else gram
        crosses[name] = crosses[name] + cross if name in crosses else cross

    for task, expert in track(experts.items(), "reading the experts", len(experts)):
        weight = weights[task]
        visit(expert, images, lambda n, m, x, y, w=weight: see(n, m, x, y, w))  # type: ignore[misc]
    for name, gram in grams.items():
        layer = layers[name]
        start = _rows(layer, len(gram))  # what inputs that never vary leave free
        tiny = 1e-6 * _level(gram)
        weight_rows = _solve(gram, crosses[name] + tiny[:, None, None] * start, tiny)
        layer.weight.data.copy_(weight_rows.reshape(layer.weight.shape))
    return merged


def fit_to_experts(
    network: MultiTaskModel,
    experts: Mapping[str, MultiTaskModel],
    images: Tensor,
    sensitivity: Mapping[str, Mapping[str, Tensor]],
    *,
    weights: Mapping[str, float],
    ridge: float,
    damping: float,
) -> MultiTaskModel:
    """Return ``network`` refitted, layer by layer, to what the experts compute on ``images``.

    Layers of ``network`` belong to every expert that has a layer of that name; layers of one
    expert alone are refitted too. ``images``: (N, C, H, W), seen mirrored as well.
    ``sensitivity`` is ``output_sensitivity`` per task. ``ridge`` is relative to the inputs'
    mean power. ``damping`` is added to each ``S_t``, whose mean diagonal is set to 1; large values
    make the target the plain mean of the experts' outputs.

    Raises:
        ModelError: a task's sensitivity is missing, or an expert's layer is read by something
            besides its batch norm.
    """
    unknown = [task for task in experts if task not in sensitivity]
    if unknown:
        raise ModelError(
            f"no importance of the outputs of '{unknown[0]}'",
            hint="give what output_sensitivity returns for each expert",
        )
    images = torch.cat([images, images.flip(3)])
    merged = copy.deepcopy(network).eval()
    norms = following_norms(merged, images[:1])
    plain = {task: _folded(task, expert, images[:1]) for task, expert in experts.items()}
    layers = called_once(merged, images[:1])
    mixes = _mixes(plain, list(layers), images[:1], sensitivity, weights, damping)
    positions = Positions(len(images))
    targets = _targets(plain, mixes, positions, images)
    modules = dict(merged.named_modules())

    def before(name: str, layer: Layer, inputs: Tensor) -> None:
        chosen = positions.at(name)
        if name not in targets or chosen is None:
            return
        norm = modules.get(norms.get(name, ""))
        x = inputs_at(layer, inputs, chosen).double()
        fixed = norm is None and layer.bias is None
        weight, bias = _fit(mixes[name], x, targets.pop(name).double(), ridge, through_zero=fixed)
        if isinstance(norm, Norm):
            unfold_into(layer, norm, weight, bias, x)
            return
        layer.weight.data.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.data.copy_(bias)

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: before(name, m, args[0]))
        for name, layer in layers.items()
    ]
    with removed(hooks), evaluating(merged):
        merged(images)
    return merged


@dataclass(frozen=True)
class _Mix:
    """How a layer's target is made: ``shares[task]`` is (c_out, c_out) or (c_out,) or 1.

    ``weight`` (G, c_out/G, D) is that mixture of the experts' weights.
    """

    shares: Mapping[str, Tensor]
    weight: Tensor


def _folded(task: str, expert: MultiTaskModel, image: Tensor) -> MultiTaskModel:
    plain = folded(expert, following_norms(expert, image))
    assert isinstance(plain, MultiTaskModel)  # noqa: S101 - a copy has its original's type
    with evaluating(expert), evaluating(plain):
        before, after = expert(image), plain(image)
    for name, wanted in before.items():
        if (after[name] - wanted).abs().max() > 1e-2 * wanted.abs().max():
            raise ModelError(
                f"the expert of '{task}' changes when its batch norms are folded: "
                "some layer's output is read by something besides its batch norm",
                hint="merge it by another rule, for example 'fisher'",
            )
    return plain


def _mixes(
    plain: Mapping[str, MultiTaskModel],
    names: list[str],
    image: Tensor,
    sensitivity: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
    damping: float,
) -> dict[str, _Mix]:
    """Return, for each layer that some expert has, ``M^-1 w_t (S_t + damping I)`` per owner."""
    own = {task: called_once(expert, image) for task, expert in plain.items()}
    mixes = {}
    for name in names:
        layers = {task: found[name] for task, found in own.items() if name in found}
        if not layers:
            continue
        first = next(iter(layers.values()))
        width, groups = first.weight.shape[0], getattr(first, "groups", 1)
        grain = torch.eye(width) if groups == 1 else torch.ones(width)
        terms = {}
        for task in layers:  # a layer that a task's output does not need has no moments
            moments = sensitivity[task].get(name, torch.zeros_like(grain)).double()
            level = (moments * grain).sum() / width
            moments = moments / level if level > 0 else moments
            terms[task] = weights[task] * (moments + damping * grain)
        total = torch.stack(list(terms.values())).sum(0)
        shares = {
            task: torch.linalg.solve(total, term) if term.dim() > 1 else term / total
            for task, term in terms.items()
        }
        if len(shares) == 1:
            shares = {task: torch.ones(width, dtype=torch.float64) for task in shares}
        mixed = torch.stack(
            [_mixed(shares[t], layer.weight.detach().flatten(1)) for t, layer in layers.items()]
        ).sum(0)
        mixes[name] = _Mix(shares, mixed.reshape(groups, width // groups, -1))
    return mixes


def _mixed(share: Tensor, values: Tensor) -> Tensor:
    """Return ``share`` times (c_out, S) ``values``, in float64."""
    return share @ values.double() if share.dim() > 1 else share[:, None] * values.double()


def _targets(
    plain: Mapping[str, MultiTaskModel],
    mixes: Mapping[str, _Mix],
    positions: Positions,
    images: Tensor,
) -> dict[str, Tensor]:
    """Return the (c_out, S) mixed pre-activations of the experts, per layer."""
    targets: dict[str, Tensor] = {}
    for task, expert in track(plain.items(), "reading the experts", len(plain)):
        filled: Counter[str] = Counter()

        def see(
            name: str, layer: Layer, _inputs: Tensor, output: Tensor,
            task: str = task, filled: Counter[str] = filled,
        ) -> None:  # fmt: skip
            if name not in mixes or task not in mixes[name].shares:
                return
            chosen = outputs_at(layer, output, positions.of(name, layer, output))
            if name not in targets:
                samples = chosen.shape[1] // len(output) * len(images)
                targets[name] = torch.zeros(len(chosen), samples)
            place = slice(filled[name], filled[name] + chosen.shape[1])
            targets[name][:, place] += _mixed(mixes[name].shares[task], chosen).float()
            filled[name] += chosen.shape[1]

        visit(expert, images, see)
    return targets


def _fit(
    mix: _Mix, x: Tensor, target: Tensor, ridge: float, *, through_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return weight (G, c_out/G, D) and bias (c_out,) of the ridge regression of target on x.

    ``x``: (G, D, S); ``target``: (c_out, S); ``through_zero``: there is nowhere to put a bias.
    """
    wanted = target.reshape(len(x), -1, x.shape[2])
    mean_in = x.mean(2, keepdim=True) * (not through_zero)
    mean_out = wanted.mean(2, keepdim=True) * (not through_zero)
    x = x - mean_in
    error = (wanted - mean_out) - mix.weight @ x
    gram = x @ x.transpose(1, 2) / x.shape[2]
    cross = error @ x.transpose(1, 2) / x.shape[2]
    weight = mix.weight + _solve(gram, cross, ridge * _level(gram))
    return weight, (mean_out - weight @ mean_in).flatten()


def _solve(gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
    """Return ``cross (gram + ridge I)^-1``: (G, c, D) from gram (G, D, D), ridge (G,)."""
    eye = torch.eye(gram.shape[1], dtype=gram.dtype)
    damped = gram + ridge[:, None, None] * eye
    solved: Tensor = torch.linalg.solve(damped, cross.transpose(1, 2))
    return solved.transpose(1, 2)


def _level(gram: Tensor) -> Tensor:
    """Return the mean power (G,) of the inputs of a gram (G, D, D)."""
    return _diagonal(gram).mean(1).clamp(min=1e-12)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _rows(layer: nn.Conv2d | nn.Linear, groups: int) -> Tensor:
    """Return the layer's weight as (G, c_out/G, D), in float64."""
    weight = layer.weight.detach()
    return weight.reshape(groups, weight.shape[0] // groups, -1).double()
