"""Variables for chat templates beside the messages, the same for every prompt of a run.

Some templates write today's date into the prompt (Llama's, Granite's, SmolLM's). What is trained or measured with one
must be the same tomorrow, so they are given one fixed date, `DATE` unless another is set.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.meta
import yaml

from alula.errors import UsageError

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""a tag of transformers' own, which plain jinja cannot parse"""
_GIVEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)
_CALLED = frozenset({"raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"})
"""functions that a template may call"""
_SPELLED = frozenset({"true", "false", "yes", "no", "on", "off", "none", "null"})

DATE = datetime.date(2024, 7, 26)
"""what templates that ask for today's date are given; the day Llama 3's templates name where they cannot ask"""

_CLOCK = "strftime_now"
"""transformers' function by which templates read the date"""
_DATE = "date"

# a macro hides the function of the same name; the line break at its end is one that transformers' jinja drops
_CALENDAR = "{%- macro strftime_now(format) -%}{{- format@REPLACED@ -}}{%- endmacro %}\n"
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTRCkl"
_PERCENT = "\ufdd2"
"""a noncharacter that stands for ``%%`` meanwhile"""


@dataclass(frozen=True)
class TemplateSettings:
    """Settings of a chat template.

    Args:
        arguments: keyword arguments by name, such as ``{"enable_thinking": False}``; JSON values. ``date`` (a date, or
            text as ``2024-07-26``) is the day given to templates that write today's date; `DATE` by default.

    Raises:
        UsageError: an argument that every template gets from alula (``messages``), a truth value in quotes, or a date
            that is none.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if _DATE in self.arguments:
            object.__setattr__(self, "arguments", {**self.arguments, _DATE: _iso(self.arguments[_DATE])})
        for name, value in self.arguments.items():
            where = f"template: {name}"
            if not isinstance(name, str) or not name.isidentifier():
                raise UsageError("is no name of an argument", where=where)
            if name in _GIVEN | _CALLED or name.endswith("_token"):
                raise UsageError("is not a setting: templates get it from the model or from alula", where=where)
            if isinstance(value, str) and value.casefold() in _SPELLED:
                raise UsageError(
                    f"{value!r} in quotes is a text, which templates take for true",
                    where=where,
                    remedy=f"write {value.casefold()} without quotes",
                )
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UsageError(f"{value!r} is no JSON value", where=where) from error

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> TemplateSettings:
        """Read ``name=value`` pairs, values as YAML writes them: ``enable_thinking=false``.

        Raises:
            UsageError: something else than such a pair, the same name twice, or as `TemplateSettings`.
        """
        arguments: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals or not value:
                raise UsageError(f"{pair!r} is not NAME=VALUE", where="--template", remedy="enable_thinking=false")
            if name in arguments:
                raise UsageError(f"{name} is given twice", where="--template")
            try:
                arguments[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(f"{value!r} is no value", where=f"--template {name}") from error
        return cls(arguments)

    def recorded(self, processor: Any) -> dict[str, Any]:
        """Return all that is set for the template of ``processor``, as JSON values: also the date, if it writes one."""
        dated = {_DATE: DATE.isoformat()} if _CLOCK in _read(template_of(processor)) else {}
        return {**dated, **self.arguments}

    def keywords(self, processor: Any, *, live: bool = False) -> dict[str, Any]:
        """Return what ``processor.apply_chat_template`` is to be given: the arguments, and the template itself where it
        would write today's date.

        Args:
            processor: a processor or tokenizer.
            live: for a conversation of today, which is given today's date unless another is set.

        Raises:
            UsageError: the template of ``processor`` does not read an argument, which would be without effect.
        """
        template = template_of(processor)
        read = _read(template)
        offered_names = read - _GIVEN - _CALLED - {"bos_token", "eos_token"} | ({_DATE} if _CLOCK in read else set())
        for name in self.arguments:
            if name not in offered_names:
                offered = ", ".join(sorted(offered_names))
                raise UsageError(
                    "the chat template of this model does not read it, so it would be without effect",
                    where=f"template: {name}",
                    remedy=f"leave it out; the template reads {offered}" if offered else "leave it out",
                )
        found = {name: value for name, value in self.arguments.items() if name in read}
        date = self.arguments.get(_DATE)
        if template is not None and _CLOCK in read and not (live and date is None):
            found["chat_template"] = fixed(template, DATE if date is None else datetime.date.fromisoformat(date))
        return found


def template_of(processor: Any) -> str | None:
    """Return the chat template that ``processor`` (or a tokenizer) renders messages with; None where there is none."""
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


def fixed(template: str, date: datetime.date) -> str:
    """Return ``template`` with the calendar of transformers replaced by one that stands still at the start of ``date``.

    Nothing else changes, white space included.
    """
    start = datetime.datetime.combine(date, datetime.time())
    swaps = [("%%", _PERCENT)]
    for directive in _DIRECTIVES:
        # as the C library has it, a minus leaves leading zeros out
        swaps += [(f"%{flag}{directive}", start.strftime(f"%{flag}{directive}")) for flag in ("-", "")]
    swaps.append((_PERCENT, "%"))
    replaced = "".join(f".replace({json.dumps(old)}, {json.dumps(new)})" for old, new in swaps)
    return _CALENDAR.replace("@REPLACED@", replaced) + template


def _iso(date: Any) -> str:
    try:
        return datetime.date.fromisoformat(date if isinstance(date, str) else date.isoformat()).isoformat()
    except (AttributeError, ValueError):
        raise UsageError(f"{date!r} is no date", where=f"template: {_DATE}", remedy="write it as 2024-07-26") from None


def _read(template: str | None) -> frozenset[str]:
    return variables(template) if template is not None else frozenset()


@functools.lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """Return the names that a chat template reads without setting them itself."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"cannot be read: {error}", where="chat template") from error
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))
