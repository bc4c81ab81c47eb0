#!/usr/bin/env bash
# Eager attention in float64: a sample with padding in front gives NaN at every real token.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-29.
# A good guess: a model brought to float64, as one does for a reference that rounding is measured against, gives what it
# gives in float32 with more digits, whatever attention it runs.
# What happens: eager attention's mask holds the lowest number of the model's dtype, and its softmax is computed in
# float32 whatever that dtype is. The lowest float64 is minus infinity there. A query of left padding, which has no legal
# key, is a row of nothing else: its weights are NaN, and from the next layer on so are the values that real tokens
# multiply by 0. One layer, or padding behind, shows nothing; float32 and SDPA in float64 are right.
# Output seen:
#   logits that are NaN at real tokens: float32 eager 0 of 8, float64 eager 3 of 8, float64 sdpa 0 of 8 (llama, qwen3, mistral alike)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
found = set()
for kind in (LlamaConfig, Qwen3Config, MistralConfig):
    torch.manual_seed(0)
    config = kind(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, vocab_size=64, pad_token_id=0)
    counts = []
    for dtype, attention in ((torch.float32, "eager"), (torch.float64, "eager"), (torch.float64, "sdpa")):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        counts.append(int(logits[mask.bool()].isnan().any(dim=-1).sum()))
    found.add(tuple(counts))
(counts,) = found
tokens = int(mask.sum())
print("logits that are NaN at real tokens: " + ", ".join(
    f"{name} {count} of {tokens}" for name, count in zip(("float32 eager", "float64 eager", "float64 sdpa"), counts)
) + " (llama, qwen3, mistral alike)")
assert counts == (0, 3, 0), "changed"
PY
