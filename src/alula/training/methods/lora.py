"""Method lora: LoRA through PEFT, placed on the decoder only unless asked otherwise."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Literal

from peft import LoraConfig, get_peft_model
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from alula.anatomy import HostParts
from alula.errors import RecipeError
from alula.settings import Number
from alula.training.fields import ITEMS, Bool, Section, Size
from alula.training.methods.base import PeftMethod, projector_modules


class LoraSpec(Section):
    """LoRA through PEFT, on the decoder's linear layers only unless `tower` asks for more."""

    rank: Size = 16
    alpha: Number | None = Field(default=None, gt=0, le=ITEMS, description="scaling numerator; default: twice the rank")
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="last names of the decoder's linear layers, e.g. [q_proj, v_proj]"
    )
    tower: Bool = Field(default=False, description="also adapt the vision tower's linear layers")
    embeddings: Bool = Field(
        default=False, description="also train input embeddings and output head, whole and tied where the host's are"
    )

    @model_validator(mode="after")
    def _some_target(self) -> LoraSpec:
        if not self.targets:
            raise ValueError("`targets` is empty: name layers, or leave it out for all linear layers")
        return self


class Lora(PeftMethod):
    """Low-rank updates of linear layers. The rates are those of LLaVA-1.5, for 7B decoders."""

    name: ClassVar[str] = "lora"
    settings: ClassVar[Any] = LoraSpec
    parts: ClassVar[Mapping[str, float | None]] = {"lora": 2e-4, "projector": 2e-5, "embeddings": 2e-4}
    defining: ClassVar[tuple[str, ...]] = ("lora",)
    needs_layers: ClassVar[bool] = False
    packs: ClassVar[bool] = True

    def rates(self, settings: LoraSpec) -> dict[str, float]:
        return {part: rate for part, rate in super().rates(settings).items() if part not in self.idle_parts(settings)}

    def idle_parts(self, settings: LoraSpec) -> Collection[str]:
        return () if settings.embeddings else ("embeddings",)

    def misplaced(self, settings: LoraSpec, rates: Collection[str], before: LoraSpec | None) -> str | None:
        if settings.embeddings and "embeddings" not in rates:
            return "has `lora.embeddings`, and `train` leaves the part `embeddings` out: name both or neither"
        return None

    def check(self, anatomy: HostParts, settings: LoraSpec) -> None:
        decoder_sites(anatomy, settings)

    def add(self, model: PreTrainedModel, settings: LoraSpec, *, train_projector: bool, seed: int) -> nn.Module:
        """As `PeftMethod.add`; suffix targets such as `q_proj` would reach into the tower, so full paths are matched.

        Raises:
            RecipeError: a target names no linear layer of the decoder.
        """
        anatomy = HostParts.of(model)
        paths = {id(module): name for name, module in model.named_modules()}
        sites = decoder_sites(anatomy, settings)
        if settings.tower and anatomy.tower is not None:
            sites += _linears([anatomy.tower], paths)
        whole = (projector_modules(model) or []) if train_projector else []
        ends = [paths[id(end)] for end in (anatomy.embeddings, anatomy.head) if end is not None]
        tied = bool(model.config.get_text_config().tie_word_embeddings)
        if settings.embeddings:
            whole += ends[:1] if tied else ends
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha if settings.alpha is not None else 2 * settings.rank,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=_pattern(sites),
            modules_to_save=whole or None,
            ensure_weight_tying=settings.embeddings and tied,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


def decoder_sites(anatomy: HostParts, spec: LoraSpec) -> list[str]:
    """Full paths of the decoder's linear layers that get LoRA.

    Raises:
        RecipeError: a target names none of them, or the rank is beyond the decoder's width.
    """
    paths = {id(module): name for name, module in anatomy.host.named_modules()}
    sites = _linears(anatomy.layers, paths)
    if spec.rank > anatomy.hidden_size:
        raise RecipeError(
            f"{spec.rank} is more than the decoder is wide, beyond which a rank adds nothing",
            where="lora.rank",
            remedy=f"at most {anatomy.hidden_size}",
        )
    if spec.targets == "all-linear":
        return sites
    for target in spec.targets:
        if not any(site.rsplit(".", 1)[-1] == target for site in sites):
            legal = sorted({site.rsplit(".", 1)[-1] for site in sites})
            raise RecipeError(
                f"`{target}` names no linear layer of the decoder", where="lora.targets", remedy=", ".join(legal)
            )
    return [site for site in sites if site.rsplit(".", 1)[-1] in spec.targets]


def _linears(roots: Iterable[nn.Module], paths: dict[int, str]) -> list[str]:
    """Full paths of the linear layers under ``roots``."""
    return [paths[id(module)] for root in roots for module in root.modules() if isinstance(module, nn.Linear)]


def _pattern(sites: list[str]) -> str:
    """One regular expression that matches exactly ``sites``, with layer numbers folded so that it stays readable."""
    folded = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(site)) for site in sites})
    return "|".join(folded)
