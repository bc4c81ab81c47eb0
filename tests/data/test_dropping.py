"""Context that is left out, way by way."""

from __future__ import annotations

from typing import Any

from PIL import Image

from alula.data import ImageRef
from alula.data.dropping import WAYS, dropped
from alula.data.samples import Sample, image_part, text_part, user

PICTURES = [ImageRef.from_object(Image.new("RGB", (4, 4), (shade, 0, 0))) for shade in (10, 20, 30)]
ONE, TWO, THREE = map(image_part, PICTURES)


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(text)]}


def of(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*content]}


def seen(messages: list[dict[str, Any]]) -> list[list[Any]]:
    """By turn: texts, and the red of pictures' first pixels."""
    return [
        [
            part["text"] if part["type"] == "text" else part["image"].load().getpixel((0, 0))[0]
            for part in turn["content"]
        ]
        for turn in messages
    ]


SEVERAL = [user("what?", *PICTURES), said("this")]
SHOTS = [
    of(ONE, text_part("a?")),
    said("a"),
    of(TWO, text_part("b?")),
    said("b"),
    of(THREE, text_part("c?")),
    said("c"),
]
BETWEEN = [of(ONE, text_part("first"), TWO, text_part("second"), THREE, text_part("which?")), said("1")]
BARE = [of(ONE), said("a"), of(TWO, text_part("b?")), said("b")]


def test_only_the_last_image_stays() -> None:
    assert seen(WAYS["last"](SEVERAL, 0) or []) == [[30, "what?"], ["this"]]
    assert seen(WAYS["last"](SHOTS, 0) or []) == [["a?"], ["a"], ["b?"], ["b"], [30, "c?"], ["c"]]
    assert WAYS["last"](BARE, 0) is None  # a turn would be left with nothing
    assert WAYS["last"]([user("one", PICTURES[0]), said("x")], 0) is None


def test_images_become_blank_where_they_stand() -> None:
    assert seen(WAYS["blank"](SEVERAL, 0) or []) == [[0, 0, 30, "what?"], ["this"]]
    assert seen(WAYS["blank"](BARE, 0) or []) == [[0], ["a"], [20, "b?"], ["b"]]
    assert WAYS["blank"]([user("words"), said("x")], 0) is None
    assert seen(SEVERAL) == [[10, 20, 30, "what?"], ["this"]]  # the conversation itself is left as it is


def test_the_text_of_an_earlier_shot() -> None:
    found = [seen(WAYS["text"](SHOTS, draw) or []) for draw in range(2)]
    assert found == [
        [[10, 20, "b?"], ["b"], [30, "c?"], ["c"]],
        [[10, "a?"], ["a"], [20, 30, "c?"], ["c"]],
    ]
    found = [seen(WAYS["text"](BETWEEN, draw) or []) for draw in range(2)]
    assert found == [
        [[10, 20, "second", 30, "which?"], ["1"]],
        [[10, "first", 20, 30, "which?"], ["1"]],
    ]
    assert WAYS["text"](SEVERAL, 0) is None


def test_a_mixture_takes_all_ways_that_leave_something_out() -> None:
    ways = {str(seen(dropped(Sample("a", SHOTS), ("last", "blank", "text"), draw).messages)) for draw in range(60)}
    assert len(ways) == 4  # two shots have texts
    lone = Sample("b", [user("one", PICTURES[0]), said("x")])
    assert dropped(lone, ("last", "blank", "text"), 3) is lone
    only = {str(seen(dropped(Sample("c", SEVERAL), ("text", "last"), draw).messages)) for draw in range(9)}
    assert only == {str([[30, "what?"], ["this"]])}  # the other way has nothing to leave out
