#!/usr/bin/env bash
# compressed-tensors: a checkpoint in its sparse-bitmask format is accepted by today's versions and loads as random weights.
#
# Packages: written with compressed-tensors 0.13.0, read with 0.20.0 (0.15.0 alike); transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-27.
# A good guess: a quantizer that no longer reads a format ("legacy" in the package's own list of formats, which names it
# still) refuses a config that asks for it.
# What happens: transformers takes compressed-tensors >= 0.15, which has no decompressor for it. The config passes, no
# module is replaced, every compressed matrix is "newly initialized", and `from_pretrained` returns. The report of
# missing and unexpected names is the only sign. 0.13.0 reads the same files right.
# Output seen:
#   read by 0.13.0: logits off by 0.0; by 0.20.0: 14 matrices at random, logits off by 7.0, nothing raised
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 compressed-tensors==0.20.0
"$work/venv/bin/pip" install -q --no-deps --target "$work/old" compressed-tensors==0.13.0
export HF_HUB_OFFLINE=1
cd "$work"
PYTHONPATH="$work/old" "$work/venv/bin/python" - 2>log <<'PY' || { cat log >&2; exit 1; }
import torch
from compressed_tensors import BitmaskConfig
from compressed_tensors.compressors import ModelCompressor
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.3)
model, ids = LlamaForCausalLM(config).eval(), torch.arange(8)[None]
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter[parameter.abs() < parameter.abs().median()] = 0
    logits = model(ids).logits
torch.save(logits, "logits")
sparsity = BitmaskConfig(targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5)
compressor = ModelCompressor.from_pretrained_model(model, sparsity)
model.save_pretrained("sparse", state_dict=compressor.compress(model))
compressor.update_config("sparse")

again = LlamaForCausalLM(config).eval()
compressor.decompress("sparse", again)
with torch.no_grad():
    off = float((again(ids).logits - logits).abs().max())
print(f"read by 0.13.0: logits off by {off:.1f}; ", end="")
assert off < 1e-4
PY
"$work/venv/bin/python" - 2>log <<'PY' || { cat log >&2; exit 1; }
import torch
from transformers import AutoModelForCausalLM

torch.manual_seed(1)
model, report = AutoModelForCausalLM.from_pretrained("sparse", output_loading_info=True)
with torch.no_grad():
    off = float((model(torch.arange(8)[None]).logits - torch.load("logits")).abs().max())
missing = len(report["missing_keys"])
print(f"by 0.20.0: {missing} matrices at random, logits off by {off:.1f}, nothing raised")
assert missing == 14 and off > 0.1, "changed"
PY
