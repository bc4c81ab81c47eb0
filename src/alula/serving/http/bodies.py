"""Bodies of requests: how much is read, for how long, and what JSON may hold. Nothing of a body that is too large is
parsed, and nothing that is wrong in it is guessed at."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from alula.serving.http.problems import Problem

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

MOST_DEPTH = 32
"""of lists and objects in one another; a chat with media needs six"""
MOST_ENTRIES = 200_000
"""values in a body; prompts of token ids are the longest that are meant"""


class GoneError(Exception):
    """The client went away before its request was whole: nobody is left to be told."""


async def read(receive: Receive, *, most: int, seconds: float, hold: Callable[[int], None]) -> bytes:
    """The whole body.

    Args:
        receive: of ASGI.
        most: bytes.
        seconds: in which it has to be there.
        hold: is told the bytes of each part, and may refuse them.

    Raises:
        Problem: 413 for more bytes, 408 for a client that is slower. GoneError: it went away.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise GoneError
                part = event.get("body", b"")
                size += len(part)
                if size > most:
                    raise too_large(most)
                hold(len(part))
                parts.append(part)
                if not event.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Problem(
            f"the request was not whole after {seconds:g} seconds",
            status=408,
            code="request_timeout",
            remedy="send smaller or fewer pictures, or ask over a faster line",
            headers={"connection": "close"},
        ) from None


def too_large(most: int) -> Problem:
    """413."""
    return Problem(
        f"the request is larger than {most:,} bytes",
        status=413,
        code="request_too_large",
        remedy="send smaller or fewer pictures",
        headers={"connection": "close"},
    )


def parsed(body: bytes) -> dict[str, Any]:
    """The object that a body holds in JSON.

    Raises:
        Problem: 400 for anything else, numbers that are none, keys that stand twice, halves of characters and depth.
    """
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise _wrong(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _wrong(f"lists and objects stand more than {MOST_DEPTH} deep in it") from None
    except json.JSONDecodeError as error:
        raise _wrong(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # of our own hooks, and numbers of thousands of digits
        raise _wrong(str(error).split(";")[0]) from None
    if not isinstance(found, dict):
        raise _wrong("it is no object")
    _check(found)
    return found


def _check(found: dict[str, Any]) -> None:
    """Depth, number and characters of what was parsed."""
    level: list[Any] = [found]
    entries = 0
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        for each in level:
            values = each.values() if isinstance(each, dict) else each
            entries += len(each)
            if isinstance(each, dict):
                for key in each:
                    _whole(key)
            for value in values:
                if isinstance(value, str):
                    _whole(value)
                elif isinstance(value, dict | list):
                    below.append(value)
        if entries > MOST_ENTRIES:
            raise _wrong(f"it holds more than {MOST_ENTRIES:,} values")
        if not below:
            return
        level = below
    raise _wrong(f"lists and objects stand more than {MOST_DEPTH} deep in it")


def _whole(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ord(text[error.start])
            raise _wrong(f"a text holds half of a surrogate pair, U+{half:04X}, which is no character") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in an object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _wrong(what: str) -> Problem:
    return Problem(f"the body cannot be read as JSON: {what}", code="invalid_json")
