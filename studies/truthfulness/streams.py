"""The control of the study is none unless both trainings read the same words: here that is asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from alula.data import Collator, Sample
from alula.data.samples import message_text
from alula.errors import EvaluationError
from alula.training.datasets import open_data
from alula.training.recipe import Recipe

TOKENS = 256
"""samples of a training that are compared token by token; all are compared word by word"""


def check_streams(visual: Recipe, words: Recipe, host: Path, tokens: int = TOKENS) -> int:
    """Make sure that two trainings read the same conversations in the same order, one of them without the pictures.

    Every sample of every step has the same id, turns and words; the first ``tokens`` of them also have the same token
    ids and labels once those of images are taken out of the visual training's.

    Args:
        host: whose processor renders them.

    Returns:
        the number of samples compared.

    Raises:
        EvaluationError: they differ; says in which sample and how, or that a picture is left, or missing.
    """
    (one,), (other,) = visual.stages, words.stages
    if (one.steps, one.batch_size) != (other.steps, other.batch_size):
        raise EvaluationError("the trainings see different numbers of samples", where=words.name)
    count = (one.steps or 0) * one.batch_size
    shown, told = (open_data(stage.data, seed=recipe.seed) for stage, recipe in ((one, visual), (other, words)))
    processor = AutoProcessor.from_pretrained(str(host))
    collate = Collator(processor)
    for position in range(count):
        first, second = shown[position], told[position]
        if first.id != second.id or _words(first) != _words(second):
            raise EvaluationError(
                f"sample {position} is {first.id!r} in one and {second.id!r} in the other", where=words.name
            )
        if second.media() or not first.media():
            raise EvaluationError(f"sample {position} ({first.id}) has a picture too many or too few", where=words.name)
        if position < tokens and _tokens(collate, first) != _tokens(collate, second):
            raise EvaluationError(
                f"sample {position} ({first.id}) has other tokens besides those of its image", where=words.name
            )
    return count


def _words(sample: Sample) -> list[tuple[str, str]]:
    return [(message["role"], message_text(message)) for message in sample.messages]


def _tokens(collate: Any, sample: Sample) -> list[tuple[int, int]]:
    """Ids and labels of a sample without those of images."""
    batch = collate([sample])
    kinds = batch["mm_token_type_ids"][0].tolist()
    pairs = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    return [pair for pair, kind in zip(pairs, kinds, strict=True) if kind == 0]
