"""What codes cost: nearest centroids beside a loop over centroids, and constrained beside plain generation.

    python benchmarks/codes.py                              # everything; writes results/codes.json
    python benchmarks/codes.py --shrink --output x.json     # the same code, tiny

Contenders take turns within rounds, every second round backwards; times are of the processor (one thread), and ratios
are within rounds. Counts are of operators that compute (`meter.py`).

- encoding: `alula.codes.nearest` beside a loop over the centroids; one in float64 says what is right, and the matrix
  product that `nearest` cannot do without says what is left to save.
- million: memory that a million frames take beyond themselves.
- generation: ids of one item per sample by `generate` with the constraint, and as many without it, TEAL attached both
  times.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meter import Meter
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import alula
from alula.codes import nearest
from alula.files import write_json
from alula.grafts import TealConfig
from alula.grafts.teal import GENERATES, CodesSpec
from alula.seam import generation_extras

RESULTS = Path(__file__).parent / "results" / "codes.json"


def loop(frames: Tensor, centroids: Tensor) -> Tensor:
    """One centroid after the other; of equally near ones the first."""
    best = torch.full((len(frames),), torch.inf, dtype=frames.dtype, device=frames.device)
    found = torch.zeros(len(frames), dtype=torch.int64, device=frames.device)
    for number, centroid in enumerate(centroids):
        gap = (frames - centroid).square().sum(dim=1)
        found = torch.where(gap < best, number, found)
        best = torch.minimum(best, gap)
    return found


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor by contender and round."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            contenders[name]()
            if turn:  # the first round warms up
                taken[name].append(time.process_time() - start)
    return taken


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Of times within rounds: the median, and the least and most."""
    found = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def encoding(shrink: bool, rounds: int, place: dict[str, Any]) -> dict[str, Any]:
    """Nearest centroids at TEAL's sizes for sounds (768 wide) and at a tower's."""
    found = {}
    sizes = [(1500, 256, 768), (20_000, 64, 768)]
    for frames, count, width in [(50, 8, 4)] if shrink else sizes:
        generator = torch.Generator().manual_seed(0)
        x, book = (torch.randn(rows, width, generator=generator).to(**place) for rows in (frames, count))
        squares = book.square().sum(dim=1)
        contenders: dict[str, Callable[[], Any]] = {
            "nearest": lambda x=x, book=book: nearest(x, book),
            "loop": lambda x=x, book=book: loop(x, book),
            "loop in float64": lambda x=x, book=book: loop(x.double(), book.double()),
            "product": lambda x=x, book=book, squares=squares: torch.addmm(squares, x, book.mT, alpha=-2),
        }
        taken = in_turns(contenders, rounds)
        found[f"{frames:,} frames, {count} centroids, {width} wide"] = {
            "loop over nearest": ratio(taken["loop"], taken["nearest"]),
            "loop in float64 over nearest": ratio(taken["loop in float64"], taken["nearest"]),
            "nearest over its matrix product alone": ratio(taken["nearest"], taken["product"]),
            "loop over the matrix product alone": ratio(taken["loop"], taken["product"]),
            "multiplications and additions of the product": 2 * frames * count * width,
            "seconds": {name: statistics.median(seconds) for name, seconds in taken.items()},
            "same as the loop in float64": float((nearest(x, book) == loop(x.double(), book.double())).float().mean()),
        }
    return found


def million(shrink: bool, place: dict[str, Any]) -> dict[str, float]:
    """Mebibytes by which the peak of the process grows while a million frames are encoded."""
    frames = torch.randn(1000 if shrink else 1_000_000, 16).to(**place)
    book = torch.randn(1024, 16).to(**place)
    nearest(frames[:1000], book)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest(frames, book)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "frames": len(frames),
        "peak growth": (after - before) / 1024,
        "all distances": len(frames) * 1024 * 4 / 2**20,
    }


def generation(shrink: bool, rounds: int, place: dict[str, Any]) -> dict[str, Any]:
    """Per token, with TEAL attached: the constraint beside plain generation."""
    found = {}
    for name, (width, layers, words, codes, length) in {
        "512 wide, 8 layers, 8192 codes": (512, 8, 8192, 8192, 24),
        "192 wide, 6 layers, 512 codes": (192, 6, 1024, 512, 24),
    }.items():
        if shrink:
            width, layers, words, codes, length = 32, 1, 64, 16, 4
        torch.manual_seed(0)
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width, "vocab_size": words}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4}
        config = Qwen3Config(**sizes, **heads)
        model: Any = Qwen3ForCausalLM(config).eval().to(**place)
        model.generation_config.eos_token_id = None
        spec = CodesSpec(size=codes, tokens=length - 2, width=16)
        alula.attach(model, TealConfig(codes={"image": spec}))
        ids = torch.randint(5, words, (4, 16)).to(place["device"])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options: dict[str, Any] = {
            "max_new_tokens": length,
            "min_new_tokens": length,
            "do_sample": False,
            "pad_token_id": 0,
        }

        def plain(model: Any = model, inputs: Any = inputs, options: Any = options) -> Any:
            return model.generate(**inputs, **options)

        def constrained(model: Any = model, inputs: Any = inputs, options: Any = options) -> Any:
            with generation_extras(model, {**inputs, GENERATES: torch.zeros_like(inputs["input_ids"][:, :1])}) as given:
                return model.generate(**given, **options)

        counts = {}
        for way in (plain, constrained):
            with Meter() as meter:
                way()
            counts[way.__name__] = meter.counts.total / length
        taken = in_turns({"plain": plain, "constrained": constrained}, rounds)
        found[name] = {
            "tokens": length,
            "constrained over plain": ratio(taken["constrained"], taken["plain"]),
            "operators per token": counts,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    place = {"dtype": getattr(torch, given.dtype), "device": torch.device(given.device)}
    torch.set_num_threads(1)
    with torch.no_grad():
        record = {
            "environment": {
                "torch": torch.__version__,
                "machine": platform.machine(),
                "threads": 1,
                "dtype": given.dtype,
                "device": given.device,
            },
            "rounds": given.rounds,
            "million": million(given.shrink, place),  # first: what was the peak before is no growth
            "encoding": encoding(given.shrink, given.rounds, place),
            "generation": generation(given.shrink, given.rounds, place),
        }
    write_json(given.output, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
