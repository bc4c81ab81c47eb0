"""Prefix tuning through PEFT (Li and Liang 2021, in the form of P-Tuning v2: learned directly, no projection)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig
from transformers import PreTrainedModel

from alula.hosts.prompted import PromptedModel, check_prompt
from alula.training.lora import projector_modules
from alula.training.recipe import PrefixSpec


def add_prefix(model: PreTrainedModel, spec: PrefixSpec, *, train_projector: bool, seed: int) -> PeftModel:
    """Put a prefix before the rows of every layer; a trained projector goes into the adapter as whole modules.

    The prefix is there for text-only prompts too: unlike an exactly gated graft it has no way to be silent.

    Args:
        seed: of the prefix's start.

    Raises:
        HostError, AdapterError: a host that a prefix cannot be put in front of.
    """
    config = PrefixTuningConfig(
        num_virtual_tokens=spec.tokens,
        modules_to_save=projector_modules(model) if train_projector else None,
        task_type="CAUSAL_LM",
    )
    wrapped = PromptedModel(model, config)
    encoder: Any = wrapped.prompt_encoder["default"]
    weight = encoder.embedding.weight
    with torch.no_grad():
        weight.copy_(spec.init_std * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    check_prompt(wrapped, where="method prefix")
    return wrapped
