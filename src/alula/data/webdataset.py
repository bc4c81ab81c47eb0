"""Tar files in WebDataset's shape: members that share a name up to its first dot make a sample.

``0001.jpg`` is a picture, ``0001.txt`` (or ``.caption``) its caption, ``0001.json`` a record. Only the headers are
indexed; members are read where they stand, so the files stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.dialects import ANSWERS, from_record, renamed
from alula.data.errors import BadSampleError, Place, RecordError
from alula.data.keys import void
from alula.data.samples import Sample
from alula.data.shapes import LISTS, ImageFolder
from alula.errors import DataError
from alula.files import absolute, regular

_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), "audio"),
    "gif": "image",
    **dict.fromkeys(("ply", "las", "laz", "pcd"), "points"),
    "csv": "motion",
    "nii": "response",
    **dict.fromkeys(("txt", "text", "caption"), "text"),
    "json": "json",
}
_SENSES = ("points", "depth", "normals", "motion", "response")
_NOTES = ("cls", "index", "id", "key", "__key__", "url")
_TURNS = ("messages", "conversations", "texts")
_NAMING = ("image", "images", "file_name")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class _Member(NamedTuple):
    shard: int
    name: str
    extension: str
    offset: int
    size: int


class TarSource:
    """Samples of one tar file, of a folder of them, or of numbered ones, ``train-{0000..0009}.tar``.

    Raises:
        DataError: none is there, or one cannot be read as a plain tar file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        name: str | None = None,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        reading: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = absolute(path)
        self.shards = shards_of(self.path)
        beside = (str(self.path if self.path.is_dir() else self.path.parent),)
        self._folder, self._columns = ImageFolder(beside, max_pixels, dict(reading or {})), dict(columns or {})
        self._samples = [sample for number, shard in enumerate(self.shards) for sample in _indexed(number, shard)]
        if not self._samples:
            raise DataError("holds no samples", where=str(path))
        self._samples = self._samples[:limit]
        self.name, self.size = name or self.path.stem, len(self._samples)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        place = self.place(index)
        try:
            record = self._record(self._samples[index], place)
            record = renamed(record, self._columns) if self._columns else record
            return from_record(record, folder=self._folder, source=self.name, place=place)
        except BadSampleError as error:
            raise error.at(place) from None

    def place(self, index: int) -> Place:
        """The member that sample ``index`` begins with."""
        first = self._samples[index][0]
        key = first.name[: len(first.name) - len(first.extension) - 1]
        return Place(f"{self.shards[first.shard]}/{key}", record=os.path.basename(key))

    def _record(self, members: list[_Member], place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {"id": place.record}
        media: dict[str, list[tuple[_Member, dict[str, Any]]]] = {}
        worded = ""
        names = [member.name for member in members]
        if len(set(names)) < len(names):
            raise RecordError(f"two members are called {max(names, key=names.count)!r}", place=place)
        with open(self.shards[members[0].shard], "rb") as stream:
            for member in members:
                kind = _kind(member.extension)
                if kind is None:
                    if member.extension in _NOTES:
                        continue
                    raise RecordError(
                        f"the member .{member.extension} would be dropped",
                        place=place,
                        remedy=f"read are {', '.join(_KINDS)} and .depth.png, .motion.npy and their like; leave others "
                        "out of the shard",
                    )
                stream.seek(member.offset)
                content = stream.read(member.size)
                if kind not in ("text", "json"):
                    media.setdefault(kind, []).append((member, {"bytes": content, "path": member.name}))
                    continue
                try:
                    text = content.decode()
                    record = json.loads(text) if kind == "json" else {"text": text.strip()}
                except (ValueError, RecursionError) as error:
                    raise RecordError(f"the member .{member.extension} does not parse: {error}", place=place) from None
                if not isinstance(record, Mapping):
                    raise RecordError(f"the member .{member.extension} holds no JSON object", place=place)
                worded = member.extension if kind == "text" else worded
                found = {**record, **found} if kind == "json" else {**found, **record}
        said = next((key for key in (*_TURNS, *ANSWERS) if not void(found.get(key))), None)
        if worded and said and "text" not in self._columns.values():
            raise RecordError(
                f"the member .{worded} would be dropped beside {said!r} of the record",
                place=place,
                remedy="leave it out of the shard, or name what is meant with `columns`",
            )
        listed = next((given for key in _NAMING if (given := found.get(key)) and _are_names(given)), None)
        if "image" in media:  # the record says under which names they were, which are the members'
            found = {key: value for key, value in found.items() if key not in _NAMING or not _are_names(value)}
        return {**found, **{LISTS[kind][0]: _in_order(values, listed) for kind, values in media.items()}}


def _kind(extension: str) -> str | None:
    """What a member holds: as its suffix says, or the name of a medium before it, ``.depth.png``."""
    named, dot, _ = extension.partition(".")
    if dot and named in _SENSES:
        return named
    return _KINDS.get(extension.removesuffix(".gz").rpartition(".")[2])


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _in_order(media: list[tuple[_Member, dict[str, Any]]], listed: str | list[str] | None) -> list[dict[str, Any]]:
    """As the record lists them, where it does by the members' names; else numbered ones by number (a tar sorted by
    name has 10 before 2), others as the tar has them."""
    names = {os.path.basename(member.name): entry for member, entry in media}
    wanted = [os.path.basename(name) for name in listed] if isinstance(listed, list) else []
    if sorted(wanted) == sorted(names):
        return [names[name] for name in wanted]
    numbers = [member.extension.rpartition(".")[0] for member, _ in media]
    if all(number.isdecimal() for number in numbers):
        media = [each for _, each in sorted(zip(numbers, media, strict=True), key=lambda pair: int(pair[0]))]
    return [entry for _, entry in media]


def shards_of(path: Path) -> list[Path]:
    """The tar files that ``path`` names.

    Raises:
        DataError: there are none.
    """
    found = _BRACES.search(str(path))
    if found is not None:
        first, last = found[1], found[2]
        numbers = range(int(first), int(last) + 1)
        shards = [Path(_BRACES.sub(f"{number:0{len(first)}d}", str(path), count=1)) for number in numbers]
    else:
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = next((shard for shard in shards if not shard.exists()), None)
    if not shards or missing is not None:
        raise DataError("no such tar file" if shards else "holds no tar files", where=str(missing or path))
    return [regular(shard) for shard in shards]


def _indexed(number: int, shard: Path) -> list[list[_Member]]:
    samples: dict[str, list[_Member]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                entry = _Member(number, member.name, extension.casefold(), member.offset_data, member.size)
                samples.setdefault(os.path.join(folder, stem), []).append(entry)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"cannot be read as a tar file: {error}",
            where=str(shard),
            remedy="unpack a compressed one (gunzip) first; its members are read where they stand",
        ) from error
    return list(samples.values())
