"""The one loop over images that gradient criteria share.

Per batch there is one forward, and one backward per task through the graph it left. A backward
asks for the wanted gradients only, and nothing is added to ``parameter.grad``: no task's or
batch's gradient can leak into another's, and gradients nobody reads are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, attributes_kept
from secateur.importance.criterion import Scores, TaskBatch, TaskData
from secateur.importance.places import Gradients, Place, Places
from secateur.importance.reach import seen_whole
from secateur.importance.running_sums import batches_to_add

Rows = dict[str, dict[str, NDArray[np.float64]]]
"""Per task and group, (places, width) numbers."""


def weight_pass(
    model: MultiTaskModel,
    places: Places,
    data: TaskData,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Rows:
    """Return the mean over batches of ``change(weights, gradients)`` at each place.

    ``change`` turns two (width, K) tensors, a channel's weights and the gradient of one task's
    loss in them, into (width,) numbers. A layer that a task does not use counts as 0.
    """
    parameters = (p for found in places.values() for place in found for p in place.parameters)
    wanted = list(dict.fromkeys(parameters))
    totals, count, sums = _start(places, data.tasks)
    with left_as_found(model, wanted):
        for batch, how in seen_whole(model, batches_to_add(data, sums), data.tasks):
            count += 1
            for task, gradients in backwards(model, wanted, batch, data.tasks, how):
                gradient_of = dict(zip(wanted, gradients, strict=True))

                def value_of(place: Place, found: Gradients = gradient_of) -> Tensor | None:
                    rows = place.gradient_rows(found)
                    return None if rows is None else change(place.weights(), rows)

                _add(totals[task], places, value_of)
    return _divided(totals, count)


def gate_pass(
    model: MultiTaskModel,
    places: Places,
    data: TaskData,
    change: Callable[[Tensor, int], Tensor],
) -> Rows:
    """Return the mean over samples of ``change(gate gradients, positions)`` at each place.

    A gate of 1 multiplies each channel of a place's output, one per sample, so its gradient is
    ``sum over positions of activation * dL/d activation``: (N, width), of each sample's own loss.
    ``positions`` is how many there are in one sample (pixels, tokens). ``change`` returns
    (width,) numbers, summed over the samples.

    Raises:
        ModelError: a layer mixes the images of a batch, so that no sample has its own gradient.
    """
    layers = {place.layer: place.module for found in places.values() for place in found}
    totals, count, sums = _start(places, data.tasks)
    with left_as_found(model, ()):
        for batch, how in seen_whole(model, batches_to_add(data, sums), data.tasks):
            size = len(batch.images)
            count += size
            with _gated(layers, batch.images) as gates:
                wanted = [gate.values for gate in gates.values()]
                own_losses = batch.by_image()
                for task, gradients in backwards(model, wanted, own_losses, data.tasks, how):
                    gradient_of = dict(zip(gates, gradients, strict=True))

                    def value_of(
                        place: Place,
                        found: Mapping[str, Tensor | None] = gradient_of,
                        gates: Mapping[str, _Gate] = gates,
                    ) -> Tensor | None:
                        gradient = found[place.layer]
                        if gradient is None:
                            return None
                        own = place.per_channel(gradient)
                        return change(own, gates[place.layer].positions)

                    _add(totals[task], places, value_of)
    return _divided(totals, count)


def backwards(
    model: MultiTaskModel,
    wanted: Sequence[Tensor],
    batch: TaskBatch,
    tasks: Sequence[str],
    how: AbstractContextManager[Any],
) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """Yield each task and its loss's gradients in ``wanted``, None where the task uses it not.

    ``how`` is what the model is run in (``reach.seen_whole``).
    """
    with torch.enable_grad(), how:
        outputs = model(batch.images)
    with torch.enable_grad():
        losses = {task: batch.losses[task](outputs[task]) for task in tasks}
    del outputs  # so that each task's own part of the graph goes with its loss
    for task in tasks:
        loss = losses.pop(task)
        gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if loss.requires_grad and wanted:
            gradients = torch.autograd.grad(
                loss, wanted, retain_graph=bool(losses), allow_unused=True
            )
        yield task, gradients


@contextmanager
def left_as_found(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put ``model`` in eval mode, with gradients for ``wanted`` alone; afterwards undo both.

    Activations still carry the gradient past layers whose own weights need none.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        with attributes_kept(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Gate:
    """Multiplies a layer's output by (N, C) ones, ``values``, whose gradient is wanted."""

    def __init__(self, layer: str, module: nn.Module, images: Tensor) -> None:
        self._layer = layer
        self._axis = -1 if isinstance(module, nn.Linear) else 1
        width = len(module.get_parameter("weight"))
        self.values = torch.ones(len(images), width, device=images.device, requires_grad=True)
        self.positions = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the gated output, whose axis 0 is the batch, or windows of each image in turn."""
        size, width = self.values.shape
        tokens_first = output.dim() == 3 and self._axis == -1 and output.shape[1] == size
        if output.shape[0] % size or (tokens_first and output.shape[0] != size):
            raise ModelError(
                f"layer '{self._layer}' gives {tuple(output.shape)} for {size} images, so its rows "
                "are not those of one image after another, and none has a gradient of its own",
                hint="use a criterion that reads whole batches, such as taylor",
            )
        self.positions += output.numel() // (size * width)
        shape = [output.shape[0]] + [1] * (output.dim() - 1)
        shape[self._axis] = width
        return output * self.values.repeat_interleave(len(output) // size, dim=0).reshape(shape)


@contextmanager
def _gated(layers: Mapping[str, nn.Module], images: Tensor) -> Iterator[dict[str, _Gate]]:
    """Put a gate behind each layer for one batch."""
    gates = {layer: _Gate(layer, module, images) for layer, module in layers.items()}
    handles = [module.register_forward_hook(gates[layer]) for layer, module in layers.items()]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def scores_of(
    rows: Rows, reduce: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> dict[str, Scores]:
    """Return (width,) scores from each group's (places, width) rows."""
    return {
        task: {name: reduce(values) for name, values in found.items()}
        for task, found in rows.items()
    }


def _start(
    places: Places, tasks: Sequence[str]
) -> tuple[Rows, NDArray[np.float64], dict[str, Tensor]]:
    """Return rows and a count (1,) of zeros, and both as named tensors of the same memory."""
    rows = {
        task: {name: np.zeros((len(found), found[0].width)) for name, found in places.items()}
        for task in tasks
    }
    count = np.zeros(1)
    named = {f"{task} {name}": values for task in tasks for name, values in rows[task].items()}
    return rows, count, {k: torch.from_numpy(v) for k, v in {"count": count, **named}.items()}


def _add(
    rows: dict[str, NDArray[np.float64]],
    places: Places,
    value_of: Callable[[Place], Tensor | None],
) -> None:
    for name, found in places.items():
        for row, place in enumerate(found):
            value = value_of(place)
            if value is not None:  # else the task does not use the layer
                rows[name][row] += value.double().cpu().numpy()


def _divided(rows: Rows, count: NDArray[np.float64]) -> Rows:
    return {
        task: {name: values / np.maximum(count, 1) for name, values in found.items()}
        for task, found in rows.items()
    }
