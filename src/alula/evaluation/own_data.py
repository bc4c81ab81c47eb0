"""A task from the user's own file: the last assistant turn of every conversation is the reference answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from alula import data
from alula.errors import DataError, EvaluationError
from alula.evaluation.items import ItemTask, Task, TaskItem, images_of
from alula.evaluation.scoring import exact_match

if TYPE_CHECKING:
    from alula.data import Sample, Source


def data_task(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    images: str | os.PathLike[str] | None = None,
    name: str | None = None,
    n: int | None = None,
    max_new_tokens: int = 64,
) -> Task:
    """Return a task over a data file or source: exact match after `alula.evaluation.normalise`.

    Args:
        source: a file or folder of any kind `alula.data` reads (found out from its content), or a source as recipes
            name it, such as ``{"llava": "file.json", "images": "folder"}``.
        images: the folder relative image paths of a file start from; by default the file's own.
        name: names the task; by default what the source is called.
        n: take the first ``n`` conversations.
        max_new_tokens: bounds an answer.

    Raises:
        DataError: the file is missing or damaged, or a conversation does not end with an assistant's text.
        EvaluationError: the source is endless and ``n`` is not given.
    """
    if isinstance(source, Mapping):
        opened, settings = data.open_source(source), {key: str(value) for key, value in source.items()}
    else:
        opened, settings = data.open_file(source, images=images), {"file": os.fspath(source)}
    title = name or opened.name
    items = [_item(sample) for sample in _samples(opened, n)]
    return ItemTask(
        name=title,
        title=title,
        source=items,
        scorer=exact_match,
        max_new_tokens=max_new_tokens,
        settings={"source": settings, "n": n},
    )


def _samples(source: Source, n: int | None) -> Iterator[Sample]:
    sizes = [size for size in (n, source.size) if size is not None]
    if not sizes:
        raise EvaluationError("this source never ends", where=source.name, remedy="say how many items to take (--n)")
    return (source[index] for index in range(min(sizes)))


def _item(sample: Sample) -> TaskItem:
    *prompt, last = sample.messages
    if last["role"] != "assistant":
        raise DataError(
            f"the conversation ends with a {last['role']} turn, not with a reference answer", where=sample.id
        )
    texts = [part["text"] for part in last["content"] if part["type"] == "text"]
    if not texts or not "".join(texts).strip():
        raise DataError("the last assistant turn holds no text to score against", where=sample.id)
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError("no user turn stands before the last assistant turn", where=sample.id)
    kind = "visual" if any(True for _ in images_of(prompt)) else "text"
    family = str(sample.meta.get("family", sample.source))
    return TaskItem(id=sample.id, family=family, messages=prompt, gold="".join(texts), tags={"kind": kind})
