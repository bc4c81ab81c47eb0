"""Held-out samples and the user's own evaluations, asked while a stage trains.

What is found stands in that step's row of ``metrics.jsonl``. Weights, data order and random states do not feel it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.data import open_source
from alula.data.samples import Sample
from alula.errors import DataError, UsageError
from alula.evaluation.references import last_answers, score_answers
from alula.grafts.browse.reading import prompt_ends
from alula.seam import scoring_inputs, text_logits
from alula.training.measuring import batches, measuring
from alula.training.metrics import MetricsWriter
from alula.training.processes import agreed
from alula.training.recipe import Validation

Figures = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of one's own, made while a stage trains.

    Attributes:
        name: under which its figures stand in ``evaluations`` of the rows.
        measure: given the model (in eval mode, without gradients) and its processor; returns a number, or numbers by
            name. Every process calls it alike, and the first one's figures count.
        every: steps between measurements; the last step is always measured.
    """

    name: str
    measure: Callable[[Any, Any], float | Mapping[str, float]]
    every: int = 200

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise UsageError(
                f"every is a whole number of at least 1, not {self.every!r}", where=f"evaluation {self.name!r}"
            )


class Validator:
    """Puts held-out samples to a model by one teacher-forced pass.

    Args:
        samples: with answers.
        collate: makes batches of them as the stage makes its own.
        stop: id of the token that ends an answer, if there is one.
        batch_size: samples per forward.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        collate: Callable[[Sequence[Sample]], Mapping[str, Any]],
        stop: int | None,
        *,
        batch_size: int,
    ) -> None:
        self.samples, self.collate, self.stop, self.batch_size = samples, collate, stop, batch_size

    def check(self) -> None:
        """Make every batch once, so that a bad sample is told before the first step.

        Raises:
            BadSampleError: a sample that cannot be read, or without an answer.
        """
        for start in range(0, len(self.samples), self.batch_size):
            self.collate(self.samples[start : start + self.batch_size])

    def measure(self, model: nn.Module) -> Figures:
        """``loss``: mean cross-entropy of all supervised tokens, nats per token; ``right``: share of the samples whose
        last answer greedy decoding would give, token for token; ``tokens``: how many supervised tokens there are."""
        right, total, count = 0, 0.0, 0
        with measuring(model) as device:
            for batch in batches(self.samples, self.collate, self.batch_size, device):
                labels = batch.pop("labels")
                ends = prompt_ends(batch["attention_mask"].bool(), labels)
                logits = model(**scoring_inputs(model, batch, ends), use_cache=False).logits
                _, loss, tokens = score_answers(logits, labels)
                hit, _, _ = score_answers(text_logits(model, logits), last_answers(labels, self.stop))
                right, total, count = right + int(hit.sum()), total + float(loss), count + int(tokens)
        return {"loss": total / count, "right": right / len(self.samples), "tokens": count}


class Evaluating(TrainerCallback):
    """Measures every so many steps and writes what is found into the metrics rows.

    Args:
        validator: of the recipe's `validation`, with its steps between measurements; None without.
        evaluations: the user's own.
        processor: for them.
        writer: whose rows take the figures in.
    """

    def __init__(
        self,
        validator: tuple[Validator, int] | None,
        evaluations: Sequence[Evaluation],
        processor: Any,
        writer: MetricsWriter,
    ) -> None:
        self.validator, self.evaluations, self.processor, self.writer = validator, evaluations, processor, writer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        step, model = state.global_step, kw["model"]
        begun, found = time.perf_counter(), dict[str, Any]()

        def due(every: int) -> bool:
            # a budget that is broken ends the stage before its last step
            return step % every == 0 or step == state.max_steps or control.should_training_stop

        if self.validator is not None and due(self.validator[1]):
            found["validation"] = agreed(self.validator[0].measure(model))
        own = {each.name: self._own(each, model) for each in self.evaluations if due(each.every)}
        if own:
            found["evaluations"] = own
        if found:
            self.writer.note(step, {**found, "evaluation_seconds": round(time.perf_counter() - begun, 3)})

    def _own(self, evaluation: Evaluation, model: nn.Module) -> Figures:
        with measuring(model):
            figures = evaluation.measure(model, self.processor)
        named = figures if isinstance(figures, Mapping) else {"value": figures}
        try:
            return agreed({str(name): float(value) for name, value in named.items()})
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"gave {type(figures).__name__} that holds no number ({error})",
                where=f"evaluation {evaluation.name!r}",
                remedy="return a number, or a mapping of names to numbers",
            ) from error


def check_names(evaluations: Sequence[Evaluation]) -> None:
    """Raise a UsageError where something is no evaluation, or two have one name."""
    for each in evaluations:
        if not isinstance(each, Evaluation):
            raise UsageError(
                f"{each!r} is no evaluation", where="evaluations", remedy="pass Evaluation(name, function, every=...)"
            )
    names = [each.name for each in evaluations]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two evaluations are called {twice!r}", where="evaluations")


def open_validation(spec: Validation) -> list[Sample]:
    """The held-out samples that ``spec`` names.

    Raises:
        DataError: a source that cannot be read or is empty, a record that is bad.
    """
    samples: list[Sample] = []
    for number, each in enumerate(spec.sources):
        key = f"validation.sources.{number}"
        source = open_source(each, key=key)
        count = spec.samples if source.size is None else min(spec.samples, source.size)
        if count == 0:
            raise DataError("the source is empty", where=key)
        samples += [source[index] for index in range(count)]
    return samples
