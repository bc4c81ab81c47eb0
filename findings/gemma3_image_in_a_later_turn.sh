#!/usr/bin/env bash
# Gemma-3: an image in a later turn, on a kept cache, is seen as a whole only with the token types of *all* tokens.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: `token_type_ids` has the shape of `input_ids`, so while continuing a cache one passes those of the new
# tokens, as one does with every other per-token input.
# What happens: the types are read by absolute position. With those of the new tokens alone (or none) nothing is raised,
# and the tokens of the second image attend as if they were text; logits behind it are off. Types of the whole dialogue,
# longer than `input_ids`, are right.
# Output seen:
#   whole dialogue 0.000, new tokens only 1.7, none 1.7   (largest difference in logits from one pass over everything)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import copy

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

torch.manual_seed(0)
IMAGE, EACH = 60, 4
text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=64, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"])
vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
model = Gemma3ForConditionalGeneration(Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=EACH, image_token_id=IMAGE, boi_token_id=57, eoi_token_id=58,
)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.25)

ids = torch.tensor([[1, 2, *[IMAGE] * EACH, 3, 4, 5, *[IMAGE] * EACH, 6, 7]])
types, pixels, cut = (ids == IMAGE).long(), torch.randn(2, 3, 16, 16), 8
with torch.no_grad():
    whole = model(input_ids=ids, token_type_ids=types, pixel_values=pixels).logits[:, cut:]
    first = model(input_ids=ids[:, :cut], token_type_ids=types[:, :cut], pixel_values=pixels[:1], use_cache=True)

    def off(**given):
        out = model(input_ids=ids[:, cut:], pixel_values=pixels[1:], cache=copy.deepcopy(first.cache), **given).logits
        return float((out - whole).abs().max())

    all_types, new_types, none = off(token_type_ids=types), off(token_type_ids=types[:, cut:]), off()
print(f"whole dialogue {all_types:.3f}, new tokens only {new_types:.1f}, none {none:.1f}")
assert all_types < 1e-4 and new_types > 0.1 and none > 0.1, "changed"
PY
