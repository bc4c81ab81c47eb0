"""What the streaming probes cost: the time of a forward pass with each probe, and with all of them, over a plain one.

    python benchmarks/probes.py                     # writes benchmarks/results/probes.json
    python benchmarks/probes.py --device cuda       # on an accelerator
    python benchmarks/probes.py --shrink --rounds 1 --output x.json  # the same code on little, anywhere
    git worktree add rival c7bdd40
    python benchmarks/probes.py --rival rival --output y.json        # beside the build of another checkout

Plain and measured passes take turns in one process. On a CPU they are timed in processor seconds of one thread, which
other work on the machine does not count into; on an accelerator in seconds between synchronisations. A ratio is the
median over rounds of the ratio within a round.

Beside a rival (`rival.py`) told is what a probe takes of a plain pass, of this build over the rival.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import rival
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, Qwen3Config

import alula
from alula.data import Collator
from alula.files import write_json
from alula.probes import Alignment, AttentionShift, Geometry, Overlap, Probe, VocabularyLens, watch
from alula.training.environment import readable_environment
from alula_fledgling.sources import MicroworldSource

PROBES: dict[str, Callable[[], Probe]] = {
    "attention shift": AttentionShift,
    "alignment": Alignment,
    "geometry": Geometry,
    "vocabulary lens": VocabularyLens,
    "overlap": Overlap,
}
BATCHES = 2
"""batches per timing, unless shrunk"""


def fledgling(device: str, dtype: torch.dtype | None, *, shrink: bool) -> tuple[Any, list[dict[str, Any]], str]:
    """The host that ships with alula, on the microworld's picture questions; in float32 unless another is named."""
    model, processor = alula.build_host("fledgling", "fledgling", dtype=dtype)
    collate, source = Collator(processor), MicroworldSource("visual", split="test")
    count, size = (1, 4) if shrink else (BATCHES, 32)
    batches = [dict(collate([source[size * b + i] for i in range(size)])) for b in range(count)]
    for batch in batches:
        batch.pop("labels")
    what = f"fledgling host (image rows and questions of the microworld, batches of {size})"
    return model.to(device).eval(), batches, what


def decoder(device: str, dtype: torch.dtype | None, *, shrink: bool) -> tuple[Any, list[dict[str, Any]], str]:
    """A random LLaVA host with a decoder of ordinary proportions and 256 image rows per prompt.

    On a CPU it is small and in float32, on an accelerator of 7B proportions and in bfloat16 unless another is named.
    """
    torch.manual_seed(0)
    big = device != "cpu" and not shrink
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    text = Qwen3Config(
        vocab_size=152_000 if big else 32_000,
        hidden_size=3584 if big else 512,
        intermediate_size=9728 if big else 1536,
        num_hidden_layers=28 if big else 8,
        num_attention_heads=28 if big else 8,
        num_key_value_heads=4,
        head_dim=128 if big else 64,
    )
    if shrink:
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim = 64, 96, 2, 8
        text.layer_types = text.layer_types[:2]
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=text.vocab_size - 1)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    batches = []
    for _ in range(1 if shrink else BATCHES):
        ids = torch.randint(0, 30_000, (2, 320))
        ids[:, 16:272] = config.image_token_id
        pixels = torch.randn(2, 3, 224, 224)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return model, batches, "random LLaVA host (prompts of 320 rows, 256 of them image rows, batches of 2)"


HOSTS = {"fledgling": fledgling, "decoder": decoder}


def measure(model: Any, batches: Sequence[dict[str, Any]], device: str, rounds: int) -> dict[str, Any]:
    """Times per pass, plain and measured in turns, and their ratios."""
    parameter = next(model.parameters())
    batches = [
        {k: v.to(device, parameter.dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}
        for batch in batches
    ]
    chosen: dict[str, list[Probe]] = {"plain": [], **{name: [make()] for name, make in PROBES.items()}}
    chosen["all five"] = [make() for make in PROBES.values()]
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(rounds + 1):
        for name, probes in chosen.items():
            with watch(model, probes) if probes else nullcontext(), torch.no_grad():
                began = _clock(device)
                for batch in batches:
                    model(**batch, use_cache=False)
                spent = (_clock(device) - began) / len(batches)
            if turn:  # the first round warms up
                seconds[name].append(spent)
        print(f"  round {turn} of {rounds}", file=sys.stderr)
    ratios = {
        name: [own / plain for own, plain in zip(values, seconds["plain"], strict=True)]
        for name, values in seconds.items()
    }
    return {
        "seconds_per_pass": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "ratio_to_plain": {
            name: {"median": round(statistics.median(r), 3), "low": round(min(r), 3), "high": round(max(r), 3)}
            for name, r in ratios.items()
            if name != "plain"
        },
        "kept_bytes": {
            name: sum(v.numel() * v.element_size() for p in probes for v in p.state_dict().values())
            for name, probes in chosen.items()
            if probes
        },
    }


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def _ratios(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What probes take of a plain pass, by host."""
    hosts = record["hosts"].items()
    return {name: {probe: ratio["median"] for probe, ratio in host["ratio_to_plain"].items()} for name, host in hosts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the hosts' own")
    parser.add_argument("--shrink", action="store_true", help="small hosts and batches: checks this script, not speed")
    parser.add_argument("--only", choices=tuple(HOSTS), help="measure one host; the other is left out of the record")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "probes.json")
    parser.add_argument("--rival", type=Path, help="a checkout of another build, measured beside this one on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/probes.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "device": options.device,
        "rounds": options.rounds,
        "hosts": {},
    }
    if options.rival is not None:
        rival.refuse_idle(parser, options)
        del record["hosts"]
        small = ["--shrink"] if options.shrink else []
        found = rival.beside("probes.py", options.rival, options.rounds, small, _ratios)
        write_json(options.output, {**record, "build over rival": found})
        return
    dtype = getattr(torch, options.dtype) if options.dtype else None
    for name, make in HOSTS.items():
        if options.only not in (None, name):
            continue
        model, batches, what = make(options.device, dtype, shrink=options.shrink)
        print(what, file=sys.stderr)
        config = model.config.get_text_config()
        found = record["hosts"][name] = {
            "what": what,
            "parameters": sum(p.numel() for p in model.parameters()),
            "decoder": {key: getattr(config, key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")},
            "dtype": str(model.dtype).removeprefix("torch."),
            "rows": [list(batch["input_ids"].shape) for batch in batches],
            **measure(model, batches, options.device, options.rounds),
        }
        for probe, ratio in found["ratio_to_plain"].items():
            print(f"  {probe:16} {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})", file=sys.stderr)
        write_json(options.output, record)


if __name__ == "__main__":
    main()
