"""What a demonstration is: a picture, what is asked about it, and what is answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from PIL import Image

from alula.data import message_text
from alula.errors import UsageError
from alula.inputs.intake import fingerprint_image


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One example of a task.

    Attributes:
        picture: decoded, RGB.
        question: the label text before the answer.
        answer: the label text.
    """

    picture: Image.Image
    question: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            if not getattr(self, name).strip():
                raise UsageError("a demonstration needs words", where=name)

    def messages(self, *, picture: bool = True) -> list[dict[str, Any]]:
        """A user turn and an assistant turn, with or without the picture."""
        shown = [{"type": "image", "image": self.picture}] if picture else []
        return [*turns(self.question, self.answer, shown)]

    def fingerprint(self) -> str:
        """Of the picture: sha256 (hex) of its size and content (`fingerprint_image`)."""
        return fingerprint_image(self.picture)


def turns(question: str, answer: str, shown: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The two turns of a demonstration, ``shown`` before the question."""
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def demonstrations_in(messages: Sequence[Mapping[str, Any]]) -> Iterator[Demonstration]:
    """The demonstrations that a conversation holds: each answer to a question that shows one picture.

    Turns without a picture, or with several, or other media, are none.

    Args:
        messages: content in lists of parts; images decoded, or references to them (`alula.data.ImageRef`).
    """
    for asked, answered in pairwise(messages):
        if (asked["role"], answered["role"]) != ("user", "assistant"):
            continue
        media = [part for part in asked["content"] if part["type"] != "text"]
        question, answer = message_text(asked), message_text(answered)
        if [part["type"] for part in media] == ["image"] and question.strip() and answer.strip():
            image = media[0]["image"]
            picture = image if isinstance(image, Image.Image) else image.load()
            yield Demonstration(picture.convert("RGB"), question.strip(), answer.strip())
