"""How the report writes numbers; what is no finite number is said to be none."""

from __future__ import annotations

import math
from collections.abc import Mapping

NONE = "–"


def number(value: object) -> float | None:
    """Return a finite number, or None: values read from a file may be anything."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def memory_said(found: Mapping[str, float | None]) -> str:
    """Return what ``bench.json`` has of memory, in words; what is None was not to be had."""
    words = {"process_peak": "run.py at its highest", "weights": "the model's weights",
             "activations": "its activations"}  # fmt: skip
    said = [
        f"{text} {mb:.4g} MB" for name, text in words.items() if (mb := found[name]) is not None
    ]
    return ", ".join(said) or "not known"


def _digits(amount: float, digits: int) -> str:
    """Significant digits, zeros at the end included."""
    return f"{amount:#.{digits}g}".rstrip(".")


def count(value: object) -> str:
    """27 842 432 -> ``27.8 M``."""
    amount = number(value)
    if amount is None:
        return NONE
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(amount) >= unit:
            return f"{_digits(amount / unit, 3)}{name}"
    return f"{amount:g}"


def megabytes(value: object) -> str:
    """2 089 769 -> ``2.09 MB``."""
    amount = number(value)
    return NONE if amount is None else f"{_digits(amount / 1e6, 3)} MB"


def milliseconds(value: object) -> str:
    """1.0357 -> ``1.04 ms``."""
    amount = number(value)
    return NONE if amount is None else f"{_digits(amount, 3)} ms"


def millijoules(value: object) -> str:
    """12.345 -> ``12.3 mJ``."""
    amount = number(value)
    return NONE if amount is None else f"{_digits(amount, 3)} mJ".replace("-", "−")


def plain(value: object) -> str:
    """Four significant digits."""
    amount = number(value)
    return NONE if amount is None else _digits(amount, 4).replace("-", "−")


def tiny(value: object) -> str:
    """0.0000104 -> ``1.0e−05``."""
    amount = number(value)
    return NONE if amount is None else f"{amount:.1e}".replace("-", "−")


def percent(value: object) -> str:
    """A change: -1.0983 -> ``−1.10 %``."""
    amount = number(value)
    if amount is None:
        return "not a number"
    text = f"{amount:+.2f}".replace("-", "−")
    return f"{text if text not in ('+0.00', '−0.00') else '0.00'} %"


def change(before: object, after: object) -> float | None:
    """Return the relative change in percent, or None where there is none to tell."""
    first, last = number(before), number(after)
    if first is None or last is None or first <= 0:
        return None
    return 100 * (last / first - 1)


def rounded_percent(value: float | None) -> str:
    """A large change: -50.007 -> ``−50 %``."""
    return NONE if value is None else f"{value:+.0f} %".replace("-", "−").replace("+0 %", "0 %")


FILTERS = {f.__name__: f for f in (count, megabytes, milliseconds, millijoules, plain, tiny,
                                  percent, rounded_percent)}  # fmt: skip
