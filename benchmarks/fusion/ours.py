"""Our own cuts: scores per task, fused by a rule, allocated, refitted; each part may be left out.

How the refit samples and how recovery trains was chosen on ``val``; the search's tries by time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from fusion.bench import GRID, Bench, Scores
from secateur.compensate import refit
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan, groups_after
from secateur.fusion.scores import NEEDS_AGREEMENT, fuse
from secateur.importance.agreement import agreement
from secateur.importance.bank import load_scores, save_scores, score_tasks, task_data
from secateur.prune import plan_prune
from secateur.prune.halfway import HALF, balanced_whole, plan_halfway, scores_of_whole
from secateur.prune.plan import Budget, default_budget

SCORING_IMAGES = 128
REFIT_IMAGES = 256
BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """One way to cut. ``allocation``: global ranking, ranking balanced by group, or a search.

    With ``axes`` the parent is first rewritten in balanced axes. Without ``labels`` importance is
    read from targets sampled from the parent's outputs, and the search is judged by the distance
    to them. With ``rescore`` channels are scored again after half of the cut. ``freeze_norms``: see
    ``TrainSettings``; by default as recipes choose.
    """

    criterion: str = "taylor"
    rule: str = "mean"
    allocation: str = "balanced"
    refit: bool = True
    labels: bool = True
    axes: bool = True
    rescore: bool = False
    freeze_norms: float | None = None

    def bench(self, bench: Bench) -> Bench:
        """Return the bench whose parent this recipe cuts: in balanced axes or as trained."""
        return bench.turned(labels=self.labels) if self.axes else bench

    def cut(self, bench: Bench, share: float, seed: int) -> MultiTaskModel:
        bench = self.bench(bench)
        plan = self.plan(bench, share, seed)
        pruned = bench.apply(plan)
        if not self.refit:
            return pruned
        return refit(bench.parent, pruned, bench.groups, plan, bench.images(REFIT_IMAGES, seed))

    def plan(self, bench: Bench, share: float, seed: int) -> PrunePlan:
        """Decide the cut of what ``bench`` gave (see above)."""
        fused = fused_scores(bench, self.criterion, self.rule, share, seed, labels=self.labels)
        budget = budget_of(bench, share, self.allocation)
        if self.rescore:
            fused, budget = self._rescored(bench, fused, budget, share, seed)
        if self.allocation != "search":
            return ranked_plan(bench, fused, budget)
        from fusion.allocation import searched_plan

        kind = f"search{'' if self.labels else '-label-free'}{'-rescored' * self.rescore}"
        return searched_plan(bench, fused, budget, seed, kind, labels=self.labels)

    def _rescored(
        self, bench: Bench, fused: Scores, budget: Budget, share: float, seed: int
    ) -> tuple[Scores, Budget]:
        """Return the scores after half of the cut, and the budget to rank them in."""
        first, both = plan_halfway(bench.groups, bench.cost, fused, budget, share)
        draft = refit(bench.parent, bench.apply(first), bench.groups, first,
                      bench.images(REFIT_IMAGES, seed))  # fmt: skip
        stream = partial(bench.stream, SCORING_IMAGES, seed, BATCH, labels=self.labels)
        made = score_tasks(
            draft, groups_after(bench.groups, first), bench.parent.tasks, self.criterion, stream,
            SCORING_IMAGES // BATCH,
        )  # fmt: skip
        whole = {task: scores_of_whole(bench.groups, first, own) for task, own in made.items()}
        again = fuse(whole, dict.fromkeys(whole, 1.0), self.rule, keep_share=share ** (HALF / 2))
        return balanced_whole(bench.groups, first, again, budget.balance), both


def budget_of(bench: Bench, share: float, allocation: str) -> Budget:
    """Return the budget of a ranking: balanced by group, or of all channels together."""
    if allocation == "search":
        return Budget(share, GRID)
    budget = default_budget(bench.groups, bench.cost, share, GRID)
    return replace(budget, floor=0.0, balance=0.0) if allocation == "global" else budget


def ranked_plan(bench: Bench, fused: Scores, budget: Budget) -> PrunePlan:
    return plan_prune(bench.groups, bench.cost, fused, {}, budget, criterion="-", fusion="-")


def fused_scores(
    bench: Bench, criterion: str, rule: str, share: float, seed: int, *, labels: bool = True
) -> Scores:
    """Return the fused scores; for ``guarded`` by what a balanced cut to ``share`` removes."""

    def removed(trial: Scores) -> dict[str, np.ndarray]:
        plan = ranked_plan(bench, trial, budget_of(bench, share, "balanced"))
        gone = {cut.name: np.ones(cut.width, bool) for cut in plan.cuts}
        for cut in plan.cuts:
            gone[cut.name][list(cut.kept)] = False
        return gone

    agree = _agreement(bench, seed) if rule in NEEDS_AGREEMENT else None
    weights = {task.name: 1.0 for task in bench.parent.tasks}
    return fuse(task_scores(bench, criterion, seed, labels=labels), weights, rule,
                agreement=agree, oracle=removed, keep_share=share**0.5)  # fmt: skip


def task_scores(
    bench: Bench, criterion: str, seed: int, *, labels: bool = True
) -> dict[str, Scores]:
    """Return each task's scores, from disk where an earlier cell made them."""
    tasks = bench.parent.tasks
    kind = criterion if labels else f"{criterion}-label-free"
    paths = {t.name: _path(bench, f"{kind}-{t.name}", seed) for t in tasks}
    found = {name: load_scores(path) for name, path in paths.items()}
    if any(scores is None for scores in found.values()):
        made = score_tasks(
            bench.parent, bench.groups, tasks, criterion,
            partial(bench.stream, SCORING_IMAGES, seed, BATCH, labels=labels),
            SCORING_IMAGES // BATCH,
        )  # fmt: skip
        for name, scores in made.items():
            save_scores(paths[name], scores)
        found = dict(made)
    return {name: scores for name, scores in found.items() if scores is not None}


def _agreement(bench: Bench, seed: int) -> Scores:
    path = _path(bench, "agreement", seed)
    found = load_scores(path)
    if found is None:
        data = task_data(
            bench.parent, bench.parent.tasks,
            partial(bench.stream, SCORING_IMAGES, seed, BATCH), SCORING_IMAGES // BATCH,
        )  # fmt: skip
        found = agreement(bench.parent, bench.groups, data)
        save_scores(path, found)
    return found


def _path(bench: Bench, what: str, seed: int) -> Path:
    return bench.folder / f"{what}-{SCORING_IMAGES}-{seed}.safetensors"


RULES = ("mean", "max", "unanimous", "vote", "rank_mean", "cosine", "cosine_magnitude", "guarded")
CUT = Recipe()  # without what is told by itself: a second scoring
OURS: dict[str, Recipe] = {
    "cut": replace(CUT, rescore=True),
    "cut, scored once": CUT,
    "cut, original axes": replace(CUT, axes=False),
    "cut, frozen norms": replace(CUT, freeze_norms=0.0),
    "cut, trained norms": replace(CUT, freeze_norms=1.0),
    "cut, no refit": replace(CUT, refit=False, freeze_norms=1.0),
    "cut, label-free": replace(CUT, labels=False, rescore=True),
    "cut, label-free, scored once": replace(CUT, labels=False),
    "cut, searched": replace(CUT, allocation="search"),
    "cut, global ranking": replace(CUT, allocation="global"),
    **{f"rule {rule}": Recipe(rule=rule) for rule in RULES if rule != "mean"},
}
