"""A scoring pass that is stopped goes on where it was, and gives what it would have given."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import SPEC, TASKS, tiny_model
from safetensors.torch import load_file, save_file
from secateur.data.loading import batches, open_reader
from secateur.importance import running_sums
from secateur.importance.agreement import agreement
from secateur.importance.bank import score_tasks, task_data
from secateur.importance.directions import measure_directions
from secateur.prune import find_groups

EXAMPLE, BATCHES = SPEC.example(2), 4


@functools.cache
def scenes(labelled: bool):
    """Four batches of two rendered rooms."""
    reader = open_reader("scenes", None, "train", count=2 * BATCHES, height=32, width=48)
    return tuple(batches(reader, TASKS if labelled else (), SPEC, 2))


class Power:
    """Images that end after a number of batches, as a power cut would end them."""

    def __init__(self, labelled: bool, until: int = BATCHES) -> None:
        self.labelled, self.until, self.given = labelled, until, 0

    def __call__(self):
        for batch in scenes(self.labelled):
            if self.given == self.until:
                raise KeyboardInterrupt
            self.given += 1
            yield batch


def scored(kind, stream, kept=None):
    """Return the numbers of one pass, flat."""
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    if kind == "agreement":
        return agreement(model, groups, task_data(model, TASKS, stream, BATCHES, kept))
    if kind == "directions":
        data = task_data(model, TASKS, stream, BATCHES, kept)
        (found,) = measure_directions(model, groups[-1:], data).values()
        return {**found.gradients, "activity": found.activity}
    bank = score_tasks(model, groups, TASKS, kind, stream, BATCHES, kept)
    return {f"{task} {name}": values for task, scores in bank.items()
            for name, values in scores.items()}  # fmt: skip


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def saved_after_every_batch(monkeypatch) -> None:
    monkeypatch.setattr(running_sums, "BETWEEN_SAVES_S", 0.0)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("kind", ["taylor", "fisher", "agreement", "directions"])
def test_a_stopped_pass_goes_on_and_ends_the_same_to_the_last_bit(kind, labelled, tmp_path) -> None:
    whole = scored(kind, Power(labelled))
    kept = tmp_path / "sums.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scored(kind, Power(labelled, until=3), kept)
    before = load_file(kept)
    assert int(before[running_sums.DONE]) == 3
    changed = {name: sum_ * 2 if sum_.is_floating_point() else sum_
               for name, sum_ in before.items()}  # fmt: skip
    assert same(whole, scored(kind, Power(labelled), kept))
    assert not kept.exists()
    save_file(changed, kept)  # that the sums were read, and not made anew
    assert not same(whole, scored(kind, Power(labelled), kept))


def test_a_file_of_other_sums_or_of_none_is_passed_over(tmp_path) -> None:
    whole = scored("taylor", Power(True))
    other, torn = tmp_path / "other", tmp_path / "torn"
    save_file({"count": torch.ones(1), running_sums.DONE: torch.tensor(3)}, other)
    torn.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for kept in (other, torn):
        assert same(whole, scored("taylor", Power(True), kept))


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    scored("taylor", Power(True))
    assert not list(tmp_path.iterdir())
