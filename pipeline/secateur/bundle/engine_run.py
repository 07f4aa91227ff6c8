"""Runs this bundle's TensorRT engine; travels inside run.py.

numpy and the standard library only, Python 3.8. An engine is deserialised only after engine.json
agreed with its bytes, with model.onnx and with this device.
"""

import collections
import contextlib
import ctypes
import hashlib
import json
import weakref

import numpy as np

from secateur.bundle.engine_cuda import (
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    NON_BLOCKING,
    THREAD_LOCAL,
    CudaProblem,
    load_cuda,
)
from secateur.bundle.engine_device import check_engine, device_facts, file_digest
from secateur.bundle.engine_errors import EngineProblem
from secateur.bundle.engine_tensorrt import load_tensorrt, process_logger

BUILD_IT = "build it on this device with `python3 build_engine.py`"
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8,
         "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}  # fmt: skip

Buffer = collections.namedtuple("Buffer", "name device host")  # host: a pinned array of the shape


def has_engine(folder):
    """Whether an engine was built into the bundle in ``folder``, whole or not."""
    return any((folder / name).exists() for name in ("model.engine", "engine.json"))


def read_engine(folder):
    """(engine.json's content, the bytes of model.engine)."""
    try:
        table = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
        return table, (folder / "model.engine").read_bytes()
    except OSError as error:
        raise EngineProblem(
            "there is no engine ({}: {}): {}".format(error.filename, error.strerror, BUILD_IT)
        ) from error
    except ValueError as error:
        raise EngineProblem("engine.json is damaged ({}): {}".format(error, BUILD_IT)) from error


def in_words(value):
    """A field of engine.json, short: of a digest the beginning."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12] + "…"
    return "unknown" if value is None else str(value)


def compare(table, facts, files):
    """Raise EngineProblem if the engine must not be opened here; return what is only slower.

    ``facts`` and ``files`` are as in ``check_engine``.
    """
    found = check_engine(table, facts, files)
    said = [
        "{} is {} in engine.json, {} here".format(
            row.field, in_words(row.built), in_words(row.here)
        )
        for row in found
    ]
    wrong = [text for text, row in zip(said, found) if row.refuse]
    if wrong:
        raise EngineProblem(
            "model.engine was not built for this: {}; {}".format("; ".join(wrong), BUILD_IT)
        )
    return said


class EngineSession:
    """The engine of a bundle for one image at a time, checked, opened and captured.

    ``outputs`` are the names of what ``run`` returns, ``notes`` sentences about what is slower
    than it could be. The memory is given back with the object. Raises EngineProblem.
    """

    batches = False

    def __init__(self, folder):
        table, plan = read_engine(folder)
        device = table.get("device") if isinstance(table, dict) else None
        wanted = device.get("runtime") if isinstance(device, dict) else None
        self.trt = load_tensorrt(wanted)
        files = {"model.engine": hashlib.sha256(plan).hexdigest(),
                 "model.onnx": file_digest(folder / "model.onnx")}  # fmt: skip
        self.notes = compare(table, device_facts(self.trt), files)
        self.logger = process_logger(self.trt)
        del self.logger.lines[:]
        self.cuda = load_cuda()
        self.stream = self.cuda("cudaStreamCreateWithFlags", NON_BLOCKING)
        self.owned = [("cudaStreamDestroy", self.stream)]  # calls that give back, last one first
        self.events = []
        weakref.finalize(self, give_back, self.cuda, self.owned)
        self.opened = self._open(plan, table["options"].get("dla"))
        self.context = self._context()
        self.image, self.results = self._bind()
        self.outputs = [buffer.name for buffer in self.results]
        self._enqueue()  # TensorRT finishes its set-up in the first run, outside of any graph
        self.cuda("cudaStreamSynchronize", self.stream)
        self.graph = self._capture()

    def run(self, inputs):
        """(1, C, H, W) array -> {output: array of shape (1, ...)}."""
        np.copyto(self.image.host, inputs, casting="same_kind")
        if self.graph is None:
            self._enqueue()
        else:
            self.cuda("cudaGraphLaunch", self.graph, self.stream)
        self.cuda("cudaStreamSynchronize", self.stream)
        return {buffer.name: buffer.host.copy() for buffer in self.results}

    def device_ms(self):
        """Milliseconds of the engine alone on the GPU, by its clock, on the image that is there.

        The copies are not in it: trtexec's "GPU Compute Time" without a CUDA graph. Where kernels
        are shorter than the host's calls that start them, the GPU waits, and that is in it.
        """
        if not self.events:
            for _ in range(2):
                self.events.append(self.cuda("cudaEventCreate"))
                self.owned.append(("cudaEventDestroy", self.events[-1]))
        (start, end), context = self.events, self.context
        self.cuda("cudaEventRecord", start, self.stream)
        if not context.execute_async_v3(self.stream):
            raise self._problem("cannot run model.engine")
        self.cuda("cudaEventRecord", end, self.stream)
        self.cuda("cudaStreamSynchronize", self.stream)
        return self.cuda("cudaEventElapsedTime", start, end)

    def _problem(self, what):
        """The EngineProblem for ``what`` failed, with TensorRT's own words."""
        errors = [text for severity, text in self.logger.lines if severity != "WARNING"]
        reason = " ".join(" ".join(errors).split())[:400] or "it gave no reason"
        return EngineProblem(
            "TensorRT {} {}: {}".format(self.trt.__version__, what, reason.rstrip("."))
        )

    def _open(self, plan, dla):
        trt = self.trt
        try:
            trt.init_libnvinfer_plugins(self.logger, "")
            runtime = trt.Runtime(self.logger)
            if dla is not None:
                runtime.DLA_core = dla
            opened = runtime.deserialize_cuda_engine(plan)
        except (TypeError, RuntimeError) as error:  # pybind11: the library's factory gave nothing
            raise self._problem("cannot start here ({})".format(error)) from error
        if opened is None:
            raise self._problem("cannot open model.engine")
        return opened

    def _context(self):
        opened = self.opened
        context = opened.create_execution_context()
        if context is None:
            raise self._problem("has no room to run model.engine")
        return context

    def _bind(self):
        """Give every tensor its memory; return (the image's buffer, the outputs' buffers)."""
        opened, context = self.opened, self.context
        names = [opened.get_tensor_name(index) for index in range(opened.num_io_tensors)]
        inputs = [n for n in names if opened.get_tensor_mode(n) == self.trt.TensorIOMode.INPUT]
        if len(inputs) != 1:
            raise EngineProblem("model.engine reads {}, not one image".format(inputs))
        shape = tuple(opened.get_tensor_shape(inputs[0]))
        if shape[0] not in (-1, 1) or not context.set_input_shape(inputs[0], (1, *shape[1:])):
            raise EngineProblem(
                "model.engine does not take one image at a time: build it with --batch 1, or with "
                "--batch 1:N:M"
            )
        buffers = {name: self._buffer(name) for name in names}
        image = buffers.pop(inputs[0])
        if image.host.dtype.kind != "f":
            raise EngineProblem(
                "model.engine reads {}, not normalised pixels".format(image.host.dtype)
            )
        return image, list(buffers.values())

    def _buffer(self, name):
        opened, context = self.opened, self.context
        shape, kind = tuple(context.get_tensor_shape(name)), opened.get_tensor_dtype(name).name
        if kind not in TYPES or min(shape, default=0) < 0:  # negative: it depends on the data
            raise EngineProblem(
                "{} is {} of shape {} in model.engine, which this runner does not read".format(
                    name, kind, shape
                )
            )
        size = int(np.prod(shape)) * np.dtype(TYPES[kind]).itemsize
        device = self.cuda("cudaMalloc", size)
        self.owned.append(("cudaFree", device))
        address = self.cuda("cudaMallocHost", size)
        self.owned.append(("cudaFreeHost", address))
        memory = (ctypes.c_byte * size).from_address(address)
        host = np.frombuffer(memory, TYPES[kind]).reshape(shape)
        host[...] = 0
        if not context.set_tensor_address(name, device):
            raise self._problem("cannot use the memory of {}".format(name))
        return Buffer(name, device, host)

    def _enqueue(self):
        """Put copies in, the engine, and copies out onto the stream."""
        cuda, context, stream = self.cuda, self.context, self.stream
        device, host = self.image.device, self.image.host
        cuda("cudaMemcpyAsync", device, host.ctypes.data, host.nbytes, HOST_TO_DEVICE, stream)
        if not context.execute_async_v3(stream):
            raise self._problem("cannot run model.engine")
        for _, device, host in self.results:
            cuda("cudaMemcpyAsync", host.ctypes.data, device, host.nbytes, DEVICE_TO_HOST, stream)

    def _capture(self):
        """The whole run as one CUDA graph; None where the engine cannot be captured."""
        cuda = self.cuda
        cuda("cudaStreamBeginCapture", self.stream, THREAD_LOCAL)
        try:
            try:
                self._enqueue()
            finally:  # a stream must not stay capturing
                captured = cuda("cudaStreamEndCapture", self.stream)
            self.owned.append(("cudaGraphDestroy", captured))
            graph = cuda("cudaGraphInstantiateWithFlags", captured, 0)
            self.owned.append(("cudaGraphExecDestroy", graph))
            return graph
        except EngineProblem as problem:
            with contextlib.suppress(CudaProblem):
                cuda("cudaGetLastError")  # later calls would report the capture's error as theirs
            self.notes.append("runs without a CUDA graph: {}".format(problem))
            return None


def give_back(cuda, owned):
    """Give back streams, memory and graphs, in the reverse order of their making."""
    while owned:
        with contextlib.suppress(CudaProblem):  # nothing can be done about it any more
            cuda(*owned.pop())
