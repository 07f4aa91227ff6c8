"""The CUDA runtime: cuda-python where it is installed, else libcudart; travels inside other files.

Standard library only, Python 3.8. ``cuda("cudaMalloc", size)`` takes a function's inputs in C's
order and returns what it gives back as a number (an address, a handle), or None.
"""

import ctypes
import ctypes.util
import importlib
import sys
from pathlib import Path

from secateur.bundle.engine_errors import EngineProblem

HANDLE, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
OUT = ctypes.POINTER(ctypes.c_void_p)  # what a function gives back
REAL = ctypes.POINTER(ctypes.c_float)  # ... where that is a time
FUNCTIONS = {  # the types of C's arguments
    "cudaEventCreate": (OUT,),
    "cudaEventDestroy": (HANDLE,),
    "cudaEventElapsedTime": (REAL, HANDLE, HANDLE),
    "cudaEventRecord": (HANDLE, HANDLE),
    "cudaFree": (HANDLE,),
    "cudaFreeHost": (HANDLE,),
    "cudaGetLastError": (),
    "cudaGraphDestroy": (HANDLE,),
    "cudaGraphExecDestroy": (HANDLE,),
    "cudaGraphInstantiateWithFlags": (OUT, HANDLE, ctypes.c_ulonglong),
    "cudaGraphLaunch": (HANDLE, HANDLE),
    "cudaMalloc": (OUT, SIZE),
    "cudaMallocHost": (OUT, SIZE),
    "cudaMemcpyAsync": (HANDLE, HANDLE, SIZE, NUMBER, HANDLE),
    "cudaStreamBeginCapture": (HANDLE, NUMBER),
    "cudaStreamCreateWithFlags": (OUT, ctypes.c_uint),
    "cudaStreamDestroy": (HANDLE,),
    "cudaStreamEndCapture": (HANDLE, OUT),
    "cudaStreamSynchronize": (HANDLE,),
}
ENUMS = {  # cuda-python takes members where C takes numbers: (which input, of which enum)
    "cudaMemcpyAsync": (3, "cudaMemcpyKind"),
    "cudaStreamBeginCapture": (1, "cudaStreamCaptureMode"),
}
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind
THREAD_LOCAL = 1  # cudaStreamCaptureMode: other threads' CUDA calls do not end a capture
NON_BLOCKING = 1  # a stream's flag: it does not wait for the default stream
OUT_OF_MEMORY = 2
OLD_DRIVER = 35
PYTHON_MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # cuda-python 12.6 and later; before it
LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll",
             "cudart64_12.dll")  # fmt: skip
NO_DRIVER = (3, 35, 46, 100, 101, 999)  # initialisation, driver, devices: nothing runs here
NO_CUDA = (
    "there is no CUDA runtime here: install the CUDA toolkit's libcudart (on a Jetson with JetPack "
    "6: `sudo apt install cuda-cudart-12-6`), or the cuda-python of the driver's CUDA"
)


class CudaProblem(EngineProblem):
    """A CUDA call failed."""


def cuda_problem(name, code, text):
    """The sentence for an error code of the function ``name``, and CUDA's own words for it."""
    if code in NO_DRIVER:
        newer = ""
        if code == OLD_DRIVER:  # said of none at all, too
            newer = (
                "; or the CUDA runtime is newer than it: take the cuda-python of the driver's CUDA "
                "(JetPack 6: `pip install 'cuda-python<13'`), or none, for the system's libcudart"
            )
        return CudaProblem(
            "CUDA does not work here ({}): check the driver (`nvidia-smi`; on a Jetson the JetPack "
            "version){}".format(text, newer)
        )
    if code == OUT_OF_MEMORY:
        return CudaProblem("the GPU has no memory left for this engine: close what else runs")
    return CudaProblem("{} failed with error {} ({})".format(name, code, text))


class PythonCuda:
    """cuda-python's module of the runtime."""

    def __init__(self, module):
        self.module = module

    def __call__(self, name, *inputs):
        """Call one of FUNCTIONS; raise CudaProblem if it fails."""
        inputs = list(inputs)
        if name in ENUMS:
            place, kind = ENUMS[name]
            inputs[place] = getattr(self.module, kind)(inputs[place])
        code, *results = getattr(self.module, name)(*inputs)
        if int(code):
            raise cuda_problem(name, int(code), getattr(code, "name", ""))
        if not results:
            return None
        return float(results[0]) if REAL in FUNCTIONS[name] else int(results[0])


class LibraryCuda:
    """libcudart through ctypes."""

    def __init__(self, library):
        self.library = library
        for name, types in FUNCTIONS.items():
            getattr(library, name).argtypes = types
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def __call__(self, name, *inputs):
        """Call one of FUNCTIONS; raise CudaProblem if it fails."""
        types, given = FUNCTIONS[name], iter(inputs)
        result = ctypes.c_float() if REAL in types else ctypes.c_void_p()
        words = [ctypes.byref(result) if kind in (OUT, REAL) else next(given) for kind in types]
        code = getattr(self.library, name)(*words)
        if code:
            text = self.library.cudaGetErrorString(code).decode("utf-8", "replace")
            raise cuda_problem(name, code, text)
        return result.value if OUT in types or REAL in types else None


def library_paths():
    """Where libcudart may be: the loader's own places, then pip's packages and /usr/local."""
    found = ctypes.util.find_library("cudart")
    paths = [found] if found else []
    paths += LIBRARIES
    for folder in dict.fromkeys([*sys.path, "/usr/local"]):
        for pattern in ("nvidia/*/lib/libcudart.so.*", "nvidia/*/bin/**/cudart64_*.dll",
                        "cuda*/lib64/libcudart.so.*"):  # fmt: skip
            paths += [str(path) for path in sorted(Path(folder).glob(pattern), reverse=True)]
    return paths


def load_cuda():
    """The CUDA runtime of this machine; raise EngineProblem if there is none."""
    for name in PYTHON_MODULES:
        try:
            return PythonCuda(importlib.import_module(name))
        except (ImportError, OSError):
            continue
    for path in library_paths():
        try:
            return LibraryCuda(ctypes.CDLL(path))
        except (OSError, AttributeError):  # another architecture's, or too old a CUDA
            continue
    raise EngineProblem(NO_CUDA)
