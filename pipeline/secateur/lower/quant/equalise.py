"""Cross-layer equalisation: channels of one tensor brought to like size, outputs unchanged.

One scale serves all channels of an activation, so a channel far smaller than the largest is left a
few steps. Where the graph allows it (``channels``), each channel is divided by what makes it large
and its readers' weights are multiplied by it. Nagel et al. 2019 (arXiv 1906.04721, section 4.1)
balance the weights of two layers; our weights have a scale per output channel, so what is balanced
is the activation against the reader's input channel, as SmoothQuant does (arXiv 2211.10438, eq. 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from secateur.core.files import atomic_path
from secateur.lower.quant.activations import Images, watch
from secateur.lower.quant.channels import ChannelScales
from secateur.lower.quant.graph import Graph, replace_constant, replace_nodes
from secateur.lower.quant.weights import channel_axis

Floats = NDArray[np.float64]
MIGRATION = 0.5  # of the activations' spread that goes into the weights; 1 is all of it
LARGEST = 256.0  # factor of a channel, either way


@dataclass(frozen=True)
class Equalisation:
    """``scales`` are, per tensor, what each channel is multiplied by; 1 where it has to stay.

    ``channels`` is how many change: one that several tensors pass on, or add up, counts once.
    """

    scales: Mapping[str, Floats]
    channels: int


def plan_equalisation(model: Path, images: Images) -> Equalisation:
    """Choose the scale of every channel of an fp32 ONNX ``model`` that has one to choose.

    ``images`` (N, C, H, W) show how large channels get; a channel that stays at 0 keeps its scale.

    Raises:
        CalibrationError: the model cannot run the images.
    """
    found = ChannelScales(onnx.load(model))
    if not found.places:
        return Equalisation({}, 0)
    large = _activation_shares(model, images, found)
    weight = _weight_shares(found)
    # Readers with a scale per channel of their own (depth-wise) bear any spread.
    share = np.where(np.isnan(weight), 1.0, MIGRATION)
    weight = np.nan_to_num(weight, nan=1.0)
    migrated = (weight / np.maximum(large, 1e-12)) ** share
    alive = (large > 0) & (weight > 0)
    chosen = np.where(alive, np.clip(migrated, 1 / LARGEST, LARGEST), 1.0)
    chosen[0] = 1.0
    scales = {name: chosen[places] for name, places in found.places.items()}
    return Equalisation(scales, int((chosen != 1).sum()))


def apply_equalisation(model: Path, plan: Equalisation, out: Path) -> None:
    """Write ``model`` to ``out`` with the plan's scales in the weights that make and read them."""
    proto = onnx.load(model)
    found = ChannelScales(proto)
    for node in found.graph.nodes.values():
        if found.absorbs(node):
            _scale(proto, found.graph, node, plan.scales)
    replace_nodes(proto, list(proto.graph.node))
    with atomic_path(out) as temporary:
        onnx.save(proto, temporary)


def _scale(proto: ModelProto, graph: Graph, node: NodeProto, scales: Mapping[str, Floats]) -> None:
    made, read = scales.get(node.output[0]), scales.get(node.input[0])
    if made is None and read is None:
        return
    weights = graph.array(node.input[1]).astype(np.float64)
    rows = np.moveaxis(weights, channel_axis(node), 0)  # a view: (out, in per group, ...)
    if read is not None:
        groups = len(read) // rows.shape[1]
        per_row = np.repeat(read.reshape(groups, -1), len(rows) // groups, axis=0)
        rows /= per_row.reshape(*per_row.shape, *[1] * (rows.ndim - 2))
    if made is not None:
        rows *= made.reshape(-1, *[1] * (rows.ndim - 1))
        if len(node.input) > 2 and node.input[2]:
            replace_constant(proto, node, 2, graph.array(node.input[2]) * made)
    replace_constant(proto, node, 1, weights)


def _activation_shares(model: Path, images: Images, found: ChannelScales) -> Floats:
    """Return, per group, how near its channels come to the largest one of their tensors, 0..1."""
    peaks: dict[str, Floats] = {}
    for activations in watch(model, images, set(found.places)):
        for name in found.places:
            values = np.abs(activations[name])
            own = values.max(axis=(0, *range(2, values.ndim))).astype(np.float64)
            peaks[name] = np.maximum(peaks.get(name, own), own)
    shares = np.zeros(found.count)
    for name, own in peaks.items():
        np.maximum.at(shares, found.places[name], own / (own.max() or 1.0))
    return shares


def _weight_shares(found: ChannelScales) -> Floats:
    """Return, per group, how near its readers' weights come to the largest of their row, 0..1.

    NaN for a group that only layers of one input channel per row read.
    """
    shares = np.full(found.count, np.nan)
    for node in found.graph.nodes.values():
        places = found.places.get(node.input[0]) if found.absorbs(node) else None
        if places is None:
            continue
        rows = np.abs(np.moveaxis(found.graph.array(node.input[1]), channel_axis(node), 0))
        if rows.shape[1] == 1:
            continue
        columns = rows.reshape(*rows.shape[:2], -1).max(axis=2)
        relative = columns / np.maximum(columns.max(axis=1, keepdims=True), 1e-30)
        groups = len(places) // rows.shape[1]
        own = relative.reshape(groups, -1, rows.shape[1]).max(axis=1).reshape(-1)
        np.fmax.at(shares, places, own)
    return shares
