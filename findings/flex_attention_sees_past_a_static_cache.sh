#!/usr/bin/env bash
# flex_attention with a static cache: every generated token may attend to one blank key behind it.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU; flex attention is compiled, which needs a C++ compiler). Seen on
# 2026-11-27.
# A good guess: `generate` says the same with `cache_implementation="static"` as with the default cache, whatever
# attention the model runs. SDPA and eager do.
# What happens: with flex_attention every token behind the first is off, on a plain prompt without padding;
# nothing is raised or logged. A static layer counts its length in a tensor. The mask is made as a function around
# that tensor, `update` then advances the tensor in place, and the mask is evaluated after it: one position too far.
# With a copy of the length the difference is gone.
# Output seen:
#   sdpa 3.5e-06, eager 5.0e-06, flex_attention 7.0, with the length copied 0.0e+00   (largest difference in logits, static to dynamic)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=None, bos_token_id=None)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(1, 50, (1, 7))


class CopiedLength(StaticCache):
    def get_query_offset(self, layer_idx=0):
        return super().get_query_offset(layer_idx) + 0  # a tensor of its own


def off(implementation, **static):
    model.set_attn_implementation(implementation)
    said = [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, output_logits=True,
                           return_dict_in_generate=True, disable_compile=True, **options).logits for options in ({}, static)]
    return max(float((one - other).abs().max()) for one, other in zip(*said))


sdpa, eager, flex = (off(name, cache_implementation="static") for name in ("sdpa", "eager", "flex_attention"))
copied = off("flex_attention", cache=CopiedLength(config, max_cache_len=11))
print(f"sdpa {sdpa:.1e}, eager {eager:.1e}, flex_attention {flex:.1f}, with the length copied {copied:.1e}")
assert max(sdpa, eager, copied) < 1e-3 and flex > 0.1, "changed"
PY
