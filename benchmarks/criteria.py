"""What choosing costs: a quarter of an image's tokens by every criterion, on the clock and on paper.

    python benchmarks/criteria.py                    # writes benchmarks/results/criteria.json
    python benchmarks/criteria.py --device cuda      # on an accelerator: a decoder of 7B shape in bfloat16
    python benchmarks/criteria.py --shrink --rounds 1 --output x.json   # the same code on little, anywhere

The decoder, the prompt, the clock and what is counted are those of `policies.py`: choosing is not counted, but timed.
Criteria that can choose in front of the first layer do; the others in front of the third.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from alula.files import write_json
from alula.policies import Policy, Prune
from alula.training.environment import readable_environment
from policies import counted, decoder, prompt, ratio, timed

SHARE = 0.25
CRITERIA: dict[str, tuple[int, dict[str, Any]]] = {
    "random": (0, {"criterion": "random"}),
    "grid": (0, {"criterion": "grid"}),
    "pooling": (0, {"criterion": "pooling"}),
    "max_min_diversity": (0, {"criterion": "max_min_diversity"}),
    "conditional_dpp": (0, {"criterion": "conditional_dpp"}),
    "grid, merged into the nearest": (0, {"criterion": "grid", "merge": "nearest"}),
    "random, contextual merging": (0, {"criterion": "random", "merge": "contextual"}),
    "last_query_attention": (2, {"criterion": "last_query_attention"}),
    "last_query_attention of the layer itself": (
        2,
        {"criterion": {"name": "last_query_attention", "of_layer": "itself"}},
    ),
    "instruction_attention": (2, {"criterion": "instruction_attention"}),
    "rope_free_attention": (2, {"criterion": {"name": "rope_free_attention", "stride": 6}}),
    "duplicates": (2, {"criterion": "duplicates"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the decoder's own")
    parser.add_argument("--shrink", action="store_true", help="a small decoder, short prompts: checks this script only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "criteria.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, what = decoder(
        options.device, getattr(torch, options.dtype) if options.dtype else None, shrink=options.shrink
    )
    print(what, file=sys.stderr)
    image, text = 36 if options.shrink else 576, 64
    with torch.inference_mode():
        found = measured(model, image, text, options.device, options.rounds)
    record = {
        "command": " ".join(["python", "benchmarks/criteria.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "device": options.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "what": what,
        "image tokens": image,
        "text tokens": text,
        "share that stays": SHARE,
        "criteria": found,
    }
    write_json(options.output, record)


def measured(model: Any, image: int, text: int, device: str, rounds: int) -> dict[str, Any]:
    """By criterion: what is counted and what is measured, of a plain pass."""
    embeds, tokens = prompt(model, image, text)

    def under(policy: Policy) -> Any:
        def go() -> None:
            with policy.on(model):
                model(inputs_embeds=embeds, token_map=tokens, logits_to_keep=1)

        return go

    policies = {
        name: Prune.model_validate({"stages": ((layer, SHARE),), **settings})
        for name, (layer, settings) in CRITERIA.items()
    }
    run = {"plain": lambda: model(inputs_embeds=embeds, logits_to_keep=1)}
    run |= {name: under(policy) for name, policy in policies.items()}
    seconds, every = timed(run, device, rounds), image + text
    whole, found = counted(model.config, lambda layer: (every, every)), {}
    for name, (first, _) in CRITERIA.items():
        left = round(SHARE * image) + text

        def sizes(layer: int, first: int = first, left: int = left) -> tuple[int, int]:
            return (every, every) if layer < first else (left, left)

        paper, clock = counted(model.config, sizes) / whole, ratio(seconds, name)
        found[name] = {
            "layer": first,
            "counted": round(paper, 3),
            "measured": clock,
            "share of the saving that arrives": round((1 - clock["median"]) / (1 - paper), 3),
        }
        print(f"  {name:42} counted {paper:.3f} measured {clock['median']:.3f}", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
