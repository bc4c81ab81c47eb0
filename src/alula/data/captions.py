"""Pictures with captions: files in the shapes of COCO and Flickr30k, and sources of conversations."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.data.images import ImageRef
from alula.data.samples import Source, message_text, user
from alula.errors import DataError
from alula.files import regular, unreadable

PROMPT = "Provide a one-sentence caption for the provided image."
"""what a model is asked for a caption where nothing else is said"""
_SHAPES = (
    "give JSON as COCO's captions (images, annotations) or as Karpathy's splits (images with sentences), "
    "lines `name.jpg#0<tab>caption` (Flickr30k), or CSV with the columns image and caption"
)


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture and what people said about it.

    Args:
        id: unique within its file.
        image: loads to a PIL image.
        captions: one or more.
        messages: what a model is asked for a caption: a user turn that shows the picture.
    """

    id: str
    image: Any
    captions: tuple[str, ...]
    messages: tuple[dict[str, Any], ...]


def read_captions(
    path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None, split: str | None = None
) -> tuple[CaptionedPicture, ...]:
    """Read a file of captions; its layout is found out from its content. No picture is opened.

    Args:
        path: COCO's captions, Karpathy's JSON (COCO, Flickr30k), Flickr30k's token file, or CSV of image and caption.
        images: the folder that its file names start from; default: the file's own.
        split: only pictures of that split, where the file names splits.

    Raises:
        DataError: a file that cannot be read, of another layout, without the split, or with no captions.
    """
    where, folder = os.fspath(path), Path(path).parent if images is None else images
    try:
        text = regular(path).read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(error, where, DataError) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not text: {error}", where=where, remedy=_SHAPES) from error
    said: dict[str, list[str]] = {}
    for file, caption in (
        _of_json(text, split, where) if text.lstrip().startswith(("{", "[")) else _of_lines(text, where)
    ):
        said.setdefault(file, []).append(caption)
    if split is not None and not text.lstrip().startswith(("{", "[")):
        raise DataError(f"names no splits, and {split!r} was asked for", where=where)
    if not said:
        raise DataError("holds no captions" + (f" of split {split!r}" if split else ""), where=where, remedy=_SHAPES)
    found = []
    for file, captions in said.items():
        image = ImageRef.from_path(file, roots=(folder,))
        found.append(CaptionedPicture(file, image, tuple(captions), (user(PROMPT, image),)))
    return tuple(found)


def captions_of(source: Source, n: int) -> tuple[CaptionedPicture, ...]:
    """Pictures of a source of conversations: samples of one image whose one answer is a caption.

    A picture whose caption an earlier one has already is left out: which of the two is meant cannot be told.

    Args:
        source: without an end, or with one.
        n: samples that are looked at.

    Raises:
        DataError: no sample is such a picture.
    """
    found: list[CaptionedPicture] = []
    known: set[str] = set()
    for index in range(n if source.size is None else min(n, source.size)):
        sample = source[index]
        *prompt, answer = sample.messages
        if len(sample.media()) != 1 or len(sample.images) != 1 or [m["role"] for m in prompt] != ["user"]:
            continue
        caption = message_text(answer).strip()
        if answer["role"] == "assistant" and caption and caption not in known:
            known.add(caption)
            found.append(CaptionedPicture(sample.id, sample.images[0], (caption,), tuple(prompt)))
    if not found:
        raise DataError(
            "holds no pictures with captions",
            where=source.name,
            remedy="take conversations of one user turn with one image and one answer",
        )
    return tuple(found)


def _of_json(text: str, split: str | None, where: str) -> Iterator[tuple[str, str]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", where=where, remedy=_SHAPES) from error
    try:
        if isinstance(content, Mapping) and "annotations" in content:
            if split is not None:
                raise DataError(f"names no splits, and {split!r} was asked for", where=where)
            files = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
            for entry in content["annotations"]:
                yield files[entry["image_id"]], str(entry["caption"]).strip()
            return
        for entry in content["images"]:
            if split is None or entry.get("split") == split:
                file = "/".join(filter(None, (entry.get("filepath"), entry["filename"])))
                for sentence in entry["sentences"]:
                    yield file, str(sentence["raw"]).strip()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"is no file of captions that is known ({type(error).__name__}: {error})", where=where, remedy=_SHAPES
        ) from error


def _of_lines(text: str, where: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return
    if "\t" in lines[0] and "#" in lines[0].split("\t")[0]:
        for number, line in enumerate(lines, start=1):
            name, tab, caption = line.partition("\t")
            if not tab or "#" not in name:
                raise DataError("is no `name.jpg#0<tab>caption`", where=f"{where}:{number}", remedy=_SHAPES)
            yield name.rpartition("#")[0], caption.strip()
        return
    rows = csv.DictReader(lines, skipinitialspace=True)
    if not {"image", "caption"} <= {*(rows.fieldnames or ())}:
        raise DataError("is no file of captions that is known", where=where, remedy=_SHAPES)
    for number, row in enumerate(rows, start=2):
        if not row["image"] or not row["caption"]:
            raise DataError("lacks an image or a caption", where=f"{where}:{number}", remedy=_SHAPES)
        yield row["image"].strip(), row["caption"].strip()
