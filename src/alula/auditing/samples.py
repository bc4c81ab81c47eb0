"""Which conversations an audit measures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alula.auditing.plan import Plan
from alula.data import BadSampleError, Collator, EmptyBatchError, Mixture, Sample, open_file, open_source
from alula.errors import DataError, UsageError
from alula.evaluation import Defaults

_LOOK_AT = 50
"""records looked at for each one wanted, before an endless source is given up"""


@dataclass(frozen=True)
class Chosen:
    """The conversations with images, by their index in a source: nothing of them is held.

    Attributes:
        source: samples by index.
        title: what the report calls it.
        indices: of those that hold an image, at most as many as the plan says.
        without_image, unusable: records passed over until then.
        digest: sha256 (hex) over the chosen samples' ids.
    """

    source: Any
    title: str
    indices: tuple[int, ...]
    without_image: int
    unusable: int
    digest: str

    def batches(self, collate: Collator, size: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """The batches with their numbers, made as they are asked for; None for one without a usable sample."""
        for number in range(self.count(size)):
            samples = [self.source[index] for index in self.indices[number * size : (number + 1) * size]]
            try:
                yield number, dict(collate(samples))
            except EmptyBatchError:
                yield number, None

    def count(self, size: int) -> int:
        """How many batches of ``size`` there are."""
        return -(-len(self.indices) // size)


def choose(plan: Plan, defaults: Defaults | None = None) -> Chosen:
    """Find the first conversations with images.

    Args:
        defaults: questions that come with the model, taken where the plan names no data.

    Raises:
        UsageError: the plan names no data, and none come with the model.
        DataError: the file cannot be read, or no usable record of it shows an image.
    """
    if plan.data is not None:
        source: Any = open_file(plan.data, images=plan.images)
        title, size = f"{plan.data.name}", source.size
    elif defaults is not None:
        title, specs = defaults.audited()
        parts = [open_source({**spec, "seed": plan.seed}) for spec in specs]
        source, size = Mixture(parts, seed=plan.seed), None
    else:
        raise UsageError(
            "say what to show the model: no conversations with images come with it",
            where="--data",
            remedy="--data FILE [--images FOLDER]: JSONL messages, LLaVA JSON or a saved dataset; or --sections text "
            "--text FILE",
        )
    indices: list[int] = []
    without = unusable = 0
    digest = hashlib.sha256()
    for index in range(_LOOK_AT * plan.samples if size is None else size):
        try:
            sample: Sample = source[index]
        except BadSampleError:
            unusable += 1
            continue
        if not sample.images:
            without += 1
            continue
        indices.append(index)
        digest.update(f"{sample.id}\n".encode())
        if len(indices) == plan.samples:
            break
    if not indices:
        raise DataError(
            f"no conversation shows an image ({without} without one, {unusable} unusable)",
            where=str(plan.data),
            remedy="an audit looks at what happens to image tokens: give conversations with images, or ask for "
            "--sections text alone",
        )
    return Chosen(source, title, tuple(indices), without, unusable, digest.hexdigest())
