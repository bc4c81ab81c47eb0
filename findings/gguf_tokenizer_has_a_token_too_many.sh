#!/usr/bin/env bash
# A tokenizer read from GGUF knows a token that the model in the same file has no embedding for.
#
# Packages: torch 2.13.0 (CPU), transformers 5.24.0, accelerate 1.15.0, gguf 0.19.0. Seen on 2026-11-28.
# A good guess: `AutoTokenizer.from_pretrained(dir, gguf_file=...)` has the tokens that the file lists, and no others.
# What happens: of a byte-level vocabulary without `<|endoftext|>` (Llama's and others' have their own end) it has one more,
# `<|endoftext|>`, whose id is the number of embeddings. It is no special token of the tokenizer (`special_tokens_map` names the file's
# own), so nothing shows it; but text in which these letters stand becomes that id, which the model cannot look up.
# Output seen:
#   tokens in the file 260, in the tokenizer 261, embeddings 260; ids of 'ab<|endoftext|>': [259, 260]; named special: ['</s>', '<pad>', '<s>']
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
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")
rows = model.get_input_embeddings().weight.shape[0]
ids = tokenizer("ab<|endoftext|>").input_ids
special = sorted(tokenizer.special_tokens_map.values())
print(f"tokens in the file {len(tokens)}, in the tokenizer {len(tokenizer)}, embeddings {rows}; "
      f"ids of 'ab<|endoftext|>': {ids}; named special: {special}")
assert len(tokenizer) == rows + 1 and ids[-1] == rows and "<|endoftext|>" not in special, "changed"
PY
