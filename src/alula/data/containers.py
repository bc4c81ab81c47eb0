"""Sound in containers other than WAV, by `soundfile`, an extra: FLAC, Ogg (Vorbis, Opus), MP3."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np

from alula.data.errors import AudioError

_INSTALL = "install it, pip install 'alula[audio]', or convert the clip: ffmpeg -i AUDIO -c:a pcm_s16le audio.wav"

_BLOCK = 1 << 16
"""Samples decoded at once: a clip that is too long is refused after this many more than are accepted."""

_STARTS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3"}


def container(start: bytes) -> str | None:
    """What holds a clip, by its first four bytes; None where that is no container read here."""
    for magic, name in _STARTS.items():
        if start.startswith(magic):
            return name
    # an MPEG frame: eleven bits set, then a version and a layer that exist
    frame = len(start) >= 2 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0
    return "MP3" if frame and start[1] & 0x18 != 0x08 and start[1] & 0x06 == 0x02 else None


def decode(file: BinaryIO, *, told: str, name: str, most_seconds: float, most_rate: int) -> tuple[np.ndarray, int]:
    """Decode a clip to mono.

    Args:
        file: at its start.
        told: what messages call the clip.
        name: of the container.
        most_seconds: longest clip accepted; no more than that is decoded.
        most_rate: most samples per second accepted.

    Returns:
        float64 (N,), integers as -1..1; and the samples per second.

    Raises:
        AudioError: soundfile is not installed; the clip is damaged, cut short, empty or too long.
    """
    soundfile = _library(told, name)
    if name == "Ogg" and not _has_last_page(file):
        raise AudioError(f"{told} is truncated: it lacks the last page of an Ogg stream", remedy=_CONVERT)
    blocks, read = [], 0
    try:
        with soundfile.SoundFile(file) as sound:
            rate, stated = int(sound.samplerate), int(sound.frames)
            if not 0 < rate <= most_rate:
                raise AudioError(f"{told} says that it has {rate:,} samples a second", remedy=_CONVERT)
            # not SoundFile.blocks, which goes on with old samples where a stream ends early
            while len(block := sound.read(_BLOCK, dtype="float64", always_2d=True)):
                blocks.append(block.mean(axis=1))
                read += len(block)
                if read > most_seconds * rate:
                    raise AudioError(f"{told} lasts more than {most_seconds:,.0f} seconds", remedy="cut it")
    except soundfile.SoundFileError as error:
        why = str(getattr(error, "error_string", error))
        raise AudioError(f"{told} is not {name} that can be read: {why}", remedy=_CONVERT) from None
    # streams written to a pipe state no length, which libsndfile tells as the largest number it has
    if read < stated < _UNSTATED:
        raise AudioError(f"{told} is truncated: {read:,} of {stated:,} samples")
    if not read:
        raise AudioError(f"{told} holds no samples")
    samples = np.concatenate(blocks)
    if not (np.abs(samples) <= np.finfo(np.float32).max).all():
        raise AudioError(f"{told} holds samples that are no finite float32 numbers")
    return samples, rate


_CONVERT = "see whether a player plays it; convert it: ffmpeg -i AUDIO -c:a pcm_s16le audio.wav"
_UNSTATED = 2**62


def _library(told: str, name: str) -> Any:
    try:
        import soundfile  # an extra
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise AudioError(f"{told} is {name}, which needs the package soundfile: {error}", remedy=_INSTALL) from None
    return soundfile


def _has_last_page(file: BinaryIO) -> bool:
    """Whether an Ogg file ends with a whole page that says it is the last; `file` is left at its start.

    Vorbis and Opus that were cut are read up to there without an error.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - _MOST_PAGE))
    tail = file.read()
    file.seek(0)
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < _PAGE_HEADER or len(page) < _PAGE_HEADER + page[26]:
        return False
    body = sum(page[_PAGE_HEADER : _PAGE_HEADER + page[26]])
    return bool(page[5] & 0x04) and len(page) == _PAGE_HEADER + page[26] + body


_PAGE_HEADER = 27
"""bytes of an Ogg page before its table of segments (RFC 3533, section 6)"""
_MOST_PAGE = 65307
