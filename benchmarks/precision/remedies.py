"""What bias correction and equalisation are worth: python benchmarks/precision/remedies.py

Plain int8 (no guard) of two depth-wise parents, with each of the
two, both and neither, on the validation images of NYUv2: what their defaults in recipes were chosen
by. Changes are against the fp32 model. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from precision.models import MODELS
from precision.run import SETTINGS, accuracy_row
from secateur.core.progress import shown
from suite import RESULTS, Show, append_row, read_rows, write_suite

CELLS = RESULTS / "precision_remedies.cells.jsonl"
NAMES = ("MobileNetV2, NYUv2 96x128", "Lite0, NYUv2 96x128")
CALIBRATORS = ("percentile", "minmax")
CHOICES = tuple(itertools.product((False, True), repeat=2))  # equalise, correct_bias


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    models = [model for model in MODELS if model.name in NAMES]
    done = {(row["model"], row["setting"]): row for row in read_rows(CELLS)}
    for (equalise, correct), rule in itertools.product(CHOICES, CALIBRATORS):
        SETTINGS[setting(rule, equalise, correct)] = (
            f"{{mode: int8, guard: false, calibrator: {rule}, "
            f"equalise: {str(equalise).lower()}, correct_bias: {str(correct).lower()}}}"
        )
    wanted = [setting(rule, *choice) for choice in CHOICES for rule in CALIBRATORS]
    with shown():
        for model, name in itertools.product(models, wanted):
            if (model.name, name) not in done:
                row = {"model": model.name, "setting": name, **accuracy_row(model, name, "val")}
                append_row(CELLS, row)
                done[model.name, name] = row
    gains = {
        what: [done[model.name, after]["delta_t"] - done[model.name, before]["delta_t"]
               for model in models for rule in CALIBRATORS
               for before, after in [(setting(rule, False, False), setting(rule, *choice))]]
        for what, choice in (("bias correction", (False, True)), ("equalisation", (True, False)),
                             ("both", (True, True)))
    }  # fmt: skip
    claim = "points of delta T that {} gives plain int8 (mean: two parents, two calibrators)"
    shows = [
        Show(claim.format(what), 0.0, round(sum(found) / len(found), 3), ">=")
        for what, found in gains.items()
    ]
    rows = [done[model.name, name] for model in models for name in wanted]
    write_suite("precision_remedies", "python benchmarks/precision/remedies.py", [0], rows, shows)


def setting(rule: str, equalise: bool, correct: bool) -> str:
    """Return the name of a cell."""
    done = [name for name, on in (("equalised", equalise), ("corrected", correct)) if on]
    return ", ".join(["int8", rule, *done])


if __name__ == "__main__":
    main()
