"""Refit every convolution and linear layer after a cut, in execution order, without training.

For one layer with the cut network's own inputs ``X``, the parent's outputs ``Y`` of the kept
channels and the kept weights ``W``, ridge least squares *towards the kept weights*::

    W' = W + (Y - W X) X^T (X X^T + ridge * mean(diag(X X^T)) * I)^-1

with means taken out of both sides and put back as a bias (into the following batch norm's mean
where there is one). Parent and cut network are walked side by side, so each layer sees the inputs
that the layers before it, already refitted, really give. Where the layer's output is added to
something, the sum is what is fitted (``residual``). Depth-wise convolutions are many such
problems of kernel size, solved together.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.compensate.clips import Clip, find_readers
from secateur.compensate.moments import Moments, fit
from secateur.compensate.patches import draw, patches
from secateur.compensate.residual import partners
from secateur.compensate.walk import Stop, Walk
from secateur.core.channels import Axis, ChannelGroup
from secateur.core.layers import Layer, is_plain, pick, positions_last, untied
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.norms import following_norms, settle_norms
from secateur.core.plan import PrunePlan, dropped_indices
from secateur.core.progress import track

CHUNK = 32  # images per forward pass
HELD_OUT = 4  # every fourth chunk judges the ridge


@dataclass(frozen=True)
class RefitSettings:
    """How much is spent on a layer.

    ``ridge`` None chooses it per output channel on images held out of the fit. ``sweeps``: fits of
    a layer whose output is clipped. ``per_weight``: output positions, over all images, for each
    weight of an output channel, within the limits ``samples``. ``settle`` makes batch norms ready
    for training, at the cost of one more forward pass; outputs are the same without.
    """

    ridge: float | None = None
    sweeps: int = 4
    per_weight: int = 64
    samples: tuple[int, int] = (8192, 65_536)
    settle: bool = True

    def positions(self, layer: Layer, images: int) -> int:
        """Return how many output positions of each image ``layer`` is fitted on."""
        least, most = self.samples
        total = min(max(self.per_weight * layer.weight[0].numel(), least), most)
        return -(-total // images)


def refit(
    parent: MultiTaskModel,
    cut: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    images: Tensor,
    settings: RefitSettings = RefitSettings(),
    *,
    only: Collection[str] | None = None,
) -> MultiTaskModel:
    """Return a copy of ``cut`` with refitted weights.

    ``images``: (N, C, H, W) network inputs, no labels needed; ``views`` makes more of a few.
    ``parent`` is the model that ``plan`` was applied to. ``only`` are the layers to refit, by name;
    all where it is None.
    """
    return _refit(parent, cut, dropped_indices(groups, plan), {}, images, settings, only)


def refit_layers(
    parent: MultiTaskModel,
    model: MultiTaskModel,
    layers: Collection[str],
    images: Tensor,
    settings: RefitSettings = RefitSettings(),
) -> MultiTaskModel:
    """Return a copy of ``model`` whose ``layers``, by name, give what the parent's do.

    Both are of one shape. ``images``: as for ``refit``. So a head comes to read another trunk.
    """
    return _refit(parent, model, {}, {}, images, settings, layers)


def refit_sparse(
    dense: MultiTaskModel,
    sparse: MultiTaskModel,
    masks: Mapping[str, Tensor],
    images: Tensor,
    settings: RefitSettings = RefitSettings(),
) -> MultiTaskModel:
    """Return a copy of ``sparse`` whose other weights make up for its zeros, which stay.

    ``sparse`` is ``dense`` with single weights zero: ``masks`` by weight's name, of its shape, True
    where it stays, equally many for each output (2:4 sparsity is such a mask). ``images``: as for
    ``refit``. Row by row the least squares of SparseGPT (arXiv 2301.00774, eq. 3), masks given.
    """
    return _refit(dense, sparse, {}, masks, images, settings)


def _refit(
    parent: MultiTaskModel,
    cut: MultiTaskModel,
    dropped: Mapping[tuple[str, Axis], set[int]],
    masks: Mapping[str, Tensor],
    images: Tensor,
    settings: RefitSettings,
    only: Collection[str] | None = None,
) -> MultiTaskModel:
    fitted = copy.deepcopy(cut).eval()
    layers = _single_calls(fitted, images[:1])
    norms = following_norms(fitted, images[:1])
    readers = find_readers(fitted, layers, images[:1])
    added = partners(fitted, layers, norms, images[:1])
    chunks = torch.split(images, CHUNK)
    with evaluating(parent):
        pairs = [
            (Walk(parent, chunk, layers, added, at_output=True),
             Walk(fitted, chunk, layers, added, at_output=False))
            for chunk in chunks
        ]  # fmt: skip
        for name, layer in track(layers.items(), "refitting", len(layers)):
            if only is not None and name not in only:
                for theirs, ours in pairs:
                    theirs.next()
                    ours.next()
                continue
            norm = norms.get(name)
            gone = dropped.get((name, "out"), set())
            positions = settings.positions(layer, len(images))
            read = [_read(layer, norm, theirs, ours, gone, positions) for theirs, ours in pairs]
            mask = masks.get(f"{name}.weight")
            support = None if mask is None else mask.bool().flatten(1)
            change, offset = _fitted(layer, readers.clips.get(name), read, settings, support)
            layer.weight.data += change.reshape(layer.weight.shape)
            # A mean that others read or that another layer moves, too, is not this layer's to move.
            own = name in readers.single and sum(each is norm for each in norms.values()) == 1
            _shift(layer, norm if own else None, offset)
        for theirs, ours in pairs:
            theirs.finish()
            ours.finish()
    if settings.settle:
        settle_norms(fitted, images)  # so that training starts from what was fitted
    return fitted


def _read(
    layer: Layer, norm: nn.Module | None, theirs: Walk, ours: Walk, gone: set[int], count: int
) -> tuple[Tensor, Tensor]:
    """Run one chunk on to ``layer`` in both networks; return its inputs and what it should give."""
    wanted, given = theirs.next(), ours.next()
    kept = _kept(layer, gone, wanted.tensor)
    positions = draw(layer, wanted.tensor, count)
    target = _target(layer, norm, wanted, given, kept, positions)
    return patches(layer, given.tensor, positions), target


def views(images: Tensor) -> Tensor:
    """Return (3N, C, H, W): each image, mirrored, and its middle enlarged 1.3 times.

    Coarse layers see few positions per image, so a handful of images leaves their least squares
    short of equations; other views of the same images supply more without more data. The views of
    an image lie next to each other: what is held out in chunks to judge by is of other images.
    """
    height, width = images.shape[2:]
    top, left = int(0.115 * height), int(0.115 * width)
    middle = images[:, :, top : height - top, left : width - left]
    near = functional.interpolate(middle, size=(height, width), mode="bilinear")
    return torch.stack([images, images.flip(3), near], dim=1).flatten(0, 1)


def _single_calls(model: MultiTaskModel, image: Tensor) -> dict[str, Layer]:
    """Return the plain layers that run exactly once, in execution order.

    One that is called more often has no single target and keeps its weights, and so does one whose
    weights are another layer's, too, or that pads by other than zeros.
    """
    calls: Counter[str] = Counter()
    plain = untied({name: module for name, module in model.named_modules() if is_plain(module)})
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, layer in plain.items()
    ]
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: plain[name] for name, count in calls.items()
            if count == 1 and getattr(plain[name], "padding_mode", "zeros") == "zeros"}  # fmt: skip


def _kept(layer: Layer, gone: set[int], parent_output: Tensor) -> Tensor:
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    return torch.tensor([i for i in range(parent_output.shape[axis]) if i not in gone])


def _target(
    layer: Layer,
    norm: nn.Module | None,
    wanted: Stop,
    given: Stop,
    kept: Tensor,
    positions: Tensor,
) -> Tensor:
    """Return what the layer should give at ``positions``: (c_out, S)."""

    def columns(tensor: Tensor, channels: Tensor | None) -> Tensor:
        flat = pick(positions_last(layer, tensor), positions)
        flat = flat if channels is None else flat.index_select(1, channels)
        return flat.transpose(0, 1).flatten(1)

    target = columns(wanted.tensor, kept)
    if wanted.partner is None or given.partner is None:
        return target
    lacking = columns(wanted.partner, kept) - columns(given.partner, None)
    return target + lacking * _undo_scale(norm, len(target))[:, None]


def _undo_scale(norm: nn.Module | None, channels: int) -> Tensor:
    """Return, per channel, what one unit after the batch norm is before it.

    A channel that the norm all but silences is left out, since nothing before it can mend the
    sum; so are all channels of a norm with an activation of its own.
    """
    if norm is None:
        return torch.ones(channels)
    shape = (1, channels) if isinstance(norm, nn.BatchNorm1d) else (1, channels, 1, 1)
    low, middle, high = (norm(torch.full(shape, x)).flatten() for x in (-1.0, 0.0, 1.0))
    scale = high - middle
    audible = scale.abs() > 0.1 * scale.abs().median()
    audible &= torch.isclose(low + high, 2 * middle, atol=1e-4)
    return torch.where(audible, 1 / torch.where(audible, scale, 1.0), 0.0)


def _fitted(
    layer: Layer,
    clip: Clip | None,
    samples: Sequence[tuple[Tensor, Tensor]],
    settings: RefitSettings,
    support: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return how ``layer.weight`` is to change, and by what its outputs are to be moved (c_out,).

    ``samples``: per chunk, inputs (G, D, S) and targets (c_out, S). ``support``: see ``fit``. A
    clipped layer is fitted again with the targets that its own predictions allow.
    """
    groups, depth, _ = samples[0][0].shape
    kept = layer.weight.detach().reshape(groups, -1, depth)
    change, offset = torch.zeros_like(kept), torch.zeros(kept.shape[:2])
    for sweep in range(settings.sweeps if clip is not None else 1):
        parts = []
        for inputs, target in samples:
            if clip is not None and sweep > 0:
                predicted = (kept + change) @ inputs + offset[:, :, None]
                target = clip.bend(target, predicted.flatten(0, 1))
            parts.append(
                Moments.of(inputs, target.reshape(groups, -1, target.shape[1]) - kept @ inputs)
            )
        change, offset = (value.float() for value in _fit(parts, settings.ridge, support))
    offset = offset.flatten()
    return change, offset if layer.bias is None else offset - layer.bias.detach()


def _fit(
    parts: Sequence[Moments], ridge: float | None, support: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the change of weights (G, O, D) and the offset (G, O) of the outputs."""
    judges = parts[HELD_OUT - 1 :: HELD_OUT]
    rest = [part for i, part in enumerate(parts) if i % HELD_OUT != HELD_OUT - 1]
    change = fit(_total(rest), _total(judges) if judges else None, ridge, support)
    whole = _total(parts)
    mean_in, mean_error = whole.x / whole.count, whole.e / whole.count
    return change, mean_error - (change @ mean_in[:, :, None])[:, :, 0]


def _total(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _shift(layer: Layer, norm: nn.Module | None, offset: Tensor) -> None:
    """Add ``offset`` to the layer's outputs: as bias, or by moving the next batch norm's mean."""
    if layer.bias is not None:
        layer.bias.data += offset
    elif norm is not None and isinstance(norm.running_mean, Tensor):
        norm.running_mean -= offset
    else:
        layer.bias = nn.Parameter(offset.clone())
