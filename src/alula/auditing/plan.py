"""What an audit is to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alula.auditing.sections import SECTIONS, Measurement, Questions
from alula.bounds import check_count, check_seed
from alula.chat_template import TemplateSettings
from alula.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Plan:
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
    samples: int = 128
    items: int = 200
    sections: tuple[str, ...] = tuple(SECTIONS)
    controls: bool = True
    batch_size: int = 8
    dtype: str | None = None
    seed: int = 0
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.sections if name not in SECTIONS]
        if unknown or not self.sections:
            raise UsageError(
                f"there is no section {unknown[0]!r}" if unknown else "no section was chosen",
                where="--sections",
                remedy=f"choose among {', '.join(SECTIONS)}",
            )
        for name in ("samples", "items", "batch_size"):
            check_count(getattr(self, name), f"--{name.replace('_', '-')}")
        check_seed(self.seed, "--seed")
        TemplateSettings(self.template)  # refuses what is none
        for name in self.probes:
            if name not in self.measurements:
                raise UsageError(
                    f"there are settings for {name!r}, which is not measured",
                    where="probes",
                    remedy=f"sections with probes: {', '.join(self.measurements)}",
                )
        if self.base is not None and not self.questions:
            raise UsageError("a base is compared by its text answers only", where="--base", remedy="add section text")

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
        values = {**asdict(self), "template": dict(self.told.arguments)}
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
