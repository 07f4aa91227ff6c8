"""What the CIFAR suite says of its rows: choices on bank tasks, equal accuracy, errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from vote.cifar_claims import COLD, answers, claims, ranking

OURS = "generic weights"


def row(part: str, task: str, start: str, iterations: int, accuracy: float, seconds: float = 1.0,
        seed: int = 0, measure: str = "leep") -> dict[str, Any]:  # fmt: skip
    """A run at a fifth of the MACs."""
    return {"part": part, "network": "resnet", "task": task, "seed": seed, "share": 0.2,
            "start": start, "iterations": iterations, "measure": measure, "accuracy": accuracy,
            "seconds": seconds}  # fmt: skip


CHOSEN = [row("choose", "bank00", OURS, 100, 80.0), row("choose", "bank00", "votes", 100, 70.0)]


def test_the_best_start_is_chosen_on_tasks_of_the_library_alone() -> None:
    rows = [*CHOSEN, row("new", "new00", "votes", 100, 99.0), row("new", "new00", OURS, 100, 60.0)]
    assert ranking(rows, "resnet", 0.2, 100) == [OURS, "votes"]


@pytest.mark.parametrize(
    ("ours", "cheapest", "share"), [(65.0, 100, 0.5), (75.0, 300, 0.2), (95.0, 1000, 0.05)]
)
def test_seconds_are_compared_with_the_cheapest_cold_schedule_as_accurate(
    ours: float, cheapest: int, share: float
) -> None:
    """Cold gets 70, 80 and 90 % in 4, 10 and 40 s; ours takes 2 s."""
    rows = [*CHOSEN, row("new", "new00", OURS, 100, ours, 2.0)] + [
        row("new", "new00", COLD, iterations, accuracy, seconds)
        for iterations, accuracy, seconds in ((100, 70, 4), (300, 80, 10), (1000, 90, 40))
    ]
    ahead, spent = (show for show in claims(rows) if show.value is not None)
    assert ahead.value == ours - 90
    assert f"in {cheapest} iterations" in spent.claim and spent.value == pytest.approx(share)


def test_the_error_of_a_difference_is_over_tasks_not_over_their_seeds() -> None:
    """Two tasks, ahead by 1 and 3 points whatever the seed: 2 +- 1, however many seeds."""
    rows = [
        run
        for seed in range(3)
        for task, ahead in (("new00", 1.0), ("new01", 3.0))
        for run in (row("new", task, "voted scores", 100, 50 + ahead, seed=seed),
                    row("new", task, "cold, one-shot", 100, 50.0, seed=seed))
    ]  # fmt: skip
    [told] = answers(rows)
    assert (told["points"], told["standard_error"], told["runs"]) == (2.0, 1.0, 6)


def test_measures_are_compared_on_the_tasks_that_both_saw() -> None:
    start = "votes of the nearest"
    rows = [row("measures", "new00", start, 30, 50.0), row("measures", "new01", start, 30, 40.0),
            row("measures", "new00", start, 30, 53.0, measure="task2vec")]  # fmt: skip
    [told] = answers(rows)
    assert told["points"] == 3.0 and told["runs"] == 1
    assert (told["start"], told["against"]) == (f"{start}, by task2vec", "by leep")


def test_a_target_whose_runs_are_missing_is_told_as_such_and_not_met() -> None:
    told = {show.claim: show for show in claims([])}
    assert len(told) == 10, "four shares and the seconds, of two networks"
    assert all(show.value is None and not show.ok for show in told.values())


def test_numbers_of_neighbours_are_compared_with_the_usual_one() -> None:
    rows = [row("measures", "new00", f"average of weights{count}", 30, accuracy)
            for count, accuracy in (("", 60.0), (", N = 2", 61.0), (", N = 20", 57.0))]  # fmt: skip
    told = {each["start"]: (each["against"], each["points"]) for each in answers(rows)}
    assert told == {"average of weights, N = 2": ("N = 5", 1.0),
                    "average of weights, N = 20": ("N = 5", -3.0)}  # fmt: skip


def test_measures_of_similarity_are_compared_with_the_usual_one() -> None:
    rows = [row("measures", "new00", "votes", 30, accuracy, measure=measure)
            for measure, accuracy in (("task2vec", 58.0), ("leep", 60.0))]  # fmt: skip
    [told] = answers(rows)
    assert (told["start"], told["against"], told["points"]) == ("votes, by task2vec", "by leep", -2)
