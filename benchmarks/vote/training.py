"""Train a network, and cut it in steps on the way where a schedule says so."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan, groups_after
from secateur.data.loading import Batch
from secateur.importance.bank import score_tasks
from secateur.prune import (
    MacsModel,
    apply_plan,
    find_groups,
    macs_model,
    plan_prune,
    plan_widths,
)
from secateur.prune.plan import Budget
from secateur.vote.ballot import Opinion
from secateur.vote.inherit import class_targets, ridge_head
from torch import Tensor, nn
from torch.nn import functional
from vote.tasks import SPEC, WAYS, Images

BATCH = 32
RATE = {"resnet": 0.02, "vit": 1e-3}
DECAY = {"resnet": 5e-4, "vit": 0.05}
SETTLING = 250  # images that batch norms are settled on before a network is judged
SCORING, SCORING_BATCH = 256, 32
GRID, BALANCE = 2, 0.65
FLOOR = {"resnet": 0.05, "vit": 0.02}  # of a ViT's 2 %, one head in each block takes two thirds
LOGIT = 10.0  # the closed form's targets are 0 and 1, small for logits
CUTS = 10  # of the iterative schedule, in the first half of its iterations
TAUGHT, TEMPERATURE = 0.9, 4.0  # of a loss with a teacher, the part that is its logits'


@dataclass
class Clock:
    """Process seconds of what is timed, evaluation left out."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done within."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - start


@dataclass(frozen=True)
class Parent:
    """A trained network, its groups and their cost; ``share`` of its MACs is what cuts keep."""

    network: str
    model: MultiTaskModel
    groups: tuple[ChannelGroup, ...] = field(repr=False)
    cost: MacsModel = field(repr=False)

    @staticmethod
    def of(network: str, model: MultiTaskModel) -> Parent:
        """Return a model with its groups."""
        example = SPEC.example(2)
        groups = find_groups(model, example)
        return Parent(network, model, groups, macs_model(model, groups, example))

    @property
    def macs(self) -> int:
        """The MACs of the uncut network."""
        return self.cost.macs([group.width for group in self.groups])

    def plan(
        self, scores: Opinion, share: float, *, whole: int = 0, balance: float = BALANCE
    ) -> PrunePlan:
        """Return the cut to a share of ``whole`` MACs (its own by default)."""
        part = share * (whole or self.macs) / self.macs
        budget = Budget(part, GRID, FLOOR[self.network], balance)
        return plan_prune(self.groups, self.cost, scores, {}, budget, criterion="-", fusion="-")

    def cut(self, plan: PrunePlan) -> MultiTaskModel:
        """Return the network without what the plan drops."""
        return apply_plan(self.model, self.groups, plan)


def taylor(
    parent: Parent, images: Images, rng: np.random.Generator, criterion: str = "taylor"
) -> dict[str, NDArray[np.float64]]:
    """Return gate-Taylor scores (width,) per group of some of a task's images."""
    chosen = rng.permutation(len(images.labels))[:SCORING]

    def stream() -> Iterator[Batch]:
        for part in np.split(chosen, len(chosen) // SCORING_BATCH):
            yield Batch(images.images[part], {"label": images.labels[part]}, ())

    own = parent.model.tasks
    return score_tasks(parent.model, parent.groups, own, criterion, stream, 0)["label"]


def fine_tune(
    parent: Parent,
    images: Images,
    iterations: int,
    seed: int,
    clock: Clock,
    *,
    at: Collection[int] = (),
    judge: Callable[[int, MultiTaskModel], None] = lambda *_: None,
    cut_at: Callable[[int, MultiTaskModel], MultiTaskModel | None] = lambda *_: None,
    teacher: MultiTaskModel | None = None,
) -> MultiTaskModel:
    """Train a copy; ``judge`` sees it after each number of iterations in ``at``.

    The rate falls along a cosine to 0. ``cut_at`` may replace the network between iterations; the
    optimiser then starts anew, its rate goes on. A ``teacher`` of the same classes says more of an
    image than its label does.
    """
    rng = np.random.default_rng(seed)
    model = copy.deepcopy(parent.model)
    optimiser = _optimiser(parent.network, model)
    for number in range(iterations):
        with clock.running():
            other = cut_at(number, model)
            if other is not None:
                model, optimiser = other, _optimiser(parent.network, other)
            for group in optimiser.param_groups:
                group["lr"] = RATE[parent.network] * (1 + np.cos(np.pi * number / iterations)) / 2
            pixels, labels = images.batch(BATCH, rng)
            model.train()
            logits = said(model, pixels)
            loss = functional.cross_entropy(logits, labels)
            if teacher:
                loss = (1 - TAUGHT) * loss + TAUGHT * _distillation(logits, teacher, pixels)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        if number + 1 in at:
            judge(number + 1, settled(model, images))
    return settled(model, images)


def _distillation(logits: Tensor, teacher: MultiTaskModel, pixels: Tensor) -> Tensor:
    """Return the divergence from a teacher's softened logits (arXiv 1503.02531, section 2)."""
    with torch.no_grad():
        taught = said(teacher, pixels)
    own, other = ((each / TEMPERATURE).log_softmax(1) for each in (logits, taught))
    far = functional.kl_div(own, other, log_target=True, reduction="batchmean")
    return TEMPERATURE**2 * far


@dataclass
class Steps:
    """Cuts on the way: at each iteration of ``when``, to that share of the first network's MACs.

    ``left`` is what is left of that network, if its groups are known; ``kept`` are, per group, the
    first network's channels in it.
    """

    parent: Parent
    images: Images
    when: Mapping[int, float]
    rng: np.random.Generator
    left: Parent | None = None
    kept: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def __call__(self, number: int, model: MultiTaskModel) -> MultiTaskModel | None:
        """Return the network cut further, by its own scores, if one is due."""
        if number not in self.when:
            return None
        model.eval()
        now = (
            replace(self.left, model=model) if self.left else Parent.of(self.parent.network, model)
        )
        plan = now.plan(taylor(now, self.images, self.rng), self.when[number],
                        whole=self.parent.macs)  # fmt: skip
        for cut in plan.cuts:
            before = self.kept.get(cut.name, np.arange(cut.width))
            self.kept[cut.name] = before[list(cut.kept)]
        self.left = replace(now, groups=groups_after(now.groups, plan))
        return now.cut(plan)

    def plan(self) -> PrunePlan:
        """Return all cuts as one of the first network."""
        counts = [len(self.kept[group.name]) for group in self.parent.groups]
        alike = {group.name: np.ones(group.width) for group in self.parent.groups}
        plan = plan_widths(self.parent.groups, self.parent.cost, alike, counts, Budget(1.0),
                           per_task={}, criterion="-", fusion="-")  # fmt: skip
        cuts = tuple(replace(c, kept=tuple(self.kept[c.name].tolist())) for c in plan.cuts)
        return replace(plan, cuts=cuts)


def in_steps(
    share: float, iterations: int, before: float = 1.0, cuts: int = CUTS
) -> dict[int, float]:
    """Return cuts within the first half of the iterations, from a share to another geometrically.

    Molchanov et al., arXiv 1906.10771, section 3.2.
    """
    return {round(iterations / 2 * step / cuts): before * (share / before) ** ((step + 1) / cuts)
            for step in range(cuts)}  # fmt: skip


def settled(model: MultiTaskModel, images: Images) -> MultiTaskModel:
    """Return a copy in eval mode whose batch norms know the task's images."""
    other = copy.deepcopy(model)
    norms = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        other.train()
        chosen = torch.linspace(0, len(images.labels) - 1, SETTLING).long()
        with torch.no_grad():
            for part in torch.split(chosen, 50):
                said(other, images.images[part])
    return other.eval()


def headed(parent: Parent, images: Images) -> Parent:
    """Return the parent with a head for the task, in closed form on its settled features."""
    model = settled(parent.model, images)
    targets = class_targets(images.labels.numpy(), WAYS)
    weight, bias = ridge_head(features(model, images), targets)
    head = nn.Linear(weight.shape[1], WAYS)
    head.weight.data = LOGIT * torch.from_numpy(weight).float()
    head.bias.data = LOGIT * torch.from_numpy(bias).float()
    model.network.head = head
    task = replace(model.tasks[0], classes=WAYS)
    return replace(parent, model=MultiTaskModel(model.network, (task,)))


def features(model: MultiTaskModel, images: Images) -> NDArray[np.float32]:
    """Return the (N, D) features that the model's head reads."""
    with evaluating(model):
        body = model.get_submodule("network.body")
        return torch.cat([_quickly(body, part) for part in images.parts()]).float().numpy()


def said(model: MultiTaskModel, pixels: Tensor) -> Tensor:
    """Return (N, classes) float32 logits."""
    logits: Tensor = _quickly(model, pixels)["label"].float()
    return logits


def accuracy(model: MultiTaskModel, images: Images) -> float:
    """Return the share of images told right, in %."""
    with evaluating(model):
        found = [said(model, part).argmax(1) for part in images.parts()]
    right = int((torch.cat(found) == images.labels).sum())
    return 100 * right / len(images.labels)


def _quickly(module: nn.Module, pixels: Tensor) -> Any:
    """Run a network in bfloat16 with channels last: twice as quick on a CPU as without."""
    with torch.autocast("cpu", torch.bfloat16):
        return module(pixels.contiguous(memory_format=torch.channels_last))


def _optimiser(network: str, model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = RATE[network], DECAY[network]
    if network == "vit":
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    make = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=decay)
    return make(model.parameters(), rate)
