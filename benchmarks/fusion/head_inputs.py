"""Would a head gain by ignoring shared channels that only others need, at equal MACs?

    SECATEUR_DATA=... python benchmarks/fusion/head_inputs.py [--seeds 0 1 2] [--quick]

A head's first layers read what the trunk gives to all. ``heads_read`` is their share of the
parent's MACs: an upper bound of what such a selection can free. The experiment spends what it
frees elsewhere: a plain cut to a share of the MACs against a milder one whose head-reading layers
also drop a part of their inputs, the least by gate-Taylor of their own task, down to the same MACs.
Both are refitted on the same 256 images, nothing is trained, the test images judge. The dropped
inputs are masked, not gathered: what a gather costs on a device is left out, to its favour.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, SECOND, Bench
from fusion.ours import BATCH, CUT, REFIT_IMAGES, SCORING_IMAGES
from fusion.run import measure
from secateur.compensate import refit
from secateur.compensate.refit import refit_sparse
from secateur.core.model import MultiTaskModel
from secateur.core.progress import shown
from secateur.metrics.kind import kind_of
from secateur.prune import count_macs
from secateur.tasks.decompose import decompose
from suite import Show, exit_status, write_suite

KEEP = (0.5, 0.3)
DROPPED = (0.25, 0.5)  # of the inputs of the layers that read the trunk
Reading = Mapping[str, str]  # layer name -> its task, of layers that read what several share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="half the MACs, one seed, no figures")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    bench = Bench(PARENT)
    rows: list[dict[str, Any]] = [share_row(Bench(name)) for name in (PARENT, SECOND)]
    with shown():
        for seed in seeds:
            for keep in KEEP[:1] if options.quick else KEEP:
                rows += cut_rows(CUT.bench(bench), keep, seed)
    if not options.quick:
        write_suite("head_inputs", "python benchmarks/fusion/head_inputs.py", seeds, rows,
                    claims(rows))  # fmt: skip
        exit_status(claims(rows))


def share_row(bench: Bench) -> dict[str, Any]:
    """Return which share of the parent's MACs the layers spend that read the trunk."""
    reading = reading_layers(bench)
    share = spent(bench.parent, bench, reading) / bench.full_macs
    print(f"{bench.name}: {len(reading)} layers read the trunk, {share:.1%} of the MACs")
    return {"what": "heads read", "parent": bench.name, "layers": len(reading), "share": share}


def reading_layers(bench: Bench) -> dict[str, str]:
    """Return the 1x1 convolutions of one task whose input several tasks share, and that task."""
    use = decompose(bench.parent, bench.example)
    private = {name: next(iter(users)) for name, users in use.layers.items() if len(users) == 1}
    seen: dict[int, set[str]] = {}
    inputs: dict[str, int] = {}
    held = []  # else a freed tensor's address may be another's

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held.append(args[0])
            inputs[name] = id(args[0])
            seen.setdefault(id(args[0]), set()).add(private[name])

        return hook

    modules = dict(bench.parent.named_modules())
    layers = [name for name in private if isinstance(modules.get(name), nn.Conv2d)]
    hooks = [modules[name].register_forward_pre_hook(note(name)) for name in layers]
    with torch.no_grad():
        bench.parent(bench.example)
    for hook in hooks:
        hook.remove()
    return {name: private[name] for name in layers if len(seen[inputs[name]]) > 1}


def spent(model: MultiTaskModel, bench: Bench, layers: Iterable[str]) -> int:
    """Return the layers' MACs of one image."""
    use = decompose(model, bench.example)
    return sum(use.of(name, use.macs) for name in layers)


def cut_rows(bench: Bench, keep: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the plain cut to ``keep``, then those with a part of the heads' inputs dropped."""
    reading = reading_layers(bench)
    for dropped in (0.0, *DROPPED):
        started = time.monotonic()
        milder = keep + dropped * _share_of(bench, reading, keep + 0.02, seed)
        model, macs = _cut(bench, reading, milder, dropped, seed)
        row = {"what": "cut", "parent": PARENT, "keep": keep, "seed": seed, "dropped": dropped,
               "macs": macs, **measure(bench, model),
               "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
        print(f"keep {keep} seed {seed}: inputs dropped {dropped:.0%}, MACs {macs:.3f}, "
              f"delta T {row['delta_t']:.2f}, worst {row['worst']:.2f}", flush=True)  # fmt: skip
        yield row


def _share_of(bench: Bench, reading: Reading, keep: float, seed: int) -> float:
    """Return the share of the parent's MACs that the reading layers of a cut have."""
    return spent(bench.apply(CUT.plan(bench, keep, seed)), bench, reading) / bench.full_macs


def _cut(
    bench: Bench, reading: Reading, keep: float, dropped: float, seed: int
) -> tuple[MultiTaskModel, float]:
    """Return the refitted cut without a part of the reading layers' inputs, and its MACs' share."""
    plan = CUT.plan(bench, keep, seed)
    images = bench.images(REFIT_IMAGES, seed)
    model = refit(bench.parent, bench.apply(plan), bench.groups, plan, images)
    macs = count_macs(model, bench.example)
    if not dropped:
        return model, macs / bench.full_macs
    masks: dict[str, Tensor] = {}
    for name, scores in input_scores(bench, model, reading, seed).items():
        count = math.floor(dropped * len(scores))
        mask = torch.ones_like(model.get_parameter(f"{name}.weight"))
        mask[:, scores.argsort()[:count]] = 0
        masks[f"{name}.weight"] = mask
        macs -= spent(model, bench, [name]) * count // len(scores)
    sparse = _masked(model, masks)
    return refit_sparse(model, sparse, masks, images), macs / bench.full_macs


def _masked(model: MultiTaskModel, masks: Mapping[str, Tensor]) -> MultiTaskModel:
    other = copy.deepcopy(model)
    for name, weights in other.named_parameters():
        if name in masks:
            weights.data *= masks[name]
    return other


def input_scores(
    bench: Bench, model: MultiTaskModel, reading: Reading, seed: int
) -> dict[str, Tensor]:
    """Return (inputs,) squared gate gradients of each layer's own task, summed over batches."""
    scores: dict[str, Tensor] = {}
    with gates(model, reading) as own:
        for batch in bench.stream(SCORING_IMAGES, seed, BATCH):
            outputs = model(batch.images)
            for task in model.tasks:
                mine = {name: own[name] for name in reading if reading[name] == task.name}
                loss = kind_of(task).loss(outputs[task.name], batch.targets[task.name])
                slopes = torch.autograd.grad(loss, list(mine.values()), retain_graph=True)
                for name, slope in zip(mine, slopes, strict=True):
                    scores[name] = scores.get(name, torch.zeros(())) + slope.flatten().square()
    return scores


@contextmanager
def gates(model: MultiTaskModel, reading: Reading) -> Iterator[dict[str, Tensor]]:
    """Multiply the inputs of the layers by gates of one, which have gradients."""
    own: dict[str, Tensor] = {}
    hooks = []
    for name in reading:
        layer = model.get_submodule(name)
        inputs = model.get_parameter(f"{name}.weight").shape[1]
        gate = torch.ones(1, inputs, 1, 1, requires_grad=True)
        own[name] = gate
        hooks.append(layer.register_forward_pre_hook(lambda _m, args, g=gate: (args[0] * g,)))
    try:
        yield own
    finally:
        for hook in hooks:
            hook.remove()


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """Return whether any selection is ahead of the plain cut, in points of ΔT over the seeds."""
    cuts = [row for row in rows if row["what"] == "cut"]

    def mean(keep: float, dropped: float) -> float:
        found: list[float] = [
            r["delta_t"] for r in cuts if r["keep"] == keep and r["dropped"] == dropped
        ]
        return sum(found) / len(found)

    return [
        Show(f"{dropped:.0%} of the heads' inputs dropped ahead of the plain cut at {keep:.0%} of "
             "the MACs, points of delta T", 0.0, mean(keep, dropped) - mean(keep, 0.0), ">=")
        for keep in KEEP for dropped in DROPPED
    ]  # fmt: skip


if __name__ == "__main__":
    main()
