"""What highlighting costs: the shift of attention alone, with guidance, and its rivals, beside plain passes.

    python benchmarks/highlight.py                   # writes benchmarks/results/highlight.json
    python benchmarks/highlight.py --device cuda     # on an accelerator: a decoder of 7B shape in bfloat16
    python benchmarks/highlight.py --shrink --rounds 1 --output x.json   # the same code on little, anywhere

Arms take turns in one process, timed as in policies.py. "shift by a mask" is the same shift as it is often published:
added to a mask of all pairs of tokens. Operators are counted, of one more layer and of what comes once in a forward.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from meter import Meter, peak_bytes
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import alula
from alula.files import write_json
from alula.seam import Bias, LayerView, install
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.steering import Hidden, KeyDirections
from alula.training.environment import readable_environment
from policies import decoder, idle, ratio, timed

PARTS = ("operators", "memory", "prompt", "long prompt", "steps")


class Marks:
    """A prompt of which a quarter is highlighted."""

    def __init__(self, length: int) -> None:
        self.weights = torch.zeros(1, length)
        self.weights[:, length // 4 : length // 2] = 1

    def marks(self, **options: Any) -> Tensor:
        return self.weights


class Squared(Bias):
    """The shift as a table of all pairs."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def key_bias(self, view: LayerView) -> Tensor:
        return view.ctx.once(self._table, view.ctx)

    def _table(self, ctx: Any) -> Tensor:
        new, keys = ctx.tokens.shape[1], ctx.all_tokens.shape[1]
        row = torch.nn.functional.pad(self.weights.to(ctx.tokens.device), (0, keys - self.weights.shape[1]))
        return row[:, None, None].expand(1, 1, new, keys)


@contextmanager
def squared(model: Any, prompt: Marks) -> Iterator[None]:
    seam = install(model, "squared")
    bias = Squared(prompt.weights)
    handles = [seam.request_bias(layer, bias) for layer in range(seam.anatomy.num_layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        seam.release("squared")


def arms(model: Any, prompt: Marks) -> dict[str, Callable[[], Any]]:
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_key_value_heads, width, width)
    directions = KeyDirections(torch.eye(width).expand(shape).to(model.device, model.dtype))

    def under(**options: Any) -> Callable[[], Any]:
        return lambda: alula.highlight(model, prompt, spans="all", **options)

    return {
        "plain": contextlib.nullcontext,
        "nothing asked": lambda: idle(model),
        "shift alone": under(guidance=1),
        "shift by a mask": lambda: squared(model, prompt),
        "with guidance": under(),
        "what is highlighted hidden": under(by=Hidden()),
        "keys edited": under(by=directions),
    }


def prefill(model: Any, length: int, device: str, rounds: int) -> dict[str, Any]:
    """Times of a prompt over plain ones, next token's logits included."""
    ids = torch.randint(0, 1000, (1, length), device=model.device)

    def go(manager: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with manager():
                model(input_ids=ids, logits_to_keep=1)

        return run

    runs = {name: go(manager) for name, manager in arms(model, Marks(length)).items()}
    return {"tokens": length, **times(timed(runs, device, rounds))}


def decode(model: Any, length: int, device: str, rounds: int, steps: int) -> dict[str, Any]:
    """Times of steps behind a prompt."""
    ids = torch.randint(0, 1000, (1, length), device=model.device)
    managers, caches = arms(model, Marks(length)), {}
    for name, manager in managers.items():
        with manager():
            caches[name] = cache_of_output(model(input_ids=ids, logits_to_keep=1))

    def go(name: str) -> Callable[[], None]:
        def run() -> None:
            with managers[name]():
                for _ in range(steps):
                    model(input_ids=ids[:, :1], **{cache_keyword(): caches[name]})

        return run

    return {
        "tokens": length,
        "steps per round": steps,
        **times(timed({name: go(name) for name in managers}, device, rounds)),
    }


def times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    found = {name: ratio(seconds, name) for name in seconds if name != "plain"}
    for name, each in found.items():
        print(f"  {name:28} {each['median']:.3f} ({each['low']:.3f} to {each['high']:.3f})", file=sys.stderr)
    return {"plain seconds": round(statistics.median(seconds["plain"]), 4), "measured": found}


def memory(model: Any, length: int, device: str) -> dict[str, Any]:
    """Bytes at the peak of a prompt."""
    ids, found = torch.randint(0, 1000, (1, length), device=model.device), {}
    for name, manager in arms(model, Marks(length)).items():
        with manager():
            found[name] = peak_bytes(lambda: model(input_ids=ids, logits_to_keep=1), device)
    return {
        "tokens": length,
        "peak bytes": found,
        "of plain": {name: round(peak / found["plain"], 3) for name, peak in found.items()},
    }


def operators(device: str) -> dict[str, Any]:
    """Operators of one more layer, and of all that comes once in a forward, beyond the host's own."""
    counted: dict[str, dict[str, list[int]]] = {}
    for layers in (2, 4):
        config = Qwen2Config(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = Qwen2ForCausalLM(config).to(device).eval()
        ids = torch.randint(0, 1000, (1, 24), device=device)
        for name, manager in arms(model, Marks(24)).items():
            with manager():
                with Meter() as prompt:
                    output = model(input_ids=ids, logits_to_keep=1)
                with Meter() as step:
                    model(input_ids=ids[:, :1], **{cache_keyword(): cache_of_output(output)})
            here = counted.setdefault(name, {"prompt": [], "step": []})
            here["prompt"].append(prompt.counts.total)
            here["step"].append(step.counts.total)
    record: dict[str, Any] = {}
    for name, here in counted.items():
        if name == "plain":
            continue
        record[name] = {}
        for what in ("prompt", "step"):
            beyond = [own - plain for own, plain in zip(here[what], counted["plain"][what], strict=True)]
            per_layer = (beyond[1] - beyond[0]) / 2
            record[name][what] = {"per layer": per_layer, "per forward": beyond[0] - 2 * per_layer}
    return {
        "the host's own per layer, prompt": (counted["plain"]["prompt"][1] - counted["plain"]["prompt"][0]) / 2,
        **record,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the decoder's own")
    parser.add_argument("--shrink", action="store_true", help="a small decoder, short prompts: checks this script only")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "highlight.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, what = decoder(options.device, dtype, shrink=options.shrink)
    print(what, file=sys.stderr)
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/highlight.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "device": options.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "what": what,
    }
    short, long, steps = (24, 48, 2) if options.shrink else (640, 2048, 10)
    parts: dict[str, Callable[[], Any]] = {
        "operators": lambda: operators(options.device),
        "memory": lambda: memory(model, long, options.device),
        "prompt": lambda: prefill(model, short, options.device, options.rounds),
        "long prompt": lambda: prefill(model, long, options.device, min(options.rounds, 3)),
        "steps": lambda: decode(model, short, options.device, options.rounds, steps),
    }
    if options.device not in ("cpu", "cuda"):  # whose allocators tell what they gave out
        parts.pop("memory")
    with torch.inference_mode():
        for name in options.only or parts:
            print(name, file=sys.stderr)
            record[name] = parts[name]()
            write_json(options.output, record)


if __name__ == "__main__":
    main()
