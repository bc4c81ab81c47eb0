"""A small VQ autoencoder of pictures or sounds (van den Oord et al., 2017, "Neural Discrete Representation Learning").

Shapes: N items, T codes of an item, K codes of a place, d width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from alula.codes.base import CodeTokenizer, Kind
from alula.codes.drawing import Painter, Spectrum, Viewer, mixing, pixels_of, waves_of
from alula.codes.kmeans import nearest
from alula.settings import Bool, Int, Number, Settings


class VQConfig(Settings):
    """Settings of a VQ autoencoder.

    Attributes:
        kind: of pictures or of sounds.
        size: K.
        width: d.
        hidden: width of encoder and decoder.
        grid, patch: of pictures: codes by side, and pixels by side of each.
        sampling_rate, samples: of sounds: samples per second and per sound.
        hop, bands, spectra: of sounds: samples between spectra, their mel bands, and spectra of a code.
        places: every place of an item has codes of its own, K of them, which stand for the vector and the place. What
            is written next is then told by the code before it, without counting.
        codebook: "ema": codes are moving averages of what they stand for; "loss": they are trained by gradients.
        commitment: factor on the encoder's distance from the codes it chose.
        decay: of the moving averages.
        revive: a code that stood for less than this share of its fair share is put where a vector of the batch is.
    """

    kind: Kind = "image"
    size: Int = Field(default=128, ge=2, le=2**20)
    width: Int = Field(default=16, ge=1, le=2**14)
    hidden: Int = Field(default=96, ge=4, le=2**14)
    grid: Int = Field(default=5, ge=1, le=1024)
    patch: Int = Field(default=8, ge=1, le=1024)
    sampling_rate: Int = Field(default=16000, ge=1, le=2**20)
    samples: Int = Field(default=20480, ge=1, le=2**28)
    hop: Int = Field(default=128, ge=1, le=2**16)
    bands: Int = Field(default=64, ge=1, le=1024)
    spectra: Int = Field(default=4, ge=1, le=1024)
    places: Bool = False
    codebook: Literal["ema", "loss"] = "ema"
    commitment: Number = Field(default=0.25, ge=0, le=2**16)
    decay: Number = Field(default=0.95, ge=0, lt=1)
    revive: Number = Field(default=0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> VQConfig:
        if self.kind == "audio" and self.samples % (self.hop * self.spectra):
            raise ValueError(f"samples: {self.samples} is no whole number of codes of {self.hop * self.spectra}")
        return self

    @property
    def tokens_per_item(self) -> int:
        """T."""
        return self.grid**2 if self.kind == "image" else self.samples // (self.hop * self.spectra)


class Quantized(NamedTuple):
    """What the bottleneck makes of vectors.

    Attributes:
        vectors: (N, T, d) the codes' own, through which gradients pass as if they were the encoder's.
        codes: (N, T).
        loss: commitment, and the codebook's own loss where it has one.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor


class Codebook(nn.Module):
    """The bottleneck.

    Buffers: `weight` (K, d), which gradients reach with codebook="loss"; `counts` (K,) and `sums` (K, d) of the moving
    averages.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.size, config.width), requires_grad=config.codebook == "loss")
        self.register_buffer("counts", torch.ones(config.size))
        self.register_buffer("sums", self.weight.detach().clone())

    def forward(self, vectors: Tensor) -> Quantized:
        """Of (N, T, d)."""
        flat = vectors.flatten(0, 1)
        codes = nearest(flat.detach(), self.weight.detach())
        chosen = F.embedding(codes, self.weight).view_as(vectors)
        loss = self.config.commitment * F.mse_loss(vectors, chosen.detach())
        if self.config.codebook == "loss":
            loss = loss + F.mse_loss(chosen, vectors.detach())
        passed = vectors + (chosen - vectors).detach()  # straight through
        return Quantized(passed, codes.view(vectors.shape[:2]), loss)

    @torch.no_grad()
    def learn(self, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Move the averages by a batch of (N, T, d) vectors and their codes, and revive dead codes."""
        config, flat = self.config, vectors.detach().flatten(0, 1)
        counts = torch.bincount(codes.flatten(), minlength=config.size).to(flat.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes.flatten(), flat)
        self.counts.lerp_(counts, 1 - config.decay)
        self.sums.lerp_(sums, 1 - config.decay)
        if config.codebook == "ema":
            used = self.counts > _LEAST
            self.weight[used] = (self.sums / self.counts[:, None])[used]
        fair = float(self.counts.sum()) / config.size
        dead = (self.counts < config.revive * fair).nonzero()[:, 0]
        if len(dead):
            drawn = flat[torch.randint(len(flat), (len(dead),), generator=generator)]
            self.weight[dead] = drawn
            self.counts[dead] = fair
            self.sums[dead] = drawn * fair

    @torch.no_grad()
    def start(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Put the codes where vectors are, (N, T, d): nothing is dead at the beginning."""
        flat = vectors.detach().flatten(0, 1)
        drawn = flat[torch.randint(len(flat), (self.config.size,), generator=generator)]
        self.weight.copy_(drawn + 1e-3 * flat.std() * torch.randn(drawn.shape, generator=generator))
        self.counts.fill_(len(flat) / self.config.size)
        self.sums.copy_(self.weight * self.counts[:, None])


_LEAST = 1e-3


class VQCodes(CodeTokenizer):
    """A VQ autoencoder as a tokenizer. `alula.codes.training.train_vq` trains it.

    Args:
        config: its settings.
        seed: of its weights; None: they are about to be loaded.
    """

    type_name: ClassVar[str] = "vq"

    def __init__(self, config: VQConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config, self.kind, self.tokens_per_item = config, config.kind, config.tokens_per_item
        self.codebooks = self.tokens_per_item if config.places else 1
        self.size = config.size * self.codebooks
        self.sampling_rate = config.sampling_rate if config.kind == "audio" else None
        self.samples = config.samples if config.kind == "audio" else None
        with torch.random.fork_rng(devices=()):
            if seed is not None:
                torch.manual_seed(seed)
            self.book = Codebook(config)
            self.encoder, self.decoder = _image_ways(config) if config.kind == "image" else _sound_ways(config)
        self.spectrum = (
            None if config.kind == "image" else Spectrum(config.sampling_rate, config.samples, config.hop, config.bands)
        )

    def given(self, items: Sequence[Any]) -> Tensor:
        """What the autoencoder is given: (N, 3, H, W) pixels in [-1, 1], or (N, bands, frames) log spectra."""
        if self.spectrum is None:
            return pixels_of(list(items), self.config.grid * self.config.patch)
        found: Tensor = self.spectrum(waves_of(list(items), self.config.samples))
        return found

    def vectors(self, given: Tensor) -> Tensor:
        """(N, T, d) in front of the bottleneck."""
        found: Tensor = self.encoder(given.to(self.book.weight.device))
        return found

    def forward(self, given: Tensor) -> tuple[Tensor, Quantized]:
        """What is made of `given` behind the bottleneck, and the bottleneck's own."""
        quantized: Quantized = self.book(self.vectors(given))
        return self.decoder(quantized.vectors), quantized

    @torch.no_grad()
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        if not items:
            return []
        vectors = self.vectors(self.given(items))
        codes = nearest(vectors.flatten(0, 1), self.book.weight).view(vectors.shape[:2])
        return list(codes + self._offsets() if self.config.places else codes)

    def codebook(self) -> Tensor:
        """(size, d); with `places` (size, d + T): the place, as far from others as vectors are from one another."""
        book = self.book.weight.detach()
        if not self.config.places:
            return book
        length = book.square().sum(dim=1).mean().sqrt()
        places = torch.eye(self.codebooks, device=book.device, dtype=book.dtype) * length
        vectors = book.expand(self.codebooks, *book.shape)
        return torch.cat([vectors, places[:, None].expand(-1, self.config.size, -1)], dim=2).flatten(0, 1)

    def _offsets(self) -> Tensor:
        """(T,) the first code of each place."""
        return torch.arange(self.codebooks, device=self.book.weight.device) * self.config.size

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Any]:
        vectors = self.book.weight[self.check_codes(codes) % self.config.size]
        if self.spectrum is None:
            painter: Any = self.decoder
            return list(painter.pictures(vectors))
        return list(self.spectrum.waves(self.decoder(vectors)).cpu().numpy())

    def to_config(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    @classmethod
    def from_config(cls, config: dict[str, Any], directory: Path) -> VQCodes:
        return cls(VQConfig(**config))


def _image_ways(config: VQConfig) -> tuple[nn.Module, nn.Module]:
    shape = (config.width, config.grid, config.patch, config.hidden)
    return Viewer(*shape), Painter(*shape)


def _sound_ways(config: VQConfig) -> tuple[nn.Module, nn.Module]:
    hidden, spectra = config.hidden, config.spectra
    encoder = nn.Sequential(
        nn.Conv1d(config.bands, hidden, spectra, stride=spectra),
        mixing(hidden, 3, flat=True),
        nn.Conv1d(hidden, config.width, 1),
        _Turned(),
    )
    decoder = nn.Sequential(
        _Turned(),
        nn.Conv1d(config.width, hidden, 1),
        mixing(hidden, 3, flat=True),
        mixing(hidden, 3, flat=True),
        nn.ConvTranspose1d(hidden, config.bands, spectra, stride=spectra),
    )
    return encoder, decoder


class _Turned(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states.mT
