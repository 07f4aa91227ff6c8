"""A transformer started from the library: votes on heads, hidden channels and the stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_run import run
from secateur.flow.axes import turn_axes
from secateur.flow.cache import StageCache
from secateur.flow.inherited import best_start
from secateur.flow.job import open_job
from secateur.flow.merged import merged_network
from secateur.flow.recipe import parse_recipe
from secateur.flow.stages import begin_cut
from secateur.flow.warm_start import plan_job
from secateur.vote.library import find_entries, load_entry, open_library

FACTORY = """\
import torch
from secateur import zoo

def make():
    torch.manual_seed(0)
    heads = {"depth": zoo.HeadSpec("depth", 1, 16), "room": zoo.HeadSpec("classification", 4)}
    return zoo.compose("vit_tiny_patch16_224", heads, img_size=(32, 48), patch_size=8, embed_dim=48,
                       depth=3, num_heads=4, out_indices=(2,))
"""
RECIPE = """\
model:
  factory: tokens:make
  input: {shape: [3, 32, 48]}
tasks:
  depth: {output: depth, kind: depth}
  room:  {output: room, kind: classification, classes: 4}
keep: KEEP
data:
  train: {reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}
  eval:  {reader: scenes, split: test, options: {count: 4, height: 32, width: 48}}
prune:      {budget: {macs: 0.5}, search: false, images: 16, grid: 4, rescore: falseMORE}
compensate: {images: 16}
recover:    {steps: 2}
library:    {path: lib}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "tokens.py").write_text(FACTORY)
    (folder / "room.yaml").write_text(RECIPE.replace("KEEP", "[room]").replace("MORE", ""))
    return folder


def test_a_transformers_cut_votes_on_heads_hidden_channels_and_stream(
    capsys, project: Path
) -> None:
    arguments = ("--cache", project / "cache", "--target", "raspberry-pi-5", "--out", project / "o")
    code, _, stderr = run(capsys, "build", project / "room.yaml", *arguments)
    assert code == 0, stderr
    library = open_library(project / "lib")
    [listed] = find_entries(library)
    theirs = {cut.name: cut for cut in load_entry(library, listed.id).plan.cuts}

    text = RECIPE.replace("KEEP", "[depth, room]")
    text = text.replace("MORE", ", warm_start: library, vote_weight: 1")
    job = turn_axes(open_job(parse_recipe(text, project / "x.yaml"), StageCache(project / "cache")))
    made = plan_job(job, 4)
    assert made.vote and not made.vote.cold and len(made.vote.voters) == 1
    shared = [cut for cut in made.plan.cuts if cut.name in theirs]
    kinds = {
        "heads": [group.name for group in made.scored.groups if group.heads_of],
        "hidden": [cut.name for cut in shared if ".mlp." in cut.name],
        "stream": [group.name for group in made.scored.groups if group.parameters],
    }
    for kind, names in kinds.items():
        assert {*names} & theirs.keys(), (kind, [*theirs])
    for cut in shared:  # votes alone rank: what it kept comes before all else
        kept, voted = {*cut.kept}, {*theirs[cut.name].kept}
        assert kept <= voted or voted <= kept, cut.name

    # Norms over a narrower stream are not what zeros in a whole one give: nothing to merge.
    assert any(len(theirs[name].kept) < theirs[name].width for name in kinds["stream"])
    assert merged_network(job, made.donors) is None
    start, origin, _ = best_start(job, made, begin_cut(job, made.scored.groups, made.plan))
    assert origin and origin.share > 0 and "inherited" in origin.losses
    assert [task.name for task in start.tasks] == ["depth", "room"]
