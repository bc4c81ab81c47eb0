"""How far a tuned model has gone from its base on the new task: KL(base || tuned), which is said to predict forgetting
("RL's Razor", arXiv 2509.04259).

T answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alula.data import Collator, Sample
from alula.hosts.stops import stop_ids
from alula.seam import evaluating, needs_roles
from studies.passes import BATCH


@torch.no_grad()
def divergences(base: Any, tuned: Any, processor: Any, samples: Sequence[Sample]) -> list[float]:
    """Per sample the mean over its answer's tokens, the one that ends it included, of KL(base || tuned), in nats.

    Both models are given the reference answers, so each distribution is of the token that comes next in them.

    Args:
        base: the model the other was tuned from.
        processor: of both.
        samples: with answers.
    """
    found: list[float] = []
    with evaluating(base), evaluating(tuned):
        batches = (_next_tokens(model, processor, samples) for model in (base, tuned))
        for before, after in zip(*batches, strict=True):
            for p, q in zip(before, after, strict=True):
                found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def _next_tokens(model: Any, processor: Any, samples: Sequence[Sample]) -> Iterator[list[Tensor]]:
    """Batch by batch, per sample the (T, V) log probabilities in float64 at its answer's tokens."""
    collator = Collator(
        processor, roles=needs_roles(model), stops=stop_ids(model, getattr(processor, "tokenizer", processor))
    )
    device = next(model.parameters()).device
    for start in range(0, len(samples), BATCH):
        batch = {key: value.to(device) for key, value in collator(samples[start : start + BATCH]).items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        asked = labels[:, 1:] >= 0
        yield [row[mask].double().log_softmax(-1) for row, mask in zip(logits[:, :-1], asked, strict=True)]
