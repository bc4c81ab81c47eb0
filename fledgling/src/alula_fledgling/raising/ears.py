"""Raising the fledgling's ears: an AST-shaped tower trained on the microworld's sounds.

One objective, dense: from the rows of a moment (averaged over frequency, as connectors read them), linear heads tell
what sounds and how high. Nothing of it depends on the language model or its tokenizer. Sounds with unseen combinations
of source and height, and those of the test split, are never heard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

from alula.draws import Draw
from alula.files import atomic_directory, check_replaceable, write_json
from alula_fledgling.microworld.sounds import (
    MOST_TONES,
    SAMPLE_RATE,
    SOURCES_OF_SOUND,
    UNSEEN_VOICES,
    Sound,
    draw_sound,
    onset,
    render_sound,
    split_of_sound,
    tone_samples,
)
from alula_fledgling.raising.schooling import Progress, rate_factor

_PATCH, _TIME_STRIDE, _BINS, _MOMENTS = 16, 8, 64, 128
_HOP, _WINDOW = 160, 400  # samples: AST's 10 and 25 ms
_SPECIAL_ROWS = 2
_MEAN, _STD = -7.5, 3.7  # of the log-mel values of training sounds
_SEMITONES = 25


@dataclass(frozen=True)
class EarPlan:
    """Size of the ears' upbringing.

    Attributes:
        sounds: different sounds, gone through again and again, each time shifted in time.
        steps, batch_size: of the optimiser.
        shift: most spectrogram frames a sound is moved by.
    """

    sounds: int = 1600
    steps: int = 200
    batch_size: int = 64
    lr: float = 2e-3
    warmup: float = 0.05
    decay: float = 0.6
    shift: int = 6


def ear_config() -> ASTConfig:
    """A small audio spectrogram transformer: 4 by 15 patches of 16 mel bins and 160 ms."""
    return ASTConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_mel_bins=_BINS,
        max_length=_MOMENTS,
        patch_size=_PATCH,
        frequency_stride=_PATCH,
        time_stride=_TIME_STRIDE,
        layer_norm_eps=1e-6,
    )


def ear_extractor() -> ASTFeatureExtractor:
    """The feature extractor of `ear_config`: 64 mel bins, 128 frames of 10 ms."""
    return ASTFeatureExtractor(num_mel_bins=_BINS, max_length=_MOMENTS, mean=_MEAN, std=_STD)


def sounds(split: str, *, seed: int) -> Iterator[Sound]:
    """Sounds of ``split`` ("train", "test" or "unseen") without end."""
    position = 0
    while True:
        draw = Draw("sounds", split, seed, position)
        position += 1
        first = draw.choice(sorted(UNSEEN_VOICES)) if split == "unseen" else None
        sound = draw_sound(draw, draw.between(1, MOST_TONES), first=first)
        if first is not None or split_of_sound(sound) == split:
            yield sound


def labels_of(sound: Sound, shift: int = 0) -> np.ndarray:
    """(2, columns) int64: at every moment the source's class (0: silence) and the semitone (-100: silence).

    Args:
        shift: frames that the spectrogram has been moved by, to the right.
    """
    columns = (_MOMENTS - _PATCH) // _TIME_STRIDE + 1
    middles = (np.arange(columns) * _TIME_STRIDE + _PATCH // 2 - shift) * _HOP + _WINDOW // 2
    told = np.stack([np.zeros(columns, dtype=np.int64), np.full(columns, -100, dtype=np.int64)])
    for place, tone in enumerate(sound.tones):
        begin = onset(sound, place)
        there = (middles >= begin) & (middles < begin + tone_samples())
        told[:, there] = np.array([[1 + SOURCES_OF_SOUND.index(tone.source)], [tone.semitone]])
    return told


def spectrograms(heard: Sequence[Sound]) -> Tensor:
    """(N, frames, bins) float32, as the tower's feature extractor gives them."""
    waves = [render_sound(sound).astype(np.float32) / 32768 for sound in heard]
    return ear_extractor()(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"].float()


def moments(rows: Tensor) -> Tensor:
    """The tower's rows (N, 2 + bands * columns, w) -> (N, columns, w), averaged over the bands of frequency."""
    return rows[:, _SPECIAL_ROWS:].unflatten(1, (_BINS // _PATCH, -1)).mean(dim=1)


class _Upbringing(nn.Module):
    """The tower with the heads that are thrown away once it is raised."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.tower = ASTModel(config)
        self.source = nn.Linear(config.hidden_size, 1 + len(SOURCES_OF_SOUND))
        self.semitone = nn.Linear(config.hidden_size, _SEMITONES)

    def forward(self, spectra: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of source and height."""
        rows = moments(self.tower(spectra).last_hidden_state)
        source = F.cross_entropy(self.source(rows).flatten(0, 1), told[:, 0].flatten())
        return source, F.cross_entropy(self.semitone(rows).flatten(0, 1), told[:, 1].flatten(), ignore_index=-100)


def raise_ears(
    plan: EarPlan,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> ASTModel:
    """Raise a spectrogram tower from nothing; float32, evaluation mode, on ``device``."""
    torch.manual_seed(seed)
    model = _Upbringing(ear_config()).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.01)
    source = sounds("train", seed=seed)
    heard = [next(source) for _ in range(min(plan.sounds, plan.steps * plan.batch_size))]
    spectra = spectrograms(heard)
    order = np.random.default_rng(seed)
    for step in range(plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * rate_factor(step, plan.steps, plan.warmup, plan.decay)
        picked = order.integers(len(heard), size=plan.batch_size)
        shifts = order.integers(-plan.shift, plan.shift + 1, size=plan.batch_size)
        batch = torch.stack([_moved(spectra[one], int(shift)) for one, shift in zip(picked, shifts, strict=True)])
        told = np.stack([labels_of(heard[one], int(shift)) for one, shift in zip(picked, shifts, strict=True)])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = model(batch.to(device), torch.from_numpy(told).to(device))
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, plan.steps, {"source": losses[0].item(), "height": losses[1].item()})
    return model.tower.eval()


def _moved(spectrum: Tensor, shift: int) -> Tensor:
    """A spectrogram (frames, bins) moved by ``shift`` frames to the right; its edge fills the gap."""
    if not shift:
        return spectrum
    edge = spectrum[:1] if shift > 0 else spectrum[-4:-3]  # the last frames are the extractor's padding
    fill = edge.expand(abs(shift), -1)
    return torch.cat([fill, spectrum[:-shift]] if shift > 0 else [spectrum[-shift:], fill])


@torch.inference_mode()
def probe_ears(tower: ASTModel, *, num_sounds: int, seed: int, ridge: float = 1.0) -> dict[str, dict[str, float]]:
    """Linear probes on frozen rows: what of a sound can be read off the moments a connector gets.

    A ridge regression to one-hot classes per attribute is fitted on training sounds, and read by argmax on others:
    ``source`` (silence is a class of its own) at all moments, ``height`` (low or high) and ``semitone`` (within one) at
    those with a tone.

    Args:
        num_sounds: to fit on; half as many are read per split.

    Returns:
        split ("test", "unseen") -> attribute -> accuracy in 0..1.
    """
    rows, told = _rows_and_labels(tower, "train", num_sounds, seed)
    mean, scale = rows.mean(0), rows.std(0) + 1e-6

    def design(values: Tensor) -> Tensor:
        return torch.cat([(values - mean) / scale, torch.ones(len(values), 1)], dim=1).double()

    def fitted(there: Tensor, values: Tensor) -> Tensor:
        x = design(rows[there])
        gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.float64)
        return torch.linalg.solve(gram, x.T @ F.one_hot(values[there]).double())

    all_, sounding = torch.ones(len(rows), dtype=torch.bool), told[1] >= 0
    weights = {"source": fitted(all_, told[0]), "semitone": fitted(sounding, told[1].clamp(min=0))}
    result = {}
    for split in ("test", "unseen"):
        rows, told = _rows_and_labels(tower, split, num_sounds // 2, seed + 1)
        sounding = told[1] >= 0
        source = (design(rows) @ weights["source"]).argmax(-1) == told[0]
        read = (design(rows[sounding]) @ weights["semitone"]).argmax(-1)
        right = told[1][sounding]
        result[split] = {
            "source": source[sounding].double().mean().item(),
            "silence": source[~sounding].double().mean().item(),
            "height": ((read > 12) == (right > 12)).double().mean().item(),
            "semitone": ((read - right).abs() <= 1).double().mean().item(),
        }
    return result


def _rows_and_labels(tower: ASTModel, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Moments (M, w) and their classes (2, M)."""
    source = sounds(split, seed=seed + 1_000_003)
    heard = [next(source) for _ in range(count)]
    spectra = spectrograms(heard).to(tower.device)
    rows = torch.cat([moments(tower(part).last_hidden_state).cpu() for part in spectra.split(256)])
    told = torch.from_numpy(np.stack([labels_of(sound) for sound in heard], axis=1))
    return rows.float().flatten(0, 1), told.flatten(1)


def write_ears(
    folder: str | os.PathLike[str],
    plan: EarPlan,
    *,
    seed: int,
    device: torch.device,
    command: str,
    probe_sounds: int = 600,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Raise ears and write them to ``folder`` with a card of their own; weights in half precision, to be small.

    Args:
        command: what the user typed, for the card.
        probe_sounds: see `probe_ears`.

    Returns:
        the card.

    Raises:
        PathError: ``folder`` holds other things than a model.
    """
    check_replaceable(folder)
    began = time.perf_counter()
    tower = raise_ears(plan, seed=seed, device=device, progress=progress)
    seconds = time.perf_counter() - began
    tower.half().float()  # what is examined is what will be read back
    probes = probe_ears(tower, num_sounds=probe_sounds, seed=20_261_121)
    card = {
        "class": type(tower).__name__,
        "parameters": tower.num_parameters(),
        "command": command,
        "plan": asdict(plan),
        "seed": seed,
        "probe": {split: {name: round(value, 4) for name, value in one.items()} for split, one in probes.items()},
        "seconds": round(seconds, 1),
    }
    with atomic_directory(folder) as partial:
        tower.half().save_pretrained(partial)
        ear_extractor().save_pretrained(partial)
        write_json(Path(partial) / "card.json", card)
        (Path(partial) / "model.safetensors").chmod(0o644)
    return card
