"""ncnn on the CPU: opens a .param file with its .bin beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import BundleError, RuntimeMissing

INSTALL = "pip install 'secateur[ncnn]'"


class NcnnSession:
    """One model, a fixed number of threads; the precision is what the .param file says.

    Raises:
        RuntimeMissing: ncnn is not installed.
        BundleError: the files are not a model that this ncnn can run.
    """

    def __init__(self, model: Path, threads: int) -> None:
        self._ncnn = _library()
        self._net = net = self._ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_vulkan_compute = False
        weights = model.with_suffix(".bin")
        absent = [file for file in (model, weights) if not file.is_file()]
        if absent or net.load_param(str(model)) != 0 or net.load_model(str(weights)) != 0:
            why = f"there is no {absent[0]}" if absent else "a layer or its weights do not fit"
            raise BundleError(
                f"ncnn {self._ncnn.__version__} cannot load {model}: {why}",
                hint="they are damaged, or made for another release: build the bundle again",
            )
        (self._input,) = net.input_names()
        self._outputs = list(net.output_names())

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        rows = [self._one(np.ascontiguousarray(image)) for image in images]
        return {name: np.stack([row[name] for row in rows]) for name in self._outputs}

    def _one(self, image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run a (C, H, W) image: ncnn's arrays have no batch."""
        extractor = self._net.create_extractor()
        extractor.input(self._input, self._ncnn.Mat(image))
        found = {}
        for name in self._outputs:
            status, array = extractor.extract(name)
            if status != 0:
                raise BundleError(
                    f"ncnn {self._ncnn.__version__} stopped at '{name}' with status {status}",
                    hint="-100 is a lack of memory; else build the bundle again",
                )
            found[name] = np.array(array)
        return found


def open_session(model: Path, threads: int) -> NcnnSession:
    """Load a .param file and the .bin file beside it.

    Raises:
        RuntimeMissing: ncnn is not installed.
        BundleError: the files are not a model that this ncnn can run.
    """
    return NcnnSession(model, threads)


def version() -> str:
    """Return the installed version.

    Raises:
        RuntimeMissing: there is none.
    """
    return f"ncnn {_library().__version__}"


def _library() -> Any:
    try:
        import ncnn
    except ImportError as error:
        raise RuntimeMissing("ncnn is not installed", hint=INSTALL) from error
    return ncnn
