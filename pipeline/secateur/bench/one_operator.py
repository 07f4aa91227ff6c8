"""An ONNX model of one operator, as it occurs in a network, at any widths."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from secateur.core.errors import DeviceError
from secateur.devices.operators import OperatorKind

OPSET = 20
IR_VERSION = 9  # of that opset's time: a newer one shuts older runtimes out
CONSTANTS = {"Clip": (0.0, 6.0)}  # bounds that are inputs
PRECISIONS = ("fp32",)


def one_operator(kind: OperatorKind, c_in: int, c_out: int) -> bytes:
    """Return the serialised model, its weights random and its inputs as graph inputs.

    Raises:
        DeviceError: the precision cannot be measured yet.
    """
    if kind.precision not in PRECISIONS:
        raise DeviceError(
            f"operators are measured in {', '.join(PRECISIONS)} only, not in {kind.precision}",
            hint="measure the finished bundle with `secateur bench` instead",
        )
    return _Model(kind, c_in, c_out).made()


class _Model:
    def __init__(self, kind: OperatorKind, c_in: int, c_out: int) -> None:
        self._kind, self._in, self._out = kind, c_in, c_out
        self._rng = np.random.default_rng(0)
        self._constants: list[TensorProto] = []
        self._inputs: dict[str, tuple[int, ...]] = {}

    def made(self) -> bytes:
        kind = self._kind
        shape, out_shape = self._shapes()
        names = self._feed(shape)
        last = "middle" if kind.operator == "Conv" and kind.detail else "y"
        nodes = [helper.make_node(kind.operator, names, [last], "op", **self._attributes())]
        if last == "middle":
            bounds = [self._constant(f"bound{i}", np.float32(b)) for i, b in
                      enumerate(CONSTANTS.get(kind.detail, ()))]  # fmt: skip
            nodes.append(helper.make_node(kind.detail, ["middle", *bounds], ["y"], "activation"))
        graph = helper.make_graph(
            nodes,
            "one",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))
             for name, dims in self._inputs.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(out_shape))],
            self._constants,
        )  # fmt: skip
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        return bytes(model.SerializeToString())

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kind = self._kind
        if kind.operator in ("Gemm", "MatMul", "LayerNormalization", "Softmax", "Gelu"):
            rows = kind.height * kind.width
            return (rows, self._in), (rows, self._out)
        return (
            (1, self._in, kind.height, kind.width),
            (1, self._out, kind.out_height, kind.out_width),
        )

    def _feed(self, shape: tuple[int, ...]) -> list[str]:
        """Declare the inputs and weights, and return the operator's input names."""
        kind = self._kind
        self._inputs["x"] = shape
        if kind.operator == "Conv":
            read = 1 if kind.groups == 0 else self._in // kind.groups
            weights = self._constant("w", self._random(self._out, read, *kind.kernel))
            return ["x", weights, self._constant("b", self._random(self._out))]
        if kind.operator == "Gemm":
            weights = self._constant("w", self._random(self._out, self._in))
            return ["x", weights, self._constant("b", self._random(self._out))]
        if kind.operator == "MatMul":
            return ["x", self._constant("w", self._random(self._in, self._out))]
        if kind.operator == "LayerNormalization":
            return ["x", *(self._constant(n, self._random(self._in)) for n in "wb")]
        if kind.operator == "Resize":
            scales = [1, 1, kind.out_height / kind.height, kind.out_width / kind.width]
            return ["x", "", self._constant("scales", np.array(scales, np.float32))]
        if kind.operator == "ReduceMean":
            return ["x", self._constant("axes", np.array([2, 3], np.int64))]
        return ["x", *self._more_inputs(shape)]

    def _more_inputs(self, shape: tuple[int, ...]) -> list[str]:
        kind = self._kind
        if kind.operator in ("Add", "Mul"):
            small = (*shape[:2], 1, 1)
            self._inputs["other"] = small if kind.detail == "broadcast" else shape
        elif kind.operator == "Concat":
            for part in range(kind.groups):
                share = self._out // kind.groups + (part < self._out % kind.groups)
                self._inputs["x" if part == 0 else f"part{part}"] = (1, share, *shape[2:])
        return list(self._inputs)[1:]

    def _attributes(self) -> dict[str, object]:
        kind = self._kind
        if kind.operator == "Conv":
            groups = self._out if kind.groups == 0 else kind.groups
            return {"group": groups, **self._window()}
        if kind.operator in ("MaxPool", "AveragePool"):
            return self._window()
        if kind.operator == "Resize":
            return {"mode": kind.detail}
        if kind.operator == "Concat":
            return {"axis": 1}
        return {"transB": 1} if kind.operator == "Gemm" else {}

    def _window(self) -> dict[str, object]:
        kind = self._kind
        before, after = [], []
        sizes = ((kind.height, kind.out_height), (kind.width, kind.out_width))
        for (size, out), kernel, stride in zip(sizes, kind.kernel, kind.stride, strict=True):
            pad = max(0, (out - 1) * stride + kernel - size)
            before.append(pad // 2)
            after.append(pad - pad // 2)
        return {"kernel_shape": list(kind.kernel), "strides": list(kind.stride),
                "pads": before + after}  # fmt: skip

    def _random(self, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return self._rng.standard_normal(shape).astype(np.float32)

    def _constant(self, name: str, values: object) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name
