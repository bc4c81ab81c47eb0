"""Measures text skill and probes every few steps of a stage, and holds the run to the recipe's budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.errors import RecipeError
from alula.training.layout import StageDirectory
from alula.training.metrics import MetricsWriter, Row
from alula.training.parts import Named, gather_trained, load_trained
from alula.training.processes import agreed, from_first
from alula.training.recipe import Retention
from alula.training.retention.measurement import Measurement, RetentionEvaluator, attention_moved
from alula.training.retention.storage import (
    Stopped,
    load_within_budget,
    read_start,
    save_within_budget,
    write_start,
)


class RetentionMonitor(TrainerCallback):
    """Measures every n steps, writes what it finds into the metrics rows, and acts on the budget.

    What it finds is compared with the beginning: text with the model the run started from, probes with this stage's
    own start. Both are kept in ``retention.json`` of their stage, so a resumed run measures nothing twice.

    Args:
        spec: the recipe's section.
        evaluator: what measures.
        stage: its name, for messages.
        paths: of this stage.
        origin: of the run's first stage.
        parts: the trained parameters, of which ``action: rewind`` keeps a copy.
        writer: whose rows take the findings in.
        rows: this stage's rows of earlier sessions.
        notify: prints a message for the person.
    """

    def __init__(
        self,
        spec: Retention,
        evaluator: RetentionEvaluator,
        *,
        stage: str,
        paths: StageDirectory,
        origin: StageDirectory,
        parts: Mapping[str, Named],
        writer: MetricsWriter,
        rows: Sequence[Row],
        notify: Callable[[str], None],
    ) -> None:
        self.spec, self.evaluator, self.stage, self.writer = spec, evaluator, stage, writer
        self.paths, self.origin, self.parts, self.notify = paths, origin, parts, notify
        self.start: Measurement | None = None
        self.base: Measurement | None = None
        self.stopped: Stopped | None = None
        self.below = _below(rows, spec.min)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        begun = time.perf_counter()
        self.start = from_first(lambda: read_start(self.paths))
        if self.start is None:
            self.start = agreed(self.evaluator.measure(kw["model"]))
            self._keep(kw["model"], state.global_step)
            if PartialState().is_main_process:
                write_start(self.paths, self.start)
            self.notify(
                f"stage {self.stage}: measuring text retention and probes, {time.perf_counter() - begun:.1f} s a time"
            )
        self.base = self.start
        if self.origin != self.paths:
            self.base = from_first(lambda: read_start(self.origin)) or self.start
        if self.spec.measure == "exact" and not any(self.base.right):
            raise RecipeError(
                "the model the run starts from answers none of the text items, so there is nothing to retain",
                where="retention.text",
                remedy="name questions it can answer, or set retention.measure=likelihood",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> TrainerControl:
        step = state.global_step
        if step % self.spec.every and step != state.max_steps:
            return control
        begun = time.perf_counter()
        measurement = agreed(self.evaluator.measure(kw["model"]))
        found = self._findings(measurement)
        self.writer.note(step, {**found, "retention_seconds": round(time.perf_counter() - begun, 3)})
        retained = found["retention"]
        if retained["value"] >= self.spec.min:
            self.below = 0
            self._keep(kw["model"], step)
            return control
        self.below += 1
        stop = Stopped(
            step, step, retained["value"], self.spec.min, retained["lost"], retained["gained"], len(measurement.right)
        )
        if self.spec.action == "warn" or self.below < self.spec.patience:
            self.notify(f"warning: {stop.message(self.stage)}")
            return control
        self.stopped = self._stop(kw["model"], stop)
        control.should_training_stop = True
        control.should_save = False  # a run killed now is to come to this decision again, not to go on after it
        return control

    def _findings(self, measurement: Measurement) -> dict[str, Any]:
        assert self.start is not None
        assert self.base is not None
        pairs = list(zip(self.base.right, measurement.right, strict=True))
        if self.spec.measure == "exact":
            value = sum(measurement.right) / sum(self.base.right)
        else:
            value = math.exp(min(self.base.loss - measurement.loss, 50.0))
        found: dict[str, Any] = {
            "retention": {
                "value": value,
                "right": sum(measurement.right),
                "lost": sum(before and not after for before, after in pairs),
                "gained": sum(after and not before for before, after in pairs),
                "loss": measurement.loss,
                "loss_before": self.base.loss,
            }
        }
        if measurement.probes:
            found["probes"] = {
                **measurement.probes,
                "attention_moved": attention_moved(measurement.curves, self.start.curves),
            }
        return found

    def _keep(self, model: nn.Module, step: int) -> None:
        """Remember the weights within budget, where the recipe wants to go back to them."""
        if self.spec.action == "rewind":
            trained = gather_trained(model, self.parts)  # on every process
            if PartialState().is_main_process:
                save_within_budget(self.paths, trained, step)

    def _stop(self, model: nn.Module, stop: Stopped) -> Stopped:
        if self.spec.action != "rewind":
            return stop
        PartialState().wait_for_everyone()
        kept, step = load_within_budget(self.paths)
        load_trained(model, self.parts, kept)
        return replace(stop, kept_step=step)


def _below(rows: Sequence[Row], least: float) -> int:
    """How many measurements in a row, the last ones, were below the budget."""
    values = [row["retention"]["value"] for row in rows if "retention" in row]
    return next((n for n, value in enumerate(reversed(values)) if value >= least), len(values))
