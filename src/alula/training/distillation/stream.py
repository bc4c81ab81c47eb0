"""A mixture whose samples with media hold, for a share of them, a text turn of the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from alula.data import BadSampleError, Collator, Mixture, RecordError, Window
from alula.data.samples import MEDIA, Sample, message_text, text_part, user
from alula.draws import mixed
from alula.errors import RecipeError
from alula.training.distillation.lessons import Lessons
from alula.training.recipe import Distill

Messages = list[dict[str, Any]]
_BITS = 2**64
_GLANCES = 256
"""samples that are looked at for one with media"""
_HOLD, _LESSON = range(2)


class HeldMixture:
    """Samples of a mixture by position, some with a text question and its soft-labelled answer.

    What a position holds is a function of the seed and the position, as in the mixture. Samples without media, and
    those in whose turns there is no such place, are left as they are.

    Args:
        mixture: what a stage learns from.
        lessons: the teacher's.
        spec: which share of the samples with media hold a text turn, and where it stands.
        seed: another seed, other questions at other places.
    """

    def __init__(self, mixture: Mixture, lessons: Lessons, *, spec: Distill, seed: int) -> None:
        self.mixture, self.lessons, self.share, self.seed = mixture, lessons, spec.share, seed
        self.order = spec.order

    def __getitem__(self, position: int) -> Sample:
        return self._held(self.mixture[position])

    def replacement(self, position: int, attempt: int = 1) -> Sample:
        """See `Mixture.replacement`."""
        return self._held(self.mixture.replacement(position, attempt))

    def window(self, length: int, start: int = 0) -> Window:
        """Positions ``start .. start + length - 1`` as a dataset with an end."""
        return Window(self, length, start)

    def check(self, collate: Collator, where: str) -> None:
        """Refuse a stage in which no text turn would stand, or not as the teacher spoke.

        Some templates write the last answer of a conversation otherwise than earlier ones.

        Args:
            collate: the stage's, which raises what is wrong with a sample.
            where: the section of the recipe, for errors.

        Raises:
            RecipeError: no sample with media is met in which a text turn has a place, or the template writes its answer
                otherwise there.
        """
        shown = next((found for found in map(partial(self._glance, collate), range(_GLANCES)) if found), None)
        if shown is None:
            raise RecipeError(
                f"none of the first {_GLANCES} samples shows anything and has a place for a text turn",
                where=where,
                remedy="leave it out; text is kept by `data.text_replay`",
            )
        try:
            collate([shown])
        except RecordError as error:
            raise RecipeError(
                f"no text turn can be put into {shown.place or shown.id}: {error.message}",
                where=where,
                remedy="order: behind" if self.order != "behind" else "keep text by `data.text_replay` instead",
            ) from error

    def _glance(self, collate: Collator, position: int) -> Sample | None:
        """The sample at a position with a text turn, where it can be read and there is a place for one."""
        try:
            sample = self.mixture[position]
            placed = self._placed(sample, 0) if sample.media() else None
            if placed is not None:
                collate([sample])
        except BadSampleError:
            return None
        return placed

    def _held(self, sample: Sample) -> Sample:
        assert sample.position is not None
        if mixed(self.seed, _HOLD, sample.position) >= self.share * _BITS or not sample.media():
            return sample
        return self._placed(sample, mixed(self.seed, _LESSON, sample.position) % len(self.lessons)) or sample

    def _placed(self, sample: Sample, index: int) -> Sample | None:
        messages = ORDERS[self.order](sample.messages, self.lesson(index))
        return None if messages is None else replace(sample, messages=messages)

    def lesson(self, index: int) -> Messages:
        """A question and its answer as turns."""
        question, answer = self.lessons.questions[index], self.lessons.answers[index]
        return [
            user(question),
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
