"""One loader for every directory alula or its neighbours write: hosts, text LLMs, PEFT adapters, alula adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from alula.errors import AdapterError
from alula.files import recovered
from alula.grafts import load
from alula.grafts.checkpoint import restore
from alula.grafts.storage import CONFIG_FILE, read_facts
from alula.hosts import fledgling
from alula.hosts.configs import read_config
from alula.hosts.directories import locate
from alula.hosts.host import load_strictly, open_host, read_tokenizer
from alula.hosts.prompted import PromptedModel, check_prompt

_PROMPT = "prompt_embeddings"


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
    - a text LLM, with its tokenizer as the processor; "fledgling" names the one that ships with alula;
    - a PEFT adapter directory, or an alula adapter directory: the base it names is loaded and the adapter put on,
      strictly (a relative base path counts from the adapter's directory).

    Raises:
        HostError: nothing loadable there. AdapterError: an adapter that does not fit its base completely.
    """
    path = recovered(fledgling.resolve(str(name), "llm"))
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
    base = facts.get("base_model_name_or_path") or ""
    if not base:
        raise AdapterError(
            "the adapter does not say which model it belongs to",
            where=str(path / CONFIG_FILE),
            remedy="build the host again and alula.load(model, directory); or save the host by save_host and "
            "name its directory as base when saving, or as base_model_name_or_path here",
        )
    beside = recovered(path / base)
    base = str(beside.resolve()) if beside.is_dir() else base
    model, processor = load_model(base, dtype=dtype)
    if "peft_type" in facts:
        return Loaded(load_peft(model, path), processor)
    load(model, path)
    return Loaded(model, processor)


def load_peft(model: Any, path: Path, *, trainable: bool = False) -> PeftModel:
    """Put a PEFT adapter on, refusing what PEFT only warns about: weights that are missing or not used.

    Args:
        model: the base, in eval mode.
        path: the adapter's directory.
        trainable: to go on training it.

    Raises:
        AdapterError: it does not fit completely, or a learned prompt that `generate` loses or repeats. HostError: a
            learned prompt on a host that it cannot be put in front of.
    """
    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = not trainable
    if trainable and getattr(config, "prefix_projection", False):
        raise AdapterError(
            "its prefix was saved without the projection that made it", where=str(path), remedy="train a new one"
        )
    peft_model = PromptedModel(model, config) if config.is_prompt_learning else PeftModel(model, config)
    weights = load_peft_weights(str(path), device="cpu")
    # PEFT puts these into the prompt encoder by itself, fails where they are missing, and still calls them unexpected
    prompt = {_PROMPT} if config.is_prompt_learning else set()
    if not prompt <= weights.keys():
        raise AdapterError(f"the weights lack {_PROMPT}", where=str(path), remedy="copy the whole directory")
    result: Any = set_peft_model_state_dict(peft_model, weights)
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    unused = [key for key in result.unexpected_keys if key not in prompt]
    for verdict, keys in (("missing", missing), ("not used", unused)):
        if keys:
            raise AdapterError(
                f"{len(keys)} weights are {verdict}: {', '.join(sorted(keys)[:5])}",
                where=str(path),
                remedy="load the adapter into the base it was trained on",
            )
    if config.is_prompt_learning:
        check_prompt(peft_model.eval(), where=str(path))
    return peft_model


def _load_plain(name: str, dtype: torch.dtype | str | None) -> Loaded:
    name = locate(name, "model")
    if type(read_config(name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        loaded = Loaded(*open_host(name, dtype=dtype, grafted=True))
    else:
        model = load_strictly(AutoModelForCausalLM, name, grafted=True, dtype=dtype)
        loaded = Loaded(model, read_tokenizer(name))
    restore(loaded.model, name)
    return loaded
