"""Answers as OpenAI's servers write them, alula's own facts beside them under ``alula``."""

from __future__ import annotations

import codecs
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import alula
from alula.serving.engine import Delta, Finished, Look, Served, TokenLogprob

FINGERPRINT = f"alula-{alula.__version__}"
DONE = b"data: [DONE]\n\n"
_DIGITS = 6
"""of shares of attention: finer ones are noise, and three times as long"""


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event. ASCII alone: some clients take U+2028 for the end of a line."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Collected:
    """An answer that is whole.

    Attributes:
        text, logprobs, attention: of all its pieces.
        end: how it ended.
    """

    end: Finished
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    attention: list[list[Look]] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """What all pieces of one response share.

    Attributes:
        id, created: of the response.
        model: that was asked for.
        is_chat: of the two shapes.
        has_logprobs: were asked for.
        has_usage: a stream tells it at its end.
    """

    model: str
    is_chat: bool
    has_logprobs: bool
    has_usage: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(16)}")

    # -- whole --------------------------------------------------------------------------------------------------------

    def response(self, answers: Sequence[Collected], models: Sequence[str], prompts: int = 1) -> dict[str, Any]:
        """All choices.

        Args:
            models: that each was asked of.
            prompts: that were read, by whichever model; the choices of one follow one another.
        """
        pairs = list(zip(answers, models, strict=True))
        choices = [self._choice(number, answer, model) for number, (answer, model) in enumerate(pairs)]
        return {
            "id": self.id,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": usage([answer.end for answer in answers], prompts),
            "alula": facts(answers[0].end, models[0]),
        }

    def _choice(self, number: int, answer: Collected, model: str) -> dict[str, Any]:
        own = facts(answer.end, model)
        if answer.attention:
            own["attention"] = attention_of(answer.attention)
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            if self.is_chat
            else {"text": answer.text}
        )
        return {
            "index": number,
            **said,
            "logprobs": self._logprobs(answer.logprobs, 0),
            "finish_reason": answer.end.reason,
            "alula": own,
        }

    # -- in pieces ----------------------------------------------------------------------------------------------------

    def begun(self, number: int) -> bytes:
        """The event a choice begins with."""
        return self._event(number, {"role": "assistant", "content": ""})

    def piece(self, number: int, delta: Delta, behind: int) -> bytes | None:
        """The event of a piece; None where there is nothing in it.

        Args:
            behind: characters of the answer before it.
        """
        if not (delta.text or (self.has_logprobs and delta.logprobs) or delta.attention):
            return None
        own = {} if delta.attention is None else {"attention": attention_of(delta.attention)}
        return self._event(
            number, {"content": delta.text}, logprobs=self._logprobs(delta.logprobs or [], behind), own=own
        )

    def ended(self, number: int, end: Finished, model: str) -> bytes:
        """The event a choice ends with."""
        return self._event(number, {}, reason=end.reason, own=facts(end, model))

    def told(self, ends: Sequence[Finished], prompts: int = 1) -> bytes:
        """The event that tells the usage of all."""
        return event({**self._head(), "choices": [], "usage": usage(ends, prompts)})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _event(
        self,
        number: int,
        delta: dict[str, Any],
        *,
        logprobs: Any = None,
        reason: str | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> bytes:
        said: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": number, **said, "logprobs": logprobs, "finish_reason": reason}
        more: dict[str, Any] = {"alula": own} if own else {}
        if self.has_usage:
            more["usage"] = None
        return event({**self._head(), "choices": [choice], **more})

    def _logprobs(self, found: Sequence[TokenLogprob], behind: int) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        if self.is_chat:
            content = [{**_token(each), "top_logprobs": [_token(other) for other in each.top]} for each in found]
            return {"content": content, "refusal": None}
        offsets = []
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for each in found:
            if each.utf8 and each.utf8[0] & 0xC0 != 0x80:  # a character begins, whatever the one before lacks
                behind += len(characters.decode(b"", final=True))
            offsets.append(behind)
            behind += len(characters.decode(each.utf8))
        return {
            "tokens": [_named(each) for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [{_named(other): other.logprob for other in each.top} for each in found],
            "text_offset": offsets,
        }


def _token(found: TokenLogprob) -> dict[str, Any]:
    return {"token": found.text, "logprob": found.logprob, "bytes": list(found.utf8)}


def _named(found: TokenLogprob) -> str:
    """A token where nothing beside it tells its bytes: halves of characters as OpenAI has them there."""
    is_text = not found.utf8 or found.text.encode() == found.utf8
    return found.text if is_text else f"bytes:{found.text}"


def attention_of(tokens: Sequence[Sequence[Look]]) -> list[list[dict[str, Any]]]:
    """Where tokens looked: of each, of each medium."""
    return [
        [
            {
                "item": look.item,
                "grid": None if look.grid is None else list(look.grid),
                "weights": [None if weight is None else round(weight, _DIGITS) for weight in look.weights],
                "share": round(look.share, _DIGITS),
            }
            for look in looks
        ]
        for looks in tokens
    ]


def usage(ends: Sequence[Finished], prompts: int = 1) -> dict[str, Any]:
    """Tokens of a response: a prompt of several answers counts once."""
    first = ends[:: max(1, len(ends) // prompts)]
    prompt = sum(end.usage.prompt_tokens for end in first)
    completion = sum(end.usage.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.usage.cached_tokens for end in first)},
    }


def facts(end: Finished, model: str) -> dict[str, Any]:
    """alula's own facts about an answer."""
    seconds = end.seconds
    return {
        "model": model,
        "computed_by": end.computed_by,
        "image_tokens": {"kept": end.usage.image_tokens, "of": end.usage.image_tokens_of},
        "cached_tokens": end.usage.cached_tokens,
        "seconds": {
            "queued": round(seconds.queued, 4),
            "prefill": round(seconds.prefill, 4),
            "first_token": None if seconds.first_token is None else round(seconds.first_token, 4),
            "total": round(seconds.total, 4),
        },
    }


def model_of(served: Served) -> dict[str, Any]:
    """A model as ``/v1/models`` tells it. Where it lies on the server's disk is nobody's business."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "alula",
        "alula": {
            "name": served.name,
            "base": served.base,
            "kind": served.kind,
            "adapter": served.adapter,
            "takes": sorted(served.takes),
            "exact_gate": served.exact_gate,
            "context": served.context,
            "batched": served.batched,
            "why_alone": served.why_alone,
        },
    }
