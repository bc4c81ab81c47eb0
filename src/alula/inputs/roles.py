"""Whose turn every token of a rendered conversation belongs to.

A conversation is rendered turn by turn: where the rendering of its first k turns ends, turn k + 1 begins. That gives
turns as stretches of text; tokens are matched to them by the offsets of the tokenizer. Processors put more tokens in
the place of a medium than a template writes, and how many and which only they know. So turns without media have to
stand among the tokens as they are, and a turn with media is what stands between its neighbors.

What a template writes before the first turn (a BOS token, a default system prompt) counts to the first turn; the
generation prompt counts to the assistant.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import jinja2

from alula.errors import UsageError
from alula.tokens import Role

_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_REMEDY = (
    "leave system_keys, system= and sets of system, user and assistant tokens at their defaults, or take a template "
    "that writes the turns one after another"
)

Messages = Sequence[Mapping[str, Any]]


def token_roles(
    ids: Sequence[int], messages: Messages, render: Callable[[Messages, bool], str], tokenizer: Any, *, prompt: bool
) -> list[int]:
    """Values of `Role` for the tokens of a rendered conversation.

    Args:
        ids: (S,) its token ids, those of media included.
        messages: the conversation, content in lists of parts.
        render: messages -> text, the second argument says whether a generation prompt is added.
        tokenizer: what made ``ids`` of the text.
        prompt: whether ``ids`` end with a generation prompt.

    Raises:
        UsageError: the template does not write the turns one after another, the tokenizer gives no offsets, or the
            tokens of the turns are not found among ``ids``.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _refusal(f"{type(tokenizer).__name__} gives no offsets (it is not backed by `tokenizers`)", tokenizer)
    text = _rendered(render, messages, prompt, tokenizer)
    ends = _turn_ends(text, messages, render, tokenizer)
    names = [str(message["role"]) for message in messages]
    roles = [_ROLES.get(name, Role.UNKNOWN) for name in names] + [Role.ASSISTANT]
    has_media = [any(part["type"] != "text" for part in message["content"]) for message in messages] + [False]
    bos = tokenizer.bos_token
    written = tokenizer(
        text,
        add_special_tokens=any(has_media) and not (bos and text.startswith(bos)),
        return_offsets_mapping=True,
    )
    if not any(has_media) and list(written["input_ids"]) != list(ids):
        # processors add special tokens to texts that do not begin with one
        written = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
    turn = [min(bisect.bisect_right(ends, start), len(messages)) for start, _ in written["offset_mapping"]]
    turn = [max(turn[: place + 1]) for place in range(len(turn))] if turn != sorted(turn) else turn
    return _matched(list(ids), list(written["input_ids"]), turn, roles, has_media, tokenizer)


def _turn_ends(text: str, messages: Messages, render: Callable[[Messages, bool], str], tokenizer: Any) -> list[int]:
    """Where in the text each turn ends."""
    ends: list[int] = []
    for count in range(1, len(messages) + 1):
        end = _end(text, messages, count, render, tokenizer)
        start = ends[-1] if ends else 0
        turn = messages[count - 1]
        said = [part["text"].strip() for part in turn["content"] if part["type"] == "text"]
        if end < start or any(words not in text[start:end] for words in said):
            raise _refusal(
                f"the chat template does not write the {turn['role']} turn as a stretch of its own", tokenizer
            )
        ends.append(end)
    return ends


def _end(text: str, messages: Messages, count: int, render: Callable[[Messages, bool], str], tokenizer: Any) -> int:
    before = _rendered(render, messages[:count], False, tokenizer)
    if text.startswith(before):
        return len(before)
    # some templates write the last answer otherwise than earlier ones (with an empty thought): take the next turn away
    if count < len(messages):
        following = _rendered(render, messages[: count + 1], False, tokenizer)
        alone = _rendered(render, messages[count : count + 1], False, tokenizer).removeprefix(tokenizer.bos_token or "")
        if text.startswith(following) and following.endswith(alone):
            return len(following) - len(alone)
    raise _refusal(
        f"the chat template writes the first {count} of {len(messages)} turns otherwise when others follow", tokenizer
    )


def _rendered(render: Callable[[Messages, bool], str], messages: Messages, prompt: bool, tokenizer: Any) -> str:
    try:
        return render(messages, prompt)
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
        raise _refusal(
            f"the chat template does not write the first {len(messages)} turn(s) alone: {error}", tokenizer
        ) from error


def _matched(
    ids: list[int],
    written: list[int],
    turn: list[int],
    roles: Sequence[int],
    has_media: Sequence[bool],
    tokenizer: Any,
) -> list[int]:
    """Roles of ``ids``, given the tokens of the text before media were put in, and the turn of each of those."""
    found: list[int] = []
    stretches = [(media, list(places)) for media, places in groupby(range(len(turn)), lambda p: has_media[turn[p]])]
    behind: int | None = None  # the role of a turn with media that ends where the next stretch begins
    for number, (media, places) in enumerate(stretches):
        if media:
            if len({turn[place] for place in places}) > 1:
                raise _refusal("two turns in succession hold media", tokenizer)
            behind = int(roles[turn[places[0]]])
            continue
        chunk, last = [written[place] for place in places], number == len(stretches) - 1
        if behind is None:
            at = 0
        elif last:
            at = len(ids) - len(chunk)
        else:
            at = _position(chunk, ids, len(found) + 1)
        if (
            at < len(found)
            or ids[at : at + len(chunk)] != chunk
            or (behind is None and last and len(ids) != len(chunk))
        ):
            raise _refusal("the tokens of its turns are not those of the rendered text", tokenizer)
        found += [Role.UNKNOWN if behind is None else behind] * (at - len(found))
        found += [int(roles[turn[place]]) for place in places]
        behind = None
    if behind is not None:
        found += [behind] * (len(ids) - len(found))
    return [int(role) for role in found]


def _position(chunk: list[int], ids: list[int], start: int) -> int:
    """Where ``chunk`` stands first in ``ids`` from ``start`` on, or -1."""
    for at in range(start, len(ids) - len(chunk) + 1):
        if ids[at] == chunk[0] and ids[at : at + len(chunk)] == chunk:
            return at
    return -1


def _refusal(why: str, tokenizer: Any) -> UsageError:
    return UsageError(
        f"which tokens are the system's, the user's and the assistant's cannot be told: {why}",
        where=f"{type(tokenizer).__name__}",
        remedy=_REMEDY,
    )
