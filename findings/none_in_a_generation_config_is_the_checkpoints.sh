#!/usr/bin/env bash
# generate(): None in a GenerationConfig of one's own is not "off" but "as the checkpoint says", and a stop string cannot be taken back.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-29.
# A good guess: `generate(generation_config=mine)` goes by `mine`; a field set to None there is not used.
# What happens: each None is filled in from `model.generation_config`. `repetition_penalty=None` keeps the checkpoint's penalty (1.0 switches it
# off), so that whoever applies it by a logits processor of their own applies it twice; and `stop_strings=None` brings the checkpoint's back,
# for which generate() then wants a tokenizer. An empty list does not help: with it, too, the call fails as below.
# Output seen:
#   repetition_penalty None: the checkpoint's; 1.0: none
#   stop_strings None: ValueError, There are one or more stop strings, either in the arguments to `generate` or in
#   stop_strings []: ValueError, There are one or more stop strings, either in the arguments to `generate` or in
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, eos_token_id=None, bos_token_id=None, pad_token_id=0)
model = LlamaForCausalLM(config).eval()
for name, parameter in model.named_parameters():
    if "norm" not in name:
        parameter.data.normal_(0, 0.4)
ids = torch.randint(1, 64, (1, 12))


def written(**settings):
    mine = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0, **settings)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=mine)[0, 12:].tolist()


plain = written()
model.generation_config.repetition_penalty = 3.0
penalized = written(repetition_penalty=3.0)
assert penalized != plain
none, one = written(repetition_penalty=None), written(repetition_penalty=1.0)
told = {str(plain): "none", str(penalized): "the checkpoint's"}
print(f"repetition_penalty None: {told[str(none)]}; 1.0: {told[str(one)]}")
assert none == penalized and one == plain, "changed"

model.generation_config.repetition_penalty = None
model.generation_config.stop_strings = ["x"]
for off in (None, []):
    try:
        written(stop_strings=off)
    except ValueError as error:
        print(f"stop_strings {off}: ValueError, {str(error)[:83]}")
    else:
        raise SystemExit("changed: it was taken back")
PY
