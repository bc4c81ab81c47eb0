"""Tiny parts: a tokenizer trained here, decoders and towers with random weights of every family under test."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from alula.hosts import Host
from alula.hosts.templates import adapt

CORPUS = [
    "a red square sits left of a blue circle; how many green triangles are there?",
    "USER: what do you see? ASSISTANT: two words, first second third question answer the end be brief of lines.",
    "0 1 2 3 4 5 6 7 8 9 plus minus equals <image> system user assistant",
]

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{{- message['content'] | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED = {**WIDE, "num_key_value_heads": 2}

DECODERS: dict[str, tuple[type[hf.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, GROUPED),
    "mistral": (hf.MistralConfig, {**GROUPED, "sliding_window": 8}),
    "qwen2": (hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3Config, {**GROUPED, "head_dim": 16}),
    "gemma": (hf.GemmaConfig, {**GROUPED, "head_dim": 16}),
    "gemma3": (hf.Gemma3TextConfig, {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "phi3": (hf.Phi3Config, GROUPED),
    "olmo2": (hf.Olmo2Config, GROUPED),
    "smollm3": (hf.SmolLM3Config, GROUPED),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        {**GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "starcoder2": (hf.Starcoder2Config, {**GROUPED, "sliding_window": None}),
    "ernie4_5": (hf.Ernie4_5Config, {**GROUPED, "head_dim": 16}),
    "glm": (hf.GlmConfig, {**GROUPED, "head_dim": 16}),
    "mixtral": (hf.MixtralConfig, {**GROUPED, "num_local_experts": 4}),
    "olmo3": (hf.Olmo3Config, {**GROUPED, "sliding_window": 8}),
    "exaone4": (hf.Exaone4Config, {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "glm4": (hf.Glm4Config, {**GROUPED, "head_dim": 16}),
    "deepseek_v3": (
        hf.DeepseekV3Config,
        {
            **WIDE,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt_neox": (hf.GPTNeoXConfig, WIDE),
    "opt": (hf.OPTConfig, {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}

SMALL_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS: dict[str, tuple[hf.PreTrainedConfig, int]] = {
    "clip": (hf.CLIPVisionConfig(**SMALL_TOWER), 16),
    "siglip": (hf.SiglipVisionConfig(**SMALL_TOWER), 16),
    "dinov2": (hf.Dinov2Config(**SMALL_TOWER, mlp_ratio=2), 16),
    "dinov2_with_registers": (hf.Dinov2WithRegistersConfig(**SMALL_TOWER, mlp_ratio=2, num_register_tokens=3), 19),
    "dinov3": (hf.DINOv3ViTConfig(**SMALL_TOWER, num_register_tokens=4), 20),
}


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def without_chat_tokens() -> Tokenizer:
    """The same vocabulary with ChatML's tokens under other names, as a base model has it."""
    return Tokenizer.from_str(_backend().replace("<|im_", "<|reserved_"))


def tokenizer(template: str | None = CHATML, **options: Any) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 300 tokens; ChatML unless told otherwise."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>", **options}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend()), **special)
    made.chat_template = template
    return made


def decoder(family: str, *, vocab: int | None = None, tied: bool = False, seed: int = 0, **options: Any) -> Any:
    """A causal language model of ``family`` with random weights large enough to make logits differ."""
    cls, shape = DECODERS[family]
    ids = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    size = len(tokenizer()) if vocab is None else vocab
    config = cls(
        **{**shape, "vocab_size": size, "tie_word_embeddings": tied, "initializer_range": 0.3, **ids, **options}
    )
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def gemma3_host(seed: int = 0) -> Any:
    """A Gemma-3 with eyes, some 50 thousand random weights, and its own processor: four rows per image of 32 pixels.

    Its projector is a bare parameter and a norm, and its attention looks both ways inside an image.
    """
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    made = tokenizer(extra_special_tokens=names)
    made.chat_template = adapt(made, {"image": names["boi_token"]}, ["<|im_end|>"])
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(pictures, made, chat_template=made.chat_template, image_seq_length=4)
    _, shape = DECODERS["gemma3"]
    ids = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    config = hf.Gemma3Config(
        text_config={
            **shape,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size": len(made),
            "initializer_range": 0.3,
            **ids,
        },
        vision_config={**SMALL_TOWER, "initializer_range": 0.3},
        mm_tokens_per_image=4,
        boi_token_index=made.boi_token_id,
        eoi_token_index=made.eoi_token_id,
        image_token_id=made.image_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    model = hf.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    model.generation_config.eos_token_id = [4]
    return Host(model.eval(), processor)
