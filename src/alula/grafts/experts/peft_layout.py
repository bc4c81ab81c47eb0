"""Experts as a LoRA in PEFT's layout, for servers that put a LoRA on requests with images and no others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from alula.anatomy import unwrap
from alula.errors import UsageError
from alula.files import atomic_directory
from alula.grafts.experts.graft import ExpertsGraft, LayerExperts
from alula.grafts.lifecycle import get
from alula.grafts.linears import path_of
from alula.grafts.storage import check_adapter_replaceable


def export_lora(model: nn.Module, directory: str | os.PathLike[str], *, name: str = "experts") -> Path:
    """Write experts that act from the first image on as a LoRA adapter that PEFT loads.

    The LoRA acts on every token it is put on, those before the first image too: a prompt that begins with its image
    gets what alula computes; of words before the image that is so only where the server leaves them alone.

    Args:
        model: the grafted host.
        directory: made; what is there is replaced as a whole.
        name: under which the experts are attached.

    Raises:
        UsageError: no such graft, or experts that a LoRA cannot be: for image tokens only, or full matrices;
            ``directory`` holds something else than a LoRA.
    """
    graft = get(model, name)
    if not isinstance(graft, ExpertsGraft):
        raise UsageError(f"{name!r} is a {type(graft).__name__}, no experts", where="export_lora")
    config = graft.config
    if config.tokens != "seen" or config.rank is None:
        raise UsageError(
            "only low-rank experts that act from the first image on are a LoRA",
            where="export_lora",
            remedy='train them with tokens="seen" and a rank, or keep them as an alula adapter: alula.save_adapter',
        )
    host = unwrap(model)
    names = {id(layer): path for path, layer in host.named_modules()}
    weights: dict[str, Tensor] = {}
    paths = []
    for index, layer in graft.layers.items():
        for key, expert in cast(LayerExperts, layer).experts.items():
            path = f"{names[id(graft.seam.anatomy.layers[index])]}.{path_of(key)}"
            paths.append(path)
            for factor, letter in (("down", "A"), ("up", "B")):
                value = expert.get_parameter(factor).detach().contiguous().cpu()
                weights[f"base_model.model.{path}.lora_{letter}.weight"] = value
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]
        target_modules=sorted(paths),
        base_model_name_or_path=str(getattr(host, "name_or_path", "") or ""),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    target = Path(directory)
    check_adapter_replaceable(target, "LORA")
    with atomic_directory(target) as partial:
        lora.save_pretrained(str(partial))
        save_file(weights, partial / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    return target
