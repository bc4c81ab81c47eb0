"""Rows of a run in the trackers people have: TensorBoard, Trackio, Weights & Biases, by transformers' own callbacks.

Accounts, keys and addresses are those libraries' own business, and so are their environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from alula.errors import RecipeError

_AVAILABLE = {
    "tensorboard": integration_utils.is_tensorboard_available,
    "trackio": integration_utils.is_trackio_available,
    "wandb": integration_utils.is_wandb_available,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise a RecipeError where a tracker's package is not there."""
    for name in names:
        if not _AVAILABLE[name]():
            raise RecipeError(f"{name} is not installed", where="report_to", remedy=f"pip install {name}")


def trackers(names: Sequence[str], directory: Path, *, done: int) -> list[TrainerCallback]:
    """Callbacks that send what the Trainer logs to the named trackers.

    Args:
        directory: for TensorBoard's files, where TENSORBOARD_LOGGING_DIR does not name one.
        done: steps of earlier sessions; what TensorBoard was told of later ones is taken back.
    """
    made: list[TrainerCallback] = []
    for name in names:
        if name == "tensorboard" and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory), purge_step=done + 1 if done else None)
            made.append(integration_utils.TensorBoardCallback(writer))
        else:
            made.append(integration_utils.INTEGRATION_TO_CALLBACK[name]())
    return made


def close_trackers(names: Sequence[str]) -> None:
    """End what transformers leaves open, so that the next stage is a run of its own."""
    if "wandb" in names:
        import wandb

        wandb.finish()


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row by one name each, as trackers take them: ``eval_loss``, ``retention/value``.

    Validation and the user's evaluations begin with ``eval_``, which transformers shows beside, not under, ``train``.
    """

    def walk(value: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, each in value.items():
                yield from walk(each, f"{name}/{key}")
        elif isinstance(value, int | float):
            yield name, value

    found: dict[str, float] = {}
    for key, value in row.items():
        for name, number in walk(value, key):
            for own in ("validation/", "evaluations/"):
                name = f"eval_{name.removeprefix(own)}" if name.startswith(own) else name
            found[name] = number
    return found
