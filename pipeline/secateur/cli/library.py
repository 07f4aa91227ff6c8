"""``secateur library``: the earlier cuts that a new one may start from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from secateur.cli.options import JsonOption
from secateur.cli.verify import BundleArgument
from secateur.core.errors import LibraryError
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.vote.entry import Facts
    from secateur.vote.library import Library

BUDGET_SLACK = 0.02  # plans end a little under what they may keep
SHORT = 8  # characters of an id or fingerprint that a table shows; commands take the beginning

app = typer.Typer(
    help="The library of earlier cuts: list, show, add, nearest, export, import, remove, gc.",
    no_args_is_help=True,
)
LibraryOption = Annotated[
    Path | None,
    typer.Option(
        "--library",
        help="Its folder (default: $SECATEUR_LIBRARY, or ~/.local/share/secateur/library).",
    ),
]
EntryArgument = Annotated[
    str, typer.Argument(help="An entry's id, or its beginning.", show_default=False)
]
BudgetOption = Annotated[
    float | None, typer.Option(help="Only cuts to this share of MACs, give or take 0.02.")
]


@app.command("list")
def list_entries(
    parent: Annotated[str | None, typer.Option(help="Only cuts of this parent.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Only cuts that keep this task (repeatable: any).")
    ] = None,
    budget: BudgetOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """The entries, oldest first.

    Example: secateur library list --task depth --budget 0.5
    """
    from secateur.vote.library import find_entries

    found = find_entries(
        _opened(library), parent=parent, tasks=task or None, budget=_around(budget)
    )
    if as_json:
        _print_json([{"id": each.id, **asdict(each.facts), "sketches": each.sketches,
                      "scored": each.scored, "with_weights": each.with_weights}
                     for each in found])  # fmt: skip
        return
    table = _table_of_entries("tasks", "MACs allowed", "ΔT %", "parent", "device", "created")
    for each in found:
        _add_row(table, each.id[:SHORT], *_cells(each.facts), each.facts.parent[:SHORT],
                 each.facts.device or "-", each.facts.created[:10])  # fmt: skip
    Console().print(table if found else "no entry meets these conditions")


@app.command()
def show(entry: EntryArgument, library: LibraryOption = None, as_json: JsonOption = False) -> None:
    """All of one entry: what it kept, how good it was, what it holds.

    Example: secateur library show 3f2a
    """
    from secateur.vote.library import find_id, load_entry

    opened = _opened(library)
    found = load_entry(opened, find_id(opened, entry))
    scored = {task: sorted(groups) for task, groups in found.scores.items()}
    sketches = {name: list(sketch.shape) for name, sketch in found.sketches.items()}
    weights = {
        "tensors": len(found.weights),
        "bytes": sum(w.nbytes for w in found.weights.values()),
    }
    if as_json:
        _print_json({"id": found.id, **asdict(found.facts), "plan": found.plan.to_json(),
                     "scores": scored, "sketches": sketches, "weights": weights})  # fmt: skip
        return
    facts, plan, console = found.facts, found.plan, Console(soft_wrap=True, highlight=False)
    tasks, kept, change = _cells(facts)
    for label, text in {
        "entry": found.id,
        "parent": f"{facts.parent} ({facts.parent_name}, channels: {facts.basis})",
        "tasks": tasks,
        "MACs allowed": f"{kept}; kept {plan.macs_after / plan.macs_before:.3f}: "
        f"{plan.macs_before:,} -> {plan.macs_after:,}",
        "ΔT": f"{change} % after {facts.steps} recovery steps",
        "scores of": ", ".join(scored) or "-",
        "sketches": ", ".join(f"{name} {shape}" for name, shape in sketches.items()) or "-",
        "weights": f"{weights['tensors']} tensors, {weights['bytes']:,} bytes",
        "created": f"{facts.created} by Secateur {facts.version or '?'}",
    }.items():
        console.print(f"{label:>10}  {text}", markup=False)
    accuracy = Table("task", "metric", "value")
    for task, metrics in facts.accuracy.items():
        for metric, value in metrics.items():
            _add_row(accuracy, task, metric, f"{value:.4g}")
    groups = Table("group", "kept", "of")
    for cut in found.plan.cuts:
        _add_row(groups, cut.name, str(len(cut.kept)), str(cut.width))
    console.print(accuracy)
    console.print(groups)


@app.command()
def add(
    bundle: BundleArgument,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a finished bundle's cut: its plan, accuracy and recipe (it holds no scores or weights).

    Example: secateur library add out/x86-64-cpu/fp32
    """
    from secateur.flow.entry import entry_of_bundle
    from secateur.vote.library import add_entry, find_same_cut, open_library

    made, opened = entry_of_bundle(bundle), open_library(library)
    known = find_same_cut(opened, made)  # the build's own, which holds more, or an earlier call's
    name = known or add_entry(opened, made)
    if as_json:
        _print_json({"id": name, "added": known is None})
        return
    Console().print(f"{name} was there already" if known else f"added {name}")


@app.command()
def nearest(
    entry: EntryArgument,
    measure: Annotated[
        str, typer.Option(help="leep, mean_feature, task2vec, score_cosine or cka.")
    ] = "score_cosine",
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    budget: BudgetOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """The entries whose tasks are most like those of an entry, and why; and who cannot be compared.

    Example: secateur library nearest 3f2a --measure score_cosine --count 3
    """
    from secateur.vote.library import find_id, load_entry
    from secateur.vote.nearest import nearest as find_nearest

    opened = _opened(library)
    own = load_entry(opened, find_id(opened, entry))
    result = find_nearest(
        opened, own.sketches, own.facts.parent, measure, count,
        basis=own.facts.basis, budget=_around(budget), wanted=budget or own.facts.budget,
        skip=[own.id], data=own.facts.data,
    )  # fmt: skip
    if as_json:
        _print_json({"entry": own.id, "measure": measure, **asdict(result)})
        return
    console = Console()
    table = _table_of_entries("tasks", "MACs allowed", "ΔT %", measure)
    for each in result.neighbours:
        _add_row(table, each.id[:SHORT], *_cells(each.facts), f"{each.similarity:.3f}")
    console.print(table)
    for neighbour in result.neighbours:
        console.print(f"{neighbour.id[:SHORT]}: {neighbour.why}", markup=False, soft_wrap=True)
    for why, count in Counter(refused.why for refused in result.refused).items():
        console.print(f"{count} refused: {why}", markup=False, soft_wrap=True)


@app.command("export")
def export(
    archive: Annotated[Path, typer.Argument(help="The zip file to write.", show_default=False)],
    entries: Annotated[list[str] | None, typer.Argument(help="Entries (default: all).")] = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write entries and their arrays to one zip file.

    Example: secateur library export cuts.zip
    """
    from secateur.vote.archive import export_entries
    from secateur.vote.library import find_id

    opened = _opened(library)
    wanted = [find_id(opened, each) for each in entries] if entries else None
    with shown(quiet=as_json):
        written = export_entries(opened, archive, wanted)
    _tell(written, f"written to {archive}", as_json)


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(help="A zip file from export.", show_default=False)],
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add all entries of a zip file, or none where one is damaged; nothing is unpickled.

    Example: secateur library import cuts.zip
    """
    from secateur.vote.archive import import_entries
    from secateur.vote.library import open_library

    with shown(quiet=as_json):
        read = import_entries(open_library(library), archive)
    _tell(read, f"read from {archive}", as_json)


@app.command()
def remove(
    entry: EntryArgument, library: LibraryOption = None, as_json: JsonOption = False
) -> None:
    """Remove an entry; `gc` frees its arrays.

    Example: secateur library remove 3f2a
    """
    from secateur.vote.library import find_id, remove_entry

    opened = _opened(library)
    found = find_id(opened, entry)
    remove_entry(opened, found)
    _tell([found], "removed", as_json)


@app.command()
def gc(
    older_than: Annotated[
        float, typer.Option(min=0, help="Minutes; younger files may belong to a build at work.")
    ] = 10.0,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove arrays that no entry names; report missing or altered ones of entries (exit 1).

    Example: secateur library gc --older-than 60
    """
    from secateur.vote.garbage import collect_garbage

    with shown(quiet=as_json):
        garbage = collect_garbage(_opened(library), older_than_s=60 * older_than)
    if as_json:
        _print_json(asdict(garbage))
    else:
        console = Console(soft_wrap=True)
        console.print(f"{len(garbage.removed)} files removed, {garbage.bytes:,} bytes")
        for entry, digest in garbage.missing:
            console.print(f"entry {entry} lacks its array file {digest}")
        for entry, digest in garbage.altered:
            console.print(f"entry {entry} has an array file that was altered, {digest}")
    if garbage.missing or garbage.altered:
        raise typer.Exit(1)


def _opened(folder: Path | None) -> Library:
    """Open a library to look into; where a folder is named it must hold one: it may be mistyped.

    Raises:
        LibraryError: it holds none, or cannot be used.
    """
    from secateur.vote.library import Library, open_library

    if folder is not None and not Library(folder).index.is_file():
        raise LibraryError(
            f"there is no library in {folder}",
            hint="check --library; builds, `secateur library add` and `import` make one",
        )
    return open_library(folder)


def _around(budget: float | None) -> tuple[float, float] | None:
    return None if budget is None else (budget - BUDGET_SLACK, budget + BUDGET_SLACK)


def _cells(facts: Facts) -> tuple[str, str, str]:
    change = "-" if facts.delta_t is None else f"{facts.delta_t:+.2f}"
    return ", ".join(facts.task_names), f"{facts.budget:.3f}", change


def _table_of_entries(*headers: str) -> Table:
    return Table(Column("id", no_wrap=True), *headers)


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(escape(cell) for cell in cells))


def _tell(entries: Sequence[str], what: str, as_json: bool) -> None:
    if as_json:
        _print_json({"entries": list(entries)})
        return
    Console(soft_wrap=True).print(f"{len(entries)} entries {what}", markup=False)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
