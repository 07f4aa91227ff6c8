"""Which channels may be scaled, and which have to be scaled alike, without changing an output.

A layer's output channel times ``s > 0`` and its readers' weights on that channel divided by ``s``
is the same function where nothing lies between but what is positively homogeneous: ReLU, leaky
ReLU, pools, resizes, means over pixels, concats, sums of channels that are scaled alike. A Clip
(ReLU6), hard-swish, sigmoid or product is not, so channels that meet one stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from secateur.lower.quant.graph import Graph, tensor_shapes

Places = NDArray[np.int64]  # the group of each channel of a tensor

HOMOGENEOUS = frozenset({
    "AveragePool", "GlobalAveragePool", "Identity", "LeakyRelu", "MaxPool", "Relu", "Resize",
})  # fmt: skip
FLATTENING = frozenset({"Flatten", "Reshape", "Squeeze"})
ABSORBING = frozenset({"Conv", "Gemm"})


class ChannelScales:
    """The groups of channels of ``proto`` that can be scaled.

    ``places`` gives, per tensor, the group (0 is none: not to be scaled) of each of its channels;
    ``count`` is the number of groups, the first included. A resize that extrapolates, or a layer
    with other options than exporters write, is left alone.
    """

    def __init__(self, proto: ModelProto) -> None:
        self.graph = Graph(proto)
        self._shapes = tensor_shapes(proto)
        self._parent: list[int] = [0]
        self._raw: dict[str, Places] = {}
        for name in self.graph.inputs:
            self._fix(name)
        for node in self.graph.nodes.values():
            self._visit(node)
        for name in [*self.graph.outputs, *self.graph.captured]:
            self._fix(name)
        roots = np.array([self._find(place) for place in range(len(self._parent))])
        kept, numbers = np.unique(roots, return_inverse=True)
        self.count = len(kept)
        self.places: Mapping[str, Places] = {
            name: numbers[raw] for name, raw in self._raw.items() if numbers[raw].any()
        }

    def absorbs(self, node: NodeProto) -> bool:
        """Say whether scales can be moved into a node's weights."""
        graph = self.graph
        stored = all(name in graph.constants for name in node.input[1:] if name)
        plain = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        factors = plain.get("alpha", 1.0), plain.get("beta", 1.0)
        usual = not plain.get("transA", 0) and factors == (1.0, 1.0)
        return node.op_type in ABSORBING and stored and usual and node.input[0] not in (
            graph.constants)  # fmt: skip

    def _visit(self, node: NodeProto) -> None:
        if self.absorbs(node):
            weights = self.graph.array(node.input[1])
            turned = node.op_type == "Gemm" and not _attribute(node, "transB", 0)
            self._fresh(node.output[0], weights.shape[1 if turned else 0])
            return
        found = self._passed_on(node)
        if found is not None:
            self._raw[node.output[0]] = found
            return
        for name in node.input:
            self._fix(name)

    def _passed_on(self, node: NodeProto) -> Places | None:
        """Return the groups of what a homogeneous node gives, None for any other node."""
        known = [self._raw.get(name) for name in self.graph.activations(node)]
        if not known or any(places is None for places in known):
            return None
        places = [found for found in known if found is not None]
        if node.op_type in HOMOGENEOUS:
            extrapolates = _attribute(node, "coordinate_transformation_mode", b"")
            return None if extrapolates == b"tf_crop_and_resize" else places[0]
        if node.op_type == "ReduceMean":
            return places[0] if self._over_pixels(node) else None
        if node.op_type in FLATTENING:
            return self._flattened(node, places[0])
        if node.op_type == "Concat":
            whole = _attribute(node, "axis", 0) == 1 and len(places) == len(node.input)
            return np.concatenate(places) if whole else None
        if node.op_type == "Add" and len(places) == len(node.input) == 2:
            return self._summed(*places)
        return None

    def _over_pixels(self, node: NodeProto) -> bool:
        rank = len(self._shapes.get(node.input[0], ()))
        axes = self.graph.constants.get(node.input[1]) if len(node.input) > 1 else None
        if axes is None or not rank:
            return False
        reduced = {int(axis) % rank for axis in onnx.numpy_helper.to_array(axes).reshape(-1)}
        return not reduced & {0, 1}

    def _flattened(self, node: NodeProto, places: Places) -> Places | None:
        """Return each feature's group when (N, C, H, W) becomes (N, C * H * W)."""
        before = self._shapes.get(node.input[0], ())
        after = self._shapes.get(node.output[0], ())
        if len(before) < 2 or len(after) != 2 or before[1] != len(places):
            return None
        pixels = int(np.prod(before[2:]))
        return np.repeat(places, pixels) if after[1] == len(places) * pixels else None

    def _summed(self, first: Places, second: Places) -> Places | None:
        if len(first) != len(second):
            return None  # one is broadcast
        for a, b in zip(first, second, strict=True):
            self._join(int(a), int(b))
        return first

    def _fresh(self, name: str, channels: int) -> None:
        start = len(self._parent)
        self._parent += range(start, start + channels)
        self._raw[name] = np.arange(start, start + channels)

    def _fix(self, name: str) -> None:
        for place in self._raw.get(name, ()):
            self._join(int(place), 0)

    def _find(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def _join(self, a: int, b: int) -> None:
        low, high = sorted((self._find(a), self._find(b)))
        self._parent[high] = low


def _attribute(node: NodeProto, name: str, default: object) -> object:
    found = [a for a in node.attribute if a.name == name]
    return helper.get_attribute_value(found[0]) if found else default
