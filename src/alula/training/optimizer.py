"""AdamW with one learning rate per part and weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from alula.training.parts import Named

_FUSED = ("cuda", "cpu")
"""devices that update a parameter in one kernel, as transformers' Trainer does by default"""


def decayed_names(model: nn.Module, parts: Mapping[str, Named]) -> set[str]:
    """Names of the trained parameters that weight decay applies to.

    Excluded are norms (by module type as well as by rank: their gains are vectors), biases, and every other parameter
    with fewer than two axes, such as gates and router constants. Embeddings count as matrices, as in GPT and LLaVA.
    """
    norms = {
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    return {
        name
        for named in parts.values()
        for name, parameter in named
        if parameter.ndim >= 2 and name not in norms and not name.endswith("bias")
    }


def parameter_groups(
    model: nn.Module, parts: Mapping[str, Named], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: per part at most two, decayed and not; each carries its part's name under `"part"`."""
    decayed = decayed_names(model, parts)
    groups: list[dict[str, Any]] = []
    for part, named in parts.items():
        for decay, members in (
            (weight_decay, [parameter for name, parameter in named if name in decayed]),
            (0.0, [parameter for name, parameter in named if name not in decayed]),
        ):
            if members:
                groups.append({"params": members, "lr": rates[part], "weight_decay": decay, "part": part})
    return groups


def build_optimizer(
    model: nn.Module,
    parts: Mapping[str, Named],
    rates: Mapping[str, float],
    *,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over ``parts``, with the peak rate of each part as its groups' `lr`."""
    groups = parameter_groups(model, parts, rates, weight_decay)
    trained = [parameter for group in groups for parameter in group["params"]]
    # the kernel takes memory for one row: of a view with gaps, as *.bin files may hold, it would change what is between
    fused = all(parameter.device.type in _FUSED and parameter.is_contiguous() for parameter in trained)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused or None)


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Part -> learning rate of the coming step."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}
