"""The recipe: what a training run is, as data.

A recipe names a host, and stages that run one after another; a stage names a way to tune (`method`), the parts it
trains with their learning rates, the data, and the optimisation. Everything is frozen and refuses unknown keys.
`reading.load_recipe` turns a YAML file into one; this module only says what is legal.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alula.chat_template import TemplateSettings
from alula.data import SourceSpec, TextReplaySpec
from alula.data.specs import Int, Number
from alula.errors import UsageError
from alula.grafts.wings.config import LEARNERS, WingsConfig

Method = Literal["projector", "full", "lora", "prefix", "wings"]

#: The parts each method may train, with the learning rates it uses when the recipe names none. The rates are the
#: published ones of LLaVA-1.5 (projector, full, LoRA), P-Tuning v2 (prefix) and Wings' paper (learners), meant for 7B
#: decoders; a tiny host wants rates some hundred times larger and should name them. None: only where it is named.
METHOD_PARTS: dict[Method, dict[str, float | None]] = {
    "projector": {
        "projector": 1e-3,
        "connector.image": None,
        "connector.video": None,
        "connector.audio": None,
        "connector.shared": None,
    },
    "full": {"llm": 2e-5, "projector": 2e-5, "tower": None},
    "lora": {"lora": 2e-4, "projector": 2e-5},
    "prefix": {"prefix": 5e-3, "projector": 2e-5},
    "wings": {"wings.visual": 1e-3, "wings.textual": 1e-3, "wings.router": 1e-3, "projector": 1e-3, "llm": None},
}
#: The parts (or beginnings of their names) without one of which a method would be another one.
DEFINING_PARTS: dict[Method, tuple[str, ...]] = {
    "projector": ("projector", "connector."),
    "full": ("llm",),
    "lora": ("lora",),
    "prefix": ("prefix",),
    "wings": ("wings.",),
}
#: Methods whose output is an adapter on a base, which only the same method can go on training.
ADAPTER_METHODS: tuple[Method, ...] = ("lora", "prefix", "wings")


# another seed than evaluation's, so that a model is not chosen by the questions it is judged by
_TEXT: Any = {"microworld": "text", "split": "test", "seed": 41}
_PICTURES: Any = {"microworld": "visual", "split": "test", "seed": 41}

# beyond these, a number is a slip, or more than the machinery below counts to
_MANY, _WIDE, _ITEMS = 2**31 - 1, 2**16, 1_000_000

Count = Annotated[Int, Field(ge=1, le=_MANY)]
Size = Annotated[Int, Field(ge=1, le=_WIDE)]
Seed = Annotated[Int, Field(ge=0, le=_MANY)]
Bool = Annotated[bool, Strict()]
Rate = Annotated[Number, Field(gt=0, le=10)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class HostSpec(_Model):
    """The model the first stage starts from: a directory or hub id (`path`), or an LLM and a tower to join."""

    path: Place | None = Field(
        default=None, description="image-text-to-text model to take as it is: directory or hub id"
    )
    llm: Place | None = Field(default=None, description="text LLM: hub id, directory, or `fledgling`")
    vision: Place | None = Field(default=None, description="vision tower: hub id, directory, or `fledgling`")
    connector: str = Field(default="mlp2x_gelu", description="what maps tower features to the LLM's width")
    connector_options: dict[str, Annotated[Int, Field(ge=0, le=_WIDE)]] | None = Field(
        default=None, description="of `queries`: num_queries, width, layers, heads, feedforward, up_width"
    )
    audio: Place | None = Field(default=None, description="spectrogram tower (AST): hub id, directory, or `fledgling`")
    video: Bool = Field(default=False, description="take films, frame by frame through the vision tower")
    shared: Bool = Field(default=False, description="one connector for all media instead of one each")
    feature_layer: Int | None = Field(
        default=None, description="tower layer whose output is used; default: the host builder's"
    )

    @model_validator(mode="after")
    def _one_way(self) -> HostSpec:
        if self.path is not None:
            extra = sorted(self.model_fields_set & {*type(self).model_fields} - {"path"})
            if extra:
                raise ValueError(f"`path` takes a finished host as it is, so {_and(extra)} cannot be given beside it")
        elif self.llm is None or self.vision is None:
            raise ValueError("name either `path` (a finished host), or both `llm` and `vision` (parts to join)")
        return self


class Schedule(_Model):
    """How the learning rates move: up during `warmup`, then along `kind`. All parts share the shape."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Number = Field(
        default=0.03, ge=0, le=_MANY, description="below 1: share of the stage's steps; from 1: number of steps"
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> Schedule:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("`warmup` is a share below 1 or a whole number of steps")
        return self


class LoraSpec(_Model):
    """LoRA through PEFT, on the decoder's linear layers only unless `tower` asks for more."""

    rank: Size = 16
    alpha: Number | None = Field(
        default=None, gt=0, le=_ITEMS, description="scaling numerator; default: twice the rank"
    )
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="last names of the decoder's linear layers, e.g. [q_proj, v_proj]"
    )
    tower: Bool = Field(default=False, description="also adapt the vision tower's linear layers")

    @model_validator(mode="after")
    def _some_target(self) -> LoraSpec:
        if not self.targets:
            raise ValueError("`targets` is empty: name layers, or leave it out for all linear layers")
        return self


class PrefixSpec(_Model):
    """Prefix tuning through PEFT: learned keys and values that every layer's attention finds before the first row."""

    tokens: Int = Field(default=16, ge=1, le=1024, description="rows of the prefix")
    init_std: Number = Field(
        default=0.02,
        ge=0,
        le=10,
        description="spread the prefix starts with; PEFT's own, 1, would drown a small decoder",
    )


class DataSpec(_Model):
    """What a stage learns from: weighted sources, and the share of text replay as one number.

    Each position of the resulting stream is a function of the seed alone, so a resumed run needs only its step count.
    """

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    text_replay: TextReplaySpec | None = None
    seed: Seed | None = Field(
        default=None, description="of the mixture; default: the recipe's, moved on by one each stage"
    )


class FeatureCache(_Model):
    """Keeps a frozen tower's output per image (see `feature_cache`)."""

    memory_mb: Number = Field(default=512, gt=0, le=2**24, description="bound of the in-memory cache, in MiB")
    disk: Place | None = Field(
        default=None, description="directory that also keeps every feature (unbounded); may be shared"
    )


class Retention(_Model):
    """A budget of text skill, watched while the run trains (see `early_warning`)."""

    min: Number = Field(default=0.99, gt=0, le=1, description="least share of the start's text skill to be kept")
    every: Count = Field(default=200, description="steps between measurements; the last step is always measured")
    action: Literal["warn", "stop", "rewind"] = Field(
        default="warn", description="below min: say so; end the run; end it with the last weights within budget"
    )
    patience: Count = Field(default=1, description="measurements in a row below min before the run is ended")
    measure: Literal["exact", "likelihood"] = Field(
        default="exact", description="answers given exactly; or exp(loss at the start - loss now), for free text"
    )
    text: SourceSpec = Field(default=_TEXT, description="text-only questions with answers")
    items: Int = Field(default=200, ge=1, le=_ITEMS, description="how many of them")
    probes: Bool = Field(default=True, description="also attention shift and alignment")
    pictures: SourceSpec = Field(default=_PICTURES, description="samples the probes look at")
    samples: Int = Field(default=64, ge=2, le=_ITEMS, description="how many of them")
    batch_size: Size = Field(default=32, description="samples per forward of a measurement, on every process")


def _as_python_takes_them(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """The settings of a graft, refused by key where its own config refuses them; pydantic would turn '8' into 8."""
    if not isinstance(value, Mapping):
        return check(value)
    with contextlib.suppress(UsageError):  # of what pydantic made of the values; those given are told below
        check(value)
    try:
        return WingsConfig.from_dict(value)
    except UsageError as error:
        told = error.message.removeprefix("wings: ") + (f" ({error.remedy})" if error.remedy else "")
        key = next((key for key in value if _refusal({key: value[key]}) == error.message), None)
    if key is None:  # two settings that do not go together
        raise ValueError(told)
    problem = PydanticCustomError("setting", "{told}", {"told": told})
    raise ValidationError.from_exception_data("wings", [{"type": problem, "loc": (key,), "input": value[key]}])


def _refusal(settings: Mapping[str, Any]) -> str | None:
    try:
        WingsConfig.from_dict(settings)
    except UsageError as error:
        return error.message
    return None


class Stage(_Model):
    """One pass of training: from the previous stage's output (or the host) to a directory of its own."""

    name: Name
    method: Method
    train: dict[str, Rate] = Field(default_factory=dict, description="part -> learning rate; default: the method's own")
    data: DataSpec
    steps: Count | None = Field(default=None, description="optimizer steps")
    epochs: Number | None = Field(
        default=None, gt=0, le=_ITEMS, description="passes over the data; needs sources of known length"
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
    lora: LoraSpec | None = None
    prefix: PrefixSpec | None = None
    wings: Annotated[WingsConfig, WrapValidator(_as_python_takes_them)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_wings(cls, value: Any) -> Any:
        """`train: {wings: 1e-3}` is short for all wings parts at that rate."""
        if isinstance(value, Mapping) and isinstance(value.get("train"), Mapping) and "wings" in value["train"]:
            train = dict(value["train"])
            rate = train.pop("wings")
            wings = value.get("wings")
            learners = wings.get("learners") if isinstance(wings, Mapping) else getattr(wings, "learners", None)
            if not isinstance(learners, list | tuple):  # none named, or refused where it stands
                learners = None
            return {**value, "train": {**dict.fromkeys(_wings_parts(learners), rate), **train}}
        return value

    @model_validator(mode="after")
    def _possible(self) -> Stage:
        legal = METHOD_PARTS[self.method]
        wrong = sorted(set(self.train) - set(legal))
        if wrong:
            known = {part for parts in METHOD_PARTS.values() for part in parts}
            frozen = [part for part in wrong if part in known]
            what = "freezes" if frozen else "does not know"
            raise ValueError(f"train: method `{self.method}` {what} {_and(frozen or wrong)}; it trains {_or(legal)}")
        defining = DEFINING_PARTS[self.method]
        if self.train and not any(part.startswith(defining) for part in self.train):
            need = _or(part + ("*" if part.endswith(".") else "") for part in defining)
            raise ValueError(f"train: method `{self.method}` without the part {need} would not be `{self.method}`")
        for section in ADAPTER_METHODS:
            if getattr(self, section) is not None and self.method != section:
                raise ValueError(f"`{section}` configures method {section}, but this stage's method is {self.method}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give `steps` or `epochs`, exactly one of them")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide batch_size {self.batch_size} evenly"
            )
        if self.feature_cache is not None and self.trains_tower:
            raise ValueError("feature_cache: the tower is trained in this stage, so its features change at every step")
        return self

    @property
    def learning_rates(self) -> dict[str, float]:
        """Part -> peak learning rate, the method's defaults when the recipe named none."""
        if self.train:
            return dict(self.train)
        there = {*_wings_parts(self.wings.learners if self.wings else None), "llm", "projector", "lora", "prefix"}
        return {part: rate for part, rate in METHOD_PARTS[self.method].items() if rate is not None and part in there}

    @property
    def trains_tower(self) -> bool:
        return "tower" in self.learning_rates or (self.lora is not None and self.lora.tower)


class Recipe(_Model):
    """A whole run."""

    name: Name
    seed: Seed = 0
    output_dir: Place = Field(description="where the run keeps everything it writes")
    host: HostSpec
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32", description="bf16: autocast over float32 weights; auto: bf16 where the device has units for it"
    )
    gradient_checkpointing: Bool = False
    device: Literal["auto", "cpu"] = "auto"
    distributed: Literal["fsdp", "ddp"] = Field(default="fsdp", description="how several processes share the work")
    retention: Retention | None = Field(default=None, description="watch text skill and probes during training")
    template: dict[str, Any] | None = Field(
        default=None, description="what the chat template is told, e.g. {enable_thinking: false, date: 2026-01-31}"
    )
    stages: tuple[Stage, ...] = Field(min_length=1)

    @field_validator("template")
    @classmethod
    def _settings(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            return None if value is None else dict(TemplateSettings(value).arguments)
        except UsageError as error:
            raise ValueError(f"{error.where}: {error.message}") from error

    @model_validator(mode="after")
    def _no_recomputed_prefix(self) -> Recipe:
        if self.gradient_checkpointing and any(stage.method == "prefix" for stage in self.stages):
            raise ValueError(
                "gradient_checkpointing: method prefix keeps its prefix in the cache, which a recomputed block would "
                "fill twice; leave one of the two"
            )
        return self

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name {_and(twice)} is used twice; a stage's directory is named after it")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.method not in ADAPTER_METHODS:
                continue
            if after.method != before.method:
                raise ValueError(
                    f"stages: `{before.name}` leaves a {before.method} adapter, which `{after.name}` "
                    f"(method {after.method}) cannot go on with; use method {before.method}, or put it first"
                )
            if getattr(after, after.method) is not None:
                raise ValueError(
                    f"stages: `{after.name}` goes on with the adapter of `{before.name}`; leave its "
                    f"`{after.method}` section out, the adapter's own shape is kept"
                )
        return self


def _wings_parts(learners: Any) -> list[str]:
    """The parts of a Wings graft with these learners: a router chooses between two, so one alone has none."""
    names = [str(name) for name in (LEARNERS if learners is None else learners)]
    return [*(f"wings.{name}" for name in names), *(["wings.router"] if len(names) > 1 else [])]


def slug(index: int, stage: Stage) -> str:
    """Directory name of a stage: its place, then its name."""
    return f"{index + 1:02d}-{re.sub(r'[^A-Za-z0-9_.-]', '-', stage.name)}"


def _and(names: Any) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def _or(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
