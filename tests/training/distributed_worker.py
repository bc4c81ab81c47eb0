"""Runs recipes as `torchrun` has them run, and dumps every step's gradients, gathered whole. For `test_distributed`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from alula.errors import UsageError
from alula.training import Recipe, load_recipe, train


class GradientDump(TrainerCallback):
    """Writes `gradients-<step>.safetensors` into the run's directory from the first process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = {}
        for name, parameter in kwargs["model"].named_parameters():
            if (gradient := parameter.grad) is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                gradients[name.removeprefix("module.")] = whole.clone().cpu().contiguous()
        if state.is_world_process_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(gradients, self.directory / f"gradients-{state.global_step}.safetensors")


class Interrupt(TrainerCallback):
    """Ends the session after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def refusal(recipe: Recipe) -> str:
    """What this process is told in place of a training."""
    try:
        train(recipe, quiet=True)
    except UsageError as error:
        return str(error)
    return "it was trained"


def main(paths: list[str]) -> None:
    for path in paths:
        recipe = load_recipe(path)
        dump = Path(recipe.output_dir + "-gradients")
        if recipe.name == "interrupted":
            with contextlib.suppress(KeyboardInterrupt):
                train(recipe, callbacks=[GradientDump(dump), Interrupt()], quiet=True)
        if recipe.name == "refused":
            Path(f"{recipe.output_dir}-{os.environ['RANK']}.txt").write_text(refusal(recipe))
            continue
        train(recipe, callbacks=[GradientDump(dump)], quiet=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
