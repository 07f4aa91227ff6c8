"""A network seen as its convolutions and linear layers: inputs, outputs, batch norms folded."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from secateur.core.layers import Layer, is_plain, pick, positions_last, untied
from secateur.core.model import evaluating

Norm = nn.modules.batchnorm._BatchNorm
SAMPLES = 8_192  # output positions, over all images, that one layer is compared on
CHUNK = 16  # images that pass at once where a pass may be split


def plain_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers that compute just what their class says, by name."""
    return {name: module for name, module in model.named_modules() if is_plain(module)}


def called_once(model: nn.Module, image: Tensor) -> dict[str, Layer]:
    """Return the plain layers that one pass of ``image`` calls exactly once, in that order.

    One whose weights are another layer's, too, is not its own to write.
    """
    calls: Counter[str] = Counter()
    visit(model, image, lambda name, _layer, _inputs, _output: calls.update([name]))
    layers = untied(plain_layers(model))
    return {name: layers[name] for name, count in calls.items() if count == 1 and name in layers}


def following_norms(model: nn.Module, image: Tensor) -> dict[str, str]:
    """Return ``{layer: batch norm}`` for norms that read a plain layer's output tensor directly.

    Only norms with weights and running statistics count. ``image``: (1, C, H, W).
    """
    made: dict[tuple[int, int], str] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
    found: dict[str, str] = {}

    def after(name: str, output: Tensor) -> None:
        made[id(output), output._version] = name
        alive.append(output)

    def before(name: str, tensor: Tensor) -> None:
        key = id(tensor), tensor._version  # an in-place activation between raises the version
        if key in made:
            found[made[key]] = name

    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: after(name, out))
        for name, layer in plain_layers(model).items()
    ] + [
        norm.register_forward_pre_hook(lambda _m, args, name=name: before(name, args[0]))
        for name, norm in model.named_modules()
        if isinstance(norm, Norm) and norm.affine and norm.track_running_stats
    ]
    with removed(hooks), evaluating(model):
        model(image)
    return found


def folded(model: nn.Module, norms: Mapping[str, str]) -> nn.Module:
    """Return an evaluating copy whose ``norms`` do nothing: their layers do it, with a bias.

    A folded layer's output is the unit's pre-activation, in the same scale for every expert.
    """
    plain = copy.deepcopy(model).eval()
    modules = dict(plain.named_modules())
    for name, norm_name in norms.items():
        layer, norm = modules[name], modules[norm_name]
        assert isinstance(layer, Layer) and isinstance(norm, Norm)  # noqa: S101 - types only
        assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101
        scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
        bias = 0 if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias.detach())
        layer.weight.data *= scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        norm.weight.data.fill_(1)
        norm.bias.data.zero_()
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    return plain


def unfold_into(layer: Layer, norm: Norm, weight: Tensor, bias: Tensor, inputs: Tensor) -> None:
    """Write the pre-activation ``weight x + bias`` into a layer and its batch norm, exactly.

    The layer keeps its rows' lengths (training's step size depends on them), the norm's running
    statistics become those of the layer's outputs on ``inputs`` (G, D, S), so that training mode
    computes the same. Shapes: weight (G, c_out/G, D), bias (c_out,).
    """
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101 - types
    outputs = (weight @ inputs).flatten(0, 1)  # (c_out, S)
    rows = weight.flatten(0, 1)  # (c_out, D)
    old = layer.weight.detach().flatten(1).to(rows)
    ratio = (rows.norm(dim=1) / old.norm(dim=1).clamp(min=1e-12)).clamp(min=1e-6)
    mean, variance = outputs.mean(1), outputs.var(1, unbiased=False)
    layer.weight.data.copy_((rows / ratio[:, None]).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.data.zero_()
    norm.running_mean.copy_(mean / ratio)
    norm.running_var.copy_(variance / ratio**2)
    norm.weight.data.copy_(ratio * torch.sqrt(variance / ratio**2 + norm.eps))
    norm.bias.data.copy_(bias + mean)


def visit(
    model: nn.Module,
    images: Tensor,
    see: Callable[[str, Layer, Tensor, Tensor], None],
) -> None:
    """Pass ``images`` through ``model`` and show each plain layer's (input, output) to ``see``."""
    hooks = [
        layer.register_forward_hook(lambda m, args, out, name=name: see(name, m, args[0], out))
        for name, layer in plain_layers(model).items()
    ]
    with removed(hooks), evaluating(model):
        for part in torch.split(images, CHUNK):
            model(part)


class Positions:
    """The output positions that each layer is compared on: the same ones for every network."""

    def __init__(self, images: int) -> None:
        self._each = max(1, SAMPLES // images)
        self._chosen: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def of(self, name: str, layer: Layer, output: Tensor) -> Tensor:
        """Return the (P,) positions of the layer ``name`` in each image."""
        if name not in self._chosen:
            count = positions_last(layer, output).shape[2]
            order = torch.randperm(count, generator=self._generator)
            self._chosen[name] = order[: self._each].sort().values
        return self._chosen[name]

    def at(self, name: str) -> Tensor | None:
        """Return the positions chosen for ``name`` before, if any were."""
        return self._chosen.get(name)


def outputs_at(layer: Layer, output: Tensor, positions: Tensor) -> Tensor:
    """Return the (c_out, N * P) outputs at ``positions``."""
    return pick(positions_last(layer, output), positions).transpose(0, 1).flatten(1)


def inputs_at(layer: Layer, inputs: Tensor, positions: Tensor) -> Tensor:
    """Return the inputs that the outputs at ``positions`` read: (G, c_in/G * kernel, N * P).

    Only the patches asked for are gathered: an unfolded map is kernel times larger than the map.
    """
    if isinstance(layer, nn.Linear):
        return outputs_at(layer, inputs, positions)[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    (far_down, far_right), width = layer.dilation, padded.shape[3]
    out_width = (width - far_right * (columns - 1) - 1) // right + 1
    corners = positions // out_width * down * width + positions % out_width * right  # (P,)
    taps = torch.arange(rows)[:, None] * far_down * width + torch.arange(columns) * far_right
    places = (taps.flatten()[:, None] + corners).flatten()  # (kernel * P,)
    chosen = pick(padded.flatten(2), places)
    chosen = chosen.reshape(*padded.shape[:2], rows * columns, len(positions))
    return chosen.permute(1, 2, 0, 3).reshape(layer.groups, -1, len(inputs) * len(positions))


@contextmanager
def removed(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove ``hooks`` after the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
