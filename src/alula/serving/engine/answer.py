"""One answer on its way: what was drawn so far, what its reader was told, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alula.serving.engine.events import Delta, Finished, Look, Reason, Timings, TokenLogprob, Usage
from alula.serving.engine.handle import Handle
from alula.serving.engine.request import Sampling
from alula.serving.engine.sampling import Defaults, Sampler
from alula.serving.engine.spelling import Listing, Spelling, readable
from alula.serving.engine.writing import Writer


class Answer:
    """Takes tokens as they are drawn, and tells the reader.

    Attributes:
        handle: the reader's.
        sampler: draws its tokens.
        most: tokens that it may have.
        tokens: those it has.
        cached: tokens of the prompt that were not computed anew.
        computed_by: name of the model that computes it.
        reason: why it ended; None: it goes on.
    """

    def __init__(
        self,
        handle: Handle,
        prompt: list[int],
        sampling: Sampling,
        defaults: Defaults,
        tokenizer: Any,
        *,
        spelling: Spelling | None,
        ends: Collection[int],
        most: int,
        image_tokens: tuple[int, int],
        computed_by: str,
        deadline: float | None,
        submitted: float,
    ) -> None:
        """
        Args:
            prompt: token ids.
            spelling: of the tokenizer; None: logprobs are not asked for.
            ends: ids that end an answer.
            image_tokens: tokens of media that the model is left with, and of the prompt.
            deadline: seconds from `submitted`, which is by `time.monotonic`.
        """
        self.handle, self.sampling, self.most = handle, sampling, most
        self.sampler = Sampler(sampling, defaults, prompt)
        self.computed_by, self.image_tokens = computed_by, image_tokens
        self.tokens: list[int] = []
        self.cached = 0
        self.reason: Reason | None = None
        self.seconds = Timings()
        self._ends, self._prompt = frozenset(ends), len(prompt)
        self._writer = Writer(tokenizer, ends, (*sampling.stop, *defaults.stop))
        self._submitted = submitted
        self._deadline = None if deadline is None else submitted + deadline
        self._begun: float | None = None
        self._pieces = 0
        self._spelling, self._listing = spelling, None if spelling is None else Listing()
        self._interruption: Exception | None = None

    def begin(self) -> None:
        """Its computation begins now."""
        self._begun = time.monotonic()
        self.seconds.queued = self._begun - self._submitted

    def overdue(self) -> Reason | None:
        """Why it is to end now, whatever is drawn; None: it may go on."""
        if self.handle.is_cancelled:
            return "cancelled"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "deadline"
        return None

    def interrupt(self, error: Exception) -> None:
        """Have the next token raise an error, in the thread that computes it."""
        self._interruption = error

    def weigh(self, logits: Tensor, token: int) -> None:
        """Remember how likely a token was by the (V,) logits it is drawn from, where that was asked for."""
        if self._spelling is None or self._listing is None or token in self._ends:
            return
        logprobs = logits.float().log_softmax(dim=-1)
        best = logprobs.topk(min(self.sampling.top_logprobs, len(logprobs)))
        told = torch.cat([logprobs[token][None], best.values]).tolist()
        ids = [token, *best.indices.tolist()]
        spelled = self._spelling.spelled(ids, self._writer.context)
        found = [
            TokenLogprob(each, readable(own), own, value) for each, own, value in zip(ids, spelled, told, strict=True)
        ]
        own = spelled[0] if self._spelling.is_written(token) else b""
        self._listing.add(replace(found[0], utf8=own, top=tuple(found[1:])))

    def take(self, token: int, looks: list[Look] | None = None) -> bool:
        """Take the next token and tell the reader; return whether the answer is over.

        Args:
            looks: where it looked.

        Raises:
            what it was interrupted by.
        """
        if self._interruption is not None:
            raise self._interruption
        if self.seconds.first_token is None:
            now = time.monotonic()
            self.seconds.first_token = now - self._submitted
            self.seconds.prefill = now - (self._begun or now)
        self.tokens.append(token)
        self.sampler.told(token)
        text = self._read(self._writer.write(token))
        if token in self._ends or self._writer.is_stopped:
            self.reason = "stop"
        elif len(self.tokens) >= self.most:
            self.reason = "length"
        else:
            self.reason = self.overdue()
        if self.reason is not None:
            text += self._read(self._writer.close())
            if self._writer.is_stopped:
                self.reason = "stop"
        self._tell(text, [token], None if looks is None else [looks])
        if self.reason is not None:
            self._end()
        return self.reason is not None

    def end(self, reason: Reason) -> None:
        """End it between two tokens."""
        self.reason = reason
        text = self._read(self._writer.close())
        if text:
            self._tell(text, [], None)
        self._end()

    def fail(self, error: BaseException) -> None:
        """End it by an error, which its reader is given."""
        self.reason = "cancelled"
        self.handle.put(error)

    def _read(self, text: str) -> str:
        """What the writer gave out, once it is known which tokens it read."""
        if self._listing is not None:
            self._listing.decoded(self._writer.decoded)
        return text

    def _tell(self, text: str, ids: list[int], attention: list[list[Look]] | None) -> None:
        listing = self._listing
        logprobs = None if listing is None else listing.told(text, is_over=self.reason is not None)
        self.handle.put(Delta(text, ids, logprobs, attention, self._pieces))
        self._pieces += 1

    def _end(self) -> None:
        assert self.reason is not None
        self.seconds.total = time.monotonic() - self._submitted
        usage = Usage(self._prompt, self.cached, len(self.tokens), *self.image_tokens)
        self.handle.put(Finished(self.reason, usage, self.computed_by, self.seconds))
