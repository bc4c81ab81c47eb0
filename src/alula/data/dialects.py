"""Records of other shapes, written as messages: pairs of a prompt and an answer under the names that people give them.

==============================================  =================================================================
columns                                         read as
==============================================  =================================================================
``prompt``, ``completion``                      TRL's: texts or lists of messages; answers in the prompt are not
                                                learnt
``instruction``, ``input``, ``output``          Alpaca's: a line of instruction, then the input; ``system`` first,
                                                ``history`` (pairs) before
``question``, ``answer``                        VQA; of ``answers`` the most frequent one, of VQAv2
                                                ``multiple_choice_answer``
``texts`` of ``user``, ``assistant``            the_cauldron's
``image``, ``points`` ... or ``file_name``,     a caption: the picture alone is the user's turn
``text`` or ``caption``
==============================================  =================================================================

Media stand before the first words of the first user turn, unless a placeholder says where. What else would change the
meaning (``choices``, ``context``) is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from alula.data.errors import Place, RecordError
from alula.data.keys import names_of, refuse_others, void
from alula.data.samples import Sample
from alula.data.shapes import LISTS, PLACEHOLDER, ImageFolder, from_conversations, from_messages, holds_media
from alula.errors import quoted

PROMPTS = ("prompt", "instruction", "question", "query")
MORE = ("input", "query")  # behind the prompt
ANSWERS = ("completion", "response", "output", "answer", "multiple_choice_answer", "answers")
CAPTIONS = ("text", "caption")
MEDIA_KEYS = tuple(key for keys in LISTS.values() for key in reversed(keys))
FILE_NAMES = ("file_name", "image_file_name")

_WORDS = frozenset({*PROMPTS, *MORE, *ANSWERS, *CAPTIONS} - {"answers"})

COLUMNS = tuple(
    dict.fromkeys(
        [
            *("id", "messages", "conversations", "texts", "system", "history"),
            *(*PROMPTS, *MORE, *ANSWERS, *CAPTIONS, *MEDIA_KEYS, *FILE_NAMES),
        ]
    )
)
"""What ``columns:`` may map."""

_LETTERS = "ABCDEF"
_MEANS = frozenset(
    {
        *_LETTERS,
        *(f"option_{letter}" for letter in _LETTERS + _LETTERS.casefold()),
        *("context", "passage", "choices", "options", "hint", "candidates", "chosen", "rejected", "query_wav"),
        *("prompt", "completion", "instruction", "input", "output", "response", "question", "query", "answer"),
        *("texts", "history", "system"),
    }
)
"""Columns beside a pair that change what it means."""

REMEDY = (
    "give each record `messages` or `conversations`, or say which of its columns is what: `columns: {question: COLUMN, "
    "answer: COLUMN}` in a recipe, --column question=COLUMN of `alula data` (docs/usage/data.md)"
)


def from_record(record: Any, *, folder: ImageFolder, source: str, place: Place) -> Sample:
    """Read a record of any of the shapes.

    Raises:
        BadSampleError: as `from_messages` and `from_conversations`, or none of the shapes.
    """
    if isinstance(record, Mapping) and void(record.get("messages")):
        if not void(record.get("conversations")):
            return from_conversations(record, folder=folder, source=source, place=place)
        if "messages" not in record and readable(record):
            record = as_messages(record, place)
    return from_messages(record, folder=folder, source=source, place=place)


def from_metadata(record: Any, *, folder: ImageFolder, source: str, place: Place) -> Sample:
    """Read a line of an imagefolder's metadata: a record of any of the shapes, about the picture that it names.

    Raises:
        BadSampleError: as `from_record`; messages without a place for the picture.
    """
    record = _pictured(record) if isinstance(record, Mapping) else record
    return from_record(record, folder=folder, source=source, place=place)


def readable(keys: Collection[str]) -> bool:
    """Whether records with these keys can be written as messages."""
    has = {*keys}
    pair = has & {*PROMPTS} and has & {*ANSWERS}
    caption = has & {*CAPTIONS} and has & {*MEDIA_KEYS, *FILE_NAMES}
    return bool(pair or caption or "texts" in has)


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with its columns under alula's names; what stood under these names itself is left out, and so are
    messages that it has beside columns named as prompt, answer or caption."""
    taken = {*columns, *columns.values()}
    if {*columns} & {*_WORDS, "answers", "texts"}:
        taken |= {"messages", "conversations"} - {*columns}
    rest = {key: value for key, value in record.items() if key not in taken}
    return rest | {name: record[column] for name, column in columns.items() if column in record}


def as_messages(record: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The record in the shape of messages, its other columns as they are.

    Raises:
        RecordError: no prompt or no answer, two of either, or a column that would be dropped and means something.
    """
    record = _pictured({key: value for key, value in record.items() if key == "id" or _says(key, value)})
    if "texts" in record:
        used, turns = ["texts"], _cauldron(record["texts"], place)
    else:
        used, turns = _pair(record, place)
    rest = {key: value for key, value in record.items() if key not in used}
    lost = next((key for key in rest if key in _MEANS), None)
    if lost is not None:
        raise RecordError(
            f"the column {lost!r} would be dropped",
            place=place,
            remedy="write what it says into the prompt or the answer, then leave it out",
        )
    return {**rest, "messages": _with_media(turns, rest)}


def _says(key: str, value: Any) -> bool:
    """Whether a column carries something: where words stand, ``[]`` and ``{}`` are some."""
    worded = key in _WORDS and isinstance(value, str) and bool(value.strip())
    return worded or not void(value)


def _pictured(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the file that it is called after as its picture, where it names no other medium."""
    name = next((key for key in FILE_NAMES if not void(record.get(key))), None)
    held = (key for kind, keys in LISTS.items() for key in keys if holds_media(kind, record.get(key)))
    if name is None or any(not void(record[key]) for key in held):
        return dict(record)
    rest = {key: value for key, value in record.items() if key != name and key not in MEDIA_KEYS}
    return {**rest, "image": record[name]}


def _pair(record: Mapping[str, Any], place: Place) -> tuple[list[str], list[dict[str, Any]]]:
    asked = next((key for key in PROMPTS if key in record), None)
    more = next((key for key in MORE if key in record and key != asked), None)
    answered = [key for key in ANSWERS if key in record]
    if "answers" in answered and len(answered) > 1:  # what several people said, beside the one that counts
        answered.remove("answers")
    if asked is None and not answered:
        answered = [key for key in CAPTIONS if key in record]
        if len({str(record[key]).strip() for key in answered}) == 1:
            answered = answered[:1]
    elif asked is None:
        raise RecordError(f"no prompt stands beside {answered[0]!r}", place=place, remedy=REMEDY)
    if len(answered) != 1:
        told = " and ".join(map(repr, answered)) if answered else f"none (it has {names_of(record)})"
        raise RecordError(f"a record needs one answer, not {told}", place=place, remedy=REMEDY)
    (answer,) = answered
    if answer == "completion" and record.get("label") is False:  # as TRL marks those that are not liked
        raise RecordError(
            "'label' is false: the completion is one that is not to be learnt",
            place=place,
            remedy="leave such records out",
        )
    used = [key for key in (asked, more, answer, "system", "history") if key is not None]
    used += ["answers"] if answer in ("answer", "multiple_choice_answer") else []
    turns = [{"role": "system", "content": record["system"]}] if "system" in record else []
    for number, pair in enumerate(record.get("history", ())):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RecordError(f"history[{number}] is no pair of a prompt and an answer: {quoted(pair)}", place=place)
        turns += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    if asked is not None:
        turns += _turns(record[asked], "user", asked, place)
        if more is not None:
            last = turns[-1]
            if not isinstance(last["content"], str) or not isinstance(record[more], str):
                raise RecordError(f"{more!r} stands beside a prompt that is no text", place=place)
            turns[-1] = {**last, "content": f"{last['content']}\n{record[more]}"}
        if asked == "prompt" and answer == "completion":  # as TRL has it, whose loss is on completions
            turns = [_unlearnt(turn) for turn in turns]
    else:
        turns.append({"role": "user", "content": ""})
    return used, [*turns, *_turns(_answer(record[answer], answer, place), "assistant", answer, place)]


def _turns(said: Any, role: str, key: str, place: Place) -> list[dict[str, Any]]:
    if isinstance(said, Sequence) and said and all(isinstance(turn, Mapping) and "role" in turn for turn in said):
        return [dict(turn) for turn in said]
    if not isinstance(said, str):
        raise RecordError(f"{key!r} must be text or a list of messages, not {quoted(said)}", place=place)
    return [{"role": role, "content": said}]


def _answer(said: Any, key: str, place: Place) -> Any:
    """The answer to learn: of several people's the most frequent, the first of equally frequent ones."""
    if key == "answers" or (key == "answer" and isinstance(said, list | tuple) and all(map(_plain, said))):
        several = said if isinstance(said, list | tuple) else [said]
        told = [one.get("answer") if isinstance(one, Mapping) else one for one in several]
        if not told or not all(map(_plain, told)):
            raise RecordError(f"{key!r} holds no texts: {quoted(said)}", place=place)
        said = Counter(map(str, told)).most_common(1)[0][0]
    return str(said) if isinstance(said, int | float) and not isinstance(said, bool) else said


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _unlearnt(turn: dict[str, Any]) -> dict[str, Any]:
    said = turn.get("train") is not None or turn.get("weight") is not None
    return {**turn, "train": False} if turn["role"] == "assistant" and not said else turn


def _cauldron(texts: Any, place: Place) -> list[dict[str, Any]]:
    turns = []
    for number, text in enumerate(texts if isinstance(texts, list | tuple) else [texts]):
        if not isinstance(text, Mapping) or not all(isinstance(text.get(key), str) for key in ("user", "assistant")):
            raise RecordError(f"texts[{number}] needs the texts 'user' and 'assistant'", place=place)
        refuse_others(text, ("user", "assistant"), f"texts[{number}]", place)
        turns += [{"role": role, "content": text[role]} for role in ("user", "assistant")]
    return turns


def _with_media(turns: list[dict[str, Any]], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    contents = [turn.get("content") for turn in turns]
    if not all(isinstance(content, str) for content in contents):
        return turns  # parts say where media stand
    found: list[dict[str, Any]] = []
    for kind, keys in LISTS.items():
        given = next((value for key in keys if not void(value := record.get(key)) and holds_media(kind, value)), None)
        if given is None or (kind == "image" and any(PLACEHOLDER in str(content) for content in contents)):
            continue
        count = sum(not void(one) for one in given) if isinstance(given, list | tuple) else 1
        found += [{"type": kind}] * count
    first = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), None)
    if not found or first is None:
        return turns
    words = turns[first]["content"]
    said = [{"type": "text", "text": words}] if words else []
    return [*turns[:first], {**turns[first], "content": [*found, *said]}, *turns[first + 1 :]]
