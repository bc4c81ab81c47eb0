#!/usr/bin/env bash
# PaliGemma: `position_ids` that are given count from 0, those that its forward makes count from 1; the two cannot be mixed.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-28.
# A good guess: leaving `position_ids` out is giving 0, 1, 2 ..., as in Llama, Gemma or LLaVA. So a loop that reads a prompt
# without them, and then gives each step its position (a server that batches answers of different lengths has to), computes
# what one pass computes.
# What happens: the forward counts from 1 only where it makes the positions itself (and `generate` adds one to its own).
# Steps at 0-based positions stand one place too near to their prompt; nothing is raised, and the logits are others.
# All given or none given is right, since only distances count.
# Output seen:
#   last logits against 1-based positions throughout: no positions 0e+00, all given 0-based 2e-06, steps alone given 0-based 3e+00
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 pillow
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
    vision_config=dict(**small, model_type="siglip_vision_model", image_size=8, patch_size=4, projection_dim=32),
    text_config=dict(**small, model_type="gemma", vocab_size=64, num_key_value_heads=2, head_dim=8),
    image_token_id=63, projection_dim=32, hidden_size=32,
)).eval()
ids = torch.tensor([[2, 5, 9, 11, 7, 3, 8, 4, 6, 10]])
places = torch.arange(10)[None]


@torch.no_grad()
def last(prompt=None, step=None):
    cache = model(input_ids=ids[:, :9], token_type_ids=torch.zeros(1, 9, dtype=torch.int64), position_ids=prompt).past_key_values
    return model(input_ids=ids[:, 9:], past_key_values=cache, position_ids=step,
                 token_type_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1]


with torch.no_grad():
    # as the prompt is read in both: its tokens see one another; the last token sees all
    whole = last(places[:, :9] + 1, places[:, 9:] + 1)
none, given, mixed = ((logits - whole).abs().max().item() for logits in
                      (last(), last(places[:, :9], places[:, 9:]), last(None, places[:, 9:])))
print(f"last logits against 1-based positions throughout: no positions {none:.0e}, all given 0-based {given:.0e}, "
      f"steps alone given 0-based {mixed:.0e}")
assert none < 1e-5 and given < 1e-4 and mixed > 1e-3, "changed"
PY
