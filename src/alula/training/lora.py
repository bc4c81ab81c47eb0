"""LoRA through PEFT, placed on the decoder only unless asked otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from alula.anatomy import Anatomy
from alula.errors import RecipeError
from alula.training.recipe import LoraSpec


def add_lora(model: PreTrainedModel, spec: LoraSpec, *, train_projector: bool) -> PeftModel:
    """Wrap ``model`` with LoRA; a trained projector goes into the adapter as whole modules.

    Suffix targets such as `q_proj` would reach into the vision tower, so full paths are matched.

    Raises:
        RecipeError: a target names no linear layer of the decoder.
    """
    anatomy = Anatomy.of(model)
    paths = {id(module): name for name, module in model.named_modules()}
    sites = decoder_sites(anatomy, spec)
    if spec.tower and anatomy.tower is not None:
        sites += _linears([anatomy.tower], paths)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha if spec.alpha is not None else 2 * spec.rank,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=_pattern(sites),
        modules_to_save=projector_modules(model) if train_projector else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def decoder_sites(anatomy: Anatomy, spec: LoraSpec) -> list[str]:
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


def projector_modules(model: PreTrainedModel) -> list[str] | None:
    """Paths of the modules PEFT is to save whole for a trained projector: the smallest that hold all its weights.

    Mostly linear layers and norms, since only leaves work in mixed-adapter batches; where weights are bare parameters
    (Gemma-3, learned queries) the module around them. None where there is no projector.
    """
    projector = Anatomy.of(model).projector
    if projector is None:
        return None
    owners = [module for module in projector.modules() if any(True for _ in module.parameters(recurse=False))]
    inside = {id(module) for owner in owners for module in owner.modules() if module is not owner}
    paths = {id(module): name for name, module in model.named_modules()}
    return [paths[id(owner)] for owner in owners if id(owner) not in inside] or None


def _linears(roots: Iterable[nn.Module], paths: dict[int, str]) -> list[str]:
    """Full paths of the linear layers under ``roots``."""
    return [paths[id(module)] for root in roots for module in root.modules() if isinstance(module, nn.Linear)]


def _pattern(sites: list[str]) -> str:
    """One regular expression that matches exactly ``sites``, with layer numbers folded so that it stays readable."""
    folded = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(site)) for site in sites})
    return "|".join(folded)
