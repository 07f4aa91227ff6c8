"""Quantisation-aware distillation: the network learns, under its int8 grids, what it says in fp32.

The fallback where the guard leaves too little in int8. Labels are not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from secateur.core.files import file_sha256
from secateur.core.model import MultiTaskModel
from secateur.data.loading import resized_reader
from secateur.data.transforms import Augment
from secateur.flow.job import Job
from secateur.flow.precision_spec import DistillSpec
from secateur.flow.sources import Source
from secateur.flow.stages import Cut
from secateur.lower.quant import QuantPlan, Replay, write_learned
from secateur.recover import TrainSettings, train


def distilled(job: Job, cut: Cut, source: Source, plan: QuantPlan, wanted: DistillSpec) -> Source:
    """Return ``source`` with weights that bear ``plan``; a stopped training goes on.

    Raises:
        BuildError: the model has an operator that cannot be trained here.
        ModelError: the loss became NaN or infinite.
    """
    dialect = source.trials.dialect
    key = (file_sha256(source.model), cut.key, plan.to_json(), dialect.mark(),
           [(task.name, task.kind, task.weight) for task in job.tasks],
           job.train.fingerprint, wanted.model_dump(exclude={"share"}))  # fmt: skip
    folder = job.cache.folder("distilled", *key)
    path = folder / "model.onnx"
    if not path.exists():
        replay = Replay(source.model, plan, dialect)
        tasks = tuple(replace(task, output=task.name) for task in job.tasks)
        settings = TrainSettings(
            steps=wanted.steps, batch_size=min(wanted.batch_size, len(job.train)),
            learning_rate=wanted.learning_rate, weight_decay=0.0, labels=False,
        )  # fmt: skip
        result = train(
            MultiTaskModel(replay, tasks), resized_reader(job.train, job.spec, ()), job.spec,
            settings, parent=cut.recovered, augment=Augment(scale=1.0, jitter=0.0),
            checkpoint=folder, title="distilling in int8",
        )  # fmt: skip
        write_learned(source.model, cast(Replay, result.model.network), path)
        (folder / "state.pt").unlink(missing_ok=True)
    return source.with_model(path)
