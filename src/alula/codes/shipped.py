"""Discrete tokenizers of transformers': Chameleon, Emu3 and Janus of pictures; EnCodec, DAC and Mimi of sounds.

Their codes come in layouts of their own; here an item is one row of codes in reading order. Where a moment has codes of
several codebooks (residual quantization) they follow one another, and code c of codebook q is q * K + c.

Shapes: N items, T codes of an item, Q codebooks, K codes of each, L moments of a sound (T = L * Q).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    ChameleonVQVAE,
    DacModel,
    Emu3VQVAE,
    EncodecModel,
    JanusVQVAE,
    MimiModel,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from alula.codes.base import CodeTokenizer, Kind
from alula.codes.drawing import pixels_of, waves_of
from alula.errors import CodesError

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class _Family:
    """How a tokenizer of transformers' is spoken to.

    Attributes:
        encode: model, what it is given, Q -> (N, T) or (N, Q, L) codes.
        books: model, Q -> a (K, d) table of each codebook.
        decode: model, (N, T) or (N, Q, L) codes -> (N, 3, H, W) pixels or (N, samples); None: it has no decoder.
        mean, std: of pixels, per channel.
    """

    kind: Kind
    encode: Callable[[Any, Tensor, int], Tensor]
    books: Callable[[Any, int], list[Tensor]]
    decode: Callable[[Any, Tensor], Tensor] | None
    mean: Sequence[float] = _HALF
    std: Sequence[float] = _HALF


def _emu3(model: Any, pixels: Tensor, _: int) -> Tensor:
    sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
    return torch.stack([each.flatten() for each in model.encode(pixels, sizes).image_tokens])


def _emu3_pixels(model: Any, codes: Tensor) -> Tensor:
    side = math.isqrt(codes.shape[1])
    found: Tensor = model.decode(codes.unflatten(1, (side, side)))
    return found[:, 0] if found.dim() == 5 else found


def _encodec(model: Any, waves: Tensor, count: int) -> Tensor:
    frames: Tensor = model.encode(waves[:, None], bandwidth=_bandwidth(model, count)).audio_codes
    return torch.cat(list(frames), dim=-1)  # (chunks, N, Q, L): one behind the other


def _encodec_waves(model: Any, codes: Tensor) -> Tensor:
    return model.decode(codes[None], [None]).audio_values[:, 0]


def _bandwidth(model: Any, count: int) -> float:
    """The bandwidth that EnCodec calls Q codebooks by."""
    for bandwidth in model.config.target_bandwidths:
        if model.quantizer.get_num_quantizers_for_bandwidth(bandwidth) == count:
            return float(bandwidth)
    known = [model.quantizer.get_num_quantizers_for_bandwidth(each) for each in model.config.target_bandwidths]
    raise CodesError(
        f"no bandwidth of this EnCodec has {count} codebooks", where="encodec", remedy=f"take one of {sorted({*known})}"
    )


def _mimi_books(model: Any, count: int) -> list[Tensor]:
    quantizer = model.quantizer
    layers = [
        *quantizer.semantic_residual_vector_quantizer.layers,
        *quantizer.acoustic_residual_vector_quantizer.layers,
    ]
    return [layer.codebook.embed for layer in layers[:count]]


_FAMILIES: dict[type[PreTrainedModel], _Family] = {
    ChameleonVQVAE: _Family(
        "image",
        lambda model, pixels, _: model.encode(pixels).image_tokens.view(len(pixels), -1),
        lambda model, _: [model.quantize.embedding.weight],
        None,
    ),
    Emu3VQVAE: _Family(
        "image",
        _emu3,
        lambda model, _: [model.quantize.embedding.weight],
        _emu3_pixels,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    ),
    JanusVQVAE: _Family(
        "image",
        lambda model, pixels, _: model.encode(pixels).image_tokens.view(len(pixels), -1),
        lambda model, _: [model.quantize.embedding.weight],
        lambda model, codes: model.decode(codes),
    ),
    EncodecModel: _Family(
        "audio",
        _encodec,
        lambda model, count: [layer.codebook.embed for layer in model.quantizer.layers[:count]],
        _encodec_waves,
    ),
    DacModel: _Family(
        "audio",
        lambda model, waves, count: model.encode(waves[:, None], n_quantizers=count).audio_codes,
        lambda model, count: [each.codebook.weight for each in model.quantizer.quantizers[:count]],
        lambda model, codes: model.decode(audio_codes=codes).audio_values,
    ),
    MimiModel: _Family(
        "audio",
        lambda model, waves, count: model.encode(waves[:, None], num_quantizers=count).audio_codes,
        _mimi_books,
        lambda model, codes: model.decode(codes).audio_values[:, 0],
    ),
}
_BY_NAME = {kind.__name__: kind for kind in _FAMILIES}


class ShippedCodes(CodeTokenizer):
    """A discrete tokenizer of transformers'.

    Args:
        model: a `ChameleonVQVAE`, `Emu3VQVAE`, `JanusVQVAE`, `EncodecModel`, `DacModel` or `MimiModel`.
        extent: pixels of a picture by side, or samples of a sound; pictures are resized to it, shorter sounds are
            followed by silence whose codes are left out.
        codebooks: Q, of sounds.

    Raises:
        CodesError: another class; an EnCodec of several channels or one that scales every sound (its scales are no
            codes).
    """

    type_name: ClassVar[str] = "shipped"

    def __init__(self, model: PreTrainedModel, extent: int, codebooks: int = 1) -> None:
        super().__init__()
        family = _FAMILIES.get(type(model))
        if family is None:
            raise CodesError(
                f"{type(model).__name__} is no discrete tokenizer that is known here",
                where="codes",
                remedy=f"give one of: {', '.join(_BY_NAME)}",
            )
        settings: Any = model.config
        if getattr(settings, "audio_channels", 1) != 1 or getattr(settings, "normalize", False):
            raise CodesError(
                "it codes several channels, or scales every sound by a number that is no code",
                where=type(model).__name__,
                remedy="take a mono one without normalization (facebook/encodec_24khz)",
            )
        self.model: Any = model.eval().requires_grad_(False)
        self.family, self.kind = family, family.kind
        self.extent, self.codebooks = extent, codebooks
        self.sampling_rate = int(settings.sampling_rate) if self.kind == "audio" else None
        self.samples = extent if self.kind == "audio" else None
        self.per_book = len(family.books(self.model, codebooks)[0])
        self.size = self.per_book * codebooks
        blank: Any = Image.new("RGB", (extent, extent)) if self.kind == "image" else [0.0] * extent
        self.tokens_per_item = int(self._rows([blank]).shape[1])

    @torch.no_grad()
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        if not items:
            return []
        rows = self._rows(items)
        if self.kind == "image":
            return list(rows)
        moments = self.tokens_per_item // self.codebooks
        kept = [math.ceil(moments * len(item) / self.extent) * self.codebooks for item in items]
        return [row[:length] for row, length in zip(rows, kept, strict=True)]

    @torch.no_grad()
    def codebook(self) -> Tensor:
        return torch.cat([each.detach().float() for each in self.family.books(self.model, self.codebooks)])

    @property
    def can_decode(self) -> bool:
        return self.family.decode is not None

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Any]:
        codes = self.check_codes(codes)
        if self.family.decode is None:
            raise CodesError(
                f"{type(self.model).__name__} has no decoder", where="codes", remedy="generate with codes of another"
            )
        if self.kind == "image":
            pixels = self.family.decode(self.model, codes).float()
            mean, std = (torch.tensor(list(each)).view(3, 1, 1) for each in (self.family.mean, self.family.std))
            shown = ((pixels.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            return [Image.fromarray(each) for each in shown.permute(0, 2, 3, 1).numpy()]
        rows = codes.unflatten(1, (-1, self.codebooks)).mT
        own = rows - self._offsets(codes.device)[:, None]
        if bool(((own < 0) | (own >= self.per_book)).any()):
            raise CodesError("codes of the codebooks do not take turns", where="codes", remedy="keep their order")
        waves = self.family.decode(self.model, own).float().cpu()[..., : self.extent]
        return list(waves.numpy())

    def own_weights(self) -> dict[str, Tensor]:
        return {"codebook": self.codebook().clone()}  # the model's own lie beside it; this one is checked

    def save_parts(self, directory: Path) -> None:
        self.model.save_pretrained(directory / "model")

    def to_config(self) -> dict[str, Any]:
        return {"model": type(self.model).__name__, "extent": self.extent, "codebooks": self.codebooks}

    @classmethod
    def from_config(cls, config: dict[str, Any], directory: Path) -> ShippedCodes:
        model = _BY_NAME[config["model"]].from_pretrained(directory / "model")
        return cls(model, config["extent"], config["codebooks"])

    def _offsets(self, device: torch.device) -> Tensor:
        return torch.arange(self.codebooks, device=device) * self.per_book

    @torch.no_grad()
    def _rows(self, items: Sequence[Any]) -> Tensor:
        """(N, T)."""
        place = next(self.model.parameters())
        if self.kind == "image":
            shown = (pixels_of(list(items), self.extent) + 1) / 2
            mean, std = (torch.tensor(list(each)).view(3, 1, 1) for each in (self.family.mean, self.family.std))
            given = (shown - mean) / std
        else:
            given = waves_of(list(items), self.extent)
        codes = self.family.encode(self.model, given.to(place.device, place.dtype), self.codebooks)
        if self.kind == "image":
            return codes.view(len(items), -1)
        return (codes + self._offsets(codes.device)[:, None]).mT.flatten(1)  # (N, Q, L): moment by moment
