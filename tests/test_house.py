"""Rules of the house that a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

CODE = REPOSITORY / "pipeline" / "secateur"
NOUNS = {"core", "data", "metrics", "devices"}  # every stage may use these
STAGES = {"tasks", "importance", "fusion", "prune", "compensate", "recover", "lower", "runtimes",
          "bundle", "bench", "vote"}  # fmt: skip
TRAVELLING = sorted(
    path for room in ("bundle", "devices") for path in (CODE / room).glob("*.py")
    if "Python 3.8" in (ast.get_docstring(ast.parse(path.read_text())) or "")
)  # fmt: skip


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("secateur.")}


@pytest.mark.parametrize("room", sorted(STAGES))
def test_a_stage_imports_nouns_and_itself_only(room: str) -> None:
    for path in (CODE / room).rglob("*.py"):
        strangers = imported_rooms(path) - NOUNS - {room}
        assert not strangers, f"{path.relative_to(CODE)} imports {strangers}"


def test_nouns_do_not_import_stages() -> None:
    for room in NOUNS:
        for path in (CODE / room).rglob("*.py"):
            assert not imported_rooms(path) & (STAGES | {"flow", "cli"}), path


def test_only_the_command_line_imports_the_command_line() -> None:
    for path in CODE.rglob("*.py"):
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert "cli" not in imported_rooms(path), path


def test_files_and_functions_stay_short() -> None:
    for path in CODE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 70, f"{path.name}:{node.name} has {lines} lines"


@pytest.mark.parametrize("file", TRAVELLING, ids=lambda path: path.name)
def test_what_runs_on_devices_imports_on_python_3_8(file: Path) -> None:
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    notes = {id(part) for node in ast.walk(tree) for part in annotations(node)}
    subscripted = {
        node.value.id for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        and id(node) not in notes
    }  # fmt: skip
    generic = {"list", "dict", "tuple", "set", "type"} | {
        alias.name for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc"
        for alias in node.names
    }  # fmt: skip
    assert not subscripted & generic  # 3.9 is the first that can


def annotations(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in the annotations of a function or an assignment: never evaluated there."""
    for name in ("annotation", "returns"):
        if (found := getattr(node, name, None)) is not None:
            yield from ast.walk(found)


def test_errors_carry_a_hint() -> None:
    import secateur.core.errors as errors

    for name in re.findall(r"├── (\w+)|└── (\w+)", errors.__doc__ or ""):
        kind = getattr(errors, name[0] or name[1])
        with pytest.raises(TypeError):
            kind("no hint")


def test_importing_the_command_line_stays_light() -> None:
    script = (
        "import secateur.cli.app, sys; sys.exit(any(m in sys.modules for m in ('torch', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_command_in_the_docs_names_a_verb_and_files_that_exist() -> None:
    verbs = {"targets", "inspect", "score", "plan", "build", "verify", "bench", "demo", "doctor",
             "library", "profile", "diagnose", "compare", "report", "merge", "sweep"}  # fmt: skip
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    commands = [
        line.strip().removeprefix("$ ")
        for document in documents
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", document.read_text(), re.S)
        for line in block.splitlines()
    ]
    ours = [line.split("#")[0].split() for line in commands if line.startswith("secateur ")]
    assert len(ours) >= 8
    for words in ours:
        assert words[1] in verbs, words
        for word in words[2:]:
            if word.startswith("examples/"):
                assert (REPOSITORY / word).exists(), words
    for line in commands:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", (REPOSITORY / "Makefile").read_text(), re.M)


def test_links_in_the_docs_lead_somewhere() -> None:
    for document in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_wheel_holds_code_targets_recipes_and_parents(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*command, REPOSITORY], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.relative_to(REPOSITORY / "pipeline").as_posix() for p in CODE.rglob("*.py")}
    wanted |= {
        p.relative_to(REPOSITORY / "pipeline").as_posix() for p in (CODE / "bench/page").iterdir()
    }
    for kind in ("targets", "benchmarks", "examples"):
        tracked = subprocess.run(
            ["git", "ls-files", kind], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.split()
        assert tracked
        wanted |= {f"secateur/shipped/{name}" for name in tracked}
    assert wanted - packed == set()
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)  # ours, just built
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import secateur; "
        "from secateur.devices.target import load_target, target_names; "
        "from secateur.core.shipped import shipped; "
        "assert secateur.__file__.startswith(sys.path[0]), secateur.__file__; "
        "assert 'x86-64-cpu' in target_names() and load_target('x86-64-cpu'); "
        "assert (shipped('examples') / 'scenes.yaml').is_file()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_published_figures_are_those_of_the_results() -> None:
    script = REPOSITORY / "benchmarks" / "publish.py"
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
