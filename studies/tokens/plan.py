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
    "placed-128": {"vq": {"size": 128, "grid": 3, "patch": 14, "places": True}},
    "vq-25": {"vq": {"size": 128, "grid": 5, "patch": 8}},
    "vq-128": {"vq": {"size": 128, "grid": 3, "patch": 14}},
    "vq-512": {"vq": {"size": 512, "grid": 3, "patch": 14}},
    "sound-256": {"vq": {"kind": "audio", "size": 256, "spectra": 16, "places": True}},
}
"""tokenizers by name: k-means of the fledgling's tower and of one of its shape with random weights (25 codes a
picture), VQ autoencoders of pictures (25, or 9) and of sounds (10); placed: every place has codes of its own"""
ARMS: dict[str, dict[str, str]] = {
    "placed-128": {"image": "placed-128"},
    "vq-128": {"image": "vq-128"},
    "two": {"seen": "tower-128", "drawn": "placed-128"},
    "sound-256": {"audio": "sound-256"},
    "tower-128": {"image": "tower-128"},
    "vq-512": {"image": "vq-512"},
    "vq-25": {"image": "vq-25"},
    "tower-32": {"image": "tower-32"},
    "untrained-128": {"image": "untrained-128"},
}
"""which tokenizer is read and which is written"""
SOUNDS = ("sound-256",)
"""those of sounds"""
SOURCES: dict[str, dict[str, Any]] = {
    "image": {"microworld": "caption", "families": ["caption"]},
    "audio": {"microworld": "sound_caption"},
}
_SIDE, _BATCH, _ALIGNED, _WRITE, _RATE = 40, 16, 0.1, 0.75, 2e-2


def kind_of(name: str) -> str:
    """What an arm or a tokenizer is of: "image" or "audio"."""
    return "audio" if name in SOUNDS else "image"


@dataclass(frozen=True)
class TokensPlan(MeasuredPlan):
    """The fledgling's language model with TEAL, by tokenizer.

    Attributes:
        arms: names of `ARMS`.
        training: optimizer steps of both stages together, a tenth of them of the first, before the factor `steps`.
        fitting: steps of VQ autoencoders and painters, likewise.
        pictures: that tokenizers are fitted on; as many sounds.
        items: held-out captions and their pictures or sounds.
        task_seed: of these.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    training: int = 280
    fitting: int = 600
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
            "write": _WRITE,
            "rate": _RATE,
        }

    def codes_of(self, arm: str) -> list[str]:
        """The tokenizers of an arm."""
        return list(ARMS[arm].values())

    def codes_directory(self, seed: int, name: str) -> Path:
        """Where a tokenizer of a seed is kept."""
        return self.own.seed_directory(seed) / "codes" / name

    def measurement(self, seed: int, arm: str) -> Path:
        """Where what was measured of an arm is kept."""
        return self.measured(seed) / f"{arm}.json"

    def fitted(self, seed: int, name: str) -> CodesRecipe:
        """The recipe of a tokenizer."""
        steps = max(1, round(self.fitting * self.steps))
        raw: dict[str, Any] = {
            "output_dir": str(self.codes_directory(seed, name)),
            "seed": seed,
            "kind": kind_of(name),
            "source": {**SOURCES[kind_of(name)], "seed": 1000 + seed},
            "items": self.pictures,
        }
        chosen = CODES[name]
        if "vq" in chosen:
            raw["vq"] = {**chosen["vq"], "width": 16, "hidden": 64, "steps": steps}
        else:
            painter = {"side": _SIDE, "steps": steps, "hidden": 64}
            raw["k_means"] = {"encoder": "fledgling", **chosen["k_means"], "painter": painter}
        return CodesRecipe.model_validate(raw)

    def tuning(self, seed: int, arm: str) -> Recipe:
        """The recipe of an arm: the same data, rates and steps for all of a kind."""
        count = max(2, round(self.training * self.steps))
        aligned = max(1, round(_ALIGNED * count))
        codes = {name: str(self.codes_directory(seed, each)) for name, each in ARMS[arm].items()}
        common: dict[str, Any] = {
            "method": "teal",
            "data": {"sources": [SOURCES[kind_of(arm)]]},
            "batch_size": _BATCH,
            "save_every": 10**6,
        }
        first = {"teal.projections": _RATE}
        rates = {**first, "teal.embeddings": _RATE, "teal.bias_norm": _RATE}
        stages = [
            {**common, "name": "align", "train": first, "teal": {"codes": codes, "write": _WRITE}, "steps": aligned},
            {**common, "name": "tune", "train": rates, "teal": {"write": _WRITE}, "steps": count - aligned},
        ]
        ears = {"audio": "fledgling"} if arm in SOUNDS else {}
        return Recipe.model_validate(
            {
                "name": f"tokens-{arm}",
                "seed": seed,
                "output_dir": str(self.own.run_directory(seed, arm)),
                "host": {"llm": "fledgling", "vision": "fledgling", **ears},
                "stages": stages,
            }
        )
