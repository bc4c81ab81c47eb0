"""Checkpoints that can be trusted after a `kill -9` at any moment.

The Trainer writes a checkpoint file by file under its final name. So a checkpoint counts only once it is *sealed*: all
files are on disk, and a list of them with their sizes has been written, atomically and last. Anything unsealed or not
matching its list is a leftover of a killed run and is removed. Older checkpoints go only after a newer one is sealed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.files import write_json

SEAL = "sealed.json"


def seal(checkpoint: Path) -> None:
    """Declare ``checkpoint`` complete: sync its files to disk, then write the list of them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_json(checkpoint / SEAL, {"files": sizes})


def is_complete(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` was sealed and still holds every listed file at its listed size."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when ``checkpoint`` was taken."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def newest(directory: Path, *, clean: bool = False) -> Path | None:
    """The latest complete checkpoint in ``directory``, or None; ``clean`` removes the incomplete ones."""
    found: list[Path] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if not re.fullmatch(r"checkpoint-\d+", path.name):
            continue
        if is_complete(path):
            found.append(path)
        elif clean:
            shutil.rmtree(path)
    return max(found, key=step_of, default=None)


def prune(directory: Path, keep: int) -> None:
    """Remove all but the ``keep`` latest complete checkpoints."""
    complete = [path for path in directory.glob("checkpoint-*") if is_complete(path)]
    for path in sorted(complete, key=step_of)[:-keep]:
        (path / SEAL).unlink()  # first, so that a kill in the middle leaves something that is not trusted
        shutil.rmtree(path)


class Sealing(TrainerCallback):
    """Seals every checkpoint the Trainer has finished writing on all processes, then drops the older ones."""

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            directory = Path(str(args.output_dir))
            seal(directory / f"checkpoint-{state.global_step}")
            prune(directory, self.keep)
        processes.wait_for_everyone()
