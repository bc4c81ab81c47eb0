#!/usr/bin/env bash
# PEFT: merging a LoRA on tied embeddings, kept tied with `ensure_weight_tying=True`, adds its update twice.
#
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: the option is there for models whose embedding and head are one matrix, so `merge_and_unload` gives a model
# that computes what the adapter computed.
# What happens: before the merge all is right: embedding and head share the matrix and the update. Merging goes through both
# wrappers, and each adds the update to the one matrix. The general warning about tied weights, which comes with the
# option or without ("can lead to complications"), says nothing of it.
# Output seen:
#   update added 2.00 times; logits off by 3.0, of 2.7 at most
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=True,
)).eval()
start = model.get_input_embeddings().weight.detach().clone()
tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)).eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)
    before = tuned(ids).logits
    update = tuned.get_input_embeddings().get_delta_weight("default")
    merged = tuned.merge_and_unload()
    off = float((merged(ids).logits - before).abs().max())
added = merged.get_input_embeddings().weight.detach() - start
times = float((added * update).sum() / update.square().sum())
print(f"update added {times:.2f} times; logits off by {off:.1f}, of {float(before.abs().max()):.1f} at most")
assert abs(times - 2) < 1e-3 and off > 0.1, "changed"
PY
