#!/usr/bin/env bash
# transformers serve: a decoder of Qwen's architecture with another chat template answers with its own prompt.
#
# Packages: transformers[serving] 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-29.
# A good guess: how an answer is read goes by the checkpoint's chat template; a Qwen2 or Qwen3 that was tuned with a template of its own is served as
# a Llama with the same tokenizer and template is.
# What happens: where the tokenizer brings no response template, one is taken by the configuration's `model_type`. That of Qwen begins to read behind
# "<|im_start|>assistant\n"; where the prompt, decoded, does not hold this, all of the prompt is taken for the answer's beginning, in the message
# and in the stream, with and without --continuous-batching. `usage` does not count it.
# Output seen:
#   llama: the answer alone
#   qwen2: 'user: what is this ?\nassistant:' before the answer, 6 tokens by its usage
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 "transformers[serving]==5.24.0"
cd "$work"
HF_HUB_OFFLINE=1 PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" - <<'PY'
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "user: what is this ?\nassistant:"
letters = {letter: i for i, letter in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
bytewise = Tokenizer(models.BPE(letters, []))
bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")
tokenizer.chat_template = TEMPLATE
assert tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT

torch.manual_seed(0)
shape = {"vocab_size": len(letters), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
for name, kind, config in (("llama", LlamaForCausalLM, LlamaConfig), ("qwen2", Qwen2ForCausalLM, Qwen2Config)):
    kind(config(**shape)).save_pretrained(name)
    tokenizer.save_pretrained(name)


def answers(name):
    """The message of a served model, and the tokens that its usage counts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {"model": name, "messages": [{"role": "user", "content": "what is this ?"}], "max_tokens": 6, "temperature": 0}
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(said).encode(), {"content-type": "application/json"}
    )
    command = ["transformers", "serve", name, "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
            found = json.load(urllib.request.urlopen(asked, timeout=300))
        finally:
            server.terminate()
    return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


plain, _ = answers("llama")
print("llama:", "the answer alone" if PROMPT not in plain else "with the prompt")
echoed, counted = answers("qwen2")
if PROMPT in plain or not echoed.startswith(PROMPT) or counted != 6:
    raise SystemExit(f"changed: {plain!r}, {echoed!r}, {counted}")
print(f"qwen2: {PROMPT!r} before the answer, {counted} tokens by its usage")
PY
