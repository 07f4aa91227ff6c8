"""Start a cut from the library: the nearest earlier cuts vote, and give their weights.

Who may vote, and on which channels, is in ``flow.witnesses``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from secateur.bundle.manifest import BudgetRecord
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.flow.axes import votable
from secateur.flow.job import Job
from secateur.flow.merged import merged_network, of_merged, start_key, start_loss
from secateur.flow.planning import Scored, plan_scored, score_channels
from secateur.flow.sketches import sketch_tasks
from secateur.flow.stages import begin_cut
from secateur.flow.witnesses import Witness, find_witnesses
from secateur.prune import find_groups
from secateur.vote.ballot import (
    Opinion,
    blend,
    confidence,
    keep_top,
    overlap,
    tally,
    vote_weights,
)
from secateur.vote.inherit import Donor
from secateur.vote.library import Library, ids_of_recipe, open_library
from secateur.vote.nearest import Nearest, Sketches, nearest
from secateur.vote.similarity.measure import measure_of

SPARE = 8  # entries looked at per neighbour wanted, and so many times more where too few vote
VOTED, OWN, MERGED = "votes", "own scores", "votes on the voters' merged network"  # a plan's origin
UNFOLLOWED = (
    1.1  # times the loss of own scores' cut: votes that do worse than this are not followed
)


@dataclass(frozen=True)
class Voter:
    """An entry that votes: its ``similarity`` by the measure, its ``weight`` among all (sum 1)."""

    id: str
    tasks: tuple[str, ...]
    budget: float
    similarity: float
    weight: float
    why: str


@dataclass(frozen=True)
class Vote:
    """What the library said to a plan. ``cold`` is why it was not used, or empty where it was.

    ``refused`` counts the entries by the reason they could not vote for. ``confidence`` and
    ``iou`` are per group, in 0..1: how far the voters agree beyond chance, and the overlap of what
    the plan keeps with as many channels chosen by the parent's scores alone; ``iou_of_all`` is that
    over all groups. ``plan_of`` says which plan was taken, VOTED, OWN (that without the votes) or
    MERGED, by ``losses``: of each one's cut, as compensated and relative to the parent's.
    """

    library: str
    similarity: str
    votes: str
    vote_weight: float
    cold: str = ""
    voters: tuple[Voter, ...] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)
    iou: Mapping[str, float] = field(default_factory=dict)
    iou_of_all: float = 1.0
    plan_of: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-like data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan, what it was made from, and, where the recipe asks the library, what that said.

    ``scored`` is of the parent, so that entries of the library compare; ``merged`` is the voters'
    networks in one, if the plan is of that. ``budgets``: what it spends of each of the recipe's.
    """

    scored: Scored
    plan: PrunePlan
    vote: Vote | None = None
    donors: tuple[Donor, ...] = ()
    merged: MultiTaskModel | None = None
    budgets: Mapping[str, BudgetRecord] = field(default_factory=dict)


def plan_job(job: Job, grid: int, device: str = "") -> Planned:
    """Score and plan the cut of the selected model, from the library if the recipe says so.

    ``device`` is what is built for, by name: what the same recipe made for another may vote.

    Raises:
        LibraryError: the library or the measure of similarity cannot be used.
    """
    wanted = job.recipe.prune
    if wanted.warm_start == "none":
        scored = score_channels(job, grid)
        return Planned(scored, plan_scored(job, scored))
    measure_of(wanted.similarity)  # a wrong name is told before the scoring
    library = open_library(job.recipe.library_root())
    scored = score_channels(job, grid)
    sketches = sketch_tasks(job)
    comparable = wanted.similarity in sketches
    witnesses, refused = (
        _heard(job, device, library, sketches, scored.groups) if comparable else ([], {})
    )
    cold = _why_cold(job, witnesses) if comparable else (
        f"these tasks have nothing that '{wanted.similarity}' could compare; they have "
        f"{', '.join(sorted(sketches))}"
    )  # fmt: skip
    vote = Vote(
        str(library.root), wanted.similarity, wanted.votes, wanted.vote_weight, cold=cold,
        refused=refused,
    )  # fmt: skip
    if vote.cold:
        return Planned(scored, plan_scored(job, scored), vote)
    weights = vote_weights([each.neighbour.similarity for each in witnesses])
    opinions = [each.keeps if wanted.votes == "keeps" else each.scores for each in witnesses]
    votes = tally(opinions, weights)
    donors = tuple(
        each.donor(float(weight))
        for each, weight in zip(witnesses, weights, strict=True)
        if each.entry.weights
    )
    plan, plan_of, losses, merged = _better_plan(job, scored, votes, donors, grid)
    iou, of_all = _changed(plan, scored.fused)
    vote = replace(
        vote,
        voters=tuple(_voter(each, weight) for each, weight in zip(witnesses, weights, strict=True)),
        confidence=confidence([each.keeps for each in witnesses], weights),
        iou=iou,
        iou_of_all=of_all,
        plan_of=plan_of,
        losses=losses,
    )
    return Planned(scored, plan, vote, donors, merged)


def _voted(job: Job, scored: Scored, votes: Opinion | None) -> PrunePlan:
    """Return the plan by own scores and votes, or by own scores alone where there are none."""
    if votes is None:
        return plan_scored(job, scored)
    fused = blend(votes, scored.fused, job.recipe.prune.vote_weight)
    return plan_scored(job, replace(scored, fused=fused))


def _better_plan(
    job: Job, scored: Scored, votes: Opinion, donors: Sequence[Donor], grid: int
) -> tuple[PrunePlan, str, dict[str, float], MultiTaskModel | None]:
    """Return the plan, which it is, the losses that said so, and the merged network it is of.

    A start of the voters' weights keeps what they recovered together, so that is where its
    channels show their worth; but only where its cut does better than the parent's. Votes that
    choose clearly worse than own scores do are not followed.
    """
    starts: dict[str, tuple[Job, Scored, Opinion | None]] = {
        VOTED: (job, scored, votes),
        OWN: (job, scored, None),
    }
    merged = merged_network(job, donors)
    # Zeros may hide a coupling that the parent has, or show one: channels would not be the same.
    if merged is not None and find_groups(merged, job.example) == scored.groups:
        there = of_merged(job, merged)
        # What a task loses is told of the parent, where no channel is gone yet.
        at_theirs = score_channels(there, grid)
        at_theirs = replace(at_theirs, per_task=scored.per_task, totals=scored.totals)
        starts[MERGED] = (there, at_theirs, votes)
    # A search takes minutes, and that of all but one would be in vain.
    plans = {name: _voted(_unsearched(trial), scores, said)
             for name, (trial, scores, said) in starts.items()}  # fmt: skip

    def losses() -> dict[str, float]:
        loss = start_loss(job)  # the first that it judges sets the scale of tasks without labels
        return {name: loss(begin_cut(_unsearched(starts[name][0]), scored.groups, plan))
                for name, plan in plans.items()}  # fmt: skip

    keys = [(name, start_key(starts[name][0], plan)) for name, plan in plans.items()]
    found = job.cache.json("start_losses", (job.selected_key, keys), losses)
    chosen = min(found, key=lambda name: found[name] * (UNFOLLOWED if name == OWN else 1.0))
    trial, scores, said = starts[chosen]
    return _voted(trial, scores, said), chosen, found, merged if chosen == MERGED else None


def _unsearched(job: Job) -> Job:
    prune = job.recipe.prune.model_copy(update={"search": False})
    return replace(job, recipe=job.recipe.model_copy(update={"prune": prune}))


def _heard(
    job: Job, device: str, library: Library, sketches: Sketches, groups: Sequence[ChannelGroup]
) -> tuple[list[Witness], dict[str, int]]:
    """Return who votes, and how many could not by the reason: so many that none is overlooked."""
    count = job.recipe.prune.neighbours
    while True:
        count *= SPARE
        found = _nearest(job, device, library, sketches, count)
        witnesses, refused = find_witnesses(job, library, groups, found)
        if len(witnesses) == job.recipe.prune.neighbours or not found.left:
            return witnesses, refused


def _nearest(job: Job, device: str, library: Library, sketches: Sketches, count: int) -> Nearest:
    """Return the nearest entries of about this budget, this recipe's own for the device left out.

    A recipe that is built again finds the library as it was, as far as it changed it itself.
    """
    wanted, window = job.recipe.prune, votable(job.kept_share)
    data = job.train.fingerprint
    own = ids_of_recipe(
        library, job.library_key, job.recipe.source, device, network=job.network_key, data=data
    )
    return nearest(
        library, sketches, job.library_key, wanted.similarity, count,
        basis=job.library_basis, budget=window, wanted=job.kept_share, skip=own,
        data=data,
    )  # fmt: skip


def _why_cold(job: Job, witnesses: Sequence[Witness]) -> str:
    """Return why the library is of no use, or "" where it is."""
    if witnesses:
        return ""
    least, most = votable(job.kept_share)
    return (
        "the library has no useful cut of this "
        f"{'trunk' if job.trunk else 'parent'}, in these axes, to between "
        f"{least:.3g} and {most:.3g} of its MACs"
    )


def _voter(witness: Witness, weight: float) -> Voter:
    found = witness.neighbour
    return Voter(
        found.id, found.facts.task_names, found.facts.budget, found.similarity, float(weight),
        found.why,
    )  # fmt: skip


def _changed(plan: PrunePlan, of_parent: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Return the overlap of the plan with the parent's best channels, per group and of all."""
    voted = {cut.name: cut.kept for cut in plan.cuts}
    alone = keep_top(of_parent, {name: len(kept) for name, kept in voted.items()})
    return {name: overlap({name: voted[name]}, alone) for name in voted}, overlap(voted, alone)
