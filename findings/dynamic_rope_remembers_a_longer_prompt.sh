#!/usr/bin/env bash
# Dynamic rotary angles: the logits of a prompt depend on the longest prompt that the model object was given before.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-28.
# A good guess: a model in eval mode, called without a cache, is a function of its input; `rope_type: dynamic` scales its angles by the
# length of the prompt at hand.
# What happens: a prompt beyond the original length is read with the angles of the longest one so far, whoever sent that; they begin anew
# only behind a prompt within the original length. No error, no warning; the same prompt gives other logits.
# Output seen:
#   of its norm, behind a longer prompt: 0.44; behind a short one: 0.00
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, max_position_embeddings=16,
                     rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
model = LlamaForCausalLM(config).eval()
for name, parameter in model.named_parameters():
    if "norm" not in name:
        parameter.data.normal_(0, 0.4)
middle, long, short = (torch.randint(0, 64, (1, n)) for n in (24, 96, 8))


def apart(a, b):
    return float((a - b).norm() / a.norm())


with torch.no_grad():
    fresh = model(middle).logits
    model(long)
    behind_long = model(middle).logits
    model(short)
    behind_short = model(middle).logits
print(f"of its norm, behind a longer prompt: {apart(fresh, behind_long):.2f}; behind a short one: {apart(fresh, behind_short):.2f}")
assert apart(fresh, behind_long) > 0.1 and apart(fresh, behind_short) == 0, "changed"
PY
