"""What policies save on the clock, beside what they save on paper.

    python benchmarks/policies.py                    # writes benchmarks/results/policies.json
    python benchmarks/policies.py --only steps       # one part, anew; the others stay in the record
    python benchmarks/policies.py --device cuda      # on an accelerator: a decoder of 7B shape in bfloat16
    python benchmarks/policies.py --shrink --rounds 1 --output x.json   # the same code on little, anywhere

Plain passes and passes under each policy take turns in one process. On a CPU they are timed in processor seconds of one
thread, which other work on the machine does not count into; on an accelerator in seconds between synchronisations. Told
are the median over rounds of the ratio within a round, and the ratio of the fastest rounds: other work still takes
caches and memory from what is timed, and that only ever adds. Shares of a saving go by the latter. What is counted are
multiplications of matrices in the decoder's layers, attention as all pairs of tokens; what ranks tokens is not counted,
but timed. "By hand" is the same work in a loop without this library, tokens chosen for nothing: what a machine gives at
most for fewer tokens. Memory is what torch's allocator gives out, exactly. "host" is what Python takes, on a decoder of
28 layers so thin that nothing else counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from meter import Meter, peak_bytes
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from alula import TokenMap
from alula.files import write_json
from alula.policies import Policy, Prune, Skip, Withdraw
from alula.seam import install
from alula.seam.dialect import MASK, cache_keyword, cache_of_output
from alula.training.environment import readable_environment

PARTS = ("operators", "host", "memory", "memory of tiles", "prompt", "prompt of tiles", "steps")
SYSTEM = 32
"""text tokens in front of the image; the rest of the text is behind it"""
Sizes = Callable[[int], tuple[int, int]]
"""of a layer: the tokens attention is given, and those the MLP is given"""


def decoder(device: str, dtype: torch.dtype | None, *, shrink: bool) -> tuple[Any, str]:
    """A random decoder: of 0.5B shape in float32 on a CPU, of 7B shape in bfloat16 elsewhere, unless told otherwise."""
    torch.manual_seed(0)
    big = device != "cpu" and not shrink
    shape = (3584, 18944, 28, 28, 4) if big else (64, 96, 8, 4, 2) if shrink else (896, 4864, 24, 14, 2)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(vocab_size=1024, **dict(zip(names, shape, strict=True)))
    dtype = dtype or (torch.bfloat16 if big else torch.float32)
    with torch.device(device):
        model: PreTrainedModel = Qwen2ForCausalLM(config).to(dtype).eval()
    return model, f"random decoder of {'7B' if big else 'tiny' if shrink else '0.5B'} shape, vocabulary of 1,024"


@contextmanager
def idle(model: Any) -> Iterator[None]:
    """The seam alone, for somebody who asks nothing."""
    seam = install(model, "idle")
    try:
        yield
    finally:
        seam.release("idle")


@contextmanager
def masked(model: Any, layer: int, tokens: TokenMap) -> Iterator[None]:
    """Withdrawal as it is often published: nothing is removed, keys are barred by masks."""
    length = tokens.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril() & tokens.is_text[:, None, None]
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=tokens.device)

    def bar(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, MASK: allowed}

    handles = [each.register_forward_pre_hook(bar, with_kwargs=True) for each in model.model.layers[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model: Any, sizes: Sizes, embeds: Tensor, tokens: TokenMap) -> None:
    """As many tokens per layer as a policy leaves, as fast as can be: the layers in a loop, for one prompt alone.

    Nothing is chosen: of the image the first tokens stay. Tokens that come back stand aside meanwhile.
    """
    decoder, text = model.model, tokens.is_text[0]
    ranks = torch.where(text, -1, (~text).cumsum(0) - 1)
    cos, sin = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1], device=embeds.device)[None])
    cache, kept = {cache_keyword(): DynamicCache(config=model.config)}, int(text.sum())
    places: dict[int, Tensor] = {}

    def place(count: int) -> Tensor:
        if count not in places:
            places[count] = (ranks < count - kept).nonzero()[:, 0]
        return places[count]

    every, last = embeds.shape[1], len(decoder.layers)
    for index, each in enumerate(decoder.layers):
        attending, feeding = sizes(index)
        largest = max(max(sizes(later)) for later in range(index, last))
        if largest < every:  # for good
            left = torch.searchsorted(place(every), place(largest)) if every < len(ranks) else place(largest)
            embeds, cos, sin, every = embeds[:, left], cos[:, left], sin[:, left], largest
        inner = embeds if attending == every else embeds[:, place(attending)]
        rope = (cos, sin) if attending == every else (cos[:, place(attending)], sin[:, place(attending)])
        attended, _ = each.self_attn(
            each.input_layernorm(inner), position_embeddings=rope, attention_mask=None, **cache
        )
        inner = inner + attended
        fed = inner if feeding == attending else inner[:, place(feeding)]
        fed = fed + each.mlp(each.post_attention_layernorm(fed))
        if feeding != attending:
            inner[:, place(feeding)] = fed
            fed = inner
        if attending == every:
            embeds = fed
        else:
            embeds = embeds.clone()
            embeds[:, place(attending)] = fed
    model.lm_head(decoder.norm(embeds[:, -1:]))


def policies(layers: int, image: int, text: int) -> dict[str, tuple[Policy, Sizes]]:
    """Each with how many tokens it leaves in a layer."""
    every, quarter = image + text, layers // 4

    def pruned(*stages: tuple[int, float], **settings: Any) -> tuple[Policy, Sizes]:
        def sizes(layer: int) -> tuple[int, int]:
            share = ([1.0] + [share for first, share in stages if first <= layer])[-1]
            return text + round(share * image), text + round(share * image)

        return Prune(stages=stages, **settings), sizes

    own = {"name": "last_query_attention", "of_layer": "itself"}

    return {
        "withdrawal in the middle": (
            Withdraw(layer=layers // 2),
            lambda layer: (every, every) if layer < layers // 2 else (text, text),
        ),
        "pruned to 50 % at layer 2": pruned((2, 0.5)),
        "pruned to 25 % at layer 2": pruned((2, 0.25)),
        "pruned to 11 % at layer 2": pruned((2, 0.11)),
        "PyramidDrop": pruned(
            (quarter, 0.5), (2 * quarter, 0.25), (3 * quarter, 0.125), criterion=own, positions="dense"
        ),
        "MLP skipped behind a quarter": (
            Skip(part="mlp", layers=tuple(range(quarter, layers))),
            lambda layer: (every, every if layer < quarter else text),
        ),
        "every second block skipped": (
            Skip(part="block", layers=tuple(range(2, layers, 2))),
            lambda layer: (text, text) if layer and layer % 2 == 0 else (every, every),
        ),
    }


def in_steps(layers: int) -> dict[str, Policy]:
    """Those that leave something out of steps, which hold as many keys as plain ones."""
    return {
        "every second block skipped in steps": Skip(
            part="block", layers=tuple(range(2, layers, 2)), tokens="all", when="steps"
        ),
        "MLP of the upper half skipped in steps": Skip(
            part="mlp", layers=tuple(range(layers // 2, layers)), tokens="all", when="steps"
        ),
    }


def counted(config: Any, sizes: Sizes) -> float:
    """Multiplications of matrices in all layers, attention as all pairs."""
    total, width = 0.0, config.hidden_size
    heads = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        attending, feeding = sizes(layer)
        total += attending * width * (2 * width + 2 * heads) + 2 * attending**2 * width
        total += 3 * feeding * width * config.intermediate_size
    return total


def timed(
    run: dict[str, Callable[[], Any]],
    device: str,
    rounds: int,
    inside: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext(),
) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one round that warms up; what it runs `inside` is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(rounds + 1):
        for name, go in run.items():
            with inside(name):
                began = _clock(device)
                go()
                took = _clock(device) - began
            if turn:
                seconds[name].append(took)
        print(f"  round {turn} of {rounds}", file=sys.stderr)
    return seconds


def _clock(device: str) -> float:
    if device == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def ratio(seconds: dict[str, list[float]], name: str, to: str = "plain") -> dict[str, float]:
    each = [own / plain for own, plain in zip(seconds[name], seconds[to], strict=True)]
    return {
        "median": round(statistics.median(each), 3),
        "low": round(min(each), 3),
        "high": round(max(each), 3),
        "fastest": round(min(seconds[name]) / min(seconds[to]), 3),
    }


def _share(seconds: dict[str, list[float]], name: str, by_hand: str) -> float | None:
    """Of what is saved by hand; None where that is nothing."""
    ours, theirs = ratio(seconds, name)["fastest"], ratio(seconds, by_hand)["fastest"]
    return None if theirs >= 1 else round((1 - ours) / (1 - theirs), 3)


def _paired_share(seconds: dict[str, list[float]], name: str, by_hand: str) -> float | None:
    """The same by medians, of what both took right after one another."""
    rounds = zip(seconds["plain"], seconds[name], seconds[by_hand], strict=True)
    each = [((ours - theirs) / plain, 1 - theirs / plain) for plain, ours, theirs in rounds]
    lost, saved = (statistics.median(part) for part in zip(*each, strict=True))
    return None if saved <= 0 else round(1 - lost / saved, 3)


def prompt(model: Any, image: int, text: int) -> tuple[Tensor, TokenMap]:
    """Embeddings of one prompt, and its map."""
    modalities = torch.zeros(1, image + text, dtype=torch.int64, device=model.device)
    modalities[:, SYSTEM : SYSTEM + image] = 1
    embeds = torch.randn(1, image + text, model.config.hidden_size, device=model.device, dtype=model.dtype)
    return embeds, TokenMap.from_modalities(modalities)


def prefill(model: Any, image: int, text: int, device: str, rounds: int, chosen: list[str] | None) -> dict[str, Any]:
    """Times of a prompt under each policy over plain ones, beside what is counted."""
    embeds, tokens = prompt(model, image, text)
    layers = model.config.num_hidden_layers
    arms = {name: arm for name, arm in policies(layers, image, text).items() if chosen is None or name in chosen}

    def plain() -> None:
        model(inputs_embeds=embeds, logits_to_keep=1)

    def under(manager: Any) -> Callable[[], None]:
        def go() -> None:
            with manager():
                model(inputs_embeds=embeds, token_map=tokens, logits_to_keep=1)

        return go

    def barred() -> None:
        with masked(model, layers // 2, tokens):
            plain()

    run = {"plain": plain, **{name: under(lambda p=p: p.on(model)) for name, (p, _) in arms.items()}}
    if chosen is None:
        run |= {
            "nothing asked": under(lambda: idle(model)),
            "withdrawal by masks alone": barred,
        }
    run |= {f"{name}, by hand": lambda s=sizes: by_hand(model, s, embeds, tokens) for name, (_, sizes) in arms.items()}
    seconds = timed(run, device, rounds)
    whole = counted(model.config, lambda layer: (image + text, image + text))
    record: dict[str, Any] = {
        "image tokens": image,
        "text tokens": text,
        "plain seconds": round(statistics.median(seconds["plain"]), 4),
        "policies": {},
        "others": {n: ratio(seconds, n) for n in ("nothing asked", "withdrawal by masks alone") if n in run},
    }
    for name, (_, sizes) in arms.items():
        paper, clock = counted(model.config, sizes) / whole, ratio(seconds, name)
        hand = ratio(seconds, f"{name}, by hand")
        record["policies"][name] = {
            "counted": round(paper, 3),
            "measured": clock,
            "share of the saving that arrives": round((1 - clock["fastest"]) / (1 - paper), 3),
            "by hand": hand,
            "share of what is saved by hand": _share(seconds, name, f"{name}, by hand"),
        }
        print(
            f"  {name:30} counted {paper:.3f} measured {clock['fastest']:.3f} by hand {hand['fastest']:.3f}",
            file=sys.stderr,
        )
    return record


def decode(model: Any, image: int, text: int, device: str, rounds: int, steps: int) -> dict[str, Any]:
    """Times of steps behind a long prompt, whose cache holds fewer keys under a policy. By hand: plain ones behind a
    plain cache cut down to as many keys per layer. The first step of a turn, behind attaching, is not timed."""
    embeds, tokens = prompt(model, image, text)
    layers = model.config.num_hidden_layers
    leaner = {name: policy for name, (policy, _) in policies(layers, image, text).items()}
    arms = {name: leaner[name] for name in ("withdrawal in the middle", "pruned to 11 % at layer 2")} | in_steps(layers)
    step = torch.tensor([[7]], device=model.device)
    caches: dict[str, Any] = {"plain": cache_of_output(model(inputs_embeds=embeds, logits_to_keep=1))}
    for name, policy in arms.items():
        with policy.on(model):
            caches[name] = cache_of_output(model(inputs_embeds=embeds, token_map=tokens, logits_to_keep=1))

    held = {name: [layer.keys.shape[-2] for layer in cache.layers[:layers]] for name, cache in caches.items()}
    lean = [name for name in arms if name in leaner]
    for name in lean:
        cache = caches[f"{name}, by hand"] = copy.deepcopy(caches["plain"])
        for layer, count in zip(cache.layers, held[name], strict=True):
            layer.keys, layer.values = layer.keys[..., :count, :].clone(), layer.values[..., :count, :].clone()

    def go(name: str) -> None:
        for _ in range(steps):
            model(input_ids=step, **{cache_keyword(): caches[name]})

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        with arms[name].on(model) if name in arms else contextlib.nullcontext():
            model(input_ids=step, **{cache_keyword(): caches[name]})  # what was just attached finds its host out once
            yield

    # each right before the same by hand
    order = ["plain", *(each for name in lean for each in (name, f"{name}, by hand"))]
    order += [name for name in caches if name not in order]
    seconds = timed({name: partial(go, name) for name in order}, device, rounds, inside)
    return {
        "image tokens": image,
        "steps per round": steps,
        "plain seconds per step": round(statistics.median(seconds["plain"]) / steps, 5),
        "keys held, of plain": {name: round(sum(held[name]) / sum(held["plain"]), 3) for name in arms},
        "measured": {name: ratio(seconds, name) for name in caches if name != "plain"},
        "share of what is saved by hand": {name: _paired_share(seconds, name, f"{name}, by hand") for name in lean},
    }


def memory(model: Any, image: int, text: int, device: str) -> dict[str, Any]:
    """Bytes at the peak of a prompt, and in the cache behind it, under each policy."""
    embeds, tokens = prompt(model, image, text)
    layers, found = model.config.num_hidden_layers, {}
    arms: dict[str, Any] = {"plain": contextlib.nullcontext, "nothing asked": lambda: idle(model)}
    arms |= {name: lambda p=p: p.on(model) for name, (p, _) in policies(layers, image, text).items()}
    arms["withdrawal by masks alone"] = lambda: masked(model, layers // 2, tokens)
    for name, manager in arms.items():
        given = {} if name in ("plain", "withdrawal by masks alone") else {"token_map": tokens}
        with manager():
            cache = cache_of_output(model(inputs_embeds=embeds, logits_to_keep=1, **given))
            held = sum(each.nbytes for layer in cache.layers[:layers] for each in (layer.keys, layer.values))
            del cache
            peak = peak_bytes(lambda g=given: model(inputs_embeds=embeds, logits_to_keep=1, **g), device)
        found[name] = {"peak bytes": peak, "cache bytes": held}
        print(f"  {name:30} peak {peak / 2**20:.1f} MiB, cache {held / 2**20:.1f}", file=sys.stderr)
    plain = found["plain"]
    for each in found.values():
        each |= {
            f"{what} of plain": round(each[f"{what} bytes"] / plain[f"{what} bytes"], 3) for what in ("peak", "cache")
        }
    return {"image tokens": image, "text tokens": text, "policies": found}


def host(rounds: int) -> dict[str, Any]:
    """Milliseconds of one thread that a block, a prompt and a step take where only Python and launching count."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).eval()
    embeds, tokens = prompt(model, 24, 64)
    arms: dict[str, Any] = {"plain": contextlib.nullcontext, "nothing asked": lambda: idle(model)}
    arms |= {name: lambda p=p: p.on(model) for name, (p, _) in policies(28, 24, 64).items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {"block": [], "prompt": [], "step": []} for name in arms}
    for _ in range(10 * rounds):
        for name, manager in arms.items():
            given = {} if name == "plain" else {"token_map": tokens}
            began = time.thread_time()
            with manager():
                entered = time.thread_time()
                cache = cache_of_output(model(inputs_embeds=embeds, logits_to_keep=1, **given))
                read = time.thread_time()
                model(input_ids=torch.tensor([[7]]), **{cache_keyword(): cache})
                stepped = time.thread_time()
            times = (entered - began + time.thread_time() - stepped, read - entered, stepped - read)
            for what, took in zip(("block", "prompt", "step"), times, strict=True):
                seconds[name][what].append(took)
    return {
        name: {what: round(1000 * statistics.median(each), 2) for what, each in own.items()}
        for name, own in seconds.items()
    }


def operators(model: Any, image: int, text: int) -> dict[str, Any]:
    """Operators that one more packed layer costs beyond the host's own, in a prompt and in a step behind it."""
    embeds, tokens = prompt(model, image, text)
    step, told = embeds[:, :1], TokenMap.text(1, 1, device=model.device)
    layers, found = model.config.num_hidden_layers, {}
    for packed in (0, 1, 2):
        with idle(model) if not packed else Withdraw(layer=layers - packed).on(model):
            with Meter() as whole:
                output = model(inputs_embeds=embeds, token_map=tokens, logits_to_keep=1)
            with Meter() as after:
                model(inputs_embeds=step, token_map=told, **{cache_keyword(): cache_of_output(output)})
        found[packed] = {"prompt": whole.counts.total, "step": after.counts.total}
    return {
        "all layers, nothing packed": found[0],
        "beyond the host, first packed layer": {key: found[1][key] - found[0][key] for key in found[0]},
        "beyond the host, each further one": {key: found[2][key] - found[1][key] for key in found[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the decoder's own")
    parser.add_argument("--shrink", action="store_true", help="a small decoder, short prompts: checks this script only")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "policies.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, what = decoder(options.device, dtype, shrink=options.shrink)
    print(what, file=sys.stderr)
    place = {"device": options.device, "dtype": str(model.dtype).removeprefix("torch."), "what": what}
    record: dict[str, Any] = {**place, "parts": {}}
    if options.only and options.output.exists():
        record = json.loads(options.output.read_text())
        if any(record[name] != value for name, value in place.items()):
            raise SystemExit(f"{options.output} was measured elsewhere: name another --output")
    tiled = ["pruned to 11 % at layer 2", "withdrawal in the middle"]
    image, tiles, long = (24, 48, 48) if options.shrink else (576, 2880, 2048)
    with torch.inference_mode():
        parts: dict[str, Callable[[], Any]] = {
            "operators": lambda: operators(model, image, 64),
            "host": lambda: host(options.rounds),
            "memory": lambda: memory(model, image, 64, options.device),
            "memory of tiles": lambda: memory(model, tiles, 64, options.device),
            "prompt": lambda: prefill(model, image, 64, options.device, options.rounds, None),
            "prompt of tiles": lambda: prefill(model, tiles, 64, options.device, min(options.rounds, 3), tiled),
            "steps": lambda: decode(model, long, 64, options.device, 4 * options.rounds, 2 if options.shrink else 5),
        }
        if options.device not in ("cpu", "cuda"):  # whose allocators tell what they gave out
            parts = {name: part for name, part in parts.items() if not name.startswith("memory")}
        for name in options.only or parts:
            record[name] = parts[name]()
            record["parts"][name] = {
                "command": " ".join(["python", "benchmarks/policies.py", *sys.argv[1:]]),
                "rounds": options.rounds,
                "environment": readable_environment(),
            }
            write_json(options.output, record)


if __name__ == "__main__":
    main()
