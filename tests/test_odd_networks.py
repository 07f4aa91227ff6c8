"""Legal and rare: networks, recipes and caches that each ended in a traceback or a wrong number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_run import run
from secateur.core.plan import dropped_indices, dropped_of_parameters
from secateur.devices.target import load_target
from secateur.flow import budgets
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.merged import merged_network
from secateur.flow.planning import make_plan
from secateur.flow.recipe import parse_recipe
from secateur.flow.stages import begin_cut
from secateur.fusion.weights import reestimate_norms
from secateur.prune import find_groups
from secateur.vote.inherit import Donor, SubNetwork
from torch import nn

RECIPE = """\
model:
  factory: odd_networks:{factory}
  input: {{shape: [3, 32, 48]}}
tasks:
  room: {{output: room, kind: classification, classes: 4}}
data:
  train: {{reader: scenes, split: train, options: {{count: 8, height: 32, width: 48}}}}
  eval:  {{reader: scenes, split: test, options: {{count: 4, height: 32, width: 48}}}}
prune:      {{budget: {{macs: 0.6}}, images: 8, grid: 4, search: false{prune}}}
compensate: {{images: 8}}
recover:    {recover}
library:    {{path: lib}}
"""


def recipe(factory: str, prune: str = "", recover: str = "none") -> str:
    return RECIPE.format(factory=factory, prune=prune, recover=recover)


def job(tmp_path: Path, text: str) -> Job:
    torch.manual_seed(0)
    return open_job(parse_recipe(text, tmp_path / "recipe.yaml"), StageCache(tmp_path / "cache"))


def build(capsys, tmp_path: Path, text: str) -> dict:
    torch.manual_seed(0)  # the factories draw their weights
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    code, stdout, stderr = run(
        capsys, "build", path, "--target", "raspberry-pi-5", "--cache", tmp_path / "cache",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    (result,) = json.loads(stdout)
    return result


@pytest.mark.parametrize("factory", ["batch_norm_last", "layer_norm_last"])
def test_a_head_that_ends_in_a_norm_of_logits_is_entered(capsys, tmp_path, factory) -> None:
    assert build(capsys, tmp_path, recipe(factory))["library"].startswith("entry ")


def test_a_network_that_reads_coordinates_distils_features(capsys, tmp_path: Path) -> None:
    result = build(
        capsys, tmp_path, recipe("Coordinates", recover="{steps: 1, feature_distill: 1}")
    )
    assert result["manifest"]["plan"]["recovery_learning_rate"] == 3e-3


def test_a_batch_size_that_forward_fixes_is_told(capsys, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("fixed_batch"))
    code, _, stderr = run(capsys, "build", path, "--out", tmp_path / "out", "--cache",
                          tmp_path / "cache", "--target", "raspberry-pi-5")  # fmt: skip
    assert code == 2 and "makes its batch size a constant" in " ".join(stderr.split())
    assert "images.shape[0]" in stderr


def test_channels_that_a_removed_block_fixed_are_scored_without_it(tmp_path: Path) -> None:
    whole = job(tmp_path, recipe("Blocks"))
    groups, _ = make_plan(whole, 4)
    fewer, plan = make_plan(replace(whole, removed=("network.s",)), 4)
    cut, cut_without = ({m.layer for g in each for m in g.members} for each in (groups, fewer))
    assert "network.stem" in cut_without - cut
    assert plan.macs_after <= 0.6 * plan.macs_before


def test_what_blocks_go_by_tells_precisions_apart(tmp_path: Path, monkeypatch) -> None:
    """A limit in megabytes depends on them."""
    seen = []
    monkeypatch.setattr(budgets, "without_least", lambda job, _, by: seen.append(by) or job)
    for precision in ("{mode: fp32}", "{mode: fp16}", "{mode: fp16, guard: false}"):
        text = recipe("Blocks", ", blocks: true").replace("macs: 0.6", "size_mb: 0.05")
        budgets.plan_within(
            job(tmp_path, f"{text}precision: {precision}\n"), load_target("jetson-orin-nano-8gb")
        )
    assert len({str(by) for by in seen}) == 3


def test_biases_that_compensation_added_are_inherited(tmp_path: Path) -> None:
    text = recipe("pre_activation").replace(
        "  room:", "  depth: {output: depth, kind: depth}\n  room:"
    )
    work = job(tmp_path, text)
    groups, plan = make_plan(work, 4)
    cut = begin_cut(work, groups, plan)
    weights = {name: tensor.detach().numpy() for name, tensor in cut.state_dict().items()}
    assert {"network.stem.bias", "network.body.0.b.bias"} <= weights.keys()
    gone = dropped_indices(groups, plan), dropped_of_parameters(groups, plan)
    names = tuple(task.name for task in work.tasks)
    prune = work.recipe.prune.model_copy(update={"inherit": "average"})
    work = replace(work, recipe=work.recipe.model_copy(update={"prune": prune}))
    whole = merged_network(work, [Donor("a", names, SubNetwork(weights, *gone), 1.0)])
    assert whole is not None and find_groups(whole, work.example) == groups
    with torch.no_grad():
        for name, wanted in cut(work.example).items():
            assert torch.allclose(whole(work.example)[name], wanted, atol=1e-5)


def test_norms_are_estimated_on_batches_of_like_size() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    images = torch.zeros(65, 3, 1, 1)
    images[-1] = 65.0
    reestimate_norms(model, images)
    mean = model[1].running_mean
    assert mean is not None and torch.allclose(mean, torch.full((3,), 1.0), rtol=0.05)


@pytest.mark.parametrize("bytes_", [b"", b"\x80\x02K\x01.", b"{"])
def test_a_damaged_cache_is_made_again(capsys, tmp_path: Path, bytes_: bytes) -> None:
    text = recipe("Coordinates", recover="{steps: 2, batch_size: 4}")
    before = build(capsys, tmp_path, text)
    cache = tmp_path / "cache"
    damaged = [*cache.glob("recover/*/steps.json"), *cache.glob("onnx/*/model.onnx")]
    assert len(damaged) >= 3
    for path in damaged:
        path.write_bytes(bytes_)
    (damaged[0].parent / "state.pt").write_bytes(bytes_)
    after = build(capsys, tmp_path, text)
    assert after["manifest"]["files"]["model.onnx"] == before["manifest"]["files"]["model.onnx"]
