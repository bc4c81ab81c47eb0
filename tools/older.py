"""Whether transformers 4 reads what `alula export` writes for engines that stand on it: the same tokens and numbers.

    python tools/older.py

Makes tiny models of several decoder families with positions scaled in all ways that both versions know, writes each as
the export does (`alula.exporting.older`), and has transformers 4.57.6, installed into a temporary folder, read them
beside the installed release. Prints a line for each; ends with 1 where one differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from alula.exporting.older import readable_before_5
from alula.hosts import names

OLDER = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
TEXT = "A red circle. <|im_end|> is 5"
TOLERANCE = 1e-4  # of the logits' norm
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
found = {"version": __version__}
for path in sys.argv[2:]:
    ids = AutoTokenizer.from_pretrained(path)(sys.argv[1])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    with torch.no_grad():
        found[path] = [ids, model(torch.arange(120)[None]).logits[0].tolist()]
print(json.dumps(found))
"""


def configs() -> dict[str, Any]:
    """By name, of each family one."""
    base = 5e5

    def rope(kind: str = "default", **more: float) -> dict[str, Any]:
        return {"rope_type": kind, "rope_theta": base, **more}

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    of_layers = {"full_attention": rope("linear", factor=8.0), "sliding_attention": {**rope(), "rope_theta": 2e4}}
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=64)
    return {
        "qwen3": Qwen3Config(**SIZES, head_dim=16, rope_parameters=rope()),
        "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=yarn),
        "llama, llama3": LlamaConfig(**SIZES, rope_parameters=rope("llama3", **llama3)),
        "llama, linear": LlamaConfig(**SIZES, rope_parameters=rope("linear", factor=2.0)),
        "mistral, sliding": MistralConfig(**SIZES, sliding_window=32, rope_parameters=rope()),
        "phi3, partial": Phi3Config(**SIZES, rope_parameters=rope(partial_rotary_factor=0.5)),
        "gemma3, two bases": Gemma3TextConfig(
            **SIZES, head_dim=16, sliding_window=32, layer_types=layers, rope_parameters=of_layers
        ),
    }


def written(folder: Path) -> dict[str, Path]:
    """Models of random weights, as an export leaves them."""
    tokenizer, found = AutoTokenizer.from_pretrained(names.resolve("fledgling", "llm")), {}
    for number, (name, config) in enumerate(configs().items()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "norm" not in key:
                    weight.normal_(0, 0.25)  # large enough for positions to matter
        found[name] = folder / str(number)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
        if not readable_before_5(found[name]):
            raise SystemExit(f"{name}: its positions cannot be told to transformers 4")
    return found


def read(paths: dict[str, Path], older: Path | None) -> dict[str, Any]:
    """What a fresh process makes of the models, with the installed transformers or those in a folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({} if older is None else {"PYTHONPATH": str(older)})}
    command = [sys.executable, "-c", READ, TEXT, *map(str, paths.values())]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        older = Path(place) / "older"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(older), *OLDER]
        subprocess.run(install, check=True)
        paths = written(Path(place))
        new, old = read(paths, None), read(paths, older)
        assert old["version"].startswith("4."), old["version"]
        odd = 0
        for name, path in paths.items():
            (tokens, logits), (their_tokens, theirs) = new[str(path)], old[str(path)]
            apart = float((torch.tensor(logits) - torch.tensor(theirs)).norm() / torch.tensor(logits).norm())
            same = tokens == their_tokens and apart <= TOLERANCE
            odd += not same
            versions = f"{new['version']} and {old['version']}"
            print(f"{'same' if same else 'OTHER'}  {name}: logits {apart:.1e} apart, {versions}")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
