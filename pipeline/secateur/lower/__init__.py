"""From a torch model to ONNX, and the proof that both say the same."""

from secateur.lower.export import export_onnx
from secateur.lower.parity import Parity, compare_outputs

__all__ = ["Parity", "compare_outputs", "export_onnx"]
