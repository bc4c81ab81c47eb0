#!/usr/bin/env bash
# A model that was read from GGUF in full precision cannot be saved: it passes for quantized.
#
# Packages: torch 2.13.0 (CPU), transformers 5.24.0, accelerate 1.15.0, gguf 0.19.0. Seen on 2026-11-28.
# A good guess: reading GGUF "dequantizes" it, into ordinary float32 weights of an ordinary class; what was made of it can be saved
# and loaded as any model. Here the file's tensors are float32 to begin with.
# What happens: `save_pretrained` raises, since the config keeps a `quantization_config`. Without it, the model still refuses, because it
# keeps its quantizer; a fresh model of the same class with the same weights is saved and gives the same numbers.
# Output seen:
#   weights {torch.float32}; saving: ValueError; without the config's entry: ValueError; a fresh model: saved, off by 0.0e+00
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/err" <<'PY' || { cat "$work/err"; exit 1; }
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(tempfile.mkdtemp())
tokens = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(32)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(16)
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_token_list(tokens)
writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
writer.add_token_merges(["a b"])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_pad_token_id(0)
values = np.random.default_rng(0)
square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
shapes = {f"blk.0.{name}.weight": (32, 32) for name in square} | {"token_embd.weight": (len(tokens), 32)}
shapes |= {name + ".weight": (32,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
for name, shape in shapes.items():
    writer.add_tensor(name, values.standard_normal(shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
import copy


def outcome(each):
    try:
        each.save_pretrained(folder / "out")
    except ValueError as error:
        return type(error).__name__
    return "saved"


kinds = {parameter.dtype for parameter in model.parameters()}
first = outcome(model)
config = copy.deepcopy(model.config)
del config.quantization_config
kept = model.config
model.config = config
second = outcome(model)
model.config = kept
fresh = type(model)(config)
fresh.load_state_dict(model.state_dict())
third = outcome(fresh)
ids = torch.arange(9)[None]
again = AutoModelForCausalLM.from_pretrained(folder / "out")
off = float((again.eval()(ids).logits - model.eval()(ids).logits).abs().max())
print(f"weights {kinds}; saving: {first}; without the config's entry: {second}; a fresh model: {third}, off by {off:.1e}")
assert (first, second, third) == ("ValueError", "ValueError", "saved") and off == 0, "changed"
PY
