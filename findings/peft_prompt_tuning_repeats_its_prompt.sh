#!/usr/bin/env bash
# PEFT's prompt tuning under `generate`: the learned prompt is put in again before every new token; prefix tuning loses it.
#
# Packages: transformers 5.24.0, peft 0.21.2, torch 2.13.0 (CPU). Seen on 2026-11-27. Right with
# transformers 5.23.0 and peft 0.19.0.
# A good guess: `generate` computes what `forward` computes; peft 0.21.2 allows this transformers, and old keywords of
# transformers work until 5.40.
# What happens: `generate` hands the cache on as `cache`, PEFT looks for `past_key_values`. Prompt tuning finds none at any
# step, takes each for the first one and prepends its tokens again (silently). Prefix tuning puts the prefix into
# `past_key_values`, beside the empty `cache` of `generate`, which wins: the answer is the bare model's (one FutureWarning).
# Output seen:
#   prompt tuning: logits off by 6.2, cache holds 15 of 9; prefix tuning: logits off by 2.9, cache holds 6 of 9
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT, ids = 3, torch.tensor([[5, 6, 7, 8]])
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def seen(kind):
    torch.manual_seed(0)
    model = PeftModelForCausalLM(LlamaForCausalLM(config), kind(num_virtual_tokens=PROMPT, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
                              return_dict_in_generate=True, output_logits=True)
        whole = model(input_ids=said.sequences, attention_mask=torch.ones_like(said.sequences)).logits[:, -4:-1]
    return float((torch.stack(said.logits, 1) - whole).abs().max()), said.cache.get_seq_length()


(tuned, repeated), (prefixed, lost), whole = seen(PromptTuningConfig), seen(PrefixTuningConfig), PROMPT + ids.shape[1] + 2
print(f"prompt tuning: logits off by {tuned:.1f}, cache holds {repeated} of {whole}; "
      f"prefix tuning: logits off by {prefixed:.1f}, cache holds {lost} of {whole}")
assert tuned > 0.1 and prefixed > 0.1 and repeated == whole + 2 * PROMPT and lost == whole - PROMPT, "changed"
PY
