"""What comes of a request: pieces of its answer, and its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely it was.

    Attributes:
        token_id: the token.
        text: it, for people; bytes that are no characters as ``\\xe4``.
        utf8: its bytes in the text of the answer; all of them together are that text.
        logprob: natural logarithm of its probability.
        top: the likeliest in its place, most likely first.
    """

    token_id: int
    text: str
    utf8: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Look:
    """Where in one image (video, sound) a token looked when it was told.

    Attributes:
        item: number of the medium in the request, from 0; -1: of all, where they cannot be told apart.
        grid: rows and columns of its tokens; None where it is not known how they lie.
        weights: share of all attention that each of them had, row by row: the mean over layers and heads, and 0 in
            layers that a policy took the token out of; None where it took it out of all.
    """

    item: int
    grid: tuple[int, int] | None
    weights: tuple[float | None, ...]

    @property
    def share(self) -> float:
        """Share of all attention that went to the medium."""
        return sum(weight or 0.0 for weight in self.weights)


@dataclass(frozen=True)
class Delta:
    """A piece of an answer.

    Attributes:
        text: that is final; of some pieces empty (half a character, what may become a stop text).
        token_ids: that came since the last piece.
        logprobs: of the tokens that `text` is made of, the whole list ending where the answer's text does: what
            ends an answer, and what a stop text cuts off, is not in it; None where not asked for.
        attention: of each of `token_ids` its looks, one per medium; None where not asked for.
        index: number of the piece, from 0.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    attention: list[list[Look]] | None
    index: int


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: of the prompt, media included.
        cached_tokens: of these, those that were not computed anew.
        completion_tokens: of the answer, its end included.
        image_tokens: tokens of media in the prompt that the model was left with.
        image_tokens_of: tokens of media in the prompt.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    image_tokens: int
    image_tokens_of: int


@dataclass(frozen=True)
class ItemPreview:
    """One medium of a request.

    Attributes:
        tokens: that it takes in the prompt.
        kept: of these, those that the request's budget leaves.
        grid: rows and columns of its tokens; None where it is not known how they lie.
    """

    tokens: int
    kept: int
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Preview:
    """What a request will take, without an answer.

    Attributes:
        prompt_tokens: of the prompt, media included.
        images: its media in order; one for all where they cannot be told apart.
    """

    prompt_tokens: int
    images: list[ItemPreview]


@dataclass
class Timings:
    """Seconds of a request, from its submission where nothing else is said.

    Attributes:
        queued: until its computation began.
        prefill: that the prompt took from then on.
        first_token: until the first token was there; None: there was none.
        total: until its end.
    """

    queued: float = 0.0
    prefill: float = 0.0
    first_token: float | None = None
    total: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: "stop": the model or a stop text ended it; "length": limits or the context did.
        usage: its tokens.
        computed_by: name of the model whose bits these are: that of the base where an exactly gated adapter had
            nothing to act on.
        seconds: what it took.
    """

    reason: Reason
    usage: Usage
    computed_by: str
    seconds: Timings = field(default_factory=Timings)
