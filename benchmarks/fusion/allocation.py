"""The allocation search of ``secateur.flow.allocation``, its result kept on disk per cell."""

from __future__ import annotations

from fusion.bench import Bench, Scores
from secateur.core.files import write_json
from secateur.core.plan import PrunePlan
from secateur.data.loading import Batch
from secateur.flow.allocation import SearchSettings, plan_by_search
from secateur.prune.plan import Budget
from suite import read_json

SEARCH = SearchSettings(tries=100)
IMAGES = 96  # a third refits, the others judge


def searched_plan(
    bench: Bench, fused: Scores, budget: Budget, seed: int, kind: str, *, labels: bool
) -> PrunePlan:
    """Return the plan that the search finds, or found before for this ``kind`` of scores."""
    path = bench.folder / f"{kind}-{SEARCH.tries}-{budget.macs}-{seed}.json"
    if path.exists():
        return PrunePlan.from_json(read_json(path))
    both = next(bench.stream(IMAGES, seed, IMAGES, labels=labels))
    judges = [i for i in range(IMAGES) if i % 3]
    judged = Batch(both.images[judges], {n: t[judges] for n, t in both.targets.items()}, ())
    plan = plan_by_search(
        bench.parent, bench.groups, bench.cost, fused, budget,
        both.images[::3], judged, SEARCH, seed=seed,
    )  # fmt: skip
    write_json(path, plan.to_json())
    return plan
