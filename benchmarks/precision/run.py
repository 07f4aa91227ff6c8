"""What each precision costs every task: python benchmarks/precision/run.py [--quick]

Each model (models.py) in fp32, fp16, int8 by each calibrator with nothing else done (all that can
be in int8, heads to their last layer), with biases corrected and channels equalised where that
helps, guarded, and all of it taught by quantisation-aware distillation; on the whole test split, by
the pipeline's own stages for the x86-64 target. Where int8 passes as a whole the guard evaluates
it once; so it is also timed on Lite0 with a ``max_drop`` that makes it search. The guard judges on
the same images, as a build does; changes are against the fp32 model. Then fp32 and guarded int8 are
timed in turns, and the three forms for TensorRT built by tensorrt-rtx. Cells that are done are
found again: a stopped run goes on. ``--models`` takes parts of names. The parents with ResNet-18
and ViT-Tiny are too large for the repository; their cards (benchmarks/parents) have the command
that makes them again. Models whose parents are not there are left out; the first claim says how
many were measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engines import FORMS, built, plans, tensorrt_version, write_form
from precision.models import MODELS, QUICK, ROOT, Model
from secateur.bench.latency import Protocol, measure
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.progress import shown
from secateur.data.loading import image_batch
from secateur.devices.target import load_target
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.lowering import Lowering
from secateur.flow.planning import make_plan
from secateur.flow.recipe import parse_recipe
from secateur.flow.stages import Cut, begin_cut, change, finish_cut, session_accuracy
from secateur.lower.quant.calibrators import CALIBRATORS
from secateur.runtimes.base import runtime_of
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite

CELLS = RESULTS / "precision.cells.jsonl"
CACHE = StageCache(ROOT / "out" / "precision")
TARGET = load_target("x86-64-cpu")
STEPS, QUICK_STEPS = 300, 20
TAUGHT = "{{mode: int8, guard: false, distill: {{steps: {}}}}}"
BARE = "equalise: false, correct_bias: false, guard: false"
SETTINGS: dict[str, str] = {
    "fp32": "{}",
    "fp16": "{mode: fp16, guard: false}",
    **{f"int8, {name}": f"{{mode: int8, calibrator: {name}, {BARE}}}" for name in CALIBRATORS},
    "int8, corrected": "{mode: int8, guard: false}",
    "int8, guarded": "{mode: int8}",
    "int8, distilled": TAUGHT.format(STEPS),
}
PLAIN = tuple(f"int8, {name}" for name in CALIBRATORS)
MAX_DROP = 1.0  # percent, of every task
STRICT = 0.02  # so little that the guard must search
LEAST_INT8, MOST_MINUTES = 0.9, 15.0
SPEED = {"nyuv2_resnet18": 0.40, "nyuv2_lite0": 0.60}  # of fp32's p50, by factory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, printed, not written")
    parser.add_argument("--models", nargs="*", default=[], help="parts of their names")
    options = parser.parse_args()
    if options.quick:
        SETTINGS["int8, distilled"] = TAUGHT.format(QUICK_STEPS)
        with shown():
            kinds = (*SETTINGS, "latency")
            rows = [
                {"setting": kind, **CELL_MAKERS[kind](QUICK, kind, "calibration")} for kind in kinds
            ]
        print(json.dumps(rows, indent=2))
        return
    chosen = [m for m in MODELS if not options.models or any(p in m.name for p in options.models)]
    with shown():
        for model in (m for m in chosen if m.trained):
            for kind in CELL_MAKERS:
                cell(model, kind)
            if model.factory == SEARCHED and model.keep == 1.0:
                cell(model, SEARCH)
    kinds = (*CELL_MAKERS, SEARCH)
    rows = [row for m in MODELS for kind in kinds if (row := found(m, kind)) is not None]
    write_suite("precision", "python benchmarks/precision/run.py", [0], rows, shows := claims(rows))
    exit_status(shows)


def cell(model: Model, kind: str) -> None:
    """Measure one cell, unless it was before."""
    if found(model, kind) is None:
        row = CELL_MAKERS.get(kind, search_row)(model, kind, "test")
        append_row(CELLS, {"model": model.name, "setting": kind, **row})


def found(model: Model, kind: str) -> dict[str, Any] | None:
    """Return a cell that was measured."""
    rows = [row for row in read_rows(CELLS) if (row["model"], row["setting"]) == (model.name, kind)]
    return rows[-1] if rows else None


@cache
def opened(model: Model, test: str) -> tuple[Job, Cut]:
    """Load a model once, and cut it if it is a cut."""
    return loaded(model, test, CACHE)


def loaded(model: Model, test: str, store: StageCache) -> tuple[Job, Cut]:
    job = open_job(parse_recipe(model.recipe("{}", test=test), ROOT / "precision.yaml"), store)
    if model.keep == 1.0:
        return job, Cut(job.selected, job.selected, 0, model_fingerprint(job.selected))
    groups, plan = make_plan(job, job.grid(TARGET))
    return job, finish_cut(job, plan, begin_cut(job, groups, plan))


def lowering_of(
    model: Model, kind: str, made: tuple[Job, Cut], drop: float = MAX_DROP
) -> tuple[Job, Lowering]:
    """Return what makes a model in one setting, every task limited to ``drop`` below its fp32.

    Limits are against the parent, so what a cut lost in fp32 comes on top.
    """
    job, cut = made
    lost = Lowering(job, cut, TARGET).fp32.change.per_task
    tasks = [replace(t, max_drop=drop + max(0.0, -lost[t.name])) for t in job.tasks]
    recipe = parse_recipe(model.recipe(SETTINGS[kind], job.recipe.data.eval.split), job.recipe.path)
    job = replace(job, recipe=recipe, selected=MultiTaskModel(job.selected.network, tasks))
    return job, Lowering(job, cut, TARGET)


def accuracy_row(model: Model, kind: str, test: str) -> dict[str, Any]:
    job, lowering = lowering_of(model, kind, opened(model, test))
    start = time.monotonic()
    form = lowering.to(kind.partition(",")[0])  # type: ignore[arg-type]
    seconds = time.monotonic() - start
    runtime = runtime_of(TARGET.runtime)
    metrics = [
        session_accuracy(job, runtime.open_session(path, TARGET.threads), path, kind)
        for path in (lowering.fp32.onnx, form.onnx)
    ]
    off = change(job, *metrics)
    report = form.quantised.report if form.quantised else {}
    share = report.get("macs_share", {"fp32": 1.0, "int8": 0.0})
    return {
        "images": len(job.eval),
        "metrics": metrics[1],
        "change_percent": {task: round(value, 3) for task, value in off.per_task.items()},
        "delta_t": round(off.mean, 3),
        "worst": round(off.worst, 3),
        "macs_share": {name: round(value, 4) for name, value in share.items()},
        "guard": report.get("guard"),
        "kept": [f"{row['module']}: {row['why']}" for row in report.get("kept", [])],
        "equalised_channels": report.get("equalised_channels", 0),
        "distilled": report.get("distilled"),
        "onnx_bytes": form.onnx.stat().st_size,
        "minutes": round(seconds / 60, 2),
    }


def search_row(model: Model, kind: str, test: str) -> dict[str, Any]:
    """Let the guard search for what it rarely must, and time all of it, nothing found before."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        made = loaded(model, test, StageCache(Path(scratch)))
        form = lowering_of(model, "int8, guarded", made, STRICT)[1].to("int8")
    assert form.quantised is not None
    found = form.quantised.report
    return {"max_drop": STRICT, "minutes": round((time.monotonic() - start) / 60, 2),
            "worst": round(form.change.worst, 3), "guard": found["guard"],
            "macs_share": {name: round(value, 4) for name, value in found["macs_share"].items()},
            "kept": [f"{row['module']}: {row['why']}" for row in found["kept"]]}  # fmt: skip


def latency_row(model: Model, kind: str, test: str) -> dict[str, Any]:
    """Time fp32 and guarded int8 in turns."""
    job, lowering = lowering_of(model, "int8, guarded", opened(model, test))
    forms = {"fp32": lowering.fp32.onnx, "int8": lowering.to("int8").onnx}
    image = image_batch(job.eval, [0], job.spec).numpy()
    runtime = runtime_of(TARGET.runtime)
    calls: dict[str, Callable[[], object]] = {
        name: partial(runtime.open_session(path, TARGET.threads).run, image)
        for name, path in forms.items()
    }
    timed = measure(calls, Protocol(), f"{model.name}, latency")
    ratio = timed["int8"].median_ms / timed["fp32"].median_ms
    noisy = any(value.noisy for value in timed.values())
    latencies = {name: asdict(value) for name, value in timed.items()}
    return {"latency_ms": latencies, "ratio": round(ratio, 4), "noisy": noisy}


def tensorrt_row(model: Model, kind: str, test: str) -> dict[str, Any]:
    """Write the three forms for TensorRT and build them with tensorrt-rtx."""
    job, cut = opened(model, test)
    images = image_batch(job.train, range(8), job.spec)
    row: dict[str, Any] = {"tensorrt-rtx": tensorrt_version()}
    with tempfile.TemporaryDirectory() as scratch:
        fp32 = Path(scratch) / "fp32" / "model.onnx"
        fp32.parent.mkdir()
        fp32.write_bytes(Lowering(job, cut, TARGET).fp32.onnx.read_bytes())
        for form, plan in plans(fp32, images).items():
            row[form] = built(write_form(fp32, form, plan))
    return row


CELL_MAKERS: dict[str, Callable[[Model, str, str], dict[str, Any]]] = {
    **dict.fromkeys(SETTINGS, accuracy_row),
    "latency": latency_row,
    "tensorrt": tensorrt_row,
}
SEARCH = "int8, guard searching"
SEARCHED = "nyuv2_lite0"  # the factory of the models that the search is timed on


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    cells = {(row["model"], row["setting"]): row for row in rows}
    whole = [m for m in MODELS if all((m.name, kind) in cells for kind in CELL_MAKERS)]
    shows = [Show("models of the suite that were measured", len(MODELS), len(whole), ">=")]
    for model in whole:
        guarded = cells[model.name, "int8, guarded"]
        fails = sum(cells[model.name, kind]["worst"] < -MAX_DROP for kind in PLAIN)
        shows += [
            Show(f"{model.name}: worst task %, int8 guarded", -MAX_DROP, guarded["worst"], ">="),
            Show("... share of its MACs in int8", LEAST_INT8, guarded["macs_share"]["int8"], ">="),
            Show(f"... plain settings of {len(PLAIN)} that a task fails", 1, fails, ">="),
        ]
        if (model.name, SEARCH) in cells:
            row = cells[model.name, SEARCH]
            shows.append(Show(
                f"... minutes of a guard that must search (at most {STRICT} % of each task), with "
                f"all before it, {row['guard']['evaluations']} evaluations", MOST_MINUTES,
                row["minutes"], "<=",
            ))  # fmt: skip
        timed = cells[model.name, "latency"]
        if model.factory in SPEED:
            noise = " (noisy)" if timed["noisy"] else ""
            shows.append(Show(f"... p50 of int8 over fp32's, 1 thread{noise}",
                              SPEED[model.factory], timed["ratio"], "<="))  # fmt: skip
    works = sum("bytes" in cells[m.name, "tensorrt"][form] for m in whole for form in FORMS)
    shows.append(Show("files that TensorRT-RTX builds, of three per model",
                      3 * len(whole), works, ">="))  # fmt: skip
    return shows


if __name__ == "__main__":
    main()
