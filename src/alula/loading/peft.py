"""PEFT adapters, put on strictly: what PEFT warns about, or says in a traceback, is refused by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from alula.errors import AdapterError, AlulaError
from alula.files import regular
from alula.grafts.base import check_values
from alula.grafts.storage import CONFIG_FILE, WEIGHTS_FILE, read_facts
from alula.hosts.configs import first_line
from alula.hosts.prompted import PromptedModel, check_prompt
from alula.hosts.quiet import quiet_loading

_PROMPT = "prompt_embeddings"
_PICKLED = "adapter_model.bin"
_INSIDE = "base_model.model."  # where PEFT's names find the base
# what PEFT may call a whole matrix of embeddings, behind the module's path
_WHOLE = ("", "modules_to_save.", "original_module.", "base_layer.", "token_adapter.base_layer.")


def load_peft(model: Any, path: Path, *, trainable: bool = False) -> PeftModel:
    """Put a PEFT adapter on, refusing what PEFT only warns about: weights that are missing or not used.

    Where the adapter holds whole matrices of embeddings, of another length than the base's, those are resized first.

    Args:
        model: the base, in eval mode.
        path: the adapter's directory.
        trainable: to go on training it.

    Raises:
        AdapterError: it cannot be read, does not fit completely, holds NaN or what is no weight, or is a learned prompt
            that `generate` loses or repeats, or a LoRA that goes by tokens of the prompt. HostError: a learned prompt
            on a host that it cannot be put in front of.
    """
    where = str(path)
    config = _read_config(path)
    config.inference_mode = not trainable
    if trainable and getattr(config, "prefix_projection", False):
        raise AdapterError(
            "its prefix was saved without the projection that made it", where=where, remedy="train a new one"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise AdapterError(
            "it holds from its invocation tokens on (activated LoRA), for which PEFT's class for language models looks "
            "in every prompt: put on by alula it would do nothing",
            where=where,
            remedy="use it by PEFT, AutoPeftModelForCausalLM; or train a LoRA",
        )
    weights = _read_weights(path)
    _fit_embeddings(model, config, weights, where)
    # PEFT puts these into the prompt encoder by itself, fails where they are missing, and still calls them unexpected
    prompt = {_PROMPT} if config.is_prompt_learning else set()
    if not prompt <= weights.keys():
        raise AdapterError(f"the weights lack {_PROMPT}", where=where, remedy="copy the whole directory")
    try:
        peft_model = PromptedModel(model, config) if config.is_prompt_learning else PeftModel(model, config)
        known = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    except AlulaError:
        raise
    except Exception as error:  # whatever a setting that does not fit meets first
        raise AdapterError(
            f"PEFT cannot put it on this base ({first_line(error)})",
            where=str(path / CONFIG_FILE),
            remedy="load the adapter into the base it was trained on, or save it again",
        ) from error
    check_values({name: known.get(name, torch.empty(0)) for name in weights}, weights, where=where)
    try:
        result: Any = set_peft_model_state_dict(peft_model, weights)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"the weights lack {said}" if isinstance(error, KeyError) else f"its weights do not fit ({said})",
            where=where,
            remedy="load the adapter into the base it was trained on",
        ) from error
    missing = _missing(peft_model, result.missing_keys)
    unused = _unused(weights, set(result.unexpected_keys) - prompt)
    for verdict, keys in (("missing", missing), ("not used", unused)):
        if keys:
            raise AdapterError(
                f"{len(keys)} weights are {verdict}: {', '.join(keys[:5])}",
                where=where,
                remedy="load the adapter into the base it was trained on",
            )
    if config.is_prompt_learning:
        check_prompt(peft_model.eval(), where=where)
    return peft_model


def _missing(peft_model: PeftModel, names: Iterable[str]) -> list[str]:
    """Which of the parameters that were not given are the adapter's; one that is shared need be given once."""
    marks = ("modules_to_save", "trainable_tokens_delta", getattr(peft_model.base_model, "prefix", None) or "lora_")
    held = dict(peft_model.named_parameters(remove_duplicate=False))
    lacking = set(names)
    given = {id(parameter) for name, parameter in held.items() if name not in lacking}
    return sorted(name for name in lacking if any(mark in name for mark in marks) and id(held.get(name)) not in given)


def _unused(weights: Mapping[str, Tensor], names: set[str]) -> list[str]:
    """Which of the weights that had no place say something: PEFT also writes embeddings under two names."""

    def said(name: str) -> bool:
        value = weights.get(name)
        return value is not None and any(
            torch.equal(value, other)
            for key, other in weights.items()
            if key not in names and other.shape == value.shape
        )

    repeats = {name for name in names if ("modules_to_save" in name or "token_adapter" in name) and said(name)}
    return sorted(names - repeats)


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> PeftConfig:
    facts, where = read_facts(path), str(path / CONFIG_FILE)
    try:
        config = PeftConfig.from_pretrained(str(path))
        _check_types(config, facts, where)
    except AdapterError:
        raise
    except Exception as error:  # a value of another type fails in whatever line meets it first
        raise AdapterError(
            f"PEFT cannot read it ({first_line(error)})", where=where, remedy="save the adapter again"
        ) from error
    return config


def _check_types(config: PeftConfig, facts: Mapping[str, Any], where: str) -> None:
    """Raise an AdapterError for a setting that is of another JSON type than its field: PEFT takes any."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = facts.get(field.name, field.default)
        kinds = _json_types(hints.get(field.name, Any))
        if field.name in facts and value != field.default and kinds and type(value) not in kinds:
            usual = ", ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in kinds))
            raise AdapterError(
                f"{field.name!r} is {str(value)[:80]!r}, of another type ({usual})",
                where=where,
                remedy="save the adapter again, or write there what belongs there",
            )


def _json_types(hint: Any) -> set[type]:
    """The types a value of ``hint`` may have when it was read from JSON; empty where anything may be."""
    origin = get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        each = [_json_types(part) for part in get_args(hint)]
        return set().union(*each) if all(each) else set()
    if origin is typing.Literal:
        return {type(value) for value in get_args(hint)}
    if origin in (int, float):
        return {int, float}
    if origin in (str, bool, dict, type(None)):
        return {origin}
    if origin in (list, tuple, set):
        return {list}
    if isinstance(origin, type) and issubclass(origin, Enum):
        return {str}
    if dataclasses.is_dataclass(origin):
        return {dict}
    return set()


def _read_weights(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS_FILE
    if not file.exists():
        file = path / _PICKLED
    if not file.exists():
        raise AdapterError("the weights are missing", where=str(path / WEIGHTS_FILE), remedy="copy the whole directory")
    regular(file)
    try:
        return load_peft_weights(str(path), device="cpu")
    except Exception as error:  # as many kinds as there are formats
        raise AdapterError(
            f"damaged weights: {first_line(error)}", where=str(file), remedy="copy or save the adapter again"
        ) from error


# -- embeddings -------------------------------------------------------------------------------------------------------


def _fit_embeddings(model: Any, config: PeftConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Resize the base's embeddings to those the adapter holds whole; AdapterError where it holds only some of them."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    have = int(embeddings.weight.shape[0])
    paths = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    places = {paths[id(module)]: module for module in (embeddings, head) if module is not None}
    rows = {path: _rows(weights, path) for path in places}
    given = {count for count in rows.values() if count is not None}
    if given <= {have}:
        return
    if head is not None and head.weight is embeddings.weight and not _copied(config, paths[id(embeddings)]):
        rows.pop(paths[id(head)])  # tied: what the embeddings get is its own
    lacking = sorted(path for path, count in rows.items() if count is None)
    if lacking or len(given) != 1:
        raise AdapterError(
            f"it was trained on a base with {max(given)} token embeddings, this one has {have}, and the adapter "
            f"does not hold all that was resized ({', '.join(lacking) or 'two lengths'})",
            where=where,
            remedy="save the resized base (save_host, save_pretrained) and name its directory as "
            'base_model_name_or_path; or train with modules_to_save=["embed_tokens", "lm_head"]',
        )
    with quiet_loading():
        model.resize_token_embeddings(given.pop(), mean_resizing=False)


def _rows(weights: Mapping[str, Tensor], path: str) -> int | None:
    """Rows of the matrix at ``path`` of the base if the adapter holds it whole."""
    for part in _WHOLE:
        stored = weights.get(f"{_INSIDE}{path}.{part}weight")
        if stored is not None and stored.dim() == 2:
            return int(stored.shape[0])
    return None


def _copied(config: PeftConfig, path: str) -> bool:
    """Whether the adapter holds a trained copy of a module, beside the module itself."""
    return any(path == name or path.endswith(f".{name}") for name in getattr(config, "modules_to_save", None) or ())
