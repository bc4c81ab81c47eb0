"""Questions about several pictures, answered again from the scenes by other means."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from alula.errors import UsageError
from alula_fledgling.microworld import PICTURE_FAMILIES, picture_items, source
from alula_fledgling.microworld.scenes import SHAPES, Scene, split_of_scene
from alula_fledgling.tasks import native_tasks

SPLITS = ("train", "test")


def of(family: str, split: str = "train", n: int = 80) -> list[tuple[list[Scene], str, str]]:
    """Scenes, question and answer."""
    found = []
    for item in picture_items(n, split=split, seed=3, families=[family]):  # type: ignore[arg-type]
        *named, words = item.messages[0]["content"]
        names, images = named[::2], named[1::2]
        assert [part["text"] for part in names] == [f"{place}:" for place in range(1, len(images) + 1)]
        scenes = [part["image"].scene for part in images]
        assert all(split_of_scene(scene) == split for scene in scenes)
        found.append((scenes, words["text"], item.messages[1]["content"][0]["text"]))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_which_picture_shows_it(split: str) -> None:
    answers = Counter()
    for scenes, question, answer in of("which", split, n=24):  # four of the test split are seldom drawn together
        colour, shape = re.findall(r"an? (\w+) (\w+)\?", question)[0]
        there = [number for number, scene in enumerate(scenes, 1) if (colour, shape) in {t.pair for t in scene.things}]
        assert there == [int(answer)]
        answers[answer] += 1
    assert set(answers) == {"1", "2", "3", "4"}


@pytest.mark.parametrize("split", SPLITS)
def test_how_many_in_all(split: str) -> None:
    for scenes, question, answer in of("total", split):
        shape = next(each for each in SHAPES if each in question)
        assert sum(thing.shape == shape for scene in scenes for thing in scene.things) == int(answer)
        assert 2 <= len(scenes) <= 3


@pytest.mark.parametrize("split", SPLITS)
def test_what_changed(split: str) -> None:
    kinds = Counter()
    for (one, other), question, answer in of("change", split):
        before, after = ({(t.colour, t.shape, t.cell) for t in scene.things} for scene in (one, other))
        gone, new = before - after, after - before
        if "moved" in question:
            ((colour, shape, place),), ((*again, elsewhere),) = gone, new
            assert [colour, shape] == again
            assert place != elsewhere
            assert answer == f"{colour} {shape}"
        elif "colour" in question:
            ((colour, shape, place),), ((another, same, there),) = gone, new
            assert (shape, place) == (same, there)
            assert colour == answer != another
        else:
            changed = new if "in picture 2 and not in picture 1" in question else gone
            assert answer == " ".join(next(iter(changed))[:2])
            assert len(gone) + len(new) == 1
        kinds[question] += 1
    assert len(kinds) == 4


def test_what_the_words_behind_the_pictures_ask() -> None:
    places = Counter()
    for scenes, question, answer in of("later", n=200):
        place = int(re.match(r"Picture (\d): ", question)[1])  # type: ignore[index]
        scene = scenes[place - 1]
        values = {t.colour for t in scene.things} | {t.shape for t in scene.things} | {t.position for t in scene.things}
        assert answer in values or answer.isdigit()
        places[place] += 1
    assert len(places) == 4


def test_captions_tell_what_matters_to_the_question_that_is_read() -> None:
    whole = {"nothing": 0, "something": 0}
    for item in source("pictures_caption", n=120):
        image, _ = item.messages[0]["content"]
        told = item.messages[1]["content"][0]["text"]
        *shown, question = item.browsed[0]["content"]
        assert image["image"].scene in [part["image"].scene for part in shown[1::2]]
        names = [thing.full_name for thing in image["image"].scene.things]
        assert told == "nothing" or all(part.split(" at the ")[0][2:] in names for part in re.split(r", | and ", told))
        if item.family == "which":
            pair = " ".join(re.findall(r"an? (\w+ \w+)\?", question["text"]))
            assert (told != "nothing") == any(pair in name for name in names)
        whole["nothing" if told == "nothing" else "something"] += 1
    assert min(whole.values()) > 20


def test_names_and_splits() -> None:
    with pytest.raises(UsageError, match="no unseen attribute combinations"):
        source("pictures", split="unseen")
    task = native_tasks(["pictures"], n=8)[0]
    assert [item.family for item in task.items()] == [*PICTURE_FAMILIES] * 2
