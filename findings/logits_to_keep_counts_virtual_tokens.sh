#!/usr/bin/env bash
# Prompt tuning: indices in `logits_to_keep` point at other tokens than the ones that were given.
#
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-30.
# A good guess: `logits_to_keep=torch.tensor([...])`, which names the places whose logits are wanted among the tokens of
# `input_ids`, names the same places where PEFT stands in between: with LoRA it does.
# What happens: PEFT puts the learned prompt in front of the embeddings and hands the indices on as they are, so that each
# points so many virtual tokens too far to the left: at another token, or into the prompt itself. The shapes are right and
# nothing is said. Prefix tuning, whose prompt is in the cache, is not concerned, nor is an integer, and indices from the
# end (negative ones) are right.
# Output seen:
#   largest difference from the logits of the token asked for: lora 0.00, prefix tuning 0.00, prompt tuning 1.82, p-tuning 1.88; counted from the end 0.00, 0.00, 0.00, 0.00
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import warnings
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
ids = torch.tensor([[5, 9, 3, 7, 1, 8]])
mask, length = torch.ones_like(ids), ids.shape[1]
kinds = {
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}
front, back = {}, {}
for name, config in kinds.items():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, vocab_size=64, initializer_range=0.1))
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, -length:][:, 4]
        kept = [model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([place])).logits[:, 0]
                for place in (4, 4 - length)]
    front[name], back[name] = (float((each - wanted).abs().max()) for each in kept)
print("largest difference from the logits of the token asked for: "
      + ", ".join(f"{name} {value:.2f}" for name, value in front.items())
      + "; counted from the end " + ", ".join(f"{value:.2f}" for value in back.values()))
assert max(front["lora"], front["prefix tuning"], *back.values()) < 1e-5, "changed"
assert min(front["prompt tuning"], front["p-tuning"]) > 0.05, "changed"
PY
