"""Somebody on a host who ends every answer at once, to see that whoever generates lets what is attached take part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from alula.seam import Owner, install


class End(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


class Silence(Owner):
    def __init__(self, token: int) -> None:
        self.token = token

    def logits_processors(self, inputs: Mapping[str, Any]) -> Sequence[LogitsProcessor]:
        return [End(self.token)]


@contextmanager
def silenced(model: Any, token: int) -> Iterator[None]:
    """`model` with nothing to say but `token`, which ends an answer."""
    seam = install(model, "silence", Silence(token))
    try:
        yield
    finally:
        seam.release("silence")
