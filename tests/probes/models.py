"""What the tests of this room share: deeper hosts, and one way to run a batch through any host of the zoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
)

from alula.tokens import Modality, TokenMap
from tests import zoo

LAYOUTS = ("3I4I2", "2I5", "I4", "7")
"""Two images, one, one at position 0, none."""


def token_map(inputs: dict[str, Tensor]) -> TokenMap:
    """The map of zoo inputs; placeholders count as image tokens in text decoders too."""
    items = int((inputs["input_ids"] == zoo.IMAGE).sum()) // zoo.TOKENS_PER_IMAGE
    return TokenMap.from_input_ids(
        inputs["input_ids"],
        {Modality.IMAGE: zoo.IMAGE},
        inputs["attention_mask"],
        tokens_per_item=[zoo.TOKENS_PER_IMAGE] * items,
    )


def batch(name: str, *layouts: str, **options: Any) -> dict[str, Any]:
    """Inputs of a zoo host; a text decoder gets a token_map that takes placeholder ids for image tokens."""
    inputs: dict[str, Any] = zoo.batch(name, *layouts, **options)
    return inputs if name in zoo.HOSTS else inputs | {"token_map": token_map(inputs)}


def singles(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a batch one by one, without padding, each with its own images; no token_map."""
    alone, images = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        sample: dict[str, Any] = {"input_ids": ids[mask][None], "attention_mask": mask[mask][None].long()}
        if "mm_token_type_ids" in inputs:
            sample["mm_token_type_ids"] = (sample["input_ids"] == zoo.IMAGE).long()
        count = int((sample["input_ids"] == zoo.IMAGE).sum()) // zoo.TOKENS_PER_IMAGE
        if count and "pixel_values" in inputs:
            patches = len(inputs["pixel_values"]) // len(inputs.get("image_grid_thw", inputs["pixel_values"]))
            sample["pixel_values"] = inputs["pixel_values"][images * patches : (images + count) * patches]
            if "image_grid_thw" in inputs:
                sample["image_grid_thw"] = inputs["image_grid_thw"][images : images + count]
        alone.append(sample)
        images += count
    return alone


def states(model: Any, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """Hidden states of an unpadded sample by site, (N, S, d) float64, taken with plain hooks (llama-like blocks)."""
    layers = model.model.language_model.layers
    seen: dict[tuple[str, int], np.ndarray] = {}

    def keep(site: str, index: int, take: Any) -> Any:
        def hook(module: Any, args: Any, *rest: Any) -> None:
            value = take(args, rest[-1])
            seen[site, index] = (value[0] if isinstance(value, tuple) else value)[0].detach().double().numpy()

        return hook

    handles = []
    for i, layer in enumerate(layers):
        first = keep("stream", i, lambda args, kwargs: args[0] if args else kwargs["hidden_states"])
        handles.append(layer.register_forward_pre_hook(first, with_kwargs=True))
        for site, module in {
            "attention_norm": layer.input_layernorm,
            "attention": layer.self_attn,
            "mlp_norm": layer.post_attention_layernorm,
            "mlp": layer.mlp,
        }.items():
            handles.append(module.register_forward_hook(keep(site, i, lambda args, output: output)))
    handles.append(layers[-1].register_forward_hook(keep("stream", len(layers), lambda args, output: output)))
    with torch.no_grad():
        model(**sample)
    for handle in handles:
        handle.remove()
    sites = {site for site, _ in seen}
    return {s: np.stack([seen[s, i] for i in range(len(layers) + (s == "stream"))]) for s in sites}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with float64 pixels."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def deep(layers: int = 6, sliding: bool = True, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA host deep enough for correlations over layers; half of its layers see a sliding window if asked."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": zoo.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": zoo.PAD,
        "eos_token_id": zoo.EOS,
        "bos_token_id": None,
    }
    text: Any = Qwen3Config(**common)
    if sliding:
        types = ["sliding_attention", "full_attention"] * (layers // 2)
        text = Gemma3TextConfig(**common, sliding_window=6, query_pre_attn_scalar=16, layer_types=types)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=zoo.IMAGE, image_seq_length=4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.generation_config.pad_token_id = zoo.PAD
    return model.eval()
