"""Frames of any vision or audio encoder of transformers': the states of one layer, without padding.

Shapes: N items, T frames of an item, d width of the layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from alula.codes.base import Kind
from alula.errors import CodesError
from alula.files import write_json

_INPUTS = ("pixel_values", "input_features", "input_values")
_FACTS = "features.json"


class EncoderFeatures(nn.Module):
    """One layer of an encoder, frozen.

    Args:
        encoder: a vision or audio model of transformers'; of one with a decoder the encoder is taken, of a CLIP-like
            one with two towers its vision model.
        processor: its image processor or feature extractor.
        layer: index into its hidden states, 0 being the embeddings and negative ones counted from the last.

    Raises:
        CodesError: it takes neither images nor sounds, or has no such layer.
    """

    def __init__(self, encoder: PreTrainedModel, processor: Any, layer: int = -1) -> None:
        super().__init__()
        self.model: Any = _encoder_of(encoder).eval().requires_grad_(False)
        self.processor = processor
        self.input = next((name for name in _INPUTS if name in inspect.signature(self.model.forward).parameters), "")
        if not self.input:
            raise CodesError(
                f"{type(self.model).__name__} takes none of {', '.join(_INPUTS)}",
                where="encoder",
                remedy="give a vision or an audio encoder",
            )
        depth = int(getattr(self.model.config, "num_hidden_layers", 0)) or int(self.model.config.encoder_layers)
        if not -depth - 1 <= layer <= depth:
            raise CodesError(f"layer {layer} of {depth}", where="encoder", remedy=f"take 0 to {depth}, or from the end")
        self.layer = layer

    @property
    def kind(self) -> Kind:
        """What it encodes."""
        return "image" if self.input == "pixel_values" else "audio"

    @property
    def sampling_rate(self) -> int | None:
        """Samples per second of the sounds it takes."""
        return getattr(self.processor, "sampling_rate", None)

    @torch.no_grad()
    def forward(self, items: Sequence[Any]) -> list[Tensor]:
        """(T, d) float32 of each item: class tokens and registers are left out, and frames of padding too.

        Raises:
            CodesError: a sound without samples, or longer than the encoder's window.
        """
        if self.kind == "image":
            given = self.processor(images=[_rgb(item) for item in items], return_tensors="pt")
            states = self._states(given)
            if getattr(self.model.config, "patch_size", 0) is None:  # a tower of one's own, without a grid
                return list(states.float())
            side = math.isqrt(states.shape[1])  # what stands in front of the patches is no patch
            return list(states[:, states.shape[1] - side * side :].float())
        waves = [np.asarray(item, dtype=np.float32).reshape(-1) for item in items]
        if not all(len(wave) for wave in waves):
            raise CodesError("a sound without samples", where="encoder", remedy="leave it out")
        window, longest = self._window(), max(map(len, waves), default=0)
        if window is not None and longest > window:
            raise CodesError(
                f"a sound of {longest} samples, and the encoder takes {window}: the rest would be dropped",
                where="encoder",
                remedy="cut the sound",
            )
        given = self.processor(waves, sampling_rate=self.sampling_rate, return_tensors="pt", **self._padding())
        states = self._states(given).float()
        pairs = enumerate(zip(states, waves, strict=True))
        return [self._without_padding(row, len(wave), given, number) for number, (row, wave) in pairs]

    def save(self, directory: Path) -> None:
        """Write encoder and processor in transformers' own layout."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        write_json(directory / _FACTS, {"layer": self.layer, "kind": self.kind})

    @classmethod
    def load(cls, directory: Path, facts: dict[str, Any]) -> EncoderFeatures:
        """Inverse of `save`; `facts` hold "layer" and "kind"."""
        config = AutoConfig.from_pretrained(directory)
        # a part of a larger model (Whisper's encoder) has that model's config, and the Auto classes make the whole
        if getattr(config, "is_encoder_decoder", False):
            made: Any = MODEL_MAPPING[type(config)]
            model: Any = type(made(config).get_encoder()).from_pretrained(directory)
        else:
            model = AutoModel.from_pretrained(directory)
        return cls(model, processor_of(directory, facts["kind"]), int(facts["layer"]))

    def _states(self, given: Any) -> Tensor:
        place = next(self.model.parameters())
        inputs = {self.input: given[self.input].to(place.device, place.dtype)}
        takes_mask = "attention_mask" in inspect.signature(self.model.forward).parameters
        # encoders of Whisper's build hear what fills a clip up as silence, whatever they call an attention mask
        if "attention_mask" in given and takes_mask and not hasattr(self.processor, "nb_max_frames"):
            inputs["attention_mask"] = given["attention_mask"].to(place.device)
        found = self.model(**inputs, output_hidden_states=True)
        states: Tensor = found.hidden_states[self.layer]
        return states.flatten(2).mT if states.dim() == 4 else states

    def _window(self) -> int | None:
        """Samples of the longest sound of which the processor drops nothing; None: of any."""
        told: Any = self.processor
        for name in ("n_samples", "nb_max_samples"):  # Whisper's and its like; CLAP's
            if isinstance(getattr(told, name, None), int):
                return int(getattr(told, name))
        if hasattr(self.model.config, "time_stride"):  # AST: spectra of 25 ms every 10 ms
            return (told.max_length + 1) * (told.sampling_rate // 100) + told.sampling_rate * 15 // 1000 - 1
        return None

    def _padding(self) -> dict[str, Any]:
        known = inspect.signature(type(self.processor).__call__).parameters
        if self.input == "input_features":
            return {"return_attention_mask": True} if "return_attention_mask" in known else {}
        if hasattr(self.processor, "max_length"):  # spectrograms of a fixed length (AST)
            return {}
        return {"padding": True, "return_attention_mask": True}

    def _without_padding(self, states: Tensor, samples: int, given: Any, number: int) -> Tensor:
        """Of the states of an item's window those that hold anything of the sound."""
        config: Any = self.model.config
        if hasattr(config, "time_stride"):  # AST: bands by moments, behind two tokens that are no patches
            bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
            moments = (config.max_length - config.patch_size) // config.time_stride + 1
            spectra = max(1, samples // (self.processor.sampling_rate // 100))
            kept = min(moments, math.ceil(spectra / config.time_stride))
            patches = states[states.shape[0] - bands * moments :].unflatten(0, (bands, moments))
            return patches[:, :kept].flatten(0, 1)
        return states[: self._frames(len(states), given, number)]

    def _frames(self, frames: int, given: Any, number: int) -> int:
        if "attention_mask" not in given:
            return frames
        mask = given["attention_mask"][number]
        if hasattr(self.model, "_get_feat_extract_output_lengths") and len(mask) > frames and mask.dim() == 1:
            told = getattr(self.model.config, "conv_stride", None)
            if told is not None:  # wav2vec 2 and its like: the mask is of samples, and convolutions have no padding
                return max(1, int(self.model._get_feat_extract_output_lengths(int(mask.sum()))))
        return max(1, math.ceil(int(mask.sum()) * frames / len(mask)))


def processor_of(directory: Path, kind: Kind) -> Any:
    """The image processor or feature extractor in a directory; torchvision is not needed."""
    if kind == "image":
        return AutoImageProcessor.from_pretrained(directory, backend="pil")
    return AutoFeatureExtractor.from_pretrained(directory)


def _encoder_of(model: Any) -> Any:
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return model.get_encoder() or model
    return getattr(model, "vision_model", model) if hasattr(model, "text_model") else model


def _rgb(item: Any) -> Any:
    return item.convert("RGB") if hasattr(item, "convert") else item
