"""The divergence of a model from the soft labels of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alula.data.soft_labels import CANDIDATES, LOGPROBS, POSITIONS, WEIGHTS
from alula.training.losses import Loss


def distillation(share: float, weight: float) -> Loss:
    """The loss of a stage with `distill`: KL(teacher || model) in nats, a mean over tokens and over held answers.

    Args:
        share: of the samples that hold an answer, on average.
        weight: of the loss.
    """

    def per_held_answer(outputs: Any, batch: Mapping[str, Any], context: object) -> Tensor:
        return divergence(outputs.logits, batch) / share

    return Loss(per_held_answer, weight, observes=False)


def divergence(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """KL(teacher || model) of a batch in nats, float32: a mean over the tokens of each answer, summed over answers.

    The teacher's distribution is over its K candidates and "any other token", and so is the model's. Of two
    distributions that is the least their divergence over the whole vocabulary can be, and all of it where the
    candidates are the vocabulary or have all of the probability.

    Args:
        logits: (B, L, V).
        batch: with what `alula.data.soft_labels.joined` gives; without, the divergence is 0.
    """
    if POSITIONS not in batch:
        return logits.new_zeros((), dtype=torch.float32)
    asked = logits.flatten(0, 1)[batch[POSITIONS]].float()  # (N, V)
    candidates, told, total = batch[CANDIDATES], batch[LOGPROBS], asked.logsumexp(dim=-1)
    each = (told.exp() * (told - asked.gather(-1, candidates) + total[:, None])).sum(dim=-1)
    if candidates.shape[-1] < asked.shape[-1]:
        rest = (1 - told.exp().sum(dim=-1)).clamp(min=0)
        others = asked.scatter(-1, candidates, -torch.inf).logsumexp(dim=-1) - total
        each = each + torch.xlogy(rest, rest) - rest * others
    return (each * batch[WEIGHTS]).sum()
