"""Attaching grafts to hosts and taking them off again."""

from __future__ import annotations

from typing import Any

from torch import nn

from alula.errors import UsageError
from alula.grafts.base import Graft, GraftConfig
from alula.grafts.registry import kind_of
from alula.seam import Handle, declare, find, install


def attach(model: nn.Module, config: GraftConfig, name: str | None = None) -> Graft:
    """Attach a fresh graft to `model`; what grafts add starts at exactly zero, so the host answers as before.

    MKS2 takes the place of a part of the host from the start, and says for itself how it begins (`MKS2Config`).

    Args:
        model: a host (PEFT wrappers are looked through). Nothing is frozen: choose what trains through
            `Graft.parameters_by_part`.
        config: e.g. `WingsConfig(rank=64)`.
        name: to tell several grafts apart; the graft's type by default.

    Returns:
        The handle. The model is used as ever: `model(**inputs)`, `model.generate(**inputs)`.

    Raises:
        UsageError: the name is taken or cannot be one, or the config does not fit the host. HostError: an unknown class
            of host.
    """
    if not isinstance(config, GraftConfig):
        raise UsageError(
            f"a {type(config).__name__} is no graft's settings", remedy="give them as alula.WingsConfig(rank=64)"
        )
    kind = kind_of(config.graft_type)
    if kind is None or not isinstance(config, kind.config):
        raise UsageError(
            f"no graft is registered for settings of type {type(config).__name__}",
            remedy="call alula.grafts.register(config class, graft class) in the graft's package",
        )
    name = config.graft_type if name is None else name
    check_name(name)
    seam = install(model, name)
    try:
        graft = kind.graft(seam, name, config)
        seam.set_owner(name, graft)
        graft.grow(kind.graft.indices(seam.anatomy, config))
    except BaseException:
        graft_or_none = seam.owners.get(name)
        if isinstance(graft_or_none, Graft):
            graft_or_none.detach()
        else:
            seam.release(name)
        raise
    declare(seam.anatomy.host, name, {"alula_type": config.graft_type, "config": config.to_dict()})
    return graft


def compile_layers(model: nn.Module, **options: Any) -> Handle:
    """Have the decoder layers of a model with grafts run compiled, with what the grafts add to them.

    One graph serves all layers, all lengths and all steps: prompts, steps and training have one each, for one sample
    and for several. Wings, experts and MKS2 are compiled; in forwards in which something stands in a layer that is not
    (policies, probes that look inside of it, hooks of others at its modules, gradient checkpointing, the prompt into a
    cache of fixed size), that layer runs as it is written, which is logged once. Text alone is computed as the compiled
    host computes it.

    Args:
        model: a host with grafts.
        options: of `torch.compile`, such as ``mode="reduce-overhead"``; `dynamic` is True where it is not given,
            without which every length is compiled anew. Not ``fullgraph``: graphs are whole.

    Returns:
        A handle whose `remove` has layers run as they are written again. Taking off the last of what is attached
        (grafts, policies, probes) does so too.

    Raises:
        UsageError: the model has no graft, or is compiled already; or an option that is not free. HostError: its layers
            cannot be compiled with grafts.
    """
    if "fullgraph" in options:
        raise UsageError("layers are compiled in whole graphs, always", remedy="leave fullgraph out")
    seam = find(model)
    if seam is None or not grafts_of(model):
        raise UsageError("the model has no graft", remedy="compile its layers as torch does: layer.compile()")
    return seam.compile_layers(**{"dynamic": True, **options})


def check_name(name: str) -> None:
    """Raise a UsageError unless `name` can name a graft."""
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(f"{name!r} cannot name a graft", remedy="use letters, digits and underscores")
    if hasattr(nn.ModuleDict(), name):  # the graft would become an attribute of one
        raise UsageError(
            f"{name!r} cannot name a graft: torch's containers of modules have an attribute of that name",
            remedy=f"choose another name, such as {name + '_graft'!r}",
        )


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the named graft (or the only one) off `model`; the host is bit for bit what it was.

    Raises:
        UsageError: no graft of that name, or several and none named.
    """
    get(model, name).detach()


def grafts_of(model: nn.Module) -> dict[str, Graft]:
    """The grafts attached to `model`, by name."""
    seam = find(model)
    return {} if seam is None else {n: graft for n, graft in seam.owners.items() if isinstance(graft, Graft)}


def get(model: nn.Module, name: str | None = None) -> Graft:
    """The named graft of `model`, or its only one.

    Raises:
        UsageError: no such graft, or several and none named.
    """
    attached = grafts_of(model)
    if not attached:
        raise UsageError("the model has no graft", remedy="attach one first: alula.attach(model, alula.WingsConfig())")
    listing = ", ".join(attached)
    if name is None and len(attached) != 1:
        raise UsageError(f"name the graft: the model has {listing}", remedy="pass name=...")
    if name is not None and name not in attached:
        raise UsageError(f"no graft named {name!r} on this model", remedy=f"attached: {listing}")
    return attached[name] if name is not None else next(iter(attached.values()))
