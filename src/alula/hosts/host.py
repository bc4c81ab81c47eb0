"""A host: a stock image-text-to-text model with its processor, loaded strictly and saved atomically."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from alula.codes.processing import CodesProcessor, is_codes_processor
from alula.coding import is_coded, read_coded
from alula.errors import AlulaError, HostError, PathError, UsageError
from alula.files import MODEL_FILES, atomic_directory, check_replaceable, write_json
from alula.hosts.configs import first_line, read_config, suspicion
from alula.hosts.directories import locate, read_json
from alula.hosts.quiet import quiet_loading
from alula.hosts.stills import kind_with_videos, read_with_videos
from alula.seam import DECLARED, NAME, declared, grafted_weights

_MASK = re.compile(r"\.attn\.(masked_)?bias$")  # causal masks, which early GPT-2 checkpoints hold beside the weights


# of a configuration and those of its parts: what is not the same in two states of one host
_TELLING = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "image_size", "patch_size"),
    *("n_embd", "n_layer", "n_head", "d_model", "ffn_dim", "num_layers", "num_heads"),
)


class Host(NamedTuple):
    """A multimodal model and the processor that feeds it; both stock transformers classes."""

    model: PreTrainedModel
    processor: ProcessorMixin


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer itself is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def load_host(source: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None) -> Host:
    """Load any image-text-to-text model with its processor.

    Args:
        source: a directory or a hub id.
        dtype: floating-point type of the weights; None keeps the checkpoint's.

    Returns:
        The host in evaluation mode, on the CPU.

    Raises:
        HostError: no such directory, a missing or broken file (named), weights that do not fill the model or that it
            has no place for (a graft's among them), or a model that takes no images.
    """
    return open_host(locate(source, "host"), dtype=dtype)


def open_host(
    where: str, *, dtype: torch.dtype | str | None, grafted: bool = False, config: PreTrainedConfig | None = None
) -> Host:
    """`load_host` of what `locate` found; with ``grafted``, weights of grafts may lie among the host's.

    Args:
        config: what `read_config` found there, where that has been done already.
    """
    config = read_config(where) if config is None else config
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise HostError(
            f"{config.model_type!r} takes no images",
            where=where,
            remedy="make a host of it: alula.build_host(llm, vision); or alula.load_model to use it as it is",
        )
    model = load_strictly(AutoModelForImageTextToText, where, grafted=grafted, dtype=dtype, config=config)
    return Host(model, read_processor(where, config))


def read_processor(where: str, config: PreTrainedConfig | None = None) -> ProcessorMixin:
    """The processor in a directory or under a hub id; HostError where there is none that can be read.

    Args:
        config: of the model there, where it has been read already.
    """
    if is_codes_processor(where):
        return CodesProcessor.from_pretrained(where)
    try:
        kind = kind_with_videos(where)
        if kind is not None:
            processor = read_with_videos(kind, where)
        else:
            processor = AutoProcessor.from_pretrained(where, backend="pil")
        if hasattr(processor, "tokenizer"):
            # meant for the image processor, but the tokenizer takes `backend` for its own and then denies being fast
            processor.tokenizer = AutoTokenizer.from_pretrained(where, config=config)
    except Exception as error:  # a value of another type fails in whatever line meets it first
        raise HostError(
            f"no processor ({first_line(error)})",
            where=where,
            remedy="look at its processor_config.json (or preprocessor_config.json) and tokenizer_config.json",
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise HostError(
            f"holds a {type(processor).__name__} and no processor", where=where, remedy="restore processor_config.json"
        )
    return processor


def read_tokenizer(where: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or under a hub id; HostError where there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # as for a processor
        raise HostError(
            f"the tokenizer could not be loaded: {first_line(error)}", where=where, remedy="save it beside the weights"
        ) from error


def save_host(host: Host | tuple[Any, Any], directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a host so that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load it; complete or not at all.

    Args:
        host: what `build_host` and `load_host` return, or any pair of a model and its processor.
        directory: made; an earlier state of the host that is there is replaced as a whole.
        overwrite: replace another host, or an adapter, too. Hosts are told apart by their classes and sizes: what is of
            the same is taken for an earlier state, as that of a host which was tuned whole has no weight in common.

    Grafts on it are left out: they have directories of their own. Policies are saved in its config.

    Raises:
        UsageError: a host without its processor, or with an adapter of PEFT on it; ``directory`` holds another model,
            or other things than one.
    """
    if isinstance(host, nn.Module):
        raise UsageError(
            "a host is saved with its processor", where="save_host", remedy="save_host((model, processor), directory)"
        )
    check_replaceable(directory)
    model, processor = host
    model = _whole(model)
    if not overwrite:
        _refuse_another(model, Path(directory))
    weights = model.state_dict()
    own = {name: weight for name, weight in weights.items() if f".{NAME}." not in name}
    with atomic_directory(directory) as partial, quiet_loading():
        model.save_pretrained(partial, state_dict=own if len(own) < len(weights) else None)
        config = read_json(partial / "config.json")
        if config.pop(DECLARED, None) is not None:  # what it says of the grafts that are left out
            write_json(partial / "config.json", config)
        processor.save_pretrained(partial)
    return Path(directory)


def _whole(model: Any) -> PreTrainedModel:
    """The model itself, out of what compiles it or runs it in parallel.

    Raises:
        UsageError: it is no model of transformers, or has an adapter of PEFT on it.
    """
    while not isinstance(model, PreTrainedModel):
        inner = next((found for name in ("_orig_mod", "module") if (found := getattr(model, name, None))), None)
        if hasattr(model, "get_base_model") or inner is None:
            break
        model = inner
    if hasattr(model, "get_base_model"):
        raise UsageError(
            "it has an adapter of PEFT on it, which is no part of a host",
            where="save_host",
            remedy="merge it into the weights first (merge_and_unload), or save it alone by save_pretrained",
        )
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no model of transformers", where="save_host")
    return model


def _refuse_another(model: PreTrainedModel, directory: Path) -> None:
    """Raise a PathError if a model of other classes or sizes stands in ``directory``, naming what differs first."""
    remedy = "name another directory, or replace what is there by save_host(..., overwrite=True)"
    found = [name for name in MODEL_FILES if (directory / name).is_file()]
    if not found:
        return
    if "adapter_config.json" in found:
        raise PathError("holds an adapter, which would be lost", where=str(directory), remedy=remedy)
    try:
        there = read_config(str(directory))
    except HostError as error:
        told = f"holds a model of which nothing is known ({error.message}), and which would be lost"
        raise PathError(told, where=str(directory), remedy=remedy) from error
    now = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    difference = next(_differences(there.to_dict(), now), None)
    if difference is not None:
        key, old, new = difference
        raise PathError(
            f"holds another host, which would be lost: its {key} is {old}, that of this one {new}",
            where=str(directory),
            remedy=remedy,
        )


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The classes and sizes in which two configurations differ, by key, with both values. Not all that was saved names
    its class."""
    for name in (*_TELLING, *(name for name, value in now.items() if isinstance(value, Mapping))):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{key}{name}.")
        elif name in _TELLING and old != new and not (name == "architectures" and None in (old, new)):
            yield f"{key}{name}", old, new


def load_strictly(
    cls: Any, source: str, *, partly: bool = False, grafted: bool = False, **options: Any
) -> PreTrainedModel:
    """``cls.from_pretrained`` that refuses weights which leave a parameter untouched, do not fit or are not used, and
    reads coded ones (`alula.coding`).

    transformers fills such parameters with random values, leaves such weights out, and goes on with a warning.

    Args:
        partly: the checkpoint is of a larger model, of which ``cls`` is a part.
        grafted: weights of grafts that the config declares may be among the host's, for the caller to take.

    Raises:
        HostError: the model cannot be read, parameters are missing or of another shape, or weights are left over.
    """
    if options.get("dtype") is None:
        options["dtype"] = "auto"
    try:
        with quiet_loading():
            if is_coded(source):
                model, info = _from_coded(cls, source, **options)
            else:
                model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except AlulaError:
        raise
    except Exception as error:  # a value of another type in the config fails in whatever line meets it first
        raise HostError(
            f"cannot be loaded ({first_line(error)})",
            where=source,
            remedy=suspicion(source) or "look at its config.json and generation_config.json",
        ) from error
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    grafts = grafted_weights(info["unexpected_keys"])
    known = {name for weights in grafts.values() for name in weights.values()}
    known |= {name for name in info["unexpected_keys"] if _MASK.search(name)}
    unused = [] if partly else sorted(set(info["unexpected_keys"]) - known)
    if missing:
        packed = f", and hold {unused[0]!r} and others that it does not know" if unused else ""
        raise HostError(
            f"the weights lack {len(missing)} parameters, the first {missing[0]!r}{packed}",
            where=source,
            remedy="if they are compressed, decompress them with the tool that wrote them" if unused else None,
        )
    if mismatched:
        raise HostError(f"{len(mismatched)} parameters have another shape: {mismatched[0]}", where=source)
    if unused:
        raise HostError(
            f"the model has no place for {len(unused)} of the weights, the first {unused[0]!r}",
            where=source,
            remedy="load it with the class that wrote it, and save from there what is wanted",
        )
    if strangers := sorted(grafts.keys() - declared(model.config).keys()):
        raise HostError(
            f"the weights hold the graft {', '.join(map(repr, strangers))}, and config.json does not say with which "
            "settings it was attached",
            where=source,
            remedy="load the host it was attached to, attach it with its settings (alula.attach), have the model load "
            "these weights (load_state_dict), and write it by alula.save_adapter",
        )
    if grafts and not grafted:
        raise HostError(
            f"the weights hold the graft {', '.join(map(repr, sorted(grafts)))}, which would be left out",
            where=source,
            remedy="alula.load_model loads both; then save_adapter writes the graft and save_host the host by itself",
        )
    return model.eval()


def _from_coded(
    cls: Any, source: str, *, config: PreTrainedConfig | None = None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``cls.from_pretrained`` of a directory with coded weights."""
    config = read_config(source) if config is None else config
    if config.__class__ not in cls._model_mapping:
        raise HostError(f"{cls.__name__} has no model of type {config.model_type!r}", where=source)
    if (Path(source) / "generation_config.json").is_file():
        options["generation_config"] = GenerationConfig.from_pretrained(source)
    kind: Any = cls._model_mapping[type(config)]
    model, info = kind.from_pretrained(
        None, config=config, state_dict=read_coded(source), output_loading_info=True, **options
    )
    model.config.name_or_path = model.name_or_path = source
    return model, info
