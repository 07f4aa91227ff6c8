"""What is wrong with a recipe, in its own words: which key, on which line, and what to write."""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from secateur.core.errors import RecipeError

LIST_TYPES = ("tuple_type", "list_type")
MAPPING_TYPES = ("model_type", "model_attributes_type", "dict_type")


def recipe_error(
    error: ValidationError, path: Path, root: yaml.Node | None, recipe: type[BaseModel]
) -> RecipeError:
    """Return the first thing that is wrong; ``recipe`` is the model that was to be filled."""
    # A misspelt key comes before the one that is missing for it.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    location = [part for part in first["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location)
    line = _line_of(root, list(location))
    where = f"{path}, line {line}" if line else str(path)
    given = first["input"]
    if first["type"] == "missing":
        return RecipeError(f"{where}: key '{key}' is missing", hint="add it")
    if first["type"] == "extra_forbidden":
        known = _keys(_type_at(recipe, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"keys there: {', '.join(known)}"
        return RecipeError(f"{where}: key '{key}' is not known", hint=hint)
    if first["type"] in LIST_TYPES:
        return RecipeError(
            f"{where}: {key}: expected a list, got {given!r}",
            hint=f"write {location[-1]}: [{given if isinstance(given, str) else '…'}]",
        )
    if first["type"] in MAPPING_TYPES:
        wanted = _type_at(recipe, location)
        return RecipeError(
            f"{where}: {key}: expected {' or '.join([*_words(wanted), 'a mapping of keys'])}, got "
            f"{given!r}", hint=_mapping_hint(str(location[-1]), wanted, given),
        )  # fmt: skip
    got = f", got {given!r}" if key and not isinstance(given, dict) else ""
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where}: {f'{key}: ' if key else ''}{message}{got}",
                       hint="correct this value")  # fmt: skip


def check_no_key_twice(node: yaml.Node | None, path: Path) -> None:
    """Raise where a mapping has a key twice: YAML would take the last one and say nothing.

    Raises:
        RecipeError: that is so.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_no_key_twice(item, path)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.value != "<<":
                raise RecipeError(
                    f"{path}, line {line}: key '{key.value}' stands there twice, first on line "
                    f"{seen[key.value]}", hint="put what it holds under one of them",
                )  # fmt: skip
            seen[str(key.value)] = line
            check_no_key_twice(value, path)


def _mapping_hint(key: str, wanted: Any, given: object) -> str:
    """Say what to write where a single value stands in the place of a mapping."""
    known = _keys(wanted)
    for model in _models(wanted):
        for name, field in model.model_fields.items():
            if given in get_args(field.annotation):  # one of the words that a key of it takes
                return f"write {key}: {{{name}: {given}}}"
    words = [f"{key}: {word}" for word in _words(wanted)]
    keys = f", with keys {', '.join(known)}" if known else ""
    return f"write {' or '.join([*words, f'{key}: {{key: value}}'])}{keys}"


def _type_at(recipe: type[BaseModel], location: list[Any]) -> Any:
    """Return the type that stands at a place of a recipe."""
    found: Any = recipe
    for part in location:
        inner = [a for a in _alternatives(found) if get_origin(a) is dict]
        fields = {k: f for model in _models(found) for k, f in model.model_fields.items()}
        if part in fields:
            found = fields[part].annotation
        elif inner:
            found = get_args(inner[0])[1]
        else:
            return None
    return found


def _alternatives(annotation: Any) -> list[Any]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return list(get_args(annotation)) if union else [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [
        each
        for each in _alternatives(annotation)
        if isinstance(each, type) and issubclass(each, BaseModel)
    ]


def _keys(annotation: Any) -> list[str]:
    hidden = ("source", "path") if any(m.__name__ == "Recipe" for m in _models(annotation)) else ()
    return [k for model in _models(annotation) for k in model.model_fields if k not in hidden]


def _words(annotation: Any) -> list[str]:
    """Return the single words that may stand in the place of a mapping, as YAML has them."""
    literals = [a for a in _alternatives(annotation) if get_origin(a) is Literal]
    return [str(word).lower() if isinstance(word, bool) else f"{word}"
            for each in literals for word in get_args(each)]  # fmt: skip


def _is_union_tag(part: object) -> bool:
    if not isinstance(part, str):
        return False
    return part.endswith(("Spec", "Spec]")) or part.startswith("literal[")


def _line_of(node: yaml.Node | None, location: list[Any]) -> int | None:
    """Return the 1-based line of the deepest part of ``location`` that the text has."""
    line = None
    while node is not None and location:
        part = location.pop(0)
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == str(part)]
            if not pairs:
                return line or node.start_mark.line + 1
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                return line
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line
