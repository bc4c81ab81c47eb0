#!/usr/bin/env bash
# PaliGemma's processor: a prompt without `suffix` comes with labels, none of which counts, so that its loss is NaN.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess, and the docstring: "labels -- Labels compatible with training if `suffix` is not None". A prompt is a
# prompt; a collator or an evaluation that looks for `labels` may tell by them what is to be learned.
# What happens: `labels` is there, -100 throughout. The model computes a loss over no token, NaN; nothing is raised or
# logged, and a mean over batches is NaN.
# Output seen:
#   without a suffix: labels [-100], loss nan; with one: labels [-100, 1, 6], loss 7.1
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 pillow
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, PreTrainedTokenizerFast,
                          SiglipImageProcessorPil)

torch.manual_seed(0)
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "what", "red"]
raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                                    unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})
images = SiglipImageProcessorPil(size={"height": 8, "width": 8})
images.image_seq_length = 4
processor = PaliGemmaProcessor(images, tokenizer)
small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
    vision_config=dict(**small, model_type="siglip_vision_model", image_size=8, patch_size=4, projection_dim=32),
    text_config=dict(**small, model_type="gemma", vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8),
    image_token_id=processor.image_token_id, projection_dim=32, hidden_size=32,
)).eval()


def seen(**suffix):
    inputs = processor(images=Image.new("RGB", (8, 8)), text="<image> what", return_tensors="pt", **suffix)
    with torch.no_grad():
        return sorted(set(inputs["labels"].flatten().tolist())), float(model(**inputs).loss)


(prompt, nan), (answer, loss) = seen(), seen(suffix="red")
print(f"without a suffix: labels {prompt}, loss {nan}; with one: labels {answer}, loss {loss:.1f}")
assert prompt == [-100] and nan != nan and loss == loss, "changed"
PY
