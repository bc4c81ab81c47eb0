"""Captions and questions about pictures as COCO and VQA publish them, one sample for each annotation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.dialects import from_record
from alula.data.errors import BadSampleError, Place
from alula.data.samples import Sample
from alula.data.shapes import ImageFolder
from alula.errors import DataError, UsageError
from alula.files import absolute, regular, unreadable


class CocoSource:
    """Samples of ``captions_train2014.json`` (a picture and its caption), or of VQA's questions with their answers.

    A picture without questions or captions is left out. VQA names pictures by number; their files are called as
    COCO calls them, after the ``data_subtype`` of the questions: ``COCO_train2014_000000000009.jpg``.

    Args:
        path: the captions, or the questions.
        answers: the annotations of the questions.
        images: folder that names of pictures start from; default: the file's own, then ``images`` in it.
        name: default: the file's name without suffix.
        limit: use only the first n annotations.

    Raises:
        DataError: a file that cannot be read or is of another kind. UsageError: questions without answers, or captions
            with some.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        answers: str | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        name: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = absolute(path)
        content = _loaded(self.path)
        if isinstance(content.get("questions"), list):
            if answers is None:
                raise UsageError(
                    "holds questions; their answers are in a file of their own",
                    where=str(path),
                    remedy="name it: `answers: v2_mscoco_train2014_annotations.json` in a recipe",
                )
            records, self._unit = _questions(content, _loaded(Path(answers)), str(path), str(answers)), "question"
        elif answers is not None:
            raise UsageError("holds no questions to be answered", where=str(path), remedy="leave `answers` out")
        else:
            records, self._unit = _captions(content, str(path)), "annotation"
        if not records:
            raise DataError("holds no captions and no answered questions", where=str(path))
        self._records = records[:limit]
        beside = self.path.parent
        roots = (str(beside), str(beside / "images")) if images is None else (os.path.abspath(images),)
        self._folder = ImageFolder(roots, max_pixels)
        self.name, self.size = name or self.path.stem, len(self._records)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        place = self.place(index)
        try:
            return from_record(self._records[index], folder=self._folder, source=self.name, place=place)
        except BadSampleError as error:
            raise error.at(place) from None

    def place(self, index: int) -> Place:
        """Where annotation or question ``index`` stands, counted from 0."""
        return Place(str(self.path), index, unit=self._unit)


def is_coco(record: Any) -> bool:
    """Whether a whole JSON file is one of those that `CocoSource` reads."""
    return isinstance(record, Mapping) and any(
        isinstance(record.get(key), list) for key in ("annotations", "questions")
    )


def _loaded(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(regular(path).read_bytes())
    except OSError as error:
        raise unreadable(error, path, DataError) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", where=str(path)) from error
    if not is_coco(content):
        raise DataError("has neither 'annotations' nor 'questions', as COCO's and VQA's files have", where=str(path))
    return content


def _captions(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    try:
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        return [
            {"id": entry.get("id", number), "image": files[entry["image_id"]], "caption": entry["caption"].strip()}
            for number, entry in enumerate(content["annotations"])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"is no file of captions ({type(error).__name__}: {error})",
            where=where,
            remedy="give `images` of id and file_name, and `annotations` of image_id and caption",
        ) from error


def _questions(
    content: Mapping[str, Any], answers: Mapping[str, Any], where: str, where_answers: str
) -> list[dict[str, Any]]:
    try:
        given = {entry["question_id"]: entry for entry in answers["annotations"]}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"is no file of VQA's annotations ({type(error).__name__}: {error})", where=where_answers
        ) from error
    subset = content.get("data_subtype")
    found = []
    for number, entry in enumerate(content["questions"]):
        at = f"{where}: questions[{number}]"
        try:
            image = entry.get("file_name") or entry.get("image") or f"COCO_{subset}_{int(entry['image_id']):012d}.jpg"
            answer = given[entry["question_id"]]
            said = answer.get("multiple_choice_answer", answer.get("answers", answer.get("answer")))
            found.append({"id": entry["question_id"], "image": image, "question": entry["question"], "answers": said})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise DataError(f"has no picture, question or answer of its own ({told})", where=at) from error
        if subset is None and not (entry.get("file_name") or entry.get("image")):
            raise DataError("which file its picture is cannot be told: there is no `data_subtype`", where=at)
    return found
