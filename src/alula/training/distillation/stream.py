"""A mixture whose samples with media hold, for a share of them, a text turn of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from alula.data import BadSampleError, Collator, Mixture, RecordError, Window
from alula.data.samples import MEDIA, Sample, message_text, text_part
from alula.draws import mixed
from alula.errors import RecipeError
from alula.training.distillation.lessons import Lessons

Messages = list[dict[str, Any]]
_BITS = 2**64
_GLANCES = 256
"""samples that are looked at for one with media"""
_HOLD, _LESSON, _ORDER = range(3)


class HeldMixture:
    """Samples of a mixture by position, some with a text question and its soft-labelled answer.

    The question stands behind the sample's own turns, or between its media and its first question, one as often as the
    other where both are possible. What a position holds is a function of the seed and the position, as in the mixture.
    Samples without media are left as they are.

    Args:
        mixture: what a stage learns from.
        lessons: the teacher's.
        share: of the samples with media that hold a text turn.
        seed: another seed, other questions at other places.
        orders: how questions may stand: out of `ORDERS`.
    """

    def __init__(
        self, mixture: Mixture, lessons: Lessons, *, share: float, seed: int, orders: Sequence[str] | None = None
    ) -> None:
        self.mixture, self.lessons, self.share, self.seed = mixture, lessons, share, seed
        self.orders = tuple(ORDERS if orders is None else orders)

    def __getitem__(self, position: int) -> Sample:
        return self._held(self.mixture[position])

    def replacement(self, position: int, attempt: int = 1) -> Sample:
        """See `Mixture.replacement`."""
        return self._held(self.mixture.replacement(position, attempt))

    def window(self, length: int, start: int = 0) -> Window:
        """Positions ``start .. start + length - 1`` as a dataset with an end."""
        return Window(self, length, start)

    def fitting(self, collate: Collator, where: str) -> HeldMixture:
        """The same with the orders in which the model's template writes an answer as it writes it by itself.

        Some templates write the last answer of a conversation otherwise than earlier ones.

        Args:
            collate: the stage's, which raises what is wrong with a sample.
            where: the section of the recipe, for errors.

        Raises:
            RecipeError: no sample with media is met, or no order fits.
        """
        shown = next((found for found in map(partial(self._glance, collate), range(_GLANCES)) if found), None)
        if shown is None:
            raise RecipeError(
                f"none of the first {_GLANCES} samples shows anything, so no text would stand behind it",
                where=where,
                remedy="leave it out; text is kept by `data.text_replay`",
            )
        fitting, fault = [], None
        for order, place in ORDERS.items():
            messages = place(shown.messages, self.lesson(0))
            if messages is not None:
                try:
                    collate([replace(shown, messages=messages)])
                except RecordError as error:
                    fault = error
                else:
                    fitting.append(order)
        if not fitting:
            raise RecipeError(
                f"no text turn can be put into {shown.place or shown.id}" + (f": {fault.message}" if fault else ""),
                where=where,
                remedy="keep text by `data.text_replay` instead",
            )
        return HeldMixture(self.mixture, self.lessons, share=self.share, seed=self.seed, orders=fitting)

    def _glance(self, collate: Collator, position: int) -> Sample | None:
        """The sample at a position, where it can be read and shows something."""
        try:
            sample = self.mixture[position]
            if not sample.media():
                return None
            collate([sample])
        except BadSampleError:
            return None
        return sample

    def _held(self, sample: Sample) -> Sample:
        assert sample.position is not None
        if mixed(self.seed, _HOLD, sample.position) >= self.share * _BITS or not sample.media():
            return sample
        index = mixed(self.seed, _LESSON, sample.position) % len(self.lessons)
        first = mixed(self.seed, _ORDER, sample.position)
        for turn in range(len(self.orders)):
            placed = ORDERS[self.orders[(first + turn) % len(self.orders)]](sample.messages, self.lesson(index))
            if placed is not None:
                return replace(sample, messages=placed)
        return sample

    def lesson(self, index: int) -> Messages:
        """A question and its answer as turns."""
        question, answer = self.lessons.questions[index], self.lessons.answers[index]
        return [
            {"role": "user", "content": [text_part(question)]},
            {"role": "assistant", "content": [text_part(answer)], "soft": self.lessons.labels(index)},
        ]


def behind(messages: Messages, lesson: Messages) -> Messages | None:
    """The lesson after the conversation; None where that does not end with an answer."""
    return [*messages, *lesson] if messages[-1]["role"] == "assistant" else None


def between(messages: Messages, lesson: Messages) -> Messages | None:
    """The lesson between the media of the first user turn and its text; None where one of the two is not there."""
    first = next(number for number, message in enumerate(messages) if message["role"] == "user")
    turn = messages[first]
    media = [part for part in turn["content"] if part["type"] in MEDIA]
    words = [part for part in turn["content"] if part["type"] not in MEDIA]
    # media and text that take turns in one message belong together
    if not media or not message_text(turn).strip() or [*media, *words] != [*turn["content"]]:
        return None
    asked = {**lesson[0], "content": [*media, *lesson[0]["content"]]}
    return [*messages[:first], asked, *lesson[1:], {**turn, "content": words}, *messages[first + 1 :]]


ORDERS: dict[str, Callable[[Messages, Messages], Messages | None]] = {"behind": behind, "between": between}
