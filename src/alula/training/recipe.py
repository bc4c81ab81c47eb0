"""The recipe: what a training run is, as data.

A recipe names a host, and stages that run one after another; a stage names a way to tune (`method`), the parts it
trains with their learning rates, the data, and the optimisation. Everything is frozen and refuses unknown keys.
`reading.load_recipe` turns a YAML file into one; this module only says what is legal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from alula.chat_template import TemplateSettings
from alula.data import SourceSpec, TextReplaySpec
from alula.data.specs import UndrawnSpec
from alula.errors import UsageError
from alula.media import MEDIA
from alula.settings import Int, Number
from alula.training.fields import ITEMS, MANY, WIDE, Beta, Bool, Count, Name, PathText, Rate, Section, Seed, Size
from alula.training.methods import METHODS

_FURTHER = tuple(medium for medium in MEDIA if medium != "image")


class HostSpec(Section):
    """The model the first stage starts from: a directory or hub id (`path`), or an LLM and a tower to join."""

    path: PathText | None = Field(
        default=None, description="image-text-to-text model to take as it is: directory or hub id"
    )
    llm: PathText | None = Field(default=None, description="text LLM: hub id, directory, or `fledgling`")
    vision: PathText | None = Field(default=None, description="vision tower: hub id, directory, or `fledgling`")
    connector: str = Field(default="mlp2x_gelu", description="what maps tower features to the LLM's width")
    connector_options: dict[str, Annotated[Int, Field(ge=0, le=WIDE)] | str] | None = Field(
        default=None,
        description="of `queries`: num_queries, width, layers, heads, feedforward, up_width; of a universal encoder: "
        "experts, depth, heads, modality_tokens, feedforward, router",
    )
    encoder: Literal["universal"] | None = Field(
        default=None, description="universal: the vision tower serves all media, as in OneLLM"
    )
    modalities: tuple[str, ...] | None = Field(
        default=None, description="media of a universal encoder: image and any of " + ", ".join(_FURTHER)
    )
    modality_options: dict[str, dict[str, Annotated[Number, Field(ge=0, le=WIDE)]]] | None = Field(
        default=None, description="sizes by modality of a universal encoder"
    )
    feature_extractor: PathText | None = Field(
        default=None, description="spectrograms for a universal encoder: hub id, directory, or `fledgling`"
    )
    audio: PathText | None = Field(
        default=None, description="audio tower (AST, Whisper): hub id, directory, or `fledgling`"
    )
    audio_stack: Count | None = Field(
        default=None, description="moments of a clip side by side in one token; default: 10 of Whisper's, 1 of others"
    )
    video: Bool = Field(default=False, description="take video, frame by frame through the vision tower")
    shared: Bool = Field(default=False, description="one connector for all media instead of one each")
    feature_layer: Int | None = Field(
        default=None, description="tower layer whose output is used; default: the host builder's"
    )

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Beside `path` nothing else may be given, defaults neither."""
        return handler(self) if self.path is None else {"path": self.path}

    @model_validator(mode="after")
    def _one_way(self) -> HostSpec:
        if self.path is not None:
            extra = sorted(self.model_fields_set & {*type(self).model_fields} - {"path"})
            if extra:
                raise ValueError(f"`path` takes a finished host as it is, so {_and(extra)} cannot be given beside it")
        elif self.llm is None or self.vision is None:
            raise ValueError("name either `path` (a finished host), or both `llm` and `vision` (parts to join)")
        return self


class Schedule(Section):
    """How the learning rates move: up during `warmup`, then along `kind`. All parts share the shape."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Number = Field(
        default=0.03, ge=0, le=MANY, description="below 1: share of the stage's steps; from 1: number of steps"
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> Schedule:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("`warmup` is a share below 1 or a whole number of steps")
        return self


class DataSpec(Section):
    """What a stage learns from: weighted sources, and the share of text replay as one number.

    Each position of the resulting stream is a function of the seed alone, so a resumed run needs only its step count.
    """

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    text_replay: TextReplaySpec | None = None
    seed: Seed | None = Field(
        default=None, description="of the mixture; default: the recipe's, moved on by one each stage"
    )


class FeatureCache(Section):
    """Keeps a frozen tower's output per image (see `feature_cache`)."""

    memory_mb: Number = Field(default=512, gt=0, le=2**24, description="bound of the in-memory cache, in MiB")
    disk: PathText | None = Field(
        default=None, description="directory that also keeps every feature (unbounded); may be shared"
    )


class Retention(Section):
    """A budget of text skill, measured while the run trains (see `alula.training.retention`)."""

    min: Number = Field(default=0.99, gt=0, le=1, description="least share of the start's text skill to be kept")
    every: Count = Field(default=200, description="steps between measurements; the last step is always measured")
    action: Literal["warn", "stop", "rewind"] = Field(
        default="warn", description="below min: say so; end the run; end it with the last weights within budget"
    )
    patience: Count = Field(default=1, description="measurements in a row below min before the run is ended")
    measure: Literal["exact", "likelihood"] = Field(
        default="exact", description="answers given exactly; or exp(loss at the start - loss now), for free text"
    )
    text: UndrawnSpec | None = Field(
        default=None, description="text-only questions with answers; default: those that come with the model, if any"
    )
    items: Int = Field(default=200, ge=1, le=ITEMS, description="how many of them")
    probes: Bool = Field(default=True, description="also attention shift and alignment")
    pictures: UndrawnSpec | None = Field(
        default=None, description="samples the probes look at; default: those that come with the model, if any"
    )
    samples: Int = Field(default=64, ge=2, le=ITEMS, description="how many of them")
    batch_size: Size = Field(default=32, description="samples per forward of a measurement, on every process")


class Validation(Section):
    """Samples that are not trained on, and what the model says to them while it trains (see
    `alula.training.validation`)."""

    sources: tuple[UndrawnSpec, ...] = Field(min_length=1, description="held-out samples with answers")
    every: Count = Field(default=200, description="steps between measurements; the last step is always measured")
    samples: Int = Field(default=256, ge=1, le=ITEMS, description="the first so many of each source")
    batch_size: Size = Field(default=32, description="samples per forward of a measurement, on every process")


class Distill(Section):
    """Text turns behind images, answered as the run's start answers them bare (see `alula.training.distillation`)."""

    weight: Number = Field(default=1.0, gt=0, le=MANY, description="factor on the divergence, beside the loss")
    share: Number = Field(default=0.25, gt=0, le=1, description="share of the samples with media that get a text turn")
    order: Literal["behind", "between"] = Field(
        default="behind", description="text turns stand behind a sample's own, or between its media and its question"
    )
    prompts: UndrawnSpec | None = Field(
        default=None, description="text questions; default: the model the run starts from writes some itself"
    )
    count: Int = Field(default=1000, ge=1, le=ITEMS, description="how many of them")
    max_new_tokens: Count = Field(default=256, description="longest answer, and longest question that is written")
    candidates: Size = Field(default=64, description="likeliest tokens kept of each distribution")
    batch_size: Size = Field(default=32, description="questions answered at a time")
    cache: PathText | None = Field(
        default=None, description="directory that keeps the answers; may be shared. Default: in the run's own"
    )


class _Stage(Section):
    """One pass of training: from the previous stage's output (or the host) to a directory of its own."""

    name: Name
    method: str
    train: dict[str, Rate] = Field(default_factory=dict, description="part -> learning rate; default: the method's own")
    data: DataSpec
    steps: Count | None = Field(default=None, description="optimizer steps")
    epochs: Number | None = Field(
        default=None, gt=0, le=ITEMS, description="passes over the data; needs sources of known length"
    )
    batch_size: Size = Field(default=32, description="samples per optimizer step, over all processes")
    micro_batch_size: Size | None = Field(default=None, description="samples per forward on one process; default: all")
    schedule: Schedule = Schedule()
    weight_decay: Number = Field(
        default=0.0, ge=0, le=100, description="on matrices only, never on norms, biases and scalars"
    )
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: Number | None = Field(default=1.0, gt=0, description="largest gradient norm; null: no clipping")
    max_length: Count | None = Field(default=None, description="longest sample in tokens; a longer one is a bad record")
    on_bad: Literal["fail", "skip"] = Field(default="fail", description="skip: quarantine bad records and go on")
    save_every: Count = Field(default=200, description="steps between checkpoints")
    keep_checkpoints: Count = 1
    log_every: Count = Field(default=1, description="steps between rows of metrics.jsonl; a row is about its own step")
    workers: Int = Field(default=0, ge=0, le=1024, description="data loading processes")
    feature_cache: FeatureCache | None = None
    distill: Distill | None = None
    packing: Bool = Field(
        default=False, description="samples side by side without padding, what several begin with once; see training.md"
    )
    logits: Literal["all", "supervised"] = Field(
        default="all", description="supervised: the head runs at positions that are learnt from alone"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        """Methods' abbreviations of `train`, written out."""
        if isinstance(value, Mapping) and isinstance(value.get("train"), Mapping):
            train = value["train"]
            for name, method in METHODS.items():
                train = method.expand(train, value.get(name))
            return {**value, "train": train}
        return value

    @model_validator(mode="after")
    def _possible(self) -> _Stage:
        method = METHODS[self.method]
        wrong = sorted(set(self.train) - set(method.parts))
        if wrong:
            known = {part for each in METHODS.values() for part in each.parts}
            frozen = [part for part in wrong if part in known]
            what = "freezes" if frozen else "does not know"
            legal = _or(method.parts)
            raise ValueError(f"train: method `{self.method}` {what} {_and(frozen or wrong)}; it trains {legal}")
        if self.train and not any(part.startswith(method.defining) for part in self.train):
            need = _or(part + ("*" if part.endswith(".") else "") for part in method.defining)
            raise ValueError(f"train: method `{self.method}` without the part {need} would not be `{self.method}`")
        if idle := [part for part in self.learning_rates if part in method.idle_parts(self.settings)]:
            raise ValueError(f"train: {_and(idle)} does nothing under these settings of `{self.method}`")
        for section in METHODS:
            if getattr(self, section, None) is not None and self.method != section:
                raise ValueError(f"`{section}` configures method {section}, but this stage's method is {self.method}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give `steps` or `epochs`, exactly one of them")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide batch_size {self.batch_size} evenly"
            )
        for key, given in (("packing", self.packing), ("logits", self.logits == "supervised")):
            if given and not method.packs:
                able = _or(tuple(name for name, each in METHODS.items() if each.packs))
                raise ValueError(
                    f"{key}: method `{self.method}` asks where tokens stand in padded batches; {able} do not"
                )
            if given and self.distill is not None:
                raise ValueError(f"{key}: `distill` reads logits by their places in padded batches")
        if self.packing and getattr(self.settings, "dropout", None):
            raise ValueError("packing: with dropout, the beginning that samples share would be dropped alike in all")
        if self.feature_cache is not None and self.trains_tower:
            raise ValueError("feature_cache: the tower is trained in this stage, so its features change at every step")
        return self

    @property
    def settings(self) -> Any:
        """Those of the stage's method: the section of its name, or the method's defaults; None where it has none."""
        given, kind = getattr(self, self.method, None), METHODS[self.method].settings
        return kind() if given is None and kind is not None else given

    @property
    def learning_rates(self) -> dict[str, float]:
        """Part -> peak learning rate, the method's defaults when the recipe named none."""
        return dict(self.train) if self.train else METHODS[self.method].rates(self.settings)

    @property
    def trains_tower(self) -> bool:
        return "tower" in self.learning_rates or bool(getattr(self.settings, "tower", False))


if TYPE_CHECKING:

    class Stage(_Stage):
        """One pass of training, with a section of settings for each method that has some."""
else:
    Stage = create_model(
        "Stage",
        __base__=_Stage,
        __module__=__name__,
        __doc__=_Stage.__doc__,
        method=(Literal[tuple(METHODS)], ...),
        **{name: (method.settings | None, None) for name, method in METHODS.items() if method.settings is not None},
    )


class Recipe(Section):
    """A whole run."""

    name: Name
    seed: Seed = 0
    output_dir: PathText = Field(description="where the run keeps everything it writes")
    host: HostSpec
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32", description="bf16: autocast over float32 weights; auto: bf16 where the device has units for it"
    )
    gradient_checkpointing: Bool = False
    device: Literal["auto", "cpu"] = "auto"
    distributed: Literal["fsdp", "ddp"] = Field(default="fsdp", description="how several processes share the work")
    retention: Retention | None = Field(default=None, description="measure text skill and probes during training")
    validation: Validation | None = Field(default=None, description="measure held-out samples during training")
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        default=(), description="trackers that the rows of metrics.jsonl are sent to as well"
    )
    template: dict[str, Any] | None = Field(
        default=None, description="variables for the chat template, e.g. {enable_thinking: false, date: 2026-01-31}"
    )
    stages: tuple[Stage, ...] = Field(min_length=1)

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("template")
    @classmethod
    def _settings(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            return None if value is None else dict(TemplateSettings(value).arguments)
        except UsageError as error:
            raise ValueError(f"{error.where}: {error.message}") from error

    @model_validator(mode="before")
    @classmethod
    def _continue(cls, value: Any) -> Any:
        """Settings of a stage that goes on with an adapter and may change some: those of the stage before, and its
        own."""
        stages = value.get("stages") if isinstance(value, Mapping) else None
        if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages):
            return value
        found: list[Mapping[str, Any]] = []
        for stage in stages:
            name = stage.get("method")
            method = METHODS.get(name) if isinstance(name, str) else None
            if method is not None and method.continued and found and found[-1].get("method") == name:
                before, own = found[-1].get(name) or {}, stage.get(name) or {}
                if isinstance(before, Mapping) and isinstance(own, Mapping):
                    stage = {**stage, name: {**before, **own}}
            found.append(stage)
        return {**value, "stages": found}

    @model_validator(mode="after")
    def _combined(self) -> Recipe:
        for stage in self.stages:
            why = METHODS[stage.method].no_checkpointing
            if self.gradient_checkpointing and why is not None:
                raise ValueError(f"gradient_checkpointing: method {stage.method} {why}")
            why = METHODS[stage.method].no_retention(stage.settings)
            if self.retention is not None and why is not None:
                raise ValueError(f"retention: `{stage.name}` {why}")
            if stage.packing and self.retention is not None and self.retention.probes:
                raise ValueError(
                    f"packing: `{stage.name}` runs an attention that the probes of `retention` cannot read; set "
                    "retention.probes: false"
                )
            why = METHODS[stage.method].no_validation
            if self.validation is not None and why is not None:
                raise ValueError(f"validation: `{stage.name}` {why}")
        return self

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name {_and(twice)} is used twice; a stage's directory is named after it")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if not METHODS[before.method].leaves_adapter:
                continue
            if after.method != before.method:
                raise ValueError(
                    f"stages: `{before.name}` leaves a {before.method} adapter, which `{after.name}` "
                    f"(method {after.method}) cannot go on with; use method {before.method}, or put it first"
                )
            kept = METHODS[after.method].continued
            changed = [
                key
                for key in (type(after.settings).model_fields if kept else ())
                if key not in kept and getattr(after.settings, key) != getattr(before.settings, key)
            ]
            if changed:
                raise ValueError(
                    f"stages: `{after.name}` goes on with the adapter of `{before.name}`, of whose settings it may "
                    f"change {_and(kept)}, not {_and(changed)}"
                )
            if not kept and getattr(after, after.method, None) is not None:
                raise ValueError(
                    f"stages: `{after.name}` goes on with the adapter of `{before.name}`; leave its "
                    f"`{after.method}` section out, the adapter's own shape is kept"
                )
        for place, stage in enumerate(self.stages):
            method = METHODS[stage.method]
            before_it = self.stages[place - 1].settings if place and method.leaves_adapter else None
            if before_it is not None and self.stages[place - 1].method != stage.method:
                before_it = None
            why = method.misplaced(stage.settings, stage.learning_rates, before_it)
            if why is not None:
                raise ValueError(f"stages: `{stage.name}` {why}")
        return self


def slug(index: int, stage: Stage) -> str:
    """Directory name of a stage: its place, then its name."""
    return f"{index + 1:02d}-{re.sub(r'[^A-Za-z0-9_.-]', '-', stage.name)}"


def _and(names: Any) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def _or(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
