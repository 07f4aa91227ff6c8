"""A CUDA runtime in the host's own memory, with cuda-python's interface.

What a test without a GPU can check: which calls are made, in which order, on which bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import EnumMeta, IntEnum
from typing import Any


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class HostCuda:
    """Stands where cuda-python's module would; memory that nobody has written to is NaN."""

    cudaMemcpyKind = IntEnum("cudaMemcpyKind", {"HostToDevice": 1, "DeviceToHost": 2})
    cudaStreamCaptureMode = IntEnum("cudaStreamCaptureMode", {"ThreadLocal": 1})

    def __init__(self, *, captures: bool = True, room: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.captures, self.room = captures, room
        self.alive: dict[int, Any] = {}  # address or handle -> what it stands for
        self._captured: list[Callable[[], Any]] | None = None
        self._handle = 0

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("cuda") and not isinstance(value, EnumMeta):
            self.calls.append(name)
        return value

    def enqueue(self, work: Callable[[], Any]) -> None:
        """Do ``work`` now, or when the graph that is being captured is launched."""
        if self._captured is None:
            work()
        else:
            self._captured.append(work)

    def _make(self, value: Any) -> tuple[Error, int]:
        self._handle += 1
        self.alive[self._handle] = value
        return Error.cudaSuccess, self._handle

    def _allocate(self, size: int) -> tuple[Error, int]:
        if size > self.room:
            return Error.cudaErrorMemoryAllocation, 0
        memory = ctypes.create_string_buffer(b"\xff" * size, size)
        self.alive[ctypes.addressof(memory)] = memory
        return Error.cudaSuccess, ctypes.addressof(memory)

    cudaMalloc = cudaMallocHost = _allocate

    def _forget(self, handle: int) -> tuple[Error]:
        del self.alive[handle]
        return (Error.cudaSuccess,)

    cudaFree = cudaFreeHost = cudaStreamDestroy = cudaEventDestroy = _forget
    cudaGraphDestroy = cudaGraphExecDestroy = _forget

    def cudaEventCreate(self) -> tuple[Error, int]:
        return self._make("event")

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Error]:
        assert (self.alive[event], self.alive[stream]) == ("event", "stream")
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Error, float]:
        assert self.alive[start] == self.alive[end] == "event" and start != end
        return Error.cudaSuccess, 1.5

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        return self._make("stream")

    def cudaMemcpyAsync(
        self, to: int, source: int, count: int, kind: Any, stream: int
    ) -> tuple[Error]:
        assert kind in self.cudaMemcpyKind and self.alive[stream] == "stream"
        assert isinstance(kind, IntEnum)
        self.enqueue(lambda: ctypes.memmove(to, source, count))
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Error]:
        assert isinstance(mode, self.cudaStreamCaptureMode)
        self._captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, int]:
        captured, self._captured = self._captured, None
        if not self.captures:
            return Error.cudaErrorStreamCaptureUnsupported, 0
        return self._make(captured)

    def cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> tuple[Error, int]:
        return self._make(list(self.alive[graph]))

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Error]:
        for work in self.alive[graph]:
            work()
        return (Error.cudaSuccess,)

    def cudaGetLastError(self) -> tuple[Error]:
        return (Error.cudaErrorStreamCaptureUnsupported,)
