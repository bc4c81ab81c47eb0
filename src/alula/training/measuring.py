"""How a model is asked while it trains: in batches, by single forwards, and left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

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


def reshard(model: nn.Module) -> None:
    """Give sharded parameters back: after a forward without a backward some would stay whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
