"""A tiny Qwen-VL as its makers save it: image and video settings in files of their own."""

from __future__ import annotations

import json
from pathlib import Path

import transformers as hf
from tokenizers import AddedToken

from tests import zoo
from tests.auditing.conftest import QWEN_TEMPLATE
from tests.hosts import tiny

VIDEOS = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4, "merge_size": 2, "min_frames": 4}


def written(path: Path, family: str) -> Path:
    """A directory of ``qwen2_5_vl`` or ``qwen3_vl``: patches of 4 pixels, four to a token, 256 to 4,096 pixels."""
    signs = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    signs |= {f"vision_{end}": f"<|vision_{end}|>" for end in ("start", "end")}
    tokenizer = tiny.tokenizer(None, extra_special_tokens=signs)
    tokenizer.add_tokens([AddedToken(f"<|vision_{end}|>", special=True) for end in ("start", "end")])
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(path)
    bounds = {"shortest_edge": 256, "longest_edge": 4096}
    hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=bounds).save_pretrained(path)
    (path / "video_preprocessor_config.json").write_text(json.dumps(VIDEOS))
    model = zoo.build(family)
    model.resize_token_embeddings(len(tokenizer))
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = f"{name.removesuffix('_pad')}_token_id"
        setattr(model.config, key, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    model.save_pretrained(path)
    return path
