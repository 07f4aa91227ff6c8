"""One parent of the CIFAR suite, its library of earlier cuts, and single runs on a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from secateur.core.files import atomic_path, write_json
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan
from secateur.prune import count_macs
from secateur.vote.similarity import leep, mean_feature, score_cosine, task2vec
from suite import read_json
from train_parent import PARENTS, SEEN
from vote.probed import pretrained
from vote.starts import BY_COUNT, REFITTED, STARTS, Asked, Earlier, begin
from vote.tasks import BANK, SPEC, Cifar, FiveWay, Images
from vote.training import (
    Clock,
    Parent,
    Steps,
    accuracy,
    features,
    fine_tune,
    headed,
    in_steps,
    said,
    taylor,
)

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "out" / "vote_cifar"
SHARES = (0.5, 0.2, 0.1, 0.02)  # of the MACs that stay
AT = (30, 100, 300)  # iterations that a start is judged after, besides its first and last
# No ``cka``: tasks of one trunk see the same in the same images, and are all alike to it.
MEASURES: Mapping[str, Any] = {
    "leep": leep, "mean_feature": mean_feature, "score_cosine": score_cosine, "task2vec": task2vec,
}  # fmt: skip
ITERATIVE, STAGED = "cold, iterative", "staged from "
UNCUT = "the parent, uncut"  # a control: what that many iterations teach a network at all
COLD = ("cold, one-shot", "cold, one-shot, refitted")
GENERIC, SCORE = "generic", "score "
NOBODY_NEAR = (*COLD, "votes of random tasks", "votes of all", "generic weights",
               "generic weights, refitted")  # fmt: skip
NO_LIBRARY = "none"
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """What a library is made with: tasks, shares of the MACs, cuts on the way to each of these.

    ``iterations`` of a task, and ``generic`` ones of all classes together, taught by the parent,
    are those at each share.
    """

    tasks: int = BANK
    iterations: int = 150
    generic: int = 6000
    cuts: int = 4
    shares: tuple[float, ...] = SHARES


class Lab:
    """The parent ``cifar_<network>``, its data, and what earlier tasks left in ``folder``."""

    def __init__(self, network: str, folder: Path = LIBRARIES, effort: Effort = Effort()) -> None:
        name = f"cifar_{network}"
        self.network = network
        self.parent = Parent.of(
            network, MultiTaskModel(pretrained(name), PARENTS[name].tasks).eval()
        )
        self.data = Cifar()
        self.bank = self.data.bank_tasks()[: effort.tasks]
        self._effort = effort
        self._read: dict[str, dict[str, NDArray[Any]]] = {}
        self._planned: dict[str, dict[float, PrunePlan]] = {}
        self.folder = folder / network
        self.folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[str]:
        """Return what the library still lacks: names of tasks, and the one of all classes."""
        every = [GENERIC, *(task.name for task in self.bank)]
        return [name for name in every if not (self.folder / f"{name}.json").exists()]

    def make(self, name: str) -> None:
        """Cut a task of the library to every share, one after the other."""
        if name == GENERIC:
            seen = tuple(sorted(fine for one in SEEN for fine in self.data.classes_of(one)))
            images, test = (self.data.images(seen, split) for split in ("train", "test"))
            self._cut_all(name, self.parent, images, self._effort.generic, test, self.parent.model)
            return
        task = next(task for task in self.bank if task.name == name)
        parent, images = self._opened(task)
        save_file(self._told(parent, images), self.folder / f"{name}.sketch")
        self._cut_all(name, parent, images, self._effort.iterations,
                      self.data.images(task.classes, "test"))  # fmt: skip

    def made(self) -> list[Row]:
        """Return what the library's cuts took: seconds of all of a task's down to each share."""
        found = []
        for name in (GENERIC, *(task.name for task in self.bank)):
            whose, iterations = ((GENERIC, self._effort.generic) if name == GENERIC
                                 else ("a task", self._effort.iterations))  # fmt: skip
            for one in read_json(self.folder / f"{name}.json"):
                found.append({"network": self.network, "task": name, "seed": 0,
                              "share": one["share"], "start": whose, "iterations": iterations,
                              "measure": NO_LIBRARY, "accuracy": one["accuracy"],
                              "seconds": one["seconds"]})  # fmt: skip
        return found

    def ask(self, task: FiveWay, share: float, seed: int, measure: str) -> Asked:
        """Return what a start for the task is made from; the task itself is not in the library.

        Without a ``measure`` it is not asked who is near: all are alike. With NO_LIBRARY, it is
        made from the task alone.
        """
        parent, images = self._opened(task)
        if measure == NO_LIBRARY:
            return Asked(task.name, parent, images, share, (), (), None, seed)
        if measure:
            own = self._sketch_by(measure, parent, images)
            similar = self._similar(own, measure, task.name)
        else:
            similar = {other.name: 1.0 for other in self.bank if other.name != task.name}
        return Asked(
            task.name, parent, images, share, [self._earlier(name, share) for name in similar],
            [*similar.values()], self._earlier(GENERIC, share), seed,
        )  # fmt: skip

    def neighbours(self, name: str, measure: str = "leep") -> list[str]:
        """Return the other tasks of the library, the most similar to ``name`` first."""
        return [*self._similar(self._stored(name)[measure], measure, name)]

    def keeps(self, name: str, share: float) -> dict[str, tuple[int, ...]]:
        """Return, per group, the channels that a task of the library kept at a share."""
        return {cut.name: cut.kept for cut in self._plans(name)[share].cuts}

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
        at = {number for number in AT if number < iterations and start != ITERATIVE}
        model = fine_tune(parent, images, iterations, seed, clock, at=at, judge=judge,
                          cut_at=cut_at)  # fmt: skip
        judge(iterations, model)
        left = count_macs(model, SPEC.example(2)) / self.parent.macs
        return {"network": self.network, "task": task.name, "seed": seed, "share": share,
                "start": start, "iterations": iterations, "measure": measure,
                "accuracy": curve[str(iterations)], "seconds": clock.seconds, "macs": left,
                "curve": curve, "seconds_at": seconds}  # fmt: skip

    def _start(
        self, task: FiveWay, share: float, seed: int, start: str, iterations: int, measure: str
    ) -> tuple[Parent, Any]:
        """Return the network that training starts from, and the cuts that come on the way."""
        rng = np.random.default_rng(seed)
        if start in (ITERATIVE, UNCUT):
            parent, images = self._opened(task)
            if start == UNCUT:
                return parent, lambda *_: None
            return parent, Steps(parent, images, in_steps(share, iterations), rng, parent)
        staged, start = start.startswith(STAGED), start.removeprefix(STAGED)
        first_share = SHARES[SHARES.index(share) - 1] if staged else share
        if start in NOBODY_NEAR:
            measure = NO_LIBRARY if start in COLD else ""
        asked = self.ask(task, first_share, seed, measure)
        first = headed(begin(asked, {**STARTS, **REFITTED, **BY_COUNT}[start]), asked.images)
        if not staged:
            return first, lambda *_: None
        when = in_steps(share, iterations, first_share, self._effort.cuts)
        return first, Steps(asked.parent, asked.images, when, rng)

    def _cut_all(
        self, name: str, parent: Parent, images: Images, iterations: int, test: Images,
        teacher: MultiTaskModel | None = None,
    ) -> None:  # fmt: skip
        """Cut to each share in turn, train at each, and keep what came out."""
        clock, rng = Clock(), np.random.default_rng(0)
        steps = Steps(parent, images, {}, rng, parent)
        now, before, told = parent, 1.0, []
        for share in self._effort.shares:
            steps.when = in_steps(share, iterations, before, self._effort.cuts)
            model = fine_tune(now, images, iterations, 0, clock, cut_at=steps, teacher=teacher)
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
                logits = [said(self.parent.model, part) for part in images.parts()]
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
        stored = {} if name == GENERIC else self._stored(name)
        scores = {key.removeprefix(SCORE): values for key, values in stored.items()
                  if key.startswith(SCORE)}  # fmt: skip
        file = self.folder / f"{name}-{share}.safetensors"
        return Earlier(name, scores, self._plans(name)[share], file)

    def _plans(self, name: str) -> dict[float, PrunePlan]:
        if name not in self._planned:
            told = read_json(self.folder / f"{name}.json")
            self._planned[name] = {one["share"]: PrunePlan.from_json(one["plan"]) for one in told}
        return self._planned[name]
