"""Accuracy on the evaluation data, kept with each image's part so that intervals can be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from secateur.bench.accuracy import Scores, score, score_model
from secateur.core.files import atomic_path, file_sha256, write_json
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.task import Task
from secateur.flow.job import Job
from secateur.flow.predict import predictor
from secateur.lower.ncnn import weights_file
from secateur.runtimes.base import Session, runtime_of


def torch_scores(job: Job, model: MultiTaskModel, title: str) -> Scores:
    """Return a torch model's scores on the evaluation data, made now or found."""
    return _found_or_made(
        job, model_fingerprint(model),
        lambda: score_model(model, job.eval, job.spec, title=title, per_image=True),
    )  # fmt: skip


def session_scores(job: Job, session: Session, model: Path, title: str) -> Scores:
    """Return a runtime's scores on the evaluation data, made now or found.

    ``session`` has opened ``model``.
    """
    return _found_or_made(
        job, _digest(model),
        lambda: score(
            predictor(session), job.tasks, job.eval, job.spec, title=title, per_image=True
        ),
    )  # fmt: skip


def _digest(model: Path) -> list[str]:
    """Return what tells the bytes of an ONNX file, or of ncnn's two, and what runs them here."""
    if model.suffix == ".onnx":
        return [file_sha256(model), runtime_of("onnxruntime").version()]
    return [*map(file_sha256, (model, weights_file(model))), runtime_of("ncnn").version()]


def meaning(task: Task) -> dict[str, Any]:
    """Return what of a task changes its scores and metrics (how much may be lost does not)."""
    return {k: v for k, v in asdict(task).items() if k not in ("max_drop", "weight")}


def _found_or_made(job: Job, model_key: str | list[str], make: Callable[[], Scores]) -> Scores:
    """Look in the cache; what was found has no ``wrong`` and ``unlabelled``, but their NaN."""
    key = (job.eval.fingerprint, asdict(job.spec), [meaning(task) for task in job.tasks])
    folder = job.cache.folder("accuracy", model_key, *key)
    value, rows = folder / "value.json", folder / "images.npz"
    try:
        metrics = json.loads(value.read_text(encoding="utf-8"))
        with np.load(rows, allow_pickle=False) as stored:
            return Scores(metrics, dict(stored))
    except (OSError, ValueError, BadZipFile):
        scores = make()
        with atomic_path(rows) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **scores.sums)  # type: ignore[arg-type]
        write_json(value, scores.metrics)
        return scores
