"""From a YAML file (and overrides) to a `Recipe`, or to one readable `RecipeError`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from alula.errors import RecipeError, UsageError
from alula.training.notation import MOST_BITS, read_yaml
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
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe: {error.strerror if isinstance(error, OSError) else error}",
            where=str(path),
            remedy="name a YAML file; the repository's recipes/ has some to start from",
        ) from None
    raw, lines = read_yaml(text, where=str(path))
    return parse_recipe(raw, where=str(path), overrides=overrides, lines=lines)


def parse_recipe(
    raw: Any, *, where: str = "recipe", overrides: Iterable[str] = (), lines: yaml.Node | None = None
) -> Recipe:
    """Validate an already parsed recipe. ``lines`` is the YAML node tree the line numbers of errors are taken from."""
    if not isinstance(raw, Mapping):
        raise RecipeError("a recipe is a mapping with the keys name, output_dir, host, stages, ...", where=where)
    raw = _plain(raw)
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except UsageError as error:  # settings of a graft that its own config refuses
        raise RecipeError(error.message, where=where, remedy=error.remedy) from None
    except ValidationError as error:
        problems = _Problems(raw, lines)
        found = [item for item in error.errors(include_url=False) if not _phantom(item)]
        told = list(dict.fromkeys(problems.tell(item) for item in found))
        head = "" if len(told) == 1 else f"{len(told)} problems\n  "
        raise RecipeError(head + "\n  ".join(told), where=where) from None


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors."""
    return Recipe.model_json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Problems:
    """Words for pydantic's errors: where in the file, what is wrong, what is legal."""

    def __init__(self, raw: Any, lines: yaml.Node | None) -> None:
        self.raw, self.lines = raw, lines

    def tell(self, item: Mapping[str, Any]) -> str:
        loc = self._in_file(item["loc"])
        key = ".".join(str(part) for part in loc)
        line = _line(self.lines, loc)
        at = f"{key or 'recipe'}" + (f" (line {line})" if line else "")
        return f"{at}: {self._what(item, loc)}"

    def _in_file(self, loc: tuple[Any, ...]) -> tuple[Any, ...]:
        """Drop what pydantic adds to a path (union branches, the wrapped source spec) and the file does not have."""
        kept: list[Any] = []
        here = self.raw
        for index, part in enumerate(loc):
            last = index == len(loc) - 1
            if isinstance(here, list) and isinstance(part, int) and part < len(here):
                kept, here = [*kept, part], here[part]
            elif isinstance(here, Mapping) and part in here:
                if last or isinstance(here[part], Mapping | list):  # otherwise a union's tag: a plain value has no keys
                    kept, here = [*kept, part], here[part]
            elif isinstance(here, Mapping) and isinstance(part, str) and last:
                kept.append(part)  # a missing key
        return tuple(kept)

    def _what(self, item: Mapping[str, Any], loc: tuple[Any, ...]) -> str:
        kind, message = item["type"], item["msg"]
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            legal = _legal_keys(item["loc"][:-1])
            close = difflib.get_close_matches(str(loc[-1]), legal, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ";"
            return f"unknown key{hint} legal keys: {', '.join(legal)}"
        if kind in ("missing", "missing_argument"):
            return "this key is required"
        if kind in ("value_error", "setting"):
            return message.removeprefix("Value error, ")
        if kind in ("model_type", "model_attributes_type", "dataclass_type", "dict_type"):
            legal = _legal_keys(item["loc"])
            return "a mapping is wanted here" + (
                f", with keys among: {', '.join(legal)}" if kind != "dict_type" else ""
            )
        if kind in ("tuple_type", "list_type"):
            return "a list is wanted here"
        got = item.get("input")
        plain = isinstance(got, str | int | float | bool | type(None))
        shown = f", got {got!r}" if plain and not (isinstance(got, int) and got.bit_length() > MOST_BITS) else ""
        return message[0].lower() + message[1:] + shown


def _phantom(item: Mapping[str, Any]) -> bool:
    """Whether pydantic counts a list as too short because what stands in it is wrong, which is reported already."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _legal_keys(loc: tuple[Any, ...]) -> list[str]:
    """Keys the schema allows at ``loc``."""
    models: list[Any] = [Recipe]
    for part in loc:
        having = [model for model in models if part in _fields(model)]
        inside = [found for model in having for found in _models_in(_fields(model)[part])]
        # a union names the branch it took by a plain field of that branch
        models = inside or having or models
    return list(dict.fromkeys(key for model in models for key in _fields(model)))


def _fields(model: Any) -> dict[str, Any]:
    """Field name -> annotation of a pydantic model or a dataclass."""
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return {field.name: field.type for field in dataclasses.fields(model)}


def _models_in(annotation: Any) -> list[Any]:
    """The models and dataclasses inside an annotation such as `tuple[Model, ...]` or `Model | None`."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value` in place."""
    path, equals, value = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(
            f"--set {override!r} is not of the form key.path=value", remedy="e.g. --set stages.0.steps=10"
        )
    parsed, _ = read_yaml(value, where=f"--set {override!r}")
    here: Any = raw
    parts = path.strip().split(".")
    for index, part in enumerate(parts):
        rest = ".".join(parts[index:])
        if isinstance(here, list):
            place = _list_index(here, part, override)
            if index == len(parts) - 1:
                here[place] = parsed
            else:
                here = here[place]
        elif isinstance(here, dict):
            # parts such as wings.visual have a dot in their own name
            if index == len(parts) - 1 or parts[index - 1 : index] == ["train"]:
                here[rest] = parsed
                return
            here[part] = {} if here.get(part) is None else here[part]
            here = here[part]
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


def _line(node: yaml.Node | None, loc: tuple[Any, ...]) -> int | None:
    """Line (from 1) of the key at ``loc``, or of the nearest thing around it."""
    if node is None:
        return None
    line: int | None = None
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if pair is None:
                return line or node.start_mark.line + 1
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _plain(value: Any) -> Any:
    """A deep copy in plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
