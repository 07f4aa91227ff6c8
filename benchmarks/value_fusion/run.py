"""Three single-task experts of one backbone, merged into one shared backbone and three heads.

    SECATEUR_DATA=... python benchmarks/value_fusion/run.py [--seeds 0 1 2] [--quick]

The experts are fine-tuned from the same ImageNet EfficientNet-Lite0, one per NYUv2 task, at 96x128
on the split ``fit``. Each rule's knobs are chosen on ``val`` with the first seed's experts and
reported on ``test``, for all seeds, before and after the same short recovery on the labels. ΔT is
against the experts. Every rule sees the same unlabelled training images: those that look at
weights only get their batch norms re-estimated on them (``plain`` is without). ``pretrained`` is
the ImageNet backbone under the experts' heads: what recovery does without any merge.
``linearised`` has experts of its own, trained in the tangent space, with the same yardstick.

Resumable: run the same command again. ``--quick`` checks the way on a few images.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.bench.accuracy import evaluate_model
from secateur.core.files import value_digest, write_json
from secateur.core.model import MultiTaskModel
from secateur.core.progress import shown
from secateur.core.task import Task
from secateur.data.loading import InMemory, image_batch, open_reader, spread
from secateur.data.sample import Reader, Sample
from secateur.data.transforms import Augment
from secateur.fusion.linearised import Linearised
from secateur.fusion.weights import MergeSettings, measure_importance, merge_networks
from secateur.metrics.delta import Delta, delta
from secateur.metrics.kind import kind_of
from secateur.recover import TrainSettings, train
from secateur.zoo.compose import ComposedModel, compose
from secateur.zoo.parents import NYUV2_HEADS
from suite import Show, exit_status, read_json, write_suite
from train_parent import PARENTS

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SECATEUR_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = DATA.parent / "weights" / "efficientnet_lite0_imagenet_timm.safetensors"
TASKS, SPEC = PARENTS["nyuv2_lite0_96x128"].tasks, PARENTS["nyuv2_lite0_96x128"].spec
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
FLIPS = Augment(scale=1.0, jitter=0.0)
RIVALS = ("average", "task_arithmetic", "ties")

Metrics = dict[str, dict[str, float]]


def knobs(**values: Sequence[float]) -> list[dict[str, float]]:
    """Return every combination of the values."""
    every = itertools.product(*values.values())
    return [dict(zip(values, chosen, strict=True)) for chosen in every]


# Per row of the table: the rule and what is tried on the validation images.
GRID: dict[str, tuple[str, list[dict[str, float]]]] = {
    "pretrained": ("task_arithmetic", knobs(strength=[0.0])),
    "average": ("average", knobs()),
    "task_arithmetic": ("task_arithmetic", knobs(strength=STRENGTHS)),
    "ties": ("ties", knobs(strength=[*STRENGTHS, 1.5], top_share=[0.2, 0.5])),
    "fisher": ("fisher", knobs()),
    "regmean": ("regmean", knobs(off_diagonal=[0.7, 0.9, 0.99])),
    "cut": ("cut", knobs(ridge=[0.01, 0.1, 1.0], damping=[0.03, 0.3, 3.0])),
    "linearised": ("task_arithmetic", knobs(strength=STRENGTHS)),
}


class First:
    """The first ``count`` samples of a reader."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader, self._count = reader, min(count, len(reader))
        self.fingerprint = value_digest([reader.fingerprint, self._count])

    def __len__(self) -> int:
        return self._count

    @property
    def label_names(self) -> frozenset[str]:
        return self._reader.label_names

    def __getitem__(self, index: int) -> Sample:
        return self._reader[index]


@dataclass(frozen=True)
class Bench:
    """The data, and the folder of one configuration's checkpoints and cells."""

    options: argparse.Namespace
    fit: Reader
    val: Reader
    test: Reader
    work: Path

    def images(self) -> Tensor:
        """Return the unlabelled images that every rule may look at."""
        return image_batch(self.fit, spread(self.fit, self.options.images), SPEC)

    def cell(self, name: str) -> Any:
        """Return what is known of a cell, or None."""
        path = self.work / "cells" / f"{name}.json"
        return read_json(path) if path.exists() else None

    def keep(self, name: str, value: Any) -> Any:
        """Store a cell and return it."""
        write_json(self.work / "cells" / f"{name}.json", value)
        return value


def main() -> None:
    options = _options()
    bench = open_bench(options)
    rows: list[dict[str, Any]] = []
    with shown(quiet=options.quiet):
        for seed in options.seeds:
            rows += [expert_row(bench, seed, linear) for linear in _kinds(options.rows)]
            rows += [merged_row(bench, name, seed) for name in options.rows]
    rows += [summary(rows, name) for name in options.rows]
    shows = claims(rows, options.rows)
    if options.quick:
        write_json(bench.work / "quick.json", {"rows": rows, "shows": [asdict(s) for s in shows]})
        print(f"quick: {len(rows)} rows, no claim is made of them; {bench.work / 'quick.json'}")
        return
    command = f"python benchmarks/value_fusion/run.py --epochs {options.epochs}"
    write_suite("value_fusion", command, options.seeds, rows, shows)
    exit_status(shows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with train.zip and test.zip")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--epochs", type=int, default=12, help="of each expert's fine-tuning")
    parser.add_argument("--recovery-epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=128, help="unlabelled images for merging")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "value_fusion")
    parser.add_argument("--quick", action="store_true", help="8 images, 1 epoch, 1 seed")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if options.quick:
        options.epochs = options.recovery_epochs = 1
        options.images, options.seeds = 8, options.seeds[:1]
    options.data = options.data or DATA / ("nyuv2_mini" if options.quick else "nyuv2_288x384")
    return options


def open_bench(options: argparse.Namespace) -> Bench:
    readers = {
        split: InMemory(open_reader("nyuv2", options.data, split))
        for split in (("train", "test") if options.quick else ("fit", "val", "test"))
    }
    if options.quick:  # the mini set is too small for a validation split
        few = {split: First(reader, 8) for split, reader in readers.items()}
        readers = {"fit": few["train"], "val": few["train"], "test": few["test"]}  # type: ignore[dict-item]
    configuration = [options.epochs, options.recovery_epochs, options.images,
                     *[reader.fingerprint for reader in readers.values()]]  # fmt: skip
    work = options.work / value_digest(configuration)[:8]
    return Bench(options, readers["fit"], readers["val"], readers["test"], work)


def _kinds(rows: Sequence[str]) -> Iterator[bool]:
    """Yield which experts the rows need: plain ones always, as the yardstick; linearised ones."""
    yield False
    if "linearised" in rows:
        yield True


def start_of(bench: Bench, tasks: Sequence[Task], linear: bool) -> MultiTaskModel:
    """Return the ImageNet backbone with fresh heads for ``tasks``."""
    heads = {task.name: NYUV2_HEADS[task.name] for task in tasks}
    network = compose("efficientnet_lite0", heads, backbone_weights=bench.options.weights)
    if linear:
        network = ComposedModel(Linearised(network.backbone), dict(network.heads.items()))
    return MultiTaskModel(network, tasks).eval()


def experts_of(bench: Bench, seed: int, linear: bool) -> dict[str, MultiTaskModel]:
    """Return the trained expert of each task, training what is not there yet."""
    experts = {}
    for task in TASKS:
        name = f"{'linearised_' if linear else ''}expert_{task.name}_{seed}"
        torch.manual_seed(seed)
        settings = TrainSettings(bench.options.epochs, seed=seed)
        result = train(start_of(bench, [task], linear), bench.fit, SPEC, settings,
                       augment=Augment(), checkpoint=bench.work / name, title=name)  # fmt: skip
        experts[task.name] = result.model
    return experts


def expert_row(bench: Bench, seed: int, linear: bool) -> dict[str, Any]:
    """Return the experts' own metrics on ``val`` and ``test``."""
    name = f"{'linearised_' if linear else ''}experts_{seed}"
    known = bench.cell(name)
    if known is None:
        experts = experts_of(bench, seed, linear)
        known = bench.keep(name, {
            "what": "experts", "linearised": linear, "seed": seed,
            **{split: {task: value for expert in experts.values()
                       for task, value in evaluate_model(expert, reader, SPEC).items()}
               for split, reader in (("val", bench.val), ("test", bench.test))},
        })  # fmt: skip
    return dict(known)


def join(experts: Mapping[str, MultiTaskModel]) -> MultiTaskModel:
    """Return one network with a backbone and every expert's head, to be merged into."""
    networks = {name: expert.network for name, expert in experts.items()}
    backbone = copy.deepcopy(next(iter(networks.values())).get_submodule("backbone"))
    heads = {name: copy.deepcopy(network.get_submodule(f"heads.{name}"))
             for name, network in networks.items()}  # fmt: skip
    return MultiTaskModel(ComposedModel(backbone, heads), TASKS).eval()


def merged_row(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """Return ΔT on ``test`` of one row: plain, re-estimated, and after recovery."""
    known = bench.cell(f"merged_{name}_{seed}")
    if known is not None:
        return dict(known)
    linear = name == "linearised"
    yardstick = expert_row(bench, seed, False)["test"]
    experts = experts_of(bench, seed, linear)
    pretrained = start_of(bench, TASKS, linear).state_dict()
    settings = MergeSettings(**choose(bench, name))
    images = bench.images()
    started = time.monotonic()
    known = measure_importance(experts, images, settings.rule)
    start = join(experts), pretrained, experts, images
    merged = merge_networks(*start, settings, importance=known)
    seconds = time.monotonic() - started
    plain = merge_networks(*start, replace(settings, reestimate=False), importance=known)
    folder = bench.work / f"recovery_{name}_{seed}"
    recovery = TrainSettings(bench.options.recovery_epochs, learning_rate=5e-4, seed=seed)
    recovered = train(merged, bench.fit, SPEC, recovery, augment=FLIPS, checkpoint=folder,
                      title=f"recovering {name}")  # fmt: skip
    stages = {"plain": plain, "merged": merged, "recovered": recovered.model}
    changes = {
        stage: compared(evaluate_model(model, bench.test, SPEC), yardstick)
        for stage, model in stages.items()
    }
    row = {"what": "merged", "row": name, "seed": seed, "settings": asdict(settings), **changes,
           "images": len(images), "merge_seconds": round(seconds, 1),
           "recovery_steps": recovered.steps}  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    reached = ", ".join(f"{stage} {one['delta_t']:+.2f}" for stage, one in changes.items())
    print(f"{name} seed {seed}: {reached}", flush=True)
    return dict(bench.keep(f"merged_{name}_{seed}", row))


def choose(bench: Bench, name: str) -> dict[str, Any]:
    """Return the row's rule and the knobs with the best ΔT on ``val``, first seed, no recovery."""
    rule, tried = GRID[name]
    tried = tried[:2] if bench.options.quick else tried
    if len(tried) == 1:
        return {"rule": rule, **tried[0]}
    known = bench.cell(f"choice_{name}")
    if known is None:
        seed, linear = bench.options.seeds[0], name == "linearised"
        yardstick = expert_row(bench, seed, False)["val"]
        experts = experts_of(bench, seed, linear)
        pretrained = start_of(bench, TASKS, linear).state_dict()
        images = bench.images()
        importance = measure_importance(experts, images, rule)
        scored = []
        for values in tried:
            settings = MergeSettings(rule, **values)  # type: ignore[arg-type]
            merged = merge_networks(
                join(experts), pretrained, experts, images, settings, importance=importance
            )
            change = compared(evaluate_model(merged, bench.val, SPEC), yardstick)
            scored.append({"knobs": values, "delta_t": change["delta_t"]})
            print(f"{name} {values}: {change['delta_t']:+.2f} on val", flush=True)
        known = bench.keep(f"choice_{name}", {"seed": seed, "scored": scored})
    best = max(known["scored"], key=lambda one: float(one["delta_t"]))
    return {"rule": rule, **best["knobs"]}


def compared(metrics: Metrics, yardstick: Metrics) -> dict[str, Any]:
    """Return the change against the experts, in percent, and the metrics."""
    higher = {task.name: kind_of(task).higher_is_better for task in TASKS}
    change: Delta = delta(yardstick, metrics, higher)
    return {"delta_t": change.mean, "worst": change.worst, "worst_task": change.worst_task,
            "per_task": dict(change.per_task), "metrics": metrics}  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds of one row of the table."""
    own = [row for row in rows if row["what"] == "merged" and row["row"] == name]
    result: dict[str, Any] = {"what": "summary", "row": name, "seeds": len(own)}
    for stage in ("plain", "merged", "recovered"):
        for value in ("delta_t", "worst"):
            values = [row[stage][value] for row in own]
            result[f"{stage}_{value}"] = {
                "mean": mean(values),
                "std": stdev(values) if len(values) > 1 else 0.0,
            }
    return result


def claims(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Show]:
    """Return how far ``cut`` is ahead of the best rival, in points of ΔT, per stage."""
    if "cut" not in names or not set(RIVALS) <= set(names):
        return []
    means = {row["row"]: row for row in rows if row["what"] == "summary"}
    shows = []
    for stage, when in (("merged", "before"), ("recovered", "after")):
        of = {name: means[name][f"{stage}_delta_t"]["mean"] for name in names}
        rivals = {"average, task arithmetic and TIES": RIVALS,
                  "every other row": [name for name in names if name != "cut"]}  # fmt: skip
        for whom, rows_of in rivals.items():
            ahead = of["cut"] - max(of[name] for name in rows_of)
            claim = (f"merged by cut ahead of {whom} {when} recovery, points of ΔT, "
                     f"{means['cut']['seeds']} seed(s)")  # fmt: skip
            shows.append(Show(claim, 0.0, ahead, ">="))
    return shows


if __name__ == "__main__":
    main()
