"""``secateur demo``"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.build import missed, print_result
from secateur.cli.options import DEFAULT_TARGET, CacheOption, JsonOption
from secateur.core.errors import BundleError
from secateur.core.progress import shown
from secateur.core.shipped import shipped

if TYPE_CHECKING:
    from secateur.flow.video import VideoResult

FOLDER, VIDEO = Path("out/demo"), Path("out/demo.mp4")


def demo(
    bundle: Annotated[
        Path | None, typer.Argument(help="With --video: the bundle to show.", show_default=False)
    ] = None,
    video: Annotated[
        str | None, typer.Option(help="A video file, or a camera's number such as 0.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Shown beside it instead of its parent: a bundle, an ONNX file, or "
                     "the parent's recipe."),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=f"Where the bundle goes ({FOLDER}), or the recording "
                     f"({VIDEO}).", show_default=False),
    ] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """The whole job on rendered rooms; or, with --video, a bundle beside its parent, recorded.

    Without --video: builds the embedded model, and names the bundle and its pictures. The cut is
    added to a library of its own in that folder, not to yours. Exits 1 when a task lost more than
    its max_drop.

    With --video: every task is drawn on every frame, with the latency of each model, into an mp4;
    also on the screen where this OpenCV has windows. Ctrl-C, or q in the window, ends it.

    Example: secateur demo --out out/demo
    Example: secateur demo out/demo/x86-64-cpu/fp32 --video clip.mp4 --out out/demo.mp4
    """
    if video is not None:
        if bundle is None:
            raise BundleError(
                "--video needs a bundle to show",
                hint=f"secateur demo {FOLDER}/{DEFAULT_TARGET}/fp32 --video {video}, once "
                "`secateur demo` has built that one",
            )
        _show(bundle, video, against, frames, out or VIDEO, cache, as_json)
        return
    for given, name in ((bundle, "a bundle"), (against, "--against"), (frames, "--frames")):
        if given is not None:
            raise BundleError(
                f"{name} is for --video only", hint="add --video FILE, or --video 0 for a camera"
            )
    _build(out or FOLDER, cache, as_json)


def _build(out: Path, cache: Path | None, as_json: bool) -> None:
    from secateur.cli.build import result_json
    from secateur.flow.build import build as run_build
    from secateur.flow.cache import StageCache
    from secateur.flow.recipe import LibrarySpec, load_recipe

    recipe = load_recipe(shipped("examples") / "scenes.yaml")
    recipe = recipe.model_copy(update={"library": LibrarySpec(path=(out / "library").resolve())})
    with shown(quiet=as_json):
        result = run_build(
            recipe, DEFAULT_TARGET, out, cache=StageCache(cache), command="secateur demo"
        )
    if as_json:
        typer.echo(json.dumps(result_json(result), indent=2))
    else:
        print_result(result, Console())
    if result.manifest.accuracy.too_low or missed(result.manifest):
        raise typer.Exit(1)


def _show(
    bundle: Path, video: str, against: Path | None, frames: int | None, out: Path,
    cache: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from secateur.flow.cache import StageCache
    from secateur.flow.video import show_video

    with shown(quiet=as_json):
        result = show_video(
            bundle, video, out, against=against, most=frames, cache=StageCache(cache)
        )
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
    else:
        _print(result, Console())


def _print(result: VideoResult, console: Console) -> None:
    table = Table("model", "p50 ms", "p90 ms", "frames/s", "runtime")
    for side in result.sides:
        table.add_row(
            side.title, f"{side.p50_ms:.2f}", f"{side.p90_ms:.2f}",
            f"{side.frames_per_second:.1f}", side.runtime,
        )  # fmt: skip
    table.caption = (
        "ms: the runtime's call; frames/s: with resizing. A demonstration runs between drawing and "
        "encoding: `secateur bench` measures"
    )
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    height, width = result.size
    ended = ", stopped by you" if result.stopped else ""
    console.print(
        f"video     {result.out}  ({result.frames} frames, {width}x{height}{ended})",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
