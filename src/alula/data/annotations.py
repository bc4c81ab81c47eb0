"""Pictures with the objects that are in them: COCO-style annotation files, and the questions POPE publishes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.data.images import ImageRef
from alula.errors import DataError, quoted
from alula.files import regular, unreadable


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and what is in it.

    Args:
        id: unique within its file.
        image: loads to a PIL image.
        objects: names of the objects (categories) it shows.
        captions: what people said about it.
    """

    id: str
    image: Any
    objects: frozenset[str]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class YesNoQuestion:
    """A question about a picture whose answer is ``"yes"`` or ``"no"``; ``file`` is the stem of where it stood."""

    id: str
    file: str
    picture: str
    image: ImageRef
    text: str
    label: str


@dataclass(frozen=True)
class Annotations:
    """The pictures of an annotation file, by id, and all of its categories."""

    pictures: tuple[AnnotatedPicture, ...]
    categories: tuple[str, ...]


def read_annotations(
    instances: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str],
    captions: str | os.PathLike[str] | None = None,
) -> Annotations:
    """Read an instances file in the shape of COCO's (``images``, ``categories``, ``annotations``).

    Pictures without any annotation are kept: nothing is in them. No picture is opened.

    Args:
        instances: ``instances_val2014.json`` or any file of its shape.
        images: the folder its ``file_name`` entries start from.
        captions: a captions file of the same pictures (``annotations`` with ``image_id`` and ``caption``).

    Raises:
        DataError: a file that cannot be read or lacks a key, or an annotation of a picture or category not listed.
    """
    content = _load(instances)
    where = os.fspath(instances)
    names = {entry["id"]: entry["name"] for entry in _entries(content, "categories", ("id", "name"), where)}
    files = {entry["id"]: entry["file_name"] for entry in _entries(content, "images", ("id", "file_name"), where)}
    shown: dict[Any, set[str]] = {picture: set() for picture in files}
    for entry in _entries(content, "annotations", ("image_id", "category_id"), where):
        picture, category = entry["image_id"], entry["category_id"]
        if picture not in files or category not in names:
            what, which = ("image", picture) if picture not in files else ("category", category)
            raise DataError(f"an annotation names {what} {quoted(which)}, which the file does not list", where=where)
        shown[picture].add(names[category])
    said: dict[Any, list[str]] = {}
    if captions is not None:
        for entry in _entries(_load(captions), "annotations", ("image_id", "caption"), os.fspath(captions)):
            said.setdefault(entry["image_id"], []).append(entry["caption"])
    return Annotations(
        pictures=tuple(
            AnnotatedPicture(
                id=str(picture),
                image=ImageRef.from_path(file, roots=(images,)),
                objects=frozenset(shown[picture]),
                captions=tuple(said.get(picture, ())),
            )
            for picture, file in sorted(files.items(), key=lambda entry: str(entry[0]))
        ),
        categories=tuple(dict.fromkeys(names.values())),
    )


def read_questions(path: str | os.PathLike[str], *, images: str | os.PathLike[str]) -> Iterator[YesNoQuestion]:
    """Yield the questions of a JSONL file as POPE publishes them: ``question_id``, ``image``, ``text``, ``label``.

    Raises:
        DataError: the file cannot be read, or a line is not such a question (it is named).
    """
    stem = Path(path).stem
    try:
        lines = regular(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(error, path, DataError) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{os.fspath(path)}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"is not JSON: {error}", where=where, remedy="give a file of one object per line"
            ) from error
        _check(entry, ("question_id", "image", "text", "label"), where)
        label = str(entry["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"the label is {quoted(entry['label'])}, not yes or no", where=where)
        yield YesNoQuestion(
            id=f"{stem}-{entry['question_id']}",
            file=stem,
            picture=str(entry["image"]),
            image=ImageRef.from_path(str(entry["image"]), roots=(images,)),
            text=str(entry["text"]),
            label=label,
        )


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(regular(path).read_bytes())
    except OSError as error:
        raise unreadable(error, path, DataError) from error
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", where=os.fspath(path)) from error


def _entries(content: Any, key: str, wanted: Sequence[str], where: str) -> Sequence[Mapping[str, Any]]:
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list):
        raise DataError(
            f"has no list {key!r}", where=where, remedy="give a file in the shape of COCO's annotation files"
        )
    for number, entry in enumerate(found):
        _check(entry, wanted, f"{where}: {key}[{number}]")
    return found


def _check(entry: Any, wanted: Sequence[str], where: str) -> None:
    missing = [key for key in wanted if not isinstance(entry, Mapping) or key not in entry]
    if missing:
        raise DataError(f"has no {missing[0]!r}", where=where)
