"""Sounds: short rows of tones made by four things, and their waveform.

The waveform is computed in double precision and rounded to 16 bits, so platforms whose sine differs in the last bit
give the same samples but for a rare one that is off by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alula.draws import Draw
from alula_fledgling.microworld.splits import split_of

SAMPLE_RATE = 16_000
NUM_SAMPLES = 20_480
"""A sound lasts 1.28 seconds."""

SOURCES_OF_SOUND = ("violin", "kettle", "hammer", "bottle")
"""What makes a tone: bowed strings (all harmonics, vibrato), a whistle (nearly a sine), struck metal (inharmonic
partials that die away), blown glass (odd harmonics and breath)."""

HEIGHTS = ("low", "high")
MOST_TONES = 4

UNSEEN_VOICES = frozenset({("violin", "low"), ("bottle", "high")})
"""Combinations of source and height kept out of all training."""

VOICES = tuple((source, height) for source in SOURCES_OF_SOUND for height in HEIGHTS)
SEEN_VOICES = tuple(voice for voice in VOICES if voice not in UNSEEN_VOICES)

_BASE_HZ = 196.0
_SEMITONES = {"low": range(9), "high": range(16, 25)}
_SPACING, _LENGTH, _LEAD = 4_880, 4_160, 480  # samples between tones, of a tone, before the first
_FULL = 0.55 * 32767

# (multiple of the pitch, strength) of the partials
_PARTIALS: dict[str, tuple[tuple[float, float], ...]] = {
    "violin": tuple((float(h), 1.0 / h) for h in range(1, 8)),
    "kettle": ((1.0, 1.0), (2.0, 0.06)),
    "hammer": ((1.0, 1.0), (2.76, 0.7), (5.4, 0.4)),
    "bottle": ((1.0, 1.0), (3.0, 0.35), (5.0, 0.15)),
}


@dataclass(frozen=True)
class Tone:
    """One tone: who makes it, and how many semitones it lies above G3 (196 Hz)."""

    source: str
    semitone: int

    @property
    def height(self) -> str:
        return "high" if self.semitone in _SEMITONES["high"] else "low"

    @property
    def voice(self) -> tuple[str, str]:
        return self.source, self.height

    @property
    def name(self) -> str:
        return f"{self.height} {self.source}"

    @property
    def hertz(self) -> float:
        return _BASE_HZ * 2 ** (self.semitone / 12)


@dataclass(frozen=True)
class Sound:
    """Tones in the order of time, and what does not matter.

    Attributes:
        tones: one to `MOST_TONES`.
        late: samples everything starts late.
        soft: loudness in eighths, 4 to 8.
        hiss: seed of the background noise.
    """

    tones: tuple[Tone, ...]
    late: int = 0
    soft: int = 8
    hiss: int = 0

    @property
    def content(self) -> str:
        """What is to be heard."""
        return "; ".join(f"{tone.source} {tone.semitone}" for tone in self.tones)


@dataclass(frozen=True)
class SoundClip:
    """A sound that is made only when asked for. Cheap to hold, hash and pickle."""

    sound: Sound

    @property
    def rate(self) -> int:
        """Samples per second."""
        return SAMPLE_RATE

    def load(self) -> np.ndarray:
        """The waveform, int16 (NUM_SAMPLES,)."""
        return render_sound(self.sound)

    def fingerprint(self) -> str:
        """What decides the samples."""
        return repr(self.sound)


def onset(sound: Sound, place: int) -> int:
    """First sample of the tone at ``place``."""
    return _LEAD + sound.late + place * _SPACING


def tone_samples() -> int:
    """Length of a tone."""
    return _LENGTH


def render_sound(sound: Sound) -> np.ndarray:
    """The waveform, int16 (NUM_SAMPLES,)."""
    wave = 0.004 * noise(sound.hiss, NUM_SAMPLES)
    for place, tone in enumerate(sound.tones):
        begin = onset(sound, place)
        wave[begin : begin + _LENGTH] += sound.soft / 8 * _tone(tone, sound.hiss + 1 + place)
    return np.clip(np.rint(wave * _FULL), -32768, 32767).astype(np.int16)


def _tone(tone: Tone, seed: int) -> np.ndarray:
    """One tone, (_LENGTH,) float64 within about -1..1."""
    time = np.arange(_LENGTH) / SAMPLE_RATE
    cycles = tone.hertz * time
    if tone.source == "violin":  # vibrato: the pitch swings by half a percent, six times a second
        cycles = cycles + tone.hertz * 0.005 / (2 * math.pi * 6) * np.sin(2 * math.pi * 6 * time)
    partials = _PARTIALS[tone.source]
    wave = np.zeros(_LENGTH)
    for multiple, strength in partials:
        fade = np.exp(-time * 9 * multiple**0.5) if tone.source == "hammer" else 1.0
        wave += strength * fade * np.sin(2 * math.pi * multiple * cycles)
    wave /= math.fsum(strength for _, strength in partials) ** 0.5 * 1.4
    if tone.source == "bottle":
        wave += 0.05 * noise(seed, _LENGTH)
    attack = {"violin": 0.05, "kettle": 0.02, "hammer": 0.002, "bottle": 0.03}[tone.source]
    return wave * np.minimum(1.0, time / attack) * np.minimum(1.0, (time[-1] - time) / 0.02)


def noise(seed: int, count: int) -> np.ndarray:
    """White noise in -1..1 from integer arithmetic alone (SplitMix64's finaliser), so the same everywhere."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def draw_sound(
    draw: Draw,
    count: int,
    *,
    first: tuple[str, str] | None = None,
    differing: bool = False,
) -> Sound:
    """Draw a sound of ``count`` tones.

    Args:
        first: a voice that one of the tones must have; by default only seen ones occur.
        differing: whether all tones come from different sources.
    """
    if differing:
        sources = draw.sample([s for s in SOURCES_OF_SOUND if first is None or s != first[0]], count - bool(first))
    else:
        sources = [draw.choice(SOURCES_OF_SOUND) for _ in range(count - bool(first))]
    voices = [draw.choice([voice for voice in SEEN_VOICES if voice[0] == source]) for source in sources]
    if first is not None:
        voices.insert(draw.below(count), first)
    tones = tuple(Tone(source, draw.choice(_SEMITONES[height])) for source, height in voices)
    return Sound(tones, draw.below(320), draw.between(4, 8), draw.below(1 << 20))


def unseen_tones(sound: Sound) -> Sequence[Tone]:
    """The tones whose voice is kept out of training."""
    return [tone for tone in sound.tones if tone.voice in UNSEEN_VOICES]


def split_of_sound(sound: Sound) -> str:
    """``"train"`` or ``"test"`` by what is to be heard.

    There are only some fifty single tones, so those are told apart by how they sound as well.
    """
    return split_of("sound", sound if len(sound.tones) == 1 else sound.content)
