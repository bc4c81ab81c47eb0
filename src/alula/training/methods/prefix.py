"""Method prefix: prefix tuning through PEFT (Li and Liang 2021, in the form of P-Tuning v2: learned directly)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import PrefixTuningConfig
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from alula.anatomy import Anatomy
from alula.hosts.prompted import PromptedModel, check_prompt, refuse_host
from alula.settings import Int, Number
from alula.training.fields import Section
from alula.training.methods.base import PeftMethod, projector_modules


class PrefixSpec(Section):
    """Prefix tuning through PEFT: learned keys and values that every layer's attention finds before the first token."""

    tokens: Int = Field(default=16, ge=1, le=1024, description="tokens of the prefix")
    init_std: Number = Field(
        default=0.02,
        ge=0,
        le=10,
        description="spread the prefix starts with; PEFT's own, 1, would drown a small decoder",
    )


class Prefix(PeftMethod):
    """Learned tokens before those of every layer. The rate is that of P-Tuning v2.

    The prefix is there for text-only prompts too: unlike an exactly gated graft it has no way to be inactive.
    """

    name: ClassVar[str] = "prefix"
    settings: ClassVar[Any] = PrefixSpec
    parts: ClassVar[Mapping[str, float | None]] = {"prefix": 5e-3, "projector": 2e-5}
    defining: ClassVar[tuple[str, ...]] = ("prefix",)
    no_checkpointing: ClassVar[str | None] = (
        "keeps its prefix in the cache, which a recomputed block would fill twice; leave one of the two"
    )

    def check(self, anatomy: Anatomy, settings: PrefixSpec) -> None:
        refuse_host(anatomy.host.config, type(anatomy.host))

    def add(self, model: PreTrainedModel, settings: PrefixSpec, *, train_projector: bool, seed: int) -> nn.Module:
        """As `PeftMethod.add`.

        Raises:
            HostError, AdapterError: a host that a prefix cannot be put in front of.
        """
        config = PrefixTuningConfig(
            num_virtual_tokens=settings.tokens,
            modules_to_save=projector_modules(model) if train_projector else None,
            task_type="CAUSAL_LM",
        )
        wrapped = PromptedModel(model, config)
        encoder: Any = wrapped.prompt_encoder["default"]
        weight = encoder.embedding.weight
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.copy_(settings.init_std * noise)
        check_prompt(wrapped, where="method prefix")
        return wrapped
