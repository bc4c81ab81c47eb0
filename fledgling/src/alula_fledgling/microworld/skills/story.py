"""A few sentences and what can be asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange


@dataclass(frozen=True)
class Story:
    """What is told, and the questions it answers.

    Attributes:
        text: the sentences.
        questions: at least one; none needs the answer of another.
    """

    text: str
    questions: Sequence[Exchange]

    def asked(self, draw: Draw, most: int = 1) -> tuple[Exchange, ...]:
        """Tell it and ask 1 to ``most`` of the questions, one a turn; the first turn holds the sentences."""
        first, *more = draw.sample(self.questions, draw.between(1, min(most, len(self.questions))))
        return (Exchange(f"{self.text} {first.question}", first.answer), *more)
