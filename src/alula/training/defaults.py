"""What a recipe leaves to the questions that come with its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alula.data import SourceSpec
from alula.data.specs import validated
from alula.errors import RecipeError
from alula.evaluation import defaults_for
from alula.hosts import names
from alula.hosts.directories import locate
from alula.hosts.host import read_tokenizer
from alula.training.recipe import Recipe


def with_questions(recipe: Recipe) -> Recipe:
    """``recipe`` with its retention measured by named data: those it names, else those that come with its model.

    Raises:
        RecipeError: it names none, and none come with the model. HostError: the model's tokenizer cannot be read.
    """
    retention = recipe.retention
    if retention is None or (retention.text is not None and (retention.pictures is not None or not retention.probes)):
        return recipe
    source = recipe.host.path or recipe.host.llm
    assert source is not None
    defaults = defaults_for(read_tokenizer(locate(names.resolve(source, "llm"), "host")))
    text, pictures = (None, None) if defaults is None else defaults.retention()
    found = {
        "text": _spec(
            retention.text,
            text,
            "text",
            "no text questions come with this model",
            "name some that it can answer, e.g. {jsonl: FILE}",
        )
    }
    if retention.probes:
        found["pictures"] = _spec(
            retention.pictures,
            pictures,
            "pictures",
            "no samples with images come with this model",
            "name some, e.g. {jsonl: FILE}, or set retention.probes to false",
        )
    return recipe.model_copy(update={"retention": retention.model_copy(update=found)})


def _spec(
    named: SourceSpec | None, default: Mapping[str, Any] | None, key: str, message: str, remedy: str
) -> SourceSpec:
    key = f"retention.{key}"
    if named is not None:
        return named
    if default is None:
        raise RecipeError(message, where=key, remedy=remedy)
    spec: SourceSpec = validated(SourceSpec, default, key=key)
    return spec
