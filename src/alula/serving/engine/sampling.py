"""Drawing the next tokens of many answers at once, each by its own settings and its own random numbers.

Shapes: B answers, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alula.serving.engine.request import Sampling


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint's generation settings say of drawing tokens, and of texts that end answers."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Defaults:
        """Of a `GenerationConfig`; what only sampling reads also where it does not sample, for requests that do."""

        def number(name: str, neutral: float) -> float:
            value = getattr(config, name, None)
            return neutral if value is None else value

        stop = getattr(config, "stop_strings", None) or ()
        return cls(
            temperature=number("temperature", 1.0) if getattr(config, "do_sample", None) else 0.0,
            top_p=number("top_p", 1.0),
            top_k=int(number("top_k", 0)),
            min_p=number("min_p", 0.0),
            repetition_penalty=number("repetition_penalty", 1.0),
            suppressed=tuple(getattr(config, "suppress_tokens", None) or ()),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: the request's settings.
        defaults: the checkpoint's.
        prompt: token ids.
    """

    def __init__(self, sampling: Sampling, defaults: Defaults, prompt: Sequence[int]) -> None:
        def chosen(name: str) -> Any:
            value = getattr(sampling, name)
            return getattr(defaults, name) if value is None else value

        self.temperature: float = chosen("temperature")
        self.top_p: float = chosen("top_p")
        self.top_k: int = chosen("top_k")
        self.min_p = defaults.min_p
        self.repetition: float = chosen("repetition_penalty")
        self.frequency, self.presence = sampling.frequency_penalty, sampling.presence_penalty
        self.suppressed = defaults.suppressed
        self._prompt = prompt
        self._generator = torch.Generator()
        self._generator.seed() if sampling.seed is None else self._generator.manual_seed(sampling.seed)
        self._share: Tensor | None = None  # the random number of the next token, whatever becomes of the first try
        self._seen: Tensor | None = None  # (V,) bool: it stands in prompt or answer
        self._counts: Tensor | None = None  # (V,) how often it stands in the answer

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token by the model's own logits is taken."""
        return self.is_greedy and self.repetition == 1 and not self.frequency and not self.presence

    def told(self, token: int) -> None:
        """Know of a token of the answer."""
        self._share = None
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def draw(self, logits: Tensor) -> Tensor:
        """The next token as a tensor without axes, from (V,) float32 logits; the host waits for nothing."""
        scores = self._punished(logits)
        if self.is_greedy:
            return scores.argmax()
        values, ids = (scores / self.temperature).sort(descending=True)
        if self.top_k:
            values, ids = values[: self.top_k], ids[: self.top_k]
        shares = values.softmax(dim=0)
        if self.top_p < 1:
            shares = shares.masked_fill(shares.cumsum(dim=0) - shares >= self.top_p, 0)
        if self.min_p:
            shares = shares.masked_fill(shares < self.min_p * shares[0], 0)
        reached = shares.double().cumsum(dim=0)
        if self._share is None:
            self._share = torch.rand((), generator=self._generator, dtype=torch.float64)
        place = self._share.to(reached.device) * reached[-1]
        # behind the last with a share stands none, whatever rounding makes of it
        index = torch.searchsorted(reached, place, right=True).clamp(max=(shares > 0).sum() - 1)
        return ids[index]

    def _punished(self, logits: Tensor) -> Tensor:
        scores = logits
        if self.repetition != 1:
            if self._seen is None:
                self._seen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
                self._seen[torch.tensor(list(self._prompt), device=logits.device)] = True
            punished = torch.where(scores > 0, scores / self.repetition, scores * self.repetition)
            scores = torch.where(self._seen, punished, scores)
        if self.frequency or self.presence:
            if self._counts is None:
                self._counts = torch.zeros(len(logits), device=logits.device)
            scores = scores - self.frequency * self._counts - self.presence * (self._counts > 0)
        return scores


def draw(samplers: Sequence[Sampler], logits: Tensor) -> tuple[Tensor, list[int]]:
    """The next token of each of B answers from (B, V) logits, on the device and here, which is waited for once."""
    logits = logits.float()
    for suppressed in {sampler.suppressed for sampler in samplers if sampler.suppressed}:
        barred = _barred(suppressed, logits.shape[-1], logits.device)
        if any(sampler.suppressed != suppressed for sampler in samplers):
            those = torch.tensor([sampler.suppressed == suppressed for sampler in samplers]).to(logits.device)
            barred = barred & those[:, None]
        logits = logits.masked_fill(barred, -torch.inf)
    tokens = logits.argmax(dim=-1)
    if not all(sampler.is_plain for sampler in samplers):
        pairs = zip(samplers, logits, tokens, strict=True)
        tokens = torch.stack([token if each.is_plain else each.draw(row) for each, row, token in pairs])
    return tokens, tokens.tolist()


@functools.lru_cache(maxsize=16)
def _barred(suppressed: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """(V,) bool of the tokens that are never drawn."""
    barred = torch.zeros(size, dtype=torch.bool)
    barred[list(suppressed)] = True
    return barred.to(device)
