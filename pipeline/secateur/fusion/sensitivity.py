"""How much an expert's own prediction depends on each weight, and on each layer's outputs.

Both are Fisher information without labels: targets are drawn from the expert's prediction
(``TaskKind.sample_target``), because at the prediction itself the gradient would be zero.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from secateur.core.layers import Layer, positions_last
from secateur.core.model import MultiTaskModel
from secateur.core.progress import track
from secateur.fusion.layers import CHUNK, called_once, folded, following_norms, removed
from secateur.metrics.kind import kind_of


def diagonal_fisher(expert: MultiTaskModel, images: Tensor) -> dict[str, Tensor]:
    """Return the mean over ``images`` (N, C, H, W) of the squared gradient, per parameter name.

    Images pass one by one: the square of a batch's gradient is not the sum of squares.
    Diagonal Fisher of Matena and Raffel (arXiv 2111.09832, section 3), one drawn target per image.
    """
    model = copy.deepcopy(expert).eval().requires_grad_(True)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for image in track(torch.split(images, 1), "weighing weights", len(images)):
        gradients = torch.autograd.grad(
            _own_loss(model, image, generator), list(parameters.values()), allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
    return {name: value / len(images) for name, value in total.items()}


def output_sensitivity(expert: MultiTaskModel, images: Tensor) -> dict[str, Tensor]:
    """Return, per layer, the second moments of the loss's gradient at its outputs.

    The outputs are those of the layer with its batch norm folded in, so that experts compare.
    (c_out, c_out): the output factor of K-FAC (Martens and Grosse, arXiv 1503.05671, section 3);
    for grouped convolutions only its diagonal (c_out,). Layers called more than once are absent.
    """
    model = folded(expert, following_norms(expert, images[:1]))
    assert isinstance(model, MultiTaskModel)  # noqa: S101 - a copy has its original's type
    found: dict[str, Tensor] = {}

    def after(name: str, layer: Layer, output: Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: add(name, layer, gradient)
        )

    def add(name: str, layer: Layer, gradient: Tensor) -> None:
        flat = positions_last(layer, gradient).transpose(0, 1).flatten(1)  # (c_out, S)
        grouped = isinstance(layer, torch.nn.Conv2d) and layer.groups > 1
        moments = flat.square().sum(1) if grouped else flat @ flat.T
        found[name] = found[name] + moments if name in found else moments

    generator = torch.Generator().manual_seed(0)
    hooks = [
        layer.register_forward_hook(lambda m, _, out, name=name: after(name, m, out))
        for name, layer in called_once(model, images[:1]).items()
    ]
    with removed(hooks):
        for part in track(torch.split(images, CHUNK), "weighing outputs", -(-len(images) // CHUNK)):
            part = part.clone().requires_grad_(True)  # gradients flow through frozen layers too
            torch.autograd.backward(_own_loss(model, part, generator))
            model.zero_grad(set_to_none=True)
    return found


def _own_loss(model: MultiTaskModel, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the summed losses against targets drawn from the model's own outputs."""
    with torch.enable_grad():
        outputs = model(images)
        losses = []
        for task in model.tasks:
            kind, output = kind_of(task), outputs[task.name]
            drawn = kind.sample_target(output.detach(), generator)
            losses.append(task.weight * kind.loss(output, drawn))
        return torch.stack(losses).sum()
