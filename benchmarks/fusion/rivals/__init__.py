"""What ``cut`` is measured against: rivals, one file each, all under one contract.

``cut(bench, share, seed)`` returns the pruned network before recovery and without compensation,
in eval mode, within ``share`` of the parent's MACs. ``bench`` and its parent are left as they
were; the seed decides which training images are drawn and everything random. Needs
``benchmarks/`` on the path.
"""

from __future__ import annotations

from collections.abc import Callable

from fusion.bench import Bench
from fusion.rivals import (
    adapmtl,
    cosprune,
    dais,
    disparse,
    fisher_summed,
    iterative_taylor,
    l2,
    random,
    random_uniform,
    rl_pruner,
    single_task_ensemble,
    summed_taylor,
    tp_group_taylor,
    tp_group_taylor_uniform,
    tp_magnitude_isomorphic,
    uniform_scratch,
)
from secateur.core.model import MultiTaskModel

Rival = Callable[[Bench, float, int], MultiTaskModel]

RIVALS: dict[str, Rival] = {
    "random": random.cut,
    "random_uniform": random_uniform.cut,
    "l2": l2.cut,
    "tp_group_taylor": tp_group_taylor.cut,
    "tp_group_taylor_uniform": tp_group_taylor_uniform.cut,
    "tp_magnitude_isomorphic": tp_magnitude_isomorphic.cut,
    "summed_taylor": summed_taylor.cut,
    "fisher_summed": fisher_summed.cut,
    "cosprune": cosprune.cut,
    "disparse": disparse.cut,
    "adapmtl": adapmtl.cut,
    "dais": dais.cut,
    "rl_pruner": rl_pruner.cut,
    "single_task_ensemble": single_task_ensemble.cut,
    "uniform_scratch": uniform_scratch.cut,
    "iterative_taylor": iterative_taylor.cut,
}

# Training steps that a rival takes before its recovery begins; the others take none.
TRAINING_STEPS = {
    "cosprune": cosprune.STEPS,
    "adapmtl": adapmtl.STEPS,
    "dais": dais.STEPS,
    "iterative_taylor": iterative_taylor.STEPS,
}
