"""What chat templates are told beside the messages, the same for every prompt of a run."""

from __future__ import annotations

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


@dataclass(frozen=True)
class TemplateSettings:
    """Settings of a chat template.

    Args:
        arguments: keyword arguments by name, such as ``{"enable_thinking": False}``; JSON values.

    Raises:
        UsageError: an argument that every template gets from alula (``messages``), or a truth value in quotes.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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

    def to_dict(self) -> dict[str, Any]:
        """Return all that is set, as JSON values."""
        return dict(self.arguments)

    def keywords(self, processor: Any) -> dict[str, Any]:
        """Return what ``processor.apply_chat_template`` is to be given.

        Args:
            processor: a processor or tokenizer.

        Raises:
            UsageError: the template of ``processor`` does not read an argument, which would be without effect.
        """
        template = template_of(processor)
        read = variables(template) if template is not None else frozenset()
        for name in self.arguments:
            if name not in read:
                offered = ", ".join(sorted(read - _GIVEN - _CALLED - {"bos_token", "eos_token"}))
                raise UsageError(
                    "the chat template of this model does not read it, so it would be without effect",
                    where=f"template: {name}",
                    remedy=f"leave it out; the template reads {offered}" if offered else "leave it out",
                )
        return dict(self.arguments)


def template_of(processor: Any) -> str | None:
    """Return the chat template that ``processor`` (or a tokenizer) renders messages with; None where there is none."""
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


@functools.lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """Return the names that a chat template reads without setting them itself."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"cannot be read: {error}", where="chat template") from error
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))
