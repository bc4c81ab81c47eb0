"""Hosts that people bring, not built by alula: tiny random models of stock classes with their own processors."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.hosts import tiny

GEMMA3_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<boi>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def gemma3(seed: int = 0) -> tuple[Any, Any]:
    """A Gemma-3 whose image tokens (4 an image) attend to one another both ways, and its processor."""
    tokenizer = tiny.tokenizer(
        GEMMA3_TEMPLATE, extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    )
    shape: dict[str, Any] = {**tiny.GROUPED, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
    config = hf.Gemma3Config(
        text_config={
            **shape,
            "vocab_size": len(tokenizer),
            "layer_types": ["sliding_attention", "full_attention"],
            "initializer_range": 0.3,
        },
        vision_config={**tiny.SMALL_TOWER, "initializer_range": 0.3},
        mm_tokens_per_image=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<img>"),
        boi_token_id=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_id=tokenizer.convert_tokens_to_ids("<eoi>"),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    side = {"height": tiny.SMALL_TOWER["image_size"], "width": tiny.SMALL_TOWER["image_size"]}
    images = hf.Gemma3ImageProcessorPil(size=side)
    return model, hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA3_TEMPLATE)
