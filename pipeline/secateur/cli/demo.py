"""``secateur demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from secateur.cli.build import print_result
from secateur.cli.options import DEFAULT_TARGET, CacheOption
from secateur.core.progress import shown
from secateur.core.shipped import shipped


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the bundle goes.")] = Path(
        "out/demo"
    ),
    cache: CacheOption = None,
) -> None:
    """The whole job on the embedded model and rendered rooms; names the bundle and its pictures.

    The cut is added to a library of its own in that folder, not to yours. Exits 1 when a task lost
    more than its max_drop.

    Example: secateur demo --out out/demo
    """
    from secateur.flow.build import build as run_build
    from secateur.flow.cache import StageCache
    from secateur.flow.recipe import LibrarySpec, load_recipe

    recipe = load_recipe(shipped("examples") / "scenes.yaml")
    recipe = recipe.model_copy(update={"library": LibrarySpec(path=(out / "library").resolve())})
    with shown():
        result = run_build(
            recipe, DEFAULT_TARGET, out, cache=StageCache(cache), command="secateur demo"
        )
    print_result(result, Console())
    if result.manifest.accuracy.too_low:
        raise typer.Exit(1)
