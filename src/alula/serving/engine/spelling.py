"""The bytes that tokens stand for, which may be halves of characters, and how likely each token was, as far as the
text of its answer is final."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alula.serving.engine.events import TokenLogprob

HALF = "\ufffd"
"""what a decoder writes for bytes that are no character (yet)"""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _alphabet() -> dict[str, int]:
    """Byte by character of byte-level vocabularies, as GPT-2 has them: those that are printed as they are stand for
    themselves, and the others are numbered from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


class Spelling:
    """Of one tokenizer.

    Args:
        tokenizer: fast or not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unwritten = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        # what its decoder does is asked of itself
        self._is_byte_level = tokenizer.convert_tokens_to_string(["a\u0120a"]) == "a a"
        self._has_bytes = tokenizer.convert_tokens_to_string(["<0x41>"]) == "A"

    def spelled(self, tokens: Sequence[int], before: Sequence[int]) -> list[bytes]:
        """What each of some tokens would add to a text.

        Args:
            before: the last tokens of the text: some tokens begin it with a blank less than they go on with.

        Returns:
            bytes of each; of a special token, those of its name.
        """
        known: str | None = None
        found: list[bytes] = []
        for token in tokens:
            own = self._own_bytes(token)
            if own is None:
                known = self._decoded(before) if known is None else known
                whole = self._decoded([*before, token])
                own = (whole[len(known) :] if whole.startswith(known) else self._decoded([token])).encode()
            found.append(own)
        return found

    def is_written(self, token: int) -> bool:
        """Whether a token stands in the text of an answer."""
        return token not in self._unwritten

    def _own_bytes(self, token: int) -> bytes | None:
        """Those that the vocabulary has for a token, whatever stands before it."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the model has more ids than the tokenizer
            return b""
        if self._has_bytes and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if self._is_byte_level and all(character in _ALPHABET for character in name):
            return bytes(_ALPHABET[character] for character in name)
        return None

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def readable(spelled: bytes) -> str:
    """Bytes as text; those of halves of characters as their numbers."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in spelled)


class Listing:
    """The tokens of an answer, each listed once its text is told. What is cut off the text is not listed; bytes that
    are listed are those of the text, where these are characters."""

    def __init__(self) -> None:
        self._open: list[TokenLogprob] = []  # not decoded yet
        self._decoded: deque[tuple[TokenLogprob, int]] = deque()  # with the bytes of text that go with each
        self._ahead = 0  # bytes that were told of tokens that are not listed

    def add(self, token: TokenLogprob) -> None:
        """Know of the next token."""
        self._open.append(token)

    def decoded(self, text: str) -> None:
        """Know of the text that the tokens since the last one are, together."""
        if not text:
            return
        tokens, self._open = self._open, []
        whole = text.encode()
        if b"".join(each.utf8 for each in tokens) == whole:
            sizes = [len(each.utf8) for each in tokens]
        else:
            if len(tokens) == 1 and HALF not in text:  # its decoder went by what stands around it
                tokens = [replace(tokens[0], text=text, utf8=whole)]
            sizes = [len(whole), *([0] * (len(tokens) - 1))]
        self._decoded.extend(zip(tokens, sizes, strict=True))

    def told(self, text: str, *, is_over: bool) -> list[TokenLogprob]:
        """Those that may be listed now.

        Args:
            text: that was told since the last time.
            is_over: there will be no more.
        """
        self._ahead += len(text.encode())
        found: list[TokenLogprob] = []
        while self._decoded and self._decoded[0][1] <= self._ahead:
            token, size = self._decoded.popleft()
            self._ahead -= size
            found.append(token)
        if is_over and self._decoded and self._ahead:  # the text was cut within it
            token, _ = self._decoded.popleft()
            left = token.utf8[: self._ahead]
            found.append(replace(token, text=readable(left), utf8=left))
        return found
