"""From a YAML file (and overrides) to a `Recipe`, or to one readable `RecipeError`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alula.errors import RecipeError, UsageError
from alula.files import unreadable
from alula.settings import problems
from alula.training.notation import read_yaml
from alula.training.recipe import Recipe


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate the recipe at ``path``.

    Args:
        path: a YAML file.
        overrides: `key.path=value` strings as after `--set`; the value is YAML, list items go by index or, for
            stages, by name (`stages.align.steps=10`).

    Raises:
        RecipeError: the file cannot be read, is not YAML, or does not say something runnable; names file, line, key
            path and what is legal there, for every problem at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no UTF-8, or no name that a file can have
        remedy = "name a YAML file; the repository's recipes/ has some to start from"
        raise unreadable(error, path, RecipeError, remedy=remedy) from None
    raw, lines = read_yaml(text, where=str(path))
    return parse_recipe(raw, where=str(path), overrides=overrides, lines=lines)


def parse_recipe(
    raw: Any, *, where: str = "recipe", overrides: Iterable[str] = (), lines: yaml.Node | None = None
) -> Recipe:
    """Validate an already parsed recipe. ``lines`` is the YAML node tree the line numbers of errors are taken from."""
    if not isinstance(raw, Mapping):
        raise RecipeError("a recipe is a mapping with the keys name, output_dir, host, stages, ...", where=where)
    raw = _copied(raw)
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except UsageError as error:  # settings of a graft that its own config refuses
        raise RecipeError(error.message, where=where, remedy=error.remedy) from None
    except ValidationError as error:
        messages = [str(problem) for problem in problems(error, Recipe, raw, lines)]
        head = "" if len(messages) == 1 else f"{len(messages)} problems\n  "
        raise RecipeError(head + "\n  ".join(messages), where=where) from None


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors."""
    return Recipe.model_json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value` in place."""
    path, equals, value = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(
            f"--set {override!r} is not of the form key.path=value", remedy="e.g. --set stages.0.steps=10"
        )
    parsed, _ = read_yaml(value, where=f"--set {override!r}")
    current: Any = raw
    parts = path.strip().split(".")
    for index, part in enumerate(parts):
        rest = ".".join(parts[index:])
        if isinstance(current, list):
            position = _list_index(current, part, override)
            if index == len(parts) - 1:
                current[position] = parsed
            else:
                current = current[position]
        elif isinstance(current, dict):
            # parts such as wings.visual have a dot in their own name
            if index == len(parts) - 1 or parts[index - 1 : index] == ["train"]:
                current[rest] = parsed
                return
            current[part] = {} if current.get(part) is None else current[part]
            current = current[part]
        else:
            raise RecipeError(f"--set {override!r}: {'.'.join(parts[:index])} is a plain value and has no keys inside")


def _list_index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, Mapping) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    named = [name for name in names if name]
    legal = f"0 to {len(items) - 1}" + (f" or {', '.join(map(str, named))}" if named else "")
    raise RecipeError(f"--set {override!r}: there is no item {part!r} there; legal: {legal}")


def _copied(value: Any) -> Any:
    """A deep copy in plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value
