"""Streams of items: position n of a stream is a pure function of its name, split, seed and n."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from alula.draws import Draw
from alula.errors import UsageError
from alula_fledgling.microworld.episodes import EPISODE_FAMILIES, MOST_SHOTS, episode
from alula_fledgling.microworld.film_questions import FILM_FAMILIES, film_and_question
from alula_fledgling.microworld.films import FilmClip
from alula_fledgling.microworld.items import Exchange, Item, Kind, Message, Split, Target, assistant, user, user_about
from alula_fledgling.microworld.language import QUESTION_KINDS, ask
from alula_fledgling.microworld.named import NAMED_FAMILIES, Pairing, named_caption, named_questions
from alula_fledgling.microworld.picture_questions import PICTURE_FAMILIES, pictures_and_question
from alula_fledgling.microworld.render import SceneImage
from alula_fledgling.microworld.scenes import (
    PAIRS,
    SEEN_PAIRS,
    UNSEEN_PAIRS,
    AnyScene,
    draw_number,
    draw_scene,
    split_of_scene,
)
from alula_fledgling.microworld.sense_questions import COLORLESS, SENSE_FAMILIES, sense_and_question
from alula_fledgling.microworld.skills import SINGLE_TURN_FAMILIES, SKILLS, TEXT_FAMILIES
from alula_fledgling.microworld.sound_questions import SOUND_FAMILIES, sound_and_question
from alula_fledgling.microworld.sounds import SoundClip

VISUAL_FAMILIES = QUESTION_KINDS
DIALOGUE_PATTERNS = tuple("".join(turns) for length in (1, 2, 3) for turns in itertools.product("TV", repeat=length))
"""Every order of text (T) and visual (V) turns up to three turns: 14 patterns."""

_NAMED: Mapping[str, Pairing] = {
    "named_caption": "shown",
    "named_blind": "blind",
    "named_shuffled": "shuffled",
    "named_told": "told",
}
_SENSE_CAPTIONS = {f"{name}_caption": name for name in ("points", "depth", "normals", "motion", "response")}
SOURCES = (
    "text", "visual", "caption", "dialogue", "episode", "pictures", "pictures_caption", "film", "film_caption", "sound",
    "sound_caption", "named", *_NAMED, *SENSE_FAMILIES, *_SENSE_CAPTIONS,
)  # fmt: skip
_KNOWN_ONLY = (
    *COLORLESS,
    *(f"{name}_caption" for name in COLORLESS),
    "text",
    "episode",
    "pictures",
    "pictures_caption",
    "named",
    *_NAMED,
)
"""sources without an unseen split"""

_UNSEEN = tuple(pair for pair in PAIRS if pair in UNSEEN_PAIRS)
_MOST_THINGS = {"caption": 3, "count": 5}
_NUMBERS_AMONG_CAPTIONS = 0.25


@dataclass(frozen=True)
class Stream:
    """Items by position.

    Attributes:
        name: one of ``SOURCES``.
        split: ``"train"``, ``"test"`` or ``"unseen"``; text turns of unseen dialogues are test items.
        seed: another seed, other items (of the same split).
        families: the families (for ``"dialogue"``: patterns) to go through in turn; all of them by default.
        n: number of items, or None for a stream without end.
    """

    name: str
    split: Split = "train"
    seed: int = 0
    families: tuple[str, ...] = ()
    n: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise UsageError(f"no microworld source {self.name!r}", remedy=f"use one of: {', '.join(SOURCES)}")
        if self.split not in ("train", "test", "unseen"):
            raise UsageError(f"no split {self.split!r} in the microworld", remedy="use train, test or unseen")
        if self.split == "unseen" and self.name in _KNOWN_ONLY:
            raise UsageError(
                f"{self.name} items have no unseen attribute combinations", remedy="use split train or test"
            )
        legal = _FAMILIES[self.name]
        unknown = [family for family in self.families if family not in legal]
        if unknown:
            raise UsageError(
                f"the microworld source {self.name!r} has no {unknown[0]!r}", remedy=f"choose from: {', '.join(legal)}"
            )

    def __len__(self) -> int:
        if self.n is None:
            raise TypeError("this stream has no end")
        return self.n

    def __getitem__(self, index: int) -> Item:
        """The item at ``index``, made on the spot.

        Raises:
            IndexError: outside ``0..n-1``.
        """
        if index < 0 or (self.n is not None and index >= self.n):
            raise IndexError(index)
        families = self.families or _FAMILIES[self.name]
        family = families[index % len(families)]
        draw = Draw(self.name, self.split, self.seed, index)
        identity = f"{self.name}-{self.split}-{self.seed}-{index}"
        if self.name == "text":
            said = SKILLS[family](draw, self.split)
            return _conversation(
                identity, "text", family, self.split, [(None, family, turn) for turn in said], last_only=True
            )
        if self.name == "dialogue":
            return _dialogue(draw, identity, family, self.split)
        if self.name == "episode":
            shots, questions = episode(draw, family, self.split, draw.between(1, MOST_SHOTS))
            turns = [*((scene, family, each) for scene, each in shots), *((None, family, each) for each in questions)]
            whole = _conversation(identity, "dialogue", family, self.split, turns, last_only=True)
            for message in whole.messages[1 : 2 * len(shots) : 2]:
                message["train"] = False  # always the same words
            return whole
        if self.name.startswith("pictures"):
            return _pictures(draw, identity, family, self.split, is_caption=self.name == "pictures_caption")
        if self.name.startswith("film"):
            film, exchange = film_and_question(draw, family, self.split)
            message = user_about(exchange.question, "video", FilmClip(film))
            return _single(identity, "film", family, self.split, message, exchange.answer)
        if self.name.startswith("sound"):
            sound, exchange = sound_and_question(draw, family, self.split)
            message = user_about(exchange.question, "audio", SoundClip(sound))
            return _single(identity, "sound", family, self.split, message, exchange.answer)
        sense = _SENSE_CAPTIONS.get(self.name, self.name)
        if sense in SENSE_FAMILIES:
            shown = sense_and_question(draw, sense, family, self.split)
            message = user_about(shown.exchange.question, shown.medium, shown.clip, shown.picture)
            return _single(identity, shown.medium, family, self.split, message, shown.exchange.answer)
        if self.name == "named":
            asked = draw.choice(named_questions(self.seed, self.split, family))
            words = Exchange(asked.question, asked.answer)
            return _conversation(identity, "text", family, self.split, [(None, family, words)])
        if self.name in _NAMED:
            pictured, exchange = named_caption(draw, self.seed, self.split, _NAMED[self.name])
            kind = "text" if pictured is None else "visual"
            return _conversation(identity, kind, family, self.split, [(pictured, family, exchange)])
        scene, exchange = _picture(draw, family, self.split, numbers=self.name == "caption")
        return _conversation(identity, "visual", family, self.split, [(scene, family, exchange)])

    def __iter__(self) -> Iterator[Item]:
        positions = itertools.count() if self.n is None else range(self.n)
        return (self[index] for index in positions)


_FAMILIES = {
    "text": TEXT_FAMILIES,
    "visual": VISUAL_FAMILIES,
    "caption": ("caption",),
    "dialogue": DIALOGUE_PATTERNS,
    "episode": EPISODE_FAMILIES,
    "pictures": PICTURE_FAMILIES,
    "pictures_caption": PICTURE_FAMILIES,
    "film": FILM_FAMILIES,
    "film_caption": ("story",),
    "sound": SOUND_FAMILIES,
    "sound_caption": ("melody",),
    "named": NAMED_FAMILIES,
    **SENSE_FAMILIES,
    **{name: ("journey" if sense == "motion" else "caption",) for name, sense in _SENSE_CAPTIONS.items()},
    **dict.fromkeys(_NAMED, ("caption",)),
}


def source(
    name: str, *, split: Split = "train", seed: int = 0, families: Sequence[str] | None = None, n: int | None = None
) -> Stream:
    """A stream by the name recipes use, a member of ``SOURCES``.

    Raises:
        UsageError: an unknown name, split or family.
    """
    return Stream(name, split, seed, tuple(families or ()), n)


def text_items(n: int | None, *, split: Split, seed: int, families: Sequence[str] | None = None) -> Iterator[Item]:
    """Questions in words, the families in turn."""
    return iter(source("text", split=split, seed=seed, families=families, n=n))


def visual_items(n: int | None, *, split: Split, seed: int, families: Sequence[str] | None = None) -> Iterator[Item]:
    """Questions about a picture, the families in turn."""
    return iter(source("visual", split=split, seed=seed, families=families, n=n))


def caption_items(n: int | None, *, split: Split, seed: int) -> Iterator[Item]:
    """Pictures with their description, a quarter of them written numbers; what an alignment stage needs."""
    return iter(source("caption", split=split, seed=seed, n=n))


def dialogue_items(n: int | None, *, split: Split, seed: int, patterns: Sequence[str] | None = None) -> Iterator[Item]:
    """Dialogues over text and pictures, the patterns in turn; every turn is scored."""
    return iter(source("dialogue", split=split, seed=seed, families=patterns, n=n))


def picture_items(n: int | None, *, split: Split, seed: int, families: Sequence[str] | None = None) -> Iterator[Item]:
    """Questions about several pictures, the families in turn."""
    return iter(source("pictures", split=split, seed=seed, families=families, n=n))


def film_items(n: int | None, *, split: Split, seed: int, families: Sequence[str] | None = None) -> Iterator[Item]:
    """Questions about a film, the families in turn."""
    return iter(source("film", split=split, seed=seed, families=families, n=n))


def sound_items(n: int | None, *, split: Split, seed: int, families: Sequence[str] | None = None) -> Iterator[Item]:
    """Questions about a sound, the families in turn."""
    return iter(source("sound", split=split, seed=seed, families=families, n=n))


def sense_items(
    name: str, n: int | None, *, split: Split, seed: int, families: Sequence[str] | None = None
) -> Iterator[Item]:
    """Questions about a measured medium, the families in turn.

    Args:
        name: ``points``, ``depth``, ``depth_pictured``, ``normals``, ``normals_pictured``, ``motion`` or ``response``.
    """
    if name not in SENSE_FAMILIES:
        raise UsageError(f"no measured medium {name!r}", remedy=f"one of: {', '.join(SENSE_FAMILIES)}")
    return iter(source(name, split=split, seed=seed, families=families, n=n))


def _single(identity: str, kind: Kind, family: str, split: Split, asked: Message, answer: str) -> Item:
    return Item(identity, kind, family, split, (asked, assistant(answer)), (Target(1, family, kind, answer),))


def _pictures(draw: Draw, identity: str, family: str, split: Split, *, is_caption: bool) -> Item:
    """Several pictures with a question; or one of them with a caption of what matters to the question, which is in what
    is read before."""
    asked = pictures_and_question(draw, family, split)
    question = user(asked.exchange.question)
    question["content"][:0] = [
        part
        for place, scene in enumerate(asked.scenes, start=1)
        for part in (_text(f"{place}:"), {"type": "image", "image": SceneImage(scene)})
    ]
    if not is_caption:
        turns = question, assistant(asked.exchange.answer)
        return Item(identity, "visual", family, split, turns, (Target(1, family, "visual", asked.exchange.answer),))
    index = draw.below(len(asked.scenes))
    words = asked.told(index)
    turns = user("Describe the picture.", SceneImage(asked.scenes[index])), assistant(words)
    return Item(identity, "visual", family, split, turns, (Target(1, family, "visual", words),), (question,))


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def _dialogue(draw: Draw, identity: str, pattern: str, split: Split) -> Item:
    turns: list[tuple[AnyScene | None, str, Exchange]] = []
    for turn in pattern:
        if turn == "T":
            family = draw.choice(SINGLE_TURN_FAMILIES)
            turns.append((None, family, SKILLS[family](draw, "train" if split == "train" else "test")[0]))
        else:
            family = draw.choice(VISUAL_FAMILIES)
            scene, exchange = _picture(draw, family, split)
            turns.append((scene, family, exchange))
    return _conversation(identity, "dialogue", pattern, split, turns)


def _picture(draw: Draw, family: str, split: Split, *, numbers: bool = False) -> tuple[AnyScene, Exchange]:
    """A scene of ``split`` with a question of ``family``."""
    while True:
        if family == "digits" or (numbers and draw.chance(_NUMBERS_AMONG_CAPTIONS)):
            number = draw_number(draw)
            if split_of_scene(number) != ("train" if split == "train" else "test"):
                continue
            if split == "unseen" and len(number.digits) == 1:  # every digit is known: only numbers can be new
                continue
            exchange = ask(draw, family, number)
            assert exchange is not None
            return number, exchange
        count = draw.between(2 if family == "relation" else 1, _MOST_THINGS.get(family, 4))
        new = draw.choice(_UNSEEN) if split == "unseen" else None
        scene = draw_scene(draw, count, pairs=SEEN_PAIRS, alike=family == "count", first=new)
        if new is None and split_of_scene(scene) != split:
            continue
        focus = next((thing for thing in scene.things if thing.pair == new), None)
        # the pairs a question may name in vain: an unseen one must not be told by never being there
        exchange = ask(draw, family, scene, focus=focus, pairs=_UNSEEN if new else SEEN_PAIRS)
        if exchange is not None:
            return scene, exchange


def _conversation(
    identity: str,
    kind: str,
    family: str,
    split: Split,
    turns: Sequence[tuple[AnyScene | None, str, Exchange]],
    *,
    last_only: bool = False,
) -> Item:
    messages: list[Message] = []
    targets: list[Target] = []
    for scene, skill, exchange in turns:
        images = () if scene is None else (SceneImage(scene),)
        messages += [user(exchange.question, *images), assistant(exchange.answer)]
        targets.append(Target(len(messages) - 1, skill, "text" if scene is None else "visual", exchange.answer))
    return Item(identity, kind, family, split, tuple(messages), tuple(targets[-1:] if last_only else targets))  # type: ignore[arg-type]
