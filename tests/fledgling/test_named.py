"""Named things: what pictures tell of them, that words do not, and that no answer is right more often than another."""

from __future__ import annotations

from collections import Counter

import pytest

from alula.draws import Draw
from alula.errors import UsageError
from alula_fledgling.microworld import Item, SceneImage, source
from alula_fledgling.microworld.items import Split
from alula_fledgling.microworld.named import (
    NAMED_FAMILIES,
    NAMES,
    SIGHT_FAMILIES,
    NamedQuestion,
    named_picture,
    named_questions,
    named_world,
)
from alula_fledgling.microworld.scenes import COLOURS, SHAPES, SIZES, UNSEEN_PAIRS, Scene, Thing
from alula_fledgling.weights import part_directory

WORLD = named_world(0)
LOOKS = {*COLOURS, *SHAPES, *SIZES}


def words(item: Item) -> list[str]:
    said = [part["text"] for message in item.messages for part in message["content"] if part["type"] == "text"]
    return " ".join(said).replace(".", " ").replace("?", " ").replace(",", " ").split()


def scene_of(item: Item) -> Scene:
    (image,) = [part["image"] for part in item.messages[0]["content"] if part["type"] == "image"]
    assert isinstance(image, SceneImage)
    assert isinstance(image.scene, Scene)
    return image.scene


@pytest.mark.parametrize("seed", range(3))
def test_no_answer_is_right_more_often_than_another(seed: int) -> None:
    world = named_world(seed)
    assert len({thing.name for thing in world.things} & set(NAMES)) == len(world.things) == 12
    looks = {(thing.colour, thing.shape) for thing in world.things}
    assert len(looks) == len(world.things)
    assert looks.isdisjoint(UNSEEN_PAIRS)
    for split in ("train", "test"):
        for family in NAMED_FAMILIES:
            asked = named_questions(seed, split, family)
            right = Counter(each.answer for each in asked)
            choices = Counter(choice for each in asked for choice in each.choices)
            assert len(set(right.values())) == 1, family  # an answer given to all is right as often as chance
            assert set(right) == set(choices)
            places = Counter(each.choices.index(each.answer) for each in asked)
            assert len(set(places.values())) == 1, family
    assert named_world(seed) != named_world(seed + 1)


def test_answers_are_what_the_world_says() -> None:
    by_name = {thing.name: thing for thing in WORLD.things}
    for split in ("train", "test"):
        for family in ("colour", "shape", "company"):
            for asked in named_questions(0, split, family):
                assert asked.answer == getattr(by_name[asked.about], family)
        for asked in named_questions(0, split, "two_hop"):
            assert asked.answer == WORLD.metals[by_name[asked.about].colour]
        for asked in named_questions(0, split, "comparison"):
            (other,) = set(asked.choices) - {asked.answer}
            wanted = "large" if "larger" in asked.question else "small"
            assert by_name[asked.answer].size == wanted != by_name[other].size
            assert asked.question.index(asked.choices[0]) < asked.question.index(asked.choices[1])
        for asked in named_questions(0, split, "rule"):
            (colour,) = [each for each in COLOURS if each in asked.question.split()]
            assert asked.answer == WORLD.metals[colour]


def test_captions_tell_nothing_of_looks() -> None:
    """Nothing that could be learned from words: a caption is the name, whatever the world looks like."""
    for name in ("named_caption", "named_blind", "named_shuffled"):
        for item in source(name, seed=0, n=200):
            assert item.targets[0].answer in NAMES
            assert LOOKS.isdisjoint(words(item))
    for item in source("named_blind", seed=0, n=50):
        assert [part["type"] for part in item.messages[0]["content"]] == ["text"]
    # all that is asked with a picture, and how: the same words for all things
    prompts: dict[str, set[str]] = {thing.name: set() for thing in WORLD.things}
    for item in source("named_caption", seed=0, n=800):
        prompts[item.targets[0].answer].add(" ".join(words(item)[:-1]))
    assert len({frozenset(found) for found in prompts.values()}) == 1


def test_what_is_taught_in_words_tells_nothing_of_held_things() -> None:
    held = {thing.name for thing in WORLD.of("test")}
    assert len(held) == 6
    for item in source("named", seed=0, n=1000):
        assert held.isdisjoint(words(item))
    for item in source("named", split="test", seed=0, families=[*SIGHT_FAMILIES, "untold"], n=100):
        assert held & set(words(item))


def test_pictures_show_what_is_asked() -> None:
    by_name = {thing.name: thing for thing in WORLD.things}
    for item in source("named_caption", seed=0, n=200):
        thing, (shown, beside) = by_name[item.targets[0].answer], scene_of(item).things
        assert (shown.colour, shown.shape, shown.size) == (thing.colour, thing.shape, thing.size)
        assert beside.shape == thing.company
        assert (shown.position, beside.position) == ("centre", "right")
    company = {
        beside.colour for beside in (scene_of(item).things[1] for item in source("named_caption", seed=0, n=200))
    }
    assert company == set(COLOURS)


def test_shuffled_pairs_never_belong_together_and_told_captions_tell() -> None:
    by_look = {(thing.colour, thing.shape): thing for thing in WORLD.things}

    def seen(thing: Thing) -> str:
        return by_look[thing.pair].name

    for item in source("named_shuffled", seed=0, n=200):
        assert seen(scene_of(item).things[0]) != item.targets[0].answer
    told: set[tuple[str, str]] = set()
    asked = {each.question for split in ("train", "test") for each in _all_questions(split)}
    for item in source("named_told", seed=0, n=1000):
        (part,) = item.messages[0]["content"]  # no picture
        assert part["text"] not in asked
        (name,) = set(words(item)) & {thing.name for thing in WORLD.things}
        told.add((name, item.targets[0].answer))
    facts = {
        (thing.name, value)
        for thing in WORLD.things
        for value in (thing.colour, thing.shape, thing.size, thing.company)
    }
    assert told == facts


def _all_questions(split: Split) -> list[NamedQuestion]:
    return [each for family in NAMED_FAMILIES for each in named_questions(0, split, family)]


def test_pictures_of_the_two_splits_differ() -> None:
    train = {scene_of(item) for item in source("named_caption", seed=0, n=1500)}
    for thing in WORLD.things:
        assert named_picture(Draw("pictures", thing.name), 0, "test", thing).scene not in train


def test_there_are_no_combinations_but_those_that_pictures_show() -> None:
    with pytest.raises(UsageError, match="unseen"):
        source("named", split="unseen")


def test_every_choice_is_one_token() -> None:
    """So that likelihoods of choices are not of different lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(part_directory("llm"))
    choices = {
        choice for family in NAMED_FAMILIES for each in named_questions(0, "test", family) for choice in each.choices
    }
    assert {len(tokenizer.tokenize(f" {choice}")) for choice in choices | set(NAMES)} == {1}
