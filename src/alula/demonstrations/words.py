"""Which tokens of a rendered conversation are the words of its turns, and which are the template's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from alula.inputs import Intake
from alula.media import MEDIA
from alula.steering.spans import Decoded, parts_of, written


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
    parts = [(turn, len(messages[turn]["content"]) - 1) for turn in turns]
    found = []
    for start, stop in parts_of(decoded, messages, parts, intake.text, signs, partial(written, intake.tokenizer)):
        held = [*decoded.tokens(start, stop)]
        found.append((held[0], held[-1] + 1))
    return found


class Spliced(NamedTuple):
    """A conversation whose words are those of demonstrations, read beside their pictures.

    Attributes:
        source: for each of its tokens, the one before splicing whose mask and kind it has.
        ids: its tokens.
        is_fused: whether a fused token stands for it.
    """

    source: list[int]
    ids: list[int]
    is_fused: list[bool]


def spliced(ids: Sequence[int], places: Sequence[tuple[int, int]], own: Sequence[Sequence[int]]) -> Spliced:
    """Put the tokens that words have beside their pictures in the place of those they have in a text: templates write
    signs between picture and words, and tokenizers join what touches. Tokens behind the last words are left out.

    Args:
        ids: of the conversation.
        places: of the words in it, as `word_tokens` gives them.
        own: of each of these words, the tokens beside the picture.
    """
    made = Spliced([], [], [])
    at = 0
    for (first, behind), tokens in zip(places, own, strict=True):
        made.source.extend([*range(at, first), *[first] * len(tokens)])
        made.ids.extend([*ids[at:first], *tokens])
        made.is_fused.extend([False] * (first - at) + [True] * len(tokens))
        at = behind
    return made
