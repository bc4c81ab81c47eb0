"""The tasks of hallucination over the user's own files: POPE and CHAIR."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alula.data.annotations import Annotations, read_annotations, read_questions
from alula.errors import UsageError
from alula.evaluation.chair import chair_of_annotations
from alula.evaluation.items import Task
from alula.evaluation.mentions import ObjectWords
from alula.evaluation.pope import pope_of_annotations, pope_of_questions

HALLUCINATION = ("pope", "chair")
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class ObjectFiles:
    """The user's files about the objects in pictures.

    Args:
        images: the folder of the pictures.
        annotations: an instances file as COCO's.
        captions: a captions file of the same pictures; what people name in them counts as there.
        synonyms: a file as published for CHAIR: per line an object and its synonyms, separated by commas.
        questions: JSONL files of questions as published for POPE.

    Raises:
        UsageError: files that need others which are not given.
    """

    images: Path | None = None
    annotations: Path | None = None
    captions: Path | None = None
    synonyms: Path | None = None
    questions: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if (self.annotations is not None or self.questions) and self.images is None:
            raise UsageError(
                "the folder of the pictures is not named",
                where="annotations" if self.annotations is not None else "questions",
                remedy="name it with --images",
            )
        for name in ("captions", "synonyms"):
            if getattr(self, name) is not None and self.annotations is None:
                raise UsageError(f"{name} say nothing without annotations", where=name, remedy="give annotations too")

    def __bool__(self) -> bool:
        return self.annotations is not None or bool(self.questions)

    @cached_property
    def read(self) -> Annotations:
        """The annotations; read once."""
        assert self.annotations is not None
        assert self.images is not None
        return read_annotations(self.annotations, images=self.images, captions=self.captions)


def object_tasks(names: Sequence[str], files: ObjectFiles, *, n: int | None = None, seed: int = 0) -> list[Task]:
    """Return ``pope`` and ``chair`` as named, over the annotations of ``files``.

    Files of questions become a further task, ``pope_questions``.

    Raises:
        UsageError: an unknown name, or names without annotations. DataError: unusable files.
    """
    unknown = [name for name in names if name not in HALLUCINATION]
    if unknown:
        raise UsageError(f"there is no task {unknown[0]!r}", remedy=f"choose among {', '.join(HALLUCINATION)}")
    if names and files.annotations is None:
        raise UsageError(f"{names[0]} over files needs annotations", remedy="name an instances file as COCO's")
    tasks: list[Task] = []
    limit: dict[str, Any] = {} if n is None else {"n": n}
    for name in names:
        about = {
            key: os.fspath(value)
            for key in ("annotations", "captions", "synonyms")
            if (value := getattr(files, key)) is not None
        }
        options: dict[str, Any] = {"seed": seed, "settings": about, **limit}
        if name == "pope":
            tasks.append(pope_of_annotations(files.read, **options))
        else:
            words = ObjectWords.read(files.synonyms) if files.synonyms is not None else None
            tasks.append(chair_of_annotations(files.read, words=words, **options))
    if files.questions:
        assert files.images is not None
        found = (read_questions(path, images=files.images) for path in files.questions)
        tasks.append(pope_of_questions(itertools.chain.from_iterable(found), n=n))
    return tasks
