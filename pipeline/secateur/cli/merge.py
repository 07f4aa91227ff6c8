"""``secateur merge``: single-task networks of one architecture into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from secateur.cli.options import JsonOption, RecipeArgument
from secateur.cli.tables import change_table
from secateur.core.errors import RecipeError
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.flow.merge import Merged


def merge(
    recipe: RecipeArgument,
    expert: Annotated[
        list[str],
        typer.Option(
            "--expert", "-e", help="TASK=FILE or TASK,TASK=FILE: a checkpoint, once per network."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The merged weights, a safetensors file.")
    ],
    images: Annotated[
        int, typer.Option(min=2, help="Unlabelled training images to fit on, at most.")
    ] = 128,
    as_json: JsonOption = False,
) -> None:
    """Merge networks fine-tuned from one pre-trained one, each for its task, without training.

    The recipe's factory makes the joint network; each file has its weights for that task by the
    same names (other heads may be missing). Afterwards name the result as model.checkpoint.

    Example: secateur merge my.yaml -e lane=lane.pt -e weather=weather.pt --out joint.safetensors
    """
    from safetensors.torch import save_file

    from secateur.core.files import atomic_path
    from secateur.flow.merge import merge_experts
    from secateur.flow.recipe import load_recipe

    files = _files(expert)
    if out.suffix != ".safetensors" or out.resolve() in {f.resolve() for f in files.values()}:
        raise RecipeError(
            f"--out: {out} is no place for the merged weights",
            hint="give a .safetensors file that is none of the experts'",
        )
    with shown(quiet=as_json):
        result = merge_experts(load_recipe(recipe), files, images)
    with atomic_path(out) as temporary:
        save_file(result.state, temporary)
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(out), **result.to_json()}, indent=2))
        return
    _print(result, out, Console())


def _files(given: list[str]) -> dict[tuple[str, ...], Path]:
    files: dict[tuple[str, ...], Path] = {}
    for word in given:
        tasks, equals, path = word.partition("=")
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        if not (equals and names and path) or names in files:
            raise RecipeError(
                f"--expert: '{word}' is not TASK=FILE, or its task was named before",
                hint="once per network, as --expert depth=depth.pt",
            )
        files[names] = Path(path)
    return files


def _print(result: Merged, out: Path, console: Console) -> None:
    change = result.change
    if change is not None:
        console.print(change_table(result.experts, result.merged, change.per_task,
                                   ("expert", "merged")))  # fmt: skip
        console.print(f"ΔT {change.mean:+.2f} % against the experts, worst task "
                      f"{change.worst_task} {change.worst:+.2f} %", highlight=False)  # fmt: skip
    else:
        console.print("data.eval has no labels of these tasks: nothing is known of the accuracy")
    if result.strangers:
        console.print(
            f"warning: two experts share hardly a weight (cosine {result.likeness:.2f}); only "
            "networks fine-tuned from the same pre-trained one can be merged",
            style="yellow", soft_wrap=True, highlight=False,
        )  # fmt: skip
    console.print(f"merged on {result.images} images; model: {{checkpoint: {out}}}",
                  soft_wrap=True, highlight=False, markup=False)  # fmt: skip
