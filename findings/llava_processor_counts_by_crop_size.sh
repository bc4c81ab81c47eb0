#!/usr/bin/env bash
# LLaVA's processor: asked how many tokens a picture makes, it reads a crop size, which SigLIP's image processor has none of.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-28.
# A good guess: a processor that turns pictures and text into tensors can also say how many image tokens a picture of a size
# makes (`_get_num_multimodal_tokens`, which vLLM's Transformers backend calls before it runs anything).
# What happens: with CLIP's image processor it can. With SigLIP's, whose pictures are resized and never cropped, the same
# processor prepares a prompt (4 image tokens) and fails on the question.
# Output seen:
#   CLIP: prompt 4, told 4; SigLIP: prompt 4, told TypeError
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 pillow
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

raw = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<image>": 2, "what": 3}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>",
                                    extra_special_tokens={"image_token": "<image>"})


def seen(images, **settings):
    processor = LlavaProcessor(images, tokenizer, patch_size=4, image_token="<image>", **settings)
    prompt = processor(images=Image.new("RGB", (8, 8)), text="<image> what", return_tensors="pt")
    made = int((prompt["input_ids"] == 2).sum())
    try:
        told = processor._get_num_multimodal_tokens(image_sizes=[(8, 8)])["num_image_tokens"][0]
    except Exception as error:
        told = type(error).__name__
    return made, told


clip = seen(CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
            vision_feature_select_strategy="default", num_additional_image_tokens=1)
siglip = seen(SiglipImageProcessorPil(size={"height": 8, "width": 8}), vision_feature_select_strategy="full")
print(f"CLIP: prompt {clip[0]}, told {clip[1]}; SigLIP: prompt {siglip[0]}, told {siglip[1]}")
assert clip == (4, 4) and siglip[0] == 4 and siglip[1] in ("TypeError", "AttributeError"), "changed"
PY
