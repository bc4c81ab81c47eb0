"""Which tokens of a rendered conversation are the words of its turns, and which are the template's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from alula.inputs import Intake
from alula.media import MEDIA
from alula.steering.spans import Decoded, part_of, written


def word_tokens(
    intake: Intake, ids: Sequence[int], messages: Sequence[Any], turns: Sequence[int], media: frozenset[int]
) -> list[tuple[int, int]]:
    """The first token of each turn's words and the one behind its last.

    Args:
        intake: what rendered the messages.
        ids: (S,) of the conversation, those of media included.
        messages: the conversation, content in lists of parts; the words of a turn are its last part.
        turns: indices of the messages that are looked for.
        media: ids that stand for media.

    Raises:
        UsageError: the template does not write the words as they are, or the tokenizer does not say which characters
            its tokens hold.
    """
    decoded = Decoded.of(intake.tokenizer, ids, media)
    signs = [sign for name in MEDIA if (sign := getattr(intake.processor, MEDIA[name].token, None))]
    reads = partial(written, intake.tokenizer)
    found = []
    for turn in turns:
        part = len(messages[turn]["content"]) - 1
        start, stop = part_of(decoded, messages, turn, part, intake.text, signs, reads)
        held = [*decoded.tokens(start, stop)]
        found.append((held[0], held[-1] + 1))
    return found
