"""Which tokens of a prompt hold a piece of text: told by the tokenizer's own decoding, token by token.

A prompt is read as its tokens are decoded; every token of a medium is one character that no text holds. So what is
found are tokens of the very ids that the model is given, whatever a processor put between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from alula.errors import UsageError
from alula.settings import Number, check_fields

MEDIUM = "\ufffc"
"""stands for one token of an image, film or sound"""


@dataclass(frozen=True)
class Span:
    """A piece of a prompt's text. Tokens that it covers in part belong to it.

    Attributes:
        text: as it stands there; None: all of the message named, or the characters named.
        index: which occurrence of the text, from 0, negative ones from the last; None: every one.
        start, stop: characters, counted from the start of the message's part, or of the prompt as its ids decode.
        message: index of the message it is in; None: anywhere in the prompt.
        part: index of the part of that message; None: in any of its texts.
        weight: in (-1 to 1) times the strength; negative turns away.
    """

    text: str | None = None
    index: int | None = None
    start: int | None = None
    stop: int | None = None
    message: int | None = None
    part: int | None = None
    weight: Number = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_weight(self, self.weight)
        has_places = self.start is not None or self.stop is not None
        if self.text is not None and has_places:
            raise UsageError("a span is told by its text or by its characters, not by both", where="Span")
        if self.text is None and self.index is not None:
            raise UsageError("index says which occurrence of a text, and no text is given", where="Span.index")
        if self.part is not None and self.message is None:
            raise UsageError("a part is one of a message, and no message is given", where="Span.part")
        if self.text is None and not has_places and self.message is None:
            raise UsageError("an empty span", where="Span", remedy="give a text, characters (start, stop) or a message")
        if self.text is not None and not self.text.strip():
            raise UsageError("a text of white space alone is no span", where="Span.text")


def check_weight(owner: Any, weight: float) -> None:
    """Refuse a weight that is 0 or beyond 1.

    Raises:
        UsageError: naming whose it is.
    """
    if not (0 < abs(weight) <= 1 and math.isfinite(weight)):
        raise UsageError(f"a weight of {weight} is not in -1 to 1, or is 0", where=f"{type(owner).__name__}.weight")


@dataclass(frozen=True)
class Decoded:
    """The text of a sample's tokens.

    Attributes:
        text: as they decode, special tokens included, `MEDIUM` for each token of a medium.
        stretches: of every token, the first of its characters and the one behind the last. Tokens that make a
            character together share it.
    """

    text: str
    stretches: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int], media: frozenset[int]) -> Decoded:
        """Decode ids.

        Args:
            tokenizer: one that is backed by `tokenizers`.
            media: ids that stand for media.

        Raises:
            UsageError: another tokenizer.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                f"{type(tokenizer).__name__} does not say which characters its tokens hold (it is not backed by "
                "`tokenizers`)",
                remedy="load the fast tokenizer, or give marks of your own as the input `highlighted`",
            )
        pieces: list[str] = []
        stretches: list[tuple[int, int]] = []
        length, waiting = 0, 0
        stream = DecodeStream(skip_special_tokens=False)

        def add(piece: str) -> None:
            nonlocal length, waiting
            pieces.append(piece)
            stretches.extend([(length, length + len(piece))] * (waiting + 1))
            length, waiting = length + len(piece), 0

        def settle() -> None:
            nonlocal waiting
            if waiting:  # bytes that made no character
                waiting -= 1
                add("\ufffd")

        for token in ids:
            if token in media:
                settle()
                stream = DecodeStream(skip_special_tokens=False)
                add(MEDIUM)
                continue
            piece = stream.step(tokenizer.backend_tokenizer, token)
            if piece is None:
                waiting += 1
            else:
                add(piece)
        settle()
        return cls("".join(pieces), stretches)

    def tokens(self, start: int, stop: int) -> Iterator[int]:
        """Those that hold any character from one place to another."""
        for token, (first, last) in enumerate(self.stretches):
            if first < stop and last > start:
                yield token

    def find(self, text: str, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Where a text stands, from one place to another; what overlaps an occurrence is none."""
        return [(at, at + len(text)) for at in occurrences(self.text, text, start, stop)]


def occurrences(text: str, piece: str, start: int = 0, stop: int | None = None, *, apart: bool = True) -> list[int]:
    """Where a piece begins in a text; those that overlap the one before count only where they may (`apart`)."""
    found, at = [], text.find(piece, start, stop)
    while at >= 0:
        found.append(at)
        at = text.find(piece, at + (len(piece) if apart else 1), stop)
    return found


def written(tokenizer: Any, text: str) -> str:
    """How a text reads once it was encoded and decoded."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Decoded.of(tokenizer, ids, frozenset()).text.strip()


Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""messages -> text, the second argument says whether a generation prompt is added"""


def parts_of(
    decoded: Decoded,
    messages: Sequence[Mapping[str, Any]],
    parts: Sequence[tuple[int, int]],
    render: Render,
    signs: Sequence[str],
    written: Callable[[str], str],
) -> list[tuple[int, int]]:
    """Where text parts of messages stand in what was decoded.

    Args:
        messages: of the prompt, content in lists of parts.
        parts: (message, part) of each, in reading order.
        render: the chat template.
        signs: how it writes media.
        written: how a text reads once it was encoded and decoded.

    Raises:
        UsageError: the template does not write one as it is, or what it writes is not what was decoded.
    """
    said = [str(messages[message]["content"][part]["text"]) for message, part in parts]
    words = [text.strip() for text in said]
    if "" in words:
        raise UsageError("there are no words in it", where=_where(parts[words.index("")]))
    marks = [f"\ue000mark {number}\ue001" for number in range(len(parts))]
    changed = [dict(each) for each in messages]
    for (message, part), text, bare, mark in zip(parts, said, words, marks, strict=True):
        content = [dict(each) for each in changed[message]["content"]]
        content[part]["text"] = text.replace(bare, mark, 1)  # white space around words stays
        changed[message]["content"] = content
    missing = parts[0]
    for prompt in (True, False):
        whole, other = (_without(render(each, prompt), signs) for each in (messages, changed))
        found: list[tuple[int, int]] = []
        for at, text in zip(_walked(whole, other, marks, words), words, strict=False):
            told = occurrences(whole, text, apart=False)
            for decodes in dict.fromkeys((text, written(text))):
                there = occurrences(decoded.text, decodes, apart=False)
                if len(told) == len(there):
                    start = there[told.index(at)]
                    found.append((start, start + len(decodes)))
                    break
            else:
                break
        if len(found) == len(parts):
            return found
        missing = parts[len(found)]
    raise UsageError(
        "the words of a message are not found among the tokens of the prompt",
        where=_where(missing),
        remedy="give the messages and the template variables that the inputs were made of, or name the text itself",
    )


def _where(part: tuple[int, int]) -> str:
    return f"message {part[0]}, part {part[1]}"


def _walked(whole: str, other: str, marks: Sequence[str], words: Sequence[str]) -> list[int]:
    """Where words stand in a rendered text, given the same text with marks in their place; up to the first that the
    template writes otherwise."""
    found: list[int] = []
    place, behind = 0, 0
    for mark, text in zip(marks, words, strict=True):
        at = other.find(mark, behind)
        glue = other[behind:at]
        if at < 0 or not whole.startswith(glue, place):
            break
        place += len(glue)
        place += len(whole[place:]) - len(whole[place:].lstrip())  # of an answer that a template trims
        if not whole.startswith(text, place):
            break
        found.append(place)
        place, behind = place + len(text), at + len(mark)
    return found


def _without(text: str, signs: Sequence[str]) -> str:
    for sign in signs:
        text = text.replace(sign, MEDIUM)
    return text
