"""The Hugging Face Trainer with parts, an exact token-weighted loss, and checkpoints of the trained weights only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from alula.data import soft_labels
from alula.data.packing import LAYOUT
from alula.data.samples import BROWSED
from alula.demonstrations.interleaved import DEMONSTRATIONS
from alula.errors import UsageError
from alula.files import telling
from alula.seam import PACKED, blank_mask
from alula.tokens import PROMPT_ENDS
from alula.training.browsing import settle
from alula.training.losses import AuxiliaryLosses
from alula.training.optimizer import build_optimizer
from alula.training.participation import fill_missing_gradients, zero_touch
from alula.training.parts import Named, gather_trained, load_trained
from alula.training.precision import multiplies_bfloat16
from alula.training.recipe import Recipe, Stage
from alula.training.trackers import flat

WEIGHTS = "model.safetensors"
_USE_FSDP = "ACCELERATE_USE_FSDP"


def training_arguments(
    recipe: Recipe, stage: Stage, directory: Path, *, steps: int, seed: int, blocks: Iterable[str]
) -> TrainingArguments:
    """The Trainer's settings for one stage; learning rates are not among them, they belong to the parts.

    Args:
        directory: of the checkpoints.
        blocks: class names of the model's repeated blocks, the units of sharding.
    """
    world = PartialState().num_processes
    micro = stage.micro_batch_size or stage.batch_size // world
    sharded = world > 1 and recipe.distributed == "fsdp"
    device = "cpu" if recipe.device == "cpu" or not torch.cuda.is_available() else "cuda"
    kind = "constant_with_warmup" if stage.schedule.kind == "constant" else stage.schedule.kind
    return TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch_size // (micro * world),
        max_steps=steps,
        lr_scheduler_type=kind,
        warmup_steps=stage.schedule.warmup,
        max_grad_norm=stage.clip or 0.0,
        bf16=recipe.precision == "bf16" or (recipe.precision == "auto" and multiplies_bfloat16(torch.device(device))),
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_every,
        report_to="none",  # see `trackers`
        run_name=f"{recipe.name}/{stage.name}",
        project=recipe.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        average_tokens_across_devices=True,
        dataloader_num_workers=stage.workers,
        dataloader_persistent_workers=stage.workers > 0,
        dataloader_pin_memory=device == "cuda",
        accelerator_config={"dispatch_batches": False, "split_batches": False, "even_batches": False},
        ddp_find_unused_parameters=False,
        fsdp=sharded,  # type: ignore[arg-type]
        fsdp_config={"transformer_layer_cls_to_wrap": sorted(blocks)} if sharded else None,
    )


class StageTrainer(Trainer):
    """Runs one stage.

    What it changes: samples are taken in the dataset's own order (the mixture is already shuffled, by position); the
    optimizer has a group per part; the loss is the mean over all supervised tokens of the optimizer step, whatever the
    host's own loss does, and auxiliary losses of the stage's method; a checkpoint holds the trained weights only, and
    loads strictly.

    Args:
        parts: trained parameters by part; names are the model's own.
        rates: peak learning rate per part.
        dataset: map-style, in the order it is to be taken.
        auxiliary: losses beside the next-token loss.
        token_weight: factor on the next-token loss.
        further: what else stands in the row of a step, for callbacks that read what is logged.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        parts: Mapping[str, Named],
        rates: Mapping[str, float],
        stage: Stage,
        dataset: Any,
        collator: Any,
        auxiliary: AuxiliaryLosses,
        token_weight: float,
        further: Callable[[int], Mapping[str, Any]],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.parts, self.rates, self.stage, self.auxiliary = parts, rates, stage, auxiliary
        self.token_weight, self.further = token_weight, further
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=dataset,
            compute_loss_func=token_mean_loss,
            callbacks=[_ZeroMissingGradients(), *callbacks],
        )
        if self.accelerator.num_processes == 1:
            self.args._n_gpu = min(self.args.n_gpu, 1)  # several visible GPUs would mean nn.DataParallel

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate switches its FSDP plugin on for accelerators only; gloo shards between CPU processes as well
            plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            if self.args.bf16:
                plugin.set_mixed_precision("bf16")
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = dict(inputs)  # the Trainer takes the labels out
        for key in soft_labels.KEYS:  # for the losses, not for the model
            inputs.pop(key, None)
        # a process whose batch has nothing to read would gather no weights while others do
        if self.is_fsdp_enabled and (BROWSED in inputs or PROMPT_ENDS in inputs):
            raise UsageError(
                "prompts are read before they are answered, by a model whose weights are sharded",
                where=self.stage.name,
                remedy="read them before (alula browse) and name the file: browse.conditions; or distributed: ddp",
            )
        if self.is_fsdp_enabled and DEMONSTRATIONS in inputs:
            raise UsageError(
                "demonstrations are read before prompts, by a model whose weights are sharded",
                where=self.stage.name,
                remedy="train the map with distributed: ddp",
            )
        settle(self.own_model, inputs)
        layout = inputs.pop(LAYOUT, None)
        if layout is not None:
            inputs |= {PACKED: layout, **blank_mask(inputs["input_ids"])}
        with self.auxiliary.observed():
            loss, outputs = super().compute_loss(
                model,
                inputs,
                return_outputs=True,
                num_items_in_batch=num_items_in_batch,
            )
        if self.token_weight != 1.0:
            loss = self.token_weight * loss
        added = self.auxiliary.added(outputs, batch)
        if added is not None:  # gradients are averaged over processes, which the Trainer's own loss makes up for, too
            loss = loss + added * self.accelerator.num_processes
        if not loss.requires_grad:  # text only, and what is trained speaks only where there is an image
            loss = loss + zero_touch(self.parts)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs and self.auxiliary.losses:
            logs["losses"] = self.auxiliary.means(self.accelerator.reduce)
        if "loss" in logs:
            logs |= flat({**self.further(self.state.global_step), "losses": logs.get("losses", {})})
        super().log(logs, start_time)

    @property
    def own_model(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                model or self.own_model,
                self.parts,
                self.rates,
                weight_decay=self.stage.weight_decay,
                betas=self.stage.betas,
            )
        return self.optimizer

    def unreached(self) -> list[str]:
        """Parts that no gradient but zero has reached in any step; every process must call it."""
        optimizer: Any = self.optimizer
        reached = torch.zeros(len(self.parts), device=self.accelerator.device)
        place = {part: index for index, part in enumerate(self.parts)}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                squares = optimizer.state.get(parameter, {}).get("exp_avg_sq")
                if squares is not None:
                    shard = squares.to_local() if hasattr(squares, "to_local") else squares
                    reached[place[group["part"]]] += bool(shard.numel()) and bool(shard.any())
        everywhere: Any = self.accelerator.reduce(reached, "sum")
        return [part for part, times in zip(self.parts, everywhere.tolist(), strict=True) if not times]

    def gather_trained(self) -> dict[str, Tensor]:
        """See `parts.gather_trained`; every process must call it."""
        return gather_trained(self.own_model, self.parts)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with telling(str(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model's share of a checkpoint: the trained weights."""
        trained = self.gather_trained()
        if self.args.should_save:
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            save_file(trained, directory / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # as the Trainer does, less its second copy of the whole model, frozen parts included
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.own_model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(model or self.own_model, self.parts, load_file(Path(resume_from_checkpoint) / WEIGHTS))


def token_mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy summed over this micro-batch, divided by the optimizer step's supervised tokens.

    So micro-batches (and processes) with few supervised tokens count for as much as they hold, and the accumulated
    gradient is the big batch's.

    Args:
        outputs: with `logits` (B, S, V).
        labels: (B, S), -100 where not supervised.
        num_items_in_batch: supervised tokens of the whole step; None: of this batch.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)
    total = F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum")
    count = (shifted != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


@contextlib.contextmanager
def preserve_sharding_flag() -> Iterator[None]:
    """accelerate switches sharding on for the whole process by a variable; the next stage is to choose for itself."""
    before = os.environ.get(_USE_FSDP)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_USE_FSDP, None)
        else:
            os.environ[_USE_FSDP] = before


@contextlib.contextmanager
def cache_disabled(host: Any) -> Iterator[None]:
    """Training forwards build no cache, and what is saved does not carry that.

    The Trainer says so in the host's config; a multimodal host's decoder reads its own.
    """
    configs = {id(config): config for config in (host.config, host.config.get_text_config(decoder=True))}.values()
    before = [(config, {key: value for key, value in vars(config).items() if key == "use_cache"}) for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, kept in before:
            delattr(config, "use_cache")
            for key, value in kept.items():
                setattr(config, key, value)


class _ZeroMissingGradients(TrainerCallback):
    """See `participation`: one process and many give a part that no sample reached the same gradient, zero."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        fill_missing_gradients(kwargs["optimizer"])
