"""The one schema: a sample is a conversation of messages whose content is a list of text and image parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from alula import media
from alula.data.audio import AudioRef
from alula.data.errors import Place, RecordError
from alula.data.images import ImageRef
from alula.data.senses import DepthRef, MotionRef, NormalsRef, PointsRef, ResponseRef
from alula.data.videos import VideoRef

ROLES = ("system", "user", "assistant")

BROWSED = "browsed"
"""key of `Sample.meta` for messages that are read before the sample's own are answered, where they are others; and what
stands beside a batch of them (see `alula.training.browsing`)"""

MEDIA: dict[str, Any] = {
    "image": ImageRef,
    "video": VideoRef,
    "audio": AudioRef,
    "points": PointsRef,
    "depth": DepthRef,
    "normals": NormalsRef,
    "motion": MotionRef,
    "response": ResponseRef,
}
"""Type of a content part -> class of the reference it holds under a key of the same name."""

PICTURED = ("depth", "normals")
"""media whose parts may hold a picture of the same view under ``image``"""


@dataclass(slots=True)
class Sample:
    """One conversation, media still undecoded; picklable.

    Attributes:
        id: the record's own id, or one made from file and line.
        messages: ``{"role": ..., "content": [{"type": "text", "text": str} | {"type": "image", "image": ImageRef}
            | {"type": "video", "video": VideoRef} | ...]}`` (`MEDIA`), the plain transformers chat shape with lists
            everywhere; beside a depth map or normals ``"image": ImageRef``, where there is a picture of the same view.
            ``"train": False`` stands beside an answer that is not to be learnt from, ``"soft": SoftLabels`` beside one
            that is learnt by its tokens' distributions (`alula.data.soft_labels`).
        source: name of the source it came from.
        meta: whatever else the record carried.
        place: file and line, for error messages.
        position: global position in the mixture that drew it, or None.
    """

    id: str
    messages: list[dict[str, Any]]
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    place: Place | None = None
    position: int | None = None

    @property
    def images(self) -> list[ImageRef]:
        """The images in reading order."""
        return self.media("image")

    def media(self, *kinds: str) -> list[Any]:
        """The references of these kinds (names of `MEDIA`; all by default) in reading order."""
        wanted = kinds or tuple(MEDIA)
        return [part[part["type"]] for part in parts(self.messages) if part["type"] in wanted]


def parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """All content parts of a conversation in reading order."""
    for message in messages:
        yield from message["content"]


class Source(Protocol):
    """Samples by index; picklable, readable from any worker.

    Attributes:
        name: what reports call it.
        size: number of samples, or None when it never ends.
    """

    name: str

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, its images undecoded. Raises ``BadSampleError`` when the record is unusable."""
        ...


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(image: ImageRef) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _seen(image: ImageRef, loading: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """An image part with its pixels, and how large the model is to see them."""
    sizing = {} if image.sizing is None else {"sizing": image.sizing}
    return {"type": "image", "image": image.load(**loading("image")), **sizing}


def media_part(kind: str, ref: Any, picture: ImageRef | None = None) -> dict[str, Any]:
    """A part of a kind of ``MEDIA``; ``picture`` shows the same view."""
    return {"type": kind, kind: ref, **({} if picture is None else {"image": picture})}


def lazy(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part whose medium is given as it may be (arrays, anything with ``load()``, also decoded already) -> one that
    holds references.

    Raises:
        BadSampleError: no medium can be made of what it holds.
    """
    kind = part["type"]
    if kind not in MEDIA:
        return dict(part)
    if kind == "image":
        image = ImageRef.from_object(part["image"])
        return image_part(replace(image, sizing=part["sizing"]) if part.get("sizing") else image)
    picture = part.get("image") if kind in PICTURED else None
    return media_part(
        kind, MEDIA[kind].from_object(part[kind]), None if picture is None else ImageRef.from_object(picture)
    )


def decoded(part: Mapping[str, Any], loading: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """A part with its medium read, and the picture beside it.

    Args:
        part: as `lazy` makes it.
        loading: arguments for reading a medium, by its name.

    Raises:
        BadSampleError: it cannot be read; or a picture that lies on its side beside its map.
    """
    kind = part["type"]
    if kind not in MEDIA:
        return dict(part)
    if kind == "image":
        return _seen(part["image"], loading)
    value = part[kind].load(**loading(kind))
    if kind not in PICTURED or part.get("image") is None:
        return media_part(kind, value)
    if part["image"].sizing is not None:
        raise part["image"].error(
            f"{part['image'].told} is seen beside a map, in its size",
            remedy=f"leave {next(iter(part['image'].said()))} out",
        )
    picture = part["image"].load(**loading("image"))
    height, width = value.shape[:2]
    if height != width and (picture.width, picture.height) == (height, width):
        raise part[kind].error(
            f"{part[kind].told} is {width} x {height}, and the picture beside it {height} x {width}",
            remedy="one of them lies on its side: save array.T, (height, width)",
        )
    return media_part(kind, value, picture)


def user(text: str, *images: Any) -> dict[str, Any]:
    """A user turn: the images first, then the text."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def message_text(message: Mapping[str, Any]) -> str:
    """The text of one message, its media left out as `worded` does."""
    return "".join(part["text"] for part in worded(message["content"]))


def worded(content: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The text parts of a turn. Words that nothing but a medium kept apart are kept apart by a space."""
    found: list[dict[str, Any]] = []
    is_behind_media = False
    for part in content:
        if part["type"] != "text":
            is_behind_media = True
            continue
        words, before = part["text"], found[-1]["text"] if found else ""
        touch = is_behind_media and before and words and not before[-1].isspace() and not words[0].isspace()
        found.append({**part, "text": f" {words}"} if touch else dict(part))
        is_behind_media = False
    return found


def check_turns(messages: Sequence[Mapping[str, Any]], place: Place) -> None:
    """Refuse conversations no chat template can render faithfully.

    The rules: a system message only at the front; then user and assistant in turn, the user first; no empty turn;
    media in system and user turns only.

    Raises:
        RecordError: naming the turn and what is wrong with it.
    """
    expected = "user"
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            if number:
                raise RecordError(f"messages[{number}]: a system message may only come first", place=place)
        elif role != expected:
            raise RecordError(
                f"messages[{number}]: {role} speaks where the {expected} should (turns alternate, the user begins)",
                place=place,
                remedy="join turns of one speaker, drop stray ones",
            )
        else:
            expected = "assistant" if role == "user" else "user"
        held = next((part["type"] for part in message["content"] if part["type"] in MEDIA), None)
        if held and role == "assistant":
            raise RecordError(f"messages[{number}]: an assistant turn cannot hold {media.MEDIA[held].a}", place=place)
        if not held and not message_text(message).strip():
            raise RecordError(f"messages[{number}]: the {role} turn is empty", place=place)
    if not any(message["role"] == "user" for message in messages):
        raise RecordError("the conversation has no user turn", place=place)
