"""What is fixed before the first stage: the parent, the kept tasks, the data, their digests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.model import ModelInput, MultiTaskModel, model_fingerprint
from secateur.core.task import Task
from secateur.data.folder import twice_named
from secateur.data.labels import check_known
from secateur.data.loading import InMemory, open_reader
from secateur.data.sample import Reader
from secateur.devices.latency_table import LatencyTable, channel_grid
from secateur.devices.target import Precision, Target
from secateur.flow.cache import StageCache
from secateur.flow.parent import load_parent
from secateur.flow.recipe import DataSpec, Recipe
from secateur.flow.trunk import check_trunk, trunk_prefix, weights_digest
from secateur.metrics.kind import kind_of
from secateur.prune.blocks import without_blocks
from secateur.prune.problem import Limit
from secateur.tasks import apply_folds, plan_folds, select_tasks

IN_BOTH = 0.1  # of data.eval's images may be in data.train as well


@dataclass(frozen=True)
class Job:
    """``parent`` has every task, ``selected`` only the kept ones; both in eval mode.

    ``scored`` is the model whose channels are scored: the parent, so that its scores serve every
    subset of tasks, without outputs that no task names; or ``selected`` where folding made layers
    that the parent does not have.
    ``weights`` names those of ``selected`` and ``scored`` where they are not the parent's but what
    neighbours recovered (``flow.merged``). ``basis`` names what channels are counted in:
    ``original`` as in the parent, else a digest of the folded layers or of the axes that it was
    turned to; ``axes`` are these, (W, W) by group, and ``trunk_basis`` names those of the trunk.
    ``limits`` are the budgets where there are others than MACs (``flow.budgets``), and
    ``kept_share`` about how much of the parent the budgets leave. ``removed`` are residual blocks
    of ``selected`` that go whole.
    """

    recipe: Recipe
    spec: ModelInput
    parent: MultiTaskModel
    selected: MultiTaskModel
    scored: MultiTaskModel
    example: Tensor
    train: Reader
    eval: Reader
    cache: StageCache
    parent_key: str
    basis: str = "original"
    trunk_basis: str = ""
    axes: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    kept_share: float = 1.0
    removed: tuple[str, ...] = ()
    weights: str = ""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The kept tasks."""
        return self.selected.tasks

    @property
    def trunk(self) -> str:
        """How the names of the trunk's layers begin: "" where the recipe names no trunk."""
        return trunk_prefix(self.recipe.model.trunk)

    @cached_property
    def library_key(self) -> str:
        """What the library knows the parent by: the weights of its trunk."""
        return weights_digest(self.parent, self.trunk)

    @cached_property
    def network_key(self) -> str:
        """The same of the whole parent: networks with other heads may share a trunk."""
        return weights_digest(self.parent)

    @property
    def library_basis(self) -> str:
        """What names the axes that the trunk's channels are counted in."""
        return self.trunk_basis or self.basis

    @cached_property
    def outline(self) -> MultiTaskModel:
        """``selected`` without the blocks of ``removed``: what a cut's channels are planned in."""
        return without_blocks(self.selected, self.removed) if self.removed else self.selected

    @property
    def selected_key(self) -> str:
        """What names the weights of ``selected``, in axes that may be others than the parent's."""
        return f"{self.weights or self.parent_key} in {self.basis}"

    @property
    def outline_key(self) -> str:
        """What names the weights of ``outline``."""
        return " without ".join([self.selected_key, *self.removed])

    def grid(self, target: Target, table: LatencyTable | None = None) -> int:
        """Return the channel grid: the recipe's, or what ``table`` shows, or else the target's.

        Which precision ``auto`` takes is known after the cut, so its grid suits all of them.
        """
        mode = self.recipe.precision.mode
        grids = {**target.channel_grid, **(_shown_grids(table) if table else {})}
        return self.recipe.prune.grid or (
            math.lcm(*grids.values()) if mode == "auto" else grids[mode]
        )


def _shown_grids(table: LatencyTable) -> dict[Precision, int]:
    """Return the grid of the table's precision, if it measured any."""
    return {table.precision: channel_grid(table)} if table.stairs else {}


def open_job(recipe: Recipe, cache: StageCache) -> Job:
    """Load everything a recipe names, and fail before any work if something does not fit.

    Raises:
        SecateurError: whichever part is wrong.
    """
    for task in recipe.all_tasks():
        kind_of(task)
    train, evaluation = open_data(recipe, recipe.data.train), open_data(recipe, recipe.data.eval)
    if len(train) < 2:
        raise DataError(
            f"data.train has {len(train)} image(s); one says nothing of others",
            hint="give at least 32 images of what the model will see, labelled or not",
        )
    if train.fingerprint == evaluation.fingerprint:
        raise DataError(
            "data.train and data.eval are the same images, so nothing would be known of new ones",
            hint="give data.eval another split or folder",
        )
    _check_apart(train, evaluation)
    parent = load_parent(recipe)
    if recipe.model.trunk:
        check_trunk(recipe.model.trunk, parent.network)
    spec = recipe.model.input.model_input()
    example = spec.example()
    selected, folded = keep_tasks(recipe, parent)
    every = [task.name for task in parent.tasks]
    return Job(
        recipe=recipe,
        spec=spec,
        parent=parent,
        selected=selected,
        scored=selected if folded else select_tasks(parent, every, example).eval(),
        example=example,
        train=train,
        eval=evaluation,
        cache=cache,
        parent_key=model_fingerprint(parent),
        kept_share=recipe.prune.budget.macs or 1.0,
        basis=f"folded-{model_fingerprint(selected)}" if folded else "original",
    )


def _check_apart(train: InMemory, evaluation: InMemory) -> None:
    """Raise where many an image is in both; that a few are may be chance (black ones, say).

    Raises:
        DataError: that is so.
    """
    seen, judged = (getattr(each.source, "checksums", {}) for each in (train, evaluation))
    both = sorted(name for checksum, name in judged.items() if checksum in seen)
    if len(both) > IN_BOTH * len(judged):
        raise DataError(
            f"{len(both)} of the {len(evaluation)} images of data.eval are among those of "
            f"data.train, first '{both[0]}': the accuracy told would be of images that the cut "
            "has learnt from",
            hint="take them out of one of the two",
        )


def keep_tasks(recipe: Recipe, parent: MultiTaskModel) -> tuple[MultiTaskModel, bool]:
    """Return the parent with the kept tasks only, and whether layers of it were folded."""
    example, keep = recipe.model.input.model_input().example(), recipe.kept_names()
    folds = plan_folds(parent, keep, example)
    selected = select_tasks(apply_folds(parent, folds, example), keep, example).eval()
    return selected, bool(folds.layers)


def open_data(recipe: Recipe, spec: DataSpec) -> InMemory:
    """Return the reader of ``data.train`` or ``data.eval``; what it decodes it keeps.

    Raises:
        DataError: there is no such reader, it finds no images, a label is called like none, or
            has but one class beside what is unknown.
    """
    reader = open_reader(spec.reader, recipe.data_root(spec), spec.split, **spec.options)
    misnamed = getattr(reader, "misnamed", {})  # of the reader of folders
    for task in recipe.all_tasks():
        if task.label in misnamed:
            raise DataError(
                f"label '{task.label}' is of none of the {len(reader)} images of split "
                f"'{spec.split}': it has '{misnamed[task.label]}', an image is called "
                f"'{reader[0].id}'",
                hint="give a label the name of its image, or take the folder away",
            )
        if task.label in (twice := getattr(reader, "twice", {})):
            raise twice_named(recipe.data_root(spec), *twice[task.label])
    kept = InMemory(reader)
    check_known(kept, recipe.kept_tasks())
    return kept
