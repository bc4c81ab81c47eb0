"""Samples through a model while probes look on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alula.data import Collator, Sample, open_source

BATCH = 64  # samples per forward, prompts per generate call


@torch.no_grad()
def look(model: Any, collator: Collator, samples: Sequence[Sample]) -> None:
    """Run samples, answers included, through a model."""
    device = next(model.parameters()).device
    for start in range(0, len(samples), BATCH):
        batch = collator(samples[start : start + BATCH])
        model(**{key: value.to(device) for key, value in batch.items() if key != "labels"}, use_cache=False)


def held_out(stream: str, count: int, seed: int, families: Sequence[str] | None = None) -> list[Sample]:
    """The first ``count`` samples of a microworld stream that no training saw."""
    spec: dict[str, Any] = {"microworld": stream, "split": "test", "seed": seed, "limit": count}
    source = open_source({**spec, **({"families": list(families)} if families else {})})
    return [source[index] for index in range(count)]
