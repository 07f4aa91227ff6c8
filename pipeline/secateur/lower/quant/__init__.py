"""Lower precisions: calibrate, plan the precision of every node, write it for one runtime."""

from secateur.lower.quant.calibrate import (
    CalibrationSettings,
    CalibrationTable,
    calibrate,
    table_of,
)
from secateur.lower.quant.dialect import TENSORRT, Dialect, onnxruntime_arm, onnxruntime_x86
from secateur.lower.quant.emit import emit
from secateur.lower.quant.observe import observe
from secateur.lower.quant.plan import QuantPlan, plan_quant

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
