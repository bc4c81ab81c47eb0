"""Media of requests, from what was sent to pixels and samples, within limits. Nothing is read from a disk: what would
name a file is refused here, before anything looks at it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread
from PIL import Image

from alula.data import AudioRef, ImageRef, VideoRef
from alula.data.addresses import from_base64, resolved
from alula.data.containers import container
from alula.errors import AlulaError, quoted
from alula.serving.engine import Limits
from alula.serving.http.fetching import Fetched, Fetcher
from alula.serving.http.places import Place
from alula.serving.http.problems import Problem, refused
from alula.serving.http.schema import AudioUrl, ImageUrl, InputAudio, Link, Message, Sound, Text, VideoUrl
from alula.serving.http.settings import Settings
from alula.serving.http.uploads import SCHEME, Uploads

FORMATS = {
    "image": ("PNG", "JPEG", "GIF", "WebP", "BMP"),
    "video": ("GIF", "WebP", "PNG"),
    "audio": ("WAV", "FLAC", "Ogg", "MP3"),
}
"""By medium, the formats that are decoded. Decoders of rarer ones (some start other programs) are not shown what
strangers send."""
_STARTS = {
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff",
    "GIF": b"GIF8",
    "BMP": b"BM",
}

_SAID = {"wav": "WAV", "mp3": "MP3", "flac": "FLAC", "ogg": "Ogg", "opus": "Ogg"}
"""formats by the names that `schema.Sound` has for them"""
_OCTETS = ("", "application/octet-stream", "binary/octet-stream")
"""media types that say nothing"""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_WEB = ("http:", "https:")
_SMALL = 512
"""pixels of the longer side of a picture of `detail` low, as OpenAI's servers have it"""
_DECODERS = 2
"""at work at once: large pictures are decoded beside the event loop, and do not take all cores from the model"""


@dataclass(frozen=True)
class _Sent:
    """A medium that was sent: what kind, its bytes, and the field they came in."""

    medium: str
    content: bytes
    param: str


def format_of(medium: str, content: bytes) -> str | None:
    """The format of a file by its first bytes; None: one that is not decoded as that medium."""
    if content.startswith(b"RIFF"):
        found = {b"WEBP": "WebP", b"WAVE": "WAV"}.get(content[8:12])
    else:
        found = next((name for name, start in _STARTS.items() if content.startswith(start)), container(content[:4]))
    return found if found in FORMATS[medium] else None


class MediaIntake:
    """Takes the media of requests.

    Args:
        settings, limits: how large they may be.
        fetcher: of what lies in the web.
        uploads: what was sent before.
    """

    def __init__(self, settings: Settings, limits: Limits, fetcher: Fetcher, uploads: Uploads) -> None:
        self.settings, self.limits, self._fetcher, self._uploads = settings, limits, fetcher, uploads
        self._decoding = CapacityLimiter(_DECODERS)

    async def fetched(self, messages: Sequence[Message], place: Place) -> dict[str, Fetched]:
        """What lies in the web of what messages show, by its address.

        Raises:
            Problem: as `taken`.
        """
        self.count(messages)
        found: dict[str, Fetched] = {}
        for url, param in _links(messages):
            if url not in found:
                found[url] = await self._fetcher.fetch(url, param)
                place.hold(len(found[url].content))
        return found

    def count(self, messages: Sequence[Message]) -> int:
        """How many media they show.

        Raises:
            Problem: too many.
        """
        count = sum(not isinstance(part, Text) for message in messages for part in message.content)
        if count > self.limits.images_per_request:
            raise Problem(
                f"{count} pictures, sounds and films are more than {self.limits.images_per_request}",
                param="messages",
                code="too_many_media",
            )
        return count

    async def taken(
        self,
        messages: Sequence[Message],
        loading: Mapping[str, Mapping[str, Any]],
        fetched: Mapping[str, Fetched],
        place: Place,
    ) -> list[dict[str, Any]]:
        """Messages as `alula.inputs.Intake` takes them.

        Args:
            loading: by medium, arguments with which its files are decoded for a model (`Served.loading`).
            fetched: what lies in the web.
            place: of the request; it holds what is decoded.

        Raises:
            Problem: too large, of a format that is not read, not to be had, or in a turn that has none.
        """
        found: list[dict[str, Any]] = []
        pixels = 0
        for number, message in enumerate(messages):
            content: list[dict[str, Any]] = []
            for position, part in enumerate(message.content):
                if isinstance(part, Text):
                    content.append({"type": "text", "text": part.text})
                    continue
                param = f"messages[{number}].content[{position}]"
                if message.role != "user":
                    raise Problem("pictures and sounds stand in turns of the user", param=param, code="invalid_value")
                sent = await self._sent(part, param, fetched)
                value = await self.decoded(sent.medium, sent.content, sent.param, loading.get(sent.medium, {}))
                place.show(value.width * value.height if sent.medium == "image" else value.nbytes // 3)
                if sent.medium == "image":
                    pixels += value.width * value.height
                    if pixels > self.settings.pixels_per_request:
                        raise Problem(
                            f"the images of the request have more than {self.settings.pixels_per_request:,} pixels",
                            param=sent.param,
                            code="image_too_large",
                            remedy="scale them down",
                        )
                if isinstance(part, ImageUrl) and part.is_small:
                    value = await to_thread.run_sync(_small, value, limiter=self._decoding)
                content.append({"type": sent.medium, sent.medium: value})
            role = "system" if message.role == "developer" else message.role
            found.append({"role": role, "content": content})
        return found

    async def decoded(self, medium: str, content: bytes, param: str, loading: Mapping[str, Any]) -> Any:
        """What a file holds: a PIL image, frames or samples.

        Raises:
            Problem: it is too large, or not to be decoded.
        """
        if len(content) > self.settings.media_bytes:
            raise Problem(
                f"it has {len(content):,} bytes, more than {self.settings.media_bytes:,}",
                param=param,
                code=f"{medium}_too_large",
            )
        if format_of(medium, content) is None:
            raise Problem(
                f"this is no {medium} of a format that is read",
                param=param,
                code="invalid_media",
                remedy=f"send {', '.join(FORMATS[medium])}",
            )
        try:
            return await to_thread.run_sync(self._load, medium, content, dict(loading), limiter=self._decoding)
        except AlulaError as error:
            raise refused(error, param) from None

    def _load(self, medium: str, content: bytes, loading: dict[str, Any]) -> Any:
        settings = self.settings
        if medium == "image":
            return ImageRef.from_bytes(content, name="as sent", max_pixels=self.limits.pixels_per_image).load()
        if medium == "video":
            pixels = min(settings.pixels_per_frame, self.limits.pixels_per_image)
            film = VideoRef.from_bytes(content, name="as sent", max_pixels=pixels, max_frames=settings.frames_per_video)
            return film.load(**loading)
        sound = AudioRef.from_bytes(
            content, name="as sent", max_seconds=settings.seconds_per_sound, max_rate=settings.rate_of_sound
        )
        return sound.load(**loading)

    async def _sent(self, part: Any, param: str, fetched: Mapping[str, Fetched]) -> _Sent:
        match part:
            case ImageUrl():
                return await self._linked("image", part.image_url.url, f"{param}.image_url.url", fetched)
            case VideoUrl():
                return await self._linked("video", part.video_url.url, f"{param}.video_url.url", fetched)
            case AudioUrl():
                return await self._linked("audio", part.audio_url.url, f"{param}.audio_url.url", fetched)
            case InputAudio():
                return await self._spoken(part.input_audio, f"{param}.input_audio")
        raise AssertionError(part)  # the schema has no others

    async def _spoken(self, sound: Sound, param: str) -> _Sent:
        """A sound in base64, of the format that it is said to have."""
        sent = _Sent("audio", await self._unpacked(from_base64, sound.data, "audio", f"{param}.data"), f"{param}.data")
        found = format_of("audio", sent.content)
        if found is not None and found != _SAID[sound.format]:
            raise Problem(f"the sound is {found}, not {sound.format}", param=f"{param}.format", code="invalid_media")
        return sent

    async def _linked(self, medium: str, url: str, param: str, fetched: Mapping[str, Fetched]) -> _Sent:
        """What an address names."""
        found = _SCHEME.match(url)
        scheme = found[1].lower() if found else ""
        if scheme == "data":
            said = url[5:].partition(",")[0].partition(";")[0].strip().lower()
            self._check_type(medium, said, param)
            return _Sent(medium, await self._unpacked(resolved, url, medium, param), param)
        if scheme == SCHEME:
            upload = self._uploads.get(url.partition(":")[2], param)
            if upload.medium != medium and (upload.medium, medium) != ("image", "video"):
                raise Problem(f"what was uploaded is {upload.medium}, not {medium}", param=param, code="invalid_media")
            return _Sent(medium, upload.content, param)
        if url in fetched:
            self._check_type(medium, fetched[url].type, param)
            return _Sent(medium, fetched[url].content, param)
        raise Problem(
            f"{quoted(url, 60)} is not taken: no file of this machine is read",
            param=param,
            code="invalid_url",
            remedy="send data:...;base64,..., or the id of an upload, alula-upload:ID",
        )

    async def _unpacked(self, how: Any, text: str, medium: str, param: str) -> bytes:
        if len(text) > 2 * self.settings.media_bytes:
            raise Problem(
                f"it has more than {self.settings.media_bytes:,} bytes", param=param, code=f"{medium}_too_large"
            )
        try:
            content: bytes = await to_thread.run_sync(how, text, medium, limiter=self._decoding)
        except AlulaError as error:
            raise refused(error, param) from None
        return content

    def _check_type(self, medium: str, said: str, param: str) -> None:
        kinds = ("video/", "image/") if medium == "video" else (f"{medium}/",)  # an animated picture is a film too
        if said not in _OCTETS and not said.startswith(kinds):
            raise Problem(f"{quoted(said, 60)} is no type of {medium}", param=param, code="invalid_media")


def _small(picture: Image.Image) -> Image.Image:
    """A copy whose longer side has `_SMALL` pixels at most."""
    found = picture.copy()
    found.thumbnail((_SMALL, _SMALL))
    return found


def _links(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Addresses in the web that turns of the user name, and the fields they stand in."""
    for number, message in enumerate(messages):
        for position, part in enumerate(message.content):
            field = getattr(part, "type", "")
            link = getattr(part, field, None)
            if message.role == "user" and isinstance(link, Link) and link.url[:8].lower().startswith(_WEB):
                yield link.url, f"messages[{number}].content[{position}].{field}.url"
