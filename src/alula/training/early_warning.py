"""Watching text skill and probes while a stage trains, and holding the run to a retention budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.errors import RecipeError
from alula.files import atomic_file, write_text
from alula.training.layout import StageDirectory
from alula.training.meters import Meters, Reading, moved
from alula.training.metrics import MetricsWriter, Row
from alula.training.recipe import Retention
from alula.training.trainer import StageTrainer, load_trained


@dataclass(frozen=True)
class Stopped:
    """Why a stage ended before its last step; the record a stopped run leaves.

    Attributes:
        step: when the budget was found broken.
        kept_step: whose weights the output holds: the same, or the last step within budget.
        value, min: text retention then, and the budget.
        lost, gained, of: text items lost and gained since the run began, of how many.
    """

    step: int
    kept_step: int
    value: float
    min: float
    lost: int
    gained: int
    of: int

    def told(self, stage: str) -> str:
        """The record as a sentence."""
        kept = "" if self.kept_step == self.step else f"; the weights kept are those of step {self.kept_step}"
        return (
            f"text retention was {self.value:.4g} at step {self.step} of stage {stage}, below {self.min:g} "
            f"({self.lost} of {self.of} items lost, {self.gained} gained){kept}"
        )


class EarlyWarning(TrainerCallback):
    """Measures every n steps, writes what it finds into the metrics rows, and acts on the budget.

    What it finds is compared with the beginning: text with the model the run started from, probes with this stage's
    own start. Both are kept in ``watch.json`` of their stage, so a resumed run measures nothing twice.

    Args:
        spec: the recipe's section.
        meters: what measures.
        stage: its name, for messages.
        paths: of this stage.
        origin: of the run's first stage.
        writer: whose rows take the findings in.
        rows: this stage's rows of earlier sessions.
        main: whether this process writes files.
        say: tells the person something.
    """

    def __init__(
        self,
        spec: Retention,
        meters: Meters,
        *,
        stage: str,
        paths: StageDirectory,
        origin: StageDirectory,
        writer: MetricsWriter,
        rows: Sequence[Row],
        main: bool,
        say: Callable[[str], None],
    ) -> None:
        self.spec, self.meters, self.stage, self.writer = spec, meters, stage, writer
        self.paths, self.origin, self.main, self.say = paths, origin, main, say
        self.trainer: StageTrainer | None = None
        self.start: Reading | None = None
        self.base: Reading | None = None
        self.stopped: Stopped | None = None
        self.below = _below(rows, spec.min)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        begun = time.perf_counter()
        self.start = self._agreed(_read(self.paths.watch) if self.main else None)
        if self.start is None:
            self.start = self._agreed(self.meters.read(kw["model"]))
            self._keep(state.global_step)
            if self.main:
                write_text(self.paths.watch, self.start.model_dump_json() + "\n")
            self.say(f"stage {self.stage}: watching text and probes, {time.perf_counter() - begun:.1f} s a time")
        self.base = self.start
        if self.origin != self.paths:
            self.base = self._agreed(_read(self.origin.watch) if self.main else None) or self.start
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
        reading = self._agreed(self.meters.read(kw["model"]))
        found = self._findings(reading)
        self.writer.note(step, {**found, "watch_seconds": round(time.perf_counter() - begun, 3)})
        retained = found["retention"]
        if retained["value"] >= self.spec.min:
            self.below = 0
            self._keep(step)
            return control
        self.below += 1
        stop = Stopped(
            step, step, retained["value"], self.spec.min, retained["lost"], retained["gained"], len(reading.right)
        )
        if self.spec.action == "warn" or self.below < self.spec.patience:
            self.say(f"warning: {stop.told(self.stage)}")
            return control
        self.stopped = self._stop(stop)
        control.should_training_stop = True
        control.should_save = False  # a run killed now is to come to this decision again, not to go on after it
        return control

    def _findings(self, reading: Reading) -> dict[str, Any]:
        assert self.start is not None
        assert self.base is not None
        pairs = list(zip(self.base.right, reading.right, strict=True))
        if self.spec.measure == "exact":
            value = sum(reading.right) / sum(self.base.right)
        else:
            value = math.exp(min(self.base.loss - reading.loss, 50.0))
        found: dict[str, Any] = {
            "retention": {
                "value": value,
                "right": sum(reading.right),
                "lost": sum(before and not after for before, after in pairs),
                "gained": sum(after and not before for before, after in pairs),
                "loss": reading.loss,
                "loss_before": self.base.loss,
            }
        }
        if reading.probes:
            found["probes"] = {**reading.probes, "attention_moved": moved(reading.curves, self.start.curves)}
        return found

    def _keep(self, step: int) -> None:
        """Remember the weights within budget, where the recipe wants to go back to them."""
        if self.spec.action == "rewind":
            assert self.trainer is not None
            trained = self.trainer.gather_trained()  # on every process
            if self.main:
                _save(self.paths.within_budget, trained, step)

    def _stop(self, stop: Stopped) -> Stopped:
        if self.spec.action != "rewind":
            return stop
        assert self.trainer is not None
        self.trainer.accelerator.wait_for_everyone()
        kept, step = _load(self.paths.within_budget)
        load_trained(self.trainer.own_model, self.trainer.parts, kept)
        return Stopped(**{**asdict(stop), "kept_step": step})

    @staticmethod
    def _agreed(reading: Reading | None) -> Any:
        """The first process's reading: rounding may differ between devices, decisions must not."""
        return broadcast_object_list([reading], from_process=0)[0]


def _read(path: Path) -> Reading | None:
    return Reading.model_validate_json(path.read_bytes()) if path.is_file() else None


def _below(rows: Sequence[Row], least: float) -> int:
    """How many measurements in a row, the last ones, were below the budget."""
    values = [row["retention"]["value"] for row in rows if "retention" in row]
    return next((n for n, value in enumerate(reversed(values)) if value >= least), len(values))


def _save(path: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    with atomic_file(path) as partial:
        save_file(dict(tensors), partial, {"step": str(step)})


def _load(path: Path) -> tuple[dict[str, Tensor], int]:
    with safe_open(path, framework="pt") as opened:
        step = int((opened.metadata() or {})["step"])
    return load_file(path), step
