"""One parent of the CIFAR suite, its library of earlier cuts, and single runs on a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from secateur import zoo
from secateur.core.files import atomic_path, write_json
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan
from secateur.vote.similarity import leep, mean_feature, score_cosine, task2vec
from suite import read_json
from train_parent import PARENTS, SEEN
from vote.starts import STARTS, Asked, Earlier, begin
from vote.tasks import BANK, Cifar, FiveWay, Images
from vote.training import (
    Clock,
    Parent,
    Steps,
    accuracy,
    features,
    fine_tune,
    headed,
    in_steps,
    taylor,
)

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "out" / "vote_cifar"
SHARES = (0.5, 0.2, 0.1, 0.02)  # of the MACs that stay
BANK_ITERATIONS, GENERIC_ITERATIONS = 150, 300  # at each share
BANK_CUTS = 4
AT = (0, 10, 30, 100, 300, 1000)
MEASURES: Mapping[str, Any] = {
    "leep": leep, "mean_feature": mean_feature, "score_cosine": score_cosine, "task2vec": task2vec,
}  # fmt: skip
ITERATIVE, STAGED = "cold, iterative", "staged from "
COLD = ("cold, one-shot", "cold, one-shot, refitted")
GENERIC, SCORE = "generic", "score "
Row = dict[str, Any]


class Lab:
    """The parent ``cifar_<network>``, its data, and what earlier tasks left in ``folder``.

    ``bank``: how many tasks the library is of. ``hurried`` trains it for a few steps only.
    """

    def __init__(
        self, network: str, folder: Path = LIBRARIES, bank: int = BANK, *, hurried: bool = False
    ) -> None:
        name = f"cifar_{network}"
        model = getattr(zoo, name)()
        weights = load_tensors(ROOT / "benchmarks" / "parents" / f"{name}.safetensors")
        model.load_state_dict({k: v.float() if v.is_floating_point() else v
                               for k, v in weights.items()})  # fmt: skip
        self.network = network
        self.parent = Parent.of(network, MultiTaskModel(model, PARENTS[name].tasks).eval())
        self.data = Cifar()
        self.bank = self.data.bank_tasks()[:bank]
        self._haste = 20 if hurried else 1
        self._read: dict[str, dict[str, NDArray[Any]]] = {}
        self.folder = folder / network
        self.folder.mkdir(parents=True, exist_ok=True)

    def make_bank(self) -> None:
        """Cut every task of the library to every share, one after the other; resumes."""
        for task in self.bank:
            if not (self.folder / f"{task.name}.json").exists():
                images = self.data.images(task.classes, "train")
                parent = headed(self.parent, images)
                save_file(self._told(parent, images), self.folder / f"{task.name}.sketch")
                self._cut_all(task.name, parent, images, BANK_ITERATIONS,
                              self.data.images(task.classes, "test"))  # fmt: skip
        if not (self.folder / f"{GENERIC}.json").exists():
            seen = tuple(sorted(fine for one in SEEN for fine in self.data.classes_of(one)))
            images, test = (self.data.images(seen, split) for split in ("train", "test"))
            self._cut_all(GENERIC, self.parent, images, GENERIC_ITERATIONS, test)

    def ask(self, task: FiveWay, share: float, seed: int, measure: str) -> Asked:
        """Return what a start for the task is made from; the task itself is not in the library.

        Without a ``measure`` the library is not asked.
        """
        parent, images = self._opened(task)
        own = self._sketch_by(measure, parent, images) if measure else None
        similar = self._similar(own, measure, task.name) if own is not None else {}
        return Asked(
            parent, images, share, [self._earlier(name, share) for name in similar],
            [*similar.values()], self._earlier("generic", share), seed,
        )  # fmt: skip

    def neighbours(self, name: str, measure: str = "leep") -> list[str]:
        """Return the other tasks of the library, the most similar to ``name`` first."""
        return [*self._similar(self._stored(name)[measure], measure, name)]

    def keeps(self, name: str, share: float) -> dict[str, tuple[int, ...]]:
        """Return, per group, the channels that a task of the library kept at a share."""
        return {cut.name: cut.kept for cut in self._earlier(name, share).plan.cuts}

    def run(
        self, task: FiveWay, share: float, seed: int, start: str, iterations: int,
        measure: str = "leep",
    ) -> Row:  # fmt: skip
        """Cut for the task, train, and return accuracy (%) and process seconds on the way."""
        clock = Clock()
        images, test = (self.data.images(task.classes, split) for split in ("train", "test"))
        curve: dict[str, float] = {}
        seconds: dict[str, float] = {}

        def judge(number: int, model: MultiTaskModel) -> None:
            curve[str(number)] = accuracy(model, test)
            seconds[str(number)] = clock.seconds

        with clock.running():
            parent, cut_at = self._start(task, share, seed, start, iterations, measure)
        judge(0, parent.model)
        at = {number for number in AT if number < iterations}
        model = fine_tune(parent, images, iterations, seed, clock, at=at, judge=judge,
                          cut_at=cut_at)  # fmt: skip
        judge(iterations, model)
        left = Parent.of(self.network, model).macs / self.parent.macs
        return {"network": self.network, "task": task.name, "seed": seed, "share": share,
                "start": start, "iterations": iterations, "measure": measure,
                "accuracy": curve[str(iterations)], "seconds": clock.seconds, "macs": left,
                "curve": curve, "seconds_at": seconds}  # fmt: skip

    def _start(
        self, task: FiveWay, share: float, seed: int, start: str, iterations: int, measure: str
    ) -> tuple[Parent, Any]:
        """Return the network that training starts from, and the cuts that come on the way."""
        rng = np.random.default_rng(seed)
        if start == ITERATIVE:
            parent, images = self._opened(task)
            return parent, Steps(parent, images, in_steps(share, iterations), rng)
        asked = self.ask(task, share, seed, "" if start in COLD else measure)
        if not start.startswith(STAGED):
            return headed(begin(asked, STARTS[start]), asked.images), lambda *_: None
        milder = SHARES[max(0, SHARES.index(share) - 1)]
        asked = self.ask(task, milder, seed, measure)
        first = headed(begin(asked, STARTS[start.removeprefix(STAGED)]), asked.images)
        return first, Steps(asked.parent, asked.images, {iterations // 3: share}, rng)

    def _cut_all(
        self, name: str, parent: Parent, images: Images, iterations: int, test: Images
    ) -> None:
        """Cut to each share in turn, train at each, and keep what came out."""
        iterations //= self._haste
        clock, rng = Clock(), np.random.default_rng(0)
        steps = Steps(parent, images, {}, rng)
        now, before, told = parent, 1.0, []
        for share in SHARES:
            steps.when = {
                round(iterations / 2 * step / BANK_CUTS):
                    before * (share / before) ** ((step + 1) / BANK_CUTS)
                for step in range(BANK_CUTS)
            }  # fmt: skip
            model = fine_tune(now, images, iterations, 0, clock, cut_at=steps)
            state = {key: value.numpy() for key, value in model.state_dict().items()}
            with atomic_path(self.folder / f"{name}-{share}.safetensors") as path:
                save_file(state, path)
            told.append({"share": share, "plan": steps.plan().to_json(),
                         "accuracy": accuracy(model, test), "seconds": clock.seconds})  # fmt: skip
            now, before = replace(parent, model=model), share
        write_json(self.folder / f"{name}.json", told)

    def _told(self, parent: Parent, images: Images) -> dict[str, NDArray[Any]]:
        """Return the task's scores on the parent, and its sketch by each measure."""
        scores = taylor(parent, images, np.random.default_rng(0))
        sketches = {name: self._sketch_by(name, parent, images) for name in MEASURES}
        return {**sketches, **{f"{SCORE}{name}": values for name, values in scores.items()}}

    def _sketch_by(self, measure: str, parent: Parent, images: Images) -> NDArray[np.float32]:
        """Return the sketch of the task whose head ``parent`` has."""
        rng = np.random.default_rng(0)
        if measure == "leep":
            with evaluating(self.parent.model):
                logits = [self.parent.model(part)["label"] for part in images.parts()]
            theta = torch.cat(logits).double().softmax(1).numpy()
            return leep.sketch(theta, images.labels.numpy())
        if measure == "mean_feature":
            return mean_feature.sketch(features(self.parent.model, images))
        if measure == "score_cosine":
            return score_cosine.sketch({"label": taylor(parent, images, rng)})
        return task2vec.sketch(taylor(parent, images, rng, "fisher"))

    def _opened(self, task: FiveWay) -> tuple[Parent, Images]:
        images = self.data.images(task.classes, "train")
        return headed(self.parent, images), images

    def _similar(self, own: NDArray[Any], measure: str, name: str) -> dict[str, float]:
        """Return how alike each other task of the library is to ``own``'s, the most alike first."""
        alike = MEASURES[measure].similarity
        found = {other.name: float(alike(own, self._stored(other.name)[measure]))
                 for other in self.bank if other.name != name}  # fmt: skip
        return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))

    def _stored(self, name: str) -> dict[str, NDArray[Any]]:
        if name not in self._read:
            self._read[name] = load_file(self.folder / f"{name}.sketch")
        return self._read[name]

    def _earlier(self, name: str, share: float) -> Earlier:
        told = next(one for one in read_json(self.folder / f"{name}.json") if one["share"] == share)
        stored = {} if name == GENERIC else self._stored(name)
        scores = {key.removeprefix(SCORE): values for key, values in stored.items()
                  if key.startswith(SCORE)}  # fmt: skip
        weights = load_file(self.folder / f"{name}-{share}.safetensors")
        return Earlier(name, scores, PrunePlan.from_json(told["plan"]), weights)
