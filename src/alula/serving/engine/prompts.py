"""From a request to the inputs of its model, within the limits.

Shapes: S tokens of the prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from alula.anatomy import unwrap
from alula.errors import AlulaError, HostError, UsageError
from alula.inputs import placed
from alula.inputs.intake import content_bytes
from alula.media import MEDIA
from alula.seam import needs_roles
from alula.serving.engine.errors import RequestError
from alula.serving.engine.request import Limits, Request
from alula.serving.engine.resident import Resident
from alula.tokens import UNKNOWN, Modality

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""inputs of a model that say of each token what it is"""
_SLICE = 1 << 14
"""characters of a long text whose tokens are counted at once"""
_LONGEST = 128
"""characters of a token: vocabularies hold runs of spaces that are this long"""
_OTHERS_TURN = 0.001
"""seconds between two slices: a lock that is taken again at once is not given to who waits for it"""


@dataclass(frozen=True)
class Prepared:
    """A prompt, ready for its model.

    Attributes:
        inputs: of the model, a batch of one: in the host's memory, in the dtype of the model, until they are computed.
        ids: token ids.
        keys: what tells each token from others: its id, and for a token of a medium what the medium is.
        items: (S,) number of the medium that a token belongs to, -1 for text; `UNKNOWN` (-2) where it cannot be told.
        messages: content in parts; None: a plain prompt.
        kinds: of its media, in order.
        roles: whose turn each token belongs to, where what is attached to the model asks for it.
    """

    inputs: Mapping[str, Any]
    ids: list[int]
    keys: list[Any]
    items: np.ndarray
    messages: list[dict[str, Any]] | None
    kinds: list[str]
    roles: list[int] | None = None

    def without_media(self) -> Prepared:
        """The same without pixels and samples, which nobody needs once a cache holds what was made of them."""
        return replace(self, inputs={name: value for name, value in self.inputs.items() if name in TOKEN_INPUTS})


def prepare(resident: Resident, request: Request, limits: Limits) -> Prepared:
    """The prompt of a request.

    Raises:
        RequestError: it is beyond the limits, or the model cannot take it.
    """
    messages = None if request.messages is None else [_in_parts(message) for message in request.messages]
    parts = [] if messages is None else [part for message in messages for part in message["content"]]
    parts = [part for part in parts if part["type"] != "text"]
    media = [(part["type"], part[part["type"]]) for part in parts]
    _check_media(resident, media, limits)
    where = "prompt" if messages is None else "messages"
    _check_long(resident, request, messages, limits, where)
    roles: list[int] | None = None
    with resident.preparing:
        if messages is None:
            assert request.prompt is not None
            inputs: dict[str, Any] = _of_plain(resident, request.prompt)
        else:
            inputs, roles = _rendered(resident, request, messages)
    ids: list[int] = inputs["input_ids"][0].tolist()
    _check_length(resident, len(ids), limits, where)
    known = inspect.signature(type(unwrap(resident.model)).forward).parameters
    inputs = {name: value for name, value in inputs.items() if name != "token_type_ids" or name in known}
    items = _items(resident, inputs)
    keys: list[Any] = list(ids)
    if parts:
        digests = [hashlib.sha256(content_bytes(part)).digest() for part in parts]
        whole = hashlib.sha256(b"".join(digests)).digest()
        for place in (items != -1).nonzero()[0].tolist():
            item = int(items[place])
            keys[place] = ids[place], digests[item] if 0 <= item < len(digests) else whole
    elif (items != -1).any():
        raise RequestError("the prompt holds tokens that stand for media, and there are none", where="prompt")
    kinds = [kind for kind, _ in media]
    here = torch.empty(0, dtype=next(resident.model.parameters()).dtype)  # there may be many that wait
    return Prepared(placed(inputs, here), ids, keys, items, messages, kinds, roles)


def _in_parts(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError("a message has a role and content", where="messages")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise RequestError("the content of a message is a text or a list of parts", where="messages")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" and kind not in MEDIA:
            raise RequestError(f"a part is of type {kind!r}", where="messages", remedy=f"text, {', '.join(MEDIA)}")
        if part.get(kind) is None or (kind == "text" and not isinstance(part["text"], str)):
            raise RequestError(f"a part of type {kind!r} does not hold one", where="messages")
    return {**message, "content": list(content)}


def _check_media(resident: Resident, media: list[tuple[str, Any]], limits: Limits) -> None:
    if len(media) > limits.images_per_request:
        raise RequestError(
            f"there are {len(media)} images and other media, and up to {limits.images_per_request} are taken",
            where="messages",
        )
    for kind, value in media:
        if kind not in resident.served.takes:
            raise RequestError(
                f"{resident.served.name!r} takes no {MEDIA[kind].plural}",
                where="messages",
                remedy=f"it takes {', '.join(sorted(resident.served.takes)) or 'text alone'}",
            )
        if isinstance(value, Image.Image) and value.width * value.height > limits.pixels_per_image:
            raise RequestError(
                f"an image has {value.width} x {value.height} pixels, and up to {limits.pixels_per_image:,} are taken",
                where="messages",
            )


def _bound(resident: Resident, limits: Limits) -> int | None:
    """Tokens that a prompt may have."""
    context = resident.served.context
    bounds = [limits.prompt_tokens, None if context is None else context - 1]
    return min((each for each in bounds if each is not None), default=None)


def _check_length(resident: Resident, length: int, limits: Limits, where: str) -> None:
    bound = _bound(resident, limits)
    if bound is not None and length > bound:
        raise _too_long(f"{length} tokens", bound, where)


def _too_long(length: str, bound: int, where: str) -> RequestError:
    unit = "" if length.endswith("tokens") else "tokens "
    return RequestError(
        f"the prompt is {length} long, and up to {bound} {unit}are taken",
        where=where,
        remedy="shorten it, or start a new conversation",
    )


def _check_long(
    resident: Resident, request: Request, messages: list[dict[str, Any]] | None, limits: Limits, where: str
) -> None:
    """Refuse a long text that is far beyond the bound, for what counting so much takes; `_check_length` is exact.

    Megabytes take a tokenizer seconds, in which nobody else has it. Slices are counted until they hold twice as many
    tokens as may be, which leaves room for words that were cut, and others have their turn between two slices.
    """
    bound = _bound(resident, limits)
    if bound is None:
        return
    if messages is None:
        text = request.prompt
        if not isinstance(text, str):
            _check_length(resident, len(text or ()), limits, where)
            return
    else:
        if len(messages) + sum(len(part.get("text", "")) for each in messages for part in each["content"]) <= _SLICE:
            return
        with _refused():  # what the template leaves out does not count
            text = resident.intake(request.template).text(messages, True)
    if len(text) <= _SLICE:
        return
    if len(text) > _LONGEST * bound:
        raise _too_long(f"{len(text)} characters", bound, where)
    counted = 0
    for start in range(0, len(text), _SLICE):
        if start:
            time.sleep(_OTHERS_TURN)
        part = text[start : start + _SLICE]
        _check_encodable(part, where)
        with resident.preparing:
            counted += len(resident.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
        if counted > 2 * bound:
            raise _too_long(f"more than {2 * bound} tokens", bound, where)


def _of_plain(resident: Resident, prompt: str | Sequence[int]) -> dict[str, Any]:
    if isinstance(prompt, str):
        _check_encodable(prompt, "prompt")
        ids = list(resident.tokenizer(prompt, verbose=False)["input_ids"])
        if not ids:
            raise RequestError("it holds no token", where="prompt")
    else:
        ids = list(prompt)
        size = int(unwrap(resident.model).get_input_embeddings().weight.shape[0])
        if not all(type(token) is int and 0 <= token < size for token in ids):
            raise RequestError(f"token ids are whole numbers below {size}", where="prompt")
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _rendered(
    resident: Resident, request: Request, messages: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[int] | None]:
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text":
                _check_encodable(part["text"], "messages")
    with _refused():
        return resident.intake(request.template).tensors(messages, roles=needs_roles(resident.model))


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What template and processor raise, as the request's fault."""
    try:
        yield
    except (HostError, UsageError) as error:
        raise RequestError(error.message, where=error.where or "messages", remedy=error.remedy) from error
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses the conversation: {error}", where="messages") from error
    except AlulaError:
        raise
    except Exception as error:  # processors raise what they like of media that they cannot take
        raise RequestError(f"the processor refuses the conversation: {error}", where="messages") from error


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, which is no character",
            where=where,
        ) from None


def _items(resident: Resident, inputs: Mapping[str, Any]) -> np.ndarray:
    """(S,) the medium of every token."""
    ids = inputs["input_ids"].to(torch.int64)
    if not resident.served.takes:
        return np.full(ids.shape[1], -1)
    modalities = torch.zeros_like(ids)
    for modality, token in resident.anatomy.placeholders.items():
        modalities[ids == token] = int(modality)
    if not bool(modalities.any()):
        return np.full(ids.shape[1], -1)
    found, items = resident.anatomy.items(inputs, modalities.numpy(), ids.numpy())
    return np.where(found[0] > int(Modality.TEXT), np.where(items[0] < 0, UNKNOWN, items[0]), -1)
