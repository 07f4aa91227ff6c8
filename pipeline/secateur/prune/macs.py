"""MACs: counted on the model, and predicted for any cut before it is made.

The counter is ``torch.utils.flop_counter`` halved, everywhere. The prediction is exact: each
convolution and linear layer costs ``positions * kernel * c_in * c_out``, both widths follow from
the groups (a grouped convolution reads the ``c_in`` of one of its groups, whatever is cut), each
head of attention costs the same. What functions multiply that are no layers (attention written by
hand, a blur with constant weights) is measured by taking one channel out of each group; whatever
else the counter sees is constant.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.channels import Axis, ChannelGroup
from secateur.core.flops import counted
from secateur.core.model import MultiTaskModel, evaluating
from secateur.prune.attention import head_macs
from secateur.prune.narrow import drop_channels


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one forward pass per image of ``example``."""
    return int(counted(model, example).get_total_flops()) // 2 // example.shape[0]


@dataclass(frozen=True)
class MacsModel:
    """Predicts a cut's MACs from the number of channels each group keeps.

    With ``kept`` (G,): ``macs = constant + sum_l unit_l * in_l * out_l``, where the widths are
    ``in = in_fixed + in_of @ kept`` and ``out = out_fixed + out_of @ kept``, all (L,).
    """

    unit: NDArray[np.float64]
    in_fixed: NDArray[np.float64]
    in_of: NDArray[np.float64]
    out_fixed: NDArray[np.float64]
    out_of: NDArray[np.float64]
    constant: int

    def macs(self, kept: Sequence[int] | NDArray[np.int64]) -> int:
        """Return the MACs when group ``g`` keeps ``kept[g]`` channels."""
        counts = np.asarray(kept, np.float64)
        widths_in = self.in_fixed + self.in_of @ counts
        widths_out = self.out_fixed + self.out_of @ counts
        return self.constant + round(float((self.unit * widths_in * widths_out).sum()))


def macs_model(model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor) -> MacsModel:
    """Read off ``model`` how its MACs depend on the widths of ``groups``."""
    layers = _output_positions(model, example)
    order = {name: row for row, name in enumerate(layers)}
    per_head = head_macs(model, groups, example)  # further rows: heads read 1 and make themselves
    blocks = {name: len(layers) + row for row, name in enumerate(per_head)}
    shape = (len(layers) + len(blocks), len(groups))
    of: dict[Axis, NDArray[np.float64]] = {"in": np.zeros(shape), "out": np.zeros(shape)}
    for column, group in enumerate(groups):
        for member in group.members:
            if member.layer in order:
                of[member.axis][order[member.layer], column] += len(member.indices[0])
        if group.heads_of:
            of["out"][blocks[group.heads_of], column] = 1
    unit, full_in, full_out = (np.zeros(shape[0]) for _ in range(3))
    for row, (module, positions) in enumerate(layers.values()):
        full_out[row], channels_in = module.weight.shape[:2]
        kernel = module.weight[0, 0].numel()
        full_in[row] = channels_in
        unit[row] = positions * kernel
        if getattr(module, "groups", 1) > 1:
            of["in"][row] = 0  # each group, or depth-wise channel, reads its own inputs only
    widths = np.array([group.width for group in groups], np.float64)
    for name, row in blocks.items():
        unit[row], full_in[row], full_out[row] = per_head[name], 1, of["out"][row] @ widths
    in_fixed, out_fixed = full_in - of["in"] @ widths, full_out - of["out"] @ widths
    known = round(float((unit * full_in * full_out).sum()))
    constant = count_macs(model, example) - known
    layers_only = MacsModel(unit, in_fixed, of["in"], out_fixed, of["out"], constant)
    return _with_functions(layers_only, model, groups, example)


def _with_functions(
    cost: MacsModel, model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> MacsModel:
    """Add what functions multiply for each channel of a group; nothing in most networks."""
    whole = np.array([group.width for group in groups])
    wide = np.flatnonzero(whole > 1)

    def saved(places: NDArray[np.int64]) -> int:
        """Return what one channel fewer in these groups saves beyond ``cost``."""
        cut, less = copy.deepcopy(model), whole.copy()
        drop_channels(cut, groups, {groups[place].name: [0] for place in places})
        less[places] -= 1
        return cost.macs(less) - count_macs(cut, example)

    if not wide.size or saved(wide) == 0:
        return cost
    found = {place: each for place in wide if (each := saved(np.array([place])))}
    rows = np.zeros((len(found), len(groups)))
    rows[np.arange(len(found)), list(found)] = 1
    ones, zeros = np.ones(len(found)), np.zeros(len(found))
    return replace(
        cost,
        unit=np.concatenate([cost.unit, list(found.values())]),
        in_fixed=np.concatenate([cost.in_fixed, ones]),
        in_of=np.concatenate([cost.in_of, np.zeros_like(rows)]),
        out_fixed=np.concatenate([cost.out_fixed, zeros]),
        out_of=np.concatenate([cost.out_of, rows]),
        constant=cost.constant - round(sum(each * whole[place] for place, each in found.items())),
    )


def _output_positions(
    model: nn.Module, example: Tensor
) -> dict[str, tuple[nn.Conv2d | nn.Linear, int]]:
    """Return each conv and linear layer that runs, with its output positions per image.

    Positions are H*W (or tokens) summed over all calls of the layer.
    """
    found: dict[str, tuple[nn.Conv2d | nn.Linear, int]] = {}
    batch = example.shape[0]

    def note(name: str, module: nn.Conv2d | nn.Linear, output: Tensor) -> None:
        channels = module.weight.shape[0]
        positions = output.numel() // channels // batch
        before = found[name][1] if name in found else 0
        found[name] = (module, before + positions)

    hooks = [
        module.register_forward_hook(
            lambda module, _, output, name=name: note(name, module, output)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found
