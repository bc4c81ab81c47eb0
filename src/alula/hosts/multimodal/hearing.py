"""What differs between ears: spectrogram transformers (AST) and encoders of Whisper's build.

Shapes: N clips, S states of the tower, M moments of a clip, W the width of a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

SPECTROGRAM = "audio-spectrogram-transformer"
WHISPER = "voxtral_encoder"
"""transformers' class of Whisper's encoder alone: the same weights, the same numbers"""

_SPECIAL_TOKENS = 2  # AST's class and distillation tokens stand in front
_SHORTEST = 400
"""Samples in the first window of AST's feature extractor; shorter audio clips are followed by silence."""


def moments(config: Any) -> int:
    """Moments of a clip, by the configuration of its tower."""
    if config.model_type == WHISPER:
        return int(config.max_source_positions)
    return (config.max_length - config.patch_size) // config.time_stride + 1


def by_moment(config: Any, states: Tensor) -> Tensor:
    """States of a tower (N, S, W) -> (N, M, W): of a spectrogram transformer the mean over all frequencies."""
    if config.model_type == WHISPER:
        return states
    high = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return states[:, _SPECIAL_TOKENS:].unflatten(1, (high, -1)).mean(dim=1)


def features(extractor: Any, waves: list[np.ndarray], rate: int) -> Tensor:
    """Mono waveforms (samples,) -> what the tower takes: (N, frames, bins) of AST, (N, bins, frames) of Whisper.

    Raises:
        ValueError: a clip longer than the tower's window, which the extractor would cut, or with samples that are not
            finite; another sampling rate.
    """
    is_whisper = hasattr(extractor, "nb_max_frames")
    # AST takes a frame every 10 ms, and reaches a little beyond the last
    longest, slack = (extractor.n_samples, 0) if is_whisper else (extractor.max_length * rate // 100, _SHORTEST)
    for wave in waves:
        if not np.isfinite(wave).all():
            raise ValueError("an audio clip holds samples that are no finite numbers: read it again, or leave it out")
        if len(wave) > longest + slack:
            raise ValueError(
                f"an audio clip lasts {len(wave) / rate:.2f} seconds, this model takes {longest / rate:.2f}: cut it"
            )
    waves = [np.pad(wave, (0, max(0, _SHORTEST - len(wave)))) for wave in waves]
    made = extractor(waves, sampling_rate=rate, return_tensors="pt")
    given: Tensor = made["input_features" if is_whisper else "input_values"]
    return given.float()
