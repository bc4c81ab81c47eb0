"""Settings that users write: one frozen, forbidding base, and one translator of pydantic's errors into words."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError, create_model

from alula.errors import UsageError

MOST_BITS = 1024
"""of a whole number: longer ones are a slip, and slow to write out"""


def _no_stand_in(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted here, not true or false")
    if isinstance(value, str | bytes):
        raise ValueError("a number is wanted here, not text")
    return value


#: Numbers as they are written: no text, true or false in their place.
Int = Annotated[int, Strict()]
Number = Annotated[float, BeforeValidator(_no_stand_in)]


#: True or false, and nothing that stands in for them.
Bool = Annotated[bool, Strict()]


class Settings(BaseModel):
    """Base of settings: nothing in them changes, an unknown key is refused, and so is a number that is not finite.

    Raises:
        UsageError: the first thing wrong, with the name of its key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def __init__(self, *unnamed: Any, **values: Any) -> None:
        if unnamed:
            fields = list(type(self).model_fields)
            raise UsageError(
                "settings are given by name, not by position",
                where=self.named(""),
                remedy=f"write {type(self).__name__}({fields[0]}=...)" if fields else "give none: it has no settings",
            )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise refusal(error, type(self), values, where=self.named) from None

    # inside other settings they are validated as part of those, and a problem is told by its whole path
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def named(cls, path: str) -> str:
        """How a setting is called in errors; ``path`` is empty for the settings as a whole."""
        return ".".join(filter(None, (cls.__name__, path)))


def check_fields(settings: Any) -> None:
    """Refuse fields of a dataclass that are not what they are declared as.

    Raises:
        UsageError: naming the first such field.
    """
    fields = [field for field in dataclasses.fields(settings) if field.init]
    kind: Any = type(settings)
    _model_of(kind)(**{field.name: getattr(settings, field.name) for field in fields})


@functools.cache
def _model_of(kind: Any) -> type[Settings]:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (_strict(hints[field.name]), ...) for field in dataclasses.fields(kind) if field.init
    }
    return create_model(kind.__name__, __base__=Settings, **fields)


def _strict(hint: Any) -> Any:
    """An annotation whose numbers, true and false take nothing that stands in for them."""
    if hint in (bool, int, float):
        return {bool: Bool, int: Int, float: Number}[hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, (_strict(part) for part in get_args(hint)))
    if origin in (tuple, list):
        return origin[tuple(part if part is ... else _strict(part) for part in get_args(hint))]
    return hint


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with settings.

    Attributes:
        loc: keys and list indices from the outermost settings to where it is, as the user wrote them.
        what: what is wrong there.
        remedy: what is legal there, where that is a list of keys.
        line: line (from 1) in the YAML file, where there is one.
    """

    loc: tuple[Any, ...]
    what: str
    remedy: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        key = ".".join(str(part) for part in self.loc)
        at = f"{key or 'recipe'}" + (f" (line {self.line})" if self.line else "")
        between = " " if self.what.endswith("?") else "; "
        return f"{at}: {self.what}" + (between + self.remedy if self.remedy else "")


def problems(error: ValidationError, schema: Any, given: Any, lines: yaml.Node | None = None) -> list[Problem]:
    """What is wrong with ``given``, each thing once.

    Args:
        error: pydantic's account of it.
        schema: the model, or union of models, that ``given`` was validated as.
        given: the settings as plain mappings, lists and values.
        lines: YAML nodes of ``given``, for line numbers.
    """
    every = error.errors(include_url=False)
    found = [item for item in every if not _phantom(item)] or every
    return list(dict.fromkeys(_problem(item, schema, given, lines) for item in found))


def refusal(
    error: ValidationError, schema: Any, given: Any, *, where: Callable[[str], str], bracketed: bool = False
) -> UsageError:
    """The first problem as an error, with the number of others. Of a key that is missing it tells last.

    Args:
        error, schema, given: as `problems` takes them.
        where: what a setting is called, given its path; the path is empty for the whole.
        bracketed: write the path as JSON's is, ``stages[0].steps``, and not as recipes and ``--set`` do,
            ``stages.0.steps``.
    """
    found = problems(error, schema, given)
    first = min(found, key=lambda problem: problem.what == _REQUIRED)  # a key that is misspelt is missing as well
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    steps = (f"[{step}]" if bracketed and isinstance(step, int) else f".{step}" for step in first.loc)
    path = "".join(steps).removeprefix(".")
    return UsageError(first.what + more, where=where(path), remedy=first.remedy)


_REQUIRED = "this key is required"

_WANTED = {
    "int_type": "a whole number is wanted here",
    "int_from_float": "a whole number is wanted here",
    "float_type": "a number is wanted here",
    "bool_type": "true or false is wanted here",
    "string_type": "a text is wanted here",
}
"""pydantic's names of problems, in plain words"""


def _problem(item: Mapping[str, Any], schema: Any, given: Any, lines: yaml.Node | None) -> Problem:
    loc = _as_written(item["loc"], given)
    kind, message = item["type"], item["msg"]
    remedy = None
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        legal = _legal_keys(schema, item["loc"][:-1])
        close = difflib.get_close_matches(str(loc[-1]), legal, n=1)
        what = "unknown key" + (f"; did you mean `{close[0]}`?" if close else "")
        remedy = f"legal keys: {', '.join(legal)}"
    elif kind in ("missing", "missing_argument"):
        what = _REQUIRED
    elif kind == "union_tag_invalid":
        key, tag = item["ctx"]["discriminator"].strip("'"), item["ctx"]["tag"]
        legal = re.findall(r"'([^']*)'", item["ctx"]["expected_tags"])
        close = difflib.get_close_matches(tag, legal, n=1)
        what = f"unknown {key} {tag!r}" + (f"; did you mean `{close[0]}`?" if close else "")
        remedy = f"{key} is one of: {', '.join(legal)}"
    elif kind == "union_tag_not_found":
        what = f"the key {item['ctx']['discriminator']} is required here"
    elif kind in ("value_error", "setting"):
        what = message.removeprefix("Value error, ")
    elif kind in ("model_type", "model_attributes_type", "dataclass_type"):
        what = f"a mapping is wanted here, with keys among: {', '.join(_legal_keys(schema, item['loc']))}"
    elif kind == "dict_type":
        what = "a mapping is wanted here"
    elif kind in ("tuple_type", "list_type"):
        what = "a list is wanted here"
    elif kind in ("too_short", "too_long") and "actual_length" in item.get("ctx", {}):
        bound = item["ctx"].get("min_length", item["ctx"].get("max_length"))
        side = "least" if kind == "too_short" else "most"
        what = f"at {side} {bound} {'is' if bound == 1 else 'are'} wanted here, not {item['ctx']['actual_length']}"
    else:
        got = item.get("input")
        plain = isinstance(got, str | int | float | bool | type(None))
        shown = f", got {got!r:.80}" if plain and not (isinstance(got, int) and got.bit_length() > MOST_BITS) else ""
        what = _WANTED.get(kind, message[0].lower() + message[1:]) + shown
        if kind == "literal_error":
            legal = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            close = difflib.get_close_matches(str(got), legal, n=1)
            what += f"; did you mean `{close[0]}`?" if close else ""
    return Problem(loc, what, remedy, _line(lines, loc))


def _as_written(loc: tuple[Any, ...], given: Any) -> tuple[Any, ...]:
    """Drop what pydantic adds to a path (union branches, the wrapped source spec) and the user did not write."""
    kept: list[Any] = []
    here = given
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            kept, here = [*kept, part], here[part]
        elif isinstance(here, Mapping) and part in here:
            # otherwise a union's tag: a value has no keys. It may have a place, where one stands for a list of one
            if isinstance(here[part], Mapping | list | tuple) or all(
                isinstance(step, int) for step in loc[index + 1 :]
            ):
                kept, here = [*kept, part], here[part]
        elif isinstance(here, Mapping) and isinstance(part, str) and last:
            kept.append(part)  # a missing key
    return tuple(kept)


def _phantom(item: Mapping[str, Any]) -> bool:
    """Whether pydantic counts a list as too short because what stands in it is wrong, which is reported already."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _legal_keys(schema: Any, loc: tuple[Any, ...]) -> list[str]:
    """Keys the schema allows at ``loc``."""
    models = _models_in(schema)
    for part in loc:
        chosen = [model for model in models if part in _tags(model)]
        having = [model for model in models if part in _fields(model)]
        inside = [found for model in having for found in _models_in(_fields(model)[part])]
        # a union names the branch it took by a plain field of that branch
        models = inside or having or chosen or models
    return list(dict.fromkeys(key for model in models for key in _fields(model)))


def _tags(model: Any) -> tuple[Any, ...]:
    """The names by which a model is told from others of its union."""
    return get_args(_fields(model).get("name"))


def _fields(model: Any) -> dict[str, Any]:
    """Field name -> annotation of a pydantic model or a dataclass."""
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return {field.name: field.type for field in dataclasses.fields(model)}


def _models_in(annotation: Any) -> list[Any]:
    """The models and dataclasses inside an annotation such as `tuple[Model, ...]` or `Model | None`."""
    if isinstance(annotation, type) and hasattr(annotation, "alternatives"):  # one of several kinds
        annotation = annotation.alternatives()
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


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


def budget_of(text: str) -> dict[str, float]:
    """Read ``agreement:0.98,accuracy:0.9``.

    Raises:
        UsageError: something else than such pairs, or the same name twice.
    """
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, _, value = (part.strip() for part in pair.partition(":"))
        try:
            number = float(value)
        except ValueError:
            raise UsageError(
                f"{pair.strip()!r} is not NAME:SHARE",
                where="--budget",
                remedy="write NAME:0.98, several with commas between them; --help lists the names",
            ) from None
        if name in found:
            raise UsageError(f"{name} is given twice", where="--budget")
        found[name] = number
    return found


def checked_budget(budget: Mapping[str, float], known: Mapping[str, str]) -> Mapping[str, float]:
    """A budget, for validators of settings.

    Args:
        known: by name, what can be asked for.

    Raises:
        ValueError: another name, or no share above 0.
    """
    for name, least in budget.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; choose among {', '.join(known)}"
            raise ValueError(f"there is no {name!r}{hint}")
        if not 0 < least <= 1:
            raise ValueError(f"{name} is a share above 0, of 1 at most, not {least:g}")
    return budget
