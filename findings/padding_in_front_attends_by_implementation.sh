#!/usr/bin/env bash
# Padding in front of a prompt: what its own positions hold depends on the attention implementation.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: eager and SDPA give the same hidden states up to rounding, in padding as well, since a padded query must
# attend to something (in transformers 4 such queries were made to attend to all keys before SDPA saw the mask).
# What happens: a query of left padding has no legal key. The boolean mask for SDPA leaves its row all false, and torch's
# kernel on the CPU answers 0; eager's additive mask bars all keys by the same lowest number, which is no mask at all,
# and the query gets the mean of all values, those of real tokens behind it included. So whole tensors compared across
# implementations differ, the more tokens are padding, and anything that pools without the mask does too. Real tokens
# agree.
# Output seen:
#   queries without a legal key: 3 of 8; apart at real tokens 2.8e-09, at padding 0.014; SDPA attends there: 0.0e+00
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaModel

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2)
model = LlamaModel(config).eval()
ids, real = torch.randint(1, 50, (1, 8)), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
attended, masks, states = {}, {}, {}
for name in ("sdpa", "eager"):
    model.set_attn_implementation(name)
    attention = model.layers[0].self_attn
    hooks = [
        attention.register_forward_hook(lambda module, args, output: attended.update({name: output[0]})),
        attention.register_forward_pre_hook(lambda module, args, kwargs: masks.update({name: kwargs["attention_mask"]}), with_kwargs=True),
    ]
    with torch.no_grad():
        states[name] = model(input_ids=ids, attention_mask=real).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
keyless = int((~masks["sdpa"][0, 0].any(dim=-1)).sum())
apart = (attended["sdpa"] - attended["eager"])[0].abs().amax(dim=-1)
is_real = real[0].bool()
at_real, at_padding = float(apart[is_real].max()), float(apart[~is_real].max())
zero = float(attended["sdpa"][0][~is_real].abs().max())
print(f"queries without a legal key: {keyless} of 8; apart at real tokens {at_real:.1e}, at padding {at_padding:.3f}; SDPA attends there: {zero:.1e}")
assert masks["sdpa"].dtype == torch.bool and keyless == 3 and at_real < 1e-5 and at_padding > 1e-3 and zero == 0, "changed"
PY
