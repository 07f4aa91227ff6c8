"""Every rival keeps the contract of the suite: within the budget, parent untouched, seeded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SPEC, tiny_model
from secateur.core.errors import PlanError
from secateur.core.plan import GroupCut
from secateur.data.loading import InMemory
from secateur.data.scenes import create
from secateur.importance.bank import score_tasks
from secateur.prune import apply_plan, count_macs, find_groups, macs_model

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from fusion.bench import Bench
from fusion.rivals import (
    RIVALS,
    TRAINING_STEPS,
    adapmtl,
    cosprune,
    dais,
    disparse,
    fisher_summed,
    iterative_taylor,
    pruner,
    rl_pruner,
    scoring,
    single_task_ensemble,
    tp_group_taylor,
    training,
)
from fusion.rivals.gates import gates_of

SHARE = 0.6
DETERMINISTIC = {"l2", "tp_magnitude_isomorphic"}  # no data, no chance
# How far below the budget one may stay: torch-pruning's ratio and rounding miss it, and of an
# ensemble's tiny networks each is on its own coarse grid.
LOOSE = {
    "tp_group_taylor": 0.5,
    "tp_group_taylor_uniform": 0.5,
    "tp_magnitude_isomorphic": 0.5,
    "single_task_ensemble": 0.9,
}


class TinyBench(Bench):
    """TinyNet on twelve small rendered rooms, with nothing read from disk."""

    def __init__(self) -> None:
        self.parent = tiny_model(width=32)
        self.spec = SPEC
        self.example = SPEC.example()
        self.groups = find_groups(self.parent, self.example)
        self.cost = macs_model(self.parent, self.groups, self.example)
        self.full_macs = self.cost.macs([group.width for group in self.groups])
        self._rooms = InMemory(create(REPOSITORY, "train", 12, 32, 48))

    def _open(self, split: str):
        return self._rooms


@pytest.fixture(scope="module")
def bench() -> TinyBench:
    return TinyBench()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scoring, fisher_summed, tp_group_taylor, cosprune, rl_pruner):
        monkeypatch.setattr(module, "IMAGES", 8)
    monkeypatch.setattr(single_task_ensemble, "IMAGES", 8)
    monkeypatch.setattr(training, "BATCH", 4)
    for module, steps in ((adapmtl, 3), (dais, 3), (cosprune, 2), (iterative_taylor, 2)):
        monkeypatch.setattr(module, "STEPS", steps)
    monkeypatch.setattr(cosprune, "ROUNDS", 2)
    monkeypatch.setattr(iterative_taylor, "CUTS", 2)
    for name, value in (("STAGES", 2), ("SAMPLES", 2), ("REWARD_IMAGES", 4)):
        monkeypatch.setattr(rl_pruner, name, value)
    monkeypatch.setattr(pruner, "TRIALS", 5)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.shape == b[name].shape and torch.equal(x, b[name]) for name, x in a.items()
    )


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_keeps_the_contract(bench: TinyBench, name: str) -> None:
    before, random_state = state(bench.parent), torch.get_rng_state()
    pruned = RIVALS[name](bench, SHARE, 1)
    assert same(state(bench.parent), before)
    assert not bench.parent.training
    assert all(parameter.grad is None for parameter in bench.parent.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not pruned.training
    assert all(parameter.grad is None for parameter in pruned.parameters())
    share = count_macs(pruned, bench.example) / bench.full_macs
    assert share <= SHARE
    assert share >= LOOSE.get(name, 0.97) * SHARE
    assert pruned.tasks == bench.parent.tasks
    with torch.no_grad():
        outputs, wanted = pruned(bench.example), bench.parent(bench.example)
    assert {n: t.shape for n, t in outputs.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values())


@pytest.mark.parametrize("name", ["random", "dais", "rl_pruner", "uniform_scratch"])
def test_the_seed_decides(bench: TinyBench, name: str) -> None:
    first, again, other = (state(RIVALS[name](bench, SHARE, seed)) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_rivals_without_data_do_not_depend_on_the_seed(bench: TinyBench, name: str) -> None:
    assert same(state(RIVALS[name](bench, SHARE, 1)), state(RIVALS[name](bench, SHARE, 2)))


def test_training_steps_name_rivals() -> None:
    assert TRAINING_STEPS.keys() <= RIVALS.keys()


def test_a_shut_gate_is_a_cut_channel(bench: TinyBench) -> None:
    """Where nothing but batch norm, ReLU and linear layers follows, the two are equal."""
    gates = gates_of(bench.parent, bench.groups)
    plan = bench.plan({g.name: np.arange(g.width, dtype=float) for g in bench.groups}, 1.0)
    group = next(g for g in bench.groups if g.name == "depthwise")
    kept = tuple(range(8, group.width))
    cuts = tuple(GroupCut(c.name, c.width, kept) if c.name == "depthwise" else c for c in plan.cuts)
    values = torch.ones(gates.total)
    start = list(gates.widths).index("depthwise")
    offset = sum(list(gates.widths.values())[:start])
    values[offset : offset + 8] = 0
    pruned = apply_plan(bench.parent, bench.groups, replace(plan, cuts=cuts))
    with torch.no_grad():
        wanted = pruned(bench.example)
        masked = gates.outputs(bench.parent, bench.example, values)
    for name, tensor in wanted.items():
        torch.testing.assert_close(masked[name], tensor, rtol=1e-4, atol=1e-5)


def test_gate_scores_are_those_of_the_criterion(bench: TinyBench) -> None:
    ours = scoring.gate_scores(bench, bench.parent, bench.groups, 0)
    theirs = score_tasks(
        bench.parent, bench.groups, bench.parent.tasks, "taylor", lambda: bench.stream(8, 0), 1
    )
    for task, scores in theirs.items():
        for name, values in scores.items():
            np.testing.assert_allclose(ours[task][name], values, rtol=1e-3, atol=1e-9)


def test_disparse_keeps_what_any_task_ranks_high(
    bench: TinyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = scoring.users(bench)
    assert used["project"] == {"segmentation", "depth", "room"}
    assert used["seg_mix"] == {"segmentation"}
    wanted = {g.name: np.zeros(g.width) for g in bench.groups}
    only_depth = {name: values.copy() for name, values in wanted.items()}
    only_depth["project"][:8] = 1  # the other tasks do not care at all
    scores = {"segmentation": wanted, "depth": only_depth, "room": wanted}
    monkeypatch.setattr(disparse, "gate_scores", lambda *_: scores)
    plans = []
    real = bench.plan
    monkeypatch.setattr(bench, "plan", lambda *a: plans.append(real(*a)) or plans[-1])
    disparse.cut(bench, 0.3, 0)
    trunk = next(cut for cut in plans[0].cuts if cut.name == "project")
    assert set(range(8)) <= set(trunk.kept)


def test_cosprune_scores_agreement_of_gradients(
    bench: TinyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks with one and the same loss agree fully; opposite losses not at all."""
    stage = training.start(bench)
    trunk = [group for group in stage.groups if group.name == "depthwise"]

    def losses(sign: float):
        return lambda outputs, targets: {
            "a": outputs["depth"].square().mean(),
            "b": sign * outputs["depth"].square().mean(),
        }

    for sign in (1.0, -1.0):
        monkeypatch.setattr(bench, "losses", losses(sign))
        cosines = cosprune._agreement(bench, stage, trunk, 1)["depthwise"]
        alive = cosines[cosines != 0]  # a filter that no gradient reaches has no opinion
        assert len(alive) > 20
        np.testing.assert_allclose(alive, sign, atol=1e-5)


def test_components_keep_shares_are_scaled_alike() -> None:
    norms = {"trunk": np.arange(1.0, 101.0), "head": np.arange(1.0, 101.0)}
    gates = {"trunk": (np.arange(100) >= 20) * 1.0, "head": (np.arange(100) >= 60) * 1.0}
    scores = adapmtl._scaled(norms, gates, {"trunk": 0, "head": 1})
    threshold = -0.5  # half of what each component has learned to keep
    assert int((scores["trunk"] > threshold).sum()) == pytest.approx(40, abs=1)
    assert int((scores["head"] > threshold).sum()) == pytest.approx(20, abs=1)


def test_relaxed_macs_at_whole_channels_are_the_count(bench: TinyBench) -> None:
    widths = [group.width for group in bench.groups]
    relaxed = dais._relaxed_macs(bench.cost, widths)
    assert float(relaxed(torch.ones(sum(widths)))) == pytest.approx(bench.full_macs)


def test_torch_pruning_says_what_it_leaves_at_least(bench: TinyBench) -> None:
    with pytest.raises(PlanError, match=r"leaves [1-9][\d.]*% of the MACs at least"):
        RIVALS["tp_magnitude_isomorphic"](bench, 1e-4, 0)


def test_a_share_that_a_bisection_steps_over_is_found(bench: TinyBench, monkeypatch) -> None:
    """MACs rise again beyond some ratio, so a miss does not say on which side the share lies."""

    class Pruned(SimpleNamespace):
        def eval(self) -> Pruned:
            return self

    def macs(model: Pruned, _example: torch.Tensor) -> float:
        return bench.full_macs * (0.05 if 0.55 < model.ratio < 0.7 else 0.5)

    monkeypatch.setattr(pruner, "_pruned", lambda _bench, ratio, *_: Pruned(ratio=ratio))
    monkeypatch.setattr(pruner, "count_macs", macs)
    found = pruner.cut_as_its_users_do(bench, 0.1, None)
    assert 0.55 < found.ratio < 0.7
