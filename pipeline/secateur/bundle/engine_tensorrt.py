"""The TensorRT at hand and its log; travels inside other files.

Standard library only, Python 3.8.
"""

import importlib
import re
import sys

from secateur.bundle.engine_errors import NO_TENSORRT, EngineProblem

MODULES = ("tensorrt", "tensorrt_rtx")


def load_tensorrt(wanted=None):
    """Return the tensorrt module, or tensorrt_rtx; the ``wanted`` one of them where it is here."""
    reasons = []
    for name in sorted(MODULES, key=lambda module: module != wanted):
        try:
            trt = importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(str(error))
            continue
        if not hasattr(trt, "__version__"):  # Python takes any folder of that name for a package
            reasons.append("{} is a folder without TensorRT".format(name))
            continue
        numbers = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
        if name == "tensorrt" and numbers < (10, 3):
            raise EngineProblem(
                "TensorRT {} is too old, 10.3 is the first that builds this: install JetPack 6.1 "
                "or later".format(trt.__version__)
            )
        return trt
    raise EngineProblem(
        NO_TENSORRT.format(python=sys.version.split()[0], reasons="; ".join(reasons))
    )


_LOGS = {}  # module name -> logger: TensorRT keeps the first of a process and ignores later ones


def process_logger(trt):
    """Return the logger of this process; ``lines`` are its warnings and errors, newest last."""
    if trt.__name__ in _LOGS:
        return _LOGS[trt.__name__]

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, msg):
            if severity.name in ("WARNING", "ERROR", "INTERNAL_ERROR"):
                self.lines.append((severity.name, msg))

    return _LOGS.setdefault(trt.__name__, Log())
