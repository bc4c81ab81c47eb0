#!/usr/bin/env bash
# Qwen2.5-VL: two prompts read in turn by one model get each other's positions, though each has a cache of its own.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: what a request needs to go on is in its cache, so requests may take turns on one model (or run in threads).
# What happens: the offset of M-RoPE behind an image (`rope_deltas`) is kept on the model, one for all. The step after
# another prompt's prefill takes that one's offset, and nothing is raised. Passing `position_ids` gives the right step.
# Output seen:
#   next to its own prompt 0.000, after another prompt 4.4, with position_ids 0.000   (largest difference in logits)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import copy

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

torch.manual_seed(0)
IMAGE = 60
rope = {"type": "mrope", "mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0}
config = Qwen2_5_VLConfig(
    text_config=dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, rope_parameters=rope),
    vision_config=dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32,
                       fullatt_block_indexes=[1], window_size=16),
    image_token_id=IMAGE, video_token_id=59, vision_start_token_id=57, vision_end_token_id=58,
)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.25)


def prompt(side):  # an image of side x side tokens between words
    ids = torch.tensor([[1, 2, 57, *[IMAGE] * side * side, 58, 3]])
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    return dict(input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=grid,
                pixel_values=torch.randn(int(grid.prod()), 3 * 2 * 4 * 4))


step = torch.tensor([[5]])
with torch.no_grad():
    one, other = prompt(2), prompt(4)
    cache = model(**one, use_cache=True).cache
    delta = model.model.rope_deltas
    right = model(input_ids=step, cache=copy.deepcopy(cache)).logits
    again = model(input_ids=step, cache=copy.deepcopy(cache)).logits
    model(**other)
    after = model(input_ids=step, cache=copy.deepcopy(cache)).logits
    positions = (one["input_ids"].shape[1] + delta).expand(3, 1, 1)
    told = model(input_ids=step, position_ids=positions, cache=copy.deepcopy(cache)).logits
off = [float((logits - right).abs().max()) for logits in (again, after, told)]
print(f"next to its own prompt {off[0]:.3f}, after another prompt {off[1]:.1f}, with position_ids {off[2]:.3f}")
assert off[0] < 1e-5 and off[1] > 0.1 and off[2] < 1e-4, "changed"
PY
