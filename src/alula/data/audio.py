"""Audio clips as references, decoded where they are needed to mono float samples of the rate a model wants.

Read is WAV, plain or extensible, with integers of 8, 16, 24 or 32 bits or floating-point numbers of 32 or 64; SciPy
decodes. What it leaves open is settled here, before anything is decoded: limits, clips cut short, and sizes that a
program writing to a pipe could not know. Other containers go through `containers`. Channels are averaged. Another rate
is reached by polyphase filtering.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np

from alula.data.containers import container, decode
from alula.data.errors import AudioError, BadSampleError
from alula.data.media import LoadableArray, MediaRef

MOST_SECONDS = 600.0
"""Longest audio clip accepted."""

MOST_RATE = 1_000_000
"""Most samples per second accepted: what filters to another rate cost grows with it, whatever the file's size."""


@dataclass(frozen=True, slots=True)
class AudioRef(MediaRef):
    """An audio clip not yet decoded. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        rate: samples per second of what ``maker`` makes.
        max_seconds: length above which ``load`` refuses.
        max_rate: samples per second above which it does.
    """

    noun: ClassVar[str] = "audio"
    error: ClassVar[type[BadSampleError]] = AudioError
    decoding: ClassVar[str] = "1"

    rate: int = 0
    max_seconds: float = MOST_SECONDS
    max_rate: int = MOST_RATE

    @classmethod
    def from_object(cls, value: Any) -> AudioRef:
        """An ``AudioRef`` (returned as it is), or anything with ``load()`` (int16 or float samples) and ``rate``.

        Raises:
            AudioError: ``value`` is neither.
        """
        if isinstance(value, AudioRef):
            return value
        if isinstance(value, LoadableArray) and isinstance(getattr(value, "rate", None), int):
            return cls._from_loadable(value, rate=value.rate)  # type: ignore[attr-defined]
        raise AudioError(
            f"an audio clip cannot be made from {type(value).__name__}", remedy="give an alula.data.AudioRef"
        )

    def load(self, rate: int | None = None) -> np.ndarray:
        """Decode to mono.

        Args:
            rate: samples per second of the result; None: as stored.

        Returns:
            float32 (N,), in -1..1 where the file holds integers.

        Raises:
            AudioError: missing, empty, truncated, of a container or an encoding that is not read, silent by having
                no samples, or too long; FLAC, Ogg or MP3 without the package soundfile.
        """
        if self.maker is not None:
            samples, stored = np.asarray(self.maker()), self.rate
            if samples.ndim != 1 or not len(samples):
                raise AudioError(f"{self.told}: its maker returned samples of shape {samples.shape}, not (N,)")
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
            with open(source, "rb") if isinstance(source, str) else source as file:
                held = container(file.read(4))
                file.seek(0)
                if held is not None:
                    return decode(
                        file, told=self.told, name=held, most_seconds=self.max_seconds, most_rate=self.max_rate
                    )
                wav = self._plain(file)
            from scipy.io import wavfile  # slow to import, and only here needed

            rate, stored = wavfile.read(wav)
        except AudioError:
            raise
        except Exception as error:  # struct.error where the header ends, ValueError, ZeroDivisionError, OSError
            raise AudioError(
                f"{self.told} is not a WAV file of integers or floating-point numbers: "
                f"{'its header is cut off' if isinstance(error, struct.error) else error}",
                remedy=_REMEDY,
            ) from None
        samples = stored.reshape(len(stored), -1).mean(axis=1, dtype=np.float64)
        if stored.dtype.kind == "f":
            if not (np.abs(samples) <= np.finfo(np.float32).max).all():
                raise AudioError(f"{self.told} holds samples that are no finite float32 numbers")
            return samples, rate
        full = 2.0 ** (8 * stored.dtype.itemsize - 1)
        return (samples - full if stored.dtype.kind == "u" else samples) / full, rate

    def _plain(self, file: BinaryIO) -> io.BytesIO:
        """The format and the samples alone, with their true sizes: what SciPy reads without a guess or a warning."""
        form, size, whole = _chunks(file)
        tag, channels, rate, _, step, bits = struct.unpack_from("<HHIIHH", form)
        present = whole - file.tell()
        if size == _UNKNOWN or (size == 0 and present):
            size = present
        size -= size % max(step, 1)
        if not rate or not channels or not size:
            raise AudioError(f"{self.told} holds no samples")
        width, rest = divmod(step, channels)
        integer = bits <= 8 * width <= 32 and (bits > 8 or width == 1)
        readable = bits and not rest and (integer or bits == 8 * width == 64)
        if not readable or rate > self.max_rate or rate * step > _UNKNOWN:
            raise AudioError(
                f"{self.told} says that it has {bits} bits in {width} bytes at {rate:,} samples a second",
                remedy=_REMEDY,
            )
        if size > self.max_seconds * rate * step:
            raise AudioError(
                f"{self.told} lasts {size / step / rate:,.0f} seconds, more than {self.max_seconds:,.0f}",
                remedy="cut it",
            )
        if size > present:
            raise AudioError(f"{self.told} is truncated: {present:,} of {size:,} bytes of samples")
        # the bytes per second are a hint for players, which some writers get wrong
        form = struct.pack("<HHIIHH", tag, channels, rate, rate * step, step, bits) + form[16:]
        form += bytes(len(form) % 2)
        wav = io.BytesIO()
        wav.write(struct.pack("<4sI4s4sI", b"RIFF", 20 + len(form) + size + size % 2, b"WAVE", b"fmt ", len(form)))
        wav.write(form + struct.pack("<4sI", b"data", size))
        wav.write(file.read(size) + bytes(size % 2))
        wav.seek(0)
        return wav


_REMEDY = "convert it: ffmpeg -i AUDIO -c:a pcm_s16le audio.wav"

_UNKNOWN = 2**32 - 1
"""The size that programs write, or leave at 0, where they cannot go back to correct it: into a pipe."""


def _chunks(file: BinaryIO) -> tuple[bytes, int, int]:
    """Leave ``file`` where its samples begin.

    Returns:
        the format chunk; the bytes of samples that are stated; the length that the file's chunks have together.

    Raises:
        ValueError, struct.error: no RIFF WAVE file, or without format or samples.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    riff, stated, wave = struct.unpack("<4sI4s", file.read(12))
    if riff != b"RIFF" or wave != b"WAVE":
        raise ValueError("it does not begin with RIFF and WAVE")
    form = b""
    while True:
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            break
        if name == b"fmt ":
            form = file.read(min(size, 64))
        file.seek(size + size % 2 - (len(form) if name == b"fmt " else 0), io.SEEK_CUR)
    if not form:
        raise ValueError("its samples come before their format")
    # an empty chunk is empty only if the file ends where it says that it does
    whole = file.tell() if size == 0 and stated + 8 == end else end
    return form, size, whole
