"""The recipe: what to cut, for whom and how far. Every error names the key and its line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from secateur.core.errors import RecipeError
from secateur.core.shipped import shipped_root
from secateur.core.task import Task
from secateur.flow.model_spec import ModelSpec
from secateur.flow.precision_spec import PrecisionSpec
from secateur.flow.precision_spec import Strict as _Strict
from secateur.flow.recipe_errors import check_no_key_twice, recipe_error
from secateur.importance.criterion import goes_by_scale

VARIABLE = re.compile(r"\$\{(\w+)\}")
RESERVED = ("image", "file", "allow_pickle")  # the input of the ONNX file; arguments of numpy.savez


class TaskSpec(_Strict):
    output: Annotated[str, BeforeValidator(lambda at: str(at) if type(at) is int else at)]
    kind: str
    label: str | None = None
    classes: int | None = Field(default=None, ge=2)
    ignore_index: int | None = None
    max_drop: float | None = Field(default=None, ge=0)
    weight: float = Field(default=1.0, gt=0)
    floor: float | None = Field(default=None, gt=0, lt=1)

    def unknown_class(self) -> int:
        """Return the label of what is unknown: by default 255, unless that is a class itself."""
        if self.ignore_index is not None:
            return self.ignore_index
        return 255 if (self.classes or 0) <= 255 else -1


def _task_name(name: str) -> str:
    """Return a name that may be an output of the ONNX file and an array of an .npz."""
    if not re.fullmatch(r"[^\s,/\\]([^,/\\\n]*[^\s,/\\])?", name) or name in RESERVED:
        raise ValueError(
            f"'{name}' cannot be a task's name: no comma and no slash, and not "
            f"{' or '.join(RESERVED)}"
        )
    return name


class DataSpec(_Strict):
    reader: str
    root: str | None = None
    split: str
    options: dict[str, Any] = Field(default={})


class DataSpecs(_Strict):
    train: DataSpec
    eval: DataSpec


class BudgetSpec(_Strict):
    macs: float | None = Field(default=None, gt=0, le=1)
    params: float | None = Field(default=None, gt=0, le=1)
    size_mb: float | None = Field(default=None, gt=0)
    latency_ms: float | None = Field(default=None, gt=0)
    instructions: float | None = Field(default=None, gt=0, le=1)
    peak_memory_mb: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one(self) -> BudgetSpec:
        if not self.given():
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self

    def given(self) -> dict[str, float]:
        """Return the budgets that there are, by their keys."""
        return self.model_dump(exclude_none=True)


class SearchSpec(_Strict):
    tries: int = Field(default=60, ge=1)
    images: int = Field(default=96, ge=8)


class PruneSpec(_Strict):
    criterion: str = "taylor"
    fusion: str = "cut"
    budget: BudgetSpec
    grid: int | None = Field(default=None, ge=1)
    floor: float | None = Field(default=None, ge=0, lt=1)
    balance: float = Field(default=0.65, ge=0, le=1)
    images: int = Field(default=128, ge=1)
    rescore: bool = True
    axes: Literal["balanced", "original"] | None = None
    blocks: bool = False
    search: SearchSpec | Literal[False] | None = None
    warm_start: Literal["none", "library"] = "none"
    neighbours: int = Field(default=5, ge=1)
    similarity: str = "score_cosine"
    votes: Literal["keeps", "scores"] = "keeps"
    vote_weight: float = Field(default=0.5, ge=0, le=1)
    inherit: Literal["none", "nearest", "average"] = "average"
    sparsity: Literal["2:4"] | None = None

    @model_validator(mode="after")
    def _blocks_alone(self) -> PruneSpec:
        if self.blocks and self.warm_start == "library":
            raise ValueError("blocks: earlier cuts do not vote on whole blocks; give "
                             "warm_start: none, or leave blocks out")  # fmt: skip
        return self


class LibrarySpec(_Strict):
    add: bool = True
    path: Path | None = None


class CompensateSpec(_Strict):
    images: int | None = Field(default=None, ge=2)
    ridge: float | None = Field(default=None, gt=0)
    joint: int | None = Field(default=None, ge=0, repr=False)  # no part of the layers' own refit


class EarlyStopSpec(_Strict):
    patience: int = Field(default=2, ge=1)
    images: int = Field(default=64, ge=2)


class RecoverSpec(_Strict):
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=2)
    learning_rate: float | None = Field(default=None, gt=0)
    labels: bool = True
    balance: Literal["fixed", "uncertainty", "dwa", "pcgrad"] = "fixed"
    distill: float = Field(default=1.0, ge=0)
    feature_distill: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    early_stop: EarlyStopSpec | Literal[False] = False
    freeze_norms: float | None = Field(default=None, ge=0, le=1)
    augment: Literal["none", "flip", "full"] = "flip"
    reinit: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> RecoverSpec:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, one of the two")
        if self.early_stop and not self.labels:
            raise ValueError("early_stop compares accuracies, which labels: false forbids")
        return self


class EngineSpec(_Strict):
    batch: Annotated[int, Field(ge=1)] | tuple[int, int, int] = 1
    workspace_mib: int | None = Field(default=None, ge=1)
    dla: int | None = Field(default=None, ge=0)
    dla_only: bool = False
    tf32: bool = True
    level: int | None = Field(default=None, ge=0, le=5)
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()

    @model_validator(mode="after")
    def _can_be_built(self) -> EngineSpec:
        if list(self.batches()) != sorted(self.batches()) or self.batches()[0] < 1:
            raise ValueError("batch: give one size, or [least, best, most] from small to large")
        if self.dla_only and self.dla is None:
            raise ValueError("dla_only: give dla, the core that everything is to run on")
        if self.dla is not None and len(set(self.batches())) > 1:
            raise ValueError("batch: a DLA takes one size only")
        return self

    def batches(self) -> tuple[int, int, int]:
        """Return the least, the best and the largest batch."""
        return (self.batch,) * 3 if isinstance(self.batch, int) else self.batch


class Recipe(_Strict):
    """A validated recipe. ``source`` is its text, ``path`` where it was read."""

    model: ModelSpec
    tasks: dict[Annotated[str, AfterValidator(_task_name)], TaskSpec] = Field(min_length=1)
    keep: tuple[str, ...] = Field(default=(), validate_default=False)
    data: DataSpecs
    prune: PruneSpec
    compensate: CompensateSpec | Literal[False] = CompensateSpec()
    recover: RecoverSpec | Literal["none"] = "none"
    precision: PrecisionSpec = PrecisionSpec()
    engine: EngineSpec = EngineSpec()
    runtime: Literal["onnxruntime", "ncnn", "auto"] | None = None
    library: LibrarySpec = LibrarySpec()
    source: str = ""
    path: Path = Path()

    @model_validator(mode="after")
    def _keep_known_tasks(self) -> Recipe:
        if "keep" in self.model_fields_set and not self.keep:
            raise ValueError("keep: is empty; name at least one task")
        unknown = [name for name in self.keep if name not in self.tasks]
        if unknown:
            raise ValueError(
                f"keep: there is no task '{unknown[0]}'; tasks: {', '.join(self.tasks)}"
            )
        if self.prune.sparsity and self.recover != "none" and self.recover.reinit:
            raise ValueError("prune.sparsity chooses by weights, which recover.reinit forgets")
        return self

    def all_tasks(self) -> tuple[Task, ...]:
        """Return every task of the parent, in the recipe's order."""
        return tuple(
            Task(
                name=name,
                output=spec.output,
                kind=spec.kind,
                label=spec.label or name,
                classes=spec.classes,
                ignore_index=spec.unknown_class(),
                max_drop=spec.max_drop,
                weight=spec.weight,
            )
            for name, spec in self.tasks.items()
        )

    def kept_names(self) -> tuple[str, ...]:
        """Return the kept tasks' names; all of them when ``keep`` is not given."""
        return self.keep or tuple(self.tasks)

    def kept_tasks(self) -> tuple[Task, ...]:
        """Return the kept tasks, in the recipe's order."""
        return tuple(task for task in self.all_tasks() if task.name in self.kept_names())

    def floors(self) -> dict[str, float]:
        """Return the kept tasks' floors, where they have one."""
        found = {name: self.tasks[name].floor for name in self.kept_names()}
        return {name: floor for name, floor in found.items() if floor is not None}

    def axes(self) -> Literal["balanced", "original"]:
        """Return the axes to cut in: balanced by default, but where that would blind the criterion.

        Raises:
            RecipeError: the recipe asks for balanced axes and a criterion that they blind.
        """
        wanted, criterion = self.prune.axes, self.prune.criterion
        blind = goes_by_scale(criterion)
        if wanted == "balanced" and blind:
            raise RecipeError(
                f"prune.axes: balanced axes level the size of weights, which '{criterion}' goes by",
                hint="leave prune.axes out, or choose a criterion of gradients such as taylor",
            )
        return wanted or ("original" if blind else "balanced")

    def searched(self) -> SearchSpec | Literal[False]:
        """Return the allocation search: by default only where no recovery follows.

        What a search gains before recovery, recovery gives back (benchmarks/fusion).
        """
        if self.prune.search is None:
            return SearchSpec() if self.recover == "none" else False
        return self.prune.search

    def judged(self) -> SearchSpec | Literal[False]:
        """Return how plans within other budgets than MACs are chosen between; by default they are.

        Which sum of scores to keep depends on the network, whatever follows.
        """
        return SearchSpec() if self.prune.search is None else self.prune.search

    def engine_options(self) -> dict[str, Any]:
        """Return what the bundle's ``build_engine.py`` is to do otherwise than by default."""
        wanted = self.engine.model_dump(mode="json", exclude_unset=True)
        if "batch" in wanted:
            wanted["batch"] = list(self.engine.batches())
        return {**wanted, **({"sparse": True} if self.prune.sparsity else {})}

    def data_root(self, spec: DataSpec) -> Path:
        """Return a data set's root; a relative one lies beside the recipe or where we run."""
        root = Path(spec.root or ".")
        beside = self.path.parent / root
        return (beside if beside.exists() else root).resolve()

    def library_root(self) -> Path | None:
        """Return the library's folder, a relative one beside the recipe; None for the default."""
        path = self.library.path
        return None if path is None else (self.path.parent / path).resolve()

    def find_file(self, path: Path) -> Path:
        """Return a file named in the recipe: beside the recipe, in the working or shipped folder.

        Raises:
            RecipeError: it is in none of them.
        """
        places = [self.path.parent / path, Path.cwd() / path, shipped_root() / path]
        for place in places:
            if place.exists():
                return place.resolve()
        raise RecipeError(
            f"there is no file {path} (looked in {', '.join(str(p.parent) for p in places)})",
            hint="give a path relative to the recipe or an absolute one",
        )


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        RecipeError: it cannot be read, is not YAML, or a key is missing, unknown or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe {path}: {error}", hint="give the path of a YAML file"
        ) from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path, *, unset: bool = False) -> Recipe:
    """Validate a recipe's text; ``path`` is where its relative files are looked for.

    With ``unset``, a ``${NAME}`` that the environment lacks stays as it is: for reading a recipe
    whose data are not needed.

    Raises:
        RecipeError: it is no recipe, or names a variable that is not set.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}", hint="check the indentation") from error
    check_no_key_twice(root, path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a recipe", hint="it must be a mapping of keys")
    for ours in ("source", "path"):  # fields that no file gives
        if ours in data:
            raise RecipeError(f"{path}: unknown key '{ours}'", hint="take it out")
    expanded = _expand(data, path, unset)
    try:
        return Recipe.model_validate({**expanded, "source": text, "path": path})
    except ValidationError as error:
        raise recipe_error(error, path, root, Recipe) from error


def _expand(value: Any, path: Path, unset: bool) -> Any:
    """Replace ``${NAME}`` by the environment variable in every string."""
    if isinstance(value, dict):
        return {key: _expand(item, path, unset) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path, unset) for item in value]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in os.environ and unset:
            continue
        if name not in os.environ:
            raise RecipeError(
                f"{path} uses ${{{name}}}, which is not set", hint=f"export {name}=/path/to/it"
            )
        value = value.replace(f"${{{name}}}", os.environ[name])
    return value
