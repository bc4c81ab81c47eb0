"""Grafts in checkpoints that stock ways of saving wrote: `save_pretrained`, Trainer, its checkpoints.

There a graft's weights lie among the host's, and the host's config says how to attach it (`alula.seam.declared`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from alula.coding import is_coded, read_coded
from alula.errors import AdapterError, UsageError
from alula.files import telling
from alula.grafts.lifecycle import attach, grafts_of
from alula.grafts.registry import graft_types, kind_of
from alula.seam import DECLARED, NAME, declared, grafted_weights

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def restore(model: Any, source: str) -> None:
    """Attach the grafts that a checkpoint holds to `model`, the host that was loaded from it, with their weights.

    Args:
        model: as ``from_pretrained(source)`` gives it.
        source: a directory or hub id.

    Raises:
        AdapterError: the config names a graft whose weights are not there, or one that does not fit. The model is then
            left without it.
    """
    told = declared(model.config)
    stored = _stored(source) if told else {}
    for name in sorted(told):
        where = f"{source}, graft {name!r}"
        if name not in stored:
            raise AdapterError(
                f"config.json says that it is attached ({DECLARED!r}), and its weights are not there",
                where=where,
                remedy=f"take {DECLARED!r} out of config.json to use the host alone",
            )
        facts = told[name] if isinstance(told[name], dict) else {}
        kind, settings = kind_of(facts.get("alula_type")), facts.get("config")
        if kind is None or not isinstance(settings, dict):
            raise AdapterError(
                f"config.json does not say what it is ({json.dumps(told[name])[:80]})",
                where=where,
                remedy=f"{DECLARED!r} there must hold its alula_type ({', '.join(graft_types())}) and config",
            )
        try:
            graft = attach(model, kind.config.from_dict(settings), name)
        except UsageError as error:
            raise AdapterError(
                error.message,
                where=": ".join(filter(None, (where, error.where))),
                remedy=error.remedy or f"write into config.json ({DECLARED!r}) what is meant",
            ) from error
        try:
            with torch.no_grad():
                graft.load_state_dict(graft.config.with_current_names(stored[name], where=where), where=where)
        except BaseException:
            graft.detach()
            raise


def with_current_names(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights by the names of `model`'s parameters, those of its grafts under today's names; see `GraftConfig`."""
    for name, graft in grafts_of(model).items():
        own = {key: value for key, value in weights.items() if f".{NAME}.{name}." in key}
        others = {key: value for key, value in weights.items() if key not in own}
        weights = {**others, **graft.config.with_current_names(own)}
    return weights


def _stored(source: str) -> dict[str, dict[str, Tensor]]:
    """The weights of each graft, by the names of its state dict."""
    found: dict[str, dict[str, Tensor]] = {}
    if is_coded(source):
        coded = read_coded(source)
        named = grafted_weights(coded)
        return {name: {own: coded[key] for own, key in weights.items()} for name, weights in named.items()}
    for shard in _shards(source):
        with telling(shard), safe_open(shard, "pt") as tensors:
            for name, weights in grafted_weights(tensors.keys()).items():
                found.setdefault(name, {}).update({own: tensors.get_tensor(key) for own, key in weights.items()})
    return found


def _shards(source: str) -> Iterator[Path]:
    index = _file(source, _INDEX)
    if index is None:
        single = _file(source, _SINGLE)
        if single is not None:
            yield single
        return
    for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        shard = _file(source, name)
        if shard is not None:
            yield shard


def _file(source: str, name: str) -> Path | None:
    """A file of a directory or of a hub's repository that has been loaded from; None where it has none of that name."""
    silent = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, name, **silent)
    return None if path is None else Path(path)
