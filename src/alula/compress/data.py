"""Calibration data out of a mixture of sources, such as a recipe's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alula.data import Mixture
from alula.data.collate import Collator
from alula.errors import UsageError


class MixtureBatches:
    """The first samples of a mixture as model inputs, made anew each time they are gone through.

        data = stage.data  # of a recipe
        mixture = alula.data.open_mixture(MixtureSpec(sources=[*data.sources], text_replay=data.text_replay, seed=0))
        batches = MixtureBatches(mixture, Collator(processor, labels=False))

    Args:
        mixture: samples by position.
        collate: makes batches of them; with ``roles=True`` where tokens are chosen by role.
        samples: how many.
        batch_size: how many at once.

    Raises:
        UsageError: no samples, or none in a batch.
    """

    def __init__(self, mixture: Mixture, collate: Collator, *, samples: int = 128, batch_size: int = 4) -> None:
        if samples < 1 or batch_size < 1:
            raise UsageError(f"samples and batch_size must be at least 1, not {samples} and {batch_size}")
        self.mixture, self.collate, self.samples, self.batch_size = mixture, collate, samples, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.samples, self.batch_size):
            positions = range(start, min(start + self.batch_size, self.samples))
            yield dict(self.collate([self.mixture[position] for position in positions]))
