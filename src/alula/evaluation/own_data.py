"""A task from the user's own file: the last assistant turn of every conversation is the reference answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alula import data
from alula.errors import DataError, EvaluationError
from alula.evaluation.items import ItemTask, Task, TaskItem, images_of
from alula.evaluation.scoring import exact_match

if TYPE_CHECKING:
    from alula.data import Sample


def data_task(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    name: str | None = None,
    n: int | None = None,
    max_new_tokens: int = 64,
) -> Task:
    """Return a task over a data file or source: exact match after `alula.evaluation.normalise`.

    Args:
        source: a JSONL file of messages, or any source `alula.data.open_source` takes, such as
            ``{"llava": "file.json", "images": "folder"}``.
        name: names the task; the file's stem by default.
        n: take the first ``n`` conversations.
        max_new_tokens: bounds an answer.

    Raises:
        DataError: the file is missing or damaged, or a conversation does not end with an assistant's text.
        EvaluationError: the source is endless and ``n`` is not given.
    """
    spec = dict(source) if isinstance(source, Mapping) else {"jsonl": os.fspath(source)}
    title = next((str(value) for value in spec.values() if isinstance(value, str | os.PathLike)), "own data")
    items = [_item(sample) for sample in _samples(spec, n)]
    return ItemTask(
        name=name or Path(title).stem,
        title=name or Path(title).name,
        source=items,
        scorer=exact_match,
        max_new_tokens=max_new_tokens,
        settings={"source": {key: str(value) for key, value in spec.items()}, "n": n},
    )


def _samples(spec: Mapping[str, Any], n: int | None) -> Iterator[Sample]:
    source = data.open_source(spec)
    sizes = [size for size in (n, source.size) if size is not None]
    if not sizes:
        raise EvaluationError("this source never ends", where=str(spec), remedy="say how many items to take (--n)")
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
