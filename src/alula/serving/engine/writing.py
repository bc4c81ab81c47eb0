"""From tokens to text, piece by piece: a piece is given out when nothing behind it can change it any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from alula.serving.engine.spelling import HALF


class Writer:
    """The text of one answer.

    Args:
        tokenizer: whose tokens they are.
        ends: ids that end an answer and are no part of its text.
        stop: texts that end it and are no part of it.

    Attributes:
        decoded: what the last call read, before stop texts: of all tokens since it read something, together.
        is_stopped: a stop text was found.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._ends, self._stop = tokenizer, frozenset(ends), tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # decoding begins at one, and is known up to the other
        self._held = ""  # final, but it may become a stop text
        self.decoded = ""
        self.is_stopped = False

    @property
    def context(self) -> list[int]:
        """The last tokens, by which decoders go."""
        return self._ids[self._start :]

    def write(self, token: int) -> str:
        """Take a token; return what became final."""
        if token in self._ends:
            self.decoded = ""
            return ""
        self._ids.append(token)
        self.decoded = self._decoded()
        return self._checked(self.decoded)

    def close(self) -> str:
        """Return what is left."""
        self.decoded = ""
        if self.is_stopped:
            return ""
        known, whole = self._texts()
        self.decoded = whole[len(known) :]
        left = self._checked(self.decoded)
        left, self._held = left + ("" if self.is_stopped else self._held), ""
        return left

    def _texts(self) -> tuple[str, str]:
        told = [self._ids[self._start : self._read], self._ids[self._start :]]
        known, whole = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in told)
        return str(known), str(whole)

    def _decoded(self) -> str:
        # a few tokens before: some tokenizers write a token otherwise at the start than behind another
        known, whole = self._texts()
        if whole.endswith(HALF) or len(whole) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _checked(self, text: str) -> str:
        """What of the text held so far and this is before a stop text and cannot become one."""
        if not self._stop:
            return text
        whole = self._held + text
        found = [place for stop in self._stop if (place := whole.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return whole[: min(found)]
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(whole)), 0, -1):
            if any(stop.startswith(whole[-length:]) for stop in self._stop):
                self._held = whole[-length:]
                return whole[:-length]
        self._held = ""
        return whole
