"""How sounds are talked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.language import article, listing
from alula_fledgling.microworld.sounds import (
    MOST_TONES,
    SOURCES_OF_SOUND,
    UNSEEN_VOICES,
    Sound,
    Tone,
    draw_sound,
    split_of_sound,
    unseen_tones,
)

SOUND_FAMILIES = ("tones", "source", "height", "interval", "sequence", "hearing", "melody")
"""How many; what sounds; high or low; higher or lower; which came first; is it to be heard; all of it."""

_LEAST_INTERVAL = 3  # semitones


def sound_and_question(draw: Draw, family: str, split: str) -> tuple[Sound, Exchange]:
    """A sound of ``split`` with a question of ``family``."""
    least, most, differing = _SHAPES[family]
    while True:
        first = draw.choice(sorted(UNSEEN_VOICES)) if split == "unseen" else None
        sound = draw_sound(draw, draw.between(least, most), first=first, differing=differing)
        if first is None and split_of_sound(sound) != split:
            continue
        exchange = _ASK[family](draw, sound, unseen_tones(sound))
        if exchange is not None:
            return sound, exchange


def melody(sound: Sound) -> str:
    """The one canonical description of a sound: its tones in the order of time."""
    return listing([article(tone.name) for tone in sound.tones])


_SHAPES = {
    "tones": (1, MOST_TONES, False),
    "source": (1, MOST_TONES, False),
    "height": (1, 3, True),
    "interval": (2, 3, False),
    "sequence": (2, 3, True),
    "hearing": (1, 3, True),
    "melody": (1, 3, False),
}
"""Per family: least and most tones, and whether each has a source of its own."""


def _tones(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange:
    question = draw.choice(("How many tones are there?", "How many tones do you hear?", "Count the tones."))
    return Exchange(question, str(len(sound.tones)))


def _source(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange | None:
    if len(sound.tones) == 1:
        return Exchange(draw.choice(("What do you hear?", "What is heard?")), sound.tones[0].source)
    at = draw.choice((0, -1))
    if focus and sound.tones[at] not in focus:
        return None
    word = "first" if at == 0 else "last"
    return Exchange(draw.choice((f"What do you hear {word}?", f"What comes {word}?")), sound.tones[at].source)


def _height(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange:
    tone = focus[0] if focus else draw.choice(sound.tones)
    question = draw.choice(("Is the {} high or low?", "The {} is high or low?")).format(tone.source)
    return Exchange(question, tone.height)


def _interval(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange | None:
    first, last = sound.tones[0], sound.tones[-1]
    if focus and first not in focus and last not in focus:
        return None
    if abs(first.semitone - last.semitone) < _LEAST_INTERVAL:
        return None
    question = draw.choice(
        ("Is the last tone higher or lower than the first?", "Which is the last tone, higher or lower than the first?")
    )
    return Exchange(question, "higher" if last.semitone > first.semitone else "lower")


def _sequence(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange | None:
    one, other = draw.sample(sound.tones, 2)
    if focus and one not in focus and other not in focus:
        one = focus[0]
    word = draw.choice(("first", "last"))
    ordered = sorted((one, other), key=sound.tones.index)
    question = draw.choice(("Which comes {}, the {} or the {}?", "What do you hear {}: the {} or the {}?"))
    return Exchange(question.format(word, one.source, other.source), ordered[0 if word == "first" else -1].source)


def _hearing(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange:
    heard = [tone.source for tone in sound.tones]
    if draw.chance(0.5):
        source, answer = (focus[0].source if focus else draw.choice(heard)), "yes"
    else:
        source, answer = draw.choice([source for source in SOURCES_OF_SOUND if source not in heard]), "no"
    return Exchange(draw.choice(("Do you hear {}?", "Is there {}?")).format(article(source)), answer)


def _melody(draw: Draw, sound: Sound, focus: Sequence[Tone]) -> Exchange:
    question = draw.choice(("Describe the sound.", "What is to be heard?", "Say what you hear.", "Give a caption."))
    return Exchange(question, melody(sound))


_ASK: dict[str, Callable[[Draw, Sound, Sequence[Tone]], Exchange | None]] = {
    "tones": _tones,
    "source": _source,
    "height": _height,
    "interval": _interval,
    "sequence": _sequence,
    "hearing": _hearing,
    "melody": _melody,
}
