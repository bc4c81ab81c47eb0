"""What retention keeps in a stage directory: the measurement at its start, the weights within budget, the record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alula.files import atomic_file, write_text
from alula.training.layout import StageDirectory
from alula.training.metrics import Row
from alula.training.retention.measurement import Measurement

logger = logging.getLogger(__name__)


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

    def message(self, stage: str) -> str:
        """The record as a sentence."""
        kept = "" if self.kept_step == self.step else f"; the weights kept are those of step {self.kept_step}"
        return (
            f"text retention was {self.value:.4g} at step {self.step} of stage {stage}, below {self.min:g} "
            f"({self.lost} of {self.of} items lost, {self.gained} gained){kept}"
        )


def retention_record(rows: Sequence[Row], stopped: Stopped | None) -> dict[str, Any]:
    """What was measured and what it cost, for the stage's record: from its metrics rows."""
    measured = [row for row in rows if "retention" in row]
    values = [row["retention"]["value"] for row in measured]
    return {
        "last": values[-1] if values else None,  # a caller's callback may end a stage before anything is measured
        "lowest": min(values, default=None),
        "measurements": len(values),
        "seconds": round(sum(row["retention_seconds"] for row in measured), 3),
        "stopped": None if stopped is None else asdict(stopped),
    }


def read_start(stage: StageDirectory) -> Measurement | None:
    """What was measured at the start of a stage, None if nothing was; an earlier version's file is read, too."""
    path = stage.retention
    if not path.is_file():
        if not stage.earlier_retention.is_file():
            return None
        path = stage.earlier_retention
        logger.warning("%s: read, an earlier version's name of %s", path, stage.retention.name)
    return Measurement.model_validate_json(path.read_bytes())


def write_start(stage: StageDirectory, measurement: Measurement) -> None:
    """Keep what was measured at the start of a stage."""
    write_text(stage.retention, measurement.model_dump_json() + "\n")


def save_within_budget(stage: StageDirectory, tensors: Mapping[str, Tensor], step: int) -> None:
    """Keep the trained weights of ``step``, in place of an earlier step's."""
    with atomic_file(stage.within_budget) as partial:
        save_file(dict(tensors), partial, {"step": str(step)})


def load_within_budget(stage: StageDirectory) -> tuple[dict[str, Tensor], int]:
    """The trained weights last kept, and their step."""
    path = stage.within_budget
    with safe_open(path, framework="pt") as opened:
        step = int((opened.metadata() or {})["step"])
    return load_file(path), step
