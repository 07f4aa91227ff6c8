"""Which earlier cuts can speak of a new one's channels, and what they say.

Channels are matched by the layer and position that makes them, so that cuts of the same parent
for other subsets of its tasks vote too. A cut of another network on the same trunk
(``flow.trunk``) speaks of the trunk's channels alone, and gives their weights alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.errors import SecateurError
from secateur.core.plan import dropped_indices, dropped_of_parameters
from secateur.core.task import Task
from secateur.flow.channel_scores import scores_for
from secateur.flow.job import Job
from secateur.flow.trunk import within
from secateur.prune import find_groups
from secateur.tasks import select_tasks
from secateur.vote.ballot import Opinion, keep_opinion, score_opinion
from secateur.vote.entry import Entry, TaskMark
from secateur.vote.inherit import Donor, SubNetwork
from secateur.vote.library import Library, load_entry, load_plan
from secateur.vote.nearest import Nearest, Neighbour

SAME_BUDGET = 1.05  # shares of MACs within this factor are one budget, met a little differently


class _Refusal(Exception):
    """Why an entry cannot vote."""


@dataclass(frozen=True, eq=False)
class Witness:
    """A neighbour, its entry, and what it says of the new model's groups.

    ``groups`` are those of the entry that it speaks of. ``tasks`` are what its network was for,
    where that is this parent, else none: another network's task of the same name is another task.
    """

    neighbour: Neighbour
    entry: Entry
    groups: tuple[ChannelGroup, ...]
    keeps: Opinion
    scores: Opinion
    tasks: tuple[str, ...]

    def donor(self, weight: float) -> Donor:
        """Return its network, of which ``groups`` say what is gone."""
        plan = self.entry.plan
        network = SubNetwork(
            self.entry.weights,
            dropped_indices(self.groups, plan),
            dropped_of_parameters(self.groups, plan),
        )
        return Donor(self.neighbour.id, self.tasks, network, weight)


def find_witnesses(
    job: Job, library: Library, groups: Sequence[ChannelGroup], found: Nearest
) -> tuple[list[Witness], dict[str, int]]:
    """Return the nearest that can be used, and how many entries could not, by the reason.

    Of cuts of the very same tasks those to the nearest budget vote, which ``nearest`` puts first:
    tasks are to be heard alike, however often each was cut.
    """
    refused = Counter(each.why for each in found.refused)
    of_tasks: dict[tuple[str, ...], tuple[ChannelGroup, ...]] = {}  # groups by tasks
    witnesses: list[Witness] = []
    heard = set()
    heard_at: dict[tuple[object, ...], float] = {}  # the budget that tasks were first heard at
    for neighbour in found.neighbours:
        if len(witnesses) == job.recipe.prune.neighbours:
            break
        facts = neighbour.facts
        tasks = (facts.network, *sorted(facts.task_names))
        try:
            if neighbour.similarity <= 0:
                raise _Refusal("its tasks are not similar at all")
            before = heard_at.get((*tasks, neighbour.similarity), facts.budget)
            if abs(math.log(before / facts.budget)) > math.log(SAME_BUDGET):
                raise _Refusal("a cut of the same tasks to a budget nearer yours votes")
            cuts = load_plan(library, neighbour.id).cuts
            if (tasks, cuts) in heard:  # seen without its arrays, which may be many megabytes
                raise _Refusal("a nearer one has the same tasks and keeps the same channels")
            entry = load_entry(library, neighbour.id)
            _check_scores(job, entry)
            witnesses.append(_heard(job, groups, neighbour, entry, of_tasks))
            heard.add((tasks, cuts))
            heard_at.setdefault((*tasks, neighbour.similarity), facts.budget)
        except _Refusal as refusal:
            refused[str(refusal)] += 1
        except SecateurError as error:  # a damaged entry says nothing, and stops nobody
            refused[error.message] += 1
    return witnesses, dict(refused)


def _heard(
    job: Job,
    groups: Sequence[ChannelGroup],
    neighbour: Neighbour,
    entry: Entry,
    of_tasks: dict[tuple[str, ...], tuple[ChannelGroup, ...]],
) -> Witness:
    """Return what an entry says: of the whole network where it can, else of the trunk, if named.

    ``of_tasks`` remembers the parent's groups by the tasks kept.

    Raises:
        _Refusal: it can say nothing.
    """
    if neighbour.facts.network == job.network_key and _same_axes(job, groups, entry):
        tasks = tuple(sorted(neighbour.facts.task_names))
        try:
            _check_marks(job, neighbour.facts.tasks)
            if tasks not in of_tasks:
                of_tasks[tasks] = find_groups(
                    select_tasks(job.scored, tasks, job.example).eval(), job.example
                )
            return _witness(groups, neighbour, entry, of_tasks[tasks])
        except _Refusal:
            if not job.trunk:
                raise
    return _of_trunk(job, groups, neighbour, entry)


def _check_scores(job: Job, entry: Entry) -> None:
    """Raise where the recipe has scores compared and the entry's are none or of another kind.

    Raises:
        _Refusal: that is so.
    """
    wanted, theirs = job.recipe.prune, entry.plan.criterion
    if wanted.votes == "scores" and not entry.scores:
        raise _Refusal("it holds no scores")
    by_scores = wanted.votes == "scores" or wanted.similarity == "score_cosine"
    if by_scores and theirs != wanted.criterion:
        raise _Refusal(f"its channels were scored by {theirs}, yours by {wanted.criterion}")


def task_mark(task: Task) -> TaskMark:
    """Return what an entry says of a task."""
    return TaskMark(task.name, task.kind, task.classes)


def _check_marks(job: Job, marks: Sequence[TaskMark]) -> None:
    """Raise where the parent lacks a task of an entry, or means another one by its name.

    Raises:
        _Refusal: that is so.
    """
    own = {task.name: task_mark(task) for task in job.scored.tasks}
    unknown = {mark.name for mark in marks} - own.keys()
    if unknown:
        raise _Refusal(f"it keeps a task '{min(unknown)}', which yours lacks")
    for mark in marks:
        if mark != own[mark.name]:
            raise _Refusal(
                f"its task '{mark.name}' is {_said(mark)}, yours {_said(own[mark.name])}"
            )


def _said(mark: TaskMark) -> str:
    return mark.kind if mark.classes is None else f"{mark.kind} of {mark.classes} classes"


def _witness(
    groups: Sequence[ChannelGroup],
    neighbour: Neighbour,
    entry: Entry,
    theirs: tuple[ChannelGroup, ...],
) -> Witness:
    """Carry an entry's keep-sets and scores to ``groups``, NaN where it has no such channel.

    Raises:
        _Refusal: the entry's groups are not those of its tasks.
    """
    if {cut.name: cut.width for cut in entry.plan.cuts} != {g.name: g.width for g in theirs}:
        raise _Refusal("its channel groups are not those that its tasks have here")
    return _carried(groups, neighbour, entry, theirs, neighbour.facts.task_names)


def _same_axes(job: Job, groups: Sequence[ChannelGroup], entry: Entry) -> bool:
    """Say whether an entry counts channels outside of the trunk as they are counted here.

    Of the trunk's, which may be all there is, ``nearest`` has seen to that.
    """
    if not job.trunk:
        return True
    trunks = {group.name for group in within(groups, job.trunk)}
    others = (job.axes.keys() | entry.axes.keys()) - trunks
    return all(_in_same_axes(job, entry, name) for name in others)


def _in_same_axes(job: Job, entry: Entry, group: str) -> bool:
    mine, theirs = job.axes.get(group), entry.axes.get(group)
    if mine is None or theirs is None:
        return mine is theirs
    return np.array_equal(mine, theirs)


def _of_trunk(
    job: Job, groups: Sequence[ChannelGroup], neighbour: Neighbour, entry: Entry
) -> Witness:
    """Carry what an entry says of the trunk alone; of that it gives weights, too.

    Layers that hold other channels as well, or channels in axes of their own, stay out.

    Raises:
        _Refusal: other channels are coupled in its trunk than are here.
    """
    part = job.trunk.removeprefix("network.")
    theirs = {cut.name: cut.width for cut in entry.plan.cuts if cut.name.startswith(part)}
    if theirs != {group.name: group.width for group in groups if group.name.startswith(part)}:
        raise _Refusal("its trunk's channel groups are not those that yours has")
    shared = tuple(
        group
        for group in within(groups, job.trunk)
        # in other axes where a head there reads it in another way: then it is not the trunk's alone
        if group.name in theirs and _in_same_axes(job, entry, group.name)
    )
    if not shared:
        raise _Refusal("no channel group is its trunk's alone")
    known = {group.name for group in shared}
    mixed = {m.layer for group in groups if group.name not in known for m in group.members}
    bare = {name for group in groups if group.name not in known for name in group.parameters}
    weights = {
        name: array
        for name, array in entry.weights.items()
        if name.startswith(job.trunk) and name.rpartition(".")[0] not in mixed and name not in bare
    }
    return _carried(groups, neighbour, replace(entry, weights=weights), shared, ())


def _carried(
    groups: Sequence[ChannelGroup],
    neighbour: Neighbour,
    entry: Entry,
    theirs: tuple[ChannelGroup, ...],
    tasks: tuple[str, ...],
) -> Witness:
    known = {group.name for group in theirs}
    cuts = [cut for cut in entry.plan.cuts if cut.name in known]
    keeps = {cut.name: keep_opinion(cut.width, cut.kept) for cut in cuts}
    scores: Mapping[str, NDArray[np.float64]] = {
        cut.name: np.full(cut.width, np.nan) for cut in cuts
    } | score_opinion(entry.scores)
    return Witness(
        neighbour, entry, theirs, scores_for(groups, theirs, keeps, np.nan),
        scores_for(groups, theirs, scores, np.nan), tasks,
    )  # fmt: skip
