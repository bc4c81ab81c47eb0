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
    """Wrap ``model`` with LoRA; a trained projector goes into the adapter as whole linear layers.

    Suffix targets such as `q_proj` would reach into the vision tower, so full paths are matched.

    Raises:
        RecipeError: a target names no linear layer of the decoder.
    """
    anatomy = Anatomy.of(model)
    paths = {id(module): name for name, module in model.named_modules()}
    sites = _linears(anatomy.layers, paths)
    if spec.targets != "all-linear":
        for target in spec.targets:
            if not any(site.rsplit(".", 1)[-1] == target for site in sites):
                legal = sorted({site.rsplit(".", 1)[-1] for site in sites})
                raise RecipeError(
                    f"`{target}` names no linear layer of the decoder", where="lora.targets", remedy=", ".join(legal)
                )
        sites = [site for site in sites if site.rsplit(".", 1)[-1] in spec.targets]
    if spec.tower and anatomy.tower is not None:
        sites += _linears([anatomy.tower], paths)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha if spec.alpha is not None else 2 * spec.rank,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=_pattern(sites),
        modules_to_save=projector_linears(model) if train_projector else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def projector_linears(model: PreTrainedModel) -> list[str] | None:
    """Paths of the projector's linear layers, the modules PEFT is to save whole; None where there are none.

    The leaves, not their container: only leaves work in mixed-adapter batches.

    Raises:
        RecipeError: the projector holds weights outside of linear layers, which would be trained and not saved.
    """
    projector = Anatomy.of(model).projector
    if projector is not None:
        linears = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
        inside = {id(parameter) for layer in linears for parameter in layer.parameters()}
        if any(id(parameter) not in inside for parameter in projector.parameters()):
            raise RecipeError(
                "PEFT keeps linear layers beside its own weights, and this host's connectors hold others",
                where="train.projector",
                remedy="train the connectors in a stage of method `projector` before, and leave `projector` out here",
            )
    paths = {id(module): name for name, module in model.named_modules()}
    return _linears([projector], paths) or None if projector is not None else None


def _linears(roots: Iterable[nn.Module], paths: dict[int, str]) -> list[str]:
    """Full paths of the linear layers under ``roots``."""
    return [paths[id(module)] for root in roots for module in root.modules() if isinstance(module, nn.Linear)]


def _pattern(sites: list[str]) -> str:
    """One regular expression that matches exactly ``sites``, with layer numbers folded so that it stays readable."""
    folded = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(site)) for site in sites})
    return "|".join(folded)
