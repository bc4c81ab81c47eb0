"""`metrics.jsonl`: one row per logged optimizer step, the same rows however often the run was killed.

A row is about its own step alone, never an average since the last row, so it does not depend on where a run was
resumed: `stage`, `step` (from 1), `loss` (mean over the step's supervised tokens), `grad_norm` (before clipping), `lr`
per part (the one the step used), and running totals of the stage: `tokens` (non-padding inputs), `samples`, `seconds`
(training wall clock, interruptions not counted). Of a method with auxiliary losses `loss` is the sum, and `losses` has
each by name (mean over the step's samples, before its weight). With `retention` in the recipe, measured steps always
have a row, with what `retention` found. A figure that is NaN or infinite is null, and `not_finite` names it with what
it was; the log warns of it. Resuming from step n drops the rows after n and a torn last line.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.errors import AlulaError
from alula.files import append_text, regular, write_text
from alula.training.optimizer import current_rates

_log = logging.getLogger(__name__)

Row = dict[str, Any]
_CURRENT_KEYS = {"watch_seconds": "retention_seconds"}
"""keys in rows of earlier versions, and today's"""


def read_rows(path: Path, stage: str | None = None) -> list[Row]:
    """The complete rows of a metrics file under today's keys; a torn last line (killed while writing) is left out.

    Args:
        stage: the one whose rows are wanted; None: all.
    """
    rows: list[Row] = []
    for line in regular(path).read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows.append({_CURRENT_KEYS.get(key, key): value for key, value in row.items()})
    return [row for row in rows if stage is None or row["stage"] == stage]


def rewind(path: Path, stage: str, step: int) -> None:
    """Drop ``stage``'s rows after ``step`` from the file."""
    kept = [row for row in read_rows(path) if row["stage"] != stage or row["step"] <= step]
    write_text(path, "".join(_line(row) for row in kept))


class MetricsWriter(TrainerCallback):
    """Appends the rows of one stage, on the first process.

    Args:
        path: the run's metrics file.
        stage: its name.
        batch_size: samples per step.
        every: steps between rows that are written.
        last: the stage's last row of an earlier session, if there is one.
        on_row: takes every row, written or not (the progress display).

    Raises:
        AlulaError: the loss is no longer a number; training on would only write garbage into the weights.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        *,
        batch_size: int,
        every: int,
        last: Row | None,
        on_row: Callable[[Row], None] | None = None,
    ) -> None:
        self.path, self.stage, self.batch_size, self.every, self.on_row = path, stage, batch_size, every, on_row
        self._writes = PartialState().is_main_process
        self._seconds_before = float(last["seconds"]) if last else 0.0
        self._started = time.perf_counter()
        self._rates: dict[str, float] = {}
        self._notes: dict[int, Row] = {}

    def note(self, step: int, found: Row) -> None:
        """Put ``found`` into the row of ``step``, which is then written whatever `every` says."""
        self._notes.setdefault(step, {}).update(found)

    def noted(self, step: int) -> Row:
        """What was put into the row of ``step``, which is not yet written; with the learning rates of its parts."""
        return {"lr": self._rates, **self._notes.get(step, {})}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        optimizer: torch.optim.Optimizer = kw["optimizer"]
        self._rates = current_rates(optimizer)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kw: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return  # the Trainer's closing summary
        step, loss = state.global_step, float(logs["loss"])
        if not math.isfinite(loss):
            raise AlulaError(
                f"the loss is {loss} at step {step}",
                where=f"stage {self.stage}",
                remedy="lower the learning rates of this stage, lengthen its warmup, or use precision fp32",
            )
        row: Row = {
            "stage": self.stage,
            "step": step,
            "loss": loss,
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "lr": self._rates,
            "tokens": int(state.num_input_tokens_seen),
            "samples": step * self.batch_size,
            "seconds": round(self._seconds_before + time.perf_counter() - self._started, 3),
        }
        if "losses" in logs:
            row["losses"] = logs["losses"]
        found = self._notes.pop(step, None)
        row |= found or {}
        if strange := [f"{name} is {number}" for name, number in _not_finite(row)]:
            _log.warning("stage %s, step %d: %s", self.stage, step, "; ".join(strange))
            row["not_finite"] = strange
        if self.on_row is not None:
            self.on_row(row)
        if self._writes and (step % self.every == 0 or step == state.max_steps or found):
            append_text(self.path, _line(row))


def _not_finite(row: Row, above: str = "") -> Iterator[tuple[str, float]]:
    """Figures of a row that are NaN or infinite: the path of their keys, the value."""
    for name, value in row.items():
        path = f"{above}.{name}" if above else name
        if isinstance(value, dict):
            yield from _not_finite(value, path)
        elif isinstance(value, float) and not math.isfinite(value):
            yield path, value


def _line(row: Row) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: null stands in their place, and ``not_finite`` says what they were."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
