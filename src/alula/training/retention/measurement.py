"""What is measured of a model in training: text skill by one forward pass, and two probes.

A greedy decoder gives a reference answer exactly when each of the answer's tokens, its end included, is the most likely
one after those before it. So one teacher-forced pass tells how many questions would be answered right, at a fraction of
what generating costs (answers that only scoring would forgive, such as another order of a list, count as wrong).

Every process measures the whole set: there is nothing to gather, and under sharding all run the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from alula.chat_template import TemplateSettings
from alula.data import Collator, open_source
from alula.data.samples import Sample
from alula.errors import DataError
from alula.grafts.browse.reading import prompt_ends
from alula.probes import Alignment, AttentionShift
from alula.seam import evaluating, scoring_inputs, text_logits
from alula.stats import Resampling
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
        device = next(model.parameters()).device
        cuda = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), evaluating(model):
            try:
                right, loss = self._text(model, device)
                probes, curves = self._probes(model, device) if self.samples.pictures else ({}, {})
            finally:
                reshard(model)
        return Measurement(right=right, loss=loss, probes=probes, curves=curves)

    def _batches(self, samples: Sequence[Sample], device: torch.device) -> Iterator[dict[str, Any]]:
        for start in range(0, len(samples), self.batch_size):
            batch = self.collate(samples[start : start + self.batch_size])
            yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _text(self, model: nn.Module, device: torch.device) -> tuple[tuple[bool, ...], float]:
        right: list[bool] = []
        total, count = 0.0, 0
        for batch in self._batches(self.samples.text, device):
            labels = last_answers(batch.pop("labels"), self.stop)
            found, loss, tokens = score_answers(text_logits(model, model(**batch, use_cache=False).logits), labels)
            right += found.tolist()
            total, count = total + float(loss), count + int(tokens)
        return tuple(right), total / count

    def _probes(self, model: nn.Module, device: torch.device) -> tuple[dict[str, float | None], Any]:
        keep = len(self.samples.pictures) + 1
        shift, alignment = AttentionShift(keep=keep), Alignment(keep=keep)
        with shift.on(model), alignment.on(model):  # one pass serves both
            for batch in self._batches(self.samples.pictures, device):
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


def attention_moved(curves: dict[str, tuple[float, ...]], start: dict[str, tuple[float, ...]]) -> float | None:
    """How much attention sits elsewhere than at the start: half the summed difference of shares, mean over layers.

    0: nothing moved; 1: all of it did (total variation distance).
    """
    if not curves or curves.keys() != start.keys():
        return None
    now, then = (np.array([found[segment] for segment in curves]) for found in (curves, start))  # (segments, layers)
    return float(np.abs(now - then).sum(axis=0).mean() / 2)


def reshard(model: nn.Module) -> None:
    """Give sharded parameters back: after a forward without a backward some would stay whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
