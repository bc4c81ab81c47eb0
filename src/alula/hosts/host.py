"""A host: a stock image-text-to-text model with its processor, loaded strictly and saved atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from alula.errors import HostError
from alula.files import atomic_directory
from alula.hosts.directories import locate
from alula.hosts.quiet import quiet_loading
from alula.seam import NAME


class Host(NamedTuple):
    """A multimodal model and the processor that feeds it; both stock transformers classes."""

    model: PreTrainedModel
    processor: ProcessorMixin


def load_host(source: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None) -> Host:
    """Load any image-text-to-text model with its processor.

    Args:
        source: a directory or a hub id.
        dtype: floating-point type of the weights; None keeps the checkpoint's.

    Returns:
        The host in evaluation mode, on the CPU.

    Raises:
        HostError: no such directory, a missing or broken file (named), weights that do not fill the model, or a
            model that takes no images.
    """
    where = locate(source, "host")
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise HostError(f"no model configuration ({first_line(error)})", where=where) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise HostError(
            f"{config.model_type!r} takes no images",
            where=where,
            remedy="make a host of it: alula.build_host(llm, vision); or alula.load_model to use it as it is",
        )
    model = load_strictly(AutoModelForImageTextToText, where, dtype=dtype)
    try:
        processor = AutoProcessor.from_pretrained(where, backend="pil")
        if hasattr(processor, "tokenizer"):
            # meant for the image processor, but the tokenizer takes `backend` for its own and then denies being fast
            processor.tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(f"no processor ({first_line(error)})", where=where) from error
    if not isinstance(processor, ProcessorMixin):
        raise HostError(
            f"holds a {type(processor).__name__} and no processor", where=where, remedy="restore processor_config.json"
        )
    return Host(model, processor)


def save_host(host: Host | tuple[Any, Any], directory: str | os.PathLike[str]) -> Path:
    """Save a host so that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load it; complete or not at all.

    Args:
        host: what `build_host` and `load_host` return, or any pair of a model and its processor.
        directory: made; a model that is there is replaced as a whole.

    Grafts on it are left out: they have directories of their own.
    """
    model, processor = host
    weights = model.state_dict()
    own = {name: weight for name, weight in weights.items() if f".{NAME}." not in name}
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, state_dict=own if len(own) < len(weights) else None)
        processor.save_pretrained(partial)
    return Path(directory)


def load_strictly(cls: Any, source: str, **options: Any) -> PreTrainedModel:
    """``cls.from_pretrained`` that refuses weights which leave a parameter untouched or do not fit.

    transformers fills such parameters with random values and goes on with a warning.

    Raises:
        HostError: the model cannot be read, or parameters are missing or of another shape.
    """
    if options.get("dtype") is None:
        options["dtype"] = "auto"
    try:
        with quiet_loading():
            model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise HostError(f"cannot be loaded ({first_line(error)})", where=source) from error
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise HostError(f"the weights lack {len(missing)} parameters, the first {missing[0]!r}", where=source)
    if mismatched:
        raise HostError(f"{len(mismatched)} parameters have another shape: {mismatched[0]}", where=source)
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's text; transformers' messages run over many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
