"""Words of a text that happen to be a model's own signs: ``<image>`` in a question about SVG is text, not an image.

Processors look for their placeholders in the rendered prompt and tokenizers for their special tokens, wherever they
come from. So what people wrote of them is hidden behind characters that stand for nothing, and a copy of the
tokenizer, whose normalizer turns those back once special tokens have been found, reads it as the ordinary text that
it is: in its place, with the tokens it would have if the vocabulary held no such sign.
"""

from __future__ import annotations

import copy
import re
from functools import cached_property
from typing import Any

from tokenizers import normalizers
from transformers import ProcessorMixin

from alula.errors import HostError
from alula.media import MEDIA

_FIRST, _MOST = 0xFDD3, 29
"""noncharacters, which no text holds: U+FDD3 to U+FDEF"""


class Literals:
    """The signs of a processor that texts may hold as words; none for a plain tokenizer.

    Args:
        processor: a processor or tokenizer; it stays as it is.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.signs: tuple[str, ...] = _signs(processor) if isinstance(processor, ProcessorMixin) else ()
        # the longest first: one sign may be the beginning of another
        self._found = re.compile("|".join(map(re.escape, self.signs)) or r"(?!)")
        self._hidden = {sign: chr(_FIRST + number) for number, sign in enumerate(self.signs)}

    def hidden(self, messages: list[Any]) -> list[Any]:
        """The conversation as `reader` is to be given it, signs in its text parts hidden; itself where there are none.

        Raises:
            HostError: the tokenizer cannot read them as text, two parts make a sign only together, or the text holds a
                character that signs are hidden behind.
        """
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        signs = dict.fromkeys(sign for text in texts for sign in self._found.findall(text))
        if not signs:
            return messages
        taken = next((character for character in self._hidden.values() if any(character in text for text in texts)), "")
        if taken:
            raise HostError(f"the text holds U+{ord(taken):04X}, which is no character", remedy="leave it out")
        for sign in signs:
            self._refuse_unreadable(sign)
        found = [{**message, "content": [*map(self._told, message["content"])]} for message in messages]
        for message in found:
            across = self._found.search("".join(part.get("text", "") for part in message["content"]))
            if across:
                raise HostError(
                    f"two text parts make the special token {across[0]!r} together", remedy="join them to one text part"
                )
        return found

    def _told(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "text":
            return part
        return {**part, "text": self._found.sub(lambda match: self._hidden[match[0]], part["text"])}

    @cached_property
    def reader(self) -> Any:
        """A copy of the processor that reads what is hidden as text."""
        reader = copy.copy(self._processor)
        reader.tokenizer = copy.deepcopy(self._processor.tokenizer)
        backend = reader.tokenizer.backend_tokenizer
        shown = [normalizers.Replace(character, sign) for sign, character in self._hidden.items()]
        # first of all: the words are text, to be treated as the tokenizer treats any
        backend.normalizer = normalizers.Sequence([*shown, *([backend.normalizer] if backend.normalizer else [])])
        return reader

    def _refuse_unreadable(self, sign: str) -> None:
        tokenizer = self._processor.tokenizer
        if getattr(tokenizer, "is_fast", False):
            read = self.reader.tokenizer
            ids = read(self._hidden[sign], add_special_tokens=False)["input_ids"]
            if _bare(read.decode(ids)) == _bare(sign) and tokenizer.convert_tokens_to_ids(sign) not in ids:
                return
        kind = next(
            (name.removesuffix("_token") for name in _media() if getattr(self._processor, name, None) == sign), ""
        )
        raise HostError(
            f"the text contains the {kind or 'special'} token {sign!r}, and {type(tokenizer).__name__} cannot take it "
            "as text",
            remedy="word it otherwise; this tokenizer has no escape"
            + (f". If {kind} is meant, attach it" if kind else ""),
        )


def _media() -> list[str]:
    return [medium.token for medium in MEDIA.values()]


def _signs(processor: Any) -> tuple[str, ...]:
    tokenizer = processor.tokenizer
    own = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    names = dict.fromkeys([*_media(), *(name for name in vars(processor) if name.endswith(("_token", "_tag")))])
    # what stands for a row is not always what a template writes: Gemma-3's processor calls what begins an image so
    rows = [getattr(processor, f"{name}_id", None) for name in _media()]
    named = [getattr(holder, name, None) for holder in (processor, tokenizer) for name in names]
    named += [tokenizer.convert_ids_to_tokens(row) for row in rows if isinstance(row, int)]
    signs = {sign for sign in named if isinstance(sign, str) and sign.strip()} - own
    return tuple(sorted(signs, key=lambda sign: (-len(sign), sign))[:_MOST])


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
