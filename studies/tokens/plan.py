"""What the study of tokenizers fits, trains and asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.training.codes import CodesRecipe
from alula.training.recipe import Recipe
from studies.plan import MeasuredPlan

CODES: dict[str, dict[str, Any]] = {
    "tower-128": {"k_means": {"size": 128}},
    "tower-32": {"k_means": {"size": 32}},
    "untrained-128": {"k_means": {"size": 128, "random": True}},
    "vq-128": {"vq": {"size": 128}},
    "vq-512": {"vq": {"size": 512}},
}
"""tokenizers by name: k-means of the fledgling's tower, of one of its shape with random weights, VQ autoencoders; all
have 25 codes a picture"""
ARMS: dict[str, dict[str, str]] = {
    **{name: {"image": name} for name in CODES},
    "two": {"seen": "tower-128", "drawn": "vq-128"},
}
"""which tokenizer is read and which is written"""
_SIDE, _BATCH, _ALIGNED = 40, 16, 0.25


@dataclass(frozen=True)
class TokensPlan(MeasuredPlan):
    """The fledgling's language model with TEAL, by tokenizer.

    Attributes:
        arms: names of `ARMS`.
        training: optimizer steps of both stages together, a quarter of them of the first, before the factor `steps`.
        fitting: steps of VQ autoencoders and painters, likewise.
        pictures: that tokenizers are fitted on.
        items: held-out captions and their pictures.
        task_seed: of these.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    training: int = 160
    fitting: int = 300
    pictures: int = 800
    items: int = 48
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.items, "items")
        check_count(self.training, "training")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "tokens",
            "training": self.training,
            "fitting": self.fitting,
            "pictures": self.pictures,
            "items": self.items,
            "task_seed": self.task_seed,
        }

    def codes_of(self, arm: str) -> list[str]:
        """The tokenizers of an arm."""
        return list(ARMS[arm].values())

    def codes_directory(self, seed: int, name: str) -> Path:
        """Where a tokenizer of a seed is kept."""
        return self.own.seed_directory(seed) / "codes" / name

    def fitted(self, seed: int, name: str) -> CodesRecipe:
        """The recipe of a tokenizer."""
        steps = max(1, round(self.fitting * self.steps))
        raw: dict[str, Any] = {
            "output_dir": str(self.codes_directory(seed, name)),
            "seed": seed,
            "source": {"microworld": "caption", "families": ["caption"], "seed": 1000 + seed},
            "items": self.pictures,
        }
        chosen = CODES[name]
        if "vq" in chosen:
            raw["vq"] = {**chosen["vq"], "width": 16, "grid": 5, "patch": 8, "hidden": 64, "steps": steps}
        else:
            painter = {"side": _SIDE, "steps": steps, "hidden": 64}
            raw["k_means"] = {"encoder": "fledgling", **chosen["k_means"], "painter": painter}
        return CodesRecipe.model_validate(raw)

    def tuning(self, seed: int, arm: str) -> Recipe:
        """The recipe of an arm: the same data, rates and steps for all."""
        count = max(2, round(self.training * self.steps))
        aligned = max(1, round(_ALIGNED * count))
        codes = {name: str(self.codes_directory(seed, each)) for name, each in ARMS[arm].items()}
        common: dict[str, Any] = {
            "method": "teal",
            "data": {"sources": [{"microworld": "caption", "families": ["caption"]}]},
            "batch_size": _BATCH,
            "save_every": 10**6,
        }
        first = {"teal.projections": 3e-3}
        rates = {**first, "teal.embeddings": 3e-3, "teal.bias_norm": 5e-3}
        stages = [
            {
                **common,
                "name": "align",
                "train": {"teal.projections": 3e-3},
                "teal": {"codes": codes},
                "steps": aligned,
            },
            {**common, "name": "tune", "train": rates, "steps": count - aligned},
        ]
        return Recipe.model_validate(
            {
                "name": f"tokens-{arm}",
                "seed": seed,
                "output_dir": str(self.own.run_directory(seed, arm)),
                "host": {"llm": "fledgling", "vision": "fledgling"},
                "stages": stages,
            }
        )
