"""What an audit is to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from alula.auditing.sections import SECTIONS, Measurement, Questions
from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.chat_template import TemplateSettings
from alula.errors import UsageError
from alula.settings import Bool, Int, Settings


class Plan(Settings):
    """The settings of an audit.

    Args:
        output: directory for what is measured and for the report; a later call with the same settings goes on there.
        model: a directory or hub id; any image host alula can load, adapters included.
        base: the model before it was tuned, or the text LLM inside; text answers are compared with its.
        data: the user's conversations with images; where None, those that come with the model
            (`alula.evaluation.defaults`).
        images: the folder relative image paths of ``data`` start from.
        text: the user's text conversations, whose last turn is the reference answer; where None, those that
            come with the model.
        samples: conversations with images that are measured.
        items: text questions asked.
        sections: names of `SECTIONS`.
        controls: measure alignment again with noise in place of the images, and with an untrained connector.
        batch_size: conversations per forward.
        dtype: of the weights, by name; None keeps the checkpoint's.
        seed: draws the items that come with the model, samples kept, resamples and noise.
        probes: settings of probes by section, such as ``{"attention": {"system": "apart"}}``.
        template: variables for chat templates beside the messages, see `alula.chat_template.TemplateSettings`.

    Raises:
        UsageError: an unknown section, none at all, or a number out of bounds.
    """

    output: Path
    model: str
    base: str | None = None
    data: Path | None = None
    images: Path | None = None
    text: Path | None = None
    samples: Int = Field(default=128, ge=1, le=MAX_ITEMS)
    items: Int = Field(default=200, ge=1, le=MAX_ITEMS)
    sections: tuple[str, ...] = tuple(SECTIONS)
    controls: Bool = True
    batch_size: Int = Field(default=8, ge=1, le=MAX_ITEMS)
    dtype: str | None = None
    seed: Int = Field(default=0, ge=0, le=MAX_SEED)
    probes: Mapping[str, Mapping[str, Any]] = {}
    template: Mapping[str, Any] = {}

    @classmethod
    def named(cls, path: str) -> str:
        """Settings are called as `alula audit` calls them in errors."""
        return f"--{path.replace('_', '-')}" if path else "alula audit"

    @field_validator("sections")
    @classmethod
    def _known(cls, sections: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in sections if name not in SECTIONS]
        if unknown or not sections:
            what = f"there is no section {unknown[0]!r}" if unknown else "no section was chosen"
            raise ValueError(f"{what}; choose among {', '.join(SECTIONS)}")
        return sections

    @model_validator(mode="after")
    def _possible(self) -> Plan:
        TemplateSettings(self.template)  # refuses what is none
        for name in self.probes:
            if name not in self.measurements:
                measured = ", ".join(self.measurements)
                raise ValueError(f"--probe: no section {name!r} is measured; measured: {measured}")
        if self.base is not None and not self.questions:
            raise ValueError("--base is compared by its text answers alone, and section text is not among --sections")
        return self

    @property
    def told(self) -> TemplateSettings:
        """The settings of templates."""
        return TemplateSettings(self.template)

    @property
    def measurements(self) -> dict[str, Measurement]:
        """Of the chosen sections that look at images, by name, in the order of the report."""
        found = {name: section.measurement for name, section in SECTIONS.items() if name in self.sections}
        return {name: measurement for name, measurement in found.items() if measurement is not None}

    @property
    def questions(self) -> dict[str, Questions]:
        """Of the chosen sections that ask something, by name, in the order of the report."""
        found = {name: section.questions for name, section in SECTIONS.items() if name in self.sections}
        return {name: questions for name, questions in found.items() if questions is not None}

    @property
    def names_all(self) -> bool:
        """Whether nothing is left to what comes with the model."""
        return not ((self.measurements and self.data is None) or (self.questions and self.text is None))

    def facts(self) -> dict[str, Any]:
        """All that decides the figures, as JSON values."""
        values = {**self.model_dump(), "template": dict(self.told.arguments)}
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        del facts["output"]
        if not self.probes:  # as audits of earlier versions wrote it
            del facts["probes"]
        return {**facts, "sections": [name for name in SECTIONS if name in self.sections]}


def probe_settings(pairs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read ``section.name=value`` pairs, values as YAML writes them: ``attention.system=apart``.

    Raises:
        UsageError: something else than such a pair, or the same setting twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        path, equals, value = pair.partition("=")
        section, dot, name = path.partition(".")
        if not (equals and dot and value and name):
            raise UsageError(f"{pair!r} is not SECTION.NAME=VALUE", where="--probe", remedy="attention.system=apart")
        if name in found.setdefault(section, {}):
            raise UsageError(f"{path} is given twice", where="--probe")
        try:
            found[section][name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{value!r} is not a value", where=f"--probe {path}") from error
    return found
