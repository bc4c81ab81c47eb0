"""From plain text to token ids, in one place: what two models are asked must not hang on each one's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alula.errors import EvaluationError


class PlainText:
    """Ids of texts behind an opening.

    Args:
        tokenizer: whose ids.
        opening: the tokens that go before every text that does not start with them, see `alula.hosts.opening`.

    Raises:
        EvaluationError: the vocabulary lacks a token of ``opening``.
    """

    def __init__(self, tokenizer: Any, opening: Sequence[str]) -> None:
        vocabulary = tokenizer.get_vocab()
        for token in opening:
            if token not in vocabulary:
                raise EvaluationError(
                    f"prompts are to start with {token!r}, which is not in the vocabulary",
                    where=type(tokenizer).__name__,
                    remedy="compare models of one vocabulary",
                )
        self.tokenizer = tokenizer
        self.opening = list(opening)
        self._opening = [vocabulary[token] for token in opening]

    def ids(self, text: str, *, opened: bool = True) -> list[int]:
        """The ids of a text, behind the opening if it is to be ``opened``.

        Raises:
            EvaluationError: the text itself starts with BOS twice.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if opened and ids[: len(self._opening)] != self._opening:
            ids = [*self._opening, *ids]
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise EvaluationError(
                f"the prompt would start with {self.tokenizer.bos_token!r} twice: {text[:60]!r}",
                where="chat template" if self.tokenizer.bos_token * 2 in text else "tokenizer",
                remedy="write it once: in the chat template, or by the tokenizer, not in the task",
            )
        return ids

    def pair(self, context: str, ending: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of what is written behind it, tokenized as one text and parted where the context
        alone ends; blanks at its end go to the ending.

        Raises:
            EvaluationError: the ending adds no token of its own, or the context has none.
        """
        bare = context.rstrip()
        whole, start = self.ids(context + ending), self.ids(bare)
        if not start:
            raise EvaluationError("there is nothing in front of it", where=f"option {ending!r}")
        if len(whole) <= len(start):
            raise EvaluationError(
                f"{ending!r} adds no token behind {context[-40:]!r}",
                where=type(self.tokenizer).__name__,
                remedy="write an option of at least one word",
            )
        return start, whole[len(start) :]
