"""``secateur``: one command per verb; errors become one sentence and a hint."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

import typer
from rich.console import Console

import secateur
from secateur.cli import (
    build,
    compare,
    demo,
    diagnose,
    doctor,
    inspect,
    library,
    merge,
    profile,
    report,
    sweep,
    targets,
    verify,
)
from secateur.core.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Cut a pre-trained multi-task vision model to the tasks and the device at hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("targets")(targets.targets)
app.command("inspect")(inspect.inspect)
app.command("score")(inspect.score)
app.command("merge")(merge.merge)
app.command("plan")(inspect.plan)
app.command("sweep")(sweep.sweep)
app.command("profile")(profile.profile)
app.command("build")(build.build)
app.command("verify")(verify.verify)
app.command("bench")(verify.bench)
app.command("diagnose")(diagnose.diagnose)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.add_typer(library.app, name="library")
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; exit 0 good, 1 a check failed, 2 the user's error, 130 stopped."""
    _ask_for_huge_pages()
    try:
        app()
    except SecateurError as error:
        _report(error.message, error.hint)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # typer turns Ctrl-C into this
            _report("stopped", "run the same command again: finished stages are kept")
        raise
    except Exception:  # a bug of ours: say so, keep the traceback where it can be sent
        with tempfile.NamedTemporaryFile(
            "w", prefix="secateur-crash-", suffix=".txt", delete=False
        ) as log:
            traceback.print_exc(file=log)
        _report("this is a bug in Secateur", f"please report it with {log.name}")
        sys.exit(70)


def _ask_for_huge_pages() -> None:
    """Have torch keep large tensors in huge pages, where Linux gives them to those who ask.

    A training step of EfficientNet-Lite0 at 96x128 took 320 ms so, and 400 without (one Zen 4
    core). torch reads this when it first allocates; the user's own setting stands.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _report(message: str, hint: str) -> None:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": message, "hint": hint}))
        return
    console = Console(stderr=True, soft_wrap=True, no_color="NO_COLOR" in os.environ)
    console.print(f"[bold red]error:[/] {_escaped(message)}", highlight=False)
    console.print(f"[dim]hint:[/]  {_escaped(hint)}", highlight=False)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
