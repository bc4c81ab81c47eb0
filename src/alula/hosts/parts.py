"""The parts of a host: language models and vision towers, from whatever a user has in hand."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from alula.errors import HostError, UsageError
from alula.hosts import names
from alula.hosts.configs import first_line, read_config
from alula.hosts.custom import CustomTower
from alula.hosts.directories import locate
from alula.hosts.host import load_strictly
from alula.hosts.quiet import quiet_loading
from alula.hosts.towers import family, fit_image_processor

logger = logging.getLogger(__name__)

Part = str | os.PathLike[str] | PreTrainedModel | PreTrainedConfig
VisionSource = Part | nn.Module


@dataclass(frozen=True)
class LanguagePart:
    """A causal language model, the user's own or freshly loaded, and a tokenizer that is ours to extend."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_embeddings(self) -> int:
        """Rows of its embedding matrix, which may be more than the tokenizer has tokens."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])


@dataclass(frozen=True)
class VisionPart:
    """A vision tower and the image processor that feeds it."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor


def language_part(
    source: Part, tokenizer: PreTrainedTokenizerBase | str | None, dtype: torch.dtype | None, seed: int
) -> LanguagePart:
    """The language model a host is built on.

    Args:
        source: hub id, directory, "fledgling", loaded model (used as it is), or configuration (random weights from
            ``seed``).
        tokenizer: its tokenizer or where to find it; None looks beside the model.
        dtype: floating-point type; None keeps the model's.
        seed: of random weights.

    Raises:
        HostError: the model or tokenizer cannot be found or read, or it already takes images.
    """
    if isinstance(source, PreTrainedModel):
        model = source if dtype in (None, source.dtype) else _recast(source, dtype)
        return LanguagePart(model, _tokenizer(tokenizer, source.config.name_or_path))
    if isinstance(source, PreTrainedConfig):
        model = random_model(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, source, dtype, seed, "llm")
        return LanguagePart(model, _tokenizer(tokenizer, source.name_or_path))
    where, _ = language_config(source)
    model = load_strictly(AutoModelForCausalLM, where, dtype=dtype)
    return LanguagePart(model, _tokenizer(tokenizer, where))


def language_config(source: str | os.PathLike[str]) -> tuple[str, PreTrainedConfig]:
    """Where a language model is, and its configuration.

    Raises:
        HostError: it cannot be found or read, is none, or already takes images.
    """
    where = locate(names.resolve(os.fspath(source), "llm"), "llm")
    config = read_config(where)
    if getattr(config, "vision_config", None) is not None:
        raise HostError(f"{config.model_type!r} already takes images", where=where, remedy="use load_host")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HostError(f"{config.model_type!r} is not a causal language model", where=where)
    return where, config


def vision_config(source: str | os.PathLike[str]) -> tuple[str, PreTrainedConfig]:
    """Where a vision tower is, and its configuration; of a two-armed model that of its vision arm.

    Raises:
        HostError: it cannot be found or read, or a stock LLaVA model cannot carry it.
    """
    where = locate(names.resolve(os.fspath(source), "vision"), "vision")
    whole = read_config(where)
    config = getattr(whole, "vision_config", whole)
    family(config)
    return where, config


def weightless(factory: Any, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model of a configuration on PyTorch's meta device, in no time and memory; None where it cannot be had."""
    try:
        with torch.device("meta"), quiet_loading():
            return factory.from_config(copy.deepcopy(config))
    except (NotImplementedError, RuntimeError):  # a class that looks at values while it is made
        return None


def vision_part(
    source: VisionSource, image_processor: BaseImageProcessor | None, dtype: torch.dtype | None, seed: int
) -> VisionPart:
    """The vision tower of a host; two-armed models (CLIP, SigLIP) give their vision arm.

    Args:
        source: as for :func:`language_part`, or any other module of PyTorch (see `alula.hosts.custom`).
        image_processor: overrides the one beside the tower.
        dtype: floating-point type; None keeps the tower's.
        seed: of random weights.

    Raises:
        HostError: the tower cannot be found or read, or a stock LLaVA model cannot carry it.
    """
    if isinstance(source, PreTrainedModel):
        model: Any = source.vision_model if hasattr(source.config, "vision_config") else source
        family(model.config)
        loaded = image_processor or _image_processor(source.config.name_or_path)
        return VisionPart(model, fit_image_processor(model.config, loaded))
    if isinstance(source, PreTrainedConfig):
        config = getattr(source, "vision_config", source)
        family(config)
        model = random_model(None, MODEL_MAPPING, config, dtype, seed, "vision")
        return VisionPart(model, fit_image_processor(config, image_processor or _image_processor(source.name_or_path)))
    if isinstance(source, nn.Module):
        if image_processor is None:
            raise HostError(
                f"{type(source).__name__}, a tower of one's own, comes without preprocessing",
                where="vision",
                remedy="pass its image_processor=",
            )
        return VisionPart(CustomTower.of(source, image_processor), image_processor)
    where, config = vision_config(source)
    model = load_strictly(MODEL_MAPPING[type(config)], where, partly=True, config=config, dtype=dtype)
    return VisionPart(model, fit_image_processor(config, image_processor or _image_processor(where)))


def random_model(
    factory: Any, mapping: Any, config: PreTrainedConfig, dtype: torch.dtype | None, seed: int, what: str
) -> PreTrainedModel:
    """A model of random weights from ``seed`` by its configuration; HostError where ``mapping`` has none."""
    if type(config) not in mapping:
        raise HostError(f"{config.model_type!r} does not fit here", where=what)
    with seeded(seed):
        cls = mapping[type(config)]
        model = (factory.from_config if factory else cls._from_config)(copy.deepcopy(config), dtype=dtype)
    return model.eval()


def _recast(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy in ``dtype``, as loading it would give; ``model.to(dtype)`` would also round the rotary frequencies."""
    with quiet_loading():
        cast: Any = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype)
    return cast.to(device=model.device).eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator started from ``seed`` inside, and where it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str | None, beside: str | None) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return copy.deepcopy(tokenizer)
    where = tokenizer or beside
    if not where:
        raise UsageError(
            "a language model given as an object does not say where its tokenizer is",
            where="tokenizer",
            remedy="pass tokenizer=, an object or a directory",
        )
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"no tokenizer ({first_line(error)})", where=where, remedy="pass tokenizer=, an object or a directory"
        ) from error


def _image_processor(beside: str | None) -> BaseImageProcessor | None:
    """The image processor saved beside a tower, or None."""
    if not beside:
        return None
    try:
        return AutoImageProcessor.from_pretrained(beside, backend="pil")
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning("no image processor to be read beside %s (%s): using its family's", beside, first_line(error))
        return None
