"""What is measured of a model in training: text skill by one forward pass, and two probes.

A greedy decoder gives a reference answer exactly when each of the answer's tokens, its end included, is the most likely
one after those before it. So one teacher-forced pass tells how many questions would be answered right, at a fraction of
what generating costs (answers that only scoring would forgive, such as another order of a list, count as wrong).

Every process measures the whole set: there is nothing to gather, and under sharding all run the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from alula.chat_template import TemplateSettings
from alula.data import Collator, open_source
from alula.data.samples import Sample
from alula.errors import DataError
from alula.evaluation.references import last_answers, score_answers
from alula.grafts.browse.reading import prompt_ends
from alula.probes import Alignment, AttentionShift
from alula.seam import scoring_inputs, text_logits
from alula.stats import Resampling
from alula.training.measuring import batches, measuring
from alula.training.recipe import Retention

_VALUES_ONLY = Resampling(resamples=1, permutations=1)
"""intervals and nulls cost more than the forward passes; what is logged are the values"""


class Measurement(BaseModel):
    """One measurement.

    Attributes:
        right: per text item, whether greedy decoding would give the reference answer.
        loss: mean cross-entropy of the reference answers, nats per token.
        probes: value by name; empty without probes.
        curves: share of attention on each segment, per layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    right: tuple[bool, ...]
    loss: float
    probes: dict[str, float | None] = {}
    curves: dict[str, tuple[float, ...]] = {}


@dataclass(frozen=True)
class ProbeSet:
    """The samples that retention is measured with.

    Attributes:
        text: questions of text alone, with answers.
        pictures: samples with images, which the probes look at; none without probes.
    """

    text: Sequence[Sample]
    pictures: Sequence[Sample]


class RetentionEvaluator:
    """Puts a probe set to a model, again and again.

    Args:
        samples: the probe set.
        processor: the host's.
        template: variables for its chat template beside the messages.
        context: tokens that the model was made for (`alula.hosts.context.context_length`).
        roles: whether the model asks whose turn a token belongs to.
        batch_size: samples per forward.

    Raises:
        DataError: while measuring, an item that does not fit into the context.
    """

    def __init__(
        self,
        samples: ProbeSet,
        processor: Any,
        template: TemplateSettings | None = None,
        context: int | None = None,
        *,
        roles: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.collate = Collator(processor, template=template, context=context, roles=roles)
        self.stop = self.collate.tokenizer.eos_token_id

    def measure(self, model: nn.Module) -> Measurement:
        """Measure ``model``; it, its train mode and the random state are left as they were."""
        with measuring(model) as device:
            right, loss = self._text(model, device)
            probes, curves = self._probes(model, device) if self.samples.pictures else ({}, {})
        return Measurement(right=right, loss=loss, probes=probes, curves=curves)

    def _text(self, model: nn.Module, device: torch.device) -> tuple[tuple[bool, ...], float]:
        right: list[bool] = []
        total, count = 0.0, 0
        for batch in batches(self.samples.text, self.collate, self.batch_size, device):
            labels = last_answers(batch.pop("labels"), self.stop)
            found, loss, tokens = score_answers(text_logits(model, model(**batch, use_cache=False).logits), labels)
            right += found.tolist()
            total, count = total + float(loss), count + int(tokens)
        return tuple(right), total / count

    def _probes(self, model: nn.Module, device: torch.device) -> tuple[dict[str, float | None], Any]:
        keep = len(self.samples.pictures) + 1
        shift, alignment = AttentionShift(keep=keep), Alignment(keep=keep)
        with shift.on(model), alignment.on(model):  # one pass serves both
            for batch in batches(self.samples.pictures, self.collate, self.batch_size, device):
                ends = prompt_ends(batch["attention_mask"].bool(), batch.pop("labels"))
                model(**scoring_inputs(model, batch, ends), use_cache=False)
        attention = shift.result(_VALUES_ONLY)
        pair = next(iter(alignment.result(_VALUES_ONLY).pairs.values()))
        values = {
            "attention_shift": attention.shift["main"].value,
            "alignment": pair.score.value if pair.score else math.nan,
            "alignment_contrast": pair.contrast_score.value if pair.contrast_score else math.nan,
        }
        curves = {segment: tuple(point.value for point in curve) for segment, curve in attention.curves["main"].items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}, curves


def open_probe_set(spec: Retention) -> ProbeSet:
    """The text items and the pictures (none without probes) that ``spec`` names.

    Raises:
        DataError: a source that cannot be read, text items that show something, image items without an image.
    """
    text = _first_samples(spec.text, spec.items, "retention.text", pictures=False)
    return ProbeSet(
        text, _first_samples(spec.pictures, spec.samples, "retention.pictures", pictures=True) if spec.probes else []
    )


def _first_samples(spec: Any, count: int, key: str, *, pictures: bool) -> list[Sample]:
    """The first ``count`` samples of a source (all of a shorter one).

    Raises:
        DataError: a sample with an image, video or audio where none belong, or no picture where one does.
    """
    source = open_source(spec, key=key)
    samples = [source[index] for index in range(count if source.size is None else min(count, source.size))]
    for sample in samples:
        if not sample.images if pictures else sample.media():
            message = "shows no picture, and attention can only shift around one" if pictures else "is not text alone"
            raise DataError(
                message,
                where=f"{key}: {sample.place or sample.id}",
                remedy="name a source of questions about pictures" if pictures else "name a source of text alone",
            )
    return samples


def attention_moved(curves: dict[str, tuple[float, ...]], start: dict[str, tuple[float, ...]]) -> float | None:
    """How much attention sits elsewhere than at the start: half the summed difference of shares, mean over layers.

    0: nothing moved; 1: all of it did (total variation distance).
    """
    if not curves or curves.keys() != start.keys():
        return None
    now, then = (np.array([found[segment] for segment in curves]) for found in (curves, start))  # (segments, layers)
    return float(np.abs(now - then).sum(axis=0).mean() / 2)
