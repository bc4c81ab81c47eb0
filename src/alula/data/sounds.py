"""Sounds as references, decoded where they are needed to mono float samples of the rate a model wants.

Read is WAV with 8, 16, 24 or 32 bits per sample (integers), by the standard library. Channels are averaged. Another
rate is reached by polyphase filtering.
"""

from __future__ import annotations

import math
import wave
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alula.data.errors import AudioError, BadSampleError
from alula.data.media import LoadableArray, MediaRef

MOST_SECONDS = 600.0
"""Longest sound accepted."""

MOST_RATE = 1_000_000
"""Most samples per second accepted: what filters to another rate cost grows with it, whatever the file's size."""


@dataclass(frozen=True, slots=True)
class SoundRef(MediaRef):
    """A sound not yet decoded. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        rate: samples per second of what ``maker`` makes.
    """

    noun: ClassVar[str] = "audio"
    error: ClassVar[type[BadSampleError]] = AudioError
    decoding: ClassVar[str] = "1"

    rate: int = 0

    @classmethod
    def from_object(cls, value: Any) -> SoundRef:
        """A ``SoundRef`` (returned as it is), or anything with ``load()`` (int16 or float samples) and ``rate``.

        Raises:
            AudioError: ``value`` is neither.
        """
        if isinstance(value, SoundRef):
            return value
        if isinstance(value, LoadableArray) and isinstance(getattr(value, "rate", None), int):
            return cls._from_loadable(value, rate=value.rate)  # type: ignore[attr-defined]
        raise AudioError(f"a sound cannot be made from {type(value).__name__}", remedy="give an alula.data.SoundRef")

    def load(self, rate: int | None = None) -> np.ndarray:
        """Decode to mono.

        Args:
            rate: samples per second of the result; None: as stored.

        Returns:
            float32 (N,) in -1..1.

        Raises:
            AudioError: missing, empty, truncated, not WAV, of an encoding that is not read, silent by having no
                samples, or too long.
        """
        if self.maker is not None:
            samples, stored = np.asarray(self.maker()), self.rate
            if samples.ndim != 1 or not len(samples):
                raise AudioError(f"audio {self.name}: its maker returned samples of shape {samples.shape}, not (N,)")
            samples = samples / 32768 if samples.dtype == np.int16 else samples
        else:
            samples, stored = self._decoded()
        if rate is not None and rate != stored:
            from scipy.signal import resample_poly  # slow to import, and rarely needed

            common = math.gcd(rate, stored)
            samples = resample_poly(samples, rate // common, stored // common)
        return samples.astype(np.float32)

    def _decoded(self) -> tuple[np.ndarray, int]:
        source = self._stream()
        try:
            with wave.open(source, "rb") as file:
                channels, width, rate, count = file.getparams()[:4]
                if not rate or not channels or not count:
                    raise AudioError(f"audio {self.name!r} holds no samples")
                if width > 4 or rate > MOST_RATE:
                    raise AudioError(
                        f"audio {self.name!r} says that it has {8 * width} bits at {rate:,} samples a second"
                    )
                if count > MOST_SECONDS * rate:
                    raise AudioError(
                        f"audio {self.name!r} lasts {count / rate:,.0f} seconds, more than {MOST_SECONDS:,.0f}",
                        remedy="cut it",
                    )
                raw = file.readframes(count)
        except AudioError:
            raise
        except Exception as error:  # besides its own errors `wave` raises EOFError, RuntimeError and OSError
            raise AudioError(
                f"audio {self.name!r} is not a WAV file of integer samples: {str(error) or 'its header is damaged'}",
                remedy="convert it: ffmpeg -i SOUND -c:a pcm_s16le sound.wav",
            ) from None
        if len(raw) != count * channels * width:
            raise AudioError(
                f"audio {self.name!r} is truncated: {len(raw):,} of {count * channels * width:,} bytes of samples"
            )
        return _floats(raw, width).reshape(-1, channels).mean(axis=1), rate


def _floats(raw: bytes, width: int) -> np.ndarray:
    """Integer samples of ``width`` bytes, little-endian (one byte: unsigned), as float64 in -1..1."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        padded = np.concatenate([np.zeros_like(parts[:, :1]), parts], axis=1)  # the sign sits in the top byte
        return np.ascontiguousarray(padded).view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(raw, f"<i{width}") / 2.0 ** (8 * width - 1)
