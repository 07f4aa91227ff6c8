"""Lower precisions: calibrate, plan the precision of every node, write it for one runtime."""

from secateur.lower.quant.activations import ActivationStatistics, observe
from secateur.lower.quant.dialect import (
    TENSORRT,
    Dialect,
    dialect_named,
    onnxruntime_arm,
    onnxruntime_x86,
)
from secateur.lower.quant.equalise import Equalisation, apply_equalisation, plan_equalisation
from secateur.lower.quant.guard import Guarded, guard
from secateur.lower.quant.plan import PRECISIONS, Precision, QuantPlan, overflowing, plan_quant
from secateur.lower.quant.replay import Replay, write_learned
from secateur.lower.quant.shifts import bias_shifts
from secateur.lower.quant.table import (
    CalibrationSettings,
    CalibrationTable,
    calibrate,
    table_of,
)
from secateur.lower.quant.units import (
    Unit,
    find_units,
    macs_share,
    node_modules,
    plan_assigned,
    resolve_pins,
)
from secateur.lower.quant.writer import emit

__all__ = [
    "PRECISIONS",
    "TENSORRT",
    "ActivationStatistics",
    "CalibrationSettings",
    "CalibrationTable",
    "Dialect",
    "Equalisation",
    "Guarded",
    "Precision",
    "QuantPlan",
    "Replay",
    "Unit",
    "apply_equalisation",
    "bias_shifts",
    "calibrate",
    "dialect_named",
    "emit",
    "find_units",
    "guard",
    "macs_share",
    "node_modules",
    "observe",
    "onnxruntime_arm",
    "onnxruntime_x86",
    "overflowing",
    "plan_assigned",
    "plan_equalisation",
    "plan_quant",
    "resolve_pins",
    "table_of",
    "write_learned",
]
