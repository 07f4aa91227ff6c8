"""Inference runtimes, one file each; every one makes a ``Session`` from an ONNX file."""

NOT_ENTRIES = frozenset({"base"})
