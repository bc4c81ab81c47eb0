"""One loader for every directory alula or its neighbours write: hosts, text LLMs, PEFT adapters, alula adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from alula.anatomy import unwrap
from alula.errors import AdapterError
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

__all__ = ["Loaded", "load_model", "load_peft"]


class Loaded(NamedTuple):
    """A model ready to use and what prepares its inputs (a processor, or a tokenizer for a text-only model)."""

    model: Any
    processor: Any


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Loaded:
    """Load a model directory or hub id of any of these kinds, in eval mode.

    - an image-text-to-text host, stock transformers layout; grafts that stock ways of saving left in it come back;
    - a text LLM, with its tokenizer as the processor; or the name of one that a package brings, such as "fledgling";
    - a PEFT adapter directory, or an alula adapter directory: the base it names is loaded and the adapter put on,
      strictly (a relative base path counts from the adapter's directory). A processor, tokenizer or chat template
      beside the adapter is the one it was trained with, and comes before the base's.

    Raises:
        HostError: nothing loadable there. AdapterError: an adapter that does not fit its base completely, or has tokens
            that the model has no embeddings for.
    """
    path = recovered(names.resolve(str(name), "llm"))
    if (path / CONFIG_FILE).is_file():
        loaded = _load_adapter(path, dtype)
    else:
        loaded = _load_plain(str(path) if path.is_dir() else str(name), dtype)
    if device is not None:
        loaded.model.to(device)
    loaded.model.eval()
    return loaded


def _load_adapter(path: Path, dtype: torch.dtype | str | None) -> Loaded:
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
    model, processor = load_model(base, dtype=dtype)
    own = processor_beside(path, processor)
    if "peft_type" in facts:
        model = load_peft(model, path)
    else:
        load_adapter(model, path)
    if own is None:
        return Loaded(model, processor)
    check_vocabulary(unwrap(model), own, processor, where=str(path))
    return Loaded(model, own)


def _load_plain(name: str, dtype: torch.dtype | str | None) -> Loaded:
    name = locate(name, "model")
    if type(read_config(name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        loaded = Loaded(*open_host(name, dtype=dtype, grafted=True))
    else:
        model = load_strictly(AutoModelForCausalLM, name, grafted=True, dtype=dtype)
        loaded = Loaded(model, read_tokenizer(name))
    restore(loaded.model, name)
    return loaded
