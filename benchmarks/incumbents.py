"""Policies beside other ways to have fewer image tokens: kvpress's presses, and masks as papers' code uses them.

    python -m venv kv && kv/bin/pip install kvpress==0.5.5 torch==2.13.0
    python benchmarks/incumbents.py --kvpress kv/bin/python      # writes benchmarks/results/incumbents.json
    python benchmarks/incumbents.py --shrink --rounds 1 --output x.json   # this library alone, on little

kvpress asks for an older transformers, so it runs in a process of its own, of the environment named. Both processes
hold a random decoder of the same shape; they take turns within a round, one at a time, on one thread each, and a ratio
is that to the plain pass of the *same* process in the same round. A press keeps as many keys as the policy of its row
keeps over all layers. Masks get their choice for nothing (the same tokens each time), which flatters them. Long prompts
take two rounds at most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import kvpress_process
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alula import TokenMap
from alula.files import write_json
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.training.environment import readable_environment
from policies import masked, policies, prompt, ratio

POLICIES = ("withdrawal in the middle", "pruned to 50 % at layer 2", "pruned to 25 % at layer 2")


class Rival:
    """kvpress in a process of its own, which runs what it is told and says how many seconds that took."""

    def __init__(self, python: Path, request: dict[str, Any]) -> None:
        script = Path(kvpress_process.__file__)
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.ask(request)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"kvpress's process ended with {self.process.wait()}; its own words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def ours(model: PreTrainedModel, image: int, text: int, steps: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Of each arm in this process: a prompt and the steps behind it, timed."""
    embeds, tokens = prompt(model, image, text)
    layers = model.config.num_hidden_layers
    step = torch.tensor([[7]], device=model.device)

    def run(manager: Callable[[], Any] | None, **given: Any) -> dict[str, float]:
        def read() -> Any:
            return cache_of_output(model(inputs_embeds=embeds, logits_to_keep=1, **given))

        def go_on(cache: Any) -> None:
            model(input_ids=step, **{cache_keyword(): cache})

        if manager is None:
            return kvpress_process.prompt_and_steps(read, go_on, steps)
        with manager():
            return kvpress_process.prompt_and_steps(read, go_on, steps)

    arms: dict[str, Callable[[], dict[str, float]]] = {"plain": lambda: run(None)}
    for name in POLICIES:
        policy = policies(layers, image, text)[name][0]
        arms[name] = lambda p=policy: run(lambda: p.on(model), token_map=tokens)
    # masks as in `policies.py`, in the prompt alone; steps behind them hold every key, as the published code's do
    by_masks = {
        "withdrawal by masks": (layers // 2, tokens),
        "pruned to 50 % by masks": (2, _without(tokens, 0.5)),
    }
    for name, (layer, left) in by_masks.items():
        arms[name] = lambda layer=layer, left=left: _masked(model, layer, left, embeds, step, steps)
    return arms


def _without(tokens: TokenMap, share: float) -> TokenMap:
    """The map in which a share of the image's tokens, every other one, counts as the tokens that stay."""
    modalities = (~tokens.is_text).long()
    where = modalities[0].nonzero()[:, 0]
    modalities[0, where[:: round(1 / share)]] = 0
    return TokenMap.from_modalities(modalities)


def _masked(
    model: PreTrainedModel, layer: int, tokens: TokenMap, embeds: Tensor, step: Tensor, steps: int
) -> dict[str, float]:
    def read() -> Any:
        with masked(model, layer, tokens):
            return cache_of_output(model(inputs_embeds=embeds, logits_to_keep=1))

    return kvpress_process.prompt_and_steps(
        read, lambda cache: model(input_ids=step, **{cache_keyword(): cache}), steps
    )


def kept(layers: int, image: int, text: int) -> dict[str, float]:
    """Keys that the policies keep, of all."""
    every = layers * (image + text)
    return {
        name: sum(policies(layers, image, text)[name][1](layer)[0] for layer in range(layers)) / every
        for name in POLICIES
    }


def measured(arms: dict[str, Callable[[], dict[str, float]]], plain: dict[str, str], rounds: int) -> dict[str, Any]:
    """Ratios of prompts and of steps, each to the plain one that `plain` names, within a round; one round warms up."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, go in arms.items():
            took = go()
            if turn:
                seconds[name].append(took)
        print(f"  round {turn} of {rounds}", file=sys.stderr)
    found: dict[str, Any] = {}
    for name, base in plain.items():
        found[name] = {}
        for what in ("prompt", "step"):
            took = {each: [one[what] for one in seconds[each]] for each in (name, base)}
            found[name][what] = ratio(took, name, base)
        print(f"  {name:40} {found[name]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", type=Path, help="the interpreter of an environment that has kvpress")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--shrink", action="store_true", help="a small decoder, short prompts: checks this script only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "incumbents.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = {"prompt": (24, 64)} if options.shrink else {"prompt": (576, 64), "long prompt": (2880, 64)}
    steps = 2 if options.shrink else 5
    model = kvpress_process.decoder(options.device, options.dtype, shrink=options.shrink)
    layers = model.config.num_hidden_layers
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/incumbents.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "device": options.device,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "what": f"random decoder of {'tiny' if options.shrink else '0.5B'} shape, vocabulary of 1,024",
        "steps per round": steps,
    }
    with torch.inference_mode():
        for what, (image, text) in lengths.items():
            rounds = options.rounds if what == "prompt" else min(options.rounds, 2)
            arms, keep = ours(model, image, text, steps), kept(layers, image, text)
            plain = dict.fromkeys([name for name in arms if name != "plain"], "plain")
            record[what] = {"image tokens": image, "text tokens": text, "keys kept": keep}
            if options.kvpress is None:
                record[what]["of plain"] = measured(arms, plain, rounds)
                write_json(options.output, record)
                continue
            request = {
                "device": options.device,
                "dtype": options.dtype,
                "shrink": options.shrink,
                "length": image + text,
                "steps": steps,
                "keep": keep,
            }
            with Rival(options.kvpress, request) as rival:
                record["kvpress"] = rival.about["versions"]
                for name in rival.about["arms"]:
                    arms[f"kvpress: {name}"] = lambda r=rival, n=name: r.ask({"run": n})
                    if name != "plain":
                        plain[f"kvpress: {name}"] = "kvpress: plain"
                record[what]["of plain"] = measured(arms, plain, rounds)
            write_json(options.output, record)


if __name__ == "__main__":
    main()
