"""A conversation with some of its context left out, for models that were told of the whole beforehand.

The ways are those of Browse and Concentrate's second stage (Wang et al., 2024, arXiv 2402.12195, IMG-N, IMG-B and TXT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from PIL import Image

from alula.data.images import ImageRef
from alula.data.samples import Sample, image_part

Messages = list[dict[str, Any]]
_BLANK = 64
"""pixels a side; a processor makes of it what it makes of any picture"""


def dropped(sample: Sample, ways: Sequence[str], draw: int) -> Sample:
    """The sample with some of its context left out; as it is where none of the ways has anything to leave out.

    Args:
        ways: names of `WAYS`, one of which is taken, of those that leave something out here.
        draw: a number that says which, and which earlier shot.
    """
    found = [messages for way in ways if (messages := WAYS[way](sample.messages, draw // len(WAYS))) is not None]
    return replace(sample, messages=found[draw % len(found)]) if found else sample


def _images(messages: Messages) -> list[tuple[int, int]]:
    """Turn and place of every image."""
    return [
        (turn, place)
        for turn, message in enumerate(messages)
        for place, part in enumerate(message["content"])
        if part["type"] == "image"
    ]


def only_last(messages: Messages, draw: int) -> Messages | None:
    """All images but the last are left out; None where there is but one, or a turn would be left with nothing."""
    gone = {*_images(messages)[:-1]}
    kept = [
        {**message, "content": [part for place, part in enumerate(message["content"]) if (turn, place) not in gone]}
        for turn, message in enumerate(messages)
    ]
    return kept if gone and all(message["content"] for message in kept) else None


def blank(messages: Messages, draw: int) -> Messages | None:
    """All images but the last are blank ones; None where there is but one."""
    gone = {*_images(messages)[:-1]}
    picture = image_part(ImageRef.from_object(Image.new("RGB", (_BLANK, _BLANK))))
    kept = [
        {
            **message,
            "content": [picture if (turn, place) in gone else part for place, part in enumerate(message["content"])],
        }
        for turn, message in enumerate(messages)
    ]
    return kept if gone else None


def shot_text(messages: Messages, draw: int) -> Messages | None:
    """The text of an earlier shot is left out, its images stay.

    A shot is an image with the text behind it: in one turn up to the next image, or, where a turn shows it, that turn's
    words and the answer to them. None where there is no earlier one.
    """
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "user"]
    shots: list[Messages] = []
    for turn, following in pairwise(turns):
        shown = [part for part in messages[turn]["content"] if part["type"] != "text"]
        if shown:
            joined = {**messages[following], "content": [*shown, *messages[following]["content"]]}
            shots.append([*messages[:turn], joined, *messages[following + 1 :]])
    for turn in turns:
        content = messages[turn]["content"]
        places = [place for place, part in enumerate(content) if part["type"] == "image"]
        for place, after in pairwise(places):
            if after > place + 1:
                kept = {**messages[turn], "content": [*content[: place + 1], *content[after:]]}
                shots.append([*messages[:turn], kept, *messages[turn + 1 :]])
    return shots[draw % len(shots)] if shots else None


WAYS: dict[str, Callable[[Messages, int], Messages | None]] = {"last": only_last, "blank": blank, "text": shot_text}
