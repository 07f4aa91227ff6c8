"""The cut handed back as a network of the user's own code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from cli_run import run
from conftest import REPOSITORY, SPEC, TinyNet
from safetensors.torch import load_file, save_file
from secateur.bundle.write import file_records
from secateur.core.errors import BundleError, PlanError, VerifyError
from secateur.core.files import write_json
from secateur.core.model import MultiTaskModel
from secateur.core.surgery import Surgery
from secateur.core.task import Task
from secateur.flow.load_cut import load_cut
from secateur.prune import (
    apply_plan,
    find_groups,
    macs_model,
    plan_prune,
    restore_cut,
    surgery_of,
)
from secateur.prune.blocks import without_blocks
from secateur.prune.plan import Budget
from secateur.zoo import cifar_resnet, cifar_vit
from torch import nn

ROOM = (Task("label", "label", "classification", "label", classes=80),)


def test_the_cut_is_a_network_that_answers_as_the_bundle_does_and_can_be_trained(
    bundle: Path,
) -> None:
    parent = TinyNet()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    network = load_cut(bundle, parent)  # compares it with the bundle's own answers
    sizes = [sum(each.numel() for each in own.parameters()) for own in (network, parent)]
    assert sizes[0] == json.loads((bundle / "manifest.json").read_text())["cost"]["params"]
    assert sizes[0] < sizes[1] and not network.training
    assert load_file(bundle / "cut.safetensors").keys() == network.state_dict().keys()
    assert all(torch.equal(before[name], now) for name, now in parent.state_dict().items())

    optimiser = torch.optim.SGD(network.train().parameters(), 0.01)
    losses = []
    for _ in range(3):
        outputs = network(SPEC.example(2))
        loss = outputs["seg"].square().mean() + outputs["depth"].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_was_trained_elsewhere_is_lowered_as_the_docs_say(
    capsys, project: Path, tmp_path: Path
) -> None:
    text = (REPOSITORY / "docs/recipe.md").read_text().split("## The cut in your own training")[1]
    code, settings = (text.split(f"```{language}\n")[1].split("```")[0]
                      for language in ("python", "yaml"))  # fmt: skip
    shutil.copytree(project / "out", tmp_path / "out")
    shutil.copy(project / "tinyproject.py", tmp_path)
    (tmp_path / "my_cut.py").write_text(code.replace("my_model", "tinyproject"))
    earlier = yaml.safe_load((project / "recipe.yaml").read_text())
    wanted = yaml.safe_load(settings)
    wanted["model"]["input"] = earlier["model"]["input"]
    wanted["tasks"] = {name: earlier["tasks"][name] for name in earlier["keep"]}
    wanted["data"] = earlier["data"]
    (tmp_path / "my_cut.yaml").write_text(yaml.safe_dump(wanted))
    network = load_cut(tmp_path / "out/x86-64-cpu/fp32", TinyNet())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    save_file(network.state_dict(), tmp_path / "trained.safetensors")
    code, stdout, stderr = run(
        capsys, "build", tmp_path / "my_cut.yaml", "--json", "--out", tmp_path / "again"
    )
    assert code == 0, stderr
    (built,) = json.loads(stdout)
    before = json.loads((tmp_path / "out/x86-64-cpu/fp32/manifest.json").read_text())
    assert built["manifest"]["precision"] == "int8"
    assert built["manifest"]["cost"]["macs"] == before["cost"]["macs"]


class TinyNetOfToday(TinyNet):
    """The same layers, another ``forward``."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(image * 2)


def test_what_is_not_the_parent_is_refused(bundle: Path) -> None:
    with pytest.raises(PlanError, match="does not fit this network"):
        load_cut(bundle, TinyNet(24))
    with pytest.raises(VerifyError, match="does not answer as it did"):
        load_cut(bundle, TinyNetOfToday())


def test_a_file_that_says_no_cut_is_told(bundle: Path) -> None:
    (bundle / "cut.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(VerifyError, match=r"cut\.safetensors was altered"):
        load_cut(bundle, TinyNet())
    manifest = json.loads((bundle / "manifest.json").read_text())
    records = file_records(bundle)
    manifest["files"] = {name: record.model_dump() for name, record in records.items()}
    write_json(bundle / "manifest.json", manifest)
    with pytest.raises(BundleError, match="cannot be read"):
        load_cut(bundle, TinyNet())
    (bundle / "cut.safetensors").unlink()
    del manifest["files"]["cut.safetensors"]  # as bundles were before there was such a file
    write_json(bundle / "manifest.json", manifest)
    with pytest.raises(BundleError, match=r"has no cut\.safetensors"):
        load_cut(bundle, TinyNet())


@pytest.mark.parametrize(("make", "block"), [(cifar_resnet, "network.body.layer1.1"),
                                             (cifar_vit, "network.body.blocks.2")])  # fmt: skip
def test_a_cut_is_made_again_from_other_weights_without_its_groups(make, block: str) -> None:
    """Heads, residual streams, position embeddings, a whole block, and a bias that was added."""
    torch.manual_seed(0)
    parent, other = (MultiTaskModel(make(), ROOM).eval() for _ in range(2))
    example = torch.randn(2, 3, 32, 32)
    groups = find_groups(without_blocks(parent, [block]), example)
    cost = macs_model(without_blocks(parent, [block]), groups, example)
    scores = {group.name: torch.rand(group.width).double().numpy() for group in groups}
    plan = plan_prune(groups, cost, scores, {}, Budget(0.5, 2), criterion="-", fusion="-")
    plan = replace(plan, removed=(block,))
    cut = apply_plan(parent, groups, plan)
    plain = [m for m in cut.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is None]
    for layer in plain[:1]:
        layer.bias = nn.Parameter(torch.randn(len(layer.weight)))
    told = json.loads(json.dumps(surgery_of(groups, plan).to_json()))
    again = restore_cut(other, Surgery.from_json(told), cut.state_dict())
    with torch.no_grad():
        assert torch.equal(again(example)["label"], cut(example)["label"])
    assert type(again.network) is type(other.network)


@pytest.mark.parametrize("told", [{}, {"blocks": [], "layers": {"a": {"up": [1]}}, "heads": {},
                                       "parameters": {}}])  # fmt: skip
def test_what_says_no_surgery_is_refused(told: dict) -> None:
    with pytest.raises(PlanError, match="does not say what to cut"):
        Surgery.from_json(told)
