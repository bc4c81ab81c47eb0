"""Videos as references, decoded where they are needed to upright 8-bit RGB frames.

Read are animated GIF, WebP and PNG (a still image is a video of one frame), through Pillow. MP4 and its kin would need
a codec library; convert them first (``ffmpeg -i video.mp4 -vf fps=8 video.webp``). Frames are taken evenly over the
*time* that a video lasts, by the durations its file states, because writers merge equal frames into one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.errors import BadSampleError, ImageError, VideoError
from alula.data.images import to_rgb
from alula.data.media import LoadableArray, MediaRef
from alula.data.png import is_about_notes, without_notes

MOST_FRAMES = 10_000
"""Longest video accepted, in stored frames."""

DEFAULT_FRAMES = 32
"""Frames of a video when nobody says how many."""

_DEFAULT_MS = 100.0  # of a frame without a duration, as browsers have it


@dataclass(frozen=True, slots=True)
class VideoRef(MediaRef):
    """A video not yet decoded. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        max_pixels: width x height of a frame above which ``load`` refuses.
        max_frames: stored frames above which it does.
    """

    noun: ClassVar[str] = "video"
    error: ClassVar[type[BadSampleError]] = VideoError
    decoding: ClassVar[str] = "1"

    max_pixels: int = DEFAULT_MAX_PIXELS
    max_frames: int = MOST_FRAMES

    @classmethod
    def from_object(cls, value: Any) -> VideoRef:
        """Frames as an array (F, H, W, 3) uint8, a ``VideoRef`` (returned as it is), or anything with ``load()``.

        Raises:
            VideoError: ``value`` is none of these.
        """
        if isinstance(value, VideoRef):
            return value
        if isinstance(value, np.ndarray):
            return cls(f"<array {value.shape}>", maker=value.copy)
        if isinstance(value, LoadableArray):
            return cls._from_loadable(value)
        raise VideoError(f"a video cannot be made from {type(value).__name__}", remedy="give an alula.data.VideoRef")

    def load(self, frames: int = DEFAULT_FRAMES) -> np.ndarray:
        """Decode ``frames`` frames, evenly spaced in time (some twice where the video has fewer), and close the file.

        Returns:
            uint8 (frames, H, W, 3).

        Raises:
            VideoError: missing, empty, truncated, corrupt, of a format Pillow does not read, too large or too long.
        """
        if self.maker is not None:
            made = np.asarray(self.maker())
            if made.ndim != 4 or made.shape[-1] != 3 or made.dtype != np.uint8 or not len(made):
                raise VideoError(f"{self.told}: its maker returned {made.dtype} {made.shape}, not RGB frames")
            return made[_picked([_DEFAULT_MS] * len(made), frames)]
        source = self._stream()
        try:
            try:
                with Image.open(source) as video:
                    return self._decoded(video, frames)
            except ValueError as error:
                if not is_about_notes(error):
                    raise
            with Image.open(io.BytesIO(without_notes(self._encoded()))) as video:
                return self._decoded(video, frames)
        except VideoError:
            raise
        except UnidentifiedImageError:
            raise VideoError(
                f"{self.told} is corrupt or of a format that Pillow does not read",
                remedy="animated GIF, WebP and PNG are read; convert others: ffmpeg -i VIDEO -vf fps=8 video.webp",
            ) from None
        except Exception as error:  # decoders raise anything
            raise VideoError(f"{self.told} is truncated or corrupt: {error}") from error

    def _decoded(self, video: Image.Image, frames: int) -> np.ndarray:
        pixels = video.width * video.height
        if pixels > self.max_pixels:
            raise VideoError(
                f"{self.told} has frames of {video.width} x {video.height} = {pixels:,} pixels, "
                f"more than the limit of {self.max_pixels:,}",
                remedy="scale it down, or raise max_pixels if the file is to be trusted",
            )
        stored = getattr(video, "n_frames", 1)
        if stored > self.max_frames:
            raise VideoError(f"{self.told} has {stored:,} frames, more than {self.max_frames:,}")
        # the picture that an animated PNG shows where animation is not known need not be a frame of it
        first = int(stored > 1 and bool(getattr(video, "default_image", False)))
        durations = []
        for number in range(first, stored):
            video.seek(number)
            video.load()  # some formats know a frame's duration only then; and a video is whole or it is none
            durations.append(float(video.info.get("duration") or _DEFAULT_MS))
        wanted = [first + place for place in _picked(durations, frames)]
        decoded: dict[int, np.ndarray] = {}
        for number in sorted(set(wanted)):
            video.seek(number)
            try:
                decoded[number] = np.asarray(to_rgb(video.copy()))
            except ImageError as error:
                raise VideoError(f"{self.told}, frame {number}: {error.message}") from None
        return np.stack([decoded[number] for number in wanted])


def _picked(durations: list[float], frames: int) -> list[int]:
    """The stored frame on the screen in the middle of each of ``frames`` equal stretches of the whole time."""
    ends = np.cumsum(durations)
    middles = (np.arange(frames) + 0.5) / frames * ends[-1]
    return [int(place) for place in np.minimum(np.searchsorted(ends, middles, side="right"), len(durations) - 1)]
