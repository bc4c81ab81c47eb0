"""Which parameters a stage trains: part names to parameters, and the table that says so.

A part is `projector`, `llm`, `tower`, `lora`, `embeddings`, `prefix`, one connector of several (`connector.video`), or
one of a graft's groups (`wings.visual`, ...). Everything in no requested part is frozen. No parameter is in two parts,
and a requested part without parameters is an error: nothing is ever trained, or left untrained, by accident.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from alula.anatomy import HostParts
from alula.errors import AlulaError, RecipeError
from alula.grafts.checkpoint import with_current_names
from alula.hosts.multimodal import Connectors
from alula.hosts.universal import UniversalConnectors

Named = list[tuple[str, nn.Parameter]]


def find_parts(
    model: nn.Module, parts: Iterable[str], groups: Mapping[str, Iterable[nn.Parameter]] | None = None
) -> dict[str, Named]:
    """The named parameters of each of ``parts``, in the model's own order.

    Args:
        model: the model that will be trained, PEFT wrapped or not.
        parts: names of the wanted parts.
        groups: parameter groups of a graft inside the model (`Graft.parameters_by_part()`).

    Raises:
        RecipeError: a part matches no parameter of this model, or two parts share one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    available = _available(model, groups or {}, names)
    found: dict[str, Named] = {}
    owner: dict[str, str] = {}
    for part in parts:
        named = available.get(part, [])
        if not named:
            there = ", ".join(f"`{name}`" for name, items in available.items() if items)
            raise RecipeError(
                f"the part `{part}` matches no parameter of {type(HostParts.of(model).host).__name__}",
                where="train",
                remedy=f"this model has {there or 'no trainable part'}",
            )
        for name, _ in named:
            if name in owner:
                raise RecipeError(f"the parts `{owner[name]}` and `{part}` both hold {name}", where="train")
            owner[name] = part
        found[part] = named
    return found


def select(model: nn.Module, parts: Mapping[str, Named]) -> None:
    """Make exactly ``parts`` of ``model`` trainable and everything else frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for named in parts.values():
        for _, parameter in named:
            parameter.requires_grad_(True)


def gather_trained(model: nn.Module, parts: Mapping[str, Named]) -> dict[str, Tensor]:
    """The trained weights by parameter name, whole and on the CPU; every process must call it.

    Args:
        model: the model, sharded or not.
        parts: its trained parameters; names are the model's own.
    """
    own = dict(model.named_parameters())
    gathered = {}
    for named in parts.values():
        for name, _ in named:
            weight = own[name].detach()
            full = weight.full_tensor() if isinstance(weight, DTensor) else weight
            gathered[name] = full.cpu().contiguous()
    return gathered


def load_trained(model: nn.Module, parts: Mapping[str, Named], tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the trained parameters of ``model``; those that an earlier version named are read, too.

    Raises:
        AlulaError: a trained parameter is missing, another one is there, or a shape differs.
    """
    tensors = with_current_names(model, tensors)
    wanted = {name for named in parts.values() for name, _ in named}
    if wanted != set(tensors):
        differing = sorted(wanted ^ set(tensors))
        raise AlulaError(
            f"the checkpoint and this stage differ in {len(differing)} parameters, the first {differing[0]}"
        )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise AlulaError(f"{name} is {tuple(own[name].shape)} here and {tuple(tensor.shape)} in the checkpoint")
            weight = own[name]
            if isinstance(weight, DTensor):
                weight.copy_(distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements))
            else:
                weight.copy_(tensor)


def _available(
    model: nn.Module, groups: Mapping[str, Iterable[nn.Parameter]], names: Mapping[int, str]
) -> dict[str, Named]:
    anatomy = HostParts.of(model)
    grafted = {id(parameter) for group in groups.values() for parameter in group}
    lora = {id(parameter) for name, parameter in model.named_parameters() if ".lora_" in name}
    # PEFT keeps the original beside a trained copy of every module it saves whole; only the copy is used and saved
    shadowed = {id(parameter) for name, parameter in model.named_parameters() if ".original_module." in name}

    def own(modules: Iterable[nn.Module | None]) -> Named:
        wanted = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
        wanted -= grafted | lora | shadowed
        return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in wanted]

    parts: dict[str, Named] = {
        "projector": own([anatomy.projector]),
        "llm": own([anatomy.decoder, anatomy.head]),
        "tower": own([anatomy.tower]),
        "embeddings": own([anatomy.embeddings, anatomy.head]),
        "lora": [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in lora],
    }
    parts["prefix"] = [
        (name, parameter) for name, parameter in model.named_parameters() if name.startswith("prompt_encoder.")
    ]
    if isinstance(anatomy.projector, Connectors | UniversalConnectors):
        parts |= {f"connector.{name}": own([connector]) for name, connector in anatomy.projector.items()}
    for group, parameters in groups.items():
        parts[group] = [(names[id(parameter)], parameter) for parameter in parameters]
    return parts


@dataclass(frozen=True)
class PartRow:
    """One row of the trainable-parameter table."""

    part: str
    tensors: int
    parameters: int
    learning_rate: float
    decayed: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class PartTable:
    """What a stage trains, and how much of the model that is."""

    rows: tuple[PartRow, ...]
    trainable: int
    total: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def tabulate(
    model: nn.Module, parts: Mapping[str, Named], rates: Mapping[str, float], decayed: Iterable[str]
) -> PartTable:
    """The table of ``parts`` with their peak learning rates; ``decayed`` names the weight-decayed parameters."""
    decayed = set(decayed)
    rows = tuple(
        PartRow(
            part=part,
            tensors=len(named),
            parameters=sum(parameter.numel() for _, parameter in named),
            learning_rate=rates[part],
            decayed=sum(parameter.numel() for name, parameter in named if name in decayed),
            names=tuple(name for name, _ in named),
        )
        for part, named in parts.items()
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    return PartTable(rows=rows, trainable=sum(row.parameters for row in rows), total=total)
