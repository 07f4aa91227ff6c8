"""MACs, parameters, bytes and lost importance as limits of the choice of widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import nn

from secateur.core.channels import ChannelGroup
from secateur.core.widths import Width
from secateur.prune.budget import Ladder, ladders
from secateur.prune.macs import MacsModel
from secateur.prune.problem import ONE, Floats, Limit, PairCost, Problem, Term, by_count, product

MOST_RUNGS = 48  # of one group; a wider one moves in longer steps


def width_problem(
    scores: Sequence[Floats],
    grids: Sequence[int],
    floor: float,
    limits: Sequence[Limit],
    *,
    thin: bool = True,
) -> Problem:
    """Return the choice of widths that keep the best (width,) scores of every group.

    Widths are those of ``budget.ladders``; ``thin``: evenly thinned to ``MOST_RUNGS`` in very wide
    groups.
    """
    rungs = ladders(scores, grids, floor)
    if thin:
        rungs = [_thinned(ladder) for ladder in rungs]
    lost = tuple(
        tuple(max(0.0, ladder.kept_score[0] - kept) for kept in ladder.kept_score)
        for ladder in rungs
    )
    return Problem(tuple(ladder.widths for ladder in rungs), lost, tuple(limits))


def _thinned(ladder: Ladder) -> Ladder:
    if len(ladder.widths) <= MOST_RUNGS:
        return ladder
    places = sorted({round(p) for p in np.linspace(0, len(ladder.widths) - 1, MOST_RUNGS)})
    return Ladder(
        tuple(ladder.widths[p] for p in places), tuple(ladder.kept_score[p] for p in places)
    )


def layer_widths(
    model: nn.Module, groups: Sequence[ChannelGroup]
) -> dict[str, tuple[Width, Width]]:
    """Return, per layer with a weight, the widths it reads and makes; 1-D weights read one.

    A grouped convolution, depth-wise or not, reads what one of its groups reads.
    """
    of: dict[tuple[str, str], Width] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            key = (member.layer, member.axis)
            spread = len(member.indices[0])
            cut = Width(-spread * group.width, ((number, spread),))
            of[key] = of.get(key, Width(0)) + cut
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        own_in = weight.shape[1] if weight.dim() > 1 else 1
        grouped = getattr(module, "groups", 1) > 1
        read = Width(own_in) if grouped else Width(own_in) + of.get((name, "in"), Width(0))
        found[name] = (read, Width(weight.shape[0]) + of.get((name, "out"), Width(0)))
    return found


def macs_limit(cost: MacsModel, most: int) -> Limit:
    """Return the limit on MACs; its total equals ``cost.macs`` for every cut."""
    coupling = cost.in_of.T @ (cost.unit[:, None] * cost.out_of)
    alone = (cost.unit * cost.out_fixed) @ cost.in_of + (cost.unit * cost.in_fixed) @ cost.out_of
    fixed = cost.constant + round(float((cost.unit * cost.in_fixed * cost.out_fixed).sum()))
    terms = [
        Term(_group(g), ONE, product(float(alone[g]))) for g in range(len(alone)) if alone[g] != 0
    ]
    coupling = np.triu(coupling) + np.tril(coupling, -1).T
    terms += [
        Term(_group(int(g)), _group(int(h)), product(float(coupling[g, h])))
        for g, h in np.argwhere(coupling)
    ]
    return Limit("MACs", most, tuple(terms), fixed, "M MACs", 1e-6, "prune.budget.macs")


def params_limit(model: nn.Module, groups: Sequence[ChannelGroup], most: int) -> Limit:
    """Return the limit on parameters; its total is what the cut model counts."""
    widths = layer_widths(model, groups)
    terms, known = [], 0
    for name, (read, made) in widths.items():
        module = model.get_submodule(name)
        weight = module.weight
        if not isinstance(weight, nn.Parameter):
            continue
        kernel = weight[0, 0].numel() if weight.dim() > 1 else 1
        terms += _expanded(read, made, float(kernel))
        known += weight.numel()
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            terms += _expanded(ONE, made, 1.0)
            known += bias.numel()
    for number, group in enumerate(groups):
        for name in group.parameters:
            parameter = model.get_parameter(name)
            per_channel = parameter.numel() // parameter.shape[-1]
            terms.append(Term(_group(number), ONE, product(float(per_channel))))
            known += per_channel * group.width
    rest = sum(parameter.numel() for parameter in model.parameters()) - known
    return Limit("parameters", most, tuple(terms), rest, "M", 1e-6, "prune.budget.params")


def size_limit(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    parent_bytes: int,
    most_bytes: int,
    bytes_per_weight: float = 4.0,
    in_fp32: Collection[nn.Module] = (),
) -> Limit:
    """Return the limit on the file's bytes: weights at that size, and what the parent has beside.

    ``parent_bytes`` are of the fp32 file. The weights of the modules ``in_fp32`` take 4 bytes each.
    Exact in fp32, up to batch norms, which the export folds away.
    """
    params = params_limit(model, groups, 0)
    full = [group.width for group in groups]
    beside = parent_bytes - 4 * params.total(full) + bytes_per_weight * params.constant
    terms = [
        Term(term.first, term.second, _scaled(term, bytes_per_weight)) for term in params.terms
    ]
    for name, (read, made) in layer_widths(model, groups).items():
        module = model.get_submodule(name)
        weight = module.weight
        if module in in_fp32 and isinstance(weight, nn.Parameter) and weight.dim() > 1:
            more = (4.0 - bytes_per_weight) * weight[0, 0].numel()
            terms += _expanded(read, made, more)
    return Limit("size", most_bytes, tuple(terms), beside, "MB", 1e-6, "prune.budget.size_mb")


def task_limits(
    fused: Sequence[Floats], per_task: Mapping[str, Sequence[Floats]], floors: Mapping[str, float]
) -> list[Limit]:
    """Return, per task of ``floors``, the limit that keeps that share of its importance (0..1).

    Which channels a width keeps is decided by ``fused``; scores are (width,) per group.
    """
    limits = []
    for task, floor in floors.items():
        total = sum(float(scores.sum()) for scores in per_task[task]) or 1.0
        terms = []
        for group, (order, scores) in enumerate(zip(fused, per_task[task], strict=True)):
            best_first = scores[np.argsort(-order, kind="stable")]
            lost = np.concatenate([best_first[::-1].cumsum()[::-1], [0.0]]) / total
            terms.append(Term(_group(group), ONE, by_count(lost)))
        limits.append(
            Limit(f"importance of task '{task}' lost", 1 - floor, tuple(terms), unit="%",
                  scale=100, key=f"the floor of task {task}")
        )  # fmt: skip
    return limits


def _group(number: int) -> Width:
    return Width(0, ((number, 1),))


def _expanded(read: Width, made: Width, unit: float) -> list[Term]:
    """Return ``unit * read * made`` as terms of single groups, so that no sum needs a table."""
    parts = [[(Width(w.fixed), 1.0)] if w.fixed else [] for w in (read, made)]
    for part, width in zip(parts, (read, made), strict=True):
        part += [(_group(group), float(times)) for group, times in width.of]
    return [
        Term(first, second, product(unit * a * b))
        for first, a in parts[0]
        for second, b in parts[1]
    ]


def _scaled(term: Term, factor: float) -> PairCost:
    return lambda first, second: factor * term.cost(first, second)
