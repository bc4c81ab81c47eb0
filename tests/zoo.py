"""Tiny random models of every architecture alula supports: real classes, real code paths, no downloads."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB = 64
IMAGE = 60  # placeholder id
PAD, EOS = 61, 62
TOKENS_PER_IMAGE = 4

_QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def _text_config(name: str, layers: int = 2) -> Any:
    common = _COMMON | {"num_hidden_layers": layers}
    match name:
        case "llama":
            return LlamaConfig(**common)
        case "mistral":
            return MistralConfig(**common, sliding_window=6)
        case "qwen2":
            return Qwen2Config(**common)
        case "qwen3":
            return Qwen3Config(**common, head_dim=16)
        case "gemma2":
            return Gemma2Config(
                **common, head_dim=16, sliding_window=6, query_pre_attn_scalar=16, attn_logit_softcapping=5.0
            )
        case "gemma3":
            return Gemma3TextConfig(
                **common,
                head_dim=16,
                sliding_window=6,
                query_pre_attn_scalar=16,
                layer_types=["sliding_attention", "full_attention"] * (layers // 2),
            )
        case "phi3":
            return Phi3Config(**common)
        case "opt":
            small = {k: v for k, v in common.items() if k not in ("intermediate_size", "num_key_value_heads")}
            return OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
        case "olmo2":
            return Olmo2Config(**common)
        case "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            return Qwen3MoeConfig(**common, head_dim=16, **experts)
        case "gpt_neox":
            return GPTNeoXConfig(**{k: v for k, v in common.items() if k != "num_key_value_heads"}, rotary_pct=0.5)
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_layer=layers,
                n_head=4,
                n_positions=512,
                pad_token_id=PAD,
                eos_token_id=EOS,
                bos_token_id=None,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        case _:
            raise KeyError(name)


_TEXT_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "gemma3": Gemma3ForCausalLM,
    "phi3": Phi3ForCausalLM,
    "opt": OPTForCausalLM,
    "olmo2": Olmo2ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "gpt_neox": GPTNeoXForCausalLM,
    "gpt2": GPT2LMHeadModel,
}

TEXT = tuple(_TEXT_CLASSES)
HOSTS = ("llava-llama", "llava-mistral", "llava-qwen3", "llava-gemma3", "qwen2_5_vl")
_QWEN_VL = ("qwen2_5_vl", "qwen3_vl")
# beside these "gemma3_vl", in which the tokens of an image see one another both ways, and "qwen3_vl", whose first
# layers are given image features by way of the stream (DeepStack)
# GPT-2 counts padding as positions and has no flex attention; experts take tokens in batches, whose sums round so:
# neither keeps every promise to the bit by itself. What holds of them stands in `tests/contracts/graft.py`
ALL = tuple(name for name in TEXT if name not in ("gpt2", "qwen3_moe")) + HOSTS


def reseed(seed: int) -> None:
    """`torch.manual_seed`, without the traces of the stack that it keeps for accelerators that are not there."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def build(name: str, seed: int = 0, *, layers: int = 2) -> Any:
    """A tiny random model in eval mode, float32, with weights large enough that every part matters.

    Args:
        layers: of the decoder, an even number.
    """
    model, draws = _built(name, seed, layers)
    torch.default_generator.set_state(draws)
    return copy.deepcopy(model)


@functools.cache
def _built(name: str, seed: int, layers: int) -> tuple[Any, Tensor]:
    """The model of `build`, to be copied, and the state of the generator behind its weights."""
    reseed(seed)
    if name in _TEXT_CLASSES:
        model: Any = _TEXT_CLASSES[name](_text_config(name, layers))
    elif name.startswith("llava-"):
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        text = _text_config(name.removeprefix("llava-"), layers)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=TOKENS_PER_IMAGE)
        )
    elif name == "qwen2_5_vl":
        rope = {"type": "mrope", "mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0}
        config = Qwen2_5_VLConfig(
            text_config={**_COMMON, "num_hidden_layers": layers, "rope_parameters": rope},
            vision_config={
                **_QWEN_TOWER,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
            image_token_id=IMAGE,
            video_token_id=59,
            vision_start_token_id=57,
            vision_end_token_id=58,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    elif name == "qwen3_vl":
        rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "default", "rope_theta": 10000.0}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config={**_COMMON, "num_hidden_layers": layers, "head_dim": 16, "rope_parameters": rope},
                vision_config={
                    **_QWEN_TOWER,
                    "deepstack_visual_indexes": [0, 1],
                    "num_position_embeddings": 16,
                },
                image_token_id=IMAGE,
                video_token_id=59,
                vision_start_token_id=57,
                vision_end_token_id=58,
            )
        )
    elif name == "gemma3_vl":
        text = {**_text_config("gemma3", layers).to_dict(), "sliding_window": 32}
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text,
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 4,
                },
                mm_tokens_per_image=TOKENS_PER_IMAGE,
                image_token_id=IMAGE,
                boi_token_id=57,
                eoi_token_id=58,
            )
        )
    else:
        raise KeyError(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.generation_config.eos_token_id = None  # lengths in tests are the test's own
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [57, 58, 59, IMAGE]  # a sampled placeholder has no pixels
    return model.eval(), torch.default_generator.get_state()


def set_attention(model: Any, implementation: str) -> None:
    """Have a model's decoder run an attention implementation; its tower keeps its own."""
    composite = model.config.get_text_config(decoder=True) is not model.config
    model.set_attn_implementation({"text_config": implementation} if composite else implementation)


@contextmanager
def uncompiled() -> Iterator[None]:
    """flex attention as it is written: compiling it for every shape of these tests would take minutes."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def pixels(name: str, images: int, seed: int = 0) -> dict[str, Tensor]:
    """Pixel inputs for `images` images of `TOKENS_PER_IMAGE` tokens each, in the host's own shape."""
    generator = torch.Generator().manual_seed(seed)
    if not images or name in TEXT:
        return {}
    if name in _QWEN_VL:
        return {
            "pixel_values": torch.randn(images * 16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
        }
    size = 16 if name == "gemma3_vl" else 8
    return {"pixel_values": torch.randn(images, 3, size, size, generator=generator)}


def prompt(layout: str, seed: int = 0, *, fenced: bool = False) -> list[int]:
    """Token ids for a layout such as "3I2": three text tokens, an image (fenced as for Qwen-VL), two text tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in layout.replace("I", " I ").split():
        if part == "I":
            rows = [IMAGE] * TOKENS_PER_IMAGE
            ids += [57, *rows, 58] if fenced else rows
        else:
            ids += torch.randint(0, 50, (int(part),), generator=generator).tolist()
    return ids


def batch(name: str, *layouts: str, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Model inputs for a padded batch of layouts (see `prompt`)."""
    prompts = [prompt(layout, seed + i, fenced=name in _QWEN_VL) for i, layout in enumerate(layouts)]
    width = max(map(len, prompts))
    ids, mask = [], []
    for tokens in prompts:
        gap = width - len(tokens)
        padded, ones = [PAD] * gap, [1] * len(tokens)
        ids.append(padded + tokens if side == "left" else tokens + padded)
        mask.append([0] * gap + ones if side == "left" else ones + [0] * gap)
    input_ids = torch.tensor(ids)
    images = sum(layout.count("I") for layout in layouts)
    inputs = {"input_ids": input_ids, "attention_mask": torch.tensor(mask), **pixels(name, images, seed)}
    if name in _QWEN_VL:
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
    if name == "gemma3_vl":
        inputs["token_type_ids"] = (input_ids == IMAGE).long()
    return inputs
