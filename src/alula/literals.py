"""Words of a text that happen to be a model's own signs: ``<image>`` in a question about SVG is text, not an image.

Processors look for their placeholders in the rendered prompt and tokenizers for their special tokens, wherever they
come from. So what people wrote of them is taken apart by a character that stands for nothing, and a copy of the
tokenizer, whose normalizer takes that out once special tokens have been found, reads it as the ordinary text that it
is: in its place, with the tokens it would have if the vocabulary held no such sign.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import normalizers
from transformers import ProcessorMixin

from alula.errors import HostError
from alula.media import MEDIA

_BETWEEN = "\ufdd3"
"""a noncharacter, which no text holds"""
_READERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""by tokenizer, its copy: large vocabularies take a while to copy"""


class Literals:
    """The signs of a processor that texts may hold as words.

    Args:
        processor: a processor or tokenizer; it stays as it is.
        said_by: roles in whose words every special token of the tokenizer is such a sign; in all others' words those
            of a processor are, and a plain tokenizer has none.

    Attributes:
        signs: of the processor.
    """

    def __init__(self, processor: Any, *, said_by: Collection[str] = ()) -> None:
        self._processor, self._said_by = processor, frozenset(said_by)
        self._tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.signs: tuple[str, ...] = _signs(processor) if isinstance(processor, ProcessorMixin) else ()
        special = _special(self._tokenizer) if said_by else set()
        self._own, self._all = (
            re.compile(_any_of(set(each)) or r"(?!)") for each in (self.signs, special.union(self.signs))
        )

    def _found(self, message: Any) -> re.Pattern[str]:
        """Finds the signs that a message may not hold as such."""
        return self._all if message.get("role") in self._said_by else self._own

    def hidden(self, messages: list[Any]) -> list[Any]:
        """The conversation as `reader` is to be given it, signs in its text parts hidden; itself where there are none.

        Raises:
            HostError: the tokenizer cannot read them as text, two parts make a sign only together, or a text holds
                the character that signs are taken apart by.
        """
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        pairs = zip(messages, texts, strict=True)
        signs = dict.fromkeys(sign for message, text in pairs for sign in self._found(message).findall(text))
        if not signs:
            return messages
        if any(_BETWEEN in text for text in texts):
            raise HostError(f"the text holds U+{ord(_BETWEEN):04X}, which is no character", remedy="leave it out")
        for sign in signs:
            self._refuse_unreadable(sign)
        found = [
            {**each, "content": [self._told(part, self._found(each)) for part in each["content"]]} for each in messages
        ]
        for message in found:
            across = self._found(message).search("".join(part.get("text", "") for part in message["content"]))
            if across:
                raise HostError(
                    f"two text parts make the special token {across[0]!r} together", remedy="join them to one text part"
                )
        return found

    def _told(self, part: dict[str, Any], found: re.Pattern[str]) -> dict[str, Any]:
        if part["type"] != "text":
            return part
        return {**part, "text": found.sub(lambda match: _BETWEEN.join(match[0]), part["text"])}

    @cached_property
    def reader(self) -> Any:
        """A copy of the processor that reads what is hidden as text."""
        tokenizer = _reading(self._tokenizer)
        if self._processor is self._tokenizer:
            return tokenizer
        reader = copy.copy(self._processor)
        reader.tokenizer = tokenizer
        return reader

    def _refuse_unreadable(self, sign: str) -> None:
        tokenizer = self._tokenizer
        if getattr(tokenizer, "is_fast", False):
            read = _reading(tokenizer)
            ids = read(_BETWEEN.join(sign), add_special_tokens=False)["input_ids"]
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


def _reading(tokenizer: Any) -> Any:
    """A copy of a tokenizer that reads what is hidden as text."""
    found = _READERS.get(tokenizer)
    if found is None or len(found) != len(tokenizer):  # it may have got tokens meanwhile
        found = copy.deepcopy(tokenizer)
        backend = found.backend_tokenizer
        shown = normalizers.Replace(_BETWEEN, "")
        # first of all: the words are text, to be treated as the tokenizer treats any
        backend.normalizer = normalizers.Sequence([shown, *([backend.normalizer] if backend.normalizer else [])])
        _READERS[tokenizer] = found
    return found


def _any_of(words: set[str]) -> str:
    """A pattern of any of some words, the longest first; a text of the beginnings of thousands is read through once."""
    rests: dict[str, set[str]] = {}
    for word in words - {""}:
        rests.setdefault(word[0], set()).add(word[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in sorted(rests.items())]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}"


def _special(tokenizer: Any) -> set[str]:
    """All special tokens that can be taken apart."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {sign for sign in (*added, *tokenizer.all_special_tokens) if len(sign.strip()) > 1}


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
    return tuple(sorted(signs, key=lambda sign: (-len(sign), sign)))


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
