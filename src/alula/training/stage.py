"""One stage, from its start to its output directory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from alula.files import write_json
from alula.hosts.context import context_length
from alula.hosts.stops import stop_ids
from alula.seam import needs_roles
from alula.training.checkpoint import Sealing, newest, step_of
from alula.training.feature_cache import FeatureStore, frozen_audio_tower, frozen_tower, tower_fingerprint
from alula.training.layout import StageDirectory
from alula.training.metrics import MetricsWriter, read_rows, rewind
from alula.training.optimizer import decayed_names
from alula.training.participation import lockstep
from alula.training.parts import tabulate
from alula.training.progress import Display
from alula.training.recipe import DataSpec, FeatureCache, Recipe, Stage
from alula.training.retention import RetentionEvaluator, RetentionMonitor, retention_record
from alula.training.starts import begin, export
from alula.training.trainer import (
    StageTrainer,
    cache_disabled,
    load_trained,
    preserve_sharding_flag,
    training_arguments,
)


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
        display.notify(f"stage {stage.name}: resuming after step {done} of {steps}")

    if recipe.gradient_checkpointing:
        checkpoint_activations(start.model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_sharding_flag())
        stack.enter_context(cache_disabled(Anatomy.of(start.model).host))
        if not stage.trains_tower:
            stack.enter_context(frozen_tower(start.model, open_store(stage.feature_cache, start.model)))
        # no stage trains the audio tower
        stack.enter_context(frozen_audio_tower(start.model, open_store(stage.feature_cache, start.model, audio=True)))
        if world > 1:
            stack.enter_context(lockstep(start.model, start.parts, blank_image(start.processor)))
        progress = stack.enter_context(display.stage(stage.name, steps=steps, done=done))
        writer = MetricsWriter(
            metrics if main else None,
            stage.name,
            batch_size=stage.batch_size,
            every=stage.log_every,
            last=last,
            on_row=progress,
        )
        monitor = None
        if recipe.retention is not None:
            monitor = RetentionMonitor(
                recipe.retention,
                RetentionEvaluator(
                    recipe.retention,
                    start.processor,
                    template,
                    context_length(start.model),
                    roles=needs_roles(start.model),
                ),
                stage=stage.name,
                paths=paths,
                origin=origin,
                writer=writer,
                rows=[row for row in read_rows(metrics) if row["stage"] == stage.name and row["step"] <= done],
                main=main,
                notify=display.notify,
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
                context=context_length(start.model),
                template=template,
                roles=needs_roles(start.model),
                stops=stop_ids(start.model, start.processor.tokenizer),
                quarantine=quarantine,
                replacer=mixture if quarantine is not None else None,
            ),
            callbacks=[writer, Sealing(stage.keep_checkpoints), *([monitor] if monitor else []), *callbacks],
        )
        if monitor is not None:
            monitor.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        trained = trainer.gather_trained() if trainer.is_fsdp_enabled else None
    if main:
        if trained is not None:  # the live model is sharded: put its weights on a whole one
            set_seed(seed)
            start = begin(stage, base=base, previous=previous)
            load_trained(start.model, start.parts, trained)
        export(start, stage, paths.model, paths.host)
        rows = [row for row in read_rows(metrics) if row["stage"] == stage.name]
        record = {
            "name": stage.name,
            "method": stage.method,
            "steps": rows[-1]["step"],
            "loss": rows[-1]["loss"],
            "trainable": table.trainable,
            "total": table.total,
            "base": base,
            "template": template.recorded(start.processor),
        }
        if monitor is not None:
            record["retention"] = retention_record(rows, monitor.stopped)
        if monitor is not None and monitor.stopped is not None:
            record["stopped"] = monitor.stopped.message(stage.name)
        paths.finish(record)
        if quarantine is not None and (counts := quarantine.counts()):
            skipped = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            display.notify(f"stage {stage.name}: stepped over bad records ({skipped}); see {paths.quarantine}")
    processes.wait_for_everyone()
    return stage_result(paths)


def stage_result(paths: StageDirectory, *, skipped: bool = False) -> StageResult:
    """The result of a finished stage from its record."""
    record = paths.done()
    assert record is not None
    return StageResult(
        name=record["name"],
        model=paths.model,
        steps=record["steps"],
        loss=record["loss"],
        trainable=record["trainable"],
        total=record["total"],
        stopped=record.get("stopped"),
        skipped=skipped,
    )


def open_data(spec: DataSpec, *, seed: int, quarantine: Quarantine | None = None) -> Mixture:
    """The stage's mixture; relative paths start from the working directory."""
    mixture = MixtureSpec(
        sources=list(spec.sources), text_replay=spec.text_replay, seed=seed if spec.seed is None else spec.seed
    )
    return open_mixture(mixture, quarantine=quarantine)


def stage_steps(stage: Stage, mixture: Mixture) -> int:
    """Optimizer steps of ``stage``. An epoch draws as many samples as the non-replay sources hold together.

    Raises:
        RecipeError: epochs over a source without end.
    """
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    sizes = {source.name: source.size for source in mixture.sources[: len(stage.data.sources)]}
    endless = [name for name, size in sizes.items() if size is None]
    if endless:
        raise RecipeError(
            f"the source {endless[0]} never ends, so there is no epoch to count",
            where=f"stages.{stage.name}.epochs",
            remedy="give `steps` instead, or set `limit` on the source",
        )
    share = 1.0 - (stage.data.text_replay.ratio if stage.data.text_replay else 0.0)
    samples = stage.epochs * sum(size for size in sizes.values() if size is not None) / share
    return max(1, math.ceil(samples / stage.batch_size))


def open_store(spec: FeatureCache | None, model: nn.Module, *, audio: bool = False) -> FeatureStore | None:
    """The feature cache a stage asked for, of the image tower or of the ``audio`` tower; each has the whole bound."""
    if spec is None:
        return None
    anatomy = Anatomy.of(model)
    tower = anatomy.audio_tower if audio else anatomy.tower
    directory = None if spec.disk is None or tower is None else Path(spec.disk) / tower_fingerprint(tower)
    return FeatureStore(int(spec.memory_mb * 2**20), directory)


def blank_image(processor: Any) -> dict[str, Tensor]:
    """The image processor's output for one grey image."""
    image = Image.new("RGB", (64, 64), (127, 127, 127))
    return dict(processor.image_processor(images=[image], return_tensors="pt"))


def sharded_blocks(model: nn.Module, stage: Stage) -> set[str]:
    """Class names of the decoder's blocks, and of the tower's if it is trained (frozen, it is kept out of sharding)."""
    anatomy = Anatomy.of(model)
    blocks = set(map(type, anatomy.layers))
    if stage.trains_tower and anatomy.tower is not None:
        lists = [module for module in anatomy.tower.modules() if isinstance(module, nn.ModuleList)]
        blocks |= set(map(type, max(lists, key=len, default=())))
    return {block.__name__ for block in blocks}


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in backward instead of keeping them."""
    options = {"use_reentrant": False}  # reentrant checkpoints need an input that asks for a gradient
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name before transformers renamed it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
