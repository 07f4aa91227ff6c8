"""int8 for ncnn: ranges of what its layers read, and the weights as its int8 kernels want them.

pip's ncnn and pnnx come without ncnn2int8 and ncnn2table; what they write is documented
(https://github.com/Tencent/ncnn/wiki/quantized-int8-inference, and the ``load_model`` functions of
src/layer/convolution.cpp, convolutiondepthwise.cpp, innerproduct.cpp), and written here. Weights
are symmetric per output channel, what a layer reads symmetric per tensor, both in -127..127.
ncnn2table gives dense 3x3 weights 6 bits, lest the sums of its Winograd kernels overflow; that
takes inputs and weights that are all near their ends and of one sign, so here they have 8, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import BuildError, CalibrationError
from secateur.core.files import atomic_path, write_text
from secateur.lower.ncnn import weights_file
from secateur.lower.quant.activations import (
    Called,
    by_position,
    check_different,
    image_digest,
)
from secateur.lower.quant.calibrators import Calibrator, calibrated_range
from secateur.lower.quant.statistics import TensorStatistics

Images = NDArray[np.float32]
MOST = 127
INT8_TAG, FP32_TAG = 0x000D4B38, 0  # before a layer's weights in the .bin file
_HEADER = 2  # lines of a .param file: a magic number, and how many layers and blobs there are
# Per layer with weights: the parameter that has their number, that of the bias, that of int8, its
# value there (the layer's own convention), and the parameter that has the number of outputs.
_LAYERS = {
    "Convolution": (6, 5, 8, 2, 0),
    "ConvolutionDepthWise": (6, 5, 8, 1, 0),
    "InnerProduct": (2, 1, 8, 2, 0),
}
_GROUPS = 7  # of a ConvolutionDepthWise: its int8 scales are per group
# Layers that have nothing in the .bin file, as far as pnnx makes them of our models.
_BARE = frozenset({
    "Input", "Split", "ReLU", "Clip", "Sigmoid", "Swish", "HardSwish", "HardSigmoid", "GELU",
    "BinaryOp", "UnaryOp", "Concat", "Interp", "Pooling", "Reshape", "Flatten", "Permute", "Slice",
    "Crop", "Padding", "Dropout", "Softmax", "Reduction", "ExpandDims", "Squeeze", "Noop",
    "PixelShuffle", "ShuffleChannel", "TanH", "Mish", "ELU", "SELU",
})  # fmt: skip


@dataclass
class Layer:
    """One line of a .param file."""

    kind: str
    name: str
    blobs: list[str]
    reads: int
    parameters: dict[int, str]

    @property
    def input(self) -> str:
        """The blob that the layer reads first."""
        return self.blobs[0]

    def number(self, key: int) -> int:
        """Return a parameter that is a whole number, 0 where it is left out."""
        return int(self.parameters.get(key, "0"))

    def line(self) -> str:
        """Return the layer as it stands in the file."""
        makes = len(self.blobs) - self.reads
        words = [self.kind, self.name, str(self.reads), str(makes), *self.blobs]
        return " ".join([*words, *(f"{key}={value}" for key, value in self.parameters.items())])


def read_layers(path: Path) -> tuple[list[str], list[Layer]]:
    """Return the header of a .param file and its layers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    layers = []
    for words in (line.split() for line in lines[_HEADER:] if line.strip()):
        reads, makes = int(words[2]), int(words[3])
        end = 4 + reads + makes
        pairs = (word.split("=", 1) for word in words[end:])
        layers.append(Layer(words[0], words[1], words[4:end], reads,
                            {int(key): value for key, value in pairs}))  # fmt: skip
    return lines[:_HEADER], layers


def observe_inputs(
    model: Path, read: Callable[[], Iterable[Images]], *, called: Called = by_position
) -> dict[str, TensorStatistics]:
    """Return the statistics of every blob that a layer with int8 kernels reads, of fp32 ``model``.

    ``read`` gives (N, C, H, W) network inputs. Errors name an image as it is ``called``.

    Raises:
        CalibrationError: there are fewer than two different images, an image is constant or not
            finite, or a layer reads values that are not finite.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute, net.opt.num_threads = False, 1
    net.opt.lightmode = False  # keeps what is read by a layer
    net.load_param(str(model))
    net.load_model(str(weights_file(model)))
    _, layers = read_layers(model)
    (name,) = net.input_names()
    found = {layer.input: TensorStatistics() for layer in layers if layer.kind in _LAYERS}
    digests: list[str] = []
    for images in read():
        for image in images:
            name_of_image = called(len(digests))
            digests.append(image_digest(image[None], name_of_image))
            extractor = net.create_extractor()
            extractor.input(name, ncnn.Mat(np.ascontiguousarray(image)))
            for blob, statistics in found.items():
                if not statistics.add(_computed(extractor, blob)) or not statistics.bounded:
                    raise CalibrationError(
                        f"ncnn's blob '{blob}' is NaN or infinite on {name_of_image}",
                        hint="build in fp32 first, which tells whether the model itself does that",
                    )
    check_different(len(digests), set(digests))
    return found


def _computed(extractor: Any, blob: str) -> NDArray[np.float32]:
    status, values = extractor.extract(blob)
    if status != 0:
        raise BuildError(
            f"ncnn cannot compute '{blob}' (status {status})",
            hint="-100 is a lack of memory; else build with runtime: onnxruntime",
        )
    return np.array(values, np.float32)


def read_scales(
    statistics: Mapping[str, TensorStatistics], calibrator: Calibrator
) -> dict[str, float]:
    """Return what each blob is multiplied by to become int8."""
    scales = {}
    for blob, seen in statistics.items():
        peak = max(abs(each) for each in calibrated_range(seen, calibrator))
        scales[blob] = MOST / peak if peak > 0 else 1.0
    return scales


def write_int8(
    model: Path, scales: Mapping[str, float], path: Path, keep: frozenset[str] = frozenset()
) -> list[str]:
    """Write fp32 ``model`` with int8 weights to ``path`` and its weights file.

    ``keep`` names layers that stay in fp32. Returns the layers that became int8.

    Raises:
        BuildError: a layer has weights of a form that is not known here.
    """
    header, layers = read_layers(model)
    data, place, parts, lowered = weights_file(model).read_bytes(), 0, [], []
    for layer in layers:
        size = _weight_bytes(layer)
        own, place = data[place : place + size], place + size
        if layer.kind in _LAYERS and layer.name not in keep and scales.get(layer.input):
            own = _quantised(layer, own, scales[layer.input])
            lowered.append(layer.name)
        parts.append(own)
    if place != len(data):
        raise BuildError(
            f"{len(data) - place} bytes of ncnn's weights belong to no known layer",
            hint="use precision fp16 or fp32 for this model on ncnn",
        )
    with atomic_path(weights_file(path)) as temporary:
        temporary.write_bytes(b"".join(parts))
    write_text(path, "".join(f"{line}\n" for line in [*header, *(la.line() for la in layers)]))
    return lowered


def _weight_bytes(layer: Layer) -> int:
    """Return the bytes that an fp32 layer has in the .bin file: a tag, weights, bias.

    Raises:
        BuildError: that is not known.
    """
    if layer.kind in _LAYERS:
        count, bias, _, _, outputs = _LAYERS[layer.kind]
        return 4 + 4 * layer.number(count) + 4 * layer.number(outputs) * bool(layer.number(bias))
    if layer.kind in _BARE:
        return 0
    raise BuildError(
        f"int8 for ncnn is not written for models with a layer {layer.kind}",
        hint="use precision fp16 or fp32 for this model on ncnn, or runtime: onnxruntime",
    )


def _quantised(layer: Layer, own: bytes, scale: float) -> bytes:
    """Return a layer's bytes in int8, and note in the layer that they are."""
    count, _, key, value, outputs = _LAYERS[layer.kind]
    size, rows = layer.number(count), layer.number(outputs)
    if layer.kind == "ConvolutionDepthWise":
        rows = layer.number(_GROUPS)
    if int.from_bytes(own[:4], "little") != FP32_TAG:
        raise BuildError("ncnn's weights are not in fp32", hint="report this with the recipe")
    weights = np.frombuffer(own, "<f4", size, 4).reshape(rows, -1).astype(np.float64)
    peaks = np.abs(weights).max(axis=1)
    factors = np.where(peaks > 0, MOST / np.where(peaks > 0, peaks, 1), 1.0)
    small = np.clip(np.rint(weights * factors[:, None]), -MOST, MOST).astype(np.int8).tobytes()
    layer.parameters[key] = str(value)
    return b"".join([
        INT8_TAG.to_bytes(4, "little"), small, bytes(-len(small) % 4), own[4 + 4 * size :],
        _floats(factors), _floats([scale]),
    ])  # fmt: skip


def _floats(values: Any) -> bytes:
    return np.asarray(values, "<f4").tobytes()


def layer_macs(model: Path, image: NDArray[np.float32]) -> dict[str, int]:
    """Return the multiply-accumulates of every layer with int8 kernels, for one (C, H, W) image."""
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute, net.opt.num_threads, net.opt.lightmode = False, 1, False
    net.load_param(str(model))
    net.load_model(str(weights_file(model)))
    extractor = net.create_extractor()
    extractor.input(net.input_names()[0], ncnn.Mat(np.ascontiguousarray(image)))
    found = {}
    for layer in read_layers(model)[1]:
        if layer.kind in _LAYERS:
            made = _computed(extractor, layer.blobs[layer.reads])
            key, _, _, _, outputs = _LAYERS[layer.kind]
            found[layer.name] = layer.number(key) * made.size // layer.number(outputs)
    return found


def ending_layers(model: Path, outputs: Sequence[str]) -> frozenset[str]:
    """Return the layers that make the outputs, or what is only moved or resized into them."""
    _, layers = read_layers(model)
    makers = {blob: layer for layer in layers for blob in layer.blobs[layer.reads :]}
    found, seen, waiting = set(), set(outputs), list(outputs)
    while waiting:
        layer = makers.get(waiting.pop())
        if layer is None:
            continue
        if layer.kind in _LAYERS:
            found.add(layer.name)
            continue
        read = [blob for blob in layer.blobs[: layer.reads] if blob not in seen]
        seen.update(read)
        waiting += read
    return frozenset(found)
