"""What the microworld hands out: items made of chat messages, with the turns that are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from alula.data.samples import user as user

Split = Literal["train", "test", "unseen"]
Kind = Literal["text", "visual", "dialogue", "film", "sound"]
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
        family: the skill it shows, a member of ``TEXT_FAMILIES``, ``VISUAL_FAMILIES``, ``FILM_FAMILIES`` or
            ``SOUND_FAMILIES``.
        kind: what is needed to answer it: nothing but words, an image, a film or a sound.
        answer: the gold answer.
    """

    turn: int
    family: str
    kind: Literal["text", "visual", "film", "sound"]
    answer: str


@dataclass(frozen=True)
class Item:
    """A conversation with its gold assistant turns.

    Attributes:
        id: deterministic name: stream, split, seed and index.
        kind: ``"text"``, ``"visual"``, ``"dialogue"``, ``"film"`` or ``"sound"``.
        family: the skill, or the pattern (``"TV"``) of a dialogue.
        split: ``"train"``, ``"test"`` or ``"unseen"`` (attribute combinations never seen in training).
        messages: chat messages in the shape of transformers v5; images, films and sounds are lazy ``SceneImage``,
            ``FilmClip`` and ``SoundClip`` objects.
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


def user_about(text: str, medium: Literal["video", "audio"], clip: Any) -> Message:
    """A user message: a film ("video") or a sound ("audio") first, then the text."""
    return {"role": "user", "content": [{"type": medium, medium: clip}, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
