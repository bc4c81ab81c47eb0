"""Small convolutional ways between pictures and grids of vectors, and between sounds and rows of them.

Shapes: N items, G side of a grid, d width of its vectors, p side of a patch; L steps of a sound, m mel bands.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from alula.errors import CodesError

_QUIET = 1e-5
_ROUNDS = 64


def mixing(width: int, kernel: int, *, flat: bool) -> nn.Module:
    """A residual block over neighbours; `flat`: of a row, else of a grid."""
    convolution: Any = nn.Conv1d if flat else nn.Conv2d
    return _Residual(
        nn.Sequential(
            nn.GroupNorm(1, width),
            convolution(width, width, kernel, padding=kernel // 2),
            nn.GELU(),
            convolution(width, width, 1),
        )
    )


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        added: Tensor = self.inner(states)
        return states + added


class Painter(nn.Module):
    """Vectors of a square grid to a picture.

    Args:
        width: d.
        grid: G.
        patch: p; pictures are G * p pixels high and wide.
        hidden: width of its layers.
    """

    def __init__(self, width: int, grid: int, patch: int, hidden: int = 96) -> None:
        super().__init__()
        self.settings = {"width": width, "grid": grid, "patch": patch, "hidden": hidden}
        self.net = nn.Sequential(
            nn.GroupNorm(1, width),  # centroids are of any length
            nn.Conv2d(width, hidden, 1),
            mixing(hidden, 3, flat=False),
            mixing(hidden, 3, flat=False),
            nn.Conv2d(hidden, 3 * patch * patch, 1),
            nn.PixelShuffle(patch),
        )

    def to_config(self) -> dict[str, Any]:
        """Its arguments."""
        return dict(self.settings)

    def forward(self, vectors: Tensor) -> Tensor:
        """(N, 3, G * p, G * p) in [-1, 1] as far as it has learnt, of (N, G * G, d) vectors in reading order."""
        grid = self.settings["grid"]
        # torch's GroupNorm crashes in backward on channels-last inputs that need no gradient, as centroids are
        drawn: Tensor = self.net(vectors.mT.unflatten(2, (grid, grid)).contiguous())
        return drawn

    @torch.no_grad()
    def pictures(self, vectors: Tensor) -> list[Image.Image]:
        """PIL images of (N, G * G, d) vectors."""
        pixels = ((self(vectors).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]


class Viewer(nn.Module):
    """A picture to vectors of a square grid; the way back from `Painter`'s pictures."""

    def __init__(self, width: int, grid: int, patch: int, hidden: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.PixelUnshuffle(patch),
            nn.Conv2d(3 * patch * patch, hidden, 1),
            mixing(hidden, 3, flat=False),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, G * G, d) of (N, 3, H, W) in [-1, 1]."""
        seen: Tensor = self.net(pixels)
        return seen.flatten(2).mT


def pixels_of(items: list[Any], side: int) -> Tensor:
    """(N, 3, side, side) float32 in [-1, 1] of PIL images, resized where they are of another size."""
    found = []
    for item in items:
        image = item.convert("RGB")
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1


class Spectrum(nn.Module):
    """Sounds to log mel spectra and, as near as magnitudes tell, back (Griffin and Lim, 1984).

    Args:
        rate: samples per second.
        samples: of a sound; shorter ones are followed by silence.
        hop: samples between frames.
        bands: m.
    """

    window: Tensor
    mel: Tensor
    inverse: Tensor

    def __init__(self, rate: int, samples: int, hop: int, bands: int) -> None:
        super().__init__()
        self.samples, self.hop, self.size = samples, hop, 4 * hop
        mel = mel_filter_bank(self.size // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
        filters = torch.from_numpy(np.asarray(mel, dtype=np.float32))  # (bins, m)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)
        self.register_buffer("mel", filters, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(filters), persistent=False)

    @property
    def frames(self) -> int:
        """Frames of a sound."""
        return self.samples // self.hop

    def forward(self, waves: Tensor) -> Tensor:
        """(N, m, frames), about 0 and 1 wide, of (N, samples)."""
        spectrum = self._stft(waves).abs()[..., : self.frames]
        return (self.mel.mT @ spectrum + _QUIET).log() / 3 + 2

    @torch.no_grad()
    def waves(self, logs: Tensor) -> Tensor:
        """(N, samples) whose magnitudes are those of (N, m, frames)."""
        magnitude = (self.inverse.mT @ (((logs - 2) * 3).exp() - _QUIET)).clamp_min(0)
        magnitude = torch.nn.functional.pad(magnitude, (0, 1))
        phase = torch.exp(2j * math.pi * torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0)))
        for _ in range(_ROUNDS):
            wave = self._istft(magnitude * phase)
            again = self._stft(wave)
            phase = again / again.abs().clamp_min(1e-8)
        return self._istft(magnitude * phase)

    def _stft(self, waves: Tensor) -> Tensor:
        return torch.stft(waves, self.size, self.hop, window=self.window, return_complex=True)

    def _istft(self, spectrum: Tensor) -> Tensor:
        return torch.istft(spectrum, self.size, self.hop, window=self.window, length=self.samples)


def waves_of(items: list[Any], samples: int) -> Tensor:
    """(N, samples) float32 of mono waveforms in [-1, 1], followed by silence where they are shorter.

    Raises:
        CodesError: one is longer.
    """
    found = torch.zeros(len(items), samples)
    for row, item in zip(found, items, strict=True):
        wave = np.asarray(item, dtype=np.float32).reshape(-1)
        if len(wave) > samples:
            raise CodesError(
                f"a sound of {len(wave)} samples, and these codes are of {samples}",
                where="vq codes",
                remedy="cut it, or train codes of longer ones",
            )
        row[: len(wave)] = torch.from_numpy(wave)
    return found
