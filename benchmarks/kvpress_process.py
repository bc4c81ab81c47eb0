"""The half of `incumbents.py` that runs in kvpress's own environment: reads requests of one line, answers with seconds.

Imports nothing of this library; kvpress itself only where a request arrives, so that the other half has `decoder` and
the clock from here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "KnormPress")


def decoder(device: str, dtype: str, *, shrink: bool) -> PreTrainedModel:
    """A random decoder of 0.5B shape, or a tiny one."""
    torch.manual_seed(0)
    shape = (64, 96, 8, 4, 2) if shrink else (896, 4864, 24, 14, 2)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(vocab_size=1024, **dict(zip(names, shape, strict=True)))
    with torch.device(device):
        model: PreTrainedModel = Qwen2ForCausalLM(config).to(getattr(torch, dtype)).eval()
    return model


def prompt_and_steps(read: Callable[[], Any], go_on: Callable[[Any], Any], steps: int) -> dict[str, float]:
    """Seconds of a prompt, and of one step behind it."""
    began = clock()
    cache = read()
    half = clock()
    for _ in range(steps):
        go_on(cache)
    return {"prompt": half - began, "step": (clock() - half) / steps}


def clock() -> float:
    """Of one thread on a CPU, which other work on the machine does not count into; synchronized elsewhere."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.thread_time()


def arms(model: PreTrainedModel, request: dict[str, Any]) -> dict[str, Callable[[], dict[str, float]]]:
    """Of plain and of every press at every share of keys: a prompt and the steps behind it, timed."""
    import kvpress

    embeds = torch.randn(1, request["length"], model.config.hidden_size, device=model.device, dtype=model.dtype)
    step = torch.tensor([[7]], device=model.device)

    def run(press: Any) -> dict[str, float]:
        def read() -> Any:
            cache = DynamicCache()
            if press is None:
                model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
            else:
                with press(model):
                    model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
            return cache

        def go_on(cache: Any) -> None:
            model(input_ids=step, past_key_values=cache, position_ids=torch.tensor([[request["length"]]]).to(step))

        return prompt_and_steps(read, go_on, request["steps"])

    found: dict[str, Callable[[], dict[str, float]]] = {"plain": lambda: run(None)}
    for row, keep in request["keep"].items():
        for name in PRESSES:
            press = getattr(kvpress, name)(compression_ratio=1 - keep)
            found[f"{name}, keys of: {row}"] = lambda press=press: run(press)
    return found


def main() -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    request = json.loads(sys.stdin.readline())
    model = decoder(request["device"], request["dtype"], shrink=request["shrink"])
    can = arms(model, request)
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    print(json.dumps({"arms": list(can), "versions": versions}), file=answers, flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(can[json.loads(line)["run"]]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
