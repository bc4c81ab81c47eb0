"""What a compression is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.chat_template import TemplateSettings
from alula.compress import Removal, WeightPruning
from alula.errors import UsageError
from alula.settings import Bool, Int, Number, Settings, checked_budget

Kind = Literal["weights", "mlp", "heads", "blocks"]

BUDGETS = {
    "retention": "right answers to questions of text, over those of the model as it was",
    "visual": "right answers to questions about images (films, sounds), over those of the model as it was",
}
"""what a budget may ask for, each at least so much"""
_STEP = 0.05
MOST = 0.9
"""the largest share that is tried where nothing says it"""
SAMPLES = 128
"""conversations that scores are taken from where nothing says it"""

_PARTS = {"mlp": "MLP channels", "heads": "key heads", "blocks": "blocks"}


@dataclass(frozen=True)
class Amount:
    """How much goes.

    Attributes:
        name: for people, unique within a plan.
        share: of weights or parts.
        settings: that do it.
    """

    name: str
    share: float
    settings: WeightPruning | Removal


class Plan(Settings):
    """The settings of a compression.

    Args:
        output: directory for what is tried, for the model, its masks and the report; a later call with the same
            settings goes on there.
        model: a directory or hub id; a host, or a text LLM.
        kind: what goes: single "weights" (set to zero), "mlp" channels, attention "heads", or whole "blocks".
        sparsity: the share that goes; with a budget, the most that is tried.
        budget: what has to be kept, by the names of `BUDGETS`; None: `sparsity` decides.
        step: what amounts of weights and channels are multiples of, with a budget.
        method: by what is chosen what goes, see `alula.compress.WeightPruning` and `Removal`.
        pattern: "2:4" or "4:8", of weights.
        targets: of weights: "attention", "mlp" or names of linear modules.
        tokens: whose inputs count.
        coded: save the model without its zeros (`alula.compress.encode`).
        data: the user's conversations, of text and with images; the last assistant turn is the reference answer. Some
            are calibrated on, others asked. Where None, the questions that come with the model.
        images: the folder relative image paths of ``data`` start from.
        calibration: conversations to calibrate on.
        items: of ``data`` so many conversations are asked; of questions that come with the model, so many of each task.
        batch_size: prompts per forward.
        max_new_tokens: bounds an answer to ``data``.
        dtype: of the weights, by name; None keeps the checkpoint's.
        seed: draws what is calibrated on and asked.
        template: variables for chat templates beside the messages.

    Raises:
        UsageError: a number out of bounds, or settings that mean nothing together.
    """

    output: Path
    model: str
    kind: Kind = "weights"
    sparsity: Number | None = Field(default=None, gt=0, lt=1)
    budget: Mapping[str, Number] | None = None
    step: Number = Field(default=_STEP, gt=0, lt=1)
    method: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    pattern: Literal["2:4", "4:8"] | None = None
    targets: tuple[str, ...] | None = None
    tokens: str = "all"
    coded: Bool = False
    data: Path | None = None
    images: Path | None = None
    calibration: Int | None = Field(default=None, ge=1, le=MAX_ITEMS)
    items: Int = Field(default=400, ge=1, le=MAX_ITEMS)
    batch_size: Int = Field(default=16, ge=1, le=MAX_ITEMS)
    max_new_tokens: Int = Field(default=64, ge=1, le=65536)
    dtype: str | None = None
    seed: Int = Field(default=0, ge=0, le=MAX_SEED)
    template: Mapping[str, Any] = {}

    @classmethod
    def named(cls, path: str) -> str:
        """Settings are called as `alula compress` calls them in errors."""
        return f"--{path.replace('_', '-')}" if path else "alula compress"

    @field_validator("budget")
    @classmethod
    def _known(cls, budget: Mapping[str, float] | None) -> Mapping[str, float] | None:
        return None if budget is None else checked_budget(budget, BUDGETS)

    @model_validator(mode="after")
    def _possible(self) -> Plan:
        TemplateSettings(self.template)  # refuses what is none
        if self.sparsity is None and self.budget is None and self.pattern is None:
            raise ValueError("say how much: --sparsity 0.5, --budget retention:0.99,visual:0.98, or both")
        if self.pattern is not None and self.sparsity is not None:
            raise ValueError("--pattern and --sparsity both say how much goes; give one")
        if self.kind != "weights":
            given = {"--pattern": self.pattern, "--targets": self.targets, "--coded": self.coded or None}
            if own := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{own[0]} is of --kind weights; {_PARTS[self.kind]} are taken out as they are")
            if self.method == "sparsegpt":
                raise ValueError("--method sparsegpt is of --kind weights; give --method wanda or magnitude")
        if self.images is not None and self.data is None:
            raise ValueError("--images is where pictures of --data are, and no --data is given")
        if self.calibration is not None and self.method == "magnitude":
            raise ValueError("--calibration has no effect: magnitude looks at no data")
        if self.step != _STEP and (self.budget is None or self.pattern is not None or self.kind in ("heads", "blocks")):
            why = "nothing is searched without --budget" if self.budget is None else "amounts are whole parts, or one"
            raise ValueError(f"--step has no effect: {why}")
        if self.budget is not None and self.step > self.most:
            raise ValueError(f"--step {self.step:g} is more than the most that is tried, {self.most:g}")
        try:
            self._settings(self.most)
        except UsageError as error:
            raise ValueError(error.message) from None
        return self

    @property
    def most(self) -> float:
        """The largest share that is tried."""
        return self.sparsity or MOST

    @property
    def needs_data(self) -> bool:
        """Whether it is calibrated."""
        return self.method != "magnitude"

    @property
    def told(self) -> TemplateSettings:
        """The settings of templates."""
        return TemplateSettings(self.template)

    def facts(self) -> dict[str, Any]:
        """All that decides what an amount comes to, as JSON values."""
        values = {**self.model_dump(), "template": dict(self.told.arguments)}
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        return {
            key: value for key, value in facts.items() if key not in ("output", "budget", "sparsity", "step", "coded")
        }

    def amounts(self, *, layers: int, key_heads: int) -> list[Amount]:
        """What may be tried, the least first; one where there is no budget."""
        if self.pattern is not None:
            return [Amount(f"pattern {self.pattern}", 0.5, self._settings(0.5))]
        if self.kind in ("weights", "mlp"):
            steps = int(self.most / self.step + 1e-9)
            shares = [round(self.step * (number + 1), 6) for number in range(steps)]
            shares = [*(share for share in shares if share < self.most - 1e-9), self.most]
            what = "weights" if self.kind == "weights" else _PARTS["mlp"]
            names = [f"{100 * share:.4g} % of {what}" for share in shares]
        else:
            there = key_heads if self.kind == "heads" else layers
            counts = range(1, 1 + min(there - 1, int(there * self.most + 1e-9)))
            shares = [count / there for count in counts]
            names = [f"{count} of {there} {_PARTS[self.kind]}" for count in counts]
        found = [Amount(name, share, self._settings(share, layers)) for name, share in zip(names, shares, strict=True)]
        return found if self.budget is not None else found[-1:]

    def _settings(self, share: float, layers: int = 1) -> WeightPruning | Removal:
        chosen: dict[str, Any] = {"method": self.method, "tokens": self.tokens}
        if self.kind == "weights":
            chosen |= {"sparsity": share} if self.pattern is None else {"pattern": self.pattern}
            if self.targets is not None:
                chosen["targets"] = self.targets
            return WeightPruning(**chosen)
        # a share of so many heads is rounded down: a hair more, so that it is not one less
        amount: dict[str, Any] = {"mlp": share, "heads": share + 1e-9, "blocks": max(1, round(share * layers))}
        return Removal(**chosen, **{self.kind: amount[self.kind]})
