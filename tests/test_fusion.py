"""Fusion rules: what each promises, on scores seen here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_run import make_project
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core.errors import RecipeError
from secateur.flow import channel_scores, planning
from secateur.flow.cache import StageCache
from secateur.flow.job import open_job
from secateur.flow.recipe import load_recipe
from secateur.fusion.scores import NEEDS_AGREEMENT, RULES, fuse

WIDTHS = {"a": 5, "b": 3, "c": 12}
TOTAL = sum(WIDTHS.values())
seeds = st.integers(0, 10_000)


def scores_from(values) -> dict[str, np.ndarray]:
    parts = np.split(np.asarray(values, float), np.cumsum(list(WIDTHS.values()))[:-1])
    return dict(zip(WIDTHS, parts, strict=True))


def flat(scores) -> np.ndarray:
    return np.concatenate([scores[name] for name in WIDTHS])


def random_tasks(seed: int, count: int = 3):
    """Distinct scores on scales that differ by tasks; the last group is task 0's head."""
    rng = np.random.default_rng(seed)
    tasks = {}
    for number in range(count):
        values = rng.lognormal(sigma=1.5, size=TOTAL) * 10.0 ** rng.integers(-6, 6)
        if number:
            values[-WIDTHS["c"] :] = 0
        tasks[f"t{number}"] = scores_from(values)
    return tasks


def fused_by(rule: str, tasks, weights=None, **options) -> np.ndarray:
    options.setdefault("agreement", scores_from(np.linspace(0.2, 0.8, TOTAL)))
    return flat(fuse(tasks, weights or dict.fromkeys(tasks, 1.0), rule, **options))


def share_lost(tasks, removed) -> dict[str, float]:
    return {task: flat(s)[removed].sum() / flat(s).sum() for task, s in tasks.items()}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_every_rule_is_finite_positive_and_blind_to_scale_and_order(rule: str, seed: int) -> None:
    tasks = random_tasks(seed)
    fused = fused_by(rule, tasks)
    assert np.isfinite(fused).all() and (fused >= 0).all()
    louder = {t: {g: v * 10.0**n for g, v in s.items()} for n, (t, s) in enumerate(tasks.items())}
    assert fused_by(rule, louder) == pytest.approx(fused)
    assert fused_by(rule, dict(reversed(tasks.items()))) == pytest.approx(fused)


@pytest.mark.parametrize("rule", sorted(set(RULES) - NEEDS_AGREEMENT))
def test_one_task_alone_keeps_its_own_order(rule: str) -> None:
    (tasks,) = [random_tasks(0, 1)]
    own, fused = flat(tasks["t0"]), fused_by(rule, tasks)
    assert (np.argsort(own) == np.argsort(fused)).all()


def test_mean_gives_each_task_the_same_say_and_weights_more_or_less() -> None:
    tasks = {"loud": {"g": np.array([100.0, 300.0])}, "quiet": {"g": np.array([0.003, 0.001])}}
    assert fuse(tasks, {"loud": 1, "quiet": 1}, "mean")["g"].tolist() == pytest.approx([0.5, 0.5])
    weighted = fuse(tasks, {"loud": 3, "quiet": 1}, "mean")["g"]
    assert weighted.tolist() == pytest.approx([0.375, 0.625])


def test_max_takes_the_task_that_needs_a_channel_most() -> None:
    tasks = {"x": {"g": np.array([0.9, 0.1, 0.0])}, "y": {"g": np.array([0.3, 0.3, 0.4])}}
    plain = fuse(tasks, {"x": 1, "y": 1}, "max")["g"]
    assert plain.tolist() == pytest.approx([0.45, 0.15, 0.2])
    assert fuse(tasks, {"x": 1, "y": 9}, "max")["g"].argmax() == 2


@settings(max_examples=50, deadline=None)
@given(seed=seeds, keep=st.floats(0.05, 0.95))
def test_unanimous_keeps_at_any_share_the_union_of_what_each_task_keeps(seed, keep) -> None:
    tasks = random_tasks(seed)
    union = np.zeros(TOTAL, bool)
    for scores in tasks.values():
        own = flat(scores)
        count = np.ceil(keep * (own > 0).sum() - 1e-6)  # of its own channels, as DiSparse counts
        union |= (own > 0) & (np.argsort(np.argsort(-own)) < count)
    assert ((fused_by("unanimous", tasks) > 1 - keep + 1e-9) == union).all()


def test_vote_counts_tasks_and_breaks_ties_by_mean() -> None:
    tasks = {
        "x": {"g": np.array([5.0, 4.0, 1.0, 2.0])},
        "y": {"g": np.array([5.0, 1.0, 4.0, 3.0])},
        "z": {"g": np.array([4.0, 5.0, 1.0, 3.0])},
    }
    votes = fuse(tasks, {"x": 1, "y": 1, "z": 1}, "vote", keep_share=0.5)["g"]
    assert np.argsort(-votes).tolist() == [0, 1, 2, 3]  # 3, 2, 1 and no votes
    assert votes[2] > votes[3]  # although channel 3 has the larger mean
    heavy = fuse(tasks, {"x": 1, "y": 5, "z": 1}, "vote", keep_share=0.5)["g"]
    assert np.argsort(-heavy).tolist() == [0, 2, 1, 3]
    all_voted = fuse(tasks, {"x": 1, "y": 1, "z": 1}, "vote", keep_share=1.0)["g"]
    mean = fuse(tasks, {"x": 1, "y": 1, "z": 1}, "mean")["g"]
    assert (np.argsort(all_voted) == np.argsort(mean)).all()


def test_rank_mean_sees_orders_only() -> None:
    tasks = {"x": {"g": np.array([1.0, 2.0, 900.0])}, "y": {"g": np.array([3.0, 2.0, 1.0])}}
    assert fuse(tasks, {"x": 1, "y": 1}, "rank_mean")["g"] == pytest.approx([2 / 3] * 3)
    assert fuse(tasks, {"x": 3, "y": 1}, "rank_mean")["g"] == pytest.approx([1 / 2, 2 / 3, 5 / 6])


def test_cosine_is_the_agreement_and_cosine_magnitude_scales_the_mean_by_it() -> None:
    tasks, agreement = random_tasks(1), np.linspace(0, 1, TOTAL)
    options = {"agreement": scores_from(agreement)}
    assert fused_by("cosine", tasks, **options) == pytest.approx(agreement)
    product = agreement * fused_by("mean", tasks)
    assert fused_by("cosine_magnitude", tasks, **options) == pytest.approx(product)
    for rule in NEEDS_AGREEMENT:
        with pytest.raises(ValueError, match="needs the agreement"):
            fused_by(rule, tasks, agreement=None)


def test_cut_is_a_rule_and_an_unknown_one_names_those_there_are() -> None:
    assert "cut" in RULES
    with pytest.raises(RecipeError, match="'median' is not a fusion rule") as caught:
        fused_by("median", random_tasks(0))
    assert "guarded" in caught.value.hint


def lowest(count: int):
    """An oracle that removes the ``count`` lowest channels of the network."""

    def removed(fused):
        at = np.argsort(flat(fused), kind="stable")[:count]
        mask = np.isin(np.arange(TOTAL), at)
        return {name: part.astype(bool) for name, part in scores_from(mask).items()}

    return removed


@settings(max_examples=40, deadline=None)
@given(seed=seeds, count=st.integers(1, TOTAL - 1), tasks=st.integers(2, 4), tilt=st.floats(1, 5))
def test_guarded_never_costs_the_worst_task_more_than_mean(seed, count, tasks, tilt) -> None:
    found = random_tasks(seed, tasks)
    weights = {task: tilt if task == "t1" else 1.0 for task in found}
    worst = {}
    for rule in ("mean", "guarded"):
        fused = scores_from(fused_by(rule, found, weights, oracle=lowest(count)))
        lost = share_lost(found, flat(lowest(count)(fused)).astype(bool))
        worst[rule] = max(weights[task] * lost[task] for task in found)
    assert worst["guarded"] <= worst["mean"] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_guarded_comes_near_the_best_weights_there_are(seed: int) -> None:
    """Against a fine sweep of two tasks' weights, which it does not make."""
    tasks = {name: scores_from(v) for name, v in zip(
        "xy", np.random.default_rng(seed).lognormal(sigma=2, size=(2, TOTAL)), strict=True
    )}  # fmt: skip
    oracle = lowest(TOTAL // 2)

    def worst(fused) -> float:
        return max(share_lost(tasks, flat(oracle(scores_from(fused))).astype(bool)).values())

    sweep = min(
        worst(fused_by("mean", tasks, {"x": w, "y": 1 - w})) for w in np.linspace(0.01, 0.99, 197)
    )
    assert worst(fused_by("guarded", tasks, oracle=oracle)) <= sweep * 1.02


def test_every_rule_plans_from_one_bank_without_another_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(make_project(tmp_path))
    scored = []

    def counted(model, groups, tasks, *rest):
        scored.append([task.name for task in tasks])
        return score_tasks(model, groups, tasks, *rest)

    score_tasks = channel_scores.score_tasks
    monkeypatch.setattr(channel_scores, "score_tasks", counted)
    plans = {}
    for rule in RULES:
        prune = recipe.prune.model_copy(update={"fusion": rule, "rescore": False})
        job = open_job(recipe.model_copy(update={"prune": prune}), StageCache(tmp_path / "cache"))
        _, plans[rule] = planning.make_plan(job, 4)
    assert scored == [["segmentation", "depth"]]  # together, and once
    assert all(0 < plan.macs_after <= plan.budget_macs for plan in plans.values())
    assert plans["cut"].cuts == plans["mean"].cuts
    assert max(plans["guarded"].lost.values()) <= max(plans["mean"].lost.values())
    assert len({plan.cuts for plan in plans.values()}) > len(plans) / 2  # they decide differently
    channel_scores.score_bank(job, ["segmentation", "depth", "room"])
    assert scored[1:] == [["room"]]  # only what the bank lacks
    with pytest.raises(RecipeError, match="not a fusion rule"):
        prune = recipe.prune.model_copy(update={"fusion": "cutt", "criterion": "random:5"})
        job = open_job(recipe.model_copy(update={"prune": prune}), StageCache(tmp_path / "cache"))
        planning.make_plan(job, 4)
    assert len(scored) == 2  # told before any scoring
