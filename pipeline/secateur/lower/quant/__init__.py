"""Lower precisions: calibrate, plan the precision of every node, write it for one runtime."""

from secateur.lower.quant.activations import observe
from secateur.lower.quant.dialect import TENSORRT, Dialect, onnxruntime_arm, onnxruntime_x86
from secateur.lower.quant.plan import QuantPlan, plan_quant
from secateur.lower.quant.table import (
    CalibrationSettings,
    CalibrationTable,
    calibrate,
    table_of,
)
from secateur.lower.quant.writer import emit

__all__ = [
    "TENSORRT",
    "CalibrationSettings",
    "CalibrationTable",
    "Dialect",
    "QuantPlan",
    "calibrate",
    "emit",
    "observe",
    "onnxruntime_arm",
    "onnxruntime_x86",
    "plan_quant",
    "table_of",
]
