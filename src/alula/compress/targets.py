"""The matrices that are compressed, by name, and those that cannot be, refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from alula.anatomy import Anatomy, unwrap
from alula.errors import HostError, UsageError
from alula.weights import linears, other_matrices, target_names

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Matrices = dict[int, dict[str, nn.Linear]]
"""by decoder layer and path below it"""


def matrices(model: nn.Module, targets: Sequence[str], layers: Sequence[int] | None) -> Matrices:
    """The matrices that `targets` mean, in order.

    Args:
        model: a host.
        targets: "attention", "mlp", or names of linear modules.
        layers: decoder layers, negative ones counted from the last; None: all.

    Raises:
        UsageError: a target that names nothing, or no such layer.
        HostError: what is meant is no plain linear layer with a weight of its own: experts fused into one tensor,
            Conv1D, quantized, shared, offloaded, or inside an adapter.
    """
    anatomy = Anatomy.of(model)
    host: Any = unwrap(model)
    if getattr(host, "is_quantized", False) or getattr(host, "hf_quantizer", None) is not None:
        raise HostError(
            f"{type(host).__name__} is quantized: its weights cannot be pruned",
            remedy="load it in bfloat16, float16 or float32, prune, and quantize then",
        )
    wanted, there, found = {*targets}, set[str](), Matrices()
    for index in sorted(anatomy.layer_indices(layers)):
        layer = anatomy.layers[index]
        own = dict(linears(layer))
        named = {path: target_names(anatomy, path) for path in own}
        others = [(path, each) for path, each in other_matrices(layer) if target_names(anatomy, path) & wanted]
        if others:
            path, module = others[0]
            raise HostError(
                f"layers.{index}.{path} is a {type(module).__name__}, whose matrices are no linear layers",
                remedy='name targets without it, such as ("attention",); fused experts and Conv1D are not pruned',
            )
        there |= {name for names in named.values() for name in names}
        found[index] = {path: linear for path, linear in own.items() if named[path] & wanted}
    if missing := [target for target in targets if target not in there]:
        raise UsageError(
            f"targets: {', '.join(missing)} names no linear module in any of the {len(found)} layers",
            remedy=f"there: {', '.join(sorted(there))}",
        )
    found = {index: each for index, each in found.items() if each}
    _check(host, anatomy, found)
    return found


def name_of(index: int, path: str) -> str:
    """What a matrix is called in masks."""
    return f"layers.{index}.{path}"


def _check(host: nn.Module, anatomy: Anatomy, found: Matrices) -> None:
    uses: dict[int, list[str]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for index, each in found.items():
        modules = dict(anatomy.layers[index].named_modules())
        for path, linear in each.items():
            name, weight = name_of(index, path), linear.weight
            if modules.get(path) is not linear:
                raise HostError(
                    f"{name} is inside an adapter",
                    remedy="merge the adapter first (merge_and_unload), or prune before it",
                )
            # quantized weights that call themselves bfloat16, and those split over devices, are made of other tensors
            plain = weight.dtype in _FLOATS and not is_traceable_wrapper_subclass(weight)
            if type(linear) is not nn.Linear or not plain:
                raise HostError(
                    f"{name} is a {type(linear).__name__} with weights of {str(weight.dtype).removeprefix('torch.')}, "
                    "quantized or computed from others",
                    remedy="load the model in bfloat16, float16 or float32, prune, and quantize then",
                )
            if weight.is_meta:
                raise HostError(f"{name} is not in memory (offloaded)", remedy="load the model without offloading")
            if len(uses[id(weight)]) > 1:
                raise HostError(
                    f"{name} is the same tensor as {next(n for n in uses[id(weight)][::-1])}: pruning one prunes both",
                    remedy="name targets without it",
                )
