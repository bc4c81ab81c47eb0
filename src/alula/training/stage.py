"""One stage, from its start to its output directory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from alula.anatomy import Anatomy
from alula.chat_template import TemplateSettings
from alula.data import Collator, Mixture, MixtureSpec, Quarantine, open_mixture
from alula.errors import RecipeError
from alula.evaluation.generation import stop_ids
from alula.files import write_json
from alula.training.checkpoint import Sealing, newest, step_of
from alula.training.early_warning import EarlyWarning, Stopped
from alula.training.feature_cache import FeatureStore, frozen_ears, frozen_tower, tower_fingerprint
from alula.training.layout import StageDirectory
from alula.training.meters import Meters
from alula.training.metrics import MetricsWriter, Row, read_rows, rewind
from alula.training.optimizer import decayed_names
from alula.training.participation import lockstep
from alula.training.parts import tabulate
from alula.training.progress import Display
from alula.training.recipe import DataSpec, FeatureCache, Recipe, Stage
from alula.training.starts import begin, export
from alula.training.trainer import StageTrainer, config_kept, load_trained, sharding_kept, training_arguments


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        stopped: why it ended before its last step, None if it did not.
        skipped: an earlier session had already finished it.
    """

    name: str
    model: Path
    steps: int
    loss: float
    trainable: int
    total: int
    stopped: str | None = None
    skipped: bool = False


def run_stage(
    recipe: Recipe,
    index: int,
    paths: StageDirectory,
    metrics: Path,
    *,
    base: str,
    previous: Path | None,
    origin: StageDirectory,
    display: Display,
    callbacks: Sequence[TrainerCallback] = (),
) -> StageResult:
    """Train stage ``index``, from its newest complete checkpoint if it has one, and leave its output there.

    Args:
        base, previous: see `starts.begin`.
        metrics: the run's metrics file.
        origin: of the first stage.
        callbacks: further Trainer callbacks.
    """
    stage, processes = recipe.stages[index], PartialState()
    main = processes.is_main_process
    seed = recipe.seed + index
    set_seed(seed)  # what the method puts on the host starts from the stage's own seed
    start = begin(stage, base=base, previous=previous)
    rates = stage.learning_rates
    table = tabulate(start.model, start.parts, rates, decayed_names(start.model, start.parts))
    display.show_parts(f"stage {stage.name}: {stage.method}", table)

    template = TemplateSettings(recipe.template or {})
    quarantine = Quarantine(paths.quarantine) if stage.on_bad == "skip" else None
    mixture = open_data(stage.data, seed=recipe.seed + index, quarantine=quarantine)
    steps = stage_steps(stage, mixture)
    world = processes.num_processes
    arguments = training_arguments(
        recipe, stage, paths.checkpoints, steps=steps, seed=seed, world=world, blocks=sharded_blocks(start.model, stage)
    )
    if main:
        write_json(paths.parameters, table.as_json())
        newest(paths.checkpoints, clean=True)
    processes.wait_for_everyone()
    checkpoint = newest(paths.checkpoints)
    done = step_of(checkpoint) if checkpoint is not None else 0
    last = rewind(metrics, stage.name, done) if main else None
    if done:
        display.say(f"stage {stage.name}: resuming after step {done} of {steps}")

    if recipe.gradient_checkpointing:
        checkpoint_activations(start.model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding_kept())
        stack.enter_context(config_kept(Anatomy.of(start.model).host))
        if not stage.trains_tower:
            stack.enter_context(frozen_tower(start.model, open_store(stage.feature_cache, start.model)))
        # no stage trains the ears
        stack.enter_context(frozen_ears(start.model, open_store(stage.feature_cache, start.model, ears=True)))
        if world > 1:
            stack.enter_context(lockstep(start.model, start.parts, blank_image(start.processor)))
        watch = stack.enter_context(display.stage(stage.name, steps=steps, done=done))
        writer = MetricsWriter(
            metrics if main else None,
            stage.name,
            batch_size=stage.batch_size,
            every=stage.log_every,
            last=last,
            watch=watch,
        )
        warning = None
        if recipe.retention is not None:
            warning = EarlyWarning(
                recipe.retention,
                Meters(recipe.retention, start.processor, template),
                stage=stage.name,
                paths=paths,
                origin=origin,
                writer=writer,
                rows=[row for row in read_rows(metrics) if row["stage"] == stage.name and row["step"] <= done],
                main=main,
                say=display.say,
            )
        trainer = StageTrainer(
            start.model,
            arguments,
            parts=start.parts,
            rates=rates,
            stage=stage,
            dataset=mixture.window(steps * stage.batch_size),
            collator=Collator(
                start.processor,
                max_length=stage.max_length,
                template=template,
