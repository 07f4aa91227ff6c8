"""Somebody else's two-task network, cut without a label: python benchmarks/age_gender/run.py

face-api.js's age and gender network at half its MACs, for both tasks and for each alone. There are
no labels and no faces here: importance is read from targets drawn from the parent's own outputs,
and what a cut changes is measured against the parent, on the test images of the pets. The figures
say how far the functions differ, not how well ages of people are told.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.compensate import refit
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan, dropped_indices
from secateur.core.progress import shown
from secateur.core.task import Task
from secateur.data.loading import InMemory, batches, image_batch, open_reader, spread
from secateur.data.sample import Reader
from secateur.flow.channel_scores import scores_for
from secateur.fusion.scores import fuse
from secateur.importance.bank import score_tasks
from secateur.importance.criterion import Scores
from secateur.lower import compare_outputs, export_onnx
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.runtimes.base import runtime_of
from secateur.tasks import decompose, select_tasks
from secateur.zoo import AGE_GENDER_INPUT, age_gender
from suite import Show, exit_status, write_suite

DATA = Path(os.environ.get("SECATEUR_DATA", "../shared/data"))
TASKS = (
    Task("age", "age", "regression", "age"),
    Task("gender", "gender", "classification", "gender", classes=2),
)
EXAMPLE = AGE_GENDER_INPUT.example()
SCORE_IMAGES, SCORE_BATCH = 128, 8
COMPENSATE_IMAGES = 64
PRIVATE = {"age": 512 + 1, "gender": 2 * 512 + 2}
Outputs = Mapping[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, default=DATA.parent / "weights" / "faceapi_age_gender.safetensors"
    )
    options = parser.parse_args()
    parent = MultiTaskModel(age_gender(options.weights), TASKS).eval()
    train = InMemory(open_reader("pets", DATA / "pets3", "train"))
    test = open_reader("pets", DATA / "pets3", "test")
    unseen = image_batch(test, range(len(test)), AGE_GENDER_INPUT)
    with shown():
        bank = score_tasks(
            parent,
            find_groups(parent, EXAMPLE),
            parent.tasks,
            "taylor",
            partial(
                batches, train, [], AGE_GENDER_INPUT, SCORE_BATCH,
                shuffle_seed=0, limit=SCORE_IMAGES,
            ),
            SCORE_IMAGES // SCORE_BATCH,
        )  # fmt: skip
        rows = [
            cut_row(parent, keep, bank, train, unseen)
            for keep in (("age", "gender"), ("age",), ("gender",))
        ]
    whole = whole_row(parent, unseen)
    shows = claims(whole, rows)
    write_suite("age_gender", "python benchmarks/age_gender/run.py", [0], [whole, *rows], shows)
    exit_status(shows)


def whole_row(parent: MultiTaskModel, unseen: Tensor) -> dict[str, Any]:
    """What each task owns, and the parent's outputs on the test images."""
    use = decompose(parent, EXAMPLE)
    wanted = run(parent, unseen)
    return {
        "what": "parent",
        "macs": count_macs(parent, EXAMPLE),
        "params": {
            "shared": use.shared_by(2, use.params),
            **{name: use.private(name, use.params) for name in use.tasks},
        },
        "selection_changes_bits_of": [
            name
            for name in use.tasks
            if not torch.equal(run(select_tasks(parent, [name]), unseen)[name], wanted[name])
        ],
        "images": len(unseen),
        "age_mean": float(wanted["age"].mean()),
        "age_std": float(wanted["age"].std()),
        "male_mean": float(wanted["gender"].softmax(1)[:, 0].mean()),
    }


def cut_row(
    parent: MultiTaskModel,
    keep: Sequence[str],
    bank: Mapping[str, Scores],
    train: Reader,
    unseen: Tensor,
) -> dict[str, Any]:
    """Halve the parent of the tasks in ``keep`` and state what that changes."""
    selected = select_tasks(parent, keep).eval()
    groups = find_groups(selected, EXAMPLE)
    parent_groups = find_groups(parent, EXAMPLE)
    scores = {name: scores_for(groups, parent_groups, bank[name]) for name in keep}
    plan = plan_prune(
        groups,
        macs_model(selected, groups, EXAMPLE),
        fuse(scores, dict.fromkeys(keep, 1.0), "mean"),
        scores,
        Budget(0.5),
        criterion="taylor",
        fusion="mean",
    )
    pruned = apply_plan(selected, groups, plan)
    images = image_batch(train, spread(train, COMPENSATE_IMAGES), AGE_GENDER_INPUT)
    fitted = refit(selected, pruned, groups, plan, images)
    wanted = run(selected, unseen)
    return {
        "what": "cut",
        "keep": list(keep),
        "macs": count_macs(pruned, EXAMPLE),
        "share_of_macs": count_macs(pruned, EXAMPLE) / count_macs(selected, EXAMPLE),
        "against_masked_parent": difference(
            run(masked(selected, groups, plan), unseen), run(pruned, unseen)
        ),
        "onnx_against_torch": onnx_difference(fitted, unseen),
        "change_plain": change(wanted, run(pruned, unseen)),
        "change_compensated": change(wanted, run(fitted, unseen)),
        "kept": {cut.name: [len(cut.kept), cut.width] for cut in plan.cuts},
    }


def change(wanted: Outputs, got: Outputs) -> dict[str, dict[str, float]]:
    """How far the answers moved: years, and the probability of the gender."""
    result = {}
    if "age" in wanted:
        years = (got["age"] - wanted["age"])[:, 0]
        result["age"] = {
            "mean_years": float(years.abs().mean()),
            "bias_years": float(years.mean()),
            "correlation": float(torch.corrcoef(torch.cat([got["age"], wanted["age"]], 1).T)[0, 1]),
        }
    if "gender" in wanted:
        moved = got["gender"].softmax(1) - wanted["gender"].softmax(1)
        same = got["gender"].argmax(1) == wanted["gender"].argmax(1)
        result["gender"] = {
            "mean_probability": float(moved[:, 0].abs().mean()),
            "same_answer_percent": 100 * float(same.float().mean()),
        }
    return result


def run(model: MultiTaskModel, images: Tensor) -> dict[str, Tensor]:
    with evaluating(model):
        parts = [model(chunk) for chunk in torch.split(images, 32)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def masked(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], plan: PrunePlan
) -> MultiTaskModel:
    """``model`` at full width, deaf to every channel that ``plan`` drops."""
    silent = copy.deepcopy(model)
    modules = dict(silent.named_modules())
    for (layer, axis), gone in dropped_indices(groups, plan).items():
        if axis == "in":
            modules[layer].get_parameter("weight").data[:, sorted(gone)] = 0
    return silent


def difference(wanted: Outputs, got: Outputs) -> float:
    """The largest absolute difference, as a share of its task's range."""
    arrays = ({name: tensor.numpy() for name, tensor in o.items()} for o in (wanted, got))
    return max(parity.relative for parity in compare_outputs(*arrays).values())


def onnx_difference(model: MultiTaskModel, images: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, EXAMPLE, path)
        session = runtime_of("onnxruntime").open_session(path, 1)
        got = {name: torch.from_numpy(a) for name, a in session.run(images[:64].numpy()).items()}
    return difference(run(model, images[:64]), got)


def claims(whole: dict[str, Any], rows: list[dict[str, Any]]) -> list[Show]:
    shares = [row["share_of_macs"] for row in rows]
    wrong = sum(whole["params"][name] != count for name, count in PRIVATE.items())

    def left(task: str, figure: str) -> float:
        """The compensated change as a share of the plain one, the larger of the cuts'."""
        shares: list[float] = [
            row["change_compensated"][task][figure] / row["change_plain"][task][figure]
            for row in rows
            if task in row["keep"]
        ]
        return max(shares)

    return [
        Show("tasks whose private parameters are not 513 (age) and 1026 (gender)", 0, wrong, "<="),
        Show("tasks whose output changes a bit when the other is dropped", 0,
             len(whole["selection_changes_bits_of"]), "<="),
        Show("MACs of each cut / parent with the same tasks, never above", 0.5, max(shares), "<="),
        Show("... and within 1 % of the budget", 0.495, min(shares), ">="),
        Show("cut against masked parent, largest difference / range", 1e-5,
             max(row["against_masked_parent"] for row in rows), "<="),
        Show("ONNX against torch, largest difference / range", 1e-4,
             max(row["onnx_against_torch"] for row in rows), "<="),
        Show("change of age, compensated / plain, worst of the cuts", 1.0,
             left("age", "mean_years"), "<="),
        Show("change of gender's probability, compensated / plain, worst of the cuts", 1.0,
             left("gender", "mean_probability"), "<="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
