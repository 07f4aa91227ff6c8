"""Train a parent to convergence and write its weights, curve and model card.

    python benchmarks/train_parent.py nyuv2_lite0 --data DIR --weights FILE [--epochs 60]
    python benchmarks/train_parent.py nyuv2_resnet18_96x128 --data DIR [--epochs 120]
    python benchmarks/train_parent.py pets_lite0 --data DIR --weights FILE [--epochs 60]
    python benchmarks/train_parent.py scenes_small [--epochs 60]    # or scenes_vit
    python benchmarks/train_parent.py cifar_resnet --data DIR --batch-size 64    # or cifar_vit

The last ``--finish`` epochs, after ``--epochs``, see the images as they are but for flips, at a
rate that falls anew: zooms and jitter hold a network back from the best it can do on plain images.
``--start FILE`` takes the weights that an earlier run's ``--epochs`` gave, and only finishes.

Resumable: run the same command again after a stop. Uses a GPU when there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import accelerate
import timm
import torch
from safetensors.torch import load_file, save_file
from secateur import zoo
from secateur.bench.accuracy import evaluate_model
from secateur.core.files import atomic_path, write_json, write_text
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.progress import shown
from secateur.core.task import Task
from secateur.data.loading import InMemory, open_reader
from secateur.data.sample import Reader
from secateur.data.transforms import Augment
from secateur.recover import TrainSettings, train

HERE = Path(__file__).resolve().parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


@dataclass(frozen=True)
class Parent:
    """What to train, on what, and what the card says about the data."""

    factory: str
    tasks: tuple[Task, ...]
    spec: ModelInput
    reader: str
    data: str
    terms: str
    augment: Augment
    train_split: str = "train"
    options: Mapping[str, object] = field(default_factory=dict)


def _nyuv2(
    factory: str, height: int, width: int, backbone: str | None, train_split: str = "train"
) -> Parent:
    """``backbone``: whose ImageNet weights it starts from; None where none are to be had."""
    start = (
        f"Backbone pre-trained on ImageNet-1k ({backbone})."
        if backbone
        else "Trained from scratch: no pre-trained weights of this backbone are at hand, so its "
        "accuracy is far from what it could be; it is for comparing precisions."
    )
    return Parent(
        factory=factory,
        tasks=(
            Task("segmentation", "segmentation", "segmentation", "segmentation", classes=13),
            Task("depth", "depth", "depth", "depth"),
            Task("normals", "normals", "normals", "normals", weight=2.0),
        ),
        spec=ModelInput(3, height, width, MEAN, STD),
        reader="nyuv2",
        data="NYUv2 (Silberman, Hoiem, Kohli, Fergus, ECCV 2012), official 795 training and 654 "
        "test images at 288x384, 13 classes; normals derived from depth, so angles are not "
        f"comparable with published ones. {start}",
        terms="NYUv2 is for research use only; so are these weights.",
        augment=Augment(),
        train_split=train_split,
    )


def _scenes(factory: str) -> Parent:
    return Parent(
        factory=factory,
        tasks=(
            Task("segmentation", "segmentation", "segmentation", "segmentation", classes=8),
            Task("depth", "depth", "depth", "depth"),
            Task("normals", "normals", "normals", "normals", weight=2.0),
            Task("room", "room", "classification", "room", classes=4),
        ),
        spec=ModelInput(3, 96, 128, MEAN, STD),
        reader="scenes",
        data="Rooms rendered by secateur.data.scenes (deterministic, embedded); trained from "
        "scratch.",
        terms="No third-party data; Apache-2.0 like the code.",
        augment=Augment(scale=1.2),
    )


UNSEEN = (3, 8, 13, 18)  # coarse classes of CIFAR-100 that its parents never see: every fifth
SEEN = [coarse for coarse in range(20) if coarse not in UNSEEN]


def _cifar(factory: str) -> Parent:
    return Parent(
        factory=factory,
        tasks=(Task("label", "label", "classification", "fine", classes=5 * len(SEEN)),),
        spec=ModelInput(3, 32, 32, CIFAR_MEAN, CIFAR_STD),
        reader="cifar100",
        data="CIFAR-100 (Krizhevsky, 2009), 80 of its classes (16 of its 20 super-classes), half "
        "of their training images; trained from scratch.",
        terms="CIFAR-100 has no explicit licence and is passed on for research; so are these "
        "weights.",
        augment=Augment(scale=1.3),
        options={"coarse": SEEN},
    )


PARENTS = {
    "nyuv2_lite0": _nyuv2("nyuv2_lite0", 192, 256, "Apache-2.0"),
    # The small ones carry the benchmark grids; they never saw the validation images.
    "nyuv2_lite0_96x128": _nyuv2("nyuv2_lite0", 96, 128, "Apache-2.0", train_split="fit"),
    "nyuv2_mobilenetv2_96x128": _nyuv2(
        "nyuv2_mobilenetv2", 96, 128, "torchvision, BSD-3-Clause", train_split="fit"
    ),
    # Of the suite of precisions.
    **{
        f"{factory}_96x128": _nyuv2(factory, 96, 128, None, train_split="fit")
        for factory in ("nyuv2_mobilenetv3", "nyuv2_resnet18", "nyuv2_vit")
    },
    "pets_lite0": Parent(
        factory="pets_lite0",
        tasks=(
            Task("breed", "breed", "classification", "breed", classes=3),
            Task("species", "species", "classification", "species", classes=2),
            Task("trimap", "trimap", "segmentation", "trimap", classes=3),
        ),
        spec=ModelInput(3, 128, 128, MEAN, STD),
        reader="pets",
        data="Three breeds of the Oxford-IIIT Pet data set (Parkhi, Vedaldi, Zisserman, Jawahar, "
        "CVPR 2012), 300 training (50 of them held out) and 298 test images at 160x160. Backbone "
        "pre-trained on ImageNet-1k (Apache-2.0).",
        terms="The data set is CC BY-SA 4.0, and so are these weights; the images' copyright stays "
        "with their owners.",
        augment=Augment(),
        train_split="fit",
    ),
    **{name: _scenes(name) for name in ("scenes_small", "scenes_vit")},
    **{name: _cifar(name) for name in ("cifar_resnet", "cifar_vit")},
}


def main() -> None:
    options = _options()
    parent = PARENTS[options.name]
    work = options.work or HERE.parent / "out" / "parents" / options.name
    splits = (parent.train_split, "test")
    train_set, test_set = (
        InMemory(open_reader(parent.reader, options.data, split, **parent.options))
        for split in splits
    )
    torch.manual_seed(options.seed)
    factory = getattr(zoo, parent.factory)
    network = factory(options.weights) if options.weights else factory()
    model = MultiTaskModel(network, parent.tasks)
    if options.start:
        network.load_state_dict({k: v.float() for k, v in load_file(options.start).items()})
    settings = TrainSettings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        bf16=options.bf16,
    )
    phases = [("main", settings, parent.augment)]
    if options.finish:
        plain = Augment(scale=1.0, jitter=0.0)
        last = replace(settings, epochs=options.finish, learning_rate=options.finish_rate)
        phases.append(("finish", last, plain))
    started = time.time()
    curve: list[dict[str, object]] = []
    for phase, how, augment in phases[1 if options.start else 0 :]:
        with shown(quiet=options.quiet):
            model = _train(options, parent, model, how, augment, train_set, test_set, work / phase)
        curve += json.loads((work / phase / "curve.json").read_text())
    _write(options, parent, model, curve, phases, train_set, test_set, time.time() - started)


def _train(
    options: argparse.Namespace,
    parent: Parent,
    model: MultiTaskModel,
    settings: TrainSettings,
    augment: Augment,
    train_set: Reader,
    test_set: Reader,
    work: Path,
) -> MultiTaskModel:
    """Train one phase, keeping its curve of test metrics beside its checkpoint."""
    curve_file = work / "curve.json"
    curve = json.loads(curve_file.read_text()) if curve_file.exists() else []

    def after_epoch(epoch: int, model: MultiTaskModel, loss: float) -> None:
        row: dict[str, object] = {"phase": work.name, "epoch": epoch, "loss": round(loss, 4)}
        if epoch % options.every == 0 or epoch == (settings.epochs or 0):
            row["test"] = _test(model, test_set, parent.spec)
        curve.append(row)
        write_json(curve_file, curve)
        print(json.dumps(row), flush=True)

    return train(
        model, train_set, parent.spec, settings,
        augment=augment, checkpoint=work, after_epoch=after_epoch,
        title=f"{options.name}, {work.name}:",
    ).model  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PARENTS))
    parser.add_argument("--data", help="the data set's folder (the scenes have none)")
    parser.add_argument("--weights", help="ImageNet weights of the backbone (safetensors)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--finish", type=int, default=0, help="epochs with flips alone, at the end")
    parser.add_argument("--finish-rate", type=float, default=2e-3, help="its learning rate")
    parser.add_argument("--start", help="weights after --epochs, trained earlier (safetensors)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=5, help="epochs between tests")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--work", type=Path, help="folder for checkpoints")
    parser.add_argument("--note", default="", help="anything the card should say of this run")
    parser.add_argument("--out", type=Path, default=HERE / "parents")
    return parser.parse_args()


def _test(model: MultiTaskModel, reader: Reader, spec: ModelInput) -> dict[str, dict[str, float]]:
    metrics = evaluate_model(model, reader, spec)
    return {t: {m: round(v, 4) for m, v in values.items()} for t, values in metrics.items()}


def _write(
    options: argparse.Namespace,
    parent: Parent,
    model: MultiTaskModel,
    curve: list[dict[str, object]],
    phases: list[tuple[str, TrainSettings, Augment]],
    train_set: Reader,
    test_set: Reader,
    seconds: float,
) -> None:
    """Write the fp16 weights, and the card from what those very weights score."""
    state = {
        key: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for key, tensor in model.network.state_dict().items()
    }
    model.network.load_state_dict({k: v.float() for k, v in state.items()})
    metrics = _test(model, test_set, parent.spec)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out / f"{options.name}.safetensors") as temporary:
        save_file(state, temporary)
    record = {
        "name": options.name,
        "factory": f"secateur.zoo:{parent.factory}",
        "command": _command(options),
        "note": options.note,
        "phases": [
            {"name": name, "settings": asdict(settings), "augment": asdict(augment)}
            for name, settings, augment in phases
        ],
        "steps": sum(settings.total_steps(len(train_set)) for _, settings, _ in phases),
        "test_metrics": metrics,
        "curve": curve,
        "seconds_of_last_run": round(seconds),
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
        },
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, cuda={torch.cuda.is_available()}",
    }
    write_json(options.out / f"{options.name}.json", record)
    write_text(options.out / f"{options.name}.md", _card(options.name, parent, record))


def _command(options: argparse.Namespace) -> str:
    """Return the command that gives these weights from nothing."""
    finish = f" --finish {options.finish} --finish-rate {options.finish_rate}"
    return (
        f"python benchmarks/train_parent.py {options.name} --epochs {options.epochs}"
        f" --batch-size {options.batch_size} --learning-rate {options.learning_rate}"
        f" --seed {options.seed}{finish if options.finish else ''}"
        f"{' --bf16' if options.bf16 else ''}"
    )


def _card(name: str, parent: Parent, record: dict[str, object]) -> str:
    metrics = record["test_metrics"]
    assert isinstance(metrics, dict)
    rows = [
        f"| {task} | {metric} | {value:.4g} |"
        for task, values in metrics.items()
        for metric, value in values.items()
    ]
    spec = parent.spec
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Factory `secateur.zoo:{parent.factory}`; input {spec.height}x{spec.width} RGB; "
            f"fp16 weights in `{name}.safetensors`.",
            "",
            f"**Data.** {parent.data} Trained on the reader's split `{parent.train_split}`.",
            "",
            f"**Terms.** {parent.terms}",
            "",
            "**Test metrics of these very weights** (whole test split, at the input's size):",
            "",
            "| task | metric | value |",
            "|---|---|---|",
            *rows,
            "",
            f"**Command.** `{record['command']}` {record['note']}".rstrip(),
            "",
            f"Seeds, settings, versions and the curve of test metrics are in `{name}.json`.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
