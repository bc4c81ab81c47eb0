"""A budget: so many tokens of every image, or of all images of a request, whatever their size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from alula.errors import UsageError
from alula.policies.base import Policy, Stand
from alula.policies.criteria import Contextual, Criteria, Group, Merge, Per, Pooling, check_merge
from alula.policies.registry import register
from alula.policies.stages import Positions, Stages
from alula.settings import Int


@register
class Budget(Policy):
    """Exactly so many tokens of an image (video, sound) stay, or of all those of a request; of fewer, all.

        Budget(image_tokens=144)                                      # every image pooled to 144 tokens
        Budget(image_tokens=640, per="request", by="grid")            # 640 of all images of a prompt, evenly spaced
        Budget(image_tokens=64, by="last_query_attention", layer=2)   # FastV with a fixed number

    Attributes:
        image_tokens: how many.
        by: what meets it: a criterion (see `criteria`).
        layer: the first layer, counted from 0, that those which leave are not in; None: the first one possible, 0, or 1
            where attention is read in the layer before.
        per: whose they are. Those of a request are divided among its images in proportion where the criterion goes by
            places within one, and else compete with one another.
        merge: those that leave are merged into those that stay (see `criteria.merging`); None: they are gone.
        positions: of those that stay, and of text: see `Prune`.
    """

    policy_type: ClassVar[str] = "budget"
    image_tokens: Int = Field(gt=0)
    by: Criteria = Pooling()
    layer: Int | None = None
    per: Per = "image"
    merge: Merge | None = None
    positions: Positions = "keep"

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        check_merge(self.merge, self.by)
        if isinstance(self.merge, Contextual) and not self.merge.places(self.image_tokens):
            raise ValueError(f"of {self.image_tokens} tokens that stay, none is one that others are merged into")
        return self

    @property
    def concerns_text(self) -> bool:
        return False

    def place(self, stand: Stand) -> None:
        layer = int(self.by.reads_before) if self.layer is None else self.layer
        Stages([(layer, self.by)], self._wanted, self.per, stand.owner, self.merge, self.positions).place(stand)

    def _wanted(self, stage: int, groups: Sequence[Group]) -> list[int]:
        if self.per == "image" or not self.by.is_of_images:
            return [min(self.image_tokens, group.size) for group in groups]
        counts = defaultdict(list)
        for group in groups:
            counts[group.sample].append(group.size)
        return [wanted for sample, each in counts.items() for wanted in self._divided(sample, each)]

    def _divided(self, sample: int, counts: list[int]) -> list[int]:
        """The budget among the images of a request, in proportion and at least one for each."""
        total, budget = sum(counts), min(self.image_tokens, sum(counts))
        if budget < len(counts):
            raise UsageError(
                f"prompt {sample} has {len(counts)} images, more than the {budget} tokens they may have together",
                where="image_tokens",
                remedy="give at least one per image",
            )
        shares = [max(1, budget * count // total) for count in counts]
        by_rest = sorted(range(len(counts)), key=lambda i: budget * counts[i] / total - shares[i])
        while sum(shares) > budget:  # of many small images, whose one token is more than their part
            shares[next(i for i in by_rest if shares[i] > 1)] -= 1
        for i in reversed(by_rest):
            shares[i] += sum(shares) < budget
        return shares
