"""Audio towers a multimodal host can carry, from whatever a user has in hand.

They are spectrogram transformers (AST) and encoders of Whisper, which become transformers' class of such an encoder
alone (`VoxtralEncoder`: the same weights, the same numbers).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    PreTrainedConfig,
    PreTrainedModel,
    VoxtralEncoder,
    VoxtralEncoderConfig,
    WhisperFeatureExtractor,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from alula.errors import HostError
from alula.hosts import names
from alula.hosts.configs import first_line, read_config
from alula.hosts.directories import locate
from alula.hosts.host import load_strictly
from alula.hosts.multimodal.hearing import SPECTROGRAM, WHISPER, moments
from alula.hosts.parts import Part, random_model
from alula.hosts.quiet import quiet_loading

_WHOLE_WHISPER = "whisper"
_STACK = 10
"""states of Whisper's encoder in one token: a fifth of a second"""
_FRAMES = {"sampling_rate": 16_000, "hop_length": 160, "n_fft": 400}
"""every Whisper hears a frame each 10 ms, and has a position for two"""
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
    def moments(self) -> int:
        """Of a clip."""
        return moments(self.model.config)

    def stack(self, asked: int | None) -> int:
        """How many moments that follow one another become one token; by default ten of Whisper's, one of others.

        Raises:
            HostError: they do not divide the moments of a clip.
        """
        count = asked if asked is not None else _STACK if self.model.config.model_type == WHISPER else 1
        if asked is None and self.moments % count:
            count = 1
        if count < 1 or self.moments % count:
            divisors = [each for each in range(1, self.moments + 1) if not self.moments % each]
            raise HostError(
                f"{count} does not divide the {self.moments} moments of a clip",
                where="audio_stack",
                remedy=f"one of {', '.join(map(str, divisors))}",
            )
        return count


def audio_part(source: Part, feature_extractor: Any, dtype: torch.dtype | None, seed: int) -> AudioPart:
    """The audio tower of a host.

    Args:
        source: an AST (audio spectrogram transformer) or a Whisper: hub id, directory, "fledgling", loaded model (never
            changed), or configuration (random weights from ``seed``). Of a classifier the tower is taken, of a Whisper
            the encoder.
        feature_extractor: overrides the one beside the tower. One for Whisper with a shorter window
            (``chunk_length``, seconds) shortens the encoder's: of its positions the first are kept.
        dtype: floating-point type; None keeps the tower's.
        seed: of random weights.

    Raises:
        HostError: the tower cannot be found or read, is of another kind, or does not fit its feature extractor.
    """
    if isinstance(source, PreTrainedModel):
        config, where = source.config, source.config.name_or_path
        _check(config)
        model: Any = source.base_model
    elif isinstance(source, PreTrainedConfig):
        config, where = source, source.name_or_path
        _check(config)
        model = random_model(None, MODEL_MAPPING, config, dtype, seed, "audio")
    else:
        where, config = audio_config(source)
        model = load_strictly(MODEL_MAPPING[type(config)], where, partly=True, dtype=dtype)
    extractor = feature_extractor or _beside(where)
    if config.model_type == SPECTROGRAM:
        return AudioPart(model, _spectrograms(config, extractor))
    return _whisper(model, extractor)


def _spectrograms(config: Any, extractor: Any) -> Any:
    """The feature extractor of a spectrogram transformer."""
    if extractor is None:
        extractor = ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    for name in ("num_mel_bins", "max_length"):
        _agree(name, getattr(config, name), getattr(extractor, name, "none"))
    return extractor


def _whisper(model: Any, extractor: Any) -> AudioPart:
    """Whisper's encoder, with a window as long as its feature extractor's."""
    encoder = getattr(model, "encoder", model)  # of the whole model, and of a classifier
    config = encoder.config
    if extractor is None:
        seconds = config.max_source_positions // 50
        extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    if not isinstance(extractor, WhisperFeatureExtractor):
        raise HostError(
            f"{type(extractor).__name__} is not the feature extractor of a Whisper",
            where="audio",
            remedy="pass a WhisperFeatureExtractor",
        )
    _agree("feature_size", config.num_mel_bins, extractor.feature_size)
    for name, value in _FRAMES.items():
        _agree(name, value, getattr(extractor, name))
    positions, most = extractor.nb_max_frames // 2, config.max_source_positions
    if positions > most:
        raise HostError(
            f"the feature extractor's window is {positions / 50:g} seconds, the tower's {most / 50:g}",
            where="audio",
            remedy="pass one with a chunk_length that the tower has positions for",
        )
    own = VoxtralEncoderConfig(
        num_mel_bins=config.num_mel_bins,
        hidden_size=config.d_model,
        intermediate_size=config.encoder_ffn_dim,
        num_hidden_layers=config.encoder_layers,
        num_attention_heads=config.encoder_attention_heads,
        max_source_positions=positions,
        scale_embedding=config.scale_embedding,
        activation_function=config.activation_function,
    )
    state = {name: value[:positions] if name == "embed_positions.weight" else value
             for name, value in encoder.state_dict().items()}  # fmt: skip
    with quiet_loading():
        loaded: Any = VoxtralEncoder.from_pretrained(
            None, config=own, state_dict=state, dtype=encoder.dtype, output_loading_info=True
        )
    made, info = loaded
    if odd := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise HostError(
            f"{type(encoder).__name__} is no encoder of Whisper's build, by {odd[0]} first",
            where="audio",
            remedy="pass a WhisperModel, or another whole Whisper",
        )
    return AudioPart(made.eval(), extractor)


def audio_config(source: str | os.PathLike[str]) -> tuple[str, PreTrainedConfig]:
    """Where an audio tower is, and its configuration; HostError where there is none that a host can carry."""
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
    if config.model_type in (_WHOLE_WHISPER, WHISPER):
        return
    if config.model_type != SPECTROGRAM:
        raise HostError(
            f"{config.model_type!r} is not an audio tower that a host can carry"
            + (f": {_NEVER[config.model_type]}" if config.model_type in _NEVER else ""),
            where="audio",
            remedy=f"use an {SPECTROGRAM} (ASTModel), e.g. MIT/ast-finetuned-audioset-10-10-0.4593, or a Whisper, e.g. "
            "openai/whisper-tiny",
        )
    if not isinstance(config.patch_size, int):
        raise HostError(f"patches of {config.patch_size} are not square", where="audio")


def _agree(name: str, wanted: Any, given: Any) -> None:
    if wanted != given:
        raise HostError(
            f"the tower wants {name} {wanted}, its feature extractor gives {given}",
            where="audio",
            remedy="pass the feature extractor that belongs to the tower",
        )


def _beside(place: str | None) -> Any:
    """The feature extractor saved beside a tower, or None."""
    if not place:
        return None
    try:
        return AutoFeatureExtractor.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise HostError(f"no feature extractor ({first_line(error)})", where=place) from error
