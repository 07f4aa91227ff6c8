"""A TensorRT that has exactly the names, arguments and numbers of one version's bindings wheel."""

from __future__ import annotations

import enum
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parent / "tensorrt_names"
INVENTORIES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
}


def fits(overloads: list[list[str]], count: int, keywords: set[str]) -> bool:
    """Whether one of a method's overloads takes so many positional arguments and these names."""
    for arguments in overloads:
        names = [name.rstrip("=") for name in arguments]
        rest = arguments[count:]
        needed = {name for name in rest if not name.endswith("=")}
        if count <= len(names) and needed <= keywords <= set(names[count:]):
            return True
    return False


class FakeObject:
    """An object of one class: anything its inventory lacks is an AttributeError."""

    def __init__(self, owner: FakeTensorRT, kind: str, **answers: Any) -> None:
        self.__dict__.update(_owner=owner, _kind=kind, _answers=answers)

    def __getattr__(self, name: str) -> Any:
        entry = self._owner._inventory["classes"][self._kind].get(name)
        if entry is None:
            raise AttributeError(f"{self._owner.__version__}: {self._kind} has no {name}")
        answer = self._answers.get(name)
        return self._owner._method(name, entry, answer) if isinstance(entry, list) else answer

    def __setattr__(self, name: str, value: Any) -> None:
        entry = self._owner._inventory["classes"][self._kind].get(name)
        if entry != "read write":
            raise AttributeError(f"{self._owner.__version__}: cannot set {self._kind}.{name}")
        self._owner.properties[name] = value


class FakeTensorRT:
    """The module. It "builds" a network with one input; ``calls`` and ``properties`` are kept."""

    def __init__(
        self,
        inventory: dict[str, Any],
        *,
        inspected: dict[str, Any] | None = None,
        dla_cores: int = 0,
        shape: tuple[int, ...] = (-1, 3, 32, 48),
        logs: list[tuple[str, str]] | None = None,
        fault: tuple[str, str, str, str] | None = None,
        no_gpu: bool = False,
        cache_fits: bool = True,
        tensors: dict[str, tuple[str, str, tuple[int, ...]]] | None = None,
        execute: Callable[[dict[str, int], int], bool] | None = None,
        opens: bool = True,
    ) -> None:
        self._inventory = inventory
        self.__name__, self.__version__ = "tensorrt", inventory["version"]
        self.calls: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        self.properties: dict[str, Any] = {}
        for name, members in inventory["enums"].items():
            if "." not in name:
                setattr(self, name, enum.IntEnum(name, members))
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        tensor = FakeObject(self, "ITensor", name="image", shape=shape)
        output = FakeObject(self, "ITensor", name="depth")
        self._network = FakeObject(
            self, "INetworkDefinition", num_inputs=1, num_outputs=1,
            get_input=lambda index: tensor, get_output=lambda index: output,
        )  # fmt: skip
        cache = FakeObject(self, "ITimingCache", serialize=lambda: b"serialized")
        config = FakeObject(
            self, "IBuilderConfig", create_timing_cache=lambda data: cache,
            set_timing_cache=lambda *_: cache_fits, get_timing_cache=lambda: cache,
        )  # fmt: skip
        self._inspector = FakeObject(
            self, "EngineInspector", get_engine_information=lambda form: json.dumps(inspected)
        )
        self._fault, self._logs, self._no_gpu = fault, logs, no_gpu
        self._tensors, self._execute, self._opens = tensors or {}, execute, opens
        self._builder_answers = {
            "num_DLA_cores": dla_cores,
            "create_network": lambda flags: self._network,
            "create_builder_config": lambda: config,
            "create_optimization_profile": lambda: FakeObject(self, "IOptimizationProfile"),
        }

    def _method(self, name: str, overloads: list[list[str]], answer: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not fits(overloads, len(arguments), set(keywords)):
                raise TypeError(f"{self.__version__}: {name} takes {overloads}")
            self.calls[name].append(arguments)
            return answer(*arguments, **keywords) if callable(answer) else answer

        return call

    def Builder(self, logger: Any) -> FakeObject:  # noqa: N802
        if self._no_gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        def serialize(network: Any, config: Any) -> bytes | None:
            for severity, text in self._logs or []:
                logger.log(SimpleNamespace(name=severity), text)
            return None if self._logs else b"plan"

        return FakeObject(
            self, "Builder", **self._builder_answers, build_serialized_network=serialize
        )

    def OnnxParser(self, network: Any, logger: Any) -> FakeObject:  # noqa: N802
        code, text, node, operator = self._fault or ("SUCCESS", "", "", "")
        fault = FakeObject(
            self, "ParserError", code=lambda: self.ErrorCode[code], desc=lambda: text,
            node_name=lambda: node, node_operator=lambda: operator,
        )  # fmt: skip
        return FakeObject(
            self, "OnnxParser", parse=lambda data: not self._fault,
            num_errors=int(bool(self._fault)), get_error=lambda index: fault,
        )  # fmt: skip

    def Runtime(self, logger: Any) -> FakeObject:  # noqa: N802
        tensors, addresses = self._tensors, dict[str, int]()
        shapes = {name: shape for name, (_, _, shape) in tensors.items()}

        def set_shape(name: str, shape: tuple[int, ...]) -> bool:
            if any(old not in (-1, new) for old, new in zip(shapes[name], shape, strict=True)):
                return False
            shapes.update({name: (shape[0], *old[1:]) if old[0] == -1 else old
                           for name, old in shapes.items()})  # fmt: skip
            return True

        def bind(name: str, memory: int) -> bool:
            addresses[name] = memory
            return True

        context = FakeObject(
            self, "IExecutionContext", set_input_shape=set_shape, set_tensor_address=bind,
            get_tensor_shape=lambda name: shapes[name],
            execute_async_v3=lambda stream: self._execute(addresses, stream),
        )  # fmt: skip
        engine = FakeObject(
            self, "ICudaEngine", create_engine_inspector=lambda: self._inspector,
            num_io_tensors=len(tensors), get_tensor_name=lambda index: list(tensors)[index],
            get_tensor_mode=lambda name: self.TensorIOMode[tensors[name][0]],
            get_tensor_dtype=lambda name: self.DataType[tensors[name][1]],
            get_tensor_shape=lambda name: tensors[name][2],
            create_execution_context=lambda: context,
        )  # fmt: skip

        def deserialize(plan: bytes) -> FakeObject | None:
            for severity, text in self._logs or []:
                logger.log(SimpleNamespace(name=severity), text)
            return engine if self._opens else None

        return FakeObject(self, "Runtime", deserialize_cuda_engine=deserialize)

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        return True
