"""How a model is asked while it trains: in batches, by single forwards, and left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from alula.data import BadSampleError
from alula.data.samples import Sample
from alula.errors import DataError
from alula.seam import evaluating


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[torch.device]:
    """Inside the block no gradient is kept; the model's train mode and the random state are afterwards what they
    were. Yields the model's device."""
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), evaluating(model):
        try:
            yield device
        finally:
            reshard(model)


def batches(
    samples: Sequence[Sample],
    collate: Callable[[Sequence[Sample]], Mapping[str, Any]],
    size: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """The samples, ``size`` at a time, on the device.

    Raises:
        DataError: a bad sample; no BadSampleError, which a stage steps over where it is one to learn from.
    """
    for start in range(0, len(samples), size):
        try:
            batch = collate(samples[start : start + size])
        except BadSampleError as error:
            raise DataError(error.message, where=error.where_named, remedy=error.remedy or "mend it") from error
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def last_answers(labels: Tensor, stop: int | None) -> Tensor:
    """Keep of labels (B, S) the last stretch that is supervised in each row, up to its stop token; -100 elsewhere."""
    kept = torch.full_like(labels, -100)
    for row, (given, out) in enumerate(zip(labels, kept, strict=True)):
        places = (given != -100).nonzero().flatten()
        assert len(places), f"row {row} has no answer"  # the collator refuses samples without one
        breaks = (places.diff() > 1).nonzero().flatten()
        places = places[int(breaks[-1]) + 1 :] if len(breaks) else places
        ends = (given[places] == stop).nonzero().flatten() if stop is not None else []
        if len(ends):  # some templates have the assistant say a line break after its end
            places = places[: int(ends[0]) + 1]
        out[places] = given[places]
    return kept


def score_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per row whether every labelled token is the most likely one (B,), the summed loss, and their number.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where nothing is asked.
    """
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    asked = shifted != -100
    scores, wanted = logits[asked].float(), shifted[asked]
    hit = torch.ones_like(asked)
    hit[asked] = scores.argmax(dim=-1) == wanted
    return hit.all(dim=1), F.cross_entropy(scores, wanted, reduction="sum"), asked.sum()


def reshard(model: nn.Module) -> None:
    """Give sharded parameters back: after a forward without a backward some would stay whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
