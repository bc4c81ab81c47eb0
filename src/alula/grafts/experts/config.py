"""Settings of experts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from alula.grafts.base import GraftConfig
from alula.settings import Int, Number


class ExpertsConfig(GraftConfig):
    """Which matrices have experts, of which rank, and for which tokens.

    Attributes:
        tokens: "image": tokens of images, videos and audio, as in CogVLM's visual expert (arXiv 2311.03079), while text
            goes through the base's own weights; "seen": every token at or behind the first of those in its sample, a
            LoRA that is gated by modality; "turn": from one of those on to the user's next turn, the answer included,
            so that turns without an image go through the base's own weights (needs roles, see `Role`); "both": two
            experts of these settings, one for the tokens of images, videos and audio and one for text at or behind the
            first of them, so that no token has two.
        rank: width of an expert's low-rank factors; None: a full matrix per linear.
        alpha: the low-rank product is scaled by ``alpha / rank``, as in LoRA (arXiv 2106.09685); without effect, and
            refused, where ``rank`` is None.
        targets: "attention" and "mlp", all linear modules there, or names of some, such as "up_proj". Each has to mean
            something in one of the layers, not in all: hybrids and mixtures of experts have layers of several kinds.
            Routers get none unless they are named, and experts of a mixture that are fused into one tensor get none.
        layers: decoder layers that get experts, negative ones counted from the last; None: all.
        dropout: on what the factors down are given, in training.
    """

    graft_type: ClassVar[str] = "experts"
    free: ClassVar[tuple[str, ...]] = ("dropout",)

    tokens: Literal["image", "seen", "turn", "both"] = "image"
    rank: Int | None = Field(default=64, ge=1, le=2**16)
    alpha: Number | None = Field(default=None, gt=0, le=2**16)
    targets: tuple[str, ...] = ("attention", "mlp")
    layers: tuple[Int, ...] | None = None
    dropout: Number = Field(default=0.0, ge=0, lt=1)

    @property
    def count(self) -> int:
        """How many experts a linear has."""
        return 2 if self.tokens == "both" else 1

    @property
    def scale(self) -> float:
        """Factor on the low-rank product."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    @field_validator("targets", "layers")
    @classmethod
    def _some(cls, named: tuple[str | int, ...] | None) -> tuple[str | int, ...] | None:
        if named is not None and not named:
            raise ValueError("it is empty; name some")
        if named is not None and len(set(named)) < len(named):
            raise ValueError("one is listed twice")
        return named

    @field_validator("alpha")
    @classmethod
    def _of_factors(cls, alpha: float | None, others: object) -> float | None:
        if alpha is not None and getattr(others, "data", {}).get("rank") is None:
            raise ValueError("it scales low-rank factors, and rank is None")
        return alpha
