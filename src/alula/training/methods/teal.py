"""Method teal: projections alone on pairs both ways, then embeddings and bias-norm; the language model is frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from alula.anatomy import Anatomy
from alula.codes import CodesProcessor, CodeTokenizer, load_codes
from alula.data.samples import MEDIA, Sample, message_text, text_part
from alula.draws import Draw
from alula.errors import AlulaError, RecipeError
from alula.grafts import TealConfig, attach, load_adapter
from alula.grafts.base import Layers
from alula.grafts.teal import TealGraft
from alula.hosts import Host
from alula.settings import Bool, Number
from alula.training.fields import PathText, Section
from alula.training.methods.base import Tunable
from alula.training.methods.grafted import GraftMethod


class TealSpec(Section):
    """Which codes, how they start, and how often a sample is learnt the other way round.

    Attributes:
        codes: directories of codes by the name of their range. Of several of a kind the first is read, in prompts, and
            the last is written, in answers.
        start: of embeddings and outputs: the codebooks, or "random".
        tied, bias_norm, reach, layers: of the graft, see `TealConfig`.
        write: share of the samples with one image or sound, one question and one answer that are turned round: the
            answer is the prompt, and the item's codes are what is learnt.
        captions: names of the sources whose answers tell what an item shows: samples of these alone are turned round.
            None: those of all.
    """

    codes: dict[str, PathText] = Field(default_factory=dict)
    start: Literal["codebook", "random"] = "codebook"
    tied: Bool = False
    bias_norm: Bool = True
    reach: Literal["codes", "all"] = "codes"
    layers: Layers = None
    write: Number = Field(default=0.5, ge=0, le=1)
    captions: list[str] | None = Field(
        default=None, description="names of the sources whose samples are turned round; default: all"
    )

    @model_validator(mode="after")
    def _turning(self) -> TealSpec:
        if self.captions is not None and not (self.write and self.captions):
            raise ValueError("captions: nothing is turned round; leave it out and say write: 0")
        return self

    def of_graft(self, codes: Mapping[str, CodeTokenizer]) -> TealConfig:
        """The graft's own settings."""
        given = {name: getattr(self, name) for name in ("tied", "bias_norm", "reach", "layers")}
        return TealConfig.of(codes, **given)


class Turning:
    """Turns pairs round: `text -> item` in the place of `item -> text`; see `alula.data.collate.Beside`.

    Args:
        processor: writes items as codes.
        share: of the samples that can be turned.
        seed: of the choice, which is a function of it and of a sample's position.
        captions: names of sources; None: of all.
    """

    def __init__(
        self, processor: CodesProcessor, share: float, seed: int, captions: Collection[str] | None = None
    ) -> None:
        self.processor, self.share, self.seed, self.captions = processor, share, seed, captions

    def shown(self, sample: Sample) -> Sample:
        """The sample, or the same the other way round."""
        if self.captions is not None and sample.source not in self.captions:
            return sample
        if not Draw("turn", self.seed, sample.position or 0).chance(self.share):
            return sample
        return turned(sample, self.processor) or sample

    def beside(self, samples: Sequence[Sample], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing more."""
        return {}


def turned(sample: Sample, processor: CodesProcessor) -> Sample | None:
    """A sample of one item, one question and one answer the other way round: the answer asks for the item.

    None: it is not of that shape, there are no codes of its kind, or its answer is not to be learnt, or by soft labels.
    """
    if [message["role"] for message in sample.messages] != ["user", "assistant"]:
        return None
    question, answer = sample.messages
    if not answer.get("train", True) or "soft" in answer:
        return None
    held = [part for part in question["content"] if part["type"] in MEDIA]
    name = processor.written_by(held[0]["type"]) if len(held) == 1 else None
    if name is None:
        return None
    kind = held[0]["type"]
    loading = {"rate": processor.codes[name].sampling_rate} if kind == "audio" else {}
    item = MEDIA[kind].from_object(held[0][kind]).load(**loading)
    asked = {"role": "user", "content": [text_part(message_text(answer))]}
    drawn = {"role": "assistant", "content": [text_part(processor.written(name, item))]}
    return replace(sample, messages=[asked, drawn])


class Teal(GraftMethod):
    """Stage 1 trains the projections alone, stage 2 embeddings, outputs and bias-norm as well. The rates are a choice:
    the paper names none."""

    name: ClassVar[str] = "teal"
    settings: ClassVar[Any] = TealSpec
    parts: ClassVar[Mapping[str, float | None]] = {
        "teal.projections": 1e-3,
        "teal.embeddings": None,
        "teal.bias_norm": None,
    }
    defining: ClassVar[tuple[str, ...]] = ("teal.",)
    continued: ClassVar[tuple[str, ...]] = ("write", "captions")

    def check(self, anatomy: Anatomy, settings: TealSpec) -> None:
        if not settings.codes:
            raise RecipeError(
                "no codes are named", where="teal.codes", remedy="codes: {image: DIRECTORY} (alula codes fit)"
            )
        try:
            anatomy.layer_indices(settings.layers)
            for directory in settings.codes.values():
                load_codes(directory)
        except AlulaError as error:
            raise RecipeError(
                error.message, where=f"teal.codes: {error.where}" if error.where else "teal", remedy=error.remedy
            ) from None

    def idle_parts(self, settings: TealSpec) -> Sequence[str]:
        return () if settings.bias_norm else ("teal.bias_norm",)

    def no_retention(self, settings: TealSpec) -> str | None:
        if settings.reach == "codes":
            return "leaves text the host's own, bit for bit (reach: codes): nothing of its text skill can change"
        return None

    def put_on(
        self, host: Host, settings: TealSpec, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        codes = {name: load_codes(directory) for name, directory in settings.codes.items()}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            if previous is None:
                graft = attach(host.model, settings.of_graft(codes))
                assert isinstance(graft, TealGraft)
                if settings.start == "codebook":
                    graft.start_from(codes)
            else:
                _refuse_others(codes, previous)
                graft = load_adapter(host.model, previous)
        assert isinstance(graft, TealGraft)
        processor = CodesProcessor.over(host.processor, graft.vocabulary.text, codes)
        return Tunable(host.model, processor, base, graft)

    def beside(self, settings: TealSpec, prompts: Any, *, seed: int) -> Turning:
        return Turning(prompts.processor, settings.write, seed, settings.captions)

    def check_sources(self, settings: TealSpec, names: Collection[str]) -> None:
        unknown = next((name for name in settings.captions or () if name not in names), None)
        if unknown is not None:
            raise RecipeError(
                f"no source is called {unknown!r}", where="teal.captions", remedy=f"name some of: {', '.join(names)}"
            )


def _refuse_others(codes: Mapping[str, CodeTokenizer], previous: Path) -> None:
    """The adapter of the stage before knows the codes that it was trained with, and no others.

    Raises:
        RecipeError: those in the directories are others by now.
    """
    for name, known in CodesProcessor.from_pretrained(previous).codes.items():
        if name not in codes or codes[name].fingerprint() != known.fingerprint():
            raise RecipeError(
                f"the codes {name!r} are not those that the stage before was trained with",
                where="teal.codes",
                remedy=f"they lie in {previous / 'codes' / name}; or train from the start",
            )
