"""What a measurement of speed is to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.chat_template import TemplateSettings
from alula.settings import Int, Number, Settings, checked_budget
from alula.speed.grid import Candidate, read_grid

BUDGETS = {
    "agreement": "the share of whole answers that are the model's own, token for token",
    "accuracy": "the share of answers that are right",
    "retention": "the share that is right, over that of the model without a policy",
}
"""what a budget may ask for, each at least so much"""


class Plan(Settings):
    """The settings of a measurement.

    Args:
        output: directory for what is measured and for the report; a later call with the same settings goes on there.
        model: a directory or hub id; any image host alula can load, adapters included.
        data: the user's conversations with images; the last user turn is asked, and an assistant turn behind it is the
            reference answer. Where None, the questions that come with the model, or else drawn pictures.
        images: the folder relative image paths of ``data`` start from.
        grid: a file of policies to measure, see `read_grid`; where None, `default_grid`.
        samples: questions asked.
        rounds: of timing, each a plain pass beside one under the policy.
        timed: batches that are timed in each round, evenly spaced over their lengths.
        steps: tokens generated behind each prompt where time is taken.
        batch_size: prompts per forward.
        max_new_tokens: bounds an answer.
        budget: what the recommended policy has to keep, by the names of `BUDGETS`. It decides nothing that is measured.
        dtype: of the weights, by name; None keeps the checkpoint's.
        seed: draws the questions that come with the model, and pictures.
        template: variables for chat templates beside the messages, see `alula.chat_template.TemplateSettings`.

    Raises:
        UsageError: a number out of bounds, an unknown key of the budget, or a grid that cannot be read.
    """

    output: Path
    model: str
    data: Path | None = None
    images: Path | None = None
    grid: Path | None = None
    samples: Int = Field(default=64, ge=1, le=MAX_ITEMS)
    rounds: Int = Field(default=5, ge=1, le=1000)
    timed: Int = Field(default=2, ge=1, le=MAX_ITEMS)
    steps: Int = Field(default=16, ge=2, le=4096)
    batch_size: Int = Field(default=8, ge=1, le=MAX_ITEMS)
    max_new_tokens: Int = Field(default=64, ge=1, le=65536)
    budget: Mapping[str, Number] = {"agreement": 0.98}
    dtype: str | None = None
    seed: Int = Field(default=0, ge=0, le=MAX_SEED)
    template: Mapping[str, Any] = {}

    @classmethod
    def named(cls, path: str) -> str:
        """Settings are called as `alula speed` calls them in errors."""
        return f"--{path.replace('_', '-')}" if path else "alula speed"

    @field_validator("budget")
    @classmethod
    def _known(cls, budget: Mapping[str, float]) -> Mapping[str, float]:
        if not budget:
            raise ValueError("nothing is asked for: agreement:0.98, for one")
        return checked_budget(budget, BUDGETS)

    @model_validator(mode="after")
    def _possible(self) -> Plan:
        TemplateSettings(self.template)  # refuses what is none
        if self.images is not None and self.data is None:
            raise ValueError("--images is where pictures of --data are, and no --data is given")
        return self

    @property
    def told(self) -> TemplateSettings:
        """The settings of templates."""
        return TemplateSettings(self.template)

    def candidates(self) -> list[Candidate] | None:
        """The user's own policies, or None."""
        return None if self.grid is None else read_grid(self.grid)

    def facts(self) -> dict[str, Any]:
        """All that decides the figures, as JSON values."""
        values = {**self.model_dump(), "template": dict(self.told.arguments)}
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        own = self.candidates()
        facts["grid"] = None if own is None else {each.name: each.settings() for each in own}
        return {key: value for key, value in facts.items() if key not in ("output", "budget")}
