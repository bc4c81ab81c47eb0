"""What the microworld hands out: items made of chat messages, with the turns that are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from alula.data.samples import user as user

Split = Literal["train", "test", "unseen"]
Sense = Literal["points", "depth", "normals", "motion", "response"]
Kind = Literal["text", "visual", "dialogue", "film", "sound", "points", "depth", "normals", "motion", "response"]
Message = dict[str, Any]


class Exchange(NamedTuple):
    """One question and its gold answer, both plain text."""

    question: str
    answer: str


@dataclass(frozen=True)
class Target:
    """An assistant turn that is scored.

    Attributes:
        turn: its index in ``Item.messages``.
        family: the skill it shows, a member of ``TEXT_FAMILIES``, ``VISUAL_FAMILIES``, ``FILM_FAMILIES``,
            ``SOUND_FAMILIES`` or ``SENSE_FAMILIES``.
        kind: what is needed to answer it: nothing but words, an image, a film, a sound or a measured medium.
        answer: the gold answer.
    """

    turn: int
    family: str
    kind: Kind
    answer: str


@dataclass(frozen=True)
class Item:
    """A conversation with its gold assistant turns.

    Attributes:
        id: deterministic name: stream, split, seed and index.
        kind: ``"text"``, ``"visual"``, ``"dialogue"``, ``"film"``, ``"sound"`` or a `Sense`.
        family: the skill, or the pattern (``"TV"``) of a dialogue.
        split: ``"train"``, ``"test"`` or ``"unseen"`` (attribute combinations never seen in training).
        messages: chat messages in the shape of transformers v5; media are lazy ``SceneImage``,
            ``FilmClip``, ``SoundClip``, ``Cloud`` ... objects.
        targets: the scored turns.
        browsed: the conversation that is read before this one is answered (`alula.grafts.browse`), where that is
            another one.
    """

    id: str
    kind: Kind
    family: str
    split: Split
    messages: tuple[Message, ...] = field(hash=False)
    targets: tuple[Target, ...]
    browsed: tuple[Message, ...] = field(default=(), hash=False)


def user_about(text: str, medium: str, clip: Any, picture: Any = None) -> Message:
    """A user message: a film ("video"), a sound ("audio") or a `Sense` first, then the text.

    Args:
        picture: of the view that a map is of.
    """
    part = {"type": medium, medium: clip, **({} if picture is None else {"image": picture})}
    return {"role": "user", "content": [part, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
