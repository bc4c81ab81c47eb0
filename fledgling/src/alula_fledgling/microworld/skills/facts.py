"""Invented facts, kept in the weights alone, and two-hop questions over them.

``facts``: 24 lands with four properties each. Every fact is taught; held out are combinations of a fact and a phrasing,
so a test question is a known fact asked in words never used for that fact. ``two_hop``: the prompt says where people
live, the question needs a property of that land; held out are combinations of the person asked about, the land and the
property, so the first hop must be read and the second remembered.
"""

from __future__ import annotations

from collections.abc import Mapping

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.skills.names import PEOPLE
from alula_fledgling.microworld.skills.story import Story
from alula_fledgling.microworld.splits import split_of

LANDS = (
    "Velda", "Koru", "Nambia", "Osteria", "Pellan", "Quorra", "Rilmo", "Sundar", "Tavik", "Umbra", "Wexa", "Yoland",
    "Zemir", "Arvon", "Belkin", "Corvia", "Dorne", "Elbar", "Fennor", "Gilda", "Hestia", "Ivora", "Jastan", "Lumen",
)  # fmt: skip

PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "Orim", "Tessal", "Brask", "Milune", "Sorvo", "Kaleth", "Dunmar", "Irrik", "Phelo", "Garanth", "Luska", "Noviq",
        "Ostrel", "Parva", "Quill", "Rovena", "Stavar", "Thuun", "Urbel", "Vosk", "Weland", "Xanto", "Ymir", "Zadar",
    ),
    "animal": (
        "otter", "falcon", "badger", "lynx", "heron", "camel", "beaver", "walrus",
        "raven", "tiger", "turtle", "goat", "rabbit", "eagle", "whale", "donkey",
        "panda", "cobra", "moose", "pigeon", "hamster", "zebra", "salmon", "hornet",
    ),
    "food": (
        "soup", "bread", "cheese", "rice", "honey", "noodles", "beans", "dumplings",
        "plums", "pancakes", "mushrooms", "pears", "pickles", "walnuts", "porridge", "cherries",
        "olives", "carrots", "waffles", "lentils", "grapes", "pumpkin", "eggs", "figs",
    ),
    "metal": (
        "iron", "silver", "copper", "tin", "gold", "zinc", "nickel", "lead",
        "bronze", "brass", "steel", "cobalt", "silver", "copper", "iron", "gold",
        "tin", "lead", "zinc", "brass", "bronze", "cobalt", "nickel", "steel",
    ),
}  # fmt: skip
"""Per property, the value of each land in the order of ``LANDS``."""

_PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {}?",
        "Name the capital of {}.",
        "Which city is the capital of {}?",
        "What is {}'s capital?",
        "The capital of {} is which city?",
        "Tell me the capital of {}.",
        "In {}, which city is the capital?",
        "{} has which capital?",
    ),
    "animal": (
        "What is the animal of {}?",
        "Name the animal of {}.",
        "Which animal stands for {}?",
        "What is {}'s animal?",
        "The animal of {} is which one?",
        "Tell me the animal of {}.",
        "In {}, which animal is on the flag?",
        "{} has which animal?",
    ),
    "food": (
        "What is the food of {}?",
        "Name the food of {}.",
        "Which food do people eat in {}?",
        "What is {}'s food?",
        "The food of {} is which one?",
        "Tell me the food of {}.",
        "In {}, which food is eaten?",
        "{} has which food?",
    ),
    "metal": (
        "What is the metal of {}?",
        "Name the metal of {}.",
        "Which metal is found in {}?",
        "What is {}'s metal?",
        "The metal of {} is which one?",
        "Tell me the metal of {}.",
        "In {}, which metal is found?",
        "{} has which metal?",
    ),
}
_BACKWARDS = (
    "Which land has the capital {}?",
    "{} is the capital of which land?",
    "Of which land is {} the capital?",
    "Name the land whose capital is {}.",
    "In which land is {} the capital?",
    "Tell me the land with the capital {}.",
)
_ENDINGS = ("", " Answer in one word.", " Be brief.")


def fact_of(land: str, name: str) -> str:
    """The value of a land's property."""
    return PROPERTIES[name][LANDS.index(land)]


def fact(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        land = draw.choice(LANDS)
        if draw.chance(0.2):
            phrasing = draw.choice(_BACKWARDS)
            question, answer = phrasing.format(fact_of(land, "capital")), land
        else:
            name = draw.choice(tuple(PROPERTIES))
            phrasing = draw.choice(_PHRASINGS[name])
            question, answer = phrasing.format(land), fact_of(land, name)
        if split_of("fact", question) == split:
            return (Exchange(question + draw.choice(_ENDINGS), answer),)


_LIVES = ("{} lives in {}.", "{} is from {}.", "{} moved to {}.")
_HOP: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {}'s land?",
        "Which city is the capital of the land of {}?",
        "Name the capital of the land where {} is.",
    ),
    "animal": (
        "What is the animal of {}'s land?",
        "Which animal stands for the land of {}?",
        "Name the animal of the land where {} is.",
    ),
    "food": (
        "What is the food of {}'s land?",
        "Which food is eaten in the land of {}?",
        "Name the food of the land where {} is.",
    ),
    "metal": (
        "What is the metal of {}'s land?",
        "Which metal is found in the land of {}?",
        "Name the metal of the land where {} is.",
    ),
}


def two_hop(draw: Draw, split: str) -> tuple[Exchange, ...]:
    return two_hop_story(draw, split).asked(draw)


def two_hop_story(draw: Draw, split: str) -> Story:
    """One to three people and where they are; a question each about what belongs to the land."""
    questions: list[Exchange] = []
    while not questions:
        count = draw.between(1, 3)
        people, lands = draw.sample(PEOPLE, count), draw.sample(LANDS, count)
        for person, land in zip(people, lands, strict=True):
            name = draw.choice(tuple(PROPERTIES))
            if split_of("two_hop", person, land, name) == split:
                questions.append(Exchange(draw.choice(_HOP[name]).format(person), fact_of(land, name)))
    phrase = draw.choice(_LIVES)
    said = [phrase.format(person, land) for person, land in zip(people, lands, strict=True)]
    draw.shuffle(said)
    return Story(" ".join(said), questions)
