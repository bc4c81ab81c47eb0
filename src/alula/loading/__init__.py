"""One loader for every directory alula or its neighbours write: hosts, text LLMs, PEFT adapters, alula adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from alula.anatomy import unwrap
from alula.errors import AdapterError, UsageError
from alula.files import recovered
from alula.grafts import load_adapter
from alula.grafts.checkpoint import restore
from alula.grafts.storage import CONFIG_FILE, check_fact, read_facts
from alula.hosts import names
from alula.hosts.configs import read_config
from alula.hosts.directories import locate
from alula.hosts.host import load_strictly, open_host, read_tokenizer
from alula.loading.beside import check_vocabulary, processor_beside
from alula.loading.peft import load_peft
from alula.loading.sharing import sharing, written_by
from alula.policies import Policy, policies_from, put_policies, read_policies
from alula.seam import POLICIES

__all__ = ["Loaded", "base_of", "load_model", "load_peft", "put_adapter", "sharing", "written_by"]


class Loaded(NamedTuple):
    """A model ready to use and what prepares its inputs (a processor, or a tokenizer for a text-only model)."""

    model: Any
    processor: Any


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    policies: str | os.PathLike[str] | Mapping[str, Policy] | None = None,
) -> Loaded:
    """Load a model directory or hub id of any of these kinds, in eval mode.

    - an image-text-to-text host, stock transformers layout; grafts and policies that stock ways of saving left in it
      come back;
    - a text LLM, with its tokenizer as the processor; or the name of one that a package brings, such as "fledgling";
    - a PEFT adapter directory, or an alula adapter directory: the base it names is loaded and the adapter put on,
      strictly (a relative base path counts from the adapter's directory). A processor, tokenizer or chat template
      beside the adapter is the one it was trained with, and comes before the base's.

    Args:
        policies: to put on the model for good, in place of those it was saved with: a file that `save_policies` wrote,
            or policies by name; ``{}``: none.

    Raises:
        HostError: nothing loadable there. AdapterError: an adapter that does not fit its base completely, or has tokens
            that the model has no embeddings for; policies that it was saved with and does not take. UsageError:
            `policies` that are none, or that the model does not take.
    """
    wanted = policies if policies is None or isinstance(policies, Mapping) else read_policies(policies)
    path = recovered(names.resolve(str(name), "llm"))
    if (path / CONFIG_FILE).is_file():
        loaded = _load_adapter(path, dtype, with_policies=wanted is None)
    else:
        loaded = _load_plain(str(path) if path.is_dir() else str(name), dtype, with_policies=wanted is None)
    if device is not None:
        loaded.model.to(device)
    if wanted is not None:
        put_policies(loaded.model, wanted)
    loaded.model.eval()
    return loaded


def _put_saved(model: Any, settings: Any, *, where: str) -> None:
    """Put the policies on that a model was saved with."""
    try:
        put_policies(model, policies_from(settings, where=POLICIES))
    except UsageError as error:
        raise AdapterError(
            error.message,
            where=": ".join(filter(None, (where, error.where))),
            remedy=error.remedy or f"take {POLICIES!r} out of it",
        ) from error


def _load_adapter(path: Path, dtype: torch.dtype | str | None, *, with_policies: bool) -> Loaded:
    keeps = with_policies and POLICIES not in read_facts(path)
    base = load_model(base_of(path), dtype=dtype, policies=None if keeps else {})
    return put_adapter(base, path, with_policies=with_policies)


def base_of(path: Path) -> str:
    """Hub id or directory of the model that an adapter's directory names as its base.

    Raises:
        AdapterError: it names none, or one that is not there.
    """
    facts = read_facts(path)
    check_fact(facts, "base_model_name_or_path", str, where=str(path / CONFIG_FILE), optional=True)
    base = facts.get("base_model_name_or_path") or ""
    if not base:
        raise AdapterError(
            "the adapter does not say which model it belongs to",
            where=str(path / CONFIG_FILE),
            remedy="build the host again and alula.load_adapter(model, directory); or save the host by save_host and "
            "name its directory as base when saving, or as base_model_name_or_path here",
        )
    beside = recovered(path / base)
    base = str(beside.resolve()) if beside.is_dir() else base
    if base.startswith((".", os.sep)) and not recovered(base).exists():
        raise AdapterError(
            f"the base it names, {base!r}, is not there (a relative path counts from the adapter's directory)",
            where=str(path / CONFIG_FILE),
            remedy="copy the base along or correct base_model_name_or_path; or load the base from where it is and "
            "put the adapter on: alula.load_adapter(model, directory), or PeftModel.from_pretrained(model, directory)",
        )
    return base


def put_adapter(loaded: Loaded, path: Path, *, with_policies: bool = True) -> Loaded:
    """Put the adapter of a directory, PEFT's or alula's, on the model it belongs to, strictly.

    Args:
        loaded: the base. Its model is changed (for one that is not, see `sharing`).
        path: the adapter's directory.
        with_policies: put the policies on that the adapter was saved with, in place of the base's.

    Raises:
        AdapterError: as `load_model`.
    """
    model, processor = loaded
    facts = read_facts(path)
    own = processor_beside(path, processor)
    if "peft_type" in facts:
        model = load_peft(model, path)
    else:
        load_adapter(model, path)
    if with_policies and POLICIES in facts:
        _put_saved(model, facts[POLICIES], where=str(path / CONFIG_FILE))
    model.eval()
    if own is None:
        return Loaded(model, processor)
    check_vocabulary(unwrap(model), own, processor, where=str(path))
    return Loaded(model, own)


def _load_plain(name: str, dtype: torch.dtype | str | None, *, with_policies: bool) -> Loaded:
    name = locate(name, "model")
    config = read_config(name)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        loaded = Loaded(*open_host(name, dtype=dtype, grafted=True, config=config))
    else:
        model = load_strictly(AutoModelForCausalLM, name, grafted=True, dtype=dtype, config=config)
        loaded = Loaded(model, read_tokenizer(name))
    restore(loaded.model, name)
    if with_policies and hasattr(loaded.model.config, POLICIES):
        _put_saved(loaded.model, getattr(loaded.model.config, POLICIES), where=f"{name}: config.json")
    return loaded
