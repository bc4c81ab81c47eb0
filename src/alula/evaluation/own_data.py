"""A task from the user's own file: the last assistant turn of every conversation is the reference answer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from alula import data
from alula.data import BadSampleError, Place, RecordError
from alula.data.interleave import History
from alula.data.specs import UndrawnSpec, validated
from alula.errors import EvaluationError, UsageError
from alula.evaluation.items import ItemTask, Message, Task, TaskItem, media_of
from alula.evaluation.scoring import exact_match

_SKIP = 'leave bad records out: alula eval --task data:FILE,on_bad=skip, or on_bad="skip" of data_task'

if TYPE_CHECKING:
    from alula.data import Sample, Source


def data_task(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    images: str | os.PathLike[str] | None = None,
    name: str | None = None,
    title: str | None = None,
    n: int | None = None,
    history: History | None = None,
    max_new_tokens: int = 64,
    on_bad: Literal["fail", "skip"] = "fail",
) -> Task:
    """Return a task over a data file or source: exact match after `alula.evaluation.normalise`.

    Args:
        source: a file or folder of any kind `alula.data` reads (found out from its content), or a source as recipes
            name it, such as ``{"llava": "file.json", "images": "folder"}``.
        images: the folder relative image paths of a file start from; by default the file's own.
        name: names the task; by default what the source is called.
        title: what reports call it; by default as ``name``.
        n: take the first ``n`` conversations.
        history: whether earlier answers are shown as written (``"gold"``) or are the model's own (``"generated"``); by
            default what each record's key ``history`` says, or as written.
        max_new_tokens: bounds an answer.
        on_bad: a record that cannot be read, or a medium that cannot be decoded, ends the evaluation (``"fail"``), or
            is left out and listed in the results (``"skip"``), for which all media are decoded once before.

    Records that share an id (questions about one picture) are told apart by ``.2``, ``.3``, ... behind it, and the id
    is their cluster. Records that `alula data interleave` wrote are broken down by their ``setting``.

    Raises:
        UsageError: an unknown history or ``on_bad``.
        DataError: the file is missing or damaged. RecordError: a conversation does not end with an assistant's text.
        EvaluationError: the source is endless and ``n`` is not given.
    """
    if isinstance(source, Mapping):
        opened = data.open_source(validated(UndrawnSpec, source, key="source"))
        settings = {key: str(value) for key, value in source.items()}
    else:
        opened, settings = data.open_file(source, images=images), {"file": os.fspath(source)}
    named = name or opened.name
    if history not in (None, "gold", "generated"):
        raise UsageError(f"history {history!r} is not one of 'gold', 'generated'", where=f"task {named!r}")
    if on_bad not in ("fail", "skip"):
        raise UsageError(f"on_bad {on_bad!r} is not one of 'fail', 'skip'", where=f"task {named!r}")
    bad: list[str] = []
    found = [
        (sample.id, items)
        for index in range(_count(opened, n))
        for sample, items in _read(opened, index, history, bad if on_bad == "skip" else None)
    ]
    items = _told_apart(found)
    left_out = {"on_bad": on_bad, "bad": bad} if on_bad == "skip" else {}
    return ItemTask(
        name=named,
        title=title or named,
        source=items,
        scorer=exact_match,
        max_new_tokens=max_new_tokens,
        settings={"source": settings, "n": n, "history": history or "as the records say", **left_out},
    )


def _count(source: Source, n: int | None) -> int:
    sizes = [size for size in (n, source.size) if size is not None]
    if not sizes:
        raise EvaluationError(
            "this source never ends", where=source.name, remedy="say how many items to take (--items)"
        )
    return min(sizes)


def _read(
    source: Source, index: int, history: History | None, bad: list[str] | None
) -> Iterator[tuple[Sample, list[TaskItem]]]:
    """Yield a record's sample and items; of a bad one nothing, where ``bad`` takes what is wrong with it."""
    try:
        sample = source[index]
        items = _items(sample, history)
        for ref in sample.media() if bad is not None else ():
            try:
                ref.load()
            except BadSampleError as error:
                raise error.at(sample.place or Place(sample.id)) from None
        yield sample, items
    except BadSampleError as error:
        if bad is None:
            raise type(error)(
                error.message, where=error.where_named, remedy=f"{error.remedy}; or {_SKIP}" if error.remedy else _SKIP
            ) from error
        bad.append(f"{error.where}: {error.message}")


def _told_apart(found: Sequence[tuple[str, list[TaskItem]]]) -> list[TaskItem]:
    """Items of records that share an id under ids of their own, that id their cluster."""
    times = Counter(own for own, _ in found)
    taken, seen = {item.id for _, items in found for item in items}, Counter[str]()
    told: list[TaskItem] = []
    for own, items in found:
        seen[own] += 1
        if times[own] == 1:
            told += items
            continue
        number = seen[own]
        while number > 1 and f"{own}.{number}" in taken:
            number += 1
        new = own if number == 1 else f"{own}.{number}"
        taken.add(new)
        told += [
            replace(
                item,
                id=new + item.id.removeprefix(own),
                cluster=item.cluster or own,
                follows=tuple((turn, new + earlier.removeprefix(own)) for turn, earlier in item.follows),
            )
            for item in items
        ]
    return told


def _items(sample: Sample, history: History | None) -> list[TaskItem]:
    """The last turn as a scored item, behind the earlier ones where the model is to answer those itself."""
    scored = item_of(sample)
    if (history or sample.meta.get("history")) != "generated":
        return [scored]
    earlier = [turn for turn, message in enumerate(scored.messages) if message["role"] == "assistant"]
    follows = tuple((turn, f"{sample.id}#{turn}") for turn in earlier)
    asked = [
        TaskItem(
            id=own,
            family=scored.family,
            messages=scored.messages[:turn],
            gold=data.message_text(scored.messages[turn]),
            follows=follows[:rank],
            scored=False,
            place=scored.place,
        )
        for rank, (turn, own) in enumerate(follows)
    ]
    return [*asked, replace(scored, follows=follows)]


def item_of(sample: Sample, *, answered: bool = True) -> TaskItem:
    """The question of a conversation's last user turn, with the assistant turn behind it as the reference.

    Args:
        answered: refuse a conversation that ends with a user turn; else its item has ``gold=""``.

    Raises:
        RecordError: it has no such turns, or the reference no text.
    """
    *prompt, last = sample.messages
    place = sample.place or Place(sample.id)
    gold = ""
    if last["role"] == "user" and not answered:
        prompt = [*prompt, last]
    elif last["role"] != "assistant":
        raise RecordError(
            f"the conversation ends with a {last['role']} turn, not with a reference answer",
            place=place,
            remedy="end every conversation with the assistant turn that answers are compared with",
        )
    else:
        gold = data.message_text(last)
        if not gold.strip():
            raise RecordError("the last assistant turn holds no text to score against", place=place)
    if not prompt or prompt[-1]["role"] != "user":
        raise RecordError("no user turn stands before the last assistant turn", place=place)
    setting = _setting(sample, prompt)
    if setting:
        kind = "visual" if setting.endswith("V") else "text"
        tags = {"kind": kind, "pattern": setting, "before": setting[:-1] or "nothing"}
    else:
        kinds = {"image": "visual", "video": "film", "audio": "sound"}
        tags = {"kind": next((kinds.get(kind, kind) for kind, _ in media_of(prompt)), "text")}
    family = str(sample.meta.get("family", setting or sample.source))
    return TaskItem(
        id=sample.id,
        family=family,
        messages=prompt,
        gold=gold,
        # settings share their last questions, whose answers are then not independent
        cluster=str(sample.meta["parts"][-1]) if setting and sample.meta.get("parts") else "",
        tags=tags,
        place=str(sample.place or ""),
    )


def _setting(sample: Sample, prompt: Sequence[Message]) -> str:
    """The record's order of text and visual turns, where it names one that fits."""
    named = sample.meta.get("setting")
    asked = sum(message["role"] == "user" for message in prompt)
    return named if isinstance(named, str) and len(named) == asked and not set(named) - {"T", "V"} else ""
