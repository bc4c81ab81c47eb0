#!/usr/bin/env bash
# lm-eval's `hf-multimodal`: in chat mode every prompt has two BOS, one of the template and one of the tokenizer.
#
# Packages: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: with a template that writes BOS over a tokenizer that adds it (as in Llama and Gemma), the harness sends what
# `processor.apply_chat_template(tokenize=True)` gives, as its text-only `hf` does: that one leaves out its own BOS then.
# What happens: the rendered chat is given to the processor as plain text, which adds BOS again. Scores are those of a
# prompt the model was not tuned on. Nothing is raised or logged.
# Output seen:
#   BOS in the prompt: template alone 1, hf 1, hf-multimodal 2
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0 pillow
cd "$work" && HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log <<'PY' || { cat log >&2; exit 1; }
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

WORDS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "what", "is", "this", "?"]
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% for part in message.content %}"
            "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}")
raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                    unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}, add_bos_token=True)
size = {"height": 16, "width": 16}
processor = LlavaProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=8, chat_template=TEMPLATE,
                           vision_feature_select_strategy="default", num_additional_image_tokens=1)
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
text = LlamaConfig(**small, vocab_size=len(WORDS), max_position_embeddings=128)
LlavaForConditionalGeneration(LlavaConfig(
    vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8), text_config=text, image_token_id=3,
)).save_pretrained("host")
processor.save_pretrained("host")

harness = HFMultimodalLM(pretrained="host", device="cpu", max_images=1)
rendered = harness.apply_chat_template([{"role": "user", "content": "<image> what is this ?"}])
picture = Image.new("RGB", (16, 16))
shown = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is this ?"}]}]
right = processor.apply_chat_template(shown, tokenize=True, return_dict=True)["input_ids"][0]
both = harness.tok_batch_multimodal_encode([rendered], [[picture]])["input_ids"][0].tolist()
plain = HFLM(pretrained=LlamaForCausalLM(text), tokenizer=tokenizer).tok_encode(rendered)
seen = [list(ids).count(tokenizer.bos_token_id) for ids in (right, plain, both)]
print("BOS in the prompt: template alone {}, hf {}, hf-multimodal {}".format(*seen))
assert seen == [1, 1, 2], "changed"
PY
