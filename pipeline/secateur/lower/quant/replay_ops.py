"""What each operator of an exported ONNX file is in torch; gradients come from autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.errors import BuildError
from secateur.lower.quant.shifts import convolution

Options = Mapping[str, Any]
Inputs = Sequence[Tensor | None]


def run_operator(operator: str, inputs: Inputs, options: Options) -> list[Tensor]:
    """Return the outputs of one node.

    Raises:
        BuildError: the operator, or an option of it, is not known here.
    """
    made = OPERATORS[operator](inputs, options)
    return list(made) if isinstance(made, list | tuple) else [made]


def check_operators(operators: Sequence[str]) -> None:
    """Raise when one of ``operators`` is not known here.

    Raises:
        BuildError: it names the first.
    """
    unknown = [operator for operator in operators if operator not in OPERATORS]
    if unknown:
        raise BuildError(
            f"quantisation-aware distillation does not know the ONNX operator {unknown[0]}",
            hint="leave precision.distill out; the guard keeps what int8 hurts in high precision",
        )


def _conv(inputs: Inputs, options: Options) -> Tensor:
    image, weights, *bias = inputs
    if options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise BuildError("a Conv pads by itself (auto_pad)", hint="export it with secateur")
    return convolution(needed(image), needed(weights), bias[0] if bias else None, dict(options))


def _gemm(inputs: Inputs, options: Options) -> Tensor:
    a, b = needed(inputs[0]), needed(inputs[1])
    a, b = (a.T if options.get("transA") else a), (b.T if options.get("transB") else b)
    product: Tensor = options.get("alpha", 1.0) * (a @ b)
    bias = inputs[2] if len(inputs) > 2 else None
    return product if bias is None else product + options.get("beta", 1.0) * bias


def _pool(kind: str) -> Callable[[Inputs, Options], Tensor]:
    def run(inputs: Inputs, options: Options) -> Tensor:
        image, size = needed(inputs[0]), options["kernel_shape"]
        pads = options.get("pads", [0] * 2 * len(size))
        before, after = pads[: len(size)], pads[len(size) :]
        if before != after or options.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise BuildError("a pool pads one side more than the other",
                             hint="leave precision.distill out")  # fmt: skip
        strides, ceil = options.get("strides", [1] * len(size)), bool(options.get("ceil_mode", 0))
        if kind == "max":
            dilations = options.get("dilations", 1)
            return functional.max_pool2d(image, size, strides, before, dilations, ceil)
        counts = bool(options.get("count_include_pad", 0))
        return functional.avg_pool2d(image, size, strides, before, ceil, counts)

    return run


def _resize(inputs: Inputs, options: Options) -> Tensor:
    """Resize by what torch's exporter writes: half-pixel linear or cubic, or nearest by floor."""
    image = needed(inputs[0])
    scales = inputs[2] if len(inputs) > 2 else None
    sizes = inputs[3] if len(inputs) > 3 else None
    wanted = None if sizes is None else [int(size) for size in sizes[2:]]
    if wanted is None:
        factors = [float(factor) for factor in needed(scales)[2:]]
        wanted = [int(side * factor) for side, factor in zip(image.shape[2:], factors, strict=True)]
    mode = options.get("mode", b"nearest").decode()
    place = options.get("coordinate_transformation_mode", b"half_pixel").decode()
    if mode == "nearest":
        whole = all(w % s == 0 for w, s in zip(wanted, image.shape[2:], strict=True))
        exact = place == "asymmetric" and options.get("nearest_mode", b"") == b"floor"
        if not (whole or exact):
            raise BuildError("a nearest resize by no whole number",
                             hint="leave precision.distill out")  # fmt: skip
        return functional.interpolate(image, size=wanted, mode="nearest")
    if place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise BuildError(f"a resize places its pixels by {place}",
                         hint="leave precision.distill out")  # fmt: skip
    names = {("linear", 3): "linear", ("linear", 4): "bilinear", ("cubic", 4): "bicubic"}
    name = names.get((mode, image.dim()))
    if name is None:
        raise BuildError(f"a {mode} resize of {image.dim()} dimensions cannot be trained",
                         hint="leave precision.distill out")  # fmt: skip
    return functional.interpolate(image, size=wanted, mode=name,
                                  align_corners=place == "align_corners")  # fmt: skip


def _reduce(rule: Callable[..., Tensor]) -> Callable[[Inputs, Options], Tensor]:
    def run(inputs: Inputs, options: Options) -> Tensor:
        axes = inputs[1] if len(inputs) > 1 else None
        named = options.get("axes") if axes is None else axes.tolist()
        image = needed(inputs[0])
        over = list(range(image.dim())) if named is None else [int(axis) for axis in named]
        return rule(image, over, bool(options.get("keepdims", 1)))

    return run


def _layer_norm(inputs: Inputs, options: Options) -> Tensor:
    image, scale, *bias = inputs
    axis = options.get("axis", -1) % needed(image).dim()
    shape = needed(image).shape[axis:]
    return functional.layer_norm(needed(image), shape, scale, bias[0] if bias else None,
                                 options.get("epsilon", 1e-5))  # fmt: skip


def _batch_norm(inputs: Inputs, options: Options) -> Tensor:
    image, scale, bias, mean, variance = (needed(tensor) for tensor in inputs)
    return functional.batch_norm(image, mean, variance, scale, bias, False, 0.0,
                                 options.get("epsilon", 1e-5))  # fmt: skip


def _reshape(inputs: Inputs, options: Options) -> Tensor:
    image = needed(inputs[0])
    wanted = [int(size) for size in needed(inputs[1])]
    if not options.get("allowzero", 0):
        wanted = [image.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return image.reshape(wanted)


def _slice(inputs: Inputs, options: Options) -> Tensor:
    image, starts, ends, *rest = inputs
    first, last = (needed(starts).tolist(), needed(ends).tolist())
    axes = needed(rest[0]).tolist() if rest and rest[0] is not None else range(len(first))
    steps = needed(rest[1]).tolist() if len(rest) > 1 else [1] * len(first)
    found = needed(image)
    for axis, start, end, step in zip(axes, first, last, steps, strict=True):
        size = found.shape[axis]
        indices = range(size)[slice(start, end, step)]
        found = found.index_select(axis, torch.tensor(list(indices), device=found.device))
    return found


def _axes_of(inputs: Inputs) -> list[int] | None:
    return [int(axis) for axis in needed(inputs[1])] if len(inputs) > 1 else None


def _squeeze(inputs: Inputs, options: Options) -> Tensor:
    axes = _axes_of(inputs)
    return needed(inputs[0]).squeeze() if axes is None else needed(inputs[0]).squeeze(axes)


def _unsqueeze(inputs: Inputs, options: Options) -> Tensor:
    found = needed(inputs[0])
    axes = _axes_of(inputs) or []
    rank = found.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        found = found.unsqueeze(axis)
    return found


def _split(inputs: Inputs, options: Options) -> list[Tensor]:
    image, axis = needed(inputs[0]), options.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return list(torch.split_with_sizes(image, [int(size) for size in inputs[1]], axis))
    return list(image.chunk(options["num_outputs"], axis))


def _expand(inputs: Inputs, options: Options) -> Tensor:
    image, wanted = needed(inputs[0]), [int(size) for size in needed(inputs[1])]
    shape = torch.broadcast_shapes(image.shape, wanted)  # type: ignore[no-untyped-call]
    return image.expand(shape)


def _gather(inputs: Inputs, options: Options) -> Tensor:
    image, places = needed(inputs[0]), needed(inputs[1]).long()
    axis = options.get("axis", 0) % image.dim()
    shape = [*image.shape[:axis], *places.shape, *image.shape[axis + 1 :]]
    return image.index_select(axis, places.reshape(-1) % image.shape[axis]).reshape(shape)


def _clip(inputs: Inputs, options: Options) -> Tensor:
    low, high = (inputs[i] if len(inputs) > i else None for i in (1, 2))
    return torch.clamp(needed(inputs[0]), low, high)


def _cast(inputs: Inputs, options: Options) -> Tensor:
    kinds = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float32}
    if options["to"] not in kinds:
        raise BuildError(f"a cast to ONNX's type {options['to']} cannot be trained",
                         hint="leave precision.distill out")  # fmt: skip
    return needed(inputs[0]).to(kinds[options["to"]])


def needed(tensor: Tensor | None) -> Tensor:
    """Return an input that has to be there.

    Raises:
        BuildError: it is not.
    """
    if tensor is None:
        raise BuildError("an ONNX node lacks an input", hint="export the model again")
    return tensor


def _one(rule: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Options], Tensor]:
    return lambda inputs, options: rule(needed(inputs[0]))


def _two(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Options], Tensor]:
    return lambda inputs, options: rule(needed(inputs[0]), needed(inputs[1]))


OPERATORS: Mapping[str, Callable[[Inputs, Options], Any]] = {
    "Add": _two(torch.add),
    "AveragePool": _pool("mean"),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda inputs, options: torch.cat([needed(i) for i in inputs], options["axis"]),
    "Conv": _conv,
    "Div": _two(torch.div),
    "Erf": _one(torch.erf),
    "Exp": _one(torch.exp),
    "Expand": _expand,
    "Flatten": lambda inputs, options: needed(inputs[0]).flatten(options.get("axis", 1)),
    "Gather": _gather,
    "Gelu": lambda inputs, options: functional.gelu(
        needed(inputs[0]), approximate=options.get("approximate", b"none").decode()
    ),
    "Gemm": _gemm,
    "GlobalAveragePool": _one(lambda image: image.mean((2, 3), keepdim=True)),
    "HardSigmoid": lambda inputs, options: torch.clamp(
        options.get("alpha", 0.2) * needed(inputs[0]) + options.get("beta", 0.5), 0, 1
    ),
    "HardSwish": _one(functional.hardswish),
    "Identity": _one(lambda image: image),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda inputs, options: functional.leaky_relu(
        needed(inputs[0]), options.get("alpha", 0.01)
    ),
    "MatMul": _two(torch.matmul),
    "MaxPool": _pool("max"),
    "Mul": _two(torch.mul),
    "Neg": _one(torch.neg),
    "Pow": _two(torch.pow),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _one(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda inputs, options: torch.tensor(
        needed(inputs[0]).shape[options.get("start", 0) : options.get("end")],
        device=needed(inputs[0]).device,
    ),
    "Sigmoid": _one(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda inputs, options: torch.softmax(needed(inputs[0]), options.get("axis", -1)),
    "Softplus": _one(functional.softplus),
    "Split": _split,
    "Sqrt": _one(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _two(torch.sub),
    "Tanh": _one(torch.tanh),
    "Transpose": lambda inputs, options: needed(inputs[0]).permute(*options["perm"]),
    "Unsqueeze": _unsqueeze,
}
