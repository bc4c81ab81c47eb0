"""Spectrogram towers a multimodal host can carry, from whatever a user has in hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from alula.errors import HostError
from alula.hosts import names
from alula.hosts.configs import first_line, read_config
from alula.hosts.directories import locate
from alula.hosts.host import load_strictly
from alula.hosts.parts import Part, random_model

MODEL_TYPE = "audio-spectrogram-transformer"
_RANDOM = (
    "its feature extractor marks a random short sound of a batch as long, so that features differ from call to call"
)
_NEVER = {"clap": _RANDOM, "clap_audio_model": _RANDOM}


@dataclass(frozen=True)
class AudioPart:
    """A spectrogram tower and the feature extractor that feeds it."""

    model: PreTrainedModel
    feature_extractor: Any

    @property
    def grid(self) -> tuple[int, int]:
        """Patches by frequency and by time."""
        config: Any = self.model.config
        high = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        return high, (config.max_length - config.patch_size) // config.time_stride + 1


def audio_part(source: Part, feature_extractor: Any, dtype: torch.dtype | None, seed: int) -> AudioPart:
    """The audio tower of a host.

    Args:
        source: an AST (audio spectrogram transformer): hub id, directory, "fledgling", loaded model (used as it is), or
            configuration (random weights from ``seed``). Of a classifier the tower is taken.
        feature_extractor: overrides the one beside the tower.
        dtype: floating-point type; None keeps the tower's.
        seed: of random weights.

    Raises:
        HostError: the tower cannot be found or read, is of another kind, or does not fit its feature extractor.
    """
    if isinstance(source, PreTrainedModel):
        config = source.config
        _check(config)
        model: Any = source.base_model
        extractor = feature_extractor or _beside(config.name_or_path)
    elif isinstance(source, PreTrainedConfig):
        config = source
        _check(config)
        model = random_model(None, MODEL_MAPPING, config, dtype, seed, "audio")
        extractor = feature_extractor or _beside(config.name_or_path)
    else:
        where, config = audio_config(source)
        model = load_strictly(MODEL_MAPPING[type(config)], where, partly=True, dtype=dtype)
        extractor = feature_extractor or _beside(where)
    if extractor is None:
        extractor = ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    for name in ("num_mel_bins", "max_length"):
        if getattr(extractor, name, None) != getattr(config, name):
            raise HostError(
                f"the tower wants {name} {getattr(config, name)}, its feature extractor gives "
                f"{getattr(extractor, name, 'none')}",
                where="audio",
                remedy="pass the feature extractor that belongs to the tower",
            )
    return AudioPart(model, extractor)


def audio_config(source: str | os.PathLike[str]) -> tuple[str, PreTrainedConfig]:
    """Where a spectrogram tower is, and its configuration; HostError where there is none that a host can carry."""
    where = locate(names.resolve(os.fspath(source), "audio"), "audio")
    config = read_config(where)
    _check(config)
    return where, config


def feature_extractor_of(source: Any) -> Any:
    """A feature extractor for spectrograms, given as such or as where it is: a directory, a hub id, "fledgling".

    Raises:
        HostError: there is none, or it makes no spectrograms.
    """
    if isinstance(source, str | os.PathLike):
        where = locate(names.resolve(os.fspath(source), "audio"), "audio")
        source = _beside(where)
    if not hasattr(source, "num_mel_bins") or not hasattr(source, "max_length"):
        raise HostError(
            f"{type(source).__name__} makes no spectrograms of one size",
            where="feature_extractor",
            remedy="pass an ASTFeatureExtractor",
        )
    return source


def _check(config: PreTrainedConfig) -> None:
    if config.model_type != MODEL_TYPE:
        raise HostError(
            f"{config.model_type!r} is not a spectrogram tower that a host can carry"
            + (f": {_NEVER[config.model_type]}" if config.model_type in _NEVER else ""),
            where="audio",
            remedy=f"use an {MODEL_TYPE} (ASTModel), e.g. MIT/ast-finetuned-audioset-10-10-0.4593",
        )
    if not isinstance(config.patch_size, int):
        raise HostError(f"patches of {config.patch_size} are not square", where="audio")


def _beside(place: str | None) -> Any:
    """The feature extractor saved beside a tower, or None."""
    if not place:
        return None
    try:
        return AutoFeatureExtractor.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise HostError(f"no feature extractor ({first_line(error)})", where=place) from error
