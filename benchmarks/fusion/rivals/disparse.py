"""DiSparse (Sun et al., arXiv 2206.04662) on channels: a channel goes only if all tasks agree.

Each task ranks the channels of its own network (trunk and its head) by its importance and keeps
the best ``k``; shared groups keep the union of the tasks' choices, heads their own. The keep share
``k`` that meets the budget is found by the solver: a channel stays while its best rank share
among its tasks is above the threshold. Departures: channels in place of single weights; gate
Taylor per task in place of ``w^2 sum_b |dL_t/dw|`` (of a pre-trained network on NYUv2, their code
takes ``|w|``).
"""

from __future__ import annotations

import numpy as np
from fusion.bench import Bench
from fusion.rivals.scoring import gate_scores, rank_share, users
from fusion.rivals.training import start
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the unanimous cut."""
    stage = start(bench)
    used = users(bench)
    ranks = [
        rank_share({name: values for name, values in scores.items() if task in used[name]})
        for task, scores in gate_scores(bench, stage.model, stage.groups, seed).items()
    ]
    scores = {
        group.name: np.max([own[group.name] for own in ranks if group.name in own], axis=0)
        for group in bench.groups
    }
    return bench.apply(bench.plan(scores, share))
