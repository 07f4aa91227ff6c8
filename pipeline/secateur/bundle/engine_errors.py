"""What TensorRT's errors mean and what to change, in one sentence; travels inside other files.

Standard library only, Python 3.8.
"""

import re

NOT_READABLE = "model.onnx is not a readable ONNX file; copy the bundle again"
NO_TENSORRT = (
    "this Python ({python}) has no TensorRT ({reasons}); on a Jetson: `sudo apt install "
    "python3-libnvinfer` and the system's python3, or a venv with --system-site-packages; on a PC: "
    "`pip install tensorrt`, or `pip install tensorrt-rtx`"
)
ADVICE = (  # TensorRT's own words, and what to change; the first that matches is said
    (r"(?i)out ?of ?memory|cudaError ?2\b|bad_alloc|MemoryError|could not be allocated"
     r"|FAILED_ALLOC",
     "memory ran out while building{room}: close what else runs, give a smaller --workspace or "
     "--batch, or add swap"),
    (r"(?i)could not find any implementation for node (?P<node>.+?)(?: due to|, try|\.\)|\.?$)",
     "no kernel for {node} fits into the workspace{room}: free memory or give a larger "
     "--workspace; if that is no help, TensorRT {version} lacks this operator in this precision: "
     "build the bundle with another one"),
    (r"FP32 GEMM is not supported",
     "this GPU has no fp32 matrix product in TensorRT {version}: build the bundle as fp16"),
    (r"(?i)zero[ _]?point",
     "model.onnx is quantised with zero points, and TensorRT takes symmetric int8 only: build the "
     "bundle for a TensorRT target"),
    (r"input has type Int32 but must have type",
     "model.onnx has quantised biases, which TensorRT refuses: build the bundle for a TensorRT "
     "target"),
    (r"\bDLA\b.*(?:fallback|not support|cannot|fail)",
     "some layers cannot run on the DLA: leave out --dla-only, or --dla"),
    (r"(?i)cudaError|CUDA (?:driver|initiali[sz]ation|error)|no CUDA-capable",
     "CUDA does not work here: check the driver (`nvidia-smi`; on a Jetson the JetPack version)"),
    (r"opset", "TensorRT {version} does not read this ONNX opset: install a newer TensorRT"),
)  # fmt: skip


class EngineProblem(Exception):
    """One sentence: what went wrong and what to change."""


class BuildProblem(EngineProblem):
    """The engine cannot be built."""


def room(free, workspace):
    """How much memory there was, in brackets; "" where it is not known. Both in bytes."""
    sizes = (("{} MiB free", free), ("workspace {} MiB", workspace))
    said = [text.format(size >> 20) for text, size in sizes if size]
    return " ({})".format(", ".join(said)) if said else ""


def advice(text, words):
    """The sentence for the first pattern that TensorRT's words match, or None."""
    for pattern, sentence in ADVICE:
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            return sentence.format(**found.groupdict(), **words)
    return None


def explain(text, words):
    """One sentence for what the builder logged; ``words``: its version and room."""
    plain = " ".join(text.split())[:400] or "it gave no reason"
    return advice(text, words) or "TensorRT {version}: {}".format(plain, **words)


def explain_parsing(code, text, node, tasks, words):
    """One sentence for a parser's error at ``node`` = (name, operator), which ``tasks`` need."""
    if code == "MODEL_DESERIALIZE_FAILED":
        return NOT_READABLE
    missing = code.startswith("UNSUPPORTED_NODE") or re.search("Plugin not found|No importer", text)
    known = advice(text, words)
    if known or not missing:
        return known or explain("node {}: {}".format(node[0] or "unknown", text), words)
    return (
        "TensorRT {version} does not support operator {1} at node {0} (tasks: {2}; {3}: {4}): "
        "replace it in the model, or install a newer TensorRT"
    ).format(*node, ", ".join(tasks) or "unknown", code, text, **words)
