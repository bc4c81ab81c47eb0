"""Tasks over the microworld, offline and seeded: text bare and after an image, visual skill, films,
sounds, dialogues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from alula.bounds import check_count, check_seed
from alula.data.interleave import SETTINGS, History
from alula.errors import UsageError
from alula.evaluation.items import ItemTask, Task, TaskItem, images_of
from alula_fledgling import microworld
from alula_fledgling.microworld.items import Item

_MOST_TOKENS = 32
"""the longest gold answer, a description of three things, takes the fledgling 26 tokens and one to end the turn"""
_LETTERS = {
    "text": "T", "visual": "V", "film": "F", "sound": "S",
    "points": "P", "depth": "D", "normals": "N", "motion": "M", "response": "R",
}  # fmt: skip
"""kind of a turn -> its letter in the pattern of a conversation"""
_PARTNER_SEED = 7919
"""the earlier turn is drawn from another stream than the question, so that the two are unrelated"""


def text_bare(n: int = 400, seed: int = 0, families: Sequence[str] | None = None) -> Task:
    """Text skill with nothing before the question: held-out items of all text families."""
    return _task("text_bare", "text, bare", lambda: _turns(_text(n, seed, families)), n=n, seed=seed)


def text_after_image(
    n: int = 400, seed: int = 0, families: Sequence[str] | None = None, style: str = "answered"
) -> Task:
    """The items of `text_bare` after an unrelated image.

    Args:
        style: ``"answered"``: an earlier turn shows the image with a short question and its gold answer;
            ``"plain"``: the image stands before the question, in the same user turn, with no word about it.
    """
    if style not in ("answered", "plain"):
        raise UsageError(f"style {style!r} is not one of 'answered', 'plain'", where="task 'text_after_image'")
    put = _after_turn if style == "answered" else _after_bare_image

    def make() -> list[TaskItem]:
        partners = microworld.visual_items(n, split="test", seed=seed + _PARTNER_SEED)
        return _turns(map(put, _text(n, seed, families), partners), suffix="@image")

    return _task("text_after_image", "text, after an image", make, n=n, seed=seed, style=style)


def text_after_text(n: int = 400, seed: int = 0, families: Sequence[str] | None = None) -> Task:
    """The items of `text_bare` after an unrelated text turn: the control that tells an image's effect from a turn's."""

    def make() -> list[TaskItem]:
        skills = microworld.TEXT_FAMILIES
        stream = microworld.source("text", split="test", seed=seed + _PARTNER_SEED)
        questions = list(_text(n, seed, families))
        # step on from the question's own family by 1, 2, ... so that the two are never of the same skill
        steps = (skills.index(item.family) + 1 + i % (len(skills) - 1) for i, item in enumerate(questions))
        partners = (stream[i * len(skills) + step % len(skills)] for i, step in enumerate(steps))
        return _turns(map(_after_turn, questions, partners), suffix="@text")

    return _task("text_after_text", "text, after a text turn", make, n=n, seed=seed)


class SkillTask(Protocol):
    """Makes a task of ``n`` items, of all families by default."""

    def __call__(self, n: int = 400, seed: int = 0, families: Sequence[str] | None = None) -> Task: ...


def _shown_skill(name: str, title: str, items: Callable[..., Iterable[Item]], split: str) -> SkillTask:
    def task(n: int = 400, seed: int = 0, families: Sequence[str] | None = None) -> Task:
        return _task(name, title, lambda: _turns(items(n, split=split, seed=seed, families=families)), n=n, seed=seed)

    return task


visual = _shown_skill("visual", "visual skill", microworld.visual_items, "test")
"""Visual skill on held-out scenes."""
visual_unseen = _shown_skill("visual_unseen", "visual skill, unseen combinations", microworld.visual_items, "unseen")
"""Visual skill on scenes with attribute combinations that no training scene showed."""


def visual_later(n: int = 400, seed: int = 0, families: Sequence[str] | None = None) -> Task:
    """The items of `visual` a turn later: an earlier turn shows the image with an unrelated text question and its gold
    answer, and the question about the image comes in a turn without one."""

    def make() -> list[TaskItem]:
        partners = _text(n, seed + _PARTNER_SEED, None)
        items = microworld.visual_items(n, split="test", seed=seed, families=families)
        return _turns(map(_asked_later, items, partners), suffix="@later")

    return _task("visual_later", "visual skill, a turn later", make, n=n, seed=seed)


pictures = _shown_skill("pictures", "several pictures", microworld.picture_items, "test")
"""Questions about several held-out pictures, which one of them cannot answer."""
film = _shown_skill("film", "films", microworld.film_items, "test")
"""Questions about held-out films."""
film_unseen = _shown_skill("film_unseen", "films, unseen combinations", microworld.film_items, "unseen")
"""Questions about films that turn on a look or a move that no training film showed."""
sound = _shown_skill("sound", "sounds", microworld.sound_items, "test")
"""Questions about held-out sounds."""
sound_unseen = _shown_skill("sound_unseen", "sounds, unseen combinations", microworld.sound_items, "unseen")
"""Questions about sounds with a voice that no training sound had."""


def _measured(source: str, title: str, split: str = "test") -> SkillTask:
    name = source if split == "test" else f"{source}_{split}"
    return _shown_skill(name, title, partial(microworld.sense_items, source), split)


points = _measured("points", "point clouds")
"""Questions about held-out point clouds."""
points_unseen = _measured("points", "point clouds, unseen combinations", "unseen")
"""Questions about point clouds with attribute combinations that no training scene showed."""
depth = _measured("depth", "depth")
"""Questions about held-out depth maps without a picture, which show no colors."""
depth_pictured = _measured("depth_pictured", "depth beside a picture")
"""Questions about held-out depth maps and the pictures they are of."""
normals = _measured("normals", "surface normals")
"""Questions about held-out surface normals without a picture."""
normals_pictured = _measured("normals_pictured", "surface normals beside a picture")
"""Questions about held-out surface normals and the pictures they are of."""
motion = _measured("motion", "motion")
"""Questions about held-out recordings of a moving thing's accelerometer and gyroscope."""
response = _measured("response", "responses")
"""Questions about the scenes that held-out responses answer to."""
response_unseen = _measured("response", "responses, unseen combinations", "unseen")
"""Questions about responses to attribute combinations that no training scene showed."""


def dialogue(n: int = 200, seed: int = 0, history: History = "gold", patterns: Sequence[str] | None = None) -> Task:
    """Interleaved dialogues of text (T) and visual (V) turns; every assistant turn is scored, as an item of its own.

    Args:
        n: dialogues (items are about two per dialogue).
        history: earlier answers as written (``"gold"``) or the model's own (``"generated"``).
        patterns: orders of turns such as ``("T", "VT")``; all of the microworld's by default.
    """
    _check_history(history, "dialogue")
    chosen = {} if patterns is None else {"patterns": tuple(patterns)}
    return _task(
        "dialogue",
        "interleaved dialogues",
        lambda: _turns(microworld.dialogue_items(n, split="test", seed=seed, **chosen), history=history),
        n=n,
        seed=seed,
        history=history,
    )


def interleaved(n: int = 400, seed: int = 0, history: History = "gold", settings: Sequence[str] = SETTINGS) -> Task:
    """The dialogues of `dialogue` in the settings of the interleaved benchmark; only the last turn is scored.

    Results are broken down by setting (``"TTV"``), which stands as the family; the skill is a tag.

    Args:
        n: dialogues, the settings in turn; as many items.
        settings: orders of turns; by default the paper's six and text questions after images, see
            `alula.data.interleave`.
    """
    _check_history(history, "interleaved")

    check_count(n, "task 'interleaved': n")
    check_seed(seed, "task 'interleaved': seed")

    def make() -> list[TaskItem]:
        dialogues = microworld.dialogue_items(n, split="test", seed=seed, patterns=settings)
        return [item for dialogue in dialogues for item in _last_scored(turns(dialogue, history=history))]

    return ItemTask(
        name="interleaved",
        title="last turn of interleaved dialogues",
        source=_Once(make),
        scorer=lambda item, answer: float(microworld.score(item.tags["skill"], item.gold, answer)),
        max_new_tokens=_MOST_TOKENS,
        settings={"n": n, "seed": seed, "history": history, "settings": list(settings)},
    )


def dialogue_turns(n: int = 400, seed: int = 0, history: History = "gold") -> Task:
    """`dialogue` with about ``n`` scored turns, for ``n // 2`` dialogues."""
    return dialogue(max(1, n // 2), seed, history)


def _check_history(history: str, task: str) -> None:
    if history not in ("gold", "generated"):
        raise UsageError(f"history {history!r} is not one of 'gold', 'generated'", where=f"task {task!r}")


def _task(name: str, title: str, make: Callable[[], list[TaskItem]], *, n: int, seed: int, **settings: object) -> Task:
    check_count(n, f"task {name!r}: n")
    check_seed(seed, f"task {name!r}: seed")
    return ItemTask(
        name=name,
        title=title,
        source=_Once(make),
        scorer=_score,
        max_new_tokens=_MOST_TOKENS,
        settings={"n": n, "seed": seed, **settings},
    )


class _Once:
    """Make the items at the first call and keep them: one task is asked of several models."""

    def __init__(self, make: Callable[[], list[TaskItem]]) -> None:
        self.make = make
        self.made: list[TaskItem] | None = None

    def __call__(self) -> list[TaskItem]:
        if self.made is None:
            self.made = self.make()
        return self.made


def _score(item: TaskItem, answer: str) -> float:
    return float(microworld.score(item.family, item.gold, answer))


def _text(n: int, seed: int, families: Sequence[str] | None) -> Iterable[Item]:
    return microworld.text_items(n, split="test", seed=seed, families=families)


def turns(item: Item, *, suffix: str = "", history: History = "gold") -> list[TaskItem]:
    """Return one `TaskItem` per scored turn of a microworld item, each with all that was said before it."""
    pattern = "".join(_LETTERS[target.kind] for target in item.targets)
    ids = [item.id + suffix + (f"#{target.turn}" if len(item.targets) > 1 else "") for target in item.targets]
    return [
        TaskItem(
            id=ids[rank],
            family=target.family,
            messages=item.messages[: target.turn],
            gold=target.answer,
            cluster=item.id if len(ids) > 1 else "",
            tags={"kind": target.kind, "pattern": pattern, "before": pattern[:rank] or "nothing"},
            follows=tuple((item.targets[i].turn, ids[i]) for i in range(rank)) if history == "generated" else (),
        )
        for rank, target in enumerate(item.targets)
    ]


def _last_scored(turns: Sequence[TaskItem]) -> list[TaskItem]:
    """The last turn under its dialogue's setting, behind those it must wait for."""
    *earlier, last = turns
    counted = replace(last, family=last.tags["pattern"], tags={**last.tags, "skill": last.family})
    return [*(replace(turn, scored=False) for turn in earlier if last.follows), counted]


def _turns(items: Iterable[Item], **options: Any) -> list[TaskItem]:
    return [turn for item in items for turn in turns(item, **options)]


def _after_turn(item: Item, partner: Item) -> Item:
    """Put the whole of ``partner``, gold answers included, before ``item`` (behind a system message)."""
    head = 1 if item.messages[0]["role"] == "system" else 0
    shift = len(partner.messages)
    return replace(
        item,
        messages=(*item.messages[:head], *partner.messages, *item.messages[head:]),
        targets=tuple(replace(target, turn=target.turn + shift) for target in item.targets),
    )


def _asked_later(item: Item, partner: Item) -> Item:
    """Move the images of ``item`` to the start of ``partner``, which is asked and answered before it."""
    media = [part for message in item.messages for part in message["content"] if part["type"] != "text"]
    words = [
        {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
        for message in item.messages
    ]
    first = next(i for i, message in enumerate(partner.messages) if message["role"] == "user")
    shown = {**partner.messages[first], "content": [*media, *partner.messages[first]["content"]]}
    earlier = replace(partner, messages=(*partner.messages[:first], shown, *partner.messages[first + 1 :]))
    return _after_turn(replace(item, messages=tuple(words)), earlier)


def _after_bare_image(item: Item, partner: Item) -> Item:
    """Put the images of ``partner`` at the start of the first user turn of ``item``."""
    images = [{"type": "image", "image": image} for image in images_of(partner.messages)]
    first = next(i for i, message in enumerate(item.messages) if message["role"] == "user")
    shown = {**item.messages[first], "content": [*images, *item.messages[first]["content"]]}
    return replace(item, messages=(*item.messages[:first], shown, *item.messages[first + 1 :]))
