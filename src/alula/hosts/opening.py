"""What a language model's tokenizer writes before plain text by itself: BOS, or nothing.

A host's processor must not write it before chat prompts whose template leaves it out, so `build_host` switches it off.
Plain text is another matter: the language model knows it behind its BOS only, and is to be asked that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

_KEY = "alula_opening"
"""in ``tokenizer_config.json``: what the tokenizer wrote before plain text until it became a host's"""


def opening_of(processor: Any, *, chat: bool = False) -> tuple[str, ...]:
    """Return the tokens that go before a text, as the model's own tokenizer has it.

    Args:
        processor: a processor or tokenizer.
        chat: for a text that a chat template rendered, where a tokenizer's template is the whole truth and a
            processor's is not.
    """
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if chat:
        return automatic(tokenizer) if tokenizer is not processor else ()
    noted = tokenizer.init_kwargs.get(_KEY)
    return tuple(map(str, noted)) if isinstance(noted, list) else automatic(tokenizer)


def automatic(tokenizer: Any) -> tuple[str, ...]:
    """Return the special tokens that ``tokenizer`` puts before a text unasked."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return tuple(tokenizer.convert_ids_to_tokens(whole[: next(starts, 0)]))


def remember(tokenizer: Any, opening: Sequence[str]) -> None:
    """Note in ``tokenizer``, and wherever it is saved, that plain text is to start with ``opening``."""
    tokenizer.init_kwargs[_KEY] = list(opening)
