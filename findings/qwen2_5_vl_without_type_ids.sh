#!/usr/bin/env bash
# Qwen2.5-VL: without `mm_token_type_ids` its image tokens silently get the positions of text.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: ids, pixels and `image_grid_thw` say all there is to say (they did in transformers 4, and the model finds
# the places of the image by its token id anyway), so the type ids that the processor adds may be left out.
# What happens: the image is put into its places, and M-RoPE is not computed: every image token is counted like a word.
# Nothing is raised or logged.
# Output seen:
#   with type ids the answer follows at position 6, without at 8; logits of the last token differ by 2.9
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
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
ids = torch.tensor([[1, 57, *[IMAGE] * 4, 58, 3]])
grid = torch.tensor([[1, 4, 4]])
given = dict(input_ids=ids, image_grid_thw=grid, pixel_values=torch.randn(16, 3 * 2 * 4 * 4))
types = (ids == IMAGE).long()

seen = []
layer = model.model.language_model.rotary_emb
layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args + tuple(kwargs.values()))[1]), with_kwargs=True)
with torch.no_grad():
    with_types = model(**given, mm_token_type_ids=types).logits[0, -1]
    without = model(**given).logits[0, -1]
last = [int(positions[..., -1].max()) for positions in seen]
off = float((with_types - without).abs().max())
print(f"with type ids the answer follows at position {last[0] + 1}, without at {last[1] + 1}; "
      f"logits of the last token differ by {off:.1f}")
assert last[0] < last[1] == ids.shape[1] - 1 and off > 0.1, "changed"
PY
