"""Which keys of a record change what it teaches: obeyed, or refused by name, never dropped.

Turns, content parts and media entries may hold the keys of their format and those of `NOTES`; any other key that
carries something is refused. A record may hold what it likes (columns of datasets are kept as ``meta``), except the
keys that say what its turns mean (`_OF_RECORDS`). Null, an empty text, list or map carries nothing: tables hold those
for every key that some other row has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from alula.data.errors import Place, RecordError
from alula.errors import quoted
from alula.sizing import KEYS

NOTES = frozenset(
    {
        *("id", "uuid", "message_id", "parent_id", "turn", "turn_id", "idx", "source", "metadata", "meta"),
        *("timestamp", "time", "date", "created", "created_at", "model", "lang", "language", "score", "rating"),
        *("num_tokens", "token_count", "cache_control"),
    }
)
"""what turns, parts and media entries may say about themselves; it teaches nothing"""

_SIZES = frozenset(
    {
        *("max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width", "detail"),
        *("fps", "nframes", "num_frames", "max_frames", "min_frames", "video_start", "video_end"),
    }
)
_CALLS = frozenset(
    {
        *("tools", "functions", "tool_calls", "function_call", "tool_call_id", "tool_choice"),
        *("documents", "reasoning_content"),
    }
)
_OF_TEMPLATES = frozenset(["chat_template", "chat_template_kwargs", "enable_thinking"])
_SYSTEM = frozenset({"system", "system_prompt"})
_LEARNT = ("weight", "train")
_LOSS = frozenset(["weight", "train", "loss", "loss_weight", "loss_scale", "loss_mask", "sample_weight"])
_OF_RECORDS = _CALLS | _OF_TEMPLATES | _SYSTEM | _LOSS | _SIZES - {"fps", "detail", "num_frames"}


def refuse_others(given: Mapping[str, Any], known: Collection[str], at: str, place: Place | None) -> None:
    """Refuse keys of a turn, part or media entry that carry something alula would have to drop.

    Args:
        given: the turn, part or entry.
        known: the keys that are read.
        at: what it is called in errors.

    Raises:
        RecordError: naming the key.
    """
    for key, value in given.items():
        if key not in known and key not in NOTES and not void(value) and (key, value) != ("detail", "auto"):
            raise RecordError(f"{at}: the key {quoted(key)} would be dropped", place=place, remedy=_remedy(key))


def refuse_in_record(record: Mapping[str, Any], used: Collection[str], place: Place) -> None:
    """Refuse keys of a record, beside those ``used``, that change what its turns mean.

    Raises:
        RecordError: naming the key.
    """
    for key, value in record.items():
        if key not in _OF_RECORDS or key in used or void(value) or (key in _LOSS and value in (1, True)):
            continue
        remedy = _remedy(key)
        if key in _LEARNT:
            remedy = f"write {key!r} into the turns it is meant for; how often a source is drawn is said in the recipe"
        raise RecordError(f"the key {key!r} of the record would be dropped", place=place, remedy=remedy)


def learnt(turn: Mapping[str, Any], role: str, at: str, place: Place) -> bool:
    """Whether an answer is to be learnt from: ``weight`` 0 or 1, ``train`` false or true; learnt without them.

    Raises:
        RecordError: another weight, two keys that disagree, or a turn to be learnt from that is no answer.
    """
    said = {key: turn[key] for key in _LEARNT if turn.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError(
                f"{at}: {key!r} is {quoted(value, 40)}; an answer is learnt from or it is not",
                place=place,
                remedy="weight is 0 or 1, train is false or true; sources have a weight in the recipe",
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise RecordError(f"{at}: 'weight' and 'train' disagree", place=place, remedy="keep one of them")
    if role != "assistant" and any(said.values()):
        raise RecordError(
            f"{at}: {next(iter(said))!r} asks to learn a {role} turn; only answers are learnt",
            place=place,
            remedy="leave it out, or let the assistant say it",
        )
    return all(said.values())


def names_of(record: Iterable[Any]) -> str:
    """The keys of a record, for messages: the first of them, as much of each as can be read."""
    first = [quoted(key, 40) for key in islice(record, 20)]
    return ", ".join(first) + (", ..." if len(first) == 20 else "")


def void(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    if isinstance(value, Mapping):
        return all(map(void, value.values()))
    if isinstance(value, list | tuple):
        return all(map(void, value))
    return value is None


def _remedy(key: str) -> str:
    if key in KEYS:
        return "write it into the part of the image that is meant"
    if key in _SIZES:
        return "make the file of that size or length, or set the model's processor; then leave it out"
    if key in _OF_TEMPLATES:
        return "say it for all records with `template:` in the recipe"
    if key in _SYSTEM:
        return "write it as the first message, of role system"
    if key in _LOSS:
        return "an answer that is not to be learnt says weight: 0 or train: false"
    if key in _CALLS:
        return "write what is read or said of it into the content, as the model's template would; then leave it out"
    return "write what the model is to read or say into the content, notes into 'metadata'; then leave it out"
