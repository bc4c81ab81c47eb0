"""From a decoded JSON (or Arrow) record to a ``Sample``: the messages shape and the conversations shape.

Placeholder rule, the same for both: ``<image>`` anywhere in text stands for the next image of the record, and the
newline that customarily sets it off from the text is part of the placeholder. Placeholders and images must be equal
in number. ``\\<image>`` is the word itself (further backslashes before it count in pairs). In a record whose media are
all given as content parts nothing in the text is a placeholder or an escape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.addresses import AddressError, from_base64, resolved
from alula.data.errors import BadSampleError, Place, PlaceholderError, RecordError
from alula.data.images import ImageRef
from alula.data.keys import learnt, names_of, refuse_in_record, refuse_others
from alula.data.samples import BROWSED, MEDIA, PICTURED, ROLES, Sample, check_turns, image_part, media_part, text_part
from alula.errors import UsageError, quoted

PLACEHOLDER = "<image>"
_PLACE = re.compile(r"(\\*)" + re.escape(PLACEHOLDER))
_HINT = (
    rf'a {PLACEHOLDER} that is meant as text is written \{PLACEHOLDER} ("\\{PLACEHOLDER}" in JSON), '
    "or as it is where all media are content parts"
)

# the speakers' names seen in public conversation files
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
_CLIP_KEYS = ("url", "path", "base64")  # beside the kind's own name
_ENTRY = ("bytes", "path", "url", "width", "height", "format")  # of what stands in a list of media
_TURN = ("role", "content", "weight", "train")
_CLIPS = tuple(kind for kind in MEDIA if kind != "image")
_PART_KEYS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("index", *_IMAGE_KEYS, *ImageRef.options),
    "image_url": ("index", *_IMAGE_KEYS, *ImageRef.options),
    **{
        kind: ("index", kind, *_CLIP_KEYS, *MEDIA[kind].options, *(("image",) if kind in PICTURED else ()))
        for kind in _CLIPS
    },
}
LISTS: dict[str, tuple[str, ...]] = {
    "image": ("images", "image"),
    "video": ("videos", "video"),
    "audio": ("audios", "audio"),
    "points": ("points",),
    "depth": ("depths", "depth"),
    "normals": ("normals",),
    "motion": ("motions", "motion"),
    "response": ("responses",),  # a record's `response` is an answer
}
"""Kind -> keys of a record that may hold its media of that kind"""

_WORDS = ("points", "depth", "normals", "motion", "response")  # that may be called so without being media


_MEDIA_PARTS = ("image", "image_url", *_CLIPS)


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Turns what records call an image into an ``ImageRef``.

    Attributes:
        roots: folders a relative path is looked for in, in order.
        max_pixels: limit handed to every reference.
        reading: how media are read where records do not say it: kind -> option -> value (`MediaRef.options`).
    """

    roots: tuple[str, ...]
    max_pixels: int = DEFAULT_MAX_PIXELS
    reading: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_reading(self.reading)

    def ref(self, value: Any) -> ImageRef:
        """A path, ``file:`` or ``data:`` address, base64, bytes, or Arrow's ``{"bytes", "path"}`` -> reference.

        Raises:
            ImageError: a web address (alula downloads nothing), broken base64, or another type.
            RecordError: it holds a key that would be dropped.
        """
        ref: ImageRef = self._ref("image", value)
        return ref

    def part_ref(self, part: Mapping[str, Any], key: str, kind: str = "image") -> Any:
        """The medium an inline content part names under ``key``."""
        said = self.said(kind, part)
        if key != "base64" or str(part[key]).startswith("data:"):
            return self._ref(kind, part[key], said)
        try:
            return self._from_bytes(kind, from_base64(str(part[key]), kind), "<base64>", said)
        except AddressError as error:
            raise MEDIA[kind].error(error.message) from None

    def clip(self, kind: str, value: Any) -> Any:
        """A medium of another kind, named as `ref` takes it -> reference.

        Raises:
            BadSampleError: a web address, broken base64, or another type; an option that is none.
            RecordError: it holds a key that would be dropped.
        """
        return self._ref(kind, value)

    def said(self, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a part, or an entry of a list, says about how its medium is to be read."""
        medium = MEDIA[kind]
        said = {name: given[name] for name in medium.options if not _nothing(given.get(name))}
        found = {name: self._found(value) if name in medium.files else value for name, value in said.items()}
        return dict(medium.fields_said(found))

    def _found(self, name: Any) -> Any:
        roots = self.roots or (".",)
        return tuple(os.path.abspath(os.path.join(root, name)) for root in roots) if isinstance(name, str) else name

    def _ref(self, kind: str, value: Any, said: Mapping[str, Any] | None = None) -> Any:
        medium = MEDIA[kind]
        if isinstance(value, Mapping):
            refuse_others(value, (*_ENTRY, *medium.options), kind, None)
            said = {**self.said(kind, value), **(said or {})}
            if value.get("bytes") is not None:
                return self._from_bytes(kind, value["bytes"], str(value.get("path") or "<bytes>"), said)
            value = value.get("path") or value.get("url")
        if isinstance(value, bytes):
            return self._from_bytes(kind, value, "<bytes>", said)
        if not isinstance(value, str) or not value:
            raise medium.error(f"{kind} must be a path or bytes, not {quoted(value)}")
        try:
            found = resolved(value, kind)
        except AddressError as error:
            raise medium.error(error.message, remedy=error.remedy) from None
        if isinstance(found, bytes):
            return self._from_bytes(kind, found, "<base64>", said)
        return medium.from_path(found, roots=self.roots, **self._fields(kind, said))

    def _from_bytes(self, kind: str, data: Any, name: str, said: Mapping[str, Any] | None = None) -> Any:
        return MEDIA[kind].from_bytes(data, name=name, **self._fields(kind, said))

    def _fields(self, kind: str, said: Mapping[str, Any] | None) -> dict[str, Any]:
        limits = {"max_pixels": self.max_pixels} if hasattr(MEDIA[kind], "max_pixels") else {}
        return {**limits, **self.said(kind, self.reading.get(kind, {})), **(said or {})}


def check_reading(reading: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that no medium has, and values that they cannot have.

    Raises:
        UsageError: with what is legal.
    """
    for kind, said in reading.items():
        where = f"reading.{kind}"
        if kind not in MEDIA or not MEDIA[kind].options:
            legal = ", ".join(name for name, medium in MEDIA.items() if medium.options)
            raise UsageError("nothing is to be said about how it is read", where=where, remedy=f"media are {legal}")
        for name in said:
            if name not in MEDIA[kind].options:
                legal = ", ".join(MEDIA[kind].options)
                raise UsageError("no such option", where=f"{where}.{name}", remedy=f"options are {legal}")
        try:
            MEDIA[kind](kind, **MEDIA[kind].fields_said(said))
        except BadSampleError as error:
            raise UsageError(error.message, where=where, remedy=error.remedy) from None


class _Media:
    """The record's list of media of one kind, handed out placeholder by placeholder."""

    def __init__(self, values: Sequence[Any], folder: ImageFolder, kind: str = "image") -> None:
        make = folder.ref if kind == "image" else partial(folder.clip, kind)
        # by their place in the list, which parts may name
        self.refs: dict[int, Any] = {place: make(value) for place, value in enumerate(values) if not _nothing(value)}
        self.folder, self.kind = folder, kind
        self.parts = False  # all media are given as content parts, so that texts hold no placeholder
        self.asked = 0  # placeholders met, more than there are images if need be
        self.used: set[int] = set()

    def take(self, index: int | None = None) -> Any | None:
        places = list(self.refs)
        index = index if index is not None else places[self.asked] if self.asked < len(places) else -1
        self.asked += 1
        if index not in self.refs:
            return None
        self.used.add(index)
        return self.refs[index]

    def check(self, place: Place) -> None:
        if self.asked != len(self.refs) or len(self.used) != len(self.refs):
            error = PlaceholderError(
                f"{self.asked} {self.kind} placeholder(s) but {len(self.refs)} {self.kind}(s)",
                place=place,
                remedy=(
                    f"write one {PLACEHOLDER} (or image part) per image, and list every image once; {_HINT}"
                    if self.kind == "image"
                    else f"write one {self.kind} part per {self.kind}, and list every one once"
                ),
            )
            error.counts, error.medium = (self.asked, len(self.refs)), self.kind
            raise error


def from_messages(record: Any, *, folder: ImageFolder, source: str, place: Place) -> Sample:
    """Read ``{"messages": [{"role", "content"}], "images": [...]}``; content is text or a list of parts.

    Image parts name their image inline (``image``, ``path``, ``url``, ``base64``, ``image_url``) or take the next of
    ``images`` (or the one at ``index``). Parts of other media likewise (their kind's name, ``path``, ``url``; the next
    of ``videos``, ``audios`` ..., `LISTS`), with the options of their kind beside them. ``browsed`` may hold messages
    likewise, which are read before these are answered (see `alula.data.samples.BROWSED`); their parts name their images
    inline.

    Raises:
        BadSampleError: with file and line.
    """
    record, place = _begin(record, "messages", place, hint="a conversations file is read by the source kind `llava`")
    lists = {kind: [key for key in keys if holds_media(kind, record.get(key))] for kind, keys in LISTS.items()}
    media = {kind: _Media(_listed(record, keys, place), folder, kind) for kind, keys in lists.items()}
    media["image"].parts = _by_parts(record["messages"], ("content",), len(media["image"].refs))
    messages = []
    for number, message in enumerate(record["messages"]):
        at = f"messages[{number}]"
        if isinstance(message, Mapping):
            refuse_others(message, _TURN, at, place)
        if not isinstance(message, Mapping) or "role" not in message or message.get("content") is None:
            raise RecordError(f"{at} needs the keys 'role' and 'content'", place=place)
        role = message["role"]
        if role not in ROLES:
            raise RecordError(f"{at}: unknown role {quoted(role)}", place=place, remedy=f"roles are {', '.join(ROLES)}")
        messages.append(_turn(role, message, _content(message["content"], media, at, place), at, place))
    used = ("messages", BROWSED, *LISTS["image"], *LISTS["video"], *LISTS["audio"])
    used += tuple(key for keys in lists.values() for key in keys if key not in used)
    sample = _finish(record, messages, media, source, place, used=used)
    if not _nothing(record.get(BROWSED)):
        browsed = from_messages({"messages": record[BROWSED]}, folder=folder, source=source, place=place)
        sample.meta[BROWSED] = browsed.messages
    return sample


def from_conversations(record: Any, *, folder: ImageFolder, source: str, place: Place) -> Sample:
    """Read LLaVA / ShareGPT ``{"image": path or list, "conversations": [{"from", "value"}]}``.

    Speakers may be human/user, gpt/assistant/chatgpt/bot/model, system; keys from/value or role/content; a top-level
    ``system`` text becomes the system message.

    Raises:
        RecordError, PlaceholderError, ImageError: with file and line.
    """
    record, place = _begin(record, "conversations", place, hint="a messages file is read by the source kind `jsonl`")
    other = next((key for kind in _CLIPS for key in LISTS[kind] if holds_media(kind, record.get(key))), None)
    if other:
        raise RecordError(
            f"the record carries {other!r}; conversations hold text and images only",
            place=place,
            remedy="write other media as messages (source kind `jsonl`)",
        )
    images = _Media(_listed(record, ("image", "images"), place), folder)
    media = {"image": images}
    images.parts = _by_parts(record["conversations"], ("value", "content"), len(images.refs))
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": _content(record["system"], media, "system", place)})
    for number, turn in enumerate(record["conversations"]):
        at = f"conversations[{number}]"
        if isinstance(turn, Mapping):
            refuse_others(turn, (*_TURN, "from", "value"), at, place)
            for one, other in (("from", "role"), ("value", "content")):
                if turn.get(one) is not None and turn.get(other) not in (None, turn[one]):
                    raise RecordError(f"{at}: both {one!r} and {other!r} are given", place=place, remedy="keep one")
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        value = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if speaker is None or value is None:
            raise RecordError(f"{at} needs the keys 'from' and 'value'", place=place)
        role = _SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise RecordError(
                f"{at}: unknown speaker {quoted(speaker)}", place=place, remedy=f"speakers are {', '.join(_SPEAKERS)}"
            )
        messages.append(_turn(role, turn, _content(value, media, at, place), at, place))
    return _finish(record, messages, media, source, place, used=("conversations", "images", "image", "system"))


def _turn(role: str, given: Mapping[str, Any], content: list[dict[str, Any]], at: str, place: Place) -> dict[str, Any]:
    """The message of the schema; ``train`` is there only where an answer is not to be learnt from."""
    unlearnt = not learnt(given, role, at, place) and role == "assistant"
    return {"role": role, "content": content, **({"train": False} if unlearnt else {})}


def _begin(record: Any, key: str, place: Place, *, hint: str) -> tuple[Mapping[str, Any], Place]:
    if not isinstance(record, Mapping):
        raise RecordError(f"a record must be a JSON object, not {type(record).__name__}", place=place)
    identity = record.get("id")
    _refuse_half_characters(identity, "id", place)
    stem = os.path.splitext(os.path.basename(place.file.rstrip("/")))[0]
    place = Place(place.file, place.line, f"{stem}-{place.line}" if identity is None else str(identity), place.unit)
    turns = record.get(key)
    if turns is None:
        raise RecordError(f"the record has no key {key!r} (it has {names_of(record)})", place=place, remedy=hint)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError(f"{key!r} must be a list of at least one turn", place=place)
    return record, place


def _nothing(value: Any) -> bool:
    """Whether a place for media holds none: Arrow writes that as null, a struct of nulls, or a list of either."""
    if value is None or isinstance(value, str):
        return not value
    if isinstance(value, Mapping):
        return all(inner is None or inner == "" for inner in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_nothing, value))
    return False


def holds_media(kind: str, value: Any) -> bool:
    """Whether a column of that name holds media: points may be a score and depth a number of steps."""
    if _nothing(value):
        return False
    several = value if isinstance(value, list | tuple) else [value]
    return kind not in _WORDS or not all(isinstance(one, int | float) for one in several)


def _listed(record: Mapping[str, Any], keys: Sequence[str], place: Place) -> list[Any]:
    given = [record[key] for key in keys if not _nothing(record.get(key))]
    if len(given) > 1:
        raise RecordError(f"both {keys[0]!r} and {keys[1]!r} are given", place=place, remedy="keep one of them")
    if not given:
        return []
    return list(given[0]) if isinstance(given[0], Sequence) and not isinstance(given[0], (str, bytes)) else [given[0]]


def _content(content: Any, media: Mapping[str, _Media], at: str, place: Place) -> list[dict[str, Any]]:
    images = media["image"]
    if isinstance(content, str):
        return _split(content, images)
    if not isinstance(content, Sequence):
        raise RecordError(f"{at}: content must be text or a list of parts, not {type(content).__name__}", place=place)
    found: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in _PART_KEYS:
            refuse_others(part, ("type", *_PART_KEYS[kind]), f"{at}: content[{number}]", place)
        if kind == "text" and isinstance(part.get("text"), str):
            found += _split(part["text"], images)
        elif kind in ("image", "image_url"):
            found += _inline(part, images, place)
        elif isinstance(kind, str) and kind in media:
            found += _clip(part, media[kind], place)
        else:
            raise RecordError(
                f"{at}: content[{number}] is neither a text part nor an image part: {quoted(part)}",
                place=place,
                remedy='parts are {"type": "text", "text": ...} and {"type": "image", "image": ...}; likewise '
                + ", ".join(_CLIPS),
            )
    return found


def _split(text: str, images: _Media) -> list[dict[str, Any]]:
    if images.parts or PLACEHOLDER not in text:
        return [text_part(text)] if text else []
    found: list[dict[str, Any]] = []
    piece, last = "", 0
    for match in _PLACE.finditer(text):
        slashes = len(match[1])
        piece += text[last : match.start()] + match[1][: slashes // 2]
        last = match.end()
        if slashes % 2:
            piece += PLACEHOLDER
            continue
        piece = piece.removesuffix("\n")
        found += [*([text_part(piece)] if piece else []), *_taken(images.take())]
        piece, last = "", last + text.startswith("\n", last)
    piece += text[last:]
    return [*found, *([text_part(piece)] if piece else [])]


def escaped(text: str) -> str:
    """The text as a record without media parts is to hold it, so that it is read back as text."""
    return _PLACE.sub(lambda match: f"{match[1] * 2}\\{PLACEHOLDER}", text)


def _by_parts(turns: Sequence[Any], keys: Sequence[str], listed: int) -> bool:
    """Whether content parts account for all media, the ``listed`` images too, so that texts hold no placeholder."""
    contents = [turn.get(key) for turn in turns if isinstance(turn, Mapping) for key in keys]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    parts = [part for part in parts if isinstance(part, Mapping) and part.get("type") in _MEDIA_PARTS]
    taking = [part for part in parts if part["type"] not in _CLIPS and all(_nothing(part.get(k)) for k in _IMAGE_KEYS)]
    return bool(parts) and len(taking) >= listed


def _named(part: Mapping[str, Any], keys: Sequence[str], place: Place) -> str | None:
    """The key under which a media part names its file."""
    given = [key for key in keys if not _nothing(part.get(key))]
    if any(part[key] != part[given[0]] for key in given[1:]):
        raise RecordError(f"a part names its {part['type']} by {' and '.join(given)}", place=place, remedy="keep one")
    return given[0] if given else None


def _clip(part: Mapping[str, Any], clips: _Media, place: Place) -> list[dict[str, Any]]:
    key, kind, folder = _named(part, (clips.kind, *_CLIP_KEYS), place), clips.kind, clips.folder
    try:
        beside = part.get("image") if kind in PICTURED else None
        picture = None if _nothing(beside) else folder.ref(beside)
        if key is not None:
            return [media_part(kind, folder.part_ref(part, key, kind), picture)]
        ref = clips.take(part["index"] if isinstance(part.get("index"), int) else None)
        said = folder.said(kind, part)
        return [] if ref is None else [media_part(kind, replace(ref, **said) if said else ref, picture)]
    except BadSampleError as error:
        raise error.at(place) from None


def _inline(part: Mapping[str, Any], images: _Media, place: Place) -> list[dict[str, Any]]:
    key = _named(part, _IMAGE_KEYS, place)
    try:
        if key is None:
            ref = images.take(part["index"] if isinstance(part.get("index"), int) else None)
            said = images.folder.said("image", part)
            return _taken(replace(ref, **said) if ref is not None else None)
        return [image_part(images.folder.part_ref(part, key))]
    except BadSampleError as error:
        raise error.at(place) from None


def _taken(ref: ImageRef | None) -> list[dict[str, Any]]:
    # a missing image is reported once, with both counts, at the end of the record
    return [image_part(ref)] if ref is not None else []


def _refuse_half_characters(value: Any, at: str, place: Place) -> None:
    """Refuse texts with half of a surrogate pair, which JSON may hold and neither a file nor a tokenizer takes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_half_characters(key, at, place)
            _refuse_half_characters(inner, at, place)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_half_characters(inner, at, place)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            before = value[max(0, error.start - 20) : error.start]
            raise RecordError(
                f"{at}: half of a surrogate pair (U+{ord(value[error.start]):04X}) behind {before!r} is no character",
                place=place,
                remedy="write the whole character, or leave the half out",
            ) from None


def _finish(
    record: Mapping[str, Any],
    messages: list[dict[str, Any]],
    media: Mapping[str, _Media],
    source: str,
    place: Place,
    *,
    used: tuple[str, ...],
) -> Sample:
    for one in media.values():
        one.check(place)
    refuse_in_record(record, used, place)
    check_turns(messages, place)
    meta = {key: value for key, value in record.items() if key not in used and key != "id" and value is not None}
    texts = ((message["role"], part.get("text")) for message in messages for part in message["content"])
    for at, value in (*texts, ("keys", list(meta)), *meta.items()):
        _refuse_half_characters(value, at, place)
    return Sample(id=str(place.record), messages=messages, source=source, meta=meta, place=place)
