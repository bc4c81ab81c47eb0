"""One stage in three steps: it is opened, trained, and sealed with what it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from alula.anatomy import HostParts
from alula.chat_template import TemplateSettings
from alula.data import BadSampleError, Collator, Mixture, Quarantine
from alula.data.collate import Replacer
from alula.data.packing import narrowed, packed
from alula.data.samples import Sample
from alula.errors import UsageError
from alula.files import write_json
from alula.hosts import load_host
from alula.hosts.context import context_length
from alula.hosts.stops import stop_ids
from alula.seam import needs_roles, packs
from alula.training.checkpoint import Sealing, newest, step_of
from alula.training.datasets import RunData, StageData
from alula.training.distillation import HeldMixture, Lessons, distillation, prepare_lessons
from alula.training.feature_cache import FeatureStore, frozen_audio_tower, frozen_tower, tower_fingerprint
from alula.training.layout import RunDirectory, StageDirectory
from alula.training.losses import AuxiliaryLosses
from alula.training.methods import METHODS, Tunable
from alula.training.metrics import MetricsWriter, Row, read_rows, rewind
from alula.training.optimizer import decayed_names
from alula.training.participation import lockstep
from alula.training.parts import PartTable, load_trained, tabulate
from alula.training.processes import from_first, on_first
from alula.training.progress import Display
from alula.training.recipe import FeatureCache, Recipe, Stage
from alula.training.retention import ProbeSet, RetentionEvaluator, RetentionMonitor, Stopped, retention_record
from alula.training.starts import begin, export
from alula.training.trackers import close_trackers, trackers
from alula.training.trainer import StageTrainer, cache_disabled, preserve_sharding_flag, training_arguments
from alula.training.validation import Evaluating, Evaluation, Validator


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


@dataclass(frozen=True)
class StagePlan:
    """Which stage of which run, and what it starts from.

    Attributes:
        recipe: the run's.
        index: the stage's place in it, from 0.
        run: the run's directory.
        origin: directory or hub id of the host that the run's first stage starts from.
        base, previous: see `starts.begin`.
    """

    recipe: Recipe
    index: int
    run: RunDirectory
    origin: str
    base: str
    previous: Path | None

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.index]

    @property
    def paths(self) -> StageDirectory:
        return self.run.stage(self.index, self.stage)

    @property
    def seed(self) -> int:
        return self.recipe.seed + self.index

    @property
    def template(self) -> TemplateSettings:
        return TemplateSettings(self.recipe.template or {})

    def begin(self) -> Tunable:
        """What the stage starts from; what the method puts on the host is drawn from the stage's own seed."""
        set_seed(self.seed)
        return begin(self.stage, base=self.base, previous=self.previous)


@dataclass(frozen=True)
class OpenStage:
    """A stage that is ready to train, from its beginning or from where an earlier session stopped.

    Attributes:
        tunable: the model, with its parts found.
        table: its parts, counted.
        data: what it learns from.
        samples: the mixture, with the text turns of its distillation in it.
        lessons: those turns, None without distillation.
        probe_set: what its retention is measured with, None without a budget.
        held_out: samples of its validation; none without.
        checkpoint: of an earlier session, None if there is none.
        rows: metrics rows up to the checkpoint.
    """

    plan: StagePlan
    tunable: Tunable
    table: PartTable
    data: StageData
    samples: Mixture | HeldMixture
    lessons: Lessons | None
    probe_set: ProbeSet | None
    held_out: Sequence[Sample]
    checkpoint: Path | None
    rows: Sequence[Row]

    @property
    def done(self) -> int:
        """Optimizer steps of earlier sessions."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


@dataclass(frozen=True)
class TrainedStage:
    """A stage after its last step.

    Attributes:
        opened: the stage, its model trained in place.
        gathered: the trained weights, where the model is sharded over processes.
        stopped: why it ended before its last step, None if it did not.
    """

    opened: OpenStage
    gathered: dict[str, Tensor] | None
    stopped: Stopped | None

    def tunable(self) -> Tunable:
        """The trained model, whole."""
        if self.gathered is None:
            return self.opened.tunable
        whole = self.opened.plan.begin()
        load_trained(whole.model, whole.parts, self.gathered)
        return whole


def run_stage(
    plan: StagePlan,
    data: RunData,
    display: Display,
    callbacks: Sequence[TrainerCallback] = (),
    evaluations: Sequence[Evaluation] = (),
) -> StageResult:
    """Train a stage, from its newest complete checkpoint if it has one, and leave its output in its directory.

    Args:
        data: of the run.
        display: what the person sees.
        callbacks: further Trainer callbacks.
        evaluations: the user's own.
    """
    seal_stage(train_stage(open_stage(plan, data, display), display, callbacks, evaluations), display)
    return stage_result(plan.paths)


def open_stage(plan: StagePlan, data: RunData, display: Display) -> OpenStage:
    """Load the model and the data, and take the stage's files back to its newest complete checkpoint."""
    stage, paths, metrics = plan.stage, plan.paths, plan.run.metrics
    lessons = stage_lessons(plan, display)  # before the model is loaded: the memory of two is not asked for
    tunable = plan.begin()
    table = tabulate(tunable.model, tunable.parts, stage.learning_rates, decayed_names(tunable.model, tunable.parts))
    display.show_parts(f"stage {stage.name}: {stage.method}", table)
    stage_data = data.stage(plan.index)

    def write() -> None:
        write_json(paths.parameters, table.as_json())
        complete = newest(paths.checkpoints, clean=True)
        rewind(metrics, stage.name, 0 if complete is None else step_of(complete))

    samples: Mixture | HeldMixture = stage_data.mixture
    if lessons is not None:
        assert stage.distill is not None
        held = HeldMixture(stage_data.mixture, lessons, spec=stage.distill, seed=plan.seed)
        held.check(collator(plan, tunable), f"stages.{stage.name}.distill")
        samples = held
    on_first(write)
    opened = OpenStage(
        plan,
        tunable,
        table,
        stage_data,
        samples,
        lessons,
        data.retention,
        data.validation,
        checkpoint=newest(paths.checkpoints),
        rows=read_rows(metrics, stage.name),
    )
    if opened.done:
        display.notify(f"stage {stage.name}: resuming after step {opened.done} of {stage_data.steps}")
    return opened


def train_stage(
    opened: OpenStage,
    display: Display,
    callbacks: Sequence[TrainerCallback] = (),
    evaluations: Sequence[Evaluation] = (),
) -> TrainedStage:
    """Take the stage's remaining steps."""
    plan, tunable, data = opened.plan, opened.tunable, opened.data
    stage, first = plan.stage, PartialState().is_main_process
    losses = dict(METHODS[stage.method].losses(tunable, stage.settings))
    if stage.distill is not None:
        if "distill" in losses:
            raise UsageError(
                f"stages.{stage.name}: method {stage.method!r} has a loss of its own called distill",
                remedy="call that loss another name, or leave distill out of the stage",
            )
        losses["distill"] = distillation(stage.distill.share, stage.distill.weight)
    auxiliary = AuxiliaryLosses(losses, stage.batch_size)
    with (
        training_setup(opened),
        auxiliary.on(tunable.model),
        display.stage(stage.name, steps=data.steps, done=opened.done) as progress,
    ):
        writer = MetricsWriter(
            plan.run.metrics,
            stage.name,
            batch_size=stage.batch_size,
            every=stage.log_every,
            last=opened.rows[-1] if opened.rows else None,
            on_row=progress,
        )
        monitor = retention_monitor(opened, writer, display)
        measured = Evaluating(validator(opened), evaluations, tunable.processor, writer)
        reporting = trackers(plan.recipe.report_to, plan.run.tensorboard(stage), done=opened.done) if first else []
        trainer = StageTrainer(
            tunable.model,
            training_arguments(
                plan.recipe,
                stage,
                plan.paths.checkpoints,
                steps=data.steps,
                seed=plan.seed,
                blocks=sharded_blocks(tunable.model, stage),
            ),
            parts=tunable.parts,
            rates=stage.learning_rates,
            stage=stage,
            dataset=opened.samples.window(data.steps * stage.batch_size),
            collator=Batches(stage, collator(plan, tunable, data.quarantine, opened.samples)),
            auxiliary=auxiliary,
            token_weight=METHODS[stage.method].token_weight(stage.settings),
            further=writer.noted,
            callbacks=[
                writer,
                Sealing(stage.keep_checkpoints),
                *([monitor] if monitor else []),
                measured,
                *callbacks,
                *reporting,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.args.get_warmup_steps(data.steps) >= data.steps:
            display.notify(
                f"stage {stage.name}: all its {data.steps} steps are warm-up, and the first is at rate 0; "
                "schedule.warmup: 0 leaves it out"
            )
        try:
            trainer.train(resume_from_checkpoint=None if opened.checkpoint is None else str(opened.checkpoint))
        except BadSampleError as error:
            ways = f"stages.{stage.name}.on_bad=skip steps over bad records; `alula data check` lists them all"
            remedy = f"{error.remedy}; or {ways}" if error.remedy else f"mend it; or {ways}"
            raise type(error)(error.message, where=error.where_named, remedy=remedy, place=error.place) from error
        finally:
            close_trackers(plan.recipe.report_to)
        for part in trainer.unreached():
            display.notify(
                f"stage {stage.name}: no gradient reached {part} in any step, so it learnt nothing; the data hold "
                "nothing that leads to it (no images, for what reads those)"
            )
        gathered = trainer.gather_trained() if trainer.is_fsdp_enabled else None
    return TrainedStage(opened, gathered, None if monitor is None else monitor.stopped)


def validator(opened: OpenStage) -> tuple[Validator, int] | None:
    """What puts held-out samples to the model, and every how many steps; None without a section for it."""
    spec, processor = opened.plan.recipe.validation, opened.tunable.processor
    if spec is None:
        return None
    collate = collator(opened.plan, opened.tunable, alone=True)
    found = Validator(opened.held_out, collate, processor.tokenizer.eos_token_id, batch_size=spec.batch_size)
    found.check()
    return found, spec.every


def collator(
    plan: StagePlan,
    tunable: Tunable,
    quarantine: Quarantine | None = None,
    replacer: Replacer | None = None,
    *,
    alone: bool = False,
) -> Collator:
    """What makes the stage's batches; bad samples raise unless there is a quarantine, and a replacer beside it.

    Args:
        alone: samples as they are, with nothing beside them that training alone needs.
    """
    method, settings, context = METHODS[plan.stage.method], plan.stage.settings, context_length(tunable.model)
    prompts = Collator(tunable.processor, context=context, template=plan.template, train=False)
    return method.collator(settings)(
        tunable.processor,
        max_length=plan.stage.max_length,
        context=context,
        template=plan.template,
        beside=None if alone else method.beside(settings, prompts, seed=plan.seed),
        roles=needs_roles(tunable.model),
        descriptions=method.describes(settings) and not alone,
        stops=stop_ids(tunable.model, tunable.processor.tokenizer),
        quarantine=quarantine,
        replacer=replacer if quarantine is not None else None,
    )


class Batches:
    """Batches as the stage wants them, made where the collator runs."""

    def __init__(self, stage: Stage, collate: Collator) -> None:
        self.collate, self.packing, self.narrow = collate, stage.packing, stage.logits == "supervised"
        self.share_pictures = not stage.trains_tower  # or its norms may count pictures

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        batch: Mapping[str, Any] = self.collate(samples)
        if self.packing:
            batch = packed(batch, share_pictures=self.share_pictures)
        return narrowed(batch) if self.narrow else batch


def stage_lessons(plan: StagePlan, display: Display) -> Lessons | None:
    """What the run's start says to text questions, None without distillation. The first process asks it."""
    stage, spec = plan.stage, plan.stage.distill
    if spec is None:
        return None

    def asked() -> Lessons:
        state = PartialState()
        return Lessons.load(
            prepare_lessons(
                spec,
                lambda: load_host(plan.origin, dtype=torch.float32),
                plan.template,
                plan.run.distillation,
                key=f"stages.{stage.name}.distill",
                device=state.device,
                seed=plan.seed,
                progress=display.console.is_terminal and not display.console.quiet,
                notify=display.notify,
            )
        )

    return from_first(asked)


def seal_stage(trained: TrainedStage, display: Display) -> None:
    """Write what the stage leaves: the trained model, then the record that says it is done."""
    opened, plan = trained.opened, trained.opened.plan
    stage, paths, quarantine = plan.stage, plan.paths, opened.data.quarantine

    def write() -> None:
        tuned = trained.tunable()
        export(tuned, stage, paths.model, paths.host)
        rows = read_rows(plan.run.metrics, stage.name)
        record = {
            "name": stage.name,
            "method": stage.method,
            "steps": rows[-1]["step"],
            "loss": rows[-1]["loss"],
            "trainable": opened.table.trainable,
            "total": opened.table.total,
            "base": plan.base,
            "template": plan.template.recorded(tuned.processor),
        }
        if opened.lessons is not None:
            record["distill"] = opened.lessons.counts()
        if plan.recipe.retention is not None:
            record["retention"] = retention_record(rows, trained.stopped)
        if trained.stopped is not None:
            record["stopped"] = trained.stopped.message(stage.name)
        paths.finish(record)
        if quarantine is not None and (counts := quarantine.counts()):
            skipped = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            display.notify(f"stage {stage.name}: stepped over bad records ({skipped}); see {paths.quarantine}")

    on_first(write)


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


@contextlib.contextmanager
def training_setup(opened: OpenStage) -> Iterator[None]:
    """Within the block the model is as the Trainer is to find it; afterwards it is as it was, and trained."""
    recipe, stage, model = opened.plan.recipe, opened.plan.stage, opened.tunable.model
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_sharding_flag())
        stack.enter_context(cache_disabled(HostParts.of(model).host))
        if not stage.trains_tower:
            stack.enter_context(frozen_tower(model, open_store(stage.feature_cache, model)))
        # no stage trains the audio tower
        stack.enter_context(frozen_audio_tower(model, open_store(stage.feature_cache, model, audio=True)))
        if stage.packing:
            stack.enter_context(packs(model))
        if PartialState().num_processes > 1:
            stack.enter_context(lockstep(model, opened.tunable.parts, blank_image(opened.tunable.processor)))
        yield


def retention_monitor(opened: OpenStage, writer: MetricsWriter, display: Display) -> RetentionMonitor | None:
    """What holds the stage to the recipe's budget, None without one."""
    plan, tunable = opened.plan, opened.tunable
    if plan.recipe.retention is None:
        return None
    assert opened.probe_set is not None
    evaluator = RetentionEvaluator(
        opened.probe_set,
        tunable.processor,
        plan.template,
        context_length(tunable.model),
        roles=needs_roles(tunable.model),
        batch_size=plan.recipe.retention.batch_size,
    )
    return RetentionMonitor(
        plan.recipe.retention,
        evaluator,
        stage=plan.stage.name,
        paths=plan.paths,
        origin=plan.run.stage(0, plan.recipe.stages[0]),
        parts=tunable.parts,
        writer=writer,
        rows=opened.rows,
        notify=display.notify,
    )


def open_store(spec: FeatureCache | None, model: nn.Module, *, audio: bool = False) -> FeatureStore | None:
    """The feature cache a stage asked for, of the image tower or of the ``audio`` tower; each has the whole bound."""
    if spec is None:
        return None
    anatomy = HostParts.of(model)
    tower = anatomy.audio_tower if audio else anatomy.tower
    directory = None if spec.disk is None or tower is None else Path(spec.disk) / tower_fingerprint(tower)
    return FeatureStore(int(spec.memory_mb * 2**20), directory)


def blank_image(processor: Any) -> dict[str, Tensor]:
    """The image processor's output for one grey image."""
    image = Image.new("RGB", (64, 64), (127, 127, 127))
    return dict(processor.image_processor(images=[image], return_tensors="pt"))


def sharded_blocks(model: nn.Module, stage: Stage) -> set[str]:
    """Class names of the decoder's blocks, and of the tower's if it is trained (frozen, it is kept out of sharding)."""
    anatomy = HostParts.of(model)
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
